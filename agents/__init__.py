"""Agents that learn on the token environment. The PPO agent is not here yet; see `examples/` for agents in one file."""
