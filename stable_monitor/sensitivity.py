"""Learning-rate sensitivity: how much is lost by a learning rate that is not the best one.

Source: Wortsman et al., "Small-scale proxies for large-scale transformer training instabilities" (ICLR 2024), Section 2.1.
"""

import math
from collections.abc import Mapping
from statistics import fmean


def learning_rate_sensitivity(final: Mapping[float, float], initial: float) -> float:
    """The mean over learning rates of min(final loss, initial loss) minus the least of these.

        learning_rate_sensitivity({3e-3: 2.25, 3e-2: 2.79, 3e-1: math.nan}, initial=4.17)

    The paper's expectation over learning rates of three orders of magnitude, which here are those given: space them evenly in
    log(rate). A run that diverged has learned nothing: NaN and inf count as the initial loss.

    Args:
        final: the loss at the end of training, by learning rate.
        initial: the loss of the untrained model.

    Returns:
        A number from 0, in the unit of the losses. 0 is a model that ends alike at every rate.

    Raises:
        ValueError: fewer than two rates, a rate that is not positive, or an initial loss that is not finite.
    """
    if len(final) < 2 or not all(0 < lr < math.inf for lr in final):
        raise ValueError(
            f"final = {dict(final)!r}: allowed are losses of two learning rates or more, which are positive"
        )
    if not math.isfinite(initial):
        raise ValueError(f"initial = {initial!r}: allowed are finite numbers")
    losses = [bounded(loss, initial) for loss in final.values()]
    return fmean(losses) - min(losses)


def bounded(loss: float, initial: float) -> float:
    """min(loss, initial), and the initial loss for NaN."""
    return min(loss, initial) if math.isfinite(loss) else initial
