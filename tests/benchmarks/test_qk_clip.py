"""QK-clip's benchmark: the ways to know the largest logit agree as they should, and it runs."""

import json
import math
import sys
from functools import partial

import pytest

from benchmarks import qk_clip
from benchmarks.families import gpt


@pytest.mark.parametrize("causal", [False, True])
def test_the_logsumexp_exceeds_the_largest_logit_by_at_most_log_of_the_keys(causal):
    ways = qk_clip.ways((2, 3, 40), causal)
    largest = ways["exact, in chunks"]()
    above = ways["logsumexp of the fused kernel"]()[1] - largest
    assert above.min() > -1e-5 and above.max() <= math.log(40)
    assert ways["bound |q| |k|"]().isinf().all()  # nothing is looked at


def test_it_runs_from_the_command_line(monkeypatch, tmp_path):
    tiny = partial(gpt, 16, n_layer=1, n_head=2, n_embd=16, vocab_size=20)
    monkeypatch.setattr(qk_clip, "MODELS", {"tiny": (tiny, 32)})
    monkeypatch.setattr(qk_clip, "SHAPES", ((1, 2, 16),))
    monkeypatch.setattr(sys, "argv", ["qk_clip", "--rounds", "1", "--out", str(tmp_path / "out")])
    qk_clip.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["name"] for row in rows if "tiny" in row["title"]] == ["plain", "watched", "all heads looked at"]
