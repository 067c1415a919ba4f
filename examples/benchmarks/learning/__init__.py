"""The learning suite: how fast algorithms learn in several regimes. `run.py` starts it, README.md says what it does."""
