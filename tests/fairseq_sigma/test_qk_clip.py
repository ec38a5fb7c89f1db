"""--qk-clip: logits under fairseq-train stay under the threshold, of our architectures and fairseq's own."""

import pytest

from stable_monitor.records import read

from .test_monitor import EVERY, SIGMA, STOCK, run

SLOW = (
    "--lr",
    "1e-8",
    "--warmup-updates",
    0,
)  # the weights of an update are those that were clipped after the one before


def largest(folder) -> list[float]:
    return [
        max(max(layer["max_logit"]) for layer in record["layers"].values()) for record in read(folder / "monitor.jsonl")
    ]


@pytest.mark.parametrize("arch", [(*SIGMA, "--gamma-init", "spectral"), STOCK])
def test_logits_stay_under_the_threshold(train, arch, tmp_path):
    run(train, "free", arch, 3, EVERY, 1, *SLOW)
    run(train, "clipped", arch, 3, EVERY, 1, *SLOW, "--qk-clip", "0.01")
    free, clipped = largest(tmp_path / "free"), largest(tmp_path / "clipped")
    assert free[0] == clipped[0] and min(free) > 0.1
    assert all(5e-3 < logit < 2e-2 for logit in clipped[1:])


def test_what_it_cannot_do_is_one_line(train, capsys):
    with pytest.raises(SystemExit):
        run(train, "run", SIGMA, 1, "--qk-clip", "much")
    assert "argument --qk-clip: 'much': allowed are positive numbers" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"--qk-clip 5.0: --bf16 steps fp32 copies .* allowed are --memory-efficient-bf16"
    ):
        run(train, "half", SIGMA, 1, "--qk-clip", 5, "--bf16")
