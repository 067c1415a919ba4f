"""Texts for learning: who writes them, and the batches they are packed into."""
