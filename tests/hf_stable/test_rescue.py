"""A Trainer's run that collapses: rescued under way, resumed, folded, and taken up from its checkpoints."""

import json

import peft
import pytest
import torch
import transformers
from torch.torch_version import TorchVersion

import hf_stable
from hf_stable import MonitorCallback
from stable_core import SigmaReparamConfig
from stable_core.folding import is_reparametrised
from stable_monitor import AlarmConfig, rescue, rescue_checkpoint
from stable_monitor.records import read
from tests.engines.processes import agreed, spawn

from .collapsing import LAYER, SAVING, Collapse, in_a_process, rescued, without_dropout
from .test_monitor import COMPILED, CONFIG, data, losses, train


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


def test_a_model_compiled_in_place_is_rescued(tmp_path):
    """As `model.compile()` has it called, without the seconds that compiling takes; a hook would not be called."""

    def compile_in_place(model):
        model._compiled_call_impl = type(model).forward.__get__(model)

    trainer = rescued(tmp_path, prepare=compile_in_place, steps=4)
    assert reparametrised(trainer.model) == [f"{LAYER}.c_attn"]
    assert [len(record.get("rescues", [])) for record in read(tmp_path)] == [0, 0, 1, 0]


@pytest.mark.parametrize("regions", [False, True])
def test_a_model_that_the_trainer_compiles_is_rescued_as_the_plain_one(tmp_path, regions, monkeypatch):
    """It is compiled anew, gammas are trained, and the same script resumes it."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(int(regions)))
    settings = {**SAVING, "steps": 6, "prepare": without_dropout}
    plain = rescued(tmp_path / "plain", **settings)
    compiled = rescued(tmp_path / "compiled", **settings, **COMPILED)
    marks = [len(record.get("rescues", [])) for record in read(tmp_path / "compiled")]
    assert marks == [0, 0, 1, 0, 0, 0] and reparametrised(compiled.model) == [f"{LAYER}.c_attn"]
    ours, theirs = compiled.model.state_dict(), plain.model.state_dict()
    for name, W in theirs.items():
        torch.testing.assert_close(ours[name], W, rtol=1e-3, atol=1e-4)
    (gamma,) = (W for name, W in ours.items() if name.endswith("gamma"))
    assert not torch.equal(gamma[:2], torch.ones(2))
    if regions:  # whose modules have other names inside
        again = train(tmp_path / "again", resume=str(tmp_path / "compiled" / "checkpoint-4"), **settings, **COMPILED)
        same_runs(again, compiled)


def test_what_cannot_be_rescued_stops_with_a_checkpoint_and_a_line(tmp_path, caplog, monkeypatch):
    def frozen(model):
        model.transformer.h[1].attn.c_attn.requires_grad_(False)

    untrained, sharded = "its queries or keys are frozen", "FSDP and DeepSpeed have cut up the weights"
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
    callback = MonitorCallback(1, "rescue", alarm=AlarmConfig(fraction=0.5, logit=0))
    trainer = transformers.Trainer(model, arguments, train_dataset=data(), callbacks=[Collapse(), callback])
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
    (line,) = [r.message for r in caplog.records if r.message.startswith("not rescued")]
    assert line.endswith("model.merge_and_unload(), and train what it returns")


# ---------------------------------------------------------------------------------------------------------------- resuming


def one_group(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"optimizer": one_group}])
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(settings, tmp_path):
    """The script builds a plain model as ever. With decay everywhere gammas have a group of their own."""
    settings = {**SAVING, **settings, "steps": 7}
    whole = rescued(tmp_path, **settings)
    again = train(tmp_path / "again", resume=str(tmp_path / "checkpoint-4"), **settings)
    assert reparametrised(again.model) == [f"{LAYER}.c_attn"]
    same_runs(again, whole)
    assert again.model.config.quantization_config == whole.model.config.quantization_config
    assert losses(again) == losses(whole)


def same_runs(one, other, atol: float = 0.0) -> None:
    """Parameters and buffers, the optimizer's groups and moments: bitwise, or to rounding."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    ours, theirs = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=atol)


def test_two_processes_are_rescued_and_resumed_as_one(tmp_path):
    two, one = (
        agreed(spawn(in_a_process, [(str(tmp_path),)], tmp_path), str(tmp_path)),
        in_a_process(None, f"{tmp_path}/one"),
    )
    assert two.keys() == one.keys() and any("gamma" in name for name in one)
    torch.testing.assert_close(two, one)
    for name in (name for name in two if name.startswith("whole")):
        assert torch.equal(two[name], two[name.replace("whole", "again")]), name


def test_without_the_optimizers_state_the_model_is_what_was_saved(tmp_path):
    whole = rescued(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    (tmp_path / "checkpoint-4" / "model.safetensors").rename(tmp_path / "checkpoint-4" / "shard.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(whole.model.state_dict(), "shard.safetensors")}
    (tmp_path / "checkpoint-4" / "model.safetensors.index.json").write_text(json.dumps(index))

    class Loaded(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            loaded.update({name: x.clone() for name, x in model.state_dict().items()})

    loaded = {}
    again = train(tmp_path / "again", Loaded(), steps=5, resume=str(tmp_path / "checkpoint-4"))
    assert saved.keys() == loaded.keys() and all(torch.equal(x, loaded[name]) for name, x in saved.items())
    gamma = again.model.transformer.h[1].attn.c_attn.parametrizations.weight[0].gamma
    assert not torch.equal(gamma, loaded[f"{LAYER}.c_attn.parametrizations.weight.0.gamma"])


class EarlyIsBest(transformers.TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_early"] = -state.global_step


def test_the_best_model_may_be_from_before_the_rescue(tmp_path):
    evaluated = {"eval_dataset": data(8), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
                 "save_steps": 1, "metric_for_best_model": "early", "greater_is_better": True}  # fmt: skip
    trainer = rescued(tmp_path, EarlyIsBest(), **evaluated, load_best_model_at_end=True)
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1") and reparametrised(trainer.model) == [f"{LAYER}.c_attn"]
    tokens = data(2)[0]["input_ids"][None]
    plain = transformers.AutoModelForCausalLM.from_pretrained(best).eval()
    torch.testing.assert_close(trainer.model.eval()(tokens).logits, plain(tokens).logits, rtol=1e-5, atol=1e-5)


def test_what_a_rescue_did_not_do_is_asked_for(tmp_path):
    def only(part):
        return lambda model: hf_stable.sigma_reparam(model, None, lambda module, name: part in name)

    train(tmp_path, steps=2, prepare=only("attn"), save_strategy="steps", save_steps=2)
    for prepare, error in (
        (
            lambda model: None,
            "h.0.attn.c_attn.weight has σReparam in the checkpoint, and not by a rescue: give it to the",
        ),
        (only("mlp"), "h.0.mlp.c_fc.weight in the model alone: allowed is more of it on one side"),
    ):
        with pytest.raises(ValueError, match=error):
            train(tmp_path / "again", resume=str(tmp_path / "checkpoint-2"), prepare=prepare)


# ---------------------------------------------------------------------------------------- a plain checkpoint, with σReparam


def test_a_plain_checkpoint_goes_into_a_model_with_sigma_reparam(tmp_path):
    """Its function, and the moments of every weight."""

    def prepare(model):
        hf_stable.sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral"))

    class Loaded(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
            names = {id(p): name for name, p in model.named_parameters()}
            for p, moments in optimizer.state.items():
                found[names[id(p)].replace("parametrizations.weight.original", "weight")] = moments["exp_avg"].clone()

    whole = train(tmp_path, steps=5, save_strategy="steps", save_steps=4, weight_decay=0.1)
    found = {}
    again = train(
        tmp_path / "again", Loaded(), steps=5, resume=str(tmp_path / "checkpoint-4"), prepare=prepare, weight_decay=0.1
    )
    assert losses(again)[-1] == pytest.approx(losses(whole)[-1], rel=1e-5)  # of the first update since
    assert len(reparametrised(again.model)) == 8
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt")
    plain = whole.model
    decayed = set(whole.get_decay_parameter_names(plain))
    names = [name for name, _ in plain.named_parameters() if name in decayed]
    names += [name for name, _ in plain.named_parameters() if name not in decayed]
    assert found.keys() == set(names)
    for index, name in enumerate(names):
        assert torch.equal(found[name], saved["state"][index]["exp_avg"]), name


# ------------------------------------------------------------------------------------------------------------ the command


class RescueAfter(transformers.TrainerCallback):
    """`stable_monitor.rescue` of named layers, after four updates."""

    def __init__(self, *layers):
        self.layers = layers

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        if state.global_step == 4:
            for layer in self.layers:
                rescue(
                    model,
                    optimizer,
                    lambda: model(data(1)[0]["input_ids"][None]),
                    layers=[layer],
                    scheduler=lr_scheduler,
                )


def test_a_converted_checkpoint_is_resumed_as_if_it_had_been_rescued_in_memory(tmp_path, capsys):
    """A layer at a time: the second command reads what the first one wrote."""
    layers = ["transformer.h.1.attn", "transformer.h.0.attn"]
    in_memory = train(tmp_path, Collapse(), RescueAfter(*layers), steps=6, **SAVING)
    train(tmp_path, Collapse(), steps=6, **SAVING)
    checkpoint = tmp_path / "checkpoint-4"
    for layer in layers:
        out = tmp_path / layer
        assert rescue_checkpoint.main([str(checkpoint), str(out), "--layers", layer]) == 0
        assert f"{layer}: |W_q| " in capsys.readouterr().out
        assert {path.name for path in out.iterdir()} == {path.name for path in checkpoint.iterdir()}
        checkpoint = out
    again = train(tmp_path / "again", steps=6, resume=str(checkpoint), **SAVING)
    rounds = TorchVersion(torch.__version__) < (2, 14)  # 2.10 rounds the norm of a weight by where it lies
    same_runs(again, in_memory, atol=1e-5 if rounds else 0.0)


def test_a_checkpoint_with_sigma_reparam_everywhere_keeps_its_function(tmp_path):
    whole = train(tmp_path, steps=6, **SAVING)
    out = tmp_path / "out"
    assert rescue_checkpoint.main([str(tmp_path / "checkpoint-4"), str(out), "--reparam"]) == 0
    again = train(tmp_path / "again", steps=6, resume=str(out), **SAVING)
    assert len(reparametrised(again.model)) == 8
    assert losses(again)[4] == pytest.approx(losses(whole)[4], rel=1e-5)  # of the first update since


def test_what_the_command_does_not_take(tmp_path, capsys):
    train(tmp_path, steps=1, save_strategy="steps", save_steps=1, optim="adafactor")
    checkpoint = tmp_path / "checkpoint-1"
    command = [str(checkpoint), str(tmp_path / "out"), "--layers", LAYER]
    assert rescue_checkpoint.main(command) == 1
    assert "take it out of the folder, and moments start anew" in capsys.readouterr().err
    (checkpoint / "optimizer.pt").rename(
        checkpoint / "optimizer.bin"
    )  # as FSDP has it, which would read its own files again
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    assert rescue_checkpoint.main(command) == 0
    gone = {path.name for path in checkpoint.iterdir()} - {path.name for path in (tmp_path / "out").iterdir()}
    assert gone == {"optimizer.bin", "pytorch_model_fsdp_0"}
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["MyGPT"]}))
    assert rescue_checkpoint.main([*command[:1], str(tmp_path / "other"), *command[2:]]) == 1
    assert "architectures = 'MyGPT': allowed are transformers' and hf_stable's" in capsys.readouterr().err
