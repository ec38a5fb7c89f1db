"""kill -9 wherever the vision trainer writes: the next call goes on from the last whole checkpoint, to the same weights."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recipes.vision import engine, train
from tests.recipes.test_vision import settings

OPTIONS = "--model sigma_vit_small_patch16_224 --epochs 3 --workers 0"


def killed_at(place: type | object, name: str, call: int, half: Callable) -> Callable[[], None]:
    """A patch after which the `call`-th call of place.name does `half` of its work and is the last thing the process does."""
    whole, calls = getattr(place, name), []

    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            half(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    return lambda: setattr(place, name, patched)


def some_of_a_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text[: len(text) // 3])


def half_a_checkpoint(accelerator, folder: str) -> None:
    Path(folder).mkdir()
    Path(folder, "model.safetensors").write_bytes(b"\x00" * 1000)


def half_a_folder(folder: Path) -> None:
    next(path for path in folder.iterdir() if path.is_file()).unlink()


def half_a_file(tensors, path: Path) -> None:
    path.write_bytes(b"\x00" * 1000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The rows and the weights of the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return train.train(settings(folder, OPTIONS)), load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("place", "name", "call", "half", "last"),
    [
        (engine.Accelerator, "save_state", 2, half_a_checkpoint, "checkpoint-1"),
        pytest.param(Path, "rename", 2, lambda *_: None, "checkpoint-1", marks=pytest.mark.slow),
        pytest.param(shutil, "rmtree", 1, half_a_folder, "checkpoint-2", marks=pytest.mark.slow),
        pytest.param(Path, "write_text", 1, some_of_a_text, None, marks=pytest.mark.slow),
        pytest.param(Path, "write_text", 3, some_of_a_text, "checkpoint-1", marks=pytest.mark.slow),
        (engine, "save_file", 1, half_a_file, "checkpoint-3"),
    ],
    ids=["checkpoint", "its name", "removing the one before", "settings", "log", "export"],
)
def test_a_run_killed_in_a_write_goes_on(whole, tmp_path, place, name, call, half, last):
    kill = killed_at(place, name, call, half)

    def run():
        kill()
        train.train(settings(tmp_path, OPTIONS))

    process = multiprocessing.get_context("fork").Process(target=run)  # importing takes longer than the run
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert getattr(engine.last_checkpoint(tmp_path), "name", None) == last
    assert not (tmp_path / "model.safetensors").exists()
    rows, weights = whole
    resumed = train.train(settings(tmp_path, OPTIONS))
    assert [row["train_loss"] for row in resumed] == [row["train_loss"] for row in rows]
    for name, x in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(x, weights[name]), name
