"""`python -m stable_core.fold_checkpoint CHECKPOINT OUT`: a σReparam checkpoint -> one that the plain model loads.

CHECKPOINT is a file of `torch.save` that is a state dict or holds one (under "model", "state_dict", ...); what else it holds is
kept. A saved optimizer does not fit the folded weights: fold for inference, not to go on training.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from .checkpoint_file import read_checkpoint
from .folding import fold_state_dict

PROG = "python -m stable_core.fold_checkpoint"


def fold_checkpoint(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Folds every state dict in it; returns the new checkpoint and the keys under which they were found.

    Raises:
        ValueError: it holds no reparametrised layer, or as `fold_state_dict`.
    """
    if any("parametrizations." in str(key) for key in checkpoint):
        return fold_state_dict(checkpoint), ["the state dict"]
    places = [
        key
        for key, value in checkpoint.items()
        if isinstance(value, dict) and any("parametrizations." in str(inner) for inner in value)
    ]
    if not places:
        raise ValueError(f"nothing to fold: no reparametrised layer in it (it holds {', '.join(map(str, checkpoint))})")
    return {**checkpoint, **{place: fold_state_dict(checkpoint[place]) for place in places}}, places


def read(path: Path) -> dict[str, Any]:
    """`read_checkpoint`, with advice in the error for a file that holds objects which torch refuses."""
    try:
        return read_checkpoint(path)
    except ValueError as error:
        if "allowed are" not in str(error):
            raise
        advice = "python -m fairseq_sigma.export folds fairseq's translation models, of others save model.state_dict()"
        raise ValueError(f"{error}; {advice}") from error


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0].replace(PROG, prog))
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="written by torch.save")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the folded checkpoint goes")
    args = parser.parse_args(argv)
    try:
        if args.out.exists() and args.out.samefile(args.checkpoint):
            raise ValueError(f"{args.out}: give OUT another name than CHECKPOINT")
        folded, places = fold_checkpoint(read(args.checkpoint))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(folded, args.out)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"fold_checkpoint: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"folded {', '.join(map(str, places))} of {args.checkpoint} into {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
