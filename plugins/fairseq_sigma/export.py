"""`python -m fairseq_sigma.export CHECKPOINT OUT`: a checkpoint that stock fairseq loads without this plugin, outputs equal.

σReparam is folded into the weights. DeepNorm's residual is folded as well: LN(alpha x + f) = LN(x + f / alpha), so the output
projection and the second feed-forward layer are divided by alpha; only LayerNorm's eps, 1e-5 against a variance of about 1,
does not scale along. A model with another norm, or none, or another attention has no equal in stock fairseq. The training
state is left out.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

from fairseq_sigma.resume import rescued_layers
from fairseq_sigma.transformer import SigmaTransformerModel
from stable_core import fold_state_dict
from stable_core.checkpoint_file import read_checkpoint
from stable_core.options import NAMES, of
from stable_core.residuals import build_residuals

PROG = "python -m fairseq_sigma.export"
OURS = {*NAMES, "init_std", "methods"}
FOLDED_RESIDUAL = re.compile(r"(?P<side>encoder|decoder)\.layers\.\d+\.(?:.*\.out_proj|fc2)\.(?:weight|bias)")


def export(checkpoint: dict) -> dict:
    """A checkpoint of `sigma_transformer` -> one of fairseq's `transformer`; of a rescued model of fairseq's -> a plain one.

    Raises:
        ValueError: it is neither, or its norm or attention is not fairseq's.
    """
    cfg = checkpoint.get("cfg")
    if cfg is None or "model" not in checkpoint or cfg.get("model") is None:
        raise ValueError("no checkpoint of a fairseq_sigma model: it holds no configuration of one")
    args = argparse.Namespace(**(cfg["model"] if isinstance(cfg["model"], dict) else vars(cfg["model"])))
    arch = getattr(args, "arch", None) or getattr(args, "_name", None)
    kind = ARCH_MODEL_REGISTRY.get(arch)
    if kind is SigmaTransformerModel:
        state, stock = _as_transformer(checkpoint["model"], args, arch)
    elif rescued_layers(checkpoint) and kind is not None and kind.__module__.startswith("fairseq."):
        state, stock = fold_state_dict(checkpoint["model"]), vars(args)
    else:
        raise ValueError(f"no checkpoint of a fairseq_sigma model: its arch is {arch}")
    return {
        "args": None,
        # Plain dicts, which torch.load reads with its safety on, where fairseq itself writes a Namespace.
        "cfg": {**cfg, "model": stock, "common": {**cfg["common"], "user_dir": None}},
        "model": state,
        "optimizer_history": [
            {"optimizer_name": None, "lr_scheduler_state": None, "num_updates": h["num_updates"]}
            for h in checkpoint["optimizer_history"]
        ],
        "task_state": checkpoint.get("task_state", {}),
        "extra_state": {"train_iterator": {"epoch": 1}},
    }


def _as_transformer(state: dict, args: argparse.Namespace, arch: str) -> tuple[dict, dict]:
    """The weights and settings of fairseq's own transformer that computes the same."""
    ARCH_CONFIG_REGISTRY[arch](args)  # fairseq-hydra-train saves the overrides alone
    model = vars(args)
    for name, stock in (("norm", "layernorm"), ("attention", "dot")):
        if model[name] != stock:
            raise ValueError(f"--{name} {model[name]}: stock fairseq has no such transformer, allowed is {stock}")
    state = dict(state)
    if any("parametrizations." in key for key in state):
        state = fold_state_dict(state)
    residuals = build_residuals(of(args), model["encoder_layers"], model["decoder_layers"])
    for key in state:
        if match := FOLDED_RESIDUAL.fullmatch(key):
            residual = residuals[match["side"] == "decoder"]
            if not residual.norm_first:
                state[key] = state[key] / residual.alpha
    stock = {key: value for key, value in model.items() if key not in OURS}
    return state, stock | {"_name": "transformer", "arch": "transformer", "user_dir": None}


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0].replace(PROG, prog))
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="written by fairseq-train")
    parser.add_argument("out", type=Path, metavar="OUT", help="where the stock checkpoint goes")
    args = parser.parse_args(argv)
    try:
        exported = export(read_checkpoint(args.checkpoint))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(exported, args.out)
    except (OSError, RuntimeError, ValueError) as error:
        message = str(error).splitlines()[0].removeprefix(f"{args.checkpoint}: ")
        print(f"export: {args.checkpoint}: {message}", file=sys.stderr)
        return 1
    print(
        f"exported {args.checkpoint} to {args.out}; fairseq-generate --path {args.out} --required-batch-size-multiple 1 "
        "needs no --user-dir (with neither flag, fairseq leaves out the last sentences)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
