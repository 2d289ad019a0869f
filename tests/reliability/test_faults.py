"""What is left after SIGKILL, damage to files and a full disk, and that a run goes on from it."""

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from runs import FAULT, Run, same_training, write_config

from mmdet_lors.engine.checkpoint.reading import read_checkpoint

EPOCHS = 160
KILLS = 20
MANY_CHECKPOINTS = f"""
train_cfg.update(max_epochs={EPOCHS}, val_interval=10)
default_hooks["checkpoint"].update(by_epoch=True, interval=1, max_keep_ckpts=2)
log_level = "WARNING"
"""


def test_sigkill_at_20_random_moments_loses_nothing(tiny_digits, tmp_path):
    config = write_config("classification", tmp_path, tiny_digits, MANY_CHECKPOINTS)
    whole = Run(config, tmp_path / "whole").done().work
    work, dice, while_writing, reached = tmp_path / "work", random.Random(0), 0, 0
    for kill in range(KILLS):
        before = set(work.glob("epoch_*.pth"))
        writing = kill % 4 == 3
        run = Run(config, work, "--resume", die_writing=dice.randrange(1, 5) if writing else None)
        if writing:
            assert run.wait() == [-signal.SIGKILL], run.output()[-2000:]
        else:
            if kill % 4:  # else at any moment, mostly before training begins
                run.wait_for(lambda before=before: set(work.glob("epoch_*.pth")) - before)
            # However fast the machine is, the run is not to end before the last kill.
            far = work / f"epoch_{reached + 5}.pth"
            run.wait_for(far.exists, timeout=dice.uniform(0, 0.3 if kill % 4 else 1.0))
            assert run.processes[0].exitcode is None, run.output()[-2000:]
            run.kill()
        while_writing += any(work.glob(".*.tmp"))
        files = {path.name: read_checkpoint(path) for path in work.glob("*.pth")}
        epochs = [content["meta"]["epoch"] for name, content in files.items() if name.startswith("epoch_")]
        assert max(epochs, default=0) >= reached
        reached = max(epochs, default=0)
    print(f"{KILLS} kills, {while_writing} of them while a checkpoint was being written, until epoch {reached}")
    assert while_writing >= KILLS // 4 and reached > KILLS / 2
    Run(config, work, "--resume").done()
    assert same_training(whole / f"epoch_{EPOCHS}.pth", work / f"epoch_{EPOCHS}.pth") == []
    assert sorted(p.name for p in whole.glob("*.pth")) == sorted(p.name for p in work.glob("*.pth"))
    assert not list(work.glob(".*.tmp"))


@pytest.fixture(scope="module")
def whole(tiny_digits, tmp_path_factory) -> tuple[Path, Path]:
    """A config, and the work folder of its run: iter_4.pth, iter_6.pth and the best."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config("classification", folder, tiny_digits)
    return config, Run(config, folder / "work").done().work


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "reason"), [(cut, "is cut short, damaged or not a checkpoint"), (flip, "does not match its checksum")]
)
def test_a_damaged_newest_checkpoint_is_skipped(spoil, reason, whole, tmp_path):
    config, before = whole
    work = tmp_path / "work"
    shutil.copytree(before, work)
    spoil(work / "iter_6.pth")
    run = Run(config, work, "--resume").done()
    (line,) = [line for line in run.output().splitlines() if line.startswith("skipped: ")]
    assert f"checkpoint {work}/iter_6.pth (" in line and reason in line
    assert f"resuming from {work}/iter_4.pth" in run.output()
    assert same_training(before / "iter_6.pth", work / "iter_6.pth") == []
    # Given by name, it is refused.
    spoil(work / "iter_6.pth")
    run = Run(config, work, "--resume", str(work / "iter_6.pth"))
    assert run.wait() == [1]
    assert run.output().splitlines()[-1].startswith(f"error: checkpoint {work}/iter_6.pth ")


def test_without_a_whole_checkpoint_nothing_is_trained_anew(whole, tmp_path):
    config, before = whole
    shutil.copytree(before, tmp_path / "work")
    for path in (tmp_path / "work").glob("iter_*.pth"):
        cut(path)
    run = Run(config, tmp_path / "work", "--resume")
    assert run.wait() == [1]
    assert f"error: --resume finds no checkpoint that is whole in {tmp_path}/work: all 2 are" in run.output()
    assert run.output().count("skipped: checkpoint ") == 2


def check_that_iter_4_is_intact(config: Path, work: Path, before: Path, reason: str) -> None:
    """A run from iteration 4 fails with one line when it saves, and goes on once it can."""
    run = Run(config, work, "--resume")
    assert run.wait() == [1]
    last = run.output().splitlines()[-1]
    assert last.startswith(f"error: {work}/iter_6.pth cannot be written: {reason} (")
    assert last.endswith("the previous file is unchanged")
    assert "Traceback" not in run.output()
    assert [path.name for path in work.iterdir() if ".pth" in path.name] == ["iter_4.pth"]
    assert (work / "iter_4.pth").read_bytes() == (before / "iter_4.pth").read_bytes()


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of its own, of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk(whole, small_disk):
    config, before = whole
    work = small_disk / "work"
    work.mkdir()
    shutil.copy(before / "iter_4.pth", work)
    size = (work / "iter_4.pth").stat().st_size
    # What is left is enough for logs, but not for another checkpoint.
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - size // 2 // 4096 * 4096))
    check_that_iter_4_is_intact(config, work, before, "No space left on device")


def test_a_write_that_fails(whole, tmp_path):
    config, before = whole
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(before / "iter_4.pth", work)
    size = (work / "iter_4.pth").stat().st_size
    fault = FAULT.format(dict(when="before_train", iteration=4, largest_file=size // 2))
    faulty = config.with_name("large_files_fail.py")
    faulty.write_text(config.read_text() + fault)
    check_that_iter_4_is_intact(faulty, work, before, "File too large")
