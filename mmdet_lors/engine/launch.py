"""What ``tools/train.py`` and ``tools/test.py`` share: config, launcher, one-line errors."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmdet.utils import register_all_modules, setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.config import config as mmengine_config
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.registry import init_default_scope

from mmdet_lors.engine.checkpoint.model_folder import CONFIG, within
from mmdet_lors.engine.processes.network import let_gloo_find_its_interface
from mmdet_lors.engine.processes.restarts import restarted_store
from mmdet_lors.errors import UserError

from .build import one_at_a_time
from .config_check import check_options
from .machine import use_start_method
from .new_style import classic

# A config of another package (mmdet::...) is found by its place. For every base, mmengine would first parse all
# metafiles of the package, which takes half a second or more, and ask them for a name that they never have.
mmengine_config._get_external_cfg_path = mmengine_config._get_external_cfg_base_path


@one_at_a_time
def load_config(
    path: str | Path,
    options: dict | None = None,
    launcher: str = "none",
    work_dir: str | None = None,
    needs_model: bool = True,
) -> Config:
    """A config with the command line's settings in it, ready for this machine.

    Args:
        path: the config file, or a folder that :mod:`~mmdet_lors.engine.checkpoint.model_folder` describes.
        options: settings that override it, by dotted name.
        launcher: how the processes were started.
        work_dir: where logs and results go; None for what the config says, or else work_dirs/<config name>.
        needs_model: refuse a config without a model, such as one of ``_base_``.

    Raises:
        UserError: a config file that is missing or broken, or settings that do not fit it.
    """
    name, path = Path(path).stem, within(path, CONFIG)
    if not path.is_file():
        raise UserError(f"config {path} does not exist")
    register_all_modules(init_default_scope=False)
    try:
        cfg = classic(Config.fromfile(path))
    except (SyntaxError, OSError, KeyError, TypeError, NameError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from error
    except ImportError as error:
        extra = "; pip install -e .[seg]" if "mmsegmentation" in str(error) else ""
        raise UserError(f"config {path} needs what is not there: {error}{extra}") from error
    if needs_model and cfg.get("model") is None:
        raise UserError(f"config {path} has no model")
    if options:
        check_options(options, cfg, str(path))
        try:
            cfg.merge_from_dict(options)
        except (KeyError, TypeError, AttributeError, AssertionError, IndexError) as error:
            raise UserError(f"--cfg-options does not fit config {path}: {error.args[0]}") from error
    on_gpu = torch.cuda.is_available() and get_device() == "cuda"
    for split in ("train", "val", "test"):
        _settle_loader(cfg.get(f"{split}_dataloader"), on_gpu)
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get("work_dir") or str(Path("work_dirs") / name)
    init_default_scope(cfg.get("default_scope", "mmdet"))
    setup_cache_size_limit_of_dynamo()
    use_start_method(cfg)
    if not on_gpu:
        _prepare_cpu(cfg)
    return cfg


def _settle_loader(loader: dict | None, on_gpu: bool) -> None:
    """Leave out what torch takes for worker processes only, where there are none; pin images that go to a GPU.

    To copy from other memory, CUDA may make the host wait until the GPU has done all that was asked of it before.
    """
    if loader and not loader.get("num_workers"):
        for field in ("persistent_workers", "prefetch_factor", "multiprocessing_context"):
            loader.pop(field, None)
    if loader and on_gpu:
        loader.setdefault("pin_memory", True)


def _prepare_cpu(cfg: Config) -> None:
    """Distributed training without a GPU: gloo, and a DistributedDataParallel without device ids."""
    if cfg.launcher == "none":
        return
    cfg.env_cfg.dist_cfg = dict(cfg.env_cfg.get("dist_cfg") or {}, backend="gloo")
    cfg.setdefault("model_wrapper_cfg", dict(type="MMDistributedDataParallel", broadcast_buffers=False))
    cfg.model_wrapper_cfg["device_ids"] = None
    if cfg.launcher == "pytorch" and not is_distributed():
        let_gloo_find_its_interface()
        # mmengine would call torch.cuda.set_device first; it leaves an existing process group alone.
        with _ended_by_sigterm():
            torch.distributed.init_process_group(backend="gloo", **restarted_store())


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the process in here: no handler of Python's would run while torch waits for other processes."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_first_process() -> bool:
    """Whether this is the process that checks, and speaks for, all of them."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def run(main: Callable[[], None]) -> None:
    """Call a tool's main(); an error that is the user's to mend becomes one line and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    if is_distributed():
        # gloo's threads abort a process that ends while they still run. They end with the last that holds the group:
        # the model in DistributedDataParallel, which is in a reference cycle with the runner. It would wait for them
        # without letting go of the interpreter, which a thread needs that frees a tensor; this reference lets go.
        group = torch.distributed.group.WORLD
        torch.distributed.destroy_process_group()
        gc.collect()
        del group
