"""A run that is interrupted and resumed ends with the bits of one that was not."""

import shutil
from pathlib import Path

import pytest
from runs import KINDS, Run, checkpoint, same_training, write_config


@pytest.fixture(scope="module", params=[1, 2], ids=["1-process", "2-processes"])
def processes(request) -> int:
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request, processes, tiny_digits, tmp_path_factory) -> tuple[Path, Path]:
    """The config, and the work folder of 6 iterations without interruption."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(request.param, folder, tiny_digits)
    return config, Run(config, folder / "whole", processes=processes).done().work


def test_k_and_k_iterations_equal_2k(uninterrupted, processes, tmp_path):
    config, whole = uninterrupted
    # What SIGKILL at iteration 5, the second of the second epoch, leaves.
    work = tmp_path / "resumed"
    work.mkdir()
    shutil.copy(whole / "iter_4.pth", work)
    resumed = Run(config, work, "--resume", processes=processes).done()
    assert f"resuming from {work}/iter_4.pth" in resumed.output()
    assert same_training(whole / "iter_6.pth", work / "iter_6.pth") == []
    state = checkpoint(work / "iter_6.pth")["exact_resume"]
    assert state["iter"] == 6 and len(state["processes"]) == processes
    averaged = checkpoint(work / "iter_6.pth").get("ema_state_dict", {})
    assert bool(averaged) == (config.stem == "pela-as-released") and averaged.get("steps", 6) == 6
    if config.stem == "plain" and processes == 2:  # ResNet: BatchNorm has seen other images in the second process.
        assert any(name.endswith("running_mean") for name in state["processes"][1]["buffers"])


ITERATIONS = """
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=6, val_interval=2)
train_dataloader["sampler"] = dict(type="{}", shuffle=True)
default_hooks["checkpoint"].update(save_best=None)
"""


@pytest.mark.parametrize("sampler", ["InfiniteSampler", "DefaultSampler"])
def test_a_run_by_iterations(sampler, tiny_digits, tmp_path):
    config = write_config("classification", tmp_path, tiny_digits, ITERATIONS.format(sampler))
    whole = Run(config, tmp_path / "whole").done().work
    (tmp_path / "resumed").mkdir()
    shutil.copy(whole / "iter_4.pth", tmp_path / "resumed")
    resumed = Run(config, tmp_path / "resumed", "--resume").done()
    assert "before training goes on" in resumed.output()
    assert same_training(whole / "iter_6.pth", resumed.work / "iter_6.pth") == []


def test_with_other_processes_it_goes_on_with_the_same_sample(tiny_digits, tmp_path):
    config = write_config("classification", tmp_path, tiny_digits, "default_hooks['logger'] = dict(interval=1)\n")
    whole = Run(config, tmp_path / "work", processes=2).done().work
    (whole / "iter_6.pth").unlink()
    resumed = Run(config, whole, "--resume").done()
    assert "The checkpoint is of 2 processes x 2 samples, this run of 1 x 2" in resumed.output()
    # Of the second epoch, one batch of 2 x 2 samples was done: two of 2 samples.
    assert "[2][3/3] loss" in resumed.output() and "[2][2/3]" not in resumed.output()
