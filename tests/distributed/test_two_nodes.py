"""A launch over two nodes: two network namespaces of this machine, each with an address of its own, over gloo."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import LORS_DIGITS, ROOT, free_port

from mmdet_lors.engine.processes.network import interface_towards

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SECONDS = 240
"""Until a launch that hangs is killed."""

KEEP_WEIGHTS = """
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
import torch

@HOOKS.register_module()
class KeepWeights(Hook):
    def after_train(self, runner):
        torch.save(runner.model.module.state_dict(), f"{runner.work_dir}/rank{get_rank()}.pth")
"""


def ip(*command: str) -> None:
    done = subprocess.run(["ip", *command], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Names of two network namespaces that are joined by a cable."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    if shutil.which("ip") is None:
        pytest.skip("making network namespaces needs ip: apt-get install iproute2")
    names = [f"lors-{os.getpid()}-{node}" for node in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "cable1", "netns", names[1])
            for i, name in enumerate(names):
                ip("-n", name, "address", "add", f"{ADDRESSES[i]}/24", "dev", f"cable{i}")
                for device in (f"cable{i}", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                ip("netns", "delete", name)


def config(folder: Path, data: Path) -> Path:
    """A run of two iterations, the second of them smaller, that keeps every process's weights."""
    (folder / "keep_weights.py").write_text(KEEP_WEIGHTS)
    split = f"dict(num_workers=0, persistent_workers=False, dataset=dict(data_root={str(data)!r}))"
    train = split.replace("num_workers", "batch_size=3, num_workers", 1).replace(
        "dataset=dict(", "dataset=dict(indices=10, "
    )
    path = folder / "config.py"
    path.write_text(
        f"_base_ = {str(ROOT / LORS_DIGITS)!r}\n"
        "custom_imports = dict(imports=['mmdet_lors', 'keep_weights'], allow_failed_imports=False)\n"
        f"train_dataloader = {train}\nval_dataloader = {split}\ntest_dataloader = {split}\n"
        f"val_evaluator = dict(ann_file={str(data / 'annotations/val.json')!r})\n"
        "train_cfg = dict(max_epochs=1)\ncustom_hooks = [dict(type='KeepWeights')]\n"
    )
    return path


@contextlib.contextmanager
def launched(folder: Path, name: str, processes: int, *prefix: str, **settings: str) -> Iterator[subprocess.Popen]:
    """tools/dist_train.sh as it is started on one node; killed with all its processes in the end."""
    env = dict(os.environ, PYTHON=sys.executable, PYTHONPATH=str(folder), CUDA_VISIBLE_DEVICES="", **settings)
    env.pop("GLOO_SOCKET_IFNAME", None)
    command = ["bash", "tools/dist_train.sh", str(folder / "config.py"), str(processes)]
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*prefix, *command, "--work-dir", str(folder / name)],
            cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            # torchrun starts its processes in sessions of their own.
            for child in descendants(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process.wait()


def descendants(process: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    found = [process]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def weights(folder: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / name / f"rank{rank}.pth")


def test_two_nodes_train_what_one_node_of_two_processes_trains(nodes, tiny_digits, tmp_path):
    """Bit for bit, on both nodes, without any setting but those of tools/launch/dist.sh."""
    config(tmp_path, tiny_digits)
    common = dict(NNODES="2", MASTER_ADDR=ADDRESSES[0], PORT="29500")
    with (
        launched(tmp_path, "one", 2, PORT=str(free_port())) as one,
        launched(tmp_path, "node0", 1, "ip", "netns", "exec", nodes[0], NODE_RANK="0", **common) as first,
        launched(tmp_path, "node1", 1, "ip", "netns", "exec", nodes[1], NODE_RANK="1", **common) as second,
    ):
        for name, process in (("node0", first), ("node1", second), ("one", one)):
            assert process.wait(SECONDS) == 0, (tmp_path / f"{name}.log").read_text()[-2000:]
    expected = weights(tmp_path, "one", 0)
    buffers = {k for k in expected if "running_" in k or "num_batches" in k}
    for theirs in (weights(tmp_path, "one", 1), weights(tmp_path, "node0", 0), weights(tmp_path, "node1", 1)):
        # Batch norm's running statistics are each process's own.
        assert all(torch.equal(expected[key], theirs[key]) for key in expected.keys() - buffers)
    for rank, node in enumerate(("node0", "node1")):
        mine = weights(tmp_path, "one", rank)
        assert all(torch.equal(mine[key], value) for key, value in weights(tmp_path, node, rank).items())
    assert (tmp_path / "node0" / "epoch_1.pth").is_file() and not (tmp_path / "node1" / "epoch_1.pth").exists()


def test_the_interface_that_leads_to_an_address(nodes):
    """gloo would listen on the loopback device where the host's name leads there."""
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("no such host") is None
    code = "import sys; from network import interface_towards; print(interface_towards(sys.argv[1]))"
    for node, name in enumerate(nodes):
        for address in ADDRESSES:
            command = ["ip", "netns", "exec", name, sys.executable, "-c", code, address]
            done = subprocess.run(command, cwd=ROOT / "mmdet_lors/engine/processes", capture_output=True, text=True)
            assert done.stdout.strip() == f"cable{node}", done.stderr
