"""`python -m hf_stable.convert {fairseq,nanogpt,timm,gpt2,folded} ...`: checkpoints of elsewhere to self-contained folders.

A converted model is compared with the one it came from before anything is written. A README.md says what it is.
"""

import argparse
import importlib
import pickle
import sys
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from hf_stable.card import records_beside, verdict_of, write_card
from hf_stable.exporting import check_vacant
from stable_core.checkpoint_file import what_is_wrong
from stable_core.extras import extra
from stable_core.registry import import_methods

PROG = "python -m hf_stable.convert"
SOURCES = {
    "fairseq": "a checkpoint of fairseq_sigma, or of fairseq's transformer, with its dictionaries",
    "nanogpt": "ckpt.pt of nanoGPT",
    "timm": "stablevit_* and sigma_vit_*",
    "gpt2": "transformers' GPT-2, to StableGPT",
    "folded": "a saved model with σReparam, to plain weights",
}


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[1])
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for source, what in SOURCES.items():
        command = commands.add_parser(source, help=what)
        command.add_argument(
            "--methods", default="", metavar="MODULE,...", help="import these, which register your methods"
        )
        command.add_argument(
            "--run",
            type=Path,
            metavar="RUN",
            help="monitored run, whose verdict goes into the README (default: records beside the checkpoint)",
        )
        if source in given[:1]:  # fairseq and timm are not everybody's
            try:
                with extra(source if source in ("fairseq", "timm") else "hf"):
                    module = importlib.import_module(f"hf_stable.convert_{source}")
            except ModuleNotFoundError as error:
                parser.error(str(error))
            module.add_arguments(command)
    args = parser.parse_args(given)
    logging.disable_progress_bar()
    try:
        check_vacant(args.out)
        import_methods(args.methods)
        verdict = verdict_for(args)
        out = module.run(args)
        write_card(out, verdict)
    except (OSError, RuntimeError, ValueError, ImportError, StrictDataclassError, pickle.UnpicklingError) as error:
        message = what_is_wrong(error) if isinstance(error, pickle.UnpicklingError) else str(error).splitlines()[0]
        print(f"convert: {message}", file=sys.stderr)
        return 1
    print(f"wrote {out}: load it with trust_remote_code=True, which needs transformers alone")
    return 0


def verdict_for(args: argparse.Namespace) -> str:
    """Of the run that is given, or lies beside the checkpoint; of the latter it may be missing, with a warning."""
    if args.run is not None:
        return verdict_of(args.run)
    checkpoint = getattr(args, "checkpoint", "") or getattr(args, "model", "")
    run = records_beside(checkpoint) if checkpoint else None
    try:
        return verdict_of(run) if run else ""
    except (OSError, ValueError) as error:
        print(f"convert: no verdict in README.md: {error}", file=sys.stderr)
        return ""


if __name__ == "__main__":
    sys.exit(main())
