"""Runs of the tools as processes of their own, forked from one that has imported everything, and their faults."""

import multiprocessing
import os
import resource
import signal
import stat
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, free_port, load_tool
from mmdet.registry import HOOKS, MODELS
from mmengine.config import config as mmengine_config
from mmengine.hooks import Hook

import mmdet_lors.classification  # noqa: F401
from mmdet_lors.engine.launch import run as run_tool
from mmdet_lors.engine.processes.restarts import restarts

FORKS = multiprocessing.get_context("forkserver")
# The others would take its predecessor's address for its own.
if os.environ.get("LATE_AFTER_RESTART") == os.environ.get("RANK", "none") and restarts():
    time.sleep(3)

QUIET = dict(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
# Large models: glibc would give every block back to the system, and get it again page by page.
QUIET |= dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(1 << 36))
MODULES = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "tests/configs", ROOT)))

SMALL = """
_base_ = {bases!r}
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, num_batch_per_epoch=3, drop_last=True
)
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, num_batch_per_epoch=2)
train_cfg = dict(max_epochs=2, val_interval=1)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=4, max_keep_ckpts=-1))
"""
DETECTOR = """
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader["dataset"] = dict(data_root={data!r}, pipeline=pipeline)
val_dataloader["dataset"] = dict(data_root={data!r})
val_evaluator = dict(ann_file={data!r} + "/annotations/val.json")
"""
CLASSIFIER = """
model = dict(network=dict(embed_dim=12, depth=2, drop_path_rate=0.5))
"""
LORS_CLASSIFIER = """
model = dict(
    model=dict(network=dict(embed_dim=12, depth=2, drop_path_rate=0.5)),
    stacks=[dict(layers="network.blocks", targets=["mlp.*"], rank=2, groups=[1, 1])],
)
"""
PELA = """
model = dict(backbone=dict(backbone=dict(drop_path_rate=0.5)))
"""
DISTILLER = """
network = dict(embed_dim=12, depth=2, drop_path_rate=0.5)
model = dict(teacher=dict(network=network), teacher_checkpoint={teacher!r})
"""
RELEASED = (
    DISTILLER
    + """
model.update(perturbation_loss=None)
model["teacher"]["random_erasing"] = dict(probability=0.25, mode="pixel")
train_dataloader["sampler"] = dict(type="RepeatedAugmentation")
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))
default_hooks["average"] = dict(type="EMAHook", momentum=0.1)
"""
)
LORA = """
model = dict(checkpoint={teacher!r})
"""
KINDS = {
    "plain": ("adamixer/adamixer_r18_digits.py", DETECTOR),
    "lors": ("lors/adamixer-lors_r18_digits.py", DETECTOR),
    "classification": ("classification/vit_digits.py", CLASSIFIER),
    "lors-classification": ("classification/vit-lors_digits.py", LORS_CLASSIFIER),
    "pela": ("pela/adamixer-lors_pela-swin_digits.py", DETECTOR + PELA),
    "lora": ("lora/adamixer-lora_r18_digits.py", DETECTOR + LORA),
    "pela-distillation": ("pela/pela-distiller_vit_digits.py", DISTILLER),
    "pela-as-released": ("pela/pela-distiller_vit_digits.py", RELEASED),
}
"""What is trained: a config of this project, and what makes it small and its augmentation and dropout random."""
TEACHERS = {"lora": "plain", "pela-distillation": "classification", "pela-as-released": "classification"}
"""Whose weights it starts from."""


def write_config(kind: str, folder: Path, data: Path, more: str = "", name: str = "") -> Path:
    """A config of seconds: 2 epochs of 3 iterations, a validation after each, a checkpoint at iterations 4 and 6."""
    base, text = KINDS[kind]
    teacher = folder / "teacher.pth"
    if kind in TEACHERS and not teacher.exists():
        trained = MODELS.build(mmengine_config.Config.fromfile(write_config(TEACHERS[kind], folder, data)).model)
        torch.save(dict(state_dict=trained.state_dict()), teacher)
    path = folder / f"{name or kind}.py"
    text = (SMALL + text).replace("{bases!r}", repr(str(ROOT / "configs" / base)))
    path.write_text(text.replace("{data!r}", repr(str(data))).replace("{teacher!r}", repr(str(teacher))) + more)
    return path


FAULT = """
custom_hooks = [dict(type="ServeFoldedHook"), dict(type="StopOnNonFiniteHook"), dict(type="FaultHook", **{})]
"""


@HOOKS.register_module()
class FaultHook(Hook):
    """Sends a signal to its own process, or to its session, or limits the size of files, at a chosen moment.

    Args:
        when: method of a hook, such as ``after_train_iter``.
        iteration: ``runner.iter`` then.
        signal_name: such as SIGKILL.
        rank: the process it happens in.
        session: whether data workers get the signal as well.
        parent: whether its parent process gets the signal instead.
        restart: the attempt of torchrun's that it happens in, from 0; None for any.
        largest_file: bytes; writing more to a file fails.
    """

    priority = "NORMAL"

    def __init__(
        self,
        when: str,
        iteration: int,
        signal_name: str | None = None,
        rank: int = 0,
        session: bool = False,
        parent: bool = False,
        restart: int | None = None,
        largest_file: int | None = None,
    ) -> None:
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if int(os.environ.get("RANK", 0)) == rank and restart in (None, attempt):
            setattr(self, when, lambda runner, **_: self.fault(runner))
        self.iteration, self.signal = iteration, signal_name
        self.send, self.process = os.killpg if session else os.kill, os.getppid() if parent else os.getpid()
        self.largest_file = largest_file

    def fault(self, runner: Any) -> None:
        if runner.iter != self.iteration:
            return
        if self.signal:
            # From elsewhere: torch's data workers forgive a SIGTERM that their parent sends.
            sender = os.fork()
            if sender == 0:
                self.send(self.process, getattr(signal, self.signal))
                os._exit(0)
            os.waitpid(sender, 0)
        if self.largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, self.largest_file))


def _die(fsync: Callable, left: list[int], descriptor: int) -> None:
    """Flush a file; when its turn has come, die as if only half of it was written."""
    left[0] -= not stat.S_ISDIR(os.fstat(descriptor).st_mode)
    if left[0] == 0:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.killpg(os.getpid(), signal.SIGKILL)
    fsync(descriptor)


def _run(
    tool: str, folder: Path, prepare: Callable, arguments: list[str], environment: dict[str, str], log: str
) -> None:
    os.setsid()
    os.chdir(folder)
    prepare()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # Pretty-printing the config takes longer than a tiny run.
    mmengine_config.FormatCode = lambda text, **_: (text, False)
    torch.set_num_threads(1)
    if "DIE_WRITING" in environment:
        os.fsync = partial(_die, os.fsync, [int(environment["DIE_WRITING"])])
    sys.argv = [f"tools/{tool}", *arguments]
    try:
        run_tool(load_tool(tool).main)
    finally:
        sys.stdout.flush()


@cache
def start_server() -> None:
    """Start the process that imports everything once."""
    # Python 3.11's does not look for modules where this process does.
    changed = dict(QUIET, PYTHONPATH=MODULES)
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    FORKS.set_forkserver_preload(["runs"])
    forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


class Run:
    """tools/train.py, or another tool, with a config, in one process or several.

    Args:
        config: the config, or what else is the tool's first argument.
        work: its work folder.
        arguments: further arguments.
        processes: how many.
        die_writing: which checkpoint to die at, from 1, half of it written.
        tool: its file.
        folder: where it is started.
        prepare: called in its process, before everything else.
        option: the tool's option for the work folder.
    """

    def __init__(
        self,
        config: Path,
        work: Path,
        *arguments: str,
        processes: int = 1,
        die_writing: int | None = None,
        tool: str = "train.py",
        folder: Path = ROOT,
        prepare: Callable = int,
        option: str = "--work-dir",
    ) -> None:
        start_server()
        self.work, self.logs, self.processes = work, [], []
        alone = dict(QUIET, **({"DIE_WRITING": str(die_writing)} if die_writing else {}))
        common = dict(alone, WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        launcher = ["--launcher", "pytorch"] if processes > 1 else []
        for rank in range(processes):
            environment = dict(common, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes))
            log = work.with_name(f"{work.name}.{rank}.{time.monotonic_ns()}.log")
            line = [str(config), option, str(work), *arguments, *launcher]
            settings = environment if processes > 1 else alone
            process = FORKS.Process(target=_run, args=(tool, folder, prepare, line, settings, str(log)))
            process.start()
            self.logs.append(log)
            self.processes.append(process)

    def output(self, rank: int = 0) -> str:
        """What a process has printed."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit status of each process; negative is a signal."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            self.kill()
            raise AssertionError(f"not done after {timeout} s:\n{self.output()[-3000:]}")
        return [process.exitcode for process in self.processes]

    def done(self, timeout: float = 120) -> "Run":
        """Itself, once it has ended well."""
        codes = self.wait(timeout)
        assert codes == [0] * len(codes), f"{codes}:\n" + "\n".join(self.output(r)[-3000:] for r in range(len(codes)))
        return self

    def wait_for(self, condition: Callable[[], Any], timeout: float = 120) -> bool:
        """Whether the condition came true before the run ended."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.processes[0].exitcode is None:
            if condition():
                return True
            time.sleep(0.001)
        return bool(condition())

    def kill(self) -> None:
        """SIGKILL to all processes and their data workers."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()
            process.join()


def checkpoint(path: Path) -> dict:
    """A checkpoint, as torch's safe loader has it."""
    return torch.load(path, weights_only=True)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested values are not bit for bit the same."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))[:5]}"]
        return [text for key in a for text in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} entries"]
        return [text for i, (x, y) in enumerate(zip(a, b, strict=True)) for text in differences(x, y, f"{where}[{i}]")]
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [where]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


EXACT = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers", "exact_resume")
"""What has to be the same: weights, their average, optimizer, schedule; position, all random numbers and buffers."""


def same_training(a: Path, b: Path) -> list[str]:
    """Where two checkpoints' training states differ."""
    a, b = checkpoint(a), checkpoint(b)
    return [text for key in EXACT for text in differences(a.get(key), b.get(key), key)]
