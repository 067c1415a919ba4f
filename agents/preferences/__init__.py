"""Learning from which of two texts is preferred: pairs, and reward models trained on them."""
