"""MonitorCallback under Lightning's own Trainer: the same losses, and the records of a loop of one's own."""

import pickle
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger

from stable_monitor import AlarmConfig, Monitor
from stable_monitor.lightning import LightningWatching, MonitorCallback
from stable_monitor.records import load
from tests.stable_monitor.models import batch, gpt


class Logged(Logger):
    """A logger that keeps what it is given."""

    name, version, save_dir = "kept", 0, None

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Module(pl.LightningModule):
    """Lightning never calls its forward; its training_step calls a part. `batch` alone, as Lightning allows."""

    def __init__(self, compiled=False):
        super().__init__()
        self.net = gpt()
        self.called = torch.compile(self.net, backend="eager") if compiled else self.net
        self.losses = []

    def training_step(self, pair):
        torch.manual_seed(len(self.losses))  # dropout
        _, loss = self.called(*pair)
        if torch.is_grad_enabled():
            self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, pair, index):
        self.log("val_loss", self.net(*pair)[1])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]


def loader(numbers):
    return torch.utils.data.DataLoader([batch(number) for number in numbers], batch_size=None)


def fit(folder, *callbacks, module=None, steps=5, resume=None, batches=8, **settings):
    module, logger = module or Module(), Logged()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "devices": 1}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=logger, callbacks=list(callbacks),
                         default_root_dir=folder, num_sanity_val_steps=1, **quiet | settings)  # fmt: skip
    trainer.fit(module, loader(range(batches)), loader([100]), ckpt_path=resume)
    return module, logger, trainer


def by_hand(steps):
    """The records of a loop of one's own, with Lightning's batches and rates."""
    module, records = Module(), []
    (optimizer,), (schedule,) = module.configure_optimizers()
    monitor = Monitor(module.net, 2, optimizer=optimizer, writers=[records.append])
    for step in range(steps):
        torch.manual_seed(step)
        _, loss = module.net(*batch(step))
        loss.backward()
        optimizer.step()
        monitor.step(loss)
        schedule["scheduler"].step()
        optimizer.zero_grad()
    return records


def alike(records, expected):
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    for record, other in zip(records, expected, strict=True):
        for key in ("loss", "lr", "grad_l2", "grad_linf"):
            assert record[key] == pytest.approx(other[key], rel=1e-4)
        assert list(record["layers"]) == [f"net.{name}" for name in other["layers"]]
        for name, layer in other["layers"].items():
            assert record["layers"][f"net.{name}"]["entropy"] == pytest.approx(layer["entropy"], abs=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_records_losses_and_what_the_loggers_get(tmp_path, compiled):
    plain, *_ = fit(tmp_path / "plain", module=Module(compiled), val_check_interval=4)
    callback = MonitorCallback(2)
    module, logger, trainer = fit(tmp_path, callback, module=Module(compiled), val_check_interval=4)
    assert module.losses == plain.losses and "training_step" not in vars(module)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), plain.parameters(), strict=True))
    records, validations = load(tmp_path)
    alike(records, by_hand(5))
    assert records[0]["stack"] == "lightning"
    rows = [(step, row) for step, row in logger.rows if "attention_entropy" in row]
    assert [step for step, _ in rows] == [0, 2, 4]  # though log_every_n_steps is 50
    for (_, row), record in zip(rows, records, strict=True):
        assert row["attention_logit_max"] == max(max(layer["max_logit"]) for layer in record["layers"].values())
        assert row["attention_healthy"] == 1
    assert trainer.callback_metrics["attention_entropy"] == pytest.approx(rows[-1][1]["attention_entropy"])
    assert [line["step"] for line in validations] == [4]
    assert list(validations[0]["validation"]) == ["loss"]
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_accumulated_updates_and_a_run_that_goes_on(tmp_path):
    """Two batches an update; a resumed run has the records that the whole one has."""
    whole, *_ = fit(tmp_path / "a", MonitorCallback(2), accumulate_grad_batches=2, steps=4)
    records = load(tmp_path / "a")[0]
    assert [record["step"] for record in records] == [0, 2]
    for record in records:
        mean = sum(whole.losses[2 * record["step"] :][:2]) / 2
        assert record["loss"] == pytest.approx(mean, rel=1e-5)

    checkpoint = str(tmp_path / "two.ckpt")
    *_, trainer = fit(tmp_path / "b", MonitorCallback(2), accumulate_grad_batches=2, steps=2, batches=4)
    trainer.save_checkpoint(checkpoint)
    fit(tmp_path / "b", MonitorCallback(2), accumulate_grad_batches=2, steps=4, batches=4, resume=checkpoint)
    assert [record["step"] for record in load(tmp_path / "b")[0]] == [0, 2]


def test_an_alarm_ends_the_run_if_asked(tmp_path, caplog):
    class Collapse(pl.Callback):
        def on_train_batch_start(self, trainer, module, pair, index):
            if trainer.global_step == 3:
                with torch.no_grad():
                    module.net.h[1].attn.c_attn.weight[:64] *= 100

    stop = MonitorCallback(1, "stop", alarm=AlarmConfig(fraction=0.5, logit=0))
    *_, trainer = fit(tmp_path, Collapse(), stop, steps=8)
    assert trainer.global_step == 4 and "collapse" in caplog.text


def test_manual_optimization_says_what_to_do(tmp_path, caplog):
    class Manual(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, pair, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.net(*pair)[1])
            optimizer.step()

        def on_fit_start(self):
            self.monitor = Monitor(self.net, 2, path=tmp_path / "own", optimizer=self.trainer.optimizers, follow=True)

    fit(tmp_path, MonitorCallback(2), module=Manual())
    assert "automatic_optimization = False" in caplog.text and not (tmp_path / "monitor.jsonl").exists()
    assert [record["step"] for record in load(tmp_path / "own")[0]] == [0, 2, 4]


def test_settings_are_refused_and_the_callback_is_lightnings(tmp_path):
    with pytest.raises(ValueError, match="on_alarm = 'end': allowed are 'warn', 'stop', 'rescue' and functions"):
        MonitorCallback(on_alarm="end")
    with pytest.raises(ValueError, match="every = 0: allowed are whole numbers"):
        MonitorCallback(0)
    assert issubclass(MonitorCallback, pl.Callback) and issubclass(MonitorCallback, LightningWatching)
    assert pickle.loads(pickle.dumps(MonitorCallback(7))).every == 7  # as strategies that spawn do


def test_importing_the_file_imports_no_lightning():
    code = "import sys, stable_monitor.lightning; print({'lightning', 'pytorch_lightning'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_two_callbacks_keep_their_state_under_keys_of_their_own(tmp_path):
    """Lightning refuses two callbacks of one key that keep something in checkpoints."""
    ours = [MonitorCallback(10, path=tmp_path), MonitorCallback(100, path=tmp_path), MonitorCallback(10)]
    assert len({callback.state_key for callback in ours}) == 3
