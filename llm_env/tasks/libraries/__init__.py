"""Environments of other libraries, as tasks; each library is imported when its task is made."""
