"""`python -m stable_core.fold CHECKPOINT OUT`. Imported, this would take the place of the function `stable_core.fold`."""

import sys

from .fold_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
