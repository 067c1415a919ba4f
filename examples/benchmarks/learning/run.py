"""The learning suite, from the command line: `python examples/benchmarks/learning/run.py --help`."""

import sys
from pathlib import Path

# In place of this folder the one above it: it has the package `learning` and what the benchmarks share, while the
# modules in here would take the place of others of the same name, such as Python's own `statistics`.
sys.path[0] = str(Path(__file__).parents[1])

from learning.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
