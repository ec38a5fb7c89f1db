"""`stable_core.fold`, the function, and `python -m stable_core.fold`, the command.

The package imports it first and puts the function in its place, where it stays: a module that is loaded already is not put
there again. (A plain module of this name would be, or Python would warn that the command is loaded twice.)
"""

from ..folding import fold, fold_state_dict

__all__ = ["fold", "fold_state_dict"]
