"""The monitor: records attention entropy, spectral norms and gradient norms in training, with an alarm."""

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stable_core.advancing import after_advance

from .alarm import Alarm, AlarmConfig, Watch
from .calls import Call
from .chosen import Chosen, choose
from .clock import Clock
from .compiled import TrainingInterception, unwrap
from .interception import UNSEEN, unseen_warning
from .optimizers import Optimizers, after_steps, listed, short
from .projections import SpectralNorms
from .ranks import Ranks
from .records import RecordFile, Records
from .remedies import remedy
from .rescue import Rescued, rescue
from .summary import by_head, gradient_norms, plain
from .verdicts import Verdict

log = logging.getLogger("stable_monitor")


class Monitor:
    """Measures a model every so many updates in training, without any effect on it: losses are bitwise the same.

        monitor = Monitor(model, every=100, optimizer=optimizer, path="runs/a")
        for batch in loader:
            loss = ...
            loss.backward()
            optimizer.step()
            monitor.step(loss)  # the only line to add in the loop, before the gradients are cleared
            optimizer.zero_grad()

    With `follow=True` even that line is left out: `step` is called after each step of the optimizer.

    A record has these fields; numbers that are not finite are null:

    - `step`, `loss`, `lr` (`lrs` where groups differ), `grad_l2`, `grad_linf`: of the model; step 0 is untrained;
    - `nonfinite`: which of `loss` and `grad_l2` are NaN or infinite; other nulls were not measured;
    - `alarms`, `rescues`, `verdict`: what rang, what was rescued, and the verdict so far;
    - `updates_per_second` since the last record, validations and all, and `overhead`, the part of that time that the monitor
      took itself (with `writers`, without `on_alarm`). That is time of the host: work that is queued on a GPU and not waited
      for is not in it;
    - `layers`, by the name of the attention module:

        - `kind`: encoder, decoder (causal) or cross; `keys`: their number, or its geometric mean where queries see different
          numbers. Uniform attention has entropy log(keys);
        - for each head `entropy` and `entropy_min`, mean and least over batch and queries, in nats; `max_logit`, the largest
          attention logit; `bound`, the least entropy that logits of their size allow [σ, Theorem 3.1];
        - `sigma`: true spectral norms of the effective query, key, value and output weights, or of a packed "qkv"; `lag`: under
          σReparam 1 - estimate / sigma; `grad_l2`, `grad_linf`.

    `python -m stable_monitor.report RUN` draws the records.

    Attention is measured in the first forward pass, in training mode, of an update with a record. Call the model itself, not a
    part of it. A module that is used several times in the pass is measured at its first use. Between records the model has no
    hooks. A compiled model runs forward once more for a record, eagerly and without gradient, as its attention cannot be seen
    otherwise.

    With several processes each measures its own batch, and rank 0 writes. Construct the monitor on all of them: norms of
    sharded weights need all, and so does an `on_alarm` that every rank must call. Under FSDP1, with its flat shards, gradient
    norms are null. What cannot be measured or written is a warning, and does not end the run.

    Args:
        model: the module that the training loop calls: plain, compiled, or wrapped for distribution.
        every: number of updates from one record to the next; the first record is of the untrained model, step 0.
        path: a .jsonl file, or a directory for `monitor.jsonl`, to which each record is appended as one line. None: no file.
        optimizer: to read the learning rates from, or several in a list, tuple or dict. `lr` is that of the first group.
        step: number of updates made before, where a run is resumed; the alarm's history is read from their records in the file.
        alarm: settings of the alarm; `AlarmConfig()` if left out.
        on_alarm: called with each `Alarm` of rank 0, after it is logged, on every rank that has a monitor: `stop_training`,
            `lower_learning_rate(optimizer)` or your function. In a resumed run also with one that is `again`.
        writers: functions called with each record on rank 0: `TensorBoardWriter(directory)`, `WandbWriter()` or yours.
        attention: modules, by name, whose attention the monitor does not see by itself; `*` stands for any part of a name.
            "softmax": a softmax over the last dimension in the module is that of attention. A function (module, args, kwargs)
            of the module's forward -> (q, k, scale, mask), with q and k (batch, heads, tokens, head_dim) and a mask or None
            as `scaled_dot_product_attention` takes it: these are read, whatever computes the attention.
        stack: the training stack's name, for the records: `python -m stable_monitor.diagnose` then names its remedies.
        follow: whether `step` is called by itself after each step of the optimizer, of several when all have made one. The loss
            is then the `loss` of the model's output, if that is a dict with one; a step that a scaler skips is no update.

    Raises:
        ValueError: every or step is not a whole number, or too small; attention names no module, or says something else of it;
            there is no optimizer to follow, or it takes no hook; another argument is of another type.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        *,
        path: str | Path | None = None,
        optimizer: Optimizers | None = None,
        step: int = 0,
        alarm: AlarmConfig | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
        writers: Iterable[Callable[[dict[str, Any]], None]] = (),
        attention: Chosen | None = None,
        stack: str = "",
        follow: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model = {short(model)}: allowed are torch modules")
        if not isinstance(path, str | os.PathLike | None):
            raise ValueError(f"path = {short(path)}: allowed are None, a directory and a .jsonl file")
        for name, value, least in (("every", every, 1), ("step", step, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r}: allowed are whole numbers from {least}")
        if not isinstance(alarm, AlarmConfig | None):
            raise ValueError(f"alarm = {alarm!r}: allowed are None and an AlarmConfig; what to do then is on_alarm")
        if on_alarm is not None and not callable(on_alarm):
            raise ValueError(f"on_alarm = {on_alarm!r}: allowed are None and functions of an Alarm, as stop_training")
        if (
            isinstance(writers, str)
            or not isinstance(writers, Iterable)
            or not all(map(callable, writers := tuple(writers)))
        ):
            raise ValueError(f"writers = {writers!r}: allowed are functions of a record, in a list")
        if follow and optimizer is None:
            raise ValueError("follow = True: it needs the optimizer; allowed without one is False")
        self.every, self.updates = every, step
        self.last: dict[str, Any] | None = None  # the last record
        self._called, self._model, self._optimizers = (
            model,
            unwrap(model),
            [] if optimizer is None else listed(optimizer),
        )
        self._on_alarm, self._writers = on_alarm, writers
        self._stack = {"stack": stack} if stack else {}
        self._verdict, self._said = "", set[str]()  # of the last record; those that were logged
        self._clock = Clock()
        self._watch, self._sigma, self._closed = Watch(alarm or AlarmConfig()), SpectralNorms(self._all_here), False
        self._shards = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
        self._interception = TrainingInterception(
            model,
            self._model,
            self._see,
            finished=self._end_of_forward,
            failed=self._forget,
            unmeasured=functools.partial(self._warn, "the model was not measured"),
            allowed=self._may_run_alone,
            chosen=choose(self._model, attention),
            timed=self._clock.working,
        )
        self._processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._is_main = self._processes == 1 or dist.get_rank() == 0
        self._ranks = Ranks() if self._processes > 1 and (on_alarm is not None or self._is_cut_up()) else None
        self._armed = ExitStack()
        self._warned: set[str] = set()
        self._gradients: dict[str, Tensor] | None = None  # norms by module, "" is the model; None until they are read
        self._rates: list[float | None] | None = None  # of all groups of the optimizers
        self._steps = (
            after_steps(self._optimizers, self._step, after_advance) if follow else []
        )  # hooks of the optimizers
        self._file = self._open(path, step) if path is not None and self._is_main else None
        if step > 1:  # nanoGPT's monitor is made after the first update
            self._watch.resume()
        self._prepare()

    def step(
        self, loss: Tensor | float | None = None, lr: float | None = None, output_loss_scale: float = 1.0
    ) -> dict[str, Any] | None:
        """Counts one update; call it after backward, before the gradients are cleared. Returns the record, if it made one.

        Args:
            loss: this update's loss. Left out, it is the `loss` of the model's output, if that is a dict with one.
            lr: the learning rate; left out, it is the optimizer's.
            output_loss_scale: factor for the loss of the model's output, where that was divided by the number of accumulated
                batches.

        Raises:
            ValueError: the monitor follows the optimizer.
        """
        if self._steps:
            raise ValueError("follow = True: the monitor calls step itself; allowed where the loop does is False")
        return self._step(loss, lr, output_loss_scale)

    def _step(
        self, loss: Tensor | float | None = None, lr: float | None = None, output_loss_scale: float = 1.0
    ) -> dict[str, Any] | None:
        if loss is None and self._loss is not None:
            loss = self._loss * output_loss_scale
        if not self.is_recording:
            self.updates += 1
            self._prepare()
            return None
        with self._clock.working():
            record = self._record(loss, lr)
            self._armed.close()
            self.updates += 1
            self._prepare()
            self.last = record
            alarms = self._publish(record)
        self._raise(alarms)  # outside: what is done about an alarm is not the monitor's work
        return record

    def read_gradients(self, scale: float = 1.0) -> None:
        """Reads the gradients now, for loops that clip or clear them before `step`. `scale` is the loss scale in them.

        Learning rates too, which a scheduler may change before `step`."""
        if not self.is_recording:
            return
        if self._rates is None:
            groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
            self._rates = [self._number("lr", group["lr"]) for group in groups if "lr" in group]
        if not self._shards:
            with self._clock.working(), self._warning("gradients"):
                if any(isinstance(p.grad, DTensor) for p in self._model.parameters()) and not self._all_here():
                    raise RuntimeError("they are cut up, and not every rank has a monitor: construct it on every rank")
                self._gradients = gradient_norms({"": self._model, **self._modules}, scale)

    def validated(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        """Appends the results of a validation to the file, on rank 0; `writers` are not called.

        Args:
            metrics: numbers by name; the report draws "loss" beside the training loss.
            step: number of updates of the validated model, if not the number counted so far.
        """
        if self._file is None:
            return
        with self._warning("a validation"):
            found = {str(name): self._number(str(name), value) for name, value in metrics.items()}
            updates = self.updates if step is None else step
            self._file.append({"step": updates, "time": round(time.time(), 3), "validation": plain(found)})

    def rescue(self, forward: Callable[[], Any], **settings: Any) -> list[Rescued]:
        """`stable_monitor.rescue` of the monitored model, which is written down; the layers that raised an alarm and have not
        recovered since are rescued whatever their entropy.

        Raises:
            ValueError: the monitor has no optimizer or no record yet; as `rescue`.
        """
        if not self._optimizers or self.last is None:
            raise ValueError("rescue needs a monitor with an optimizer, after its first record")
        done = rescue(self._called, self._optimizers, forward, layers=sorted(self._watch.collapsed), **settings)
        self._mark(done)
        return done

    def close(self) -> None:
        """Ends monitoring, and removes the hooks from the model and the optimizer."""
        self._armed.close()
        for handle in self._steps:
            handle.remove()
        self._closed, self.is_recording = True, False

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ one record

    def _prepare(self) -> None:
        """Prepares for the next update: resets what was measured, and installs hooks if it will have a record."""
        self.is_recording = not self._closed and self.updates % self.every == 0
        self._gradients, self._rates = None, None
        self._forget()
        if self.is_recording:
            self._armed.enter_context(self._interception.of_training())

    def _forget(self) -> None:
        """Resets what was measured in a forward pass."""
        self._seen: dict[str, tuple[Any, ...]] = {}  # by layer: kind, numbers of each head, spectral norms
        self._modules: dict[str, nn.Module] = {}
        self._loss: Tensor | None = None
        self._unseen: list[str] = []  # modules that look like attention, of which none was seen

    def _is_cut_up(self) -> bool:
        return any(isinstance(p, DTensor) for p in self._model.parameters())

    def _all_here(self) -> bool:
        """Whether all processes have a monitor, so that they can take part in a collective."""
        if self._processes > 1 and self._ranks is None:  # the model was sharded after the monitor was constructed
            self._ranks = Ranks()
        return self._ranks is None or self._ranks.all_here()

    def _may_run_alone(self) -> bool:
        """Whether processes with a monitor can run an additional forward pass without others, or all have one; else warns."""
        together = self._is_cut_up() or any(isinstance(m, nn.SyncBatchNorm) for m in self._model.modules())
        if self._processes == 1 or not together or self._all_here():
            return True
        self._warn("the compiled model was not measured: not every rank has a monitor; construct it on every rank")
        return False

    def _end_of_forward(self, output: Any) -> None:
        with self._clock.working():
            self._unseen = self._interception.unseen()
            if self._seen:
                self._armed.close()
                loss = output.get("loss") if isinstance(output, dict) else None
                # A copy, as loops divide it in place.
                self._loss = loss.detach().clone() if isinstance(loss, Tensor) and loss.numel() == 1 else None

    def _see(self, call: Call) -> Call:
        site = call.site
        if self._model.training and site.name not in self._seen:
            # sigma first: it may need all processes, and what comes then may fail on one
            with self._clock.working(), self._warning(site.name):
                norms = self._sigma.measure(site.name, site.module, site.parent)
                self._seen[site.name] = *by_head(call), norms
                self._modules[site.name] = site.module
        return call

    @contextmanager
    def _warning(self, what: str) -> Iterator[None]:
        """A context that turns errors into a warning, as a failed measurement must not end the run."""
        try:
            yield
        except Exception as error:
            self._warn(f"{what} not recorded", error)

    def _warn(self, message: str, error: Exception | None = None) -> None:
        """Logs a warning, once for each message."""
        if message not in self._warned:
            log.warning("%s", f"{message}: {type(error).__name__}: {error}" if error is not None else message)
            self._warned.add(message)

    def _record(self, loss: Tensor | float | None, lr: float | None) -> dict[str, Any]:
        if not self._seen:
            self._warn(f"{UNSEEN}. The monitor must be given what the loop calls, in training mode")
        if self._unseen:
            self._warn(unseen_warning(self._unseen))
        if self._gradients is None:
            if not self._shards and all(p.grad is None for p in self._model.parameters()):
                self._warn("no gradient was seen: call step after backward, before the gradients are cleared")
            self.read_gradients()
        rates = self._rates or []
        lr = self._number("lr", lr) if lr is not None else next(iter(rates), None)
        loss = self._number("loss", loss)
        gradient = (self._gradients or {}).get("")
        numbers = {"loss": loss, "grad_l2": None if gradient is None else float(gradient[0])}
        record = {
            "step": self.updates,
            "time": round(time.time(), 3),
            **self._stack,
            **plain({"loss": loss, "lr": lr, **({"lrs": rates} if len({*rates}) > 1 else {})}),
            **self._gradient(""),
            "nonfinite": [name for name, x in numbers.items() if x is not None and not math.isfinite(x)],
            "layers": {},
            "alarms": [],
        }
        for name, (kind, numbers, norms) in self._seen.items():
            entropy, entropy_min, max_logit, bound, log_keys = numbers
            heads = {"entropy": entropy, "entropy_min": entropy_min, "max_logit": max_logit, "bound": bound}
            record["layers"][name] = {
                "kind": kind,
                **plain({"keys": log_keys.mean().exp(), **heads, **norms}),
                **self._gradient(name),
            }
        return record | plain(self._clock.lap(self.updates))

    def _gradient(self, name: str) -> dict[str, float | None]:
        norms = (self._gradients or {}).get(name)
        return dict(zip(("grad_l2", "grad_linf"), (None, None) if norms is None else plain(norms), strict=True))

    def _publish(self, record: dict[str, Any]) -> list[Alarm]:
        """Writes the record down, with the verdict and the alarms, which it returns."""
        alarms = self._watch.look(record)
        if self._on_alarm is not None and self._ranks is not None:  # rank 0 decides, as all ranks must stop together
            alarms = self._ranks.decided(alarms)
            if alarms and self._ranks.missing():
                self._warn("on_alarm is not called on every rank, as some have no monitor: construct it on every rank")
        record["alarms"] = [
            {key: plain(asdict(alarm)[key]) for key in ALARM_KEYS} for alarm in alarms if not alarm.again
        ]
        verdict = self._watch.examination.verdict()
        record["verdict"] = verdict.verdict
        if self._file is not None:
            with self._warning(str(self._file.path)):
                self._file.append(record)
        for writer in self._writers if self._is_main else ():
            with self._warning(getattr(writer, "__qualname__", type(writer).__name__)):
                writer(record)
        if self._is_main:
            self._say(record["step"], verdict)
        return alarms

    def _raise(self, alarms: list[Alarm]) -> None:
        for alarm in alarms if self._is_main else ():
            log.warning("%s", alarm)
        for alarm in alarms:
            if self._on_alarm is not None:
                self._mark(self._on_alarm(alarm))

    def _say(self, step: int, verdict: Verdict) -> None:
        """Logs each kind of verdict once, where it is that of two records; the alarm says a collapse itself."""
        name, before, self._verdict = verdict.verdict, self._verdict, verdict.verdict
        if name not in ("healthy", "collapse") and name == before and name not in self._said:
            self._said.add(name)
            log.warning("update %d: %s; try: %s (%s)", step, verdict, *remedy(name, self._stack.get("stack", "")))

    def _mark(self, done: Any) -> None:
        """Adds to the last record what a rescue after it did, by writing it again."""
        if self.last is None or not (isinstance(done, list) and all(isinstance(one, Rescued) for one in done) and done):
            return
        self.last["rescues"] = self.last.get("rescues", []) + [plain(asdict(one)) for one in done]
        if self._file is not None:
            with self._warning(str(self._file.path)):
                self._file.append(self.last)

    def _open(self, path: str | Path, step: int) -> RecordFile:
        file = RecordFile(path)
        holds_records = False
        with self._warning(str(file.path)):
            holds_records = file.prepare()
        if holds_records:
            with self._warning(f"the alarm's history in {file.path}"):
                for record in Records(file.path):
                    if record["step"] < step:
                        self._watch.look(record)
        return file

    def _number(self, name: str, x: Any) -> float | None:
        """x as a float: a number, or a tensor or array of one; None for None, and with a warning for anything else."""
        with self._warning(name):
            if isinstance(x, Tensor):
                x = x.detach()
                x = x.full_tensor() if isinstance(x, DTensor) else x
            if x is not None and hasattr(x, "item"):
                x = x.item()
            if x is not None and not isinstance(x, Real):
                raise TypeError(f"{short(x)}; allowed are real numbers, and tensors that hold one")
            return None if x is None else float(x)
        return None


ALARM_KEYS = ("layer", "entropy", "threshold", "reference", "bound")
