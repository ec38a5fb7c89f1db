"""fairseq's checkpoints for `python -m stable_monitor.rescue_checkpoint`; `--restore-file OUT` resumes what that writes."""

import copy
from itertools import chain
from pathlib import Path

import torch
from fairseq import checkpoint_utils, optim, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from stable_core import unfold_state_dict
from stable_core.sigma_layers import sigma_layers
from stable_monitor import prepare_to_resume
from stable_monitor.rescue_checkpoint import Opened
from stable_monitor.resume import reparametrise_named

from .masters import is_flat, models_own, split_flat
from .resume import KEY, going_on, read, rescued_layers


def is_mine(path: Path) -> bool:
    """Whether fairseq-train wrote it."""
    try:
        return {"model", "optimizer_history", "extra_state"} <= read(path).keys()
    except (OSError, ValueError):
        return False


def open_checkpoint(path: Path) -> Opened:
    """The checkpoint, on the CPU and in fp32. fairseq builds the model, for which it reads the dictionaries of the run's data.

    Raises:
        OSError, ValueError: it cannot be read; there are no dictionaries; its optimizer is one that `models_own` refuses.
    """
    with going_on():
        checkpoint = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    cfg, saved = checkpoint["cfg"], checkpoint.get("last_optimizer_state")
    if cfg is None:
        cfg = convert_namespace_to_omegaconf(checkpoint["args"])
    utils.import_user_module(cfg.common)
    task = tasks.setup_task(cfg.task)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    built = {name for name, _ in sigma_layers(model)}
    parameters = [p for p in chain(model.parameters(), criterion.parameters()) if p.requires_grad]
    reparametrise_named(model, rescued_layers(checkpoint))
    optimizer = None
    if saved is not None:
        saved = split_flat(saved, parameters) if is_flat(saved, parameters) else saved
        with models_own(optim.build_optimizer(cfg.optimizer, parameters)) as optimizer:
            prepare_to_resume(model, optimizer, saved)
            optimizer.load_state_dict(saved)
    model.load_state_dict(checkpoint["model"], strict=True, model_cfg=cfg.model)

    def save(out: Path) -> None:
        new = copy.copy(read(path))
        new["model"] = model.state_dict()  # in fp32, as fairseq writes all weights
        new["extra_state"] = {**new["extra_state"], KEY: [n for n, _ in sigma_layers(model) if n not in built]}
        for average in {"ema", "ema_fp32_params"} & new["extra_state"].keys():
            new["extra_state"][average] = unfold_state_dict(model, new["extra_state"][average])
        if optimizer is not None:
            new["last_optimizer_state"] = {**saved, **optimizer.state_dict()}
        torch.save(new, out)

    return Opened(model, optimizer, save)
