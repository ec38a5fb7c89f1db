"""Few combinations of methods in which every two that go together meet, for each stack to build, train, save and fold."""

from itertools import combinations, product

from stable_core.options import Options
from stable_core.registry import SLOTS, method, names

Pair = tuple[tuple[str, str], tuple[str, str]]  # two (slot, name)


def combined() -> list[dict[str, str]]:
    """Keywords of `Options`, one for each slot of the registry, such that each pair that some `Options` has is in one of them.

    Of those not yet met the one with the most new pairs is next. Methods that a test registers are left out.
    """
    own = [[name for name in names(slot) if method(slot, name).module.startswith("stable_core.")] for slot in SLOTS]
    allowed = {chosen: pairs(chosen) for chosen in product(*own) if is_allowed(chosen)}
    wanted, found = set().union(*allowed.values()), []
    while wanted:
        best = max(allowed, key=lambda chosen: len(allowed[chosen] & wanted))
        wanted -= allowed[best]
        found.append(dict(zip(SLOTS, best, strict=True)))
    return found


def pairs(chosen: tuple[str, ...]) -> set[Pair]:
    return set(combinations(zip(SLOTS, chosen, strict=True), 2))


def is_allowed(chosen: tuple[str, ...]) -> bool:
    try:
        Options(**dict(zip(SLOTS, chosen, strict=True)))
    except ValueError:
        return False
    return True


def label(settings: dict[str, str]) -> str:
    """A name for a parametrised test."""
    return " ".join(settings.values())
