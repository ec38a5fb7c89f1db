"""`python -m stable_core.fold CHECKPOINT OUT`."""

import sys

from ..fold_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
