"""How a recipe's command ends: its exit status, one line for what went wrong, or what to do after an interruption."""

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
