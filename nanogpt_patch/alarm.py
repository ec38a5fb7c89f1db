"""What `monitor_alarm` has done when attention entropy collapses: a warning alone, a clean end, or a rescue."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from stable_core import advance
from stable_monitor import Alarm, Rescue
from stable_monitor.compiled import unwrap

CHOICES = ("warn", "stop", "rescue")
STOPPED = 3  # exit status
GO_ON = (
    "; go on with python -m stable_monitor.rescue_checkpoint {path} NEW/ckpt.pt --run {path.parent}, and then with "
    "--init_from=resume --out_dir=NEW"
)


def action(variables: dict[str, Any], optimizer: Optimizer) -> Callable[[Alarm], Any] | None:
    """The monitor's `on_alarm`, as the script's `monitor_alarm` says; to be made when its `model` is what the loop calls."""
    if variables["monitor_alarm"] == "warn":
        return None

    def stop(alarm: Alarm) -> None:
        if alarm.again:
            return
        _end(variables, optimizer, f"update {alarm.step}: {alarm.layer} has collapsed", GO_ON)

    def forward() -> None:
        with variables.get("ctx", nullcontext()):
            variables["model"](variables["X"], variables["Y"])

    rescue = Rescue(variables["model"], optimizer, forward)

    def rescue_or_stop(alarm: Alarm) -> Any:
        # The step changed weights, and the hook that advances their u comes after the monitor's.
        advance(variables["model"].parameters())
        try:
            return rescue(alarm)
        except ValueError as error:
            _end(variables, optimizer, f"update {alarm.step}: {alarm.layer} has collapsed and was not rescued: {error}")

    return stop if variables["monitor_alarm"] == "stop" else rescue_or_stop


def _end(variables: dict[str, Any], optimizer: Optimizer, why: str, go_on: str = "") -> NoReturn:
    """Ends the script on every rank with what it would have saved next. ckpt.pt, which may be the best one, stays."""
    path = Path(variables["out_dir"], "ckpt_alarm.pt").resolve()
    if variables["master_process"]:
        kept = {name: variables[name] for name in ("model_args", "best_val_loss", "config") if name in variables}
        state = {"model": unwrap(variables["model"]).state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**kept, **state, "iter_num": variables["iter_num"] + 1}, path)
        print(f"nanogpt_patch: {why}; saved {path}{go_on.format(path=path)}", file=sys.stderr)
    if dist.is_initialized():  # or torchrun ends rank 0, while it saves, because another has ended
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(STOPPED)
