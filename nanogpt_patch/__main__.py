"""`python -m nanogpt_patch PATH/TO/train.py [CONFIG] [--name=value ...]`; sample.py and bench.py too, and `torchrun -m`."""

import sys

from .launch import main

sys.exit(main(sys.argv[1:]))
