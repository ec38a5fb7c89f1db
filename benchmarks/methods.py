"""What can be chosen, and what does not go together, from the registry: `python -m benchmarks.methods`.

What is printed is in docs/methods.md.
"""

from itertools import combinations, product

from benchmarks.markdown import table
from stable_core.options import OPTIONS, Options
from stable_core.registry import SLOTS, WrongOption, method, names


def methods() -> str:
    """Every registered method."""
    rows = [("option", "value", "what it is")]
    for slot in SLOTS:
        rows += [(f"`{slot}`", f"`{name}`", method(slot, name).summary.replace("|", "\\|")) for name in names(slot)]
    return table(*rows, align="---")


def settings() -> str:
    """The options that are no methods."""
    rows = [("setting", "default", "what it is")]
    rows += [(f"`{o.name}`", f"`{o.default}`", o.metadata["summary"]) for o in OPTIONS if o.name not in SLOTS]
    return table(*rows, align="---")


def refused() -> str:
    """Pairs of methods that no model has together; all others are in every stack."""
    rows = [("", "with", "why not")]
    for first, second in combinations(SLOTS, 2):
        for a, b in product(names(first), names(second)):
            try:
                Options(**{first: a, second: b})
            except WrongOption as error:
                rows.append((f"`{first}={a}`", f"`{second}={b}`", error.allowed))
    return table(*rows, align="---")


def main() -> None:
    print("\n\n".join((methods(), settings(), refused())))


if __name__ == "__main__":
    main()
