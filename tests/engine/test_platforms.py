"""Other systems and devices than Linux with a CPU or CUDA: simulated, as none is here."""

import errno
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import mmengine.device.utils
import pytest
import torch
from conftest import LORS_DIGITS, ROOT, data_samples, is_picture, load_config, random_lors, refused
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmdet_lors.adamixer.sampling.backends import arrange
from mmdet_lors.analysis import study
from mmdet_lors.conversion.folding import folded_state_dict
from mmdet_lors.engine import machine
from mmdet_lors.engine.amp import CPUAmpOptimWrapper
from mmdet_lors.engine.checkpoint.reading import read_checkpoint, write_checkpoint
from mmdet_lors.engine.checkpoint.whole_files import write_whole
from mmdet_lors.engine.processes.network import interface_towards
from mmdet_lors.engine.random_state import random_state, set_random_state
from mmdet_lors.engine.resume.data_order import outlive_sigterm
from mmdet_lors.errors import UserError
from mmdet_lors.pela.low_rank import best_factors

OTHER_SYSTEM = Path(__file__).with_name("other_system.py")


def settings(data: Path, workers: int = 0) -> str:
    """--cfg-options for two iterations per epoch of the tiny digits."""
    parts = [f"train_dataloader.num_workers={workers}", "train_dataloader.batch_size=2", "train_cfg.val_interval=1"]
    parts += [f"{split}_evaluator.ann_file={data}/annotations/val.json" for split in ("val", "test")]
    for split in ("train", "val", "test"):
        loader = f"{split}_dataloader"
        parts += [f"{loader}.dataset.data_root={data}", f"{loader}.persistent_workers=False"]
        if split != "train":
            parts.append(f"{loader}.num_workers=0")
    parts += ["train_dataloader.num_batch_per_epoch=2", "default_hooks.checkpoint.interval=1"]
    return "--cfg-options " + " ".join(parts)


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    """mmengine's choice of this machine comes back after a test."""
    monkeypatch.setattr(mmengine.device.utils, "DEVICE", mmengine.device.utils.DEVICE)


@pytest.fixture(scope="module")
def elsewhere(tiny_digits, tmp_path_factory) -> Path:
    """A folder where a system like Windows has trained with a worker, resumed without, tested and inferred."""
    out = tmp_path_factory.mktemp("elsewhere")
    work, image = out / "work", next((tiny_digits / "val").iterdir())
    with_worker, without = settings(tiny_digits, workers=1), settings(tiny_digits)
    lines = [
        f"train.py {LORS_DIGITS} --device cpu --work-dir {work} {with_worker} train_cfg.max_epochs=1",
        f"train.py {LORS_DIGITS} --device cpu --work-dir {work} --resume {without} train_cfg.max_epochs=2",
        f"test.py {LORS_DIGITS} {work}/epoch_2.pth --work-dir {out}/test --metrics {out}/metrics.json {without}",
        f"infer.py {image} {LORS_DIGITS} {work}/epoch_2.pth --out {out}/found",
    ]
    env = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, OTHER_SYSTEM, *lines], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {work}/epoch_1.pth" in done.stdout
    return out


def test_tools_run_where_linux_only_calls_are_missing(elsewhere):
    assert {path.name for path in (elsewhere / "work").glob("*.pth")} >= {"epoch_1.pth", "epoch_2.pth"}
    assert read_checkpoint(elsewhere / "work" / "epoch_2.pth")["meta"]["iter"] == 4
    assert "coco/bbox_mAP" in json.loads((elsewhere / "metrics.json").read_text())
    (picture,) = (elsewhere / "found").iterdir()
    assert is_picture(picture)


def test_a_run_of_windows_is_resumed_on_linux(elsewhere, tiny_digits, tmp_path, call_tool):
    checkpoint = read_checkpoint(elsewhere / "work" / "epoch_1.pth")
    checkpoint["message_hub"]["runtime_info"]["last_ckpt"] = "C:\\work\\my\\epoch_1.pth"
    write_checkpoint(checkpoint, tmp_path / "epoch_1.pth")
    options = settings(tiny_digits).split()
    options += ["train_cfg.max_epochs=2", "default_hooks.checkpoint.max_keep_ckpts=1"]
    call_tool("train.py", LORS_DIGITS, "--work-dir", tmp_path, "--resume", *options)
    assert [path.name for path in tmp_path.glob("epoch_*.pth")] == ["epoch_2.pth"]


@pytest.mark.parametrize("first", ["spawn", "forkserver"])
def test_workers_start_as_the_system_does_where_that_is_not_by_forking(first, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: [first, "fork"])
    for given in (
        {},
        dict(env_cfg=dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=1))),
    ):
        cfg = Config(given)
        machine.use_start_method(cfg)
        assert cfg.env_cfg.mp_cfg.mp_start_method == first
    assert cfg.env_cfg.mp_cfg.opencv_num_threads == 1


@pytest.mark.parametrize(("methods", "chosen"), [(["fork", "spawn"], "fork"), (["spawn", "fork"], "forkserver")])
def test_a_start_method_that_works_is_left_alone(methods, chosen, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    cfg = Config(dict(env_cfg=dict(mp_cfg=dict(mp_start_method=chosen))))
    machine.use_start_method(cfg)
    assert cfg.env_cfg.mp_cfg == dict(mp_start_method=chosen)


def test_num_batch_per_epoch_goes_to_a_spawned_worker():
    cfg = dict(dataset=list(range(8)), num_batch_per_epoch=2, batch_size=2, sampler=dict(type="DefaultSampler"))
    loader = Runner.build_dataloader(cfg)
    again = ForkingPickler.loads(ForkingPickler.dumps(loader.dataset))
    assert len(again) == 4 and again[3] == 3


def test_a_worker_keeps_sigterm_where_its_sender_is_not_told(monkeypatch):
    monkeypatch.delattr(signal, "sigwaitinfo")
    before, threads = signal.pthread_sigmask(signal.SIG_BLOCK, ()), threading.active_count()
    outlive_sigterm(0)
    assert (signal.pthread_sigmask(signal.SIG_BLOCK, ()), threading.active_count()) == (before, threads)


@pytest.mark.parametrize("missing", ["fcntl", "Linux"])
def test_no_interface_is_named_where_only_linux_knows_how(missing, monkeypatch):
    if missing == "Linux":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.delattr(socket, "if_nameindex")
    assert interface_towards("192.0.2.1") is None


def test_a_file_is_written_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    opened = os.open

    def open_no_folder(path, *rest, **settings):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *rest, **settings)

    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.delattr(os, "O_DIRECTORY")
    write_whole(tmp_path / "a", b"old")
    write_whole(tmp_path / "a", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new"}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_flushes_no_folders_is_no_failure(number, tmp_path, monkeypatch):
    flush = os.fsync

    def flush_no_folder(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_no_folder)
    if number == errno.EIO:
        with pytest.raises(UserError, match="cannot be written"):
            write_whole(tmp_path / "a", b"new")
    else:
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_the_launcher_of_several_processes_refuses_other_systems(monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SystemExit, match="error: several processes need Linux; elsewhere use a single one: "):
        runpy.run_path(str(ROOT / "tools" / "launch" / "torchrun.py"), run_name="__main__")


def test_set_up_refuses_other_systems_and_says_where_to_read_on():
    env = dict(os.environ, OSTYPE="darwin22")
    done = subprocess.run(["bash", ROOT / "tools/setup_env.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "setup: this script needs Linux; docs/compatibility.md says what to install on darwin22\n"


def test_the_machine_is_described_without_proc(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert study.machine().endswith(f", {os.cpu_count()} cores")


# --- devices ---


def give(monkeypatch, **counts: int) -> None:
    """Have torch say that this machine has so many devices of these types."""
    for kind in ("cuda", "mps", "xpu"):
        module, count = getattr(torch, kind), counts.get(kind, 0)
        monkeypatch.setattr(module, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(module, "device_count", lambda count=count: count)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mps", "device mps: this machine has no mps device that PyTorch can use: choose cpu"),
        ("xpu:1", "device xpu:1: this machine has no xpu device that PyTorch can use: choose cpu"),
        ("cuda", "device cuda: this machine has no GPU that PyTorch can use: choose cpu"),
        ("meta", "device meta: this machine has no meta device that PyTorch can use: choose cpu"),
        ("hpu", "device hpu: this machine has no hpu device that PyTorch can use: choose cpu"),
        ("cpu:1", "device cpu:1: this machine has 1 of this type: choose cpu"),
        ("cuda:", "device 'cuda:' is not known: on this machine choose cpu"),
        ("gpu", "device 'gpu' is not known: on this machine choose cpu"),
        ("", "device '' is not known: on this machine choose cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, message, monkeypatch):
    give(monkeypatch)
    with pytest.raises(UserError) as refusal:
        machine.use_device(name)
    assert str(refusal.value) == message


def test_a_device_is_taken_where_torch_has_it(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    give(monkeypatch, mps=1)
    for name in ("mps", "mps:0", "cpu"):
        machine.use_device(name)
        assert get_device() == name.split(":")[0]
    with pytest.raises(
        UserError, match="device gpu.* choose cpu or mps|device 'gpu' is not known: .* choose cpu or mps"
    ):
        machine.usable("gpu")
    give(monkeypatch, xpu=2)
    machine.use_device("xpu:1")
    assert get_device() == "xpu" and chosen == [1]
    with pytest.raises(UserError, match="device xpu:2: this machine has 2 of this type: choose xpu:0 to xpu:1"):
        machine.use_device("xpu:2")
    machine.use_device(None)
    assert get_device() == machine.AUTOMATIC


@pytest.mark.parametrize("name", ["cuda:0", "mps", "xpu"])
def test_several_processes_take_a_gpu_each_or_the_cpu(name, monkeypatch):
    give(monkeypatch, cuda=2, mps=1, xpu=1)
    with pytest.raises(
        UserError, match=f"--device {name} is for one process: several use cpu, or cuda with one GPU each"
    ):
        machine.use_device(name, "pytorch")
    machine.use_device("cuda", "pytorch")
    assert get_device() == "cuda"


@pytest.mark.parametrize("tool", ["train.py", "test.py"])
@pytest.mark.parametrize("device", ["mps", "xpu", "cuda:7", "gpu"])
def test_tools_refuse_a_device_in_one_line(tool, device, work, monkeypatch, capsys):
    give(monkeypatch)
    arguments = [LORS_DIGITS, *(["none.pth"] if tool == "test.py" else []), *work, "--device", device]
    assert (
        "on this machine" in (message := refused(tool, arguments, monkeypatch, capsys)) or "this machine has" in message
    )


def test_the_cpu_trains_where_mmengine_would_take_another_device(tiny_digits, tmp_path, call_tool, monkeypatch):
    monkeypatch.setattr(mmengine.device.utils, "DEVICE", "mps")
    options = [*settings(tiny_digits).split(), "train_cfg.max_epochs=1", "val_evaluator=None", "val_cfg=None"]
    options += ["val_dataloader=None", "default_hooks.checkpoint.save_best=None"]
    call_tool("train.py", LORS_DIGITS, "--device", "cpu", "--amp", "--work-dir", tmp_path, *options)
    assert (tmp_path / "epoch_1.pth").is_file()


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_float16_needs_cuda(device, work, monkeypatch, capsys):
    give(monkeypatch, mps=1)
    arguments = [LORS_DIGITS, *work, "--device", device, "--amp", "float16"]
    message = refused("train.py", arguments, monkeypatch, capsys)
    assert message == f"error: --amp float16 needs a CUDA GPU; device {device} trains with --amp bfloat16"


def test_mixed_precision_is_of_the_device_that_computes(monkeypatch):
    asked = []
    monkeypatch.setattr(mmengine.device.utils, "DEVICE", "xpu")
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, dtype: asked.append((kind, dtype)) or autocast("cpu", dtype=dtype)
    )
    layer = nn.Linear(2, 2)
    wrapper = CPUAmpOptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1))
    with wrapper.optim_context(layer):
        assert layer(torch.ones(1, 2)).dtype is torch.bfloat16
    assert asked == [("xpu", torch.bfloat16)]


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
def test_random_numbers_of_any_accelerator_go_on(kind, monkeypatch):
    state = [torch.tensor([1, 2], dtype=torch.uint8)]
    fake = SimpleNamespace(get_rng_state=lambda: state[0], set_rng_state=lambda new: state.__setitem__(0, new))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    saved = random_state()
    assert saved[kind].tolist() == [1, 2]
    state[0] = torch.tensor([3, 4], dtype=torch.uint8)
    set_random_state(saved)
    assert state[0].tolist() == [1, 2]
    # A checkpoint of a machine with another accelerator leaves this one alone.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("hpu"))
    state[0] = torch.tensor([5, 6], dtype=torch.uint8)
    set_random_state(saved)
    assert state[0].tolist() == [5, 6]


class _NoFloat64(TorchDispatchMode):
    """mps, whose tensors are refused in float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        wide = [
            t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.dtype in (torch.float64, torch.complex128)
        ]
        assert not wide, f"{func} computes in {wide[0].dtype}"
        return out


def test_a_detector_trains_and_predicts_without_float64():
    model = random_lors(load_config(LORS_DIGITS).model)
    data = dict(
        inputs=[torch.randint(255, (3, 64, 64), dtype=torch.uint8) for _ in range(2)],
        data_samples=data_samples([2, 0], (64, 64), 10),
    )
    with _NoFloat64():
        losses = model(**model.data_preprocessor(data, True), mode="loss")
        model.parse_losses(losses)[0].backward()
        model(**model.data_preprocessor(data, False), mode="predict")


def test_the_detector_trains_on_mps_with_an_operator_that_has_a_backward_pass_there():
    with FakeTensorMode():
        feats = [torch.empty(2, 4, 8, 8, device="mps")]
        assert arrange(feats, [4], groups=2).backend == "embedding_bag"
        with torch.no_grad():
            assert arrange(feats, [4], groups=2).backend == "grid_sample"


class _Mps(TorchFunctionMode):
    """Refuses float64 as long as nothing was brought to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            self.on_cpu = True
        wide = func is torch.Tensor.double or torch.float64 in (args[1:] if func is torch.Tensor.to else ())
        if wide and not self.on_cpu:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return func(*args, **(kwargs or {}))


def test_factors_are_found_where_the_device_has_no_float64():
    weight = torch.randn(6, 4)
    expected = best_factors(weight, 2)
    with _Mps() as mps:
        found = best_factors(weight, 2)
    assert mps.on_cpu and all(map(torch.equal, found, expected))


def test_lors_folds_where_the_device_has_no_float64():
    model = random_lors(load_config(LORS_DIGITS).model)
    expected = folded_state_dict(model)
    with _Mps() as mps:
        found = folded_state_dict(model)
    assert mps.on_cpu and all(torch.equal(found[key], expected[key]) for key in expected)
