"""What a run shows and writes down.

`display` shows how it goes, `log` writes it down, `curves` draws it, `warnings` says in words what goes wrong. What the
numbers are called and where they are shown is in the table of `agents.metrics`.
"""
