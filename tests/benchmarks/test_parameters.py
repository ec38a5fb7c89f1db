"""The counts of the page are those of the models as they are now."""

from pathlib import Path

from benchmarks import parameters

PAGE = Path(__file__).parents[2] / "benchmarks" / "results" / "parameters.md"


def test_the_page_is_what_the_command_prints():
    assert parameters.page() == PAGE.read_text()


def test_a_count_by_hand():
    """Of 100L-100L, from the sizes of [σ, App. F]: 512, 2048, a joint vocabulary; and one gamma for each of 1,600 matrices."""
    encoder = 4 * (512 * 512 + 512) + 512 * 2048 + 2048 + 2048 * 512 + 512 + 2 * 2 * 512
    decoder = encoder + 4 * (512 * 512 + 512) + 2 * 512
    subwords = (parameters.SUBWORDS + 4) * 512
    plain = 100 * (encoder + decoder) + subwords
    assert f"`deepnorm_transformer_Nl` | 64.62 | 152.90 | 388.30 | {plain / 1e6:.2f} |" in PAGE.read_text()
    assert f"`sigma_transformer_Nl` | 64.62 | 152.90 | 388.30 | {(plain + 1600) / 1e6:.2f} |" in PAGE.read_text()
