"""What QK-clip adds to training, and how the largest logit is found: `python -m benchmarks.qk_clip`.

First the ways to know the largest logit of an attention: the product of lengths |q| |k|, which bounds it; the logsumexp that
torch's fused CPU kernel returns, which exceeds it by up to log(keys); the exact one in chunks. Then updates in turns: plain;
watched, where no head comes near the threshold; and with a threshold so low that every head is looked at, and most are clipped.
"""

import math
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.families import Step, gpt, vit
from benchmarks.paired import Report, arguments, interleave, interleave_within
from stable_core.attention_entropy import largest_logits
from stable_monitor import QKClip

SHAPES = ((4, 12, 256), (1, 12, 1024))  # batch, heads, tokens; 64 features
MODELS = {  # the first: nanoGPT's for characters, with a longer context
    "gpt, 6 x 384": (partial(gpt, 1024, n_layer=6, n_head=6, n_embd=384, vocab_size=65), 1024),
    "vit_small": (partial(vit, "small"), 4),
}
THRESHOLDS = {"watched": 1e6, "all heads looked at": 0.05}

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def ways(shape: tuple[int, int, int], causal: bool) -> dict[str, Callable[[], object]]:
    q, k = torch.randn(2, *shape, 64, generator=torch.Generator().manual_seed(0))
    find = partial(largest_logits, q, k, scale=0.125, is_causal=causal)
    return {
        "logsumexp of the fused kernel": lambda: _fused(q, k, k, 0.0, causal, scale=0.125),
        "exact, in chunks": find,
        "bound |q| |k|": partial(find, above=math.inf),
    }


def cpu_seconds(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Of this process, in turns: a percent is not seen in the time of a machine that others use too."""
    times = {name: [] for name in work}
    for i in range(1 + rounds):  # the first warms up
        for name, one in work.items():
            start = time.process_time()
            one()
            if i:
                times[name].append(time.process_time() - start)
    return times


def main() -> None:
    parser = arguments("qk_clip", __doc__, rounds=8)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: %(default)s)")
    args = parser.parse_args()
    report = Report("QK-clip", args.device)
    if args.device.type == "cpu":
        for shape in SHAPES:
            for causal in (False, True):
                title = "{} x {} heads, {} tokens".format(*shape) + ", causal" * causal
                times = interleave_within(ways(shape, causal), args.rounds / 2, args.device)
                report.add(title, times, ["logsumexp of the fused kernel"], "ms", 1000)
    for name in args.models:
        build, size = MODELS[name]
        family = build()
        steps = {kind: Step(family, "pre-LN", size, args.device) for kind in ("plain", *THRESHOLDS)}
        for kind, threshold in THRESHOLDS.items():
            QKClip(steps[kind].model, threshold, optimizer=steps[kind].optimizer)
        title = f"{name}, {size} {family.unit}"
        if args.device.type == "cpu":
            times, unit = cpu_seconds(steps, args.rounds), "ms of CPU time an update"
        else:
            times, unit = interleave(steps, args.rounds, args.device, title), "ms an update"
        report.add(title, times, ["plain"], unit, 1000)
        report.save(args.out)


if __name__ == "__main__":
    main()
