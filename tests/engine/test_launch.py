"""What all tools do before they begin."""

import os
import signal
import subprocess
import sys
import time

import mmengine.config.utils
import mmengine.device.utils
import pytest
import torch
from conftest import LORS_DIGITS, ROOT, free_port
from mmengine.config import Config
from mmengine.config import config as mmengine_config

from mmdet_lors.engine import launch

WAITING = f"""
from mmdet_lors.engine import launch
from mmdet_lors.engine.processes.stop import stop_at_once

stop_at_once()
launch.let_gloo_find_its_interface = lambda: print("waiting", flush=True)
launch.load_config("{LORS_DIGITS}", launcher="pytorch")
"""

ENDING = """
import pathlib
import torch
from mmdet_lors.engine.launch import run

def main():
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    model.runner = [model]
    print(threads(), flush=True)
    for _ in range(8):  # which gloo's threads have still to do, and to free
        torch.distributed.all_reduce(torch.ones(1 << 23), async_op=True)

def threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)

run(main)
print(threads())
"""


def test_sigterm_ends_a_process_that_waits_for_others():
    env = dict(os.environ, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    command = [sys.executable, "-W", "ignore", "-c", WAITING]
    with subprocess.Popen(command, cwd=ROOT, env=dict(env, CUDA_VISIBLE_DEVICES=""), stdout=subprocess.PIPE) as waits:
        assert waits.stdout.readline() == b"waiting\n"
        time.sleep(1)
        waits.terminate()
        try:
            assert waits.wait(10) == -signal.SIGTERM
        finally:
            waits.kill()


def test_gloos_threads_end_before_the_process_does():
    """A thread that frees a tensor meanwhile aborts it, or waits for it, as it waits for the thread."""
    env = dict(os.environ, RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    command = [sys.executable, "-W", "ignore", "-c", ENDING]
    ended = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True, text=True, timeout=60)
    before, after = map(int, ended.stdout.split())
    assert before > 0 and after == 0


def test_configs_of_other_packages_are_found_without_their_metafiles(monkeypatch, root):
    """And where mmengine finds them: mmdet has 174 of them."""
    name = "mmdet::_base_/datasets/coco_detection.py"
    directly, _ = Config._get_cfg_path(name, "")
    monkeypatch.setattr(mmengine_config, "_get_external_cfg_path", mmengine.config.utils._get_external_cfg_path)
    assert Config._get_cfg_path(name, "")[0] == directly
    monkeypatch.undo()
    monkeypatch.setattr(mmengine.config.utils, "load", None)
    assert Config.fromfile(root / "configs/_base_/datasets/coco.py").dataset_type == "CocoDataset"
    with pytest.raises(FileNotFoundError, match="nothing.py"):
        Config._get_cfg_path("mmdet::_base_/nothing.py", "")


@pytest.mark.parametrize(("device", "pinned"), [("cuda", [True, False]), ("cpu", [None, False])])
def test_images_are_pinned_where_they_go_to_a_gpu(device, pinned, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(mmengine.device.utils, "DEVICE", device)
    cfg = launch.load_config(ROOT / LORS_DIGITS, {"val_dataloader.pin_memory": False})
    assert [cfg.train_dataloader.get("pin_memory"), cfg.val_dataloader.pin_memory] == pinned
