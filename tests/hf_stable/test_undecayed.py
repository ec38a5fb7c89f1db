"""Weight decay under transformers' Trainer."""

import pytest
import torch
import transformers

import hf_stable
from hf_stable.opening import open_checkpoint
from stable_core import SigmaReparamConfig

from .test_monitor import CONFIG, data


class Mixed(hf_stable.UndecayedGamma, transformers.Trainer):
    pass


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("kind, kept", [(Mixed, 1.0), (transformers.Trainer, 0.95**2)])
def test_gamma_is_left_alone(tmp_path, kind, kept, optim):
    """Without gradients all that an update does is weight decay: lr * decay = 0.05 of a parameter."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG))
    hf_stable.sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral"))
    model.register_forward_pre_hook(lambda *_: [p.register_hook(torch.zeros_like) for p in model.parameters()] and None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {
        "learning_rate": 0.1,
        "weight_decay": 0.5,
        "optim": optim,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
    }
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **settings
    )
    kind(model, arguments, train_dataset=data()).train()
    for name, p in model.named_parameters():
        spared = 1.0 if "ln_" in name or name.endswith(".bias") else 0.95**2  # W, and the embeddings
        expected = before[name] * (kept if name.endswith(".gamma") else spared)
        torch.testing.assert_close(p.detach(), expected, msg=name)


def test_its_checkpoint_is_opened_with_the_moments_in_their_places(tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG))
    hf_stable.sigma_reparam(model, SigmaReparamConfig(gamma_init="spectral"))
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_steps=1, max_steps=1, weight_decay=0.5, disable_tqdm=True
    )
    trainer = Mixed(model, arguments, train_dataset=data())
    trainer.train()
    opened = open_checkpoint(tmp_path / "checkpoint-1")
    theirs = dict(opened.model.named_parameters())
    for name, p in model.named_parameters():
        ours = trainer.optimizer.state[p]["exp_avg"]
        assert torch.equal(opened.optimizer.state[theirs[name]]["exp_avg"], ours), name
