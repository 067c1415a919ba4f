"""Actor, critic and reference over one language model."""
