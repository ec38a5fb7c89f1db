"""The README.md that hf_stable.convert leaves in a folder."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_stable.convert import main
from stable_monitor import Monitor, diagnose
from tests.hf_stable.models import stable_gpt


@pytest.fixture
def run(tmp_path):
    """A Trainer's folder: records, and a checkpoint in a folder of its own."""
    model = stable_gpt(reparam="sigma").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, every=1, optimizer=optimizer, path=tmp_path / "run") as monitor:
        for _ in range(3):
            tokens = torch.randint(model.config.vocab_size, (2, 8))
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            monitor.step(loss)
            optimizer.zero_grad()
    model.save_pretrained(tmp_path / "run" / "checkpoint-3")
    return tmp_path / "run"


def test_it_says_the_verdict_and_how_to_load_the_model(run, tmp_path, capsys):
    out = tmp_path / "plain"
    assert main(["folded", str(run / "checkpoint-3"), str(out)]) == 0
    capsys.readouterr()
    assert diagnose.main([str(run)]) == 0
    verdict = capsys.readouterr().out.splitlines()[0].removeprefix(f"{run}: ")
    text = (out / "README.md").read_text()
    assert f"training run run: {verdict}" in text and "reparam 'none'" in text and "# plain\n" in text
    code = text.split("```python\n")[1].split("```")[0].replace("'plain'", repr(str(out)))
    found: dict = {}
    exec(code, found)
    assert isinstance(found["model"], type(AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)))


def test_what_is_there_stays_and_a_run_without_records_is_refused(run, tmp_path, capsys):
    (run / "checkpoint-3" / "README.md").write_text("mine")
    assert main(["folded", str(run / "checkpoint-3"), str(tmp_path / "kept")]) == 0
    assert (tmp_path / "kept" / "README.md").read_text() == "mine"
    nowhere = tmp_path / "nowhere"
    assert main(["folded", str(run / "checkpoint-3"), str(tmp_path / "refused"), "--run", str(nowhere)]) == 1
    assert str(nowhere) in capsys.readouterr().err and not (tmp_path / "refused").exists()


def test_damaged_records_beside_the_checkpoint_are_a_warning(run, tmp_path, capsys):
    (run / "monitor.jsonl").write_text("")
    assert main(["folded", str(run / "checkpoint-3"), str(tmp_path / "out")]) == 0
    assert "no verdict in README.md: " in capsys.readouterr().err
    assert "verdict" not in (tmp_path / "out" / "README.md").read_text()
