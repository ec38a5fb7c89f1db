"""The monitor under transformers' Trainer."""

import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from hf_stable import MonitorCallback
from stable_monitor import AlarmConfig
from stable_monitor.records import load, read

CONFIG = {
    "vocab_size": 60,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def data(size: int = 64) -> list[dict]:
    tokens = torch.randint(1, 60, (size, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(folder, *callbacks, steps=6, resume=None, prepare=lambda model: None, optimizer=None, eval_dataset=None,
          **settings):  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG))
    prepare(model)
    arguments = {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3,
                 "max_steps": steps, "report_to": "none", "use_cpu": True, "disable_tqdm": True, **settings}  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **arguments)
    of = {"train_dataset": data(), "eval_dataset": eval_dataset, "callbacks": list(callbacks)}
    optimizers = (optimizer and optimizer(model), None)
    trainer = transformers.Trainer(model, arguments, optimizers=optimizers, **of)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Logged(TrainerCallback):
    """What a Trainer tells those that log."""

    def __init__(self) -> None:
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_records_and_the_same_losses(tmp_path, accumulation):
    plain = train(tmp_path / "plain", gradient_accumulation_steps=accumulation)
    logged = Logged()
    watched = train(tmp_path / "watched", logged, MonitorCallback(2), gradient_accumulation_steps=accumulation)
    assert losses(watched) == losses(plain)
    assert all(torch.equal(a, b) for a, b in zip(watched.model.parameters(), plain.model.parameters(), strict=True))

    records = read(tmp_path / "watched")
    assert [record["step"] for record in records] == [0, 2, 4]
    assert {name: layer["kind"] for name, layer in records[0]["layers"].items()} == {
        "transformer.h.0.attn": "decoder", "transformer.h.1.attn": "decoder"
    }  # fmt: skip
    log = {entry["step"]: entry for entry in plain.state.log_history}
    for record in records:
        entry = log[record["step"] + 1]
        assert record["lr"] == pytest.approx(entry["learning_rate"], rel=1e-4)
        assert record["grad_l2"] == pytest.approx(min(1.0, entry["grad_norm"]), rel=1e-3)  # clipped at 1
        of_all = 1e-3 if accumulation == 1 else 0.3  # the record has the first batch only
        assert record["loss"] == pytest.approx(entry["loss"], abs=of_all)
    shown = [entry for entry in watched.state.log_history if "attention_entropy" in entry]
    means = [sum(sum(layer["entropy"]) / 8 for layer in record["layers"].values()) for record in records]
    assert [entry["attention_entropy"] for entry in shown] == pytest.approx(means, rel=1e-4)
    assert [logs["attention_entropy"] for logs in logged.logs if "attention_entropy" in logs] == [
        entry["attention_entropy"] for entry in shown
    ]  # as TensorBoard and W&B hear it


def test_validations_in_training_are_the_trainers(tmp_path):
    trainer = train(tmp_path, MonitorCallback(2), eval_dataset=data(8), eval_strategy="steps", eval_steps=3)
    logged = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    trainer.evaluate(data(4))  # of another set, after training
    validations = load(tmp_path)[1]
    assert [step for step, _ in logged] == [line["step"] for line in validations] == [3, 6]
    for (_, loss), line in zip(logged, validations, strict=True):
        assert line["validation"] == {"loss": pytest.approx(loss, rel=1e-5)}


def test_the_loss_of_an_update_with_fewer_batches(tmp_path):
    """16 batches, 5 to an update: every fourth has 1."""
    trainer = train(tmp_path, MonitorCallback(1), steps=8, gradient_accumulation_steps=5)
    for record, loss in zip(read(tmp_path), losses(trainer), strict=True):
        assert record["loss"] == pytest.approx(loss, abs=0.3)


def test_resume_goes_on_in_the_same_file(tmp_path):
    train(tmp_path, MonitorCallback(1), steps=6, save_strategy="steps", save_steps=2)
    whole = read(tmp_path)
    train(tmp_path, MonitorCallback(1), steps=6, resume=str(tmp_path / "checkpoint-2"))
    resumed = read(tmp_path)
    assert [record["step"] for record in resumed] == [0, 1, 2, 3, 4, 5]
    for a, b in zip(resumed, whole, strict=True):
        assert (a["loss"], a["layers"]["transformer.h.1.attn"]["entropy"]) == (
            b["loss"], b["layers"]["transformer.h.1.attn"]["entropy"]
        )  # fmt: skip


class Collapse(transformers.TrainerCallback):
    """Sharpens the attention of one layer after three updates."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 3:
            with torch.no_grad():
                model.transformer.h[1].attn.c_attn.weight[:, :64] *= 100


@pytest.mark.parametrize("on_alarm", ["warn", "stop", "function"])
def test_an_alarm_is_heard_and_ends_the_run_if_asked(tmp_path, on_alarm, caplog):
    heard, stop = [], on_alarm == "stop"
    callback = MonitorCallback(
        1, heard.append if on_alarm == "function" else on_alarm, alarm=AlarmConfig(fraction=0.5, logit=0)
    )
    trainer = train(tmp_path, Collapse(), callback)
    assert [(alarm.step, alarm.layer) for alarm in heard] == [(3, "transformer.h.1.attn")] * (on_alarm == "function")
    assert [r.message.partition(":")[0] for r in caplog.records if "collapse" in r.message] == ["update 3"]
    assert trainer.state.global_step == (4 if stop else 6)
    assert (tmp_path / "checkpoint-4").exists() == stop


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.mark.parametrize("how", ["model.compile()", "torch_compile", "its regions"])
def test_compiled_training(tmp_path, how, monkeypatch):
    """Records are those of the run that is not compiled, and nothing is compiled or broken up for them."""

    def compile_in_place(model):
        model.compile(backend="eager")

    def run(folder, *callbacks):
        torch.compiler.reset()
        counters.clear()
        trainer = train(tmp_path / folder, *callbacks, **same, **compiled)
        return losses(trainer), counters["stats"]["unique_graphs"], counters["graph_break"].total()

    compiled = {"prepare": compile_in_place} if how == "model.compile()" else COMPILED
    if how == "its regions":  # as Accelerate compiles them
        monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "1")
    same = {"steps": 3, "gradient_accumulation_steps": 2}
    if how == "torch_compile":
        same["gradient_checkpointing"] = True
    assert run("watched", MonitorCallback(2)) == run("plain")
    assert counters["stats"]["unique_graphs"] > 0
    train(tmp_path / "eager", MonitorCallback(2), **same)
    for record, expected in zip(read(tmp_path / "watched"), read(tmp_path / "eager"), strict=True):
        assert record["layers"].keys() == expected["layers"].keys() and len(record["layers"]) == 2
        for name, layer in expected["layers"].items():
            assert record["layers"][name]["entropy"] == pytest.approx(layer["entropy"], abs=1e-3)


@pytest.mark.parametrize("every", [0, 1.5])
def test_bad_settings_are_refused_when_built(every):
    with pytest.raises(ValueError, match=f"every = {every}: allowed are whole numbers from 1"):
        MonitorCallback(every)
    with pytest.raises(ValueError, match="on_alarm = 'halt': allowed are 'warn', 'stop', 'rescue' and functions"):
        MonitorCallback(on_alarm="halt")


def test_attention_is_the_monitors(tmp_path):
    with pytest.raises(ValueError, match="no module has that name; there are transformer,"):
        train(tmp_path, MonitorCallback(2, attention={"h.9": "softmax"}))
