"""mmengine's new-style configs are the classic ones that they stand for."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import LORS_DIGITS, ROOT
from mmcv.ops import nms
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import Resize
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from torch import nn

from mmdet_lors.engine.config_check import check_config
from mmdet_lors.engine.launch import load_config
from mmdet_lors.engine.new_style import classic, type_name

NEW_STYLE = "configs/lors/adamixer_lors_r18_digits_new_style.py"


def bare(node):
    """A config with the bare names of types, without paths and scopes."""
    if isinstance(node, dict):
        return {
            key: type_name(value) if key == "type" else bare(value) for key, value in node.items() if key != "_scope_"
        }
    return type(node)(map(bare, node)) if isinstance(node, (list, tuple)) else node


@pytest.fixture(scope="module")
def twins():
    return load_config(ROOT / LORS_DIGITS), load_config(ROOT / NEW_STYLE)


def test_the_projects_own_is_its_classic_twin(twins):
    named, imported = (bare(cfg.to_dict()) for cfg in twins)
    for key in ("custom_imports", "vis_backends", "work_dir"):
        named.pop(key, None), imported.pop(key, None)
    assert imported == named


def test_both_build_the_same_model(twins):
    models = [MODELS.build(cfg.model) for cfg in twins]
    shapes = [
        {name: (type(m), *[p.shape for p in m.parameters(False)]) for name, m in model.named_modules()}
        for model in models
    ]
    assert shapes[0] == shapes[1]


def test_it_is_written_and_read_again(twins, tmp_path):
    twins[1].dump(tmp_path / "written.py")
    assert load_config(tmp_path / "written.py").to_dict()["model"] == twins[1].to_dict()["model"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Resize, "Resize"),  # not mmcv's, which has the same name
        (nn.BatchNorm2d, "torch.nn.modules.batchnorm.BatchNorm2d"),  # registered as BN
        (nms, "nms"),
        (json.dumps, "json.dumps"),
    ],
)
def test_classes_and_functions_have_names(kind, name):
    assert classic(Config(dict(x=[dict(type=kind)]))).x[0].type == name


def test_a_class_of_a_scope_above_is_found_by_its_path():
    import mmcv.transforms

    named = classic(Config(dict(x=dict(type=mmcv.transforms.Resize, scale=(4, 4))))).x
    assert type(TRANSFORMS.build(named)) is mmcv.transforms.Resize


def test_what_cannot_be_named_stays():
    def make():
        return nn.Identity()

    cfg = classic(Config(dict(a=dict(type=make), b=dict(act=nn.GELU))))
    assert cfg.a.type is make and cfg.b.act is nn.GELU


def test_constants_of_modules_are_their_values(tmp_path):
    (tmp_path / "my.py").write_text(
        "from mmdet.datasets import CocoDataset\nfrom torch import nn\n"
        "default_scope = None\nmetainfo = CocoDataset.METAINFO\nmodel = dict(type=nn.Linear, act=nn.GELU)\n"
    )
    cfg = load_config(tmp_path / "my.py")
    assert cfg.metainfo == CocoDataset.METAINFO
    assert cfg.model.type == "Linear" and cfg.model.act is nn.GELU
    assert cfg.default_scope == "mmdet"


def test_what_is_imported_and_not_there_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text("from mmdet.models import ResNett\nmodel = dict(type=ResNett)\n")
    with pytest.raises(Exception, match=r"my\.py needs what is not there: Failed to import ResNett"):
        load_config(tmp_path / "my.py")


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """A run of a new-style config that inherits the project's own: its config file and its folder."""
    folder = tmp_path_factory.mktemp("new style")
    base = (ROOT / NEW_STYLE).read_text().replace(".._base_.new_style_runtime", ".runtime")
    (folder / "base.py").write_text(base.replace("data/digits/", f"{tiny_digits}/"))
    (folder / "runtime.py").write_text((ROOT / "configs/_base_/new_style_runtime.py").read_text())
    config = folder / "my.py"
    config.write_text(
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
        "train_dataloader.update(num_workers=0)\n"
        "val_dataloader.update(num_workers=0)\n"
        "train_cfg.update(max_epochs=1, val_interval=1)\n"
    )
    return config, folder / "work"


def test_the_recipe_of_the_documentation(trained):
    config, _ = trained
    [code] = re.findall(r"```python\n(from mmengine.config.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    recipe = config.with_name("recipe.py")
    recipe.write_text(code.replace(f".{Path(NEW_STYLE).stem}", ".base"))
    cfg = load_config(recipe)
    check_config(cfg, ("train", "val", "test"))
    assert cfg.optim_wrapper.optimizer == dict(type="SGD", lr=0.01)
    assert cfg.model.decoder.lors.static.rank == 4 and MODELS.build(cfg.model).decoder.lorst is not None


def test_every_step_of_a_users_way(trained, call_tool, capsys):
    config, work = trained
    call_tool("train.py", config, "--work-dir", work)
    assert (work / "best_coco_bbox_mAP_epoch_1.pth").is_file()
    more = ["--resume", "--amp", "--cfg-options", "train_cfg.max_epochs=2"]
    call_tool("train.py", config, "--work-dir", work, *more)
    assert torch.load(work / "epoch_2.pth", weights_only=False)["meta"]["iter"] == 8

    metrics = work / "metrics.json"
    arguments = [work / "epoch_2.pth", "--work-dir", work, "--metrics", metrics]
    call_tool("test.py", config, *arguments)
    first = json.loads(metrics.read_text())
    call_tool("test.py", work / "my.py", *arguments)  # what the run has written down
    assert json.loads(metrics.read_text()) == first
    call_tool("test.py", config, *arguments, "--tta", "--show-dir", "pictures", "--show-interval", 4)
    assert list(work.glob("*/pictures/*.png"))

    call_tool("deployment/fold_lors.py", config, work / "epoch_2.pth", work / "folded.pth")
    call_tool("test.py", work / "folded.py", work / "folded.pth", "--work-dir", work, "--metrics", metrics)
    assert json.loads(metrics.read_text()) == pytest.approx(first, abs=2e-3)


TOOLS = {
    "analysis_tools/browse_dataset.py": ["{config}", "--number", "2", "--out", "{out}/sheet.png"],
    "analysis_tools/preview_schedule.py": ["{config}", "--iterations-per-epoch", "4"],
    "analysis_tools/model_report.py": ["{config}", "--input", "96x96"],
    "analysis_tools/show_lors.py": ["{config}", "{checkpoint}"],
    "infer.py": ["{image}", "{config}", "{checkpoint}", "--out", "{out}/pictures", "--json"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_other_tools(tool, trained, tiny_digits, tmp_path, call_tool):
    config, _ = trained
    checkpoint = tmp_path / "model.pth"
    torch.save(dict(state_dict=MODELS.build(load_config(config).model).state_dict()), checkpoint)
    image = next((tiny_digits / "val").glob("*.png"))
    names = dict(config=config, checkpoint=checkpoint, image=image, out=tmp_path)
    call_tool(tool, *(argument.format(**names) for argument in TOOLS[tool]))


def test_a_config_in_python_with_classes_infers(trained, tiny_digits, tmp_path):
    from mmdet_lors.inference import Inferencer

    config, _ = trained
    torch.save(dict(state_dict=MODELS.build(load_config(config).model).state_dict()), tmp_path / "model.pth")
    image = str(next((tiny_digits / "val").glob("*.png")))
    by_object = Inferencer(Config.fromfile(config), tmp_path / "model.pth", show_progress=False)(image)
    assert (
        by_object["predictions"]
        == Inferencer(config, tmp_path / "model.pth", show_progress=False)(image)["predictions"]
    )
