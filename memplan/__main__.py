"""`python -m memplan`, for where the command isn't on the path."""

import sys

from memplan.cli import main

sys.exit(main())
