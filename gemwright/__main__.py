"""`python -m gemwright`, the same as the `gemwright` command."""

import sys

from gemwright.cli import main

if __name__ == "__main__":
    sys.exit(main())
