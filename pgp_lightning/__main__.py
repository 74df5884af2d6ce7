"""`python -m pgp_lightning` is the same as `lightning`."""

import sys

from pgp_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
