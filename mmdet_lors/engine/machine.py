"""What differs from machine to machine: which device computes, and how a process starts another."""

import copyreg
import multiprocessing

import mmengine.device.utils
import torch
from mmengine.config import Config
from mmengine.runner.runner import _SlicedDataset

from mmdet_lors.errors import UserError

AUTOMATIC = mmengine.device.utils.DEVICE
"""The type of device that mmengine computes on if nobody chooses one: a GPU if it finds one."""


def _count(kind: str) -> int:
    """How many devices of this type torch can use here."""
    module = getattr(torch, kind, None)  # torch.cuda, torch.mps, ...: each says so itself
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
        raise UserError(f"device {device!r} is not known: on this machine take {' or '.join(here)}") from error
    count = _count(wanted.type)
    if not count:
        what = "GPU" if wanted.type == "cuda" else f"{wanted.type} device"
        raise UserError(f"device {device}: this machine has no {what} that PyTorch can use: take {' or '.join(here)}")
    if (wanted.index or 0) >= count:
        names = f"{wanted.type}:0 to {wanted.type}:{count - 1}" if count > 1 else wanted.type
        raise UserError(f"device {device}: this machine has {count} of this type: take {names}")
    return wanted


def use_device(device: str | None, launcher: str = "none") -> None:
    """Have mmengine compute on this device in this process, and not on the one that it finds by itself.

    Args:
        device: its name, see :func:`usable`; None for mmengine's choice.
        launcher: how the processes were started. Of several, each takes the GPU of its own number.

    Raises:
        UserError: as :func:`usable`, or a device that several processes cannot share.
    """
    kind = AUTOMATIC
    if device is not None:
        wanted = usable(device)
        if launcher != "none" and (wanted.type not in ("cpu", "cuda") or wanted.index is not None):
            raise UserError(f"--device {device} is for one process: several take cpu, or cuda and one GPU each")
        kind = wanted.type
        if wanted.index is not None and _count(kind) > 1:
            torch.accelerator.set_device_index(wanted.index)
    # What get_device() returns, which is how all of mmengine asks; it has no setting.
    mmengine.device.utils.DEVICE = kind


def use_start_method(cfg: Config) -> None:
    """Start data workers as this system does by default, where that is not by forking.

    mmengine forks unless a config says otherwise; Windows cannot, and on macOS a forked process may crash.
    """
    default = multiprocessing.get_all_start_methods()[0]
    chosen = cfg.get("env_cfg", {}).get("mp_cfg", {})
    if default != "fork" and chosen.get("mp_start_method", "fork") == "fork":
        cfg.merge_from_dict({"env_cfg.mp_cfg.mp_start_method": default})


# What num_batch_per_epoch makes of a data set: unpickling it, as a worker that is not forked has to, recurses for ever.
copyreg.pickle(_SlicedDataset, lambda sliced: (_SlicedDataset, (sliced._dataset, sliced._length)))
