"""The monitor that steps itself after the optimizer: one line, and the same records and losses as with two."""

import accelerate
import pytest
import timm.task
import torch
from torch import nn

from stable_core import SigmaReparamConfig, sigma_layers, sigma_reparam
from stable_monitor import Monitor, QKClip, Rescue
from stable_monitor.clock import Clock
from tests.stable_monitor.models import batch, gpt, train


def timeless(records):
    """All but what the clock says."""
    clocked = {"time", *Clock().lap(0)}
    return [{key: value for key, value in record.items() if key not in clocked} for record in records]


class WithLoss(nn.Module):
    """A model whose output has the loss, as those of transformers and timm's tasks."""

    def __init__(self):
        super().__init__()
        self.gpt = gpt()

    def forward(self, tokens, targets):
        return {"loss": self.gpt(tokens, targets)[1]}


def run(model, how, steps=5, accumulate=1, **settings):
    """Losses and records of a loop that has `how` it monitors: by itself, "step"; or in the optimizer, "follow"."""
    torch.manual_seed(0)
    records = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    called, optimizer = accelerator.prepare(model, optimizer)
    if how is not None:
        monitor = Monitor(called, 2, optimizer=optimizer, writers=[records.append], follow=how == "follow", **settings)
    losses = []
    for step in range(steps * accumulate):
        with accelerator.accumulate(called):
            loss = called(*batch(step))["loss"]
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            if how == "step" and accelerator.sync_gradients:
                monitor.step(losses[-accumulate])  # of the first batch, as the attention is
            optimizer.zero_grad()
    return losses, records


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerates_optimizer_is_followed(accumulate):
    plain, _ = run(WithLoss(), None, accumulate=accumulate)
    losses, records = run(WithLoss(), "follow", accumulate=accumulate)
    by_hand, expected = run(WithLoss(), "step", accumulate=accumulate)
    assert losses == by_hand == plain
    assert [record["step"] for record in records] == [0, 2, 4] and timeless(records) == timeless(expected)


def test_qk_clip_follows_accelerates_optimizer():
    model = gpt()
    optimizer = accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
    clip = QKClip(model, 1e3, optimizer=optimizer)
    train(model, 3, optimizer=optimizer)
    assert clip.updates == 3


def test_the_training_task_of_timms_script():
    """train.py calls the task, divides its loss in place under accumulation, and steps the optimizer itself."""

    def task_of():
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, embed_dim=48, num_heads=3
        )
        return timm.task.ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)

    def run(watched):
        task, records, losses = task_of(), [], []
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        if watched:
            Monitor(task, 2, optimizer=optimizer, writers=[records.append], follow=True)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            loss = task(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4))["loss"]
            losses.append(loss.item())
            loss /= 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses, records

    losses, records = run(True)
    assert losses == run(False)[0]
    assert [(record["step"], record["loss"]) for record in records] == [
        (step, pytest.approx(losses[step], rel=1e-5)) for step in (0, 2)
    ]
    assert list(records[0]["layers"]) == ["trainable_module.blocks.0.attn", "trainable_module.blocks.1.attn"]
    assert all(record["grad_l2"] > 0 for record in records)


def test_two_optimizers_make_one_update_and_closing_ends_it():
    model, records = WithLoss(), []
    flat, square = ([p for p in model.parameters() if (p.ndim == 2) == is_square] for is_square in (False, True))
    optimizers = {"muon": torch.optim.Muon(square, lr=1e-2), "adamw": torch.optim.AdamW(flat, lr=1e-3)}
    monitor = Monitor(model, 1, optimizer=optimizers, writers=[records.append], follow=True)
    for step in range(3):
        if step == 2:
            monitor.close()
        model(*batch(step))["loss"].backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    assert [record["step"] for record in records] == [0, 1] and monitor.updates == 2
    assert records[0]["lrs"] == [1e-2, 1e-3]
    assert not any(optimizer._optimizer_step_post_hooks for optimizer in optimizers.values())


def test_what_cannot_be_followed_is_refused():
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="follow = True: it needs the optimizer"):
        Monitor(model, follow=True)
    with pytest.raises(ValueError, match="it takes no hook"):
        Monitor(model, optimizer=type("Own", (), {"param_groups": []})(), follow=True)
    monitor = Monitor(model, optimizer=optimizer, follow=True)
    with pytest.raises(ValueError, match="the monitor calls step itself"):
        monitor.step()


def test_a_rescue_in_the_optimizers_step_is_the_one_after_it(caplog):
    """u of the other reparametrised layers has advanced by then, so that nothing is taken for a change from outside."""

    def run(follow):
        model = WithLoss()
        sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral"), lambda _, name: "mlp" in name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        acts = Rescue(model, optimizer, lambda: model(*batch(9)))
        monitor, losses = Monitor(model, 1, optimizer=optimizer, on_alarm=acts, follow=follow), []
        for step in range(5):
            if step == 2:
                with torch.no_grad():
                    model.gpt.h[0].attn.c_attn.weight[:64] *= 60
            loss = model(*batch(step))["loss"]
            loss.backward()
            optimizer.step()
            if not follow:
                monitor.step(loss)
            optimizer.zero_grad()
            losses.append(loss.item())
        assert "gpt.h.0.attn.c_attn" in [name for name, _ in sigma_layers(model)]
        return losses

    assert run(follow=True) == run(follow=False)
    assert not [record for record in caplog.records if record.name.startswith("stable_core")]
