"""SIGTERM: the iteration is finished, a checkpoint written, exit status 0, and the run goes on as if uninterrupted."""

import signal
from pathlib import Path

import pytest
from conftest import load_tool
from runs import FAULT, Run, checkpoint, same_training, write_config

from mmdet_lors.engine.processes.stop import Stopped, stop_at_once

WORKERS = """
train_dataloader.update(num_workers=2, persistent_workers=True)
val_dataloader.update(num_workers=2, persistent_workers=True)
"""


@pytest.fixture(scope="module")
def whole(tiny_digits, tmp_path_factory) -> dict[int, Path]:
    """Work folders of uninterrupted runs of a classifier, by number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config("classification", folder, tiny_digits)
    runs = {n: Run(config, folder / str(n), processes=n) for n in (1, 2)}
    return {n: run.done().work for n, run in runs.items()}


def stop(folder: Path, data: Path, processes: int = 1, settings: str = "", **fault) -> tuple[Run, list[str], Run]:
    """A run that got SIGTERM, the checkpoints that it left, and the run that went on with it to the end."""
    config = write_config("classification", folder, data, settings)
    fault = FAULT.format(dict(fault, signal_name="SIGTERM"))
    faulty = write_config("classification", folder, data, settings + fault, name="faulty")
    first = Run(faulty, folder / "work", processes=processes).done()
    left = sorted(path.name for path in first.work.glob("*.pth"))
    return first, left, Run(config, folder / "work", "--resume", processes=processes).done()


@pytest.mark.parametrize("processes", [1, 2])
def test_in_the_middle_of_an_epoch(processes, whole, tiny_digits, tmp_path):
    # Of two processes, the second one gets it.
    first, left, second = stop(
        tmp_path, tiny_digits, processes, when="before_train_iter", iteration=4, rank=processes - 1
    )
    assert "stopped.pth" in left and "iter_6.pth" not in left
    assert [run.output().count("stopped by SIGTERM") for run in (first, second)] == [1, 0]
    command = [f"python tools/train.py {tmp_path}/faulty.py", f"bash tools/dist_train.sh {tmp_path}/faulty.py 2"]
    assert (
        f"stopped by SIGTERM, saved {tmp_path / 'work' / 'stopped.pth'}; resume with: {command[processes - 1]} "
        f"--work-dir {tmp_path}/work --resume"
    ) in first.output().splitlines()
    assert f"resuming from {tmp_path / 'work' / 'stopped.pth'}" in second.output()
    assert same_training(whole[processes] / "iter_6.pth", second.work / "iter_6.pth") == []
    assert not (tmp_path / "work/stopped.pth").exists()


def test_of_a_whole_job_with_data_workers(whole, tiny_digits, tmp_path):
    fault = dict(when="before_train_iter", iteration=4, session=True)
    first, left, second = stop(tmp_path, tiny_digits, settings=WORKERS, **fault)
    assert "stopped.pth" in left and checkpoint(whole[1] / "iter_4.pth")["exact_resume"]["iter"] == 4
    # The same bits as with data loaded in the training process.
    assert same_training(whole[1] / "iter_6.pth", second.work / "iter_6.pth") == []


@pytest.mark.parametrize("interval", [1, 10])
def test_during_a_validation(interval, tiny_digits, tmp_path):
    settings = f'default_hooks["checkpoint"].update(by_epoch=True, interval={interval})\n'
    whole = Run(write_config("classification", tmp_path, tiny_digits, settings), tmp_path / "whole")
    first, left, second = stop(tmp_path, tiny_digits, settings=settings, when="before_val_iter", iteration=3)
    # Where the epoch's checkpoint is there, the validation is given up and made up for; else it is finished first.
    given_up = interval == 1
    assert left == (["epoch_1.pth"] if given_up else ["best_accuracy_top1_epoch_1.pth", "stopped.pth"])
    assert ("Epoch(val) [1]" in first.output()) != given_up
    assert ("before training goes on" in second.output()) == given_up
    assert same_training(whole.done().work / "epoch_2.pth", second.work / "epoch_2.pth") == []
    bests = [checkpoint(run.work / "epoch_2.pth")["message_hub"]["runtime_info"] for run in (whole, second)]
    assert bests[0]["best_score"] == bests[1]["best_score"]
    assert [Path(best["best_ckpt"]).name for best in bests] == [p.name for p in second.work.glob("best*")] * 2


def test_a_process_that_is_restarted_after_sigterm_ends(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv(load_tool("launch/torchrun.py").TOLD_TO_STOP, "1")
    try:
        with pytest.raises(Stopped) as stopped:
            stop_at_once()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == 0 and stopped.value.checkpoint is None


def test_before_training_begins(tiny_digits, tmp_path):
    fault = FAULT.format(dict(when="before_run", iteration=0, signal_name="SIGTERM"))
    run = Run(write_config("classification", tmp_path, tiny_digits, fault), tmp_path / "work").done()
    assert "stopped by SIGTERM, training had not begun; resume with: python tools/train.py" in run.output()
