"""`stable SUBCOMMAND ...`: the commands of all packages under one name. Each is its module's `main`, `python -m MODULE` too.

Nothing is imported but the module that is asked for, so that help and completion answer at once.
"""

import importlib
import sys
import warnings
from difflib import get_close_matches
from importlib.metadata import version
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand: the module whose `main` it is, the extra that installs what that imports, and what it does."""

    module: str
    extra: str
    what: str


COMMANDS = {
    "diagnose": Command("stable_monitor.diagnose", "monitor", "what became of monitored runs, and what to do about it"),
    "report": Command("stable_monitor.report", "monitor", "monitored runs side by side on one page"),
    "rescue": Command("stable_monitor.rescue_checkpoint", "monitor", "a checkpoint of a collapsed run, to go on from"),
    "sweep": Command("stable_monitor.sweep", "monitor", "a training command at several learning rates and seeds"),
    "thin": Command("stable_monitor.thin", "monitor", "leave out records of a long run"),
    "fold": Command("stable_core.fold_checkpoint", "", "σReparam into plain weights, in a file of torch.save"),
    "convert": Command("hf_stable.convert", "hf", "checkpoints of any stack to folders that transformers loads"),
    "update": Command("hf_stable.update", "hf", "renew the source beside a saved transformers model"),
    "average": Command("fairseq_sigma.average", "fairseq", "the mean of fairseq checkpoints"),
    "export": Command("fairseq_sigma.export", "fairseq", "a fairseq checkpoint that stock fairseq loads"),
}
COMPLETION = "completion"
NAMES = (*COMMANDS, COMPLETION)
SHELLS = {
    "bash": """_stable() {{ if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W '{names}' -- "$2")); fi; }}
complete -o default -F _stable stable
""",
    "zsh": """_stable() {{ if (( CURRENT == 2 )); then compadd -- {names}; else _files; fi }}
compdef _stable stable
""",
    "fish": """complete -c stable -n __fish_use_subcommand -f -a '{names}'
""",
}


def usage() -> str:
    what = {
        **{name: command.what for name, command in COMMANDS.items()},
        COMPLETION: "completion for bash, zsh or fish",
    }
    lines = "\n".join(f"  {name:<12}{text}" for name, text in what.items())
    return f"""usage: stable SUBCOMMAND ...   (stable SUBCOMMAND --help says more)
       stable --version

{lines}

examples:
  stable diagnose runs/a
  stable report runs/a runs/b -o report.html
  eval "$(stable completion bash)"
"""


def completion(arguments: list[str]) -> int:
    """Prints what a shell evaluates to complete the subcommands' names, and names of files after them."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        return refuse(f"usage: stable {COMPLETION} SHELL; allowed are {', '.join(SHELLS)}")
    print(SHELLS[arguments[0]].format(names=" ".join(NAMES)), end="")
    return 0


def refuse(message: str) -> int:
    print(f"stable: {message}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if name == "--version":
        print(f"stable-transformer {version('stable-transformer')}")
        return 0
    if name == COMPLETION:
        return completion(arguments)
    if name not in COMMANDS:
        near = get_close_matches(name, NAMES, n=1)
        maybe = f"did you mean {near[0]}? " if near else ""
        return refuse(f"{name}: no such subcommand; {maybe}allowed are {', '.join(NAMES)}")
    command = COMMANDS[name]
    if "" not in sys.path:  # as python -m has it: modules of the user's own are found, and a checkout's recipes
        sys.path.insert(0, "")
    try:
        with warnings.catch_warnings():
            for category in (SyntaxWarning, FutureWarning):  # of others' packages
                warnings.simplefilter("ignore", category)
            module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        extra = f"[{command.extra}]" if command.extra else ""
        return refuse(f"{name}: {error.name} is not installed: pip install 'stable-transformer{extra}'")
    return module.main(arguments, f"stable {name}")


if __name__ == "__main__":
    sys.exit(main())
