"""``python -m ffw_fast`` is ``ffw-fast``."""

import sys

from ffw_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
