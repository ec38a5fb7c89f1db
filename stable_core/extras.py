"""What is not installed, and the extra of stable-transformer that installs it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """A context for imports of packages that the extra `name` installs.

    Raises:
        ModuleNotFoundError: one of them is not installed; with the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if "stable-transformer[" in str(error):  # another such context, inside, knows it better
            raise
        package = (error.name or "").partition(".")[0]
        message = f"{package} is not installed: pip install 'stable-transformer[{name}]'"
        raise ModuleNotFoundError(message, name=package) from error
