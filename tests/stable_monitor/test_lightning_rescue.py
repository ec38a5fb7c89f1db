"""`MonitorCallback(on_alarm="rescue")` under Lightning's Trainer: what a rescue changes, and that the run comes back."""

import os

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.environments import TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from stable_core import sigma_layers
from stable_core.bounding import LIMIT
from stable_monitor import AlarmConfig, rescue_checkpoint
from stable_monitor.lightning import MonitorCallback
from stable_monitor.records import read
from tests.engines.processes import agreed, spawn

from .test_lightning import Module, fit, loader

LAYER = "net.h.1.attn"
CHANGED = "h.1.attn.c_attn."


class Seeded(Module):
    """Dropout by the number of the update, and groups by the parameters' names, which σReparam changes."""

    one_group = False

    def training_step(self, pair):
        torch.manual_seed(self.trainer.global_step)
        _, loss = self.called(*pair)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def test_step(self, pair, index):
        self.log("test_loss", self.net(*pair)[1])

    def configure_optimizers(self):
        named = dict(self.net.named_parameters())
        weights = [p for name, p in named.items() if name.endswith("weight")]
        others = [p for name, p in named.items() if not name.endswith("weight")]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(named.values() if self.one_group else groups, lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class OneGroup(Seeded):
    one_group = True


class Once(Seeded):
    """Whose state dict has each weight under one name only."""

    def __init__(self):
        super().__init__()
        vars(self)["called"] = self._modules.pop("called")


class Collapse(pl.Callback):
    """Blows up the queries of a layer after two updates."""

    def on_train_batch_end(self, trainer, module, outputs, pair, index):
        if trainer.global_step == 2:
            with torch.no_grad():
                module.net.h[1].attn.c_attn.weight[:32] *= 300


def watching(on_alarm="rescue"):
    return MonitorCallback(1, on_alarm, alarm=AlarmConfig(fraction=0.5, logit=0))


def run(folder, *callbacks, on_alarm="rescue", module=None, **settings):
    """Epochs of four updates, the alarm after the third."""
    epochs = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    callbacks = [Collapse(), watching(on_alarm), *callbacks, epochs]
    return fit(folder, *callbacks, module=module or Seeded(), batches=4, enable_checkpointing=True, **settings)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name


def moments(module, trainer):
    names = {id(p): name for name, p in module.named_parameters()}
    return {f"{names[id(p)]} {key}": x for p, state in trainer.optimizers[0].state.items() for key, x in state.items()}


def test_a_layer_is_bounded_and_nothing_else_changes(tmp_path):
    warned, _, trainer = run(tmp_path / "warned", on_alarm="warn", steps=3)
    module, _, rescuer = run(tmp_path, steps=3)
    assert [name for name, _ in sigma_layers(module)] == [f"{LAYER}.c_attn"]
    W = module.net.h[1].attn.c_attn.weight
    for part in (W[:32], W[32:64]):
        assert torch.linalg.matrix_norm(part, 2) < 1.001 * LIMIT
    assert torch.equal(W[64:], warned.net.h[1].attn.c_attn.weight[64:])
    same(*({k: x for k, x in m.state_dict().items() if CHANGED not in k} for m in (module, warned)))
    theirs = {key: x for key, x in moments(warned, trainer).items() if CHANGED not in key}
    same(moments(module, rescuer), theirs)
    assert [[mark["layer"] for mark in record.get("rescues", [])] for record in read(tmp_path)] == [[], [], [LAYER]]
    assert (
        "log" not in vars(module) and rescuer.callback_metrics["train_loss"] == trainer.callback_metrics["train_loss"]
    )


def test_without_an_alarm_the_run_is_what_it_was(tmp_path):
    plain, *_ = fit(tmp_path / "plain")
    watched, *_ = fit(tmp_path, MonitorCallback(2, "rescue"))
    assert watched.losses == plain.losses
    same(watched.state_dict(), plain.state_dict())
    assert "on_load_checkpoint" not in vars(watched)


@pytest.mark.parametrize("kind", [Seeded, OneGroup])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(tmp_path, kind, compiled):
    """With decay everywhere the gammas get a group of their own, of which the scheduler learns."""
    whole, _, trainer = run(tmp_path, steps=8, module=kind(compiled))
    assert len(trainer.optimizers[0].param_groups) == 2
    checkpoint = tmp_path / "epoch=0.ckpt"
    torch.manual_seed(5)
    again, _, resumed = run(tmp_path / "again", steps=8, module=kind(compiled), resume=checkpoint)
    same(again.state_dict(), whole.state_dict())
    same(moments(again, resumed), moments(whole, trainer))
    gamma = next(sigma_layers(whole))[1].gamma
    started = torch.load(checkpoint, weights_only=False)["state_dict"]
    assert not torch.equal(gamma, started[f"net.{CHANGED}parametrizations.weight.0.gamma"])


def test_a_checkpoint_is_tested_as_it_is_before_the_rescue_and_after(tmp_path):
    """By a module that is built as ever, and by the rescued one."""
    every = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    module, _, trainer = run(tmp_path, every, steps=4, module=Once())
    after = trainer.test(module, loader([7]), verbose=False)
    fresh = pl.Trainer(
        callbacks=[watching()], accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    built = Once()
    assert fresh.test(built, loader([7]), ckpt_path=tmp_path / "step=4.ckpt", verbose=False) == after
    same(built.state_dict(), module.state_dict())
    (plain,) = fresh.test(Once(), loader([7]), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)
    (early,) = trainer.test(module, loader([7]), ckpt_path=tmp_path / "step=1.ckpt", verbose=False)
    assert early["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-5) != after[0]["test_loss"]


class Frozen(OneGroup):
    def __init__(self):
        super().__init__()
        self.net.h[1].attn.c_attn.requires_grad_(False)


def test_what_cannot_be_rescued_stops_with_a_checkpoint_that_the_command_rescues(tmp_path, caplog, monkeypatch):
    *_, trainer = run(tmp_path / "frozen", module=Frozen(), steps=8)
    path = tmp_path / "frozen" / "alarm-step=3.ckpt"
    assert trainer.global_step == 3 and path.exists()
    (line,) = [r.message for r in caplog.records if r.message.startswith("not rescued")]
    assert (
        "its queries or keys are frozen" in line
        and f"stable rescue {path} RESCUED.ckpt --model MODULE:FUNCTION" in line
    )

    def out_of_memory(self):
        raise RuntimeError("out of memory")

    whole, *_ = run(tmp_path, module=OneGroup(), steps=3)
    with monkeypatch.context() as context:
        context.setattr(MonitorCallback, "_same_batch", out_of_memory)
        run(tmp_path / "failed", module=OneGroup(), steps=8)
    command = [str(tmp_path / "failed" / "alarm-step=3.ckpt"), str(tmp_path / "rescued.ckpt")]
    assert rescue_checkpoint.main([*command, "--model", f"{__name__}:OneGroup", "--layers", LAYER]) == 0
    again, *_ = run(tmp_path / "again", module=OneGroup(), steps=3, resume=tmp_path / "rescued.ckpt")
    for name, x in again.state_dict().items():
        torch.testing.assert_close(x, whole.state_dict()[name])
    longer, *_ = run(tmp_path / "longer", module=OneGroup(), steps=6, resume=tmp_path / "rescued.ckpt")
    gammas = [next(sigma_layers(module))[1].gamma for module in (longer, again)]
    assert not torch.equal(*gammas)


def test_weights_that_are_cut_up_are_refused_at_the_start(tmp_path):
    class CutUp(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True  # as FSDP, DeepSpeed and ModelParallelStrategy have it

    with pytest.raises(ValueError, match="on_alarm = 'rescue': CutUp cuts up the weights, which cannot be rescued in"):
        run(tmp_path, steps=1, strategy=CutUp(device="cpu"))
    run(tmp_path, steps=1, on_alarm="stop", strategy=CutUp(device="cpu"))


class Part(Seeded):
    """Each process has half of a batch."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        for block in self.net.h:
            block.attn.dropout = block.mlp[-1].p = 0.0

    def training_step(self, pair):
        return super().training_step([x if self.rank is None else x[2 * self.rank :][:2] for x in pair])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def in_a_process(rank, folder):
    """The weights of a rescued run after two epochs, and of one that is resumed after the first."""

    def weights(name, **settings):
        if rank is not None:
            settings |= {"strategy": DDPStrategy(process_group_backend="gloo"), "plugins": [TorchElasticEnvironment()]}
            settings |= {"devices": 2, "use_distributed_sampler": False}
        module, *_ = run(f"{folder}/{name}", module=Part(rank), steps=8, **settings)
        return {f"{name}.{key}": x for key, x in module.state_dict().items()}

    if rank is not None:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in here.items()})
    return weights("whole") | weights("again", resume=f"{folder}/whole/epoch=0.ckpt")


def test_two_processes_are_rescued_and_resumed_as_one(tmp_path):
    two = agreed(spawn(in_a_process, [(str(tmp_path),)], tmp_path), str(tmp_path))
    one = in_a_process(None, f"{tmp_path}/one")
    assert any("gamma" in name for name in one)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    for name in (name for name in two if name.startswith("whole")):
        assert torch.equal(two[name], two[name.replace("whole", "again", 1)]), name


def test_a_run_that_goes_on_in_a_new_folder_begins_with_the_earlier_records(tmp_path):
    """As Lightning's loggers give each call of fit a new version; without them a collapse before looks healthy."""
    callbacks = Collapse(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(
        tmp_path / "first", *callbacks, watching("warn"), module=Seeded(), batches=4, enable_checkpointing=True, steps=8
    )
    checkpoint = tmp_path / "epoch=0.ckpt"
    fit(tmp_path / "again", watching(), module=Seeded(), batches=4, steps=8, resume=checkpoint)
    before, after = read(tmp_path / "first"), read(tmp_path / "again")
    assert after[:4] == before[:4] and [record["step"] for record in after] == list(range(8))
    assert [alarm["layer"] for record in after for alarm in record["alarms"]] == [LAYER]
    assert LAYER in [rescued["layer"] for rescued in after[4]["rescues"]]  # which collapsed before, and was not rescued
