"""`python -m stable_monitor.rescue_checkpoint CHECKPOINT OUT`: a checkpoint of a collapsed run -> one to go on from.

CHECKPOINT is fairseq's or nanoGPT's file, a Trainer's or a vision recipe's folder, or with --model any file of torch.save that
holds a state dict. The command that trained it resumes OUT, as it resumes a run that was rescued under way: OUT says which
layers are reparametrised. The optimizer's state goes along.
"""

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from stable_core.bounding import LIMIT
from stable_core.checkpoint_file import read_checkpoint
from stable_core.extras import extra
from stable_core.targets import those_left
from stable_core.unfolding import reparametrised_in

from .others import reparametrise
from .records import load
from .rescue import bound_and_train
from .resume import reparametrise_named
from .saved_optimizer import optimizer_holding, usual_groupings

PROG = "python -m stable_monitor.rescue_checkpoint"
STACKS = ("fairseq_sigma", "nanogpt_patch", "hf_stable", "recipes.vision")  # those with a module `opening`


@dataclass(frozen=True)
class Opened:
    """A checkpoint in memory.

    Attributes:
        model: with its weights.
        optimizer: with its state, on the model's parameters; None where the checkpoint has none.
        save: writes the checkpoint to a path, with model and optimizer as they are then.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    save: Callable[[Path], None]


def rescue_checkpoint(opened: Opened, layers: Iterable[str], limit: float = LIMIT) -> list[str]:
    """Bounds queries and keys of the named attentions as `stable_monitor.rescue` does; a line a layer.

    Raises:
        ValueError: the model has no such layer; as `bound_queries_and_keys`.
    """
    modules, names = dict(opened.model.named_modules()), list(layers)
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f"layers = {unknown[0]!r}: the model has no such module")
    optimizers = [] if opened.optimizer is None else [opened.optimizer]
    done = bound_and_train(opened.model, optimizers, {name: modules[name] for name in names}, limit)
    return [
        f"{name}: |W_q| {one.queries[0]:.3g} -> {one.queries[1]:.3g}, |W_k| {one.keys[0]:.3g} -> {one.keys[1]:.3g}"
        for name, one in done.items()
    ]


def reparametrise_checkpoint(opened: Opened) -> list[str]:
    """Gives every plain layer σReparam with gamma = sigma, which keeps function and moments; returns their names."""
    optimizers = [] if opened.optimizer is None else [opened.optimizer]
    return reparametrise(opened.model, optimizers, those_left(opened.model))


def collapsed_layers(run: Path, fraction: float = 0.3) -> list[str]:
    """Of a run's last record: the attentions whose median head has less entropy than this part of log(keys).

    Raises:
        ValueError: the run has no records, or no such layer.
    """
    records, _ = load(run)
    layers = records[-1]["layers"]
    uniform = {name: torch.tensor(layer["keys"]).log().item() for name, layer in layers.items()}
    low = [name for name, layer in layers.items() if median(layer["entropy"]) < fraction * uniform[name]]
    if not low:
        raise ValueError(
            f"{run}: in its last record no layer's entropy is below {fraction:g} of log(keys); name --layers"
        )
    return low


def open_checkpoint(path: Path, model: str | None = None) -> Opened:
    """A checkpoint of whichever stack wrote it.

    Args:
        path: a file or a folder.
        model: for files that do not say it: `timm:NAME`, or `MODULE:FUNCTION`, which returns the plain model.

    Raises:
        OSError, ValueError: it cannot be read; no stack knows it, and model was not given.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if model is not None:
        return _open_plain(path, model)
    for stack in STACKS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of others' packages
                opening = importlib.import_module(f"{stack}.opening")
        except ImportError:  # the stack is not installed
            continue
        if opening.is_mine(path):
            return opening.open_checkpoint(path)
    raise ValueError(
        f"{path}: not a checkpoint of fairseq, nanoGPT, a Trainer or a vision recipe that is installed here; say which model "
        "it is of, --model timm:NAME or --model MODULE:FUNCTION"
    )


def _open_plain(path: Path, model: str) -> Opened:
    """A file of torch.save with a state dict in it, under "model", "state_dict" or alone, and perhaps "optimizer".

    Lightning's has a list of "optimizer_states", which is of one under automatic optimization.
    """
    module, colon, name = model.partition(":")
    if not colon or not name:
        raise ValueError(f"model = {model!r}: allowed are timm:NAME and MODULE:FUNCTION")
    if module == "timm":
        with extra("timm"):
            import timm

        built = timm.create_model(name)
    else:
        sys.path.insert(0, "")  # as python -m has it
        try:
            build = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"model = {model!r}: {error}; allowed are timm:NAME and MODULE:FUNCTION") from error
        built = build()
    checkpoint = read_checkpoint(path)
    place = next((key for key in ("model", "state_dict") if isinstance(checkpoint.get(key), dict)), None)
    state = checkpoint if place is None else checkpoint[place]
    reparametrise_named(built, reparametrised_in(state))
    built.load_state_dict(state)
    optimizer, alone = None, "optimizer" in checkpoint
    saved = [checkpoint["optimizer"]] if alone else checkpoint.get("optimizer_states", [])
    if saved:
        optimizer = optimizer_holding(built, saved[0], usual_groupings(built)) if len(saved) == 1 else None
        if optimizer is None:
            raise ValueError(
                f"{path}: its optimizer has other groups than all parameters in one, or matrices and vectors; leave it out"
            )

    def save(out: Path) -> None:
        new = built.state_dict() if place is None else {**checkpoint, place: built.state_dict()}
        if optimizer is not None:
            new |= {"optimizer": optimizer.state_dict()} if alone else {"optimizer_states": [optimizer.state_dict()]}
        torch.save(new, out)

    return Opened(built, optimizer, save)


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    description, details = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(prog=prog, description=description.replace(PROG, prog), epilog=details)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the new one goes; it must not be there yet")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--layers", nargs="+", metavar="NAME", help="attentions to rescue, by their names in the model")
    which.add_argument(
        "--run", type=Path, metavar="RUN", help="rescue those that had collapsed in this run's last record"
    )
    which.add_argument("--reparam", action="store_true", help="σReparam for every layer, with the function kept")
    parser.add_argument("--model", metavar="MODEL", help="timm:NAME, or MODULE:FUNCTION, which returns the plain model")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise ValueError(f"{args.out}: it is there already; give OUT another name")
        opened = open_checkpoint(args.checkpoint, args.model)
        if args.reparam:
            said = [f"σReparam on {len(reparametrise_checkpoint(opened))} layers, the function kept"]
        else:
            said = rescue_checkpoint(opened, args.layers or collapsed_layers(args.run))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        opened.save(args.out)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"rescue_checkpoint: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print("\n".join(said))
    if opened.optimizer is None:
        print("the checkpoint has no optimizer: its moments start anew")
    print(
        f"wrote {args.out}: have the command that trained {args.checkpoint} resume it (fairseq --restore-file, Trainer "
        "resume_from_checkpoint=, Lightning ckpt_path=, nanoGPT --init_from=resume --out_dir=)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
