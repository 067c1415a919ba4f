"""The faces of the token MDP: Gymnasium (one episode, many), TorchRL, Stable-Baselines3. Thin views of `TokenMDP`."""
