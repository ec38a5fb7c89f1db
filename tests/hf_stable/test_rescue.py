"""A Trainer's run that collapses: rescued under way, resumed, folded, and taken up from its checkpoints."""

import json

import pytest
import torch
import transformers

import hf_stable
from hf_stable import MonitorCallback
from stable_core.folding import is_reparametrised
from stable_monitor import AlarmConfig
from stable_monitor.records import read

from .test_monitor import CONFIG, data, train

LAYER = "transformer.h.1.attn"


class Collapse(transformers.TrainerCallback):
    """Blows up the queries of one layer after two updates."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.transformer.h[1].attn.c_attn.weight[:, :32] *= 300


def rescued(folder, *callbacks, **settings):
    callback = MonitorCallback(1, "rescue", alarm=AlarmConfig(fraction=0.5))
    return train(folder, Collapse(), callback, *callbacks, **settings)


def reparametrised(model) -> list[str]:
    return [name for name, module in model.named_modules() if is_reparametrised(module)]


def test_the_alarm_rescues_and_the_model_is_saved_as_it_is(tmp_path):
    checkpointed = transformers.PreTrainedModel.gradient_checkpointing_enable
    trainer = rescued(tmp_path, prepare=checkpointed, gradient_accumulation_steps=2, weight_decay=0.1)
    assert trainer.state.global_step == 6 and reparametrised(trainer.model) == [f"{LAYER}.c_attn"]
    records = read(tmp_path)
    assert [mark["layer"] for mark in records[2]["rescues"]] == [LAYER]
    before, after = (records[i]["layers"][LAYER]["entropy"] for i in (2, 3))
    assert max(before) < min(after)
    assert [entry for entry in trainer.state.log_history if "attention_rescued" in entry] == [
        {"attention_rescued": [LAYER], "step": 3}
    ]
    gamma = trainer.model.transformer.h[1].attn.c_attn.parametrizations.weight[0].gamma
    assert not torch.equal(gamma[:2], torch.ones(2))  # it is trained, and not decayed
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups if any(p is gamma for p in g["params"])] == [0.0]

    trainer.save_model(tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for (name, ours), theirs in zip(trainer.model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    tokens = data(2)[0]["input_ids"][None]
    logits = trainer.model.eval()(tokens).logits
    hf_stable.fold(again).save_pretrained(tmp_path / "folded")
    assert "quantization_config" not in json.loads((tmp_path / "folded" / "config.json").read_text())
    torch.testing.assert_close(again.eval()(tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_is_rescued(tmp_path):
    trainer = rescued(tmp_path, prepare=lambda model: model.compile(backend="eager"), steps=4)
    assert reparametrised(trainer.model) == [f"{LAYER}.c_attn"]
    assert [len(record.get("rescues", [])) for record in read(tmp_path)] == [0, 0, 1, 0]


def test_what_cannot_be_rescued_stops_with_a_checkpoint_and_a_line(tmp_path, caplog, monkeypatch):
    def frozen(model):
        model.transformer.h[1].attn.c_attn.requires_grad_(False)

    untrained, sharded = "does not train the layers' queries and keys", "FSDP and DeepSpeed have cut up the weights"
    for reason, prepare in ((untrained, frozen), (sharded, lambda model: None)):
        caplog.clear()
        folder = tmp_path / reason[:4]
        if prepare is not frozen:
            monkeypatch.setattr(hf_stable.rescue, "cut_up", lambda trainer: True)
        trainer = rescued(folder, prepare=prepare)
        assert trainer.state.global_step == 3 and (folder / "checkpoint-3" / "model.safetensors").exists()
        assert not reparametrised(trainer.model)
        (line,) = [r.message for r in caplog.records if r.message.startswith("not rescued")]
        command = f"python -m stable_monitor.rescue_checkpoint {folder}/checkpoint-3 RESCUED --layers {LAYER}"
        assert reason in line and command in line and "\n" not in line


def test_an_adapter_is_not_rescued(tmp_path, caplog):
    peft = pytest.importorskip("peft")

    class Collapse(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.base_model.model.transformer.h[1].attn.c_attn.base_layer.weight[:, :32] *= 300

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=5, report_to="none", use_cpu=True, disable_tqdm=True
    )
    callback = MonitorCallback(1, "rescue", alarm=AlarmConfig(fraction=0.5))
    trainer = transformers.Trainer(model, arguments, train_dataset=data(), callbacks=[Collapse(), callback])
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
    (line,) = [r.message for r in caplog.records if r.message.startswith("not rescued")]
    assert line.endswith("model.merge_and_unload(), and train what it returns")
