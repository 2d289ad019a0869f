"""A checkpoint of the reference AdaMixer or LORS becomes one of ours; anything else is refused and leaves no file."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_config, load_tool
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import Tensor, nn

from mmdet_lors.analysis.complexity import build_on_meta
from mmdet_lors.conversion.reference import DROPPED, convert, rename, settings

sys.path.append(str(ROOT / "tests/adamixer"))
test_golden = importlib.import_module("test_golden")

DATA = ROOT / "tests/data"
TOOL = "model_converters/reference_to_mmdet_lors.py"
KINDS = ["adamixer", "lors"]
KEYS = [
    # key list, name in it, and our config of the same model; the released 300-query LORS config builds 100 queries
    ("adamixer", "adamixer_r50_1x_coco", "adamixer_r50_100-queries_1x"),
    ("adamixer", "adamixer_r50_300_query_crop_mstrain_480-800_3x_coco", "adamixer_r50_300-queries_crop-ms-480-800-3x"),
    (
        "adamixer",
        "adamixer_r101_300_query_crop_mstrain_480-800_3x_coco",
        "adamixer_r101_300-queries_crop-ms-480-800-3x",
    ),
    ("lors", "famixer_r50_lors_100_query_1x_coco", "adamixer-lors_r50_100-queries_1x"),
    ("lors", "famixer_r50_lors_300_query_1x_coco", "adamixer-lors_r50_100-queries_1x"),
]


def full_size(kind: str, name: str) -> dict[str, Tensor]:
    """A full-size reference state dict on the meta device."""
    keys = json.loads((DATA / f"keys_{kind}.json").read_text())[name]["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def golden_weights(kind: str) -> dict[str, Tensor]:
    return torch.load(DATA / f"{kind}_decoder.pt")["state_dict"]


def run(monkeypatch, *arguments) -> None:
    """The tool's main() in this process."""
    tool = load_tool(TOOL)
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    tool.run(tool.main)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the tool on a file or on what is to be saved as one; gives its one line and checks that it left no file."""

    def refuse(source, *options) -> str:
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        path = source
        if not isinstance(source, Path):
            path = tmp_path / "source.pth"
            torch.save(source, path)
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, path, folder / "ours.pth", *options)
        message = str(stop.value.code)
        assert message.startswith("error: ") and "\n" not in message
        assert not list(folder.iterdir()), "a refused run left something behind"
        assert not capsys.readouterr().out
        return message

    return refuse


@pytest.mark.parametrize(("kind", "name", "ours"), KEYS)
def test_every_key_of_the_full_size_models_maps_onto_our_config(kind, name, ours):
    theirs = full_size(kind, name)
    config = f"configs/{'lors/' if kind == 'lors' else 'adamixer/'}{ours}_coco.py"
    expected = {key: value.shape for key, value in build_on_meta(load_config(config).model).state_dict().items()}
    found = settings(theirs)
    converted = convert(theirs, found["decoder"]["stage"]["num_groups"])
    assert {key: value.shape for key, value in converted.items()} == expected
    assert len(converted) == len(theirs) - len(DROPPED)


@pytest.mark.parametrize(("kind", "name", "ours"), KEYS)
def test_settings_are_found_from_the_shapes(kind, name, ours):
    found = settings(full_size(kind, name))
    model = load_config(f"configs/{'lors/' if kind == 'lors' else 'adamixer/'}{ours}_coco.py").model
    fields = ("content_dim", "feat_channels", "num_heads", "ffn_channels", "num_groups", "in_points", "out_points")
    assert {field: found["decoder"]["stage"][field] for field in fields} == {
        field: model.decoder.stage[field] for field in fields
    }
    assert found["decoder"]["num_stages"] == 6 and found["decoder"]["num_classes"] == 80
    assert found["query_generator"] == dict(num_queries=model.query_generator.num_queries, content_dim=256)
    assert found["neck"] == dict(in_channels=[256, 512, 1024, 2048], out_channels=256)
    lors = dict(adaptive=dict(rank=[16] * 6, groups=[1, 1, 2, 2, 3, 3]), static=dict(rank=[8] * 6))
    assert found["decoder"]["lors"] == (lors if kind == "lors" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_file_reproduces_the_golden_detections(kind, tmp_path, monkeypatch, capsys):
    torch.save(golden_weights(kind), tmp_path / "theirs.pth")
    run(monkeypatch, tmp_path / "theirs.pth", tmp_path / "ours.pth", "--num-classes", 7)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ours.pth", "theirs.pth"]

    def load(name: str) -> tuple[dict, nn.Module]:
        golden = torch.load(DATA / f"{name}_decoder.pt")
        model = MODELS.build(test_golden.model_config(golden)).double()
        missing, unexpected = model.load_state_dict(torch.load(tmp_path / "ours.pth")["state_dict"], strict=False)
        assert not unexpected and all(key.startswith(("backbone.", "neck.")) for key in missing)
        return golden, model

    monkeypatch.setattr(test_golden, "load", load)
    test_golden.test_detections(kind)
    said = capsys.readouterr().out
    assert f"reference {dict(adamixer='AdaMixer', lors='LORS')[kind]}: 9 queries, 7 classes, 6 stages, 2 groups" in said
    assert "it has no backbone" in said and "warning" not in said


@pytest.fixture(params=KINDS)
def whole(request, tmp_path) -> tuple[dict[str, Tensor], str]:
    """A small reference checkpoint with backbone and neck, and the file of a config that it fits."""
    golden = torch.load(DATA / f"{request.param}_decoder.pt")
    cfg = Config(dict(model=test_golden.model_config(golden)))
    cfg.dump(tmp_path / "config.py")
    model = MODELS.build(cfg.model)
    weights = golden["state_dict"]
    weights |= {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}
    for key, value in model.neck.state_dict().items():
        part, _, rest = key.partition(".")
        i, _, name = rest.partition(".")
        weights["neck." + (f"lateral_convs.{i}.conv.{name}" if part == "convs" else f"gn_out.{rest}")] = value
    return weights, str(tmp_path / "config.py")


def test_everything_but_the_weights_is_dropped_and_listed(whole, tmp_path, monkeypatch, capsys):
    weights, config = whole
    optimizer = dict(state={0: dict(step=3, exp_avg=torch.zeros(3))}, param_groups=[dict(lr=2.5e-5, params=[0])])
    meta = dict(mmdet_version="2.14.0", epoch=12, CLASSES=("a", "b"))
    theirs = dict(meta=meta, state_dict={f"module.{k}": v for k, v in weights.items()}, optimizer=optimizer)
    torch.save(theirs, tmp_path / "theirs.pth")
    run(monkeypatch, tmp_path / "theirs.pth", tmp_path / "ours.pth", "--config", config)
    assert f"dropped: meta, optimizer, {DROPPED[0]}" in capsys.readouterr().out
    ours = torch.load(tmp_path / "ours.pth")
    assert set(ours) == {"state_dict"}
    MODELS.build(Config.fromfile(config).model).load_state_dict(ours["state_dict"], strict=True)


def test_a_config_tells_of_another_backbone(whole, refused, tmp_path):
    weights, config = whole
    cfg = Config.fromfile(config)
    cfg.model.backbone.depth = 34
    cfg.dump(config)
    assert "is of another architecture" in refused(weights, "--config", config)


def test_a_config_tells_of_another_number_of_classes(whole, refused):
    weights, config = whole
    cfg = Config.fromfile(config)
    cfg.model.decoder.num_classes = 8
    cfg.dump(config)
    assert "has 7 classes," in refused(weights, "--config", config)
    assert "has 7 classes, not 8: use --num-classes 7?" in refused(weights, "--num-classes", 8)


def test_a_config_of_another_model(refused):
    options = ("--num-classes", 7, "--config", ROOT / "configs/_base_/schedules/adamixer_1x.py")
    assert "adamixer_1x.py has no model" in refused(golden_weights("lors"), *options)


def test_another_number_of_classes_than_coco_has_must_be_said(refused):
    assert "has 7 classes, not 80: use --num-classes 7?" in refused(golden_weights("lors"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(kind, value, refused):
    weights = golden_weights(kind)
    weights["roi_head.bbox_head.3.fc_cls.bias"][2] = value
    assert "roi_head.bbox_head.3.fc_cls.bias has values that are not finite" in refused(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_needed(kind, refused):
    weights = golden_weights(kind)
    hidden = dict(cls=1, reg=1)
    assert len({rename(key, hidden) for key in weights}) == len(weights)
    for key in list(weights)[:: len(weights) // 25]:
        if key in DROPPED:
            continue
        rest = {k: v for k, v in weights.items() if k != key}
        message = refused(rest, "--num-classes", 7)
        assert "missing" in message or "unexpected" in message or "no reference" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", ["roi_head.mask_head.weight", "ema_backbone_conv1_weight", "decoder.x"])
def test_a_weight_that_is_not_the_references(kind, extra, refused):
    weights = golden_weights(kind) | {extra: torch.zeros(3)}
    assert f"{extra} is not a weight of the reference AdaMixer or LORS" in refused(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_do_not_fit_together(kind, refused):
    for key, value in golden_weights(kind).items():
        if "mixing" in key and (".bbox_head.0." in key or key.endswith(".0") or "common" in key):
            weights = golden_weights(kind) | {key: torch.zeros([n + 1 for n in value.shape])}
            message = refused(weights, "--num-classes", 7)
            assert "checkpoint " in message
            assert "of another shape" in message or "do not fit together" in message or "divisible" in message, message


SPARSE_RCNN = {
    "rpn_head.init_proposal_features.weight": torch.zeros(9, 32),
    "roi_head.bbox_head.0.fc_cls.weight": torch.zeros(80, 32),
}


@pytest.mark.parametrize(
    "weights",
    [SPARSE_RCNN, nn.Linear(3, 4).state_dict(), dict(state_dict=SPARSE_RCNN, meta={})],
    ids=["sparse-rcnn", "linear", "with-meta"],
)
def test_another_model(weights, refused):
    assert "source.pth: not a reference AdaMixer or LORS" in refused(weights)


def test_one_of_ours_already(refused):
    weights = convert(golden_weights("lors"), 2)
    assert "not a reference AdaMixer or LORS" in refused(weights)


@pytest.mark.parametrize("contents", [{}, dict(state_dict={}), dict(state_dict=dict(a=3)), [1]])
def test_no_weights(contents, refused):
    message = refused(contents)
    assert "holds no weights" in message or "a is a int, not a weight" in message or "holds a list" in message


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_cut_short(keep, refused, tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save(golden_weights("lors"), whole)
    data = whole.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert "cut.pth" in refused(tmp_path / "cut.pth")


def test_no_file(refused, tmp_path):
    assert "none.pth does not exist" in refused(tmp_path / "none.pth")
    assert "none.py does not exist" in refused(golden_weights("lors"), "--num-classes", 7, "--config", "none.py")


class Plain:
    """What an old checkpoint's meta may hold."""


def test_objects_in_meta_are_refused_with_what_to_do(refused):
    message = refused(dict(state_dict=golden_weights("lors"), meta=dict(hook=Plain())))
    assert "not safe to load" in message and "weights_only=False" in message


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    source = tmp_path / "theirs.pth"
    torch.save(golden_weights("lors"), source)
    for place, message in (
        (tmp_path / "none" / "ours.pth", "none does not exist"),
        (tmp_path, "is a folder"),
        (source, "is the checkpoint to convert"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, source, place, "--num-classes", 7)
    assert torch.load(source).keys() == golden_weights("lors").keys()
    assert list(tmp_path.iterdir()) == [source]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, monkeypatch):
    source, ours = tmp_path / "theirs.pth", tmp_path / "ours.pth"
    torch.save(golden_weights("lors"), source)
    ours.write_bytes(b"old")

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="ours.pth cannot be written: .*No space left on device"):
        run(monkeypatch, source, ours, "--num-classes", 7)
    assert ours.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [ours, source]


def test_positions_that_are_not_the_whole_image_are_a_warning(tmp_path, monkeypatch, capsys):
    weights = golden_weights("adamixer")
    weights[DROPPED[0]] *= 0.5
    torch.save(weights, tmp_path / "theirs.pth")
    run(monkeypatch, tmp_path / "theirs.pth", tmp_path / "ours.pth", "--num-classes", 7)
    assert f"warning: {DROPPED[0]} is not (0.5, 0.5, 1.0, 1.0)" in capsys.readouterr().out


def test_memory_of_shared_storages_is_not_written_again(tmp_path, monkeypatch):
    """torch.save writes whole storages; a weight that is a view of a larger one must not carry it along."""
    weights = golden_weights("adamixer")
    key = "roi_head.bbox_head.0.fc_cls.bias"
    weights[key] = torch.cat([weights[key], torch.zeros(1_000_000, dtype=torch.float64)])[:7]
    torch.save(weights, tmp_path / "theirs.pth")
    run(monkeypatch, tmp_path / "theirs.pth", tmp_path / "ours.pth", "--num-classes", 7)
    assert (tmp_path / "theirs.pth").stat().st_size - (tmp_path / "ours.pth").stat().st_size > 7_900_000
