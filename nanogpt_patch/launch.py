"""Runs a script of a nanoGPT checkout, unmodified, with `nanogpt_patch.model` in the place of its `model` module.

Upstream's scripts are configured by their global variables. The new settings become such variables before the script runs,
so its configurator sets them, from the command line or a config file, like its own; `GPTConfig(...)` then reads them. They
are written into `model_args`, which upstream puts in its checkpoints, and a resumed run takes them from there.
"""

import ast
import os
import runpy
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch.optim import Optimizer

from stable_core.advancing import after_advance
from stable_core.options import renamed
from stable_core.registry import import_methods
from stable_core.sigma_layers import sigma_layers
from stable_core.unfolding import is_plain, unfold_optimizer_state
from stable_monitor import Monitor, QKClip, headline, prepare_to_resume

from .alarm import CHOICES, action
from .model import GPT, SETTINGS, STOCK, GPTConfig

CONFIGS = Path(__file__).parent / "config"
LAUNCHER = {  # settings of the launcher itself
    "monitor_every": 0,  # updates from one record of the attention entropy to the next, in out_dir; 0 for none
    "monitor_alarm": "warn",  # what an entropy collapse does: warn, stop or rescue
    "extra_seed": 0,  # added to every seed that the script sets: train.py's is always 1337
    "qk_clip": 0.0,  # threshold of QK-clip, after every update but the first; 0 for none
    "methods": "",  # modules to import first, which register methods of their own (stable_core.registry)
}
# What the command line gives a plain checkpoint.
OF_SIGMA = ("reparam", "gamma_init", "qkv", "n_power_iterations", "stop_gradient")
USAGE = "usage: python -m nanogpt_patch PATH/TO/nanoGPT/{train,sample,bench}.py [CONFIG] [--name=value ...]"
HELP = f"""{USAGE}

settings, beside the script's own (docs/nanogpt.md; docs/methods.md has the values):
  {" ".join(f"--{name}={value}" for name, value in (SETTINGS | LAUNCHER).items())}

example:
  python -m nanogpt_patch nanoGPT/train.py config/train_gpt.py --monitor_every=100 --monitor_alarm=rescue
"""


def main(argv: list[str]) -> int:
    """Checks the arguments, and hands over to the script; 2 for arguments that are wrong. `monitor_alarm` may exit with 3."""
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    try:
        script, arguments = check(argv)
    except (OSError, ValueError) as error:
        print(f"nanogpt_patch: {error}", file=sys.stderr)
        return 2
    run(script, arguments)
    return 0


def check(argv: list[str]) -> tuple[Path, list[str]]:
    """The script, and its arguments with config files where they are found: from here, the checkout, or this package.

    Raises:
        ValueError: no script of a nanoGPT checkout; a setting that does not exist or is of another type, with those that do.
    """
    if not argv or argv[0].startswith("-"):
        raise ValueError(USAGE)
    script = Path(argv[0]).resolve()
    for needed in (script, script.with_name("model.py"), script.with_name("configurator.py")):
        if not needed.is_file():
            what = "a folder" if needed.is_dir() else "not there"
            raise ValueError(f"{needed} is {what}: give a script of a nanoGPT checkout")
    known = {**_globals_of(script), **SETTINGS, **LAUNCHER}
    arguments, chosen = [], {}
    for argument in argv[1:]:
        name, equals, text = argument.removeprefix("--").partition("=")
        if "=" in text or (equals and not argument.startswith("--")):
            raise ValueError(f"{argument}: settings are --name=value, with one =")
        if equals and argument.startswith("--"):
            _check_setting(name, _value(text), known, "--")
            chosen[name] = _value(text)
            arguments.append(argument)
        elif argument.startswith("--"):
            raise ValueError(f"{argument}: settings are --name=value")
        else:
            path = _find_config(argument, script.parent)
            try:
                assigned = _assigned(path.read_text())
            except SyntaxError as error:
                raise ValueError(f"{path}: line {error.lineno}: {error.msg}") from error
            for name, value in assigned.items():
                if type(value) is int and type(known.get(name)) is float:
                    value = float(value)  # of a file upstream asks no more
                _check_setting(name, value, known, f"{path}: ")
                chosen[name] = value
            arguments.append(str(path))
    if chosen.get("methods", UNKNOWN) is not UNKNOWN:
        import_methods(chosen["methods"])
    ours = {name: value for name, value in chosen.items() if name in SETTINGS and value is not UNKNOWN}
    GPTConfig(**ours)
    every = chosen.get("monitor_every", 0)
    if every is not UNKNOWN and every < 0:
        raise ValueError(f"monitor_every = {every!r}: allowed are whole numbers from 0, which is for none")
    alarm = chosen.get("monitor_alarm", "warn")
    if alarm not in (*CHOICES, UNKNOWN):
        raise ValueError(f"monitor_alarm = {alarm!r}: allowed are {', '.join(map(repr, CHOICES))}")
    if alarm not in ("warn", UNKNOWN) and every == 0:
        raise ValueError(f"monitor_alarm = {alarm!r}: it needs monitor_every, the updates from one record to the next")
    clip = chosen.get("qk_clip", 0.0)
    if clip is not UNKNOWN and not clip >= 0:
        raise ValueError(f"qk_clip = {clip!r}: allowed are positive numbers, and 0, which is for none")
    if str(chosen.get("init_from")).startswith("gpt2"):
        for name, stock in STOCK.items():
            if ours.get(name, stock) != stock:
                raise ValueError(
                    f"{name} = {ours[name]!r}: with init_from = {chosen['init_from']!r} allowed is {stock!r}"
                )
    return script, arguments


def run(script: Path, arguments: list[str]) -> None:
    """The script as `python script arguments` runs it, in its own directory, with our model."""
    stand_in = types.ModuleType("model")
    stand_in.GPT, stand_in.GPTConfig = _MonitoredGPT, _config_of_script
    sys.modules["model"] = stand_in
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    os.chdir(script.parent)  # it opens configurator.py, data and out_dir from there
    torch.manual_seed, torch.cuda.manual_seed = _shifted(torch.manual_seed), _shifted(torch.cuda.manual_seed)
    runpy.run_path(str(script), init_globals={**SETTINGS, **LAUNCHER}, run_name="__main__")


def _shifted(manual_seed: Callable) -> Callable:
    return lambda seed: manual_seed(seed + _variables()["extra_seed"])


def _variables() -> dict:
    """The script's global variables."""
    return vars(sys.modules["__main__"])


def _config_of_script(**model_args) -> GPTConfig:
    """What the script calls GPTConfig: settings from model_args, else the checkpoint it resumes, else its variables."""
    variables = _variables()
    saved = renamed((variables.get("checkpoint") or {}).get("model_args", {}))
    chosen = {name: variables[name] for name in SETTINGS}
    if saved:  # one of stock nanoGPT says nothing about them
        saved = {name: saved.get(name, stock) for name, stock in {**SETTINGS, **STOCK}.items()}
        plain = saved["reparam"] == "none" and is_plain(variables["checkpoint"]["model"])
        if plain and chosen["reparam"] == "sigma" and any(word.startswith("--reparam=") for word in sys.argv):
            saved |= {name: chosen[name] for name in OF_SIGMA}
            print("From the command line: " + ", ".join(f"{name} = {chosen[name]}" for name in OF_SIGMA))
        for name in SETTINGS:
            if saved[name] != chosen[name]:
                print(f"From the checkpoint: {name} = {saved[name]}")
        chosen = saved
    settings = {**chosen, **model_args}
    if "model_args" in variables:
        variables["model_args"].update({name: settings[name] for name in SETTINGS})
    return GPTConfig(**settings)


class _MonitoredGPT(GPT):
    """The model: changes of its settings go into checkpoints, and where `monitor_every` asks for it, it is watched."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        model, variables = super().from_pretrained(*args, **kwargs), _variables()
        model.config = replace(
            model.config, z_loss=variables["z_loss"]
        )  # the only one of ours that OpenAI's weights may have
        variables.setdefault("model_args", {}).update(STOCK, z_loss=variables["z_loss"])
        return model

    def crop_block_size(self, block_size: int) -> None:
        super().crop_block_size(block_size)
        _variables().setdefault("model_args", {})["tau_scale"] = self.config.tau_scale

    def configure_optimizers(self, *args, **kwargs) -> Optimizer:
        optimizer, variables = super().configure_optimizers(*args, **kwargs), _variables()
        if saved := variables.get("checkpoint"):
            if is_plain(saved["model"]) and any(sigma_layers(self)):
                saved["optimizer"] = unfold_optimizer_state(self, optimizer, saved["optimizer"])
            prepare_to_resume(self, optimizer, saved["optimizer"])
        every, watching, validated = variables["monitor_every"], [], [None]
        if variables["qk_clip"]:
            _clip_from_the_second_update(optimizer, variables)
        if every:

            def before(*_) -> None:
                for monitor in watching:
                    monitor.read_gradients()

            def after(*_) -> None:
                done, first = variables["iter_num"], not watching
                if first:  # only now is the variable `model` what the loop calls, compiled and wrapped for DDP
                    watching.append(
                        Monitor(
                            variables["model"],
                            every,
                            path=variables["out_dir"],
                            optimizer=optimizer,
                            step=done + 1,
                            on_alarm=action(variables, optimizer),
                            writers=[partial(_print, variables)],
                            stack="nanogpt",
                        )
                    )
                losses = variables.get("losses")  # of the last validation, which may have come just before this update
                if losses is not None and losses is not validated[-1]:
                    validated.append(losses)
                    watching[0].validated({"loss": losses["val"]}, done if first else None)
                if not first:
                    loss = (
                        variables["loss"].detach() * variables["gradient_accumulation_steps"]
                    )  # as upstream prints it
                    watching[0].step(loss, optimizer.param_groups[0]["lr"])

            optimizer.register_step_pre_hook(before)
            after_advance(optimizer, after)
        return optimizer


def _print(variables: dict, record: dict) -> None:
    """A line beside the script's own of the same update, where it prints one and attention was measured."""
    if record["step"] % variables["log_interval"] == 0 and (shown := headline(record)):
        line = "iter {step}: attention entropy {entropy:.4f} nats, least layer {entropy_min:.4f}, largest logit {logit_max:.4g}"
        print(line.format(step=record["step"], **shown))


def _clip_from_the_second_update(optimizer: Optimizer, variables: dict) -> None:
    """Only after the first one is the variable `model` what the loop calls, compiled and wrapped for DDP."""

    def begin(*_) -> None:
        handle.remove()
        QKClip(variables["model"], variables["qk_clip"], optimizer=optimizer)

    handle = optimizer.register_step_post_hook(begin)


UNKNOWN = object()  # a value that is computed


def _globals_of(script: Path) -> dict[str, object]:
    """The variables that the script assigns before its configurator runs, which are its settings, and their defaults."""
    head = script.read_text().partition("exec(open('configurator.py')")[0]
    return {name: default for name, default in _assigned(head).items() if name != "config_keys"}


def _assigned(code: str) -> dict[str, object]:
    values = {}
    for statement in ast.parse(code).body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            several = isinstance(target, ast.Tuple | ast.List)
            for name in target.elts if several else [target]:
                if isinstance(name, ast.Name) and not name.id.startswith("_"):
                    values[name.id] = UNKNOWN if several or statement.value is None else _literal(statement.value)
    return values


def _literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _value(text: str) -> object:
    """As upstream's configurator reads it."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _check_setting(name: str, value: object, known: dict[str, object], where: str) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1)
        maybe = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{where}{name} is no setting; {maybe}there are {', '.join(sorted(known))} (helpers' names start with _)"
        )
    default = known[name]
    if UNKNOWN not in (value, default) and type(value) is not type(default):
        kinds = type(value).__name__, type(default).__name__
        raise ValueError(f"{where}{name} = {value!r} is of type {kinds[0]}: allowed is {kinds[1]}, as in {default!r}")


def _find_config(name: str, checkout: Path) -> Path:
    places = [Path(name), checkout / name, CONFIGS / Path(name).name]
    for path in places:
        if path.is_file():
            return path.resolve()
    ours = ", ".join(sorted(f"config/{path.name}" for path in CONFIGS.glob("*.py")))
    raise ValueError(f"{name} is no config file, here or in the checkout; this package has {ours}")
