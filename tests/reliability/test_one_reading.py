"""A checkpoint is opened, unpickled and held in memory once in each process that resumes from it."""

import gc
import hashlib
import os
import shutil
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from runs import Run, checkpoint, same_training, write_config
from torch.optim.optimizer import register_optimizer_step_pre_hook

load, weights = torch.load, []


def watch() -> None:
    """Let the process say what it opens for reading, what it unpickles, and what is left of that when it trains."""
    sys.addaudithook(
        lambda event, values: (
            print(f"opens {values[0]}", flush=True)
            if event == "open" and str(values[0]).endswith(".pth") and values[1] == "r"
            else None
        )
    )

    def watched_load(file, *args, **settings):
        content = load(file, *args, **settings)
        if hasattr(file, "name"):  # not what processes send each other
            print(f"unpickles {file.name}", flush=True)
            weights.extend(map(weakref.ref, content["state_dict"].values()))
        return content

    def count(*_) -> None:
        gc.collect()
        print(f"{sum(weight() is not None for weight in weights)} of {len(weights)} tensors are left", flush=True)

    torch.load = watched_load
    register_optimizer_step_pre_hook(count)


@pytest.fixture(scope="module")
def whole(tiny_digits, tmp_path_factory) -> tuple[Path, dict[int, Path]]:
    """A config, and the work folders of its runs in one process and in two: iter_4.pth, iter_6.pth."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config("classification", folder, tiny_digits)
    return config, {n: Run(config, folder / f"work{n}", processes=n).done().work for n in (1, 2)}


@pytest.mark.parametrize(("given", "processes"), [("newest", 1), ("newest", 2), ("by name", 1), ("load_from", 1)])
def test_a_checkpoint_is_read_once(given, processes, whole, tmp_path):
    config, before = whole
    work = tmp_path / "work"
    work.mkdir()
    path = work / "iter_4.pth"
    shutil.copy(before[processes] / "iter_4.pth", path)
    arguments = {
        "newest": ["--resume"],
        "by name": ["--resume", str(path)],
        "load_from": ["--cfg-options", f"load_from={path}", "default_hooks.checkpoint.interval=6"],
    }
    run = Run(config, work, *arguments[given], processes=processes, prepare=watch).done()
    for rank in range(processes):
        lines = run.output(rank).splitlines()
        # The first process also looks when each was written.
        assert lines.count(f"opens {path}") == 1 + (given == "newest" and rank == 0), lines
        assert lines.count(f"unpickles {path}") == sum(line.startswith("unpickles ") for line in lines) == 1
        left = [line for line in lines if line.endswith(" tensors are left")]
        assert left and all(line.startswith("0 of ") and line != "0 of 0 tensors are left" for line in left)
    if given != "load_from":
        assert same_training(before[processes] / "iter_6.pth", work / "iter_6.pth") == []


def test_a_damaged_one_is_not_unpickled(whole, tmp_path):
    config, before = whole
    work = tmp_path / "work"
    shutil.copytree(before[1], work)
    os.truncate(work / "iter_6.pth", 5000)
    lines = Run(config, work, "--resume", prepare=watch).done().output().splitlines()
    assert [line for line in lines if line.startswith("unpickles")] == [f"unpickles {work}/iter_4.pth"]


def test_a_run_of_the_version_before_is_resumed(whole, tmp_path):
    """It sealed its checkpoints with a SHA-256 in the archive's comment."""
    config, before = whole
    work = tmp_path / "work"
    work.mkdir()
    for number, name in enumerate(("iter_6.pth", "iter_4.pth")):  # The time decides, not the name.
        torch.save(checkpoint(before[1] / name), work / name)
        seal = f"mmdet_lors saved={time.time() + number:.6f} sha256=".encode()
        body = (work / name).read_bytes()[:-2] + (len(seal) + 64).to_bytes(2, "little") + seal
        (work / name).write_bytes(body + hashlib.sha256(body).hexdigest().encode())
        os.utime(work / name, (0, 0))
    run = Run(config, work, "--resume").done()
    assert f"resuming from {work}/iter_4.pth" in run.output()
    assert same_training(before[1] / "iter_6.pth", work / "iter_6.pth") == []
