"""`python -m fairseq_sigma.average CHECKPOINT [CHECKPOINT ...] OUT`: the mean of checkpoints of one run, for fairseq-generate.

What fairseq's scripts/average_checkpoints.py does, which is not in its package and cannot read its checkpoints with today's
torch. W and gamma are averaged; u is too, and found afresh for the averaged W when the model loads them.
"""

import argparse
import sys
from pathlib import Path

import torch

import fairseq_sigma  # noqa: F401  mends torch.load for fairseq's checkpoints
from stable_core.checkpoint_file import read_checkpoint

PROG = "python -m fairseq_sigma.average"


def average(states: list[dict[str, torch.Tensor]], paths: list[Path]) -> dict[str, torch.Tensor]:
    """The mean of state dicts, read from `paths`, taken in fp32 and kept in each tensor's dtype.

    Raises:
        ValueError: they are not of one model.
    """
    first = states[0]
    for state, path in zip(states, paths, strict=True):
        if state.keys() != first.keys() or any(state[key].shape != first[key].shape for key in first):
            raise ValueError(f"{path}: not of the same model as {paths[0]}")
    return {
        key: torch.stack([state[key].float() for state in states]).mean(dim=0).to(value) for key, value in first.items()
    }


def read(path: Path) -> dict:
    """Raises ValueError: it is no checkpoint of fairseq."""
    checkpoint = read_checkpoint(path, mmap=True)
    if not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{path}: no checkpoint of fairseq, it holds no model")
    return checkpoint


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0].replace(PROG, prog))
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="written by fairseq-train")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the mean goes")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} exists: give a new file for OUT, after the checkpoints")
        first, *others = map(read, args.checkpoints)
        mean = average([first["model"], *(other["model"] for other in others)], args.checkpoints)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**first, "model": mean, "last_optimizer_state": None}, args.out)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"average: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"averaged {len(args.checkpoints)} checkpoints into {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
