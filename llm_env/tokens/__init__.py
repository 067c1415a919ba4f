"""Token ids and arrays: what a text is, when it ends, and the one transition of the MDP."""
