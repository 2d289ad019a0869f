"""What tests share: mmdet's registries, a fixed seed, configs small enough for a CPU, a tiny data set."""

import importlib.util
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))  # before Triton is imported

import mmcv
import pytest
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer
from torch import nn

import mmdet_lors  # noqa: F401
from mmdet_lors.engine import launch
from mmdet_lors.lors import recompute

ROOT = Path(__file__).parents[1]
PLAIN_DIGITS = "configs/adamixer/adamixer_r18_digits.py"
LORS_DIGITS = "configs/lors/adamixer-lors_r18_digits.py"


def pytest_addoption(parser):
    parser.addoption("--every-config", action="store_true", help="run every config, not one of every base")


def pytest_collection_modifyitems(items):
    """In several processes, the tests of a file share one; those that run configs are too long for that."""
    for item in items:
        if item.path.name != "test_runs.py":
            item.add_marker(pytest.mark.xdist_group(item.path.relative_to(ROOT / "tests").as_posix()))


@pytest.fixture(scope="session", autouse=True)
def _registries():
    register_all_modules(init_default_scope=True)
    MMLogger.get_current_instance().setLevel("WARNING")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _recompute(monkeypatch):
    """What large models compute twice, the small ones of tests do as well."""
    monkeypatch.setattr(recompute, "small", lambda device: 0)


@pytest.fixture(autouse=True)
def _process():
    """A run leaves loggers, visualizers and a signal handler in its process; the next test does not get them."""
    kinds = [MMLogger, MessageHub, DefaultScope, *_with_subclasses(Visualizer)]
    before = {kind: kind._instance_dict.copy() for kind in kinds}
    handler = signal.getsignal(signal.SIGTERM)
    forget_visualizers()
    _forget_closed_files()
    yield
    signal.signal(signal.SIGTERM, handler)
    for kind, instances in before.items():
        kind._instance_dict.clear()
        kind._instance_dict.update(instances)
    _forget_closed_files()


def forget_visualizers() -> None:
    """There is one of each name in a process, and it keeps the folder of its first run."""
    for kind in _with_subclasses(Visualizer):
        kind._instance_dict.clear()


def _forget_closed_files() -> None:
    """Whoever configures Python's logging anew, as a web server does, closes the log files of all loggers."""
    for logger in MMLogger._instance_dict.values():
        for handler in list(logger.handlers):
            if isinstance(handler, logging.FileHandler) and handler.stream is None:
                logger.removeHandler(handler)


def _with_subclasses(kind: type) -> list[type]:
    return [kind, *(below for child in kind.__subclasses__() for below in _with_subclasses(child))]


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


def load_config(name: str) -> Config:
    """A config of this project, without anything to download."""
    cfg = Config.fromfile(ROOT / name)
    cfg.model.backbone.init_cfg = None
    return cfg


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    path = ROOT / "tools" / name
    if str(path.parent) not in sys.path:  # as for a script
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*command: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """A command in the project's folder, or another, without a GPU."""
    env = dict(os.environ, PYTHON=sys.executable, PORT=str(free_port()), CUDA_VISIBLE_DEVICES="")
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def call_tool(monkeypatch, root) -> Callable:
    """A tool's main() with arguments, in this process and the project's folder."""

    def call(tool: str, *arguments) -> None:
        monkeypatch.chdir(root)
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        load_tool(tool).main()

    return call


def is_picture(path: Path) -> bool:
    """Whether a file is a PNG that shows something."""
    return path.read_bytes().startswith(b"\x89PNG") and mmcv.imread(str(path)).std() > 1


def refused(tool: str, arguments: list[str], monkeypatch, capsys) -> str:
    """The one line that a tool ends with, in this process."""
    module = load_tool(tool)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as stop:
        launch.run(module.main)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.fixture
def work(tmp_path) -> list[str]:
    """--work-dir of a folder that must not come into being."""
    yield ["--work-dir", str(tmp_path / "work")]
    assert not (tmp_path / "work").exists(), "a refused run left something behind"


def random_lors(model_cfg: dict) -> nn.Module:
    """A detector in evaluation mode whose LORS parts are all in use."""
    model = MODELS.build(model_cfg)
    model.init_weights()
    for half in (model.decoder.lorsa, model.decoder.lorst):
        for parameter in half.parameters() if half is not None else ():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def write_random_lors(folder: Path) -> str:
    """A digits checkpoint whose LORS parts are all in use and whose boxes are not all the whole image, with classes."""
    torch.manual_seed(0)
    model = random_lors(load_config(LORS_DIGITS).model)
    # The last stage's alone: random boxes that are sampled at again amplify rounding.
    nn.init.normal_(model.decoder.stages[-1].reg_branch[-1].weight, std=0.03)
    classes = tuple("0123456789")
    torch.save(dict(meta=dict(dataset_meta=dict(classes=classes)), state_dict=model.state_dict()), folder / "lors.pth")
    return str(folder / "lors.pth")


def data_samples(num_boxes: list[int], size: tuple[int, int], num_classes: int) -> list[DetDataSample]:
    """One sample per image with that many random boxes, at least 8 pixels wide."""
    samples = []
    for n in num_boxes:
        h, w = size
        corner = torch.rand(n, 2) * torch.tensor([w / 2, h / 2])
        boxes = torch.cat([corner, corner + 8 + torch.rand(n, 2) * torch.tensor([w / 3, h / 3])], dim=1)
        sample = DetDataSample(
            metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), batch_input_shape=size)
        )
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(num_classes, (n,)))
        samples.append(sample)
    return samples


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory) -> Path:
    """A digits data set of 32 + 8 images."""
    out = tmp_path_factory.mktemp("data") / "digits"
    load_tool("dataset_converters/digits_to_coco.py").build(out, train_images=32, val_images=8)
    return out
