"""Through dist_train.sh: a killed process ends all, a restart goes on by itself, SIGTERM to the launcher stops all."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, load_tool
from runs import FAULT, MODULES, QUIET, Run, free_port, same_training, write_config

SETTINGS = """
train_cfg.update(max_epochs=40, val_interval=40)
default_hooks["checkpoint"].update(by_epoch=True, interval=10)
custom_imports = dict(imports=["mmdet_lors", "mmdet_lors.classification", "runs"])
"""


def test_when_one_process_is_killed_the_others_end_with_one_line(tiny_digits, tmp_path):
    fault = FAULT.format(dict(when="before_train_iter", iteration=4, signal_name="SIGKILL", rank=1))
    run = Run(write_config("classification", tmp_path, tiny_digits, fault), tmp_path / "work", processes=2)
    run.processes[1].join(120)
    killed = time.monotonic()
    assert run.wait(60) == [1, -signal.SIGKILL]
    print(f"the other process ended after {time.monotonic() - killed:.1f} s")
    last = run.output().splitlines()[-1]
    assert last.startswith("error: process 0 lost the connection to another process, which ended or was killed: ")
    assert last.endswith("; --resume resumes from the newest checkpoint")


@pytest.mark.parametrize(
    ("exit_code", "text"),
    [
        (1, "ended with exit status 1; its message is above"),
        (-9, "was killed by SIGKILL (out of memory, or by a user); go on with --resume"),
        (-11, "was killed by SIGSEGV; go on with --resume"),
    ],
)
def test_the_launcher_says_how_a_process_ended(exit_code, text):
    assert load_tool("launch/torchrun.py").ending(exit_code) == text


def test_restart_and_sigterm(tiny_digits, tmp_path):
    kill = dict(when="before_train_iter", iteration=40, signal_name="SIGKILL", rank=1, restart=0)
    # Of the launcher alone, as of a container's first process.
    stop = dict(when="before_train_iter", iteration=60, signal_name="SIGTERM", parent=True)
    faults = FAULT.format(kill) + f'custom_hooks.append(dict(type="FaultHook", **{stop}))\n'
    config = write_config("classification", tmp_path, tiny_digits, SETTINGS + faults, name="faulty")
    environment = dict(os.environ, **QUIET, PYTHON=sys.executable, PORT=str(free_port()), MAX_RESTARTS="1")
    job = subprocess.run(
        ["bash", "tools/dist_train.sh", config, "2", "--work-dir", tmp_path / "work"],
        env=dict(environment, PYTHONPATH=MODULES, LATE_AFTER_RESTART="1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stderr[-3000:]
    assert "error: process 0 lost the connection to another process" in job.stderr
    assert job.stdout.count(f"resuming from {tmp_path / 'work' / 'epoch_10.pth'}") == 1
    assert (
        f"stopped by SIGTERM, saved {tmp_path / 'work' / 'stopped.pth'}; resume with: bash tools/dist_train.sh"
        in job.stdout
    )
    config = write_config("classification", tmp_path, tiny_digits, SETTINGS)
    whole, rest = Run(config, tmp_path / "whole", processes=2), Run(config, tmp_path / "work", "--resume", processes=2)
    assert f"resuming from {tmp_path / 'work' / 'stopped.pth'}" in rest.done().output()
    assert same_training(whole.done().work / "epoch_40.pth", rest.work / "epoch_40.pth") == []
