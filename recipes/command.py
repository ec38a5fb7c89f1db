"""How a recipe's command ends: its exit status, one line for what went wrong, or what to do after an interruption."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

GOES_ON = "; the same command goes on where it stopped"


def command(
    main: Callable[[], int],
    stopped: str = GOES_ON,
    errors: tuple[type[Exception], ...] = (OSError, ValueError),
    name: str | None = None,
) -> NoReturn:
    """Runs `main` as the whole of a process.

    Args:
        main: returns the exit status.
        stopped: what follows the word "stopped" after Ctrl-C.
        errors: those that are told in one line, by name of the file, or `name`; others keep their traceback.
    """
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(f"\nstopped{stopped}")
    except errors as error:
        sys.exit(f"{name or Path(sys.argv[0]).stem}: {error}")


def keyword_arguments(pairs: tuple[str, ...], setting: str = "model_kwargs") -> dict:
    """{"alpha": 0.25} of ("alpha=0.25",)."""
    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{setting} = {pair!r}: allowed are NAME=VALUE")
        try:
            result[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[name] = value
    return result
