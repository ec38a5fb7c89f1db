"""StableGPT in an unmodified nanoGPT checkout: `python -m nanogpt_patch PATH/TO/train.py [CONFIG] [--name=value ...]`."""
