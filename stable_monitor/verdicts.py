"""What became of a run, from its records: the rules of the verdict. Each but "healthy" is a row of docs/my_run_diverges.md.

They are asked in the order of causes: a run that collapsed and then became NaN is a collapse. Relative entropy is that of a
layer's median head divided by log(keys): 1 is attention to all keys alike.

- **blowup**: before any layer has collapsed, the loss is above RISEN times that of the first record, and stays there for a
  second record or is then not a number; or it is above EXPLODED times at the very record at which a layer has collapsed. At the
  end it has not come back, or layers have collapsed. Or: at the end it has lost half of what it had won.
- **collapse**: at the end a layer has collapsed: its relative entropy fell below GONE at a logit above LARGE, and has not been
  above BACK since, nor above LOW at a logit below LARGE, nor its logit below half of LARGE. Or: a layer is below LOW, and the
  loss has lost a quarter of what it had won from the first to the best record, at least FELL of the first.
- **nan**: the loss or an entropy is not a number at the last record, or the gradient at the last OVERFLOWS of them (a scaler of
  fp16 skips single ones).
- **vanishing**: over the last records, gradient norms of the first third of layers are below FADED times those of the last
  third, and nearly all layers attend to all keys alike.
- **unseen**: none of these, and no record has an attention.
- **healthy**: none of these.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median, median_low
from typing import Any

WORDS = {
    "healthy": "healthy",
    "collapse": "entropy collapse",
    "vanishing": "vanishing gradients",
    "blowup": "blow-up",
    "nan": "not a number",
    "unseen": "nothing seen",
}
GONE, LOW, BACK = 0.1, 0.3, 0.5  # relative entropy
LARGE = 50.0  # logit
RISEN, EXPLODED = 2.0, 10.0  # times the first loss
FELL = 0.2  # of the first loss, below which a loss has not won anything to lose
QUARTER, HALF = 0.25, 0.5  # of what it had won
FADED = 0.02  # gradient norm
ALIKE = 0.9  # relative entropy of 4 layers in 5
OVERFLOWS = 3  # records
AT_THE_END = 5  # records whose median loss is the loss at the end
OF_GRADIENTS = 20  # records whose median is that of the gradients at the end


@dataclass(frozen=True)
class Verdict:
    """What became of a run.

    Attributes:
        verdict: a key of WORDS.
        step: the update from which on; None for a healthy run and one of which nothing is seen.
        layer: the attention where it is seen, or "".
        why: the numbers.
        rescues: how many layers were rescued, and how often.
    """

    verdict: str
    step: int | None
    layer: str
    why: str
    rescues: int = 0

    def __str__(self) -> str:
        where = f" in {self.layer}" if self.layer else ""
        since = "" if self.step is None else f" from update {self.step}"
        return f"{WORDS[self.verdict]}{where}{since}: {self.why}"


class Examination:
    """Looks at the records of a run one at a time, in their order, and has its verdict so far."""

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}
        self._losses: deque[float] = deque(maxlen=AT_THE_END)
        self._first, self._best, self._best_at = math.nan, math.inf, 0  # losses, and when
        self._rising: tuple[int, float] | None = None  # when the loss rose, and to what
        self._rose: tuple[int, float] | None = None  # the same, where that was a blow-up
        self._collapsed = False  # whether a layer ever has
        self._nan: dict[str, list[int]] = {}  # the records since which a number of the model is none, and was
        self._known: set[str] = set()  # what was a number once
        self._first_by_last: deque[float] = deque(maxlen=OF_GRADIENTS)
        self._fading_since: int | None = None
        self._steps: list[int] = []  # the first two
        self.rescues = 0

    def look(self, record: dict[str, Any]) -> None:
        step = record["step"]
        if len(self._steps) < 2:
            self._steps.append(step)
        self.rescues += len(record.get("rescues", ()))
        for name, layer in record["layers"].items():
            if layer.get("entropy") and (layer.get("keys", 0) is not None or None in layer["entropy"]):
                self._layers.setdefault(name, _Layer()).look(step, layer)
        collapsed = any(layer.gone_since is not None for layer in self._layers.values())
        for what in ("loss", "grad_l2"):
            if record.get(what) is not None:
                self._known.add(what)
                self._nan.pop(what, None)
            elif self._is_nan(record, what):
                self._nan.setdefault(what, []).append(step)
        self._look_at_loss(step, record.get("loss"), collapsed)
        self._collapsed = self._collapsed or collapsed
        ratio = first_by_last(record["layers"])
        self._fading_since = None if not ratio < FADED else step if self._fading_since is None else self._fading_since
        if not math.isnan(ratio):
            self._first_by_last.append(ratio)

    def _is_nan(self, record: dict[str, Any], what: str) -> bool:
        """Whether a number that is null was measured; in a record that does not say so, whether it ever was."""
        if "nonfinite" in record:
            return what in record["nonfinite"]
        return what in record and what in self._known

    def _look_at_loss(self, step: int, loss: float | None, collapsed: bool) -> None:
        if loss is None:
            self._rose = self._rose or (self._rising if "loss" in self._nan else None)
            return
        self._losses.append(loss)
        if loss < self._best:
            self._best, self._best_at = loss, step
        if math.isnan(self._first):
            self._first = loss
        if self._rose is not None or self._collapsed:
            return
        rise = 1 + (loss - self._first) / max(abs(self._first), 1e-12)
        stays = rise > RISEN and self._rising is not None and not collapsed
        if rise > EXPLODED or stays:
            self._rose = self._rising or (step, loss)
        self._rising = (self._rising or (step, loss)) if rise > RISEN and not collapsed else None

    def _has_lost(self, part: float) -> bool:
        """Whether the last losses are worse than the best by this part of what it is better than the first."""
        return bool(self._losses) and median(self._losses) > self._best + part * (self._first - self._best)

    def _turned(self, part: float) -> bool:
        """The same of a loss that had fallen, and has not only jumped."""
        fell = self._first - self._best > FELL * abs(self._first)
        return fell and len(self._losses) == AT_THE_END and self._has_lost(part)

    @property
    def blew_up(self) -> bool:
        """Whether the loss has blown up before any layer collapsed, and has not come back since."""
        return self._rose is not None and ("loss" in self._nan or self._has_lost(HALF))

    def verdict(self) -> Verdict:
        found = self._found()
        why = found.why
        if self.rescues:
            why += f"; {counted(self.rescues, 'rescue')}"
        if len(self._steps) == 2 and self._steps[0] > self._steps[1] - self._steps[0]:
            why += f"; the records begin at update {self._steps[0]}, and what was before is not known"
        return replace(found, why=why, rescues=self.rescues)

    def _found(self) -> Verdict:
        gone = sorted((x.gone_since, name) for name, x in self._layers.items() if x.gone_since is not None)
        if not gone and self._turned(QUARTER):
            gone = sorted((x.low_since, name) for name, x in self._layers.items() if x.low_since is not None)
        nan = self._not_a_number()
        if self._rose is not None and (self.blew_up or gone or nan):
            step, loss = self._rose
            return Verdict(
                "blowup", step, "", f"the loss went from {self._first:.4g} to {loss:.4g} before entropy fell"
            )
        if gone:
            (since, name), layer = gone[0], self._layers[gone[0][1]]
            numbers = f"entropy {layer.relative:.2g} of log(keys), largest logit {layer.logit:.3g}"
            return Verdict(
                "collapse", since, name, f"{numbers}; {len(gone)} of {len(self._layers)} layers have collapsed"
            )
        if nan is not None:
            return nan
        if not self._layers:
            return Verdict("unseen", None, "", "no record has an attention")
        if vanished := self._vanished():
            return vanished
        if self._turned(HALF):
            step, best = self._best_at, self._best
            return Verdict(
                "blowup", step, "", f"the loss went from {best:.4g} to {median(self._losses):.4g}, entropy did not fall"
            )
        least, step, name = min((*layer.least, name) for name, layer in self._layers.items())
        if least == math.inf:
            return Verdict("unseen", None, "", "no record says how many keys there are")
        why = f"least entropy {least:.2g} of log(keys), in {name} at update {step}"
        if were := [layer.first_gone for layer in self._layers.values() if layer.first_gone is not None]:
            why += f"; {counted(len(were), 'layer')} had collapsed, the first at update {min(were)}, and came back"
        if self._rose is not None:
            step, loss = self._rose
            why += f"; the loss blew up from {self._first:.4g} to {loss:.4g} at update {step}, and came back"
        return Verdict("healthy", None, "", why)

    def _not_a_number(self) -> Verdict | None:
        found = [(self._nan["loss"][0], "", "the loss")] if "loss" in self._nan else []
        found += [(x.nan_since, name, "an entropy") for name, x in self._layers.items() if x.nan_since is not None]
        if len(self._nan.get("grad_l2", ())) >= OVERFLOWS:
            found.append((self._nan["grad_l2"][0], "", "the gradient"))
        if not found:
            return None
        step, layer, what = min(found, key=lambda one: one[0])
        return Verdict("nan", step, layer, f"{what} is not a number")

    def _vanished(self) -> Verdict | None:
        alike = sum(layer.relative > ALIKE for layer in self._layers.values())
        if self._fading_since is None or len(self._first_by_last) < 3 or alike < 0.8 * len(self._layers):
            return None
        if (ratio := median(self._first_by_last)) >= FADED:
            return None
        why = f"gradient norms of the first layers are {ratio:.1g} of those of the last; {alike} of {len(self._layers)} layers"
        return Verdict("vanishing", self._fading_since, "", f"{why} attend to all keys alike")


class _Layer:
    """An attention layer, as its last record has it."""

    relative = logit = math.nan
    least = (math.inf, 0)  # relative entropy, and when
    gone_since: int | None = None
    first_gone: int | None = None
    low_since: int | None = None  # below LOW
    nan_since: int | None = None

    def look(self, step: int, layer: dict[str, Any]) -> None:
        entropy, keys = median_head(layer["entropy"]), layer.get("keys")
        if math.isnan(entropy):
            self.nan_since = step if self.nan_since is None else self.nan_since
            return
        self.nan_since = None
        if keys is None or keys <= 1:
            return
        self.relative = entropy / math.log(keys)
        self.logit = largest_logit(layer)
        self.least = min(self.least, (self.relative, step))
        self.low_since = None if self.relative >= LOW else step if self.low_since is None else self.low_since
        if self.relative < GONE and self.logit > LARGE:
            self.gone_since = step if self.gone_since is None else self.gone_since
            self.first_gone = self.gone_since if self.first_gone is None else self.first_gone
        elif self.relative > BACK or (self.relative > LOW and self.logit < LARGE) or self.logit < LARGE / 2:
            self.gone_since = None


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def first_by_last(layers: dict[str, dict[str, Any]]) -> float:
    """Gradient norms of the first third of layers / of the last third; NaN if unknown.

    Of encoder, decoder and cross-attention, the one where it is least.
    """
    by_kind: dict[str, list[float]] = {}
    for layer in layers.values():
        if layer.get("grad_l2") is not None:
            by_kind.setdefault(layer.get("kind", ""), []).append(layer["grad_l2"])
    ratios = []
    for norms in by_kind.values():
        third = len(norms) // 3
        if third and (last := median(norms[-third:])):
            ratios.append(median(norms[:third]) / last)
    return min(ratios, default=math.nan)


def median_head(values: list[float | None]) -> float:
    """The lower median over heads; NaN if one is null (NaN in a record), as one such head makes all later layers NaN."""
    known = [value for value in values if value is not None]
    return median_low(known) if known and len(known) == len(values) else math.nan


def largest_logit(layer: dict[str, Any]) -> float:
    """Of all heads in a layer of a record; infinite where none is known, so that entropy alone decides."""
    return max((x for x in layer.get("max_logit", ()) if x is not None), default=math.inf)


def examine(records: Iterable[dict[str, Any]]) -> Verdict:
    """The verdict of a run's records, in the order of their updates."""
    examination = Examination()
    for record in records:
        examination.look(record)
    return examination.verdict()
