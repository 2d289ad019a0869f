"""Settings that differ between machines: the device that computes, and how a process starts another."""

import copyreg
import multiprocessing
import sys

import mmengine.device.utils
import torch
from mmengine.config import Config
from mmengine.runner.runner import _SlicedDataset

from mmdet_lors.engine.cpu import prepare_cpu
from mmdet_lors.errors import UserError

try:
    import resource
except ModuleNotFoundError:  # Windows has none
    resource = None

AUTOMATIC = mmengine.device.utils.DEVICE
"""The type of device that mmengine uses if none is chosen: a GPU if it finds one."""


def _count(kind: str) -> int:
    """How many devices of this type torch can use here."""
    module = getattr(torch, kind, None)  # torch.cuda, torch.mps, ...: each knows its own
    return module.device_count() if hasattr(module, "device_count") and module.is_available() else 0


def usable(device: str) -> torch.device:
    """The device of this name, such as 'cpu', 'cuda', 'cuda:1', 'mps' or 'xpu'.

    Raises:
        UserError: a name that torch does not know, or a device that it cannot use on this machine.
    """
    here = [kind for kind in ("cpu", "cuda", "mps", "xpu", "npu") if _count(kind)]
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} is not known: on this machine choose {' or '.join(here)}") from error
    count = _count(wanted.type)
    if not count:
        what = "GPU" if wanted.type == "cuda" else f"{wanted.type} device"
        raise UserError(f"device {device}: this machine has no {what} that PyTorch can use: choose {' or '.join(here)}")
    if (wanted.index or 0) >= count:
        names = f"{wanted.type}:0 to {wanted.type}:{count - 1}" if count > 1 else wanted.type
        raise UserError(f"device {device}: this machine has {count} of this type: choose {names}")
    return wanted


def use_device(device: str | None, launcher: str = "none") -> None:
    """Make mmengine compute on this device in this process, instead of the one that it finds by itself.

    Args:
        device: its name, see :func:`usable`; None for mmengine's choice.
        launcher: how the processes were started. If there are several, each uses the GPU of its own number.

    Raises:
        UserError: see :func:`usable`; also a device that several processes cannot share.
    """
    kind = AUTOMATIC
    if device is not None:
        wanted = usable(device)
        if launcher != "none" and (wanted.type not in ("cpu", "cuda") or wanted.index is not None):
            raise UserError(f"--device {device} is for one process: several use cpu, or cuda with one GPU each")
        kind = wanted.type
        if wanted.index is not None and _count(kind) > 1:
            torch.accelerator.set_device_index(wanted.index)
    # The value that get_device() returns, which all of mmengine calls; there is no setting for it.
    mmengine.device.utils.DEVICE = kind
    if kind == "cpu":
        prepare_cpu()


def peak_resident() -> int | None:
    """The most bytes of memory that this process has held at a time; None on Windows, which does not say."""
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def use_start_method(cfg: Config) -> None:
    """Start data workers by the system's default method, if that is not forking.

    mmengine forks unless a config says otherwise; Windows cannot fork, and on macOS a forked process may crash.
    """
    default = multiprocessing.get_all_start_methods()[0]
    chosen = cfg.get("env_cfg", {}).get("mp_cfg", {})
    if default != "fork" and chosen.get("mp_start_method", "fork") == "fork":
        cfg.merge_from_dict({"env_cfg.mp_cfg.mp_start_method": default})


# num_batch_per_epoch wraps a data set in this class; unpickling it, as a worker that is not forked must, never ends.
copyreg.pickle(_SlicedDataset, lambda sliced: (_SlicedDataset, (sliced._dataset, sliced._length)))
