"""A whole run: its parts, the warm start, the iterations, the evaluations."""
