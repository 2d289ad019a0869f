"""What machine this is, and what its device does at best: copies and matrix products."""

import importlib.metadata
import os
import platform
import shutil
import subprocess

import mmcv
import mmdet
import mmengine
import torch
from mmcv.ops import get_compiler_version, get_compiling_cuda_version

from mmdet_lors.adamixer.sampling.backends import NEEDS
from mmdet_lors.analysis.timing import hardware

from .check import Machine, Sheet, name_of


def driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi says it."""
    if not shutil.which("nvidia-smi"):
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (done.stdout.splitlines() or [f"unknown ({done.stderr.strip()[:60]})"])[0]


def version(package: str) -> str:
    """An installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe(machine: Machine) -> dict[str, str]:
    """Card and software."""
    facts = {
        "device": hardware(machine.device),
        "cores": str(os.cpu_count()),
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "Triton": version("triton"),
        "mmcv": f"{mmcv.__version__}, CUDA operators: {get_compiling_cuda_version()} ({get_compiler_version()})",
        "mmdet, mmengine": f"{mmdet.__version__}, {mmengine.__version__}",
    }
    if machine.cuda:
        card = torch.cuda.get_device_properties(machine.device)
        facts["driver, power limit"] = driver()
        facts["card"] = (
            f"{card.total_memory / 2**30:.1f} GiB, {card.multi_processor_count} multiprocessors, "
            f"compute capability {card.major}.{card.minor}"
        )
        facts["TF32"] = (
            f"convolutions {torch.backends.cudnn.allow_tf32}, products {torch.backends.cuda.matmul.allow_tf32}"
        )
    return facts


def copy_rate(machine: Machine) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.empty(2**20 if machine.tiny else 2**31, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / machine.median_time(lambda: target.copy_(source), turns=20)


def matrix_rate(machine: Machine, dtype: torch.dtype) -> float:
    """Operations per second, 2 per multiply-add, of a product of two square matrices of random numbers."""
    side = 128 if machine.tiny else 8192
    a, b = (torch.randn(side, side, device=machine.device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / machine.median_time(lambda: a @ b, turns=20)


def environment(machine: Machine, sheet: Sheet) -> None:
    """Section 1."""
    facts = describe(machine)
    facts["sampling back ends here"] = ", ".join(machine.back_ends())
    sheet.figures.update(facts)
    copies = copy_rate(machine)
    sheet.figures["copy bytes/s"] = copies
    facts["copy, read and written"] = f"{copies / 1e9:.0f} GB/s"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rate = matrix_rate(machine, dtype)
        sheet.figures[f"matrix {name_of(dtype)}"] = rate
        facts[f"matrix product, {name_of(dtype)}"] = f"{rate / 1e12:.3g} TFLOP/s"
    sheet.table("", "").extend(facts.items())
    sheet.note = f"{facts['device']}; {facts['sampling back ends here']}; copy {facts['copy, read and written']}"
    if machine.cuda and (missing := NEEDS["triton"](machine.device)):
        sheet.fail(f"our sampling kernel does not run: {missing}")
