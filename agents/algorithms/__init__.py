"""What an algorithm is, and one file for each."""
