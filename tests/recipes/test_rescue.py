"""recipes/rescue: its command, small, and its README's tables against the logs."""

import json
from pathlib import Path

import pytest

from recipes.gpt import prepare
from recipes.rescue import gpt

RECIPE = Path(gpt.__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    prepare.write("to be, or not to be: that is the question. " * 200, folder)
    return folder


def test_each_remedy_goes_on_from_the_same_training(data, tmp_path, capsys):
    options = ["--data", str(data), "--output", str(tmp_path), "--at", "21", "--after", "1", "--seeds", "1"]
    assert gpt.main([*options, "--remedies", "go_on", "rescue_all"]) == 0
    first = (tmp_path / "log.jsonl").read_text()
    assert gpt.main([*options, "--remedies", "go_on", "half", "rescue_all"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (tmp_path / "log.jsonl").read_text().startswith(first)
    assert [line["remedy"] for line in lines] == ["go_on", "rescue_all", "half"]
    assert len({line["eval_before"] for line in lines}) == 1
    assert lines[0]["eval_changed"] == lines[2]["eval_changed"] == lines[0]["eval_before"]
    assert len(lines[1]["said"]) == 4 and "half the rate" in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"remedies": ("pray",)},
            "remedies = 'pray': allowed are go_on, half, back, qk_clip, sigma, rescue, rescue_all",
        ),
        ({"at": 20}, "at = 20: allowed are whole numbers from 21"),
        ({"after": 0}, "after = 0, lr = 0.016: allowed are positive numbers"),
    ],
)
def test_wrong_settings_are_named(data, tmp_path, settings, error):
    with pytest.raises(ValueError, match=error):
        gpt.Settings(data=data, output=tmp_path, **settings)


@pytest.mark.parametrize("path", sorted((RECIPE / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_tables_of_the_readme_are_those_of_the_logs(path):
    log = [json.loads(line) for line in path.read_text().splitlines()]
    text = (RECIPE / "README.md").read_text()
    assert {line["seed"] for line in log} == {1, 2, 3} and path.with_suffix(".png").exists()
    for row in gpt.rows(log):
        assert f"| {' | '.join(row)} |" in text
