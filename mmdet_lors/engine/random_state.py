"""The state of all random numbers that training draws in a process, as tensors and numbers, and a seeded scope."""

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info


def _accelerator() -> tuple[str, ModuleType] | None:
    """Name and module of the device type that torch has here beside the CPU, such as 'cuda' and torch.cuda."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return device.type, torch.get_device_module(device)


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's, torch's and the current GPU's generators, readable by torch's safe loader."""
    version, words, python_gauss = random.getstate()
    _, key, position, has_gauss, gauss = np.random.get_state()
    state = dict(
        python=dict(version=version, words=torch.tensor(words), gauss=python_gauss),
        numpy=dict(key=torch.from_numpy(key.astype(np.int64)), position=position, has_gauss=has_gauss, gauss=gauss),
        torch=torch.get_rng_state(),
    )
    if (found := _accelerator()) is not None:
        kind, module = found
        state[kind] = module.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a :func:`random_state`; a GPU's is left alone if the state or this machine has none."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    key = numpy["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    if (found := _accelerator()) is not None and found[0] in state:
        kind, module = found
        module.set_rng_state(state[kind].cpu())


@contextmanager
def seeded(key: tuple[int, ...]) -> Iterator[None]:
    """Draw random numbers on the CPU that depend on ``key`` only; afterwards the generators are as they were before.

    Not so in a data worker, where nothing else draws: keeping the states would take longer than all the rest.
    """
    generator = torch.default_generator  # torch.manual_seed would seed the GPUs as well.
    before = None
    if get_worker_info() is None:
        before = random.getstate(), np.random.get_state(), generator.get_state()
    python, numpy, pytorch = struct.unpack("<QIQ", blake2b(" ".join(map(str, key)).encode(), digest_size=20).digest())
    random.seed(python)
    np.random.seed(numpy)
    generator.manual_seed(pytorch >> 1)
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])
            generator.set_state(before[2])
