"""`python -m agents.cli`."""

import sys

from agents.cli.main import main

sys.exit(main())
