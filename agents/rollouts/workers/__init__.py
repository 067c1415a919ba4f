"""Texts are written by other processes: on this machine, on others, or where Ray puts them.

pool              an engine's `write`, divided into parts
crew              who writes which part, and again if it is lost
process           one process that writes, as the program sees it
here, gate, ray   how to come by one
worker, visit     what runs in it
"""

from agents.rollouts.workers.pool import Workers

__all__ = ["Workers"]
