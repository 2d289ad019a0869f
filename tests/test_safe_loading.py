"""A checkpoint that would run a command is refused, wherever a user can name one, and nothing runs."""

import ast
import os
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, refused
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmdet_lors.classification.pretrained import PretrainedParts
from mmdet_lors.engine.checkpoint.reading import read_checkpoint
from mmdet_lors.engine.checkpoint.safe_loading import FORCE_UNSAFE, make_mmengine_load_safely, weights_only
from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer

VIT_DIGITS = "configs/classification/vit_digits.py"
DISTILLER_DIGITS = "configs/pela/pela-distiller_vit_digits.py"
UNSAFE = "not safe to load"

TOOLS = {
    "train.py": ["{lors}", "--resume", "{evil}", "{detection}"],
    "test.py": ["{lors}", "{evil}", "{detection}"],
    "infer.py": ["{image}", "{lors}", "{evil}", "--out", "{out}"],
    "web_demo.py": ["{lors}", "{evil}"],
    "model_converters/adamixer_to_lors.py": ["{plain}", "{evil}", "{lors}", "{out}.pth"],
    "model_converters/publish_model.py": ["{lors}", "{evil}", "{out}"],
    "model_converters/reference_to_mmdet_lors.py": ["{evil}", "{out}.pth"],
    "model_converters/compress.py": ["{lors}", "{evil}", "{out}.pth", "--ratio", "2"],
    "model_converters/extract_student.py": ["{evil}", "{out}.pth"],
    "deployment/fold_lors.py": ["{lors}", "{evil}", "{out}.pth"],
    "deployment/export_onnx.py": ["{lors}", "{evil}", "{out}.onnx", "--size", "96x96"],
    "analysis_tools/benchmark_pela.py": ["--model", "vit_tiny_patch16_224", "--checkpoint", "{evil}"],
    "analysis_tools/early_exit.py": ["{lors}", "{evil}"],
    "analysis_tools/show_features.py": ["{lors}", "{evil}", "--out", "{out}.png"],
    "analysis_tools/show_lors.py": ["{lors}", "{evil}", "--out", "{out}.png"],
    "analysis_tools/show_sampling.py": ["{image}", "{lors}", "{evil}", "--out", "{out}.png"],
}
"""Every tool that takes a checkpoint, and a command line on which only the checkpoint is wrong."""

FORBIDDEN = {
    "pickle.load": "unpickles anything",
    "pickle.loads": "unpickles anything",
    "pickle.Unpickler": "unpickles anything",
    "joblib.load": "unpickles anything",
    "dill.load": "unpickles anything",
    "torch.hub.load": "runs code from the web",
    "torch.hub.load_state_dict_from_url": "unpickles anything by default",
    "torch.jit.load": "runs the file's code",
    "Config.fromstring": "runs the string as code",
    "eval": "runs the string as code",
    "exec": "runs the string as code",
    "yaml.load": "builds any object",
}
"""Calls that have no place in our own files."""


class Malicious:
    """Creates a file when unpickled, as any command could."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """What a malicious checkpoint would create; with torch's switch that makes its loader unsafe by default set."""
    monkeypatch.setenv(FORCE_UNSAFE, "1")
    yield tmp_path / "a-command-ran"
    assert not (tmp_path / "a-command-ran").exists(), "the checkpoint ran a command"


def write_evil(path: Path, marker: Path, kind: str = "zip") -> Path:
    content = dict(state_dict={"weight": torch.zeros(1)}, meta=dict(epoch=1, iter=1, evil=Malicious(marker)))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.fixture
def evil(tmp_path, marker) -> Path:
    return write_evil(tmp_path / "evil.pth", marker)


def detection(data: Path) -> list[str]:
    """--cfg-options for the tiny data set."""
    settings = [f"{split}_evaluator.ann_file={data}/annotations/val.json" for split in ("val", "test")]
    for split in ("train", "val", "test"):
        settings += [f"{split}_dataloader.dataset.data_root={data}", f"{split}_dataloader.num_workers=0"]
        settings.append(f"{split}_dataloader.persistent_workers=False")
    return ["--cfg-options", *settings]


CLASSIFICATION = [
    "--cfg-options",
    *(f"{s}_dataloader.num_workers=0" for s in ("train", "val")),
    *(f"{s}_dataloader.persistent_workers=False" for s in ("train", "val")),
]


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_the_checkpoint_of_these_tests_would_run_a_command(kind, tmp_path):
    path = write_evil(tmp_path / "evil.pth", tmp_path / "ran", kind)
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_refuses_it(tool, evil, tmp_path, tiny_digits, monkeypatch, capsys):
    names = dict(evil=evil, out=tmp_path / "out", lors=ROOT / LORS_DIGITS, plain=ROOT / PLAIN_DIGITS)
    names["image"] = next((tiny_digits / "val").iterdir())
    arguments = [a.format(**names) for a in TOOLS[tool] if a != "{detection}"]
    if "{detection}" in TOOLS[tool]:
        arguments += ["--work-dir", str(tmp_path / "work"), *detection(tiny_digits)]
    message = refused(tool, arguments, monkeypatch, capsys)
    assert UNSAFE in message and str(evil) in message
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pth"]


def tools_that_take_a_checkpoint() -> set[str]:
    """Scripts with an option whose name or help speaks of checkpoints, or that have train.py's options."""
    found = set()
    for path in sorted((ROOT / "tools").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            words = ast.unparse(node).lower() if called.endswith("add_argument") else ""
            if called == "add_common_options" or any(w in words for w in ("checkpoint", ".pth", "weights")):
                found.add(str(path.relative_to(ROOT / "tools")))
    return found


def test_no_tool_is_forgotten():
    assert tools_that_take_a_checkpoint() == set(TOOLS)


def test_our_own_files_unpickle_and_execute_nothing():
    for folder in ("mmdet_lors", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    where = f"{path.relative_to(ROOT)}:{node.lineno}: {called}"
                    assert called not in FORBIDDEN, f"{where} {FORBIDDEN[called]}"
                    if called == "torch.load":
                        assert "weights_only=True" in ast.unparse(node), f"{where} without weights_only=True"
                    assert not any(k.arg == "allow_pickle" for k in node.keywords), f"{where} with allow_pickle"


@pytest.mark.parametrize(
    "settings",
    [
        "load_from = {path!r}",
        "load_from, resume = {path!r}, True",
        "model = dict(backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained', checkpoint={path!r})))",
        "model = dict(init_cfg=dict(type='Pretrained', checkpoint={path!r}))",
    ],
)
def test_train_refuses_it_in_a_config(settings, evil, tmp_path, tiny_digits, monkeypatch, capsys):
    config = tmp_path / "config.py"
    config.write_text(f"_base_ = {str(ROOT / LORS_DIGITS)!r}\n{settings.format(path=str(evil))}\n")
    arguments = [str(config), "--work-dir", str(tmp_path / "work"), *detection(tiny_digits)]
    message = refused("train.py", arguments, monkeypatch, capsys)
    assert UNSAFE in message and str(evil) in message


@pytest.mark.parametrize("flag", [["--resume"], []])
def test_train_refuses_it_as_the_newest_checkpoint(flag, marker, tmp_path, tiny_digits, monkeypatch, capsys):
    """With --resume, and for a run that torchrun has started again."""
    if not flag:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    evil = write_evil(tmp_path / "epoch_1.pth", marker)
    (tmp_path / "last_checkpoint").write_text(str(evil))
    arguments = [str(ROOT / LORS_DIGITS), "--work-dir", str(tmp_path), *flag, *detection(tiny_digits)]
    message = refused("train.py", arguments, monkeypatch, capsys)
    assert UNSAFE in message and str(evil) in message


def test_train_refuses_it_as_a_teacher(evil, tmp_path, monkeypatch, capsys):
    arguments = [str(ROOT / DISTILLER_DIGITS), "--work-dir", str(tmp_path / "work"), *CLASSIFICATION]
    message = refused("train.py", [*arguments, f"model.teacher_checkpoint={evil}"], monkeypatch, capsys)
    assert UNSAFE in message and str(evil) in message


def test_the_inferencer_refuses_it(evil):
    with pytest.raises(UserError, match=UNSAFE):
        Inferencer(ROOT / LORS_DIGITS, evil, "cpu")


def test_parts_from_it_are_refused(evil):
    with pytest.raises(UserError, match=UNSAFE):
        PretrainedParts(str(evil), ["mlp"])(nn.Linear(1, 1))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("load", [read_checkpoint, CheckpointLoader.load_checkpoint])
def test_every_format_of_it_is_refused(load, kind, marker, tmp_path):
    with pytest.raises(UserError, match=UNSAFE):
        load(str(write_evil(tmp_path / "evil.pth", marker, kind)))


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(tmp_path):
    """http:// address of the folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_it_is_refused_from_the_web(evil, address, tmp_path, monkeypatch):
    """mmengine's own loader asks torch.hub, which unpickles anything unless told otherwise."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    torch.save(dict(state_dict={"weight": torch.ones(1)}), tmp_path / "good.pth")
    good = CheckpointLoader.load_checkpoint(f"{address}/good.pth", map_location="cpu")
    assert good["state_dict"]["weight"].item() == 1
    with pytest.raises(UserError, match=UNSAFE):
        CheckpointLoader.load_checkpoint(f"{address}/evil.pth", map_location="cpu")
    assert (tmp_path / "hub" / "hub" / "checkpoints" / "evil.pth").is_file()


def test_all_of_mmengines_loaders_are_wrapped_once():
    wrapped = dict(CheckpointLoader._schemes)
    assert {"", "http://", "https://", "torchvision://", "open-mmlab://"} <= set(wrapped)
    assert all(load.is_safe for load in wrapped.values())
    make_mmengine_load_safely()
    assert wrapped == CheckpointLoader._schemes


def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv(FORCE_UNSAFE, "1")
    before = dict(os.environ)
    with weights_only():
        assert FORCE_UNSAFE not in os.environ
    assert dict(os.environ) == before


class Toy(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x, mode):
        return dict(loss=self.linear(x).sum())


def toy_runner(work_dir: Path, epochs: int, **settings) -> Runner:
    return Runner(
        model=Toy(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=[dict(x=torch.ones(1))],
            batch_size=1,
            sampler=dict(type=DefaultSampler),
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(logger=None),
        default_scope="mmdet",
        experiment_name=f"toy-{work_dir.parent.name}-{epochs}",
        **settings,
    )


def test_resuming_runs_no_config_of_the_checkpoints(marker, tmp_path):
    """mmengine executes ``meta.config`` when it resumes, which torch's safe loader knows nothing of."""
    toy_runner(tmp_path / "work", 1).train()
    path = tmp_path / "work" / "epoch_1.pth"
    checkpoint = read_checkpoint(path)
    checkpoint["meta"]["config"] = f"__import__('os').mkdir({str(marker)!r})"
    torch.save(checkpoint, path)
    runner = toy_runner(tmp_path / "work", 2, resume=True)
    runner.train()
    assert runner.epoch == 2


def test_a_config_is_code(tmp_path):
    """The other way round: nobody should take a config for data."""
    (tmp_path / "config.py").write_text(f"__import__('os').mkdir({str(tmp_path / 'ran')!r})")
    Config.fromfile(tmp_path / "config.py")
    assert (tmp_path / "ran").is_dir()
