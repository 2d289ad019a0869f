"""Exporting to ONNX: the file gives what the trained detector gives, and what cannot be exported is refused."""

import math
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, load_config, load_tool, random_lors, refused
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from PIL import Image
from torch import nn

from mmdet_lors.conversion.export import TensorDetector
from mmdet_lors.conversion.onnx_precision import INT8, picture, to_fp16
from mmdet_lors.errors import UserError
from mmdet_lors.inference.sources import images_in
from mmdet_lors.lors import fold_stack

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOOL = "deployment/export_onnx.py"
SIZE = (96, 64)


def spread_out(model):
    """Boxes, scores and sampling points that differ from query to query and image to image."""
    for stage in model.decoder.stages:
        for layer, std in ((stage.reg_branch[-1], 0.02), (stage.sampling.offset, 0.05), (stage.cls_branch[-1], 0.3)):
            nn.init.normal_(layer.weight, std=std)
    return model


def predictions(model, images):
    """What mmdet predicts for RGB images as it reads them: uint8, BGR, through the data preprocessor."""
    height, width = images.shape[-2:]
    meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
    samples = [DetDataSample(metainfo=meta) for _ in images]
    return [s.pred_instances for s in model.test_step(dict(inputs=list(images.flip(1).byte()), data_samples=samples))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, root):
    """LORS on the digits, its checkpoint, and the files that the tool wrote: dynamic in the batch, one in the size."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    model = spread_out(random_lors(load_config(LORS_DIGITS).model))
    torch.save(dict(state_dict=model.state_dict()), folder / "lors.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, options in (("lors.onnx", []), ("factored.onnx", ["--factored", "--dynamic-size"])):
            arguments = [LORS_DIGITS, folder / "lors.pth", folder / name, "--size", "96x64", *options]
            patch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
            load_tool(TOOL).main()
    assert sorted(p.name for p in folder.iterdir()) == ["factored.onnx", "lors.onnx", "lors.pth"]
    return model, folder


def numbers(graph):
    """How many a graph keeps in its initialisers."""
    return sum(math.prod(weight.dims) for weight in graph.initializer)


@pytest.mark.parametrize("name", ["lors.onnx", "factored.onnx"])
@pytest.mark.parametrize("batch", [1, 3])
def test_file_predicts_what_mmdet_predicts(batch, name, exported):
    model, folder = exported
    images = torch.randint(256, (batch, 3, *SIZE[::-1])).float()
    session = onnxruntime.InferenceSession(folder / name)
    outputs = session.run(["boxes", "scores", "labels"], {"images": images.numpy()})
    assert [o.shape for o in outputs] == [(batch, 20, 4), (batch, 20), (batch, 20)]
    for expected, boxes, scores, labels in zip(
        predictions(model, images), *map(torch.from_numpy, outputs), strict=True
    ):
        assert expected.bboxes.std(dim=0).min() > 1 and expected.scores.std() > 1e-2
        assert torch.equal(labels, expected.labels)
        assert torch.allclose(scores, expected.scores, atol=1e-3)
        assert torch.allclose(boxes, expected.bboxes, atol=0.1)


@pytest.mark.parametrize("name", ["lors.onnx", "factored.onnx"])
def test_openvino_runs_the_same_file(name, exported):
    openvino = pytest.importorskip("openvino")
    _, folder = exported
    images = torch.randint(256, (3, 3, *SIZE[::-1])).float().numpy()
    expected = onnxruntime.InferenceSession(folder / name).run(["boxes", "scores", "labels"], {"images": images})
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(folder / name, "CPU", settings)({"images": images})
    for output, values, tolerance in zip(("boxes", "scores", "labels"), expected, (0.1, 1e-3, 0), strict=True):
        assert torch.allclose(torch.from_numpy(found[output]), torch.from_numpy(values), rtol=0, atol=tolerance)


def test_file_holds_the_folded_weights_of_every_stage(exported):
    model, folder = exported
    graph = onnx.load(folder / "lors.onnx").graph
    sizes = graph.input[0].type.tensor_type.shape.dim
    assert sizes[0].dim_param == "batch" and (sizes[3].dim_value, sizes[2].dim_value) == SIZE
    shapes = [sorted(weight.dims) for weight in graph.initializer]
    generator, out_proj = [64, 2 * (32 * 32 + 32 * 16)], [64, 2 * 32 * 32]
    assert shapes.count(generator) == shapes.count(out_proj) == len(model.decoder.stages)


def test_only_a_dynamic_size_takes_other_sizes(exported):
    model, folder = exported
    tool, trained = load_tool(TOOL), TensorDetector(model, load_config(LORS_DIGITS).model.data_preprocessor)
    images = tool.inputs(2, (160, 224), [])
    tool.check(folder / "factored.onnx", trained, images, 1e-3)
    with pytest.raises(UserError, match=r"onnxruntime cannot run the export at batch 2 of 160x224"):
        tool.check(folder / "lors.onnx", trained, images, 1e-3)


SWIN = """type="SwinTransformer", embed_dims=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8), out_indices=(0, 1, 2)"""
VIT = """type="ViTPyramid", model_name="vit_tiny_patch16_224", vit=dict(depth=1, embed_dim=32, num_heads=2)"""
PELA = """type="PELABackbone", ratio=1.5, omit=["norm", "patch_embed"]"""


@pytest.fixture
def export_with(tmp_path, call_tool, root):
    """Exports LORS with another backbone, one stage and random weights to out.onnx; the tool itself compares it."""

    def export(backbone, channels, *options):
        config = tmp_path / "config.py"
        config.write_text(f"""_base_ = "{root / LORS_DIGITS}"
decoder = dict(num_stages=1, featmap_strides={[4, 8, 16, 32][: len(channels)]},
               lors=dict(adaptive=dict(groups=[1]), static=dict(groups=1)))
model = dict(backbone=dict(_delete_=True, {backbone}), neck=dict(in_channels={channels}), decoder=decoder)""")
        model = spread_out(random_lors(Config.fromfile(config).model))
        torch.save(dict(state_dict=model.state_dict()), tmp_path / "lors.pth")
        call_tool(TOOL, config, tmp_path / "lors.pth", tmp_path / "out.onnx", "--size", "96x64", *options)
        return onnx.load(tmp_path / "out.onnx").graph

    return export


def types_of_weights(graph):
    """Type -> how many numbers the initialisers of that type have."""
    found = Counter()
    for weight in graph.initializer:
        found[onnx.TensorProto.DataType.Name(weight.data_type)] += math.prod(weight.dims)
    return found


def test_swin_takes_any_batch_and_size(export_with, capsys):
    """mmdet's own code makes a constant of the batch, and of padding to whole windows, which 224 pixels do not need."""
    export_with(SWIN, [16, 32, 64], "--factored", "--dynamic-size", "--size", "224x448")
    out = capsys.readouterr().out
    assert "at batch 3 of 224x448" in out and "at batch 3 of 32x32" in out
    assert ShiftWindowMSA.window_reverse.__module__.startswith("mmdet.")


def test_vit_pyramid_in_half_precision(export_with):
    weights = types_of_weights(export_with(VIT, [8, 16, 32, 32], "--precision", "fp16", "--fixed-batch", "2"))
    assert weights["FLOAT16"] > 10 * weights["FLOAT"]


def test_pela_with_int8_weights(export_with, tiny_digits, capsys):
    backbone = f"{PELA}, backbone=dict({VIT})"
    options = ["--precision", "int8", "--calibration", tiny_digits / "val"]
    weights = types_of_weights(export_with(backbone, [8, 16, 32, 32], *options))
    assert weights["INT8"] > 10 * weights["FLOAT"]
    assert "held to no limit" in capsys.readouterr().out


def test_factored_file_is_as_small_as_the_checkpoint(exported):
    model, folder = exported
    path = folder / "factored.onnx"
    parameters = sum(p.numel() for p in model.parameters())
    assert numbers(onnx.load(path).graph) < 1.01 * parameters
    assert path.stat().st_size < 4 * 1.1 * parameters
    assert b"site-packages" not in path.read_bytes()


def opened(path):
    """The graph that onnxruntime makes of a file when it opens it."""
    options = onnxruntime.SessionOptions()  # all others as a user has them
    options.optimized_model_filepath = f"{path}.opened"
    onnxruntime.InferenceSession(path, options)
    graph = onnx.load(options.optimized_model_filepath).graph
    Path(options.optimized_model_filepath).unlink()
    return graph


def test_factored_file_is_the_folded_one_once_it_is_open(exported):
    folder = exported[1]
    graphs = factored, folded = opened(folder / "factored.onnx"), opened(folder / "lors.onnx")
    assert numbers(onnx.load(folder / "factored.onnx").graph) < 0.8 * numbers(folded)
    assert numbers(factored) == pytest.approx(numbers(folded), rel=1e-3)
    # One more product a stage: M and S have a Linear each.
    products = [sum(node.op_type in ("MatMul", "Gemm", "FusedMatMul") for node in graph.node) for graph in graphs]
    assert products[0] <= products[1] + len(exported[0].decoder.stages)


def test_half_precision_halves_a_factored_file_and_spares_boxes(exported, tmp_path):
    model, folder = exported
    half, whole = tmp_path / "half.onnx", folder / "factored.onnx"
    shutil.copy(whole, half)
    to_fp16(half)
    onnx.checker.check_model(onnx.load(half), full_check=True)
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    assert numbers(opened(half)) == pytest.approx(numbers(opened(folder / "lors.onnx")), rel=1e-3)
    tool = load_tool(TOOL)
    trained = TensorDetector(model, load_config(LORS_DIGITS).model.data_preprocessor)
    tool.check(half, trained, tool.inputs(2, SIZE, []), tool.TOLERANCES["fp16"])
    # Above 2048, float16 has no odd numbers.
    images = tool.inputs(1, (4096, 32), []).numpy()
    boxes = onnxruntime.InferenceSession(half).run(["boxes"], {"images": images})[0]
    far = boxes[boxes > 2048]
    assert len(far) and (far % 2 > 0).mean() > 0.9


def test_int8_file_is_quantised_in_products_with_weights_alone(exported, tmp_path, tiny_digits):
    model, folder = exported
    path = tmp_path / "int8.onnx"
    shutil.copy(folder / "lors.onnx", path)
    tool, pictures = load_tool(TOOL), images_in(tiny_digits / "val")
    tool.convert(path, "int8", pictures, SIZE, 1)
    assert path.stat().st_size < 0.35 * (folder / "lors.onnx").stat().st_size
    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    quantised = {op: Counter() for op in INT8}
    for node in graph.node:
        if node.op_type in INT8:
            quantised[node.op_type][tuple(makers.get(name) == "DequantizeLinear" for name in node.input[:2])] += 1
    assert set(quantised["Conv"]) == set(quantised["Gemm"]) == {(True, True)}
    # Scores of attention and their product with values, and the two mixings.
    assert quantised["MatMul"].pop((False, False)) == 4 * len(model.decoder.stages)
    assert set(quantised["MatMul"]) == {(True, True)}
    trained = TensorDetector(model, load_config(LORS_DIGITS).model.data_preprocessor)
    by_score, _ = tool.check(path, trained, tool.inputs(2, SIZE, pictures), 1e30)
    assert 0 < by_score < 0.1


def test_a_picture_is_read_as_files_take_it(tmp_path):
    Image.new("RGB", (96, 96), (255, 0, 10)).save(tmp_path / "image.png")
    found = picture(str(tmp_path / "image.png"), SIZE)
    assert found.shape == (1, 3, *SIZE[::-1]) and found.dtype.name == "float32"
    assert [found[0, c].min() for c in range(3)] == [found[0, c].max() for c in range(3)] == [255, 0, 10]


def test_an_unreadable_calibration_picture_is_refused(exported, tmp_path, monkeypatch, root):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "broken.png").write_text("text")
    monkeypatch.chdir(root)
    tool = load_tool(TOOL)
    monkeypatch.setattr(tool, "export", lambda model, path, *_: shutil.copy(exported[1] / "lors.onnx", path))
    arguments = [LORS_DIGITS, exported[1] / "lors.pth", tmp_path / "out.onnx", "--size", "96x64"]
    arguments += ["--precision", "int8", "--calibration", tmp_path / "pictures"]
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    with pytest.raises(UserError, match=r"broken\.png cannot be read as an image"):
        tool.main()
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]


def test_factored_without_lors_is_refused(tmp_path, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    torch.save(dict(state_dict=MODELS.build(load_config(PLAIN_DIGITS).model).state_dict()), tmp_path / "plain.pth")
    arguments = [PLAIN_DIGITS, str(tmp_path / "plain.pth"), str(tmp_path / "out.onnx"), "--factored"]
    assert "--factored: model.decoder.lors is not set" in refused(TOOL, arguments, monkeypatch, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["plain.pth"]


def test_a_file_of_other_weights_is_refused_and_removed(exported, tmp_path, monkeypatch, root):
    model, folder = exported
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["decoder.stages.2.reg_branch.3.bias"][0] += 0.05
    torch.save(dict(state_dict=weights), tmp_path / "other.pth")
    monkeypatch.chdir(root)
    tool = load_tool(TOOL)
    monkeypatch.setattr(tool, "export", lambda model, path, *_: shutil.copy(folder / "lors.onnx", path))
    arguments = [LORS_DIGITS, tmp_path / "other.pth", tmp_path / "other.onnx", "--size", "96x64"]
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
    with pytest.raises(UserError, match=r"the export differs from PyTorch at batch 1 of 96x64: scores by .*, boxes by"):
        tool.main()
    assert [p.name for p in tmp_path.iterdir()] == ["other.pth"]


@pytest.mark.parametrize("preprocessor", [dict(bgr_to_rgb=True), dict(mean=[1, 2, 3], std=[4, 5, 6]), {}])
def test_images_are_normalised_as_mmdet_does(preprocessor):
    cfg = load_config(LORS_DIGITS).model
    cfg.data_preprocessor = dict(type="DetDataPreprocessor", **preprocessor)
    model = spread_out(random_lors(cfg))
    images = torch.randint(256, (2, 3, 64, 64)).float()
    with torch.no_grad():
        found = TensorDetector(model, cfg.data_preprocessor)(images)
    for expected, boxes, scores, labels in zip(predictions(model, images), *found, strict=True):
        assert torch.equal(labels, expected.labels)
        assert torch.allclose(scores, expected.scores, atol=1e-4)
        assert torch.allclose(boxes, expected.bboxes, atol=1e-2)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("out.onnx", ["--size", "100x64"], "--size '100x64' must be WIDTHxHEIGHT in pixels, both multiples of 32"),
        ("out.onnx", ["--size", "0x64"], "--size '0x64' must be WIDTHxHEIGHT in pixels, both multiples of 32"),
        ("out.onnx", ["--size", "64"], "--size '64' must be WIDTHxHEIGHT in pixels, both multiples of 32"),
        ("out.onnx", ["--fixed-batch", "0"], "--fixed-batch 0 must be 1 or more"),
        ("out.onnx", ["--opset", "11"], "--opset 11 must be 18 or more"),
        ("out.onnx", ["--precision", "int8"], "--precision int8 needs --calibration FOLDER"),
        ("out.onnx", ["--precision", "fp16", "--calibration", "data"], "no other precision takes it"),
        ("out.onnx", ["--precision", "int8", "--calibration", "none"], "folder none cannot be read"),
        ("out.onnx", ["--precision", "int8", "--factored"], "--precision int8: LORS's factors cannot be int8"),
        ("out.pth", [], "must end with .onnx"),
        ("none/out.onnx", [], "must be a file in a folder that exists"),
        ("out.onnx", [], "checkpoint none.pth does not exist"),
    ],
)
def test_refuses_and_leaves_nothing_behind(out, options, message, tmp_path, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    assert message in refused(TOOL, [LORS_DIGITS, "none.pth", str(tmp_path / out), *options], monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


DINO = "configs/lors/other_detectors/dino-lors_r18_digits.py"


@pytest.fixture
def dino(tmp_path, root):
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(root / DINO).model)
    private = [p for name, p in model.named_parameters() if ".private." in name]
    for parameter in [*private, model.level_embed, *(layer.weight for layer in model.bbox_head.cls_branches)]:
        nn.init.normal_(parameter, std=0.1)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "dino.pth")
    return model.eval(), str(tmp_path / "dino.pth")


def test_a_detr_with_lors_predicts_what_mmdet_predicts(dino, tmp_path, call_tool):
    model, checkpoint = dino
    call_tool(TOOL, DINO, checkpoint, tmp_path / "out.onnx", "--size", "96x64", "--fixed-batch", "2")
    images = torch.randint(256, (2, 3, *SIZE[::-1])).float()
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    outputs = map(torch.from_numpy, session.run(["boxes", "scores", "labels"], {"images": images.numpy()}))
    for expected, boxes, scores, labels in zip(predictions(model, images), *outputs, strict=True):
        assert expected.scores.std() > 1e-2 and expected.bboxes.std(dim=0).min() > 1
        assert torch.equal(labels, expected.labels) and torch.allclose(scores, expected.scores, atol=1e-5)
        assert torch.allclose(boxes, expected.bboxes, atol=1e-2)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert numbers(onnx.load(tmp_path / "out.onnx").graph) < 1.02 * size
    fold_stack([model])
    assert sum(parameter.numel() for parameter in model.parameters()) > 1.1 * size
    assert b"/mmdet/" not in (tmp_path / "out.onnx").read_bytes()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DINO, [], "a DETR is exported for one batch and size: give --fixed-batch, and no --dynamic-size"),
        (DINO, ["--fixed-batch", "1", "--dynamic-size"], "give --fixed-batch, and no --dynamic-size"),
        (DINO, ["--factored"], "--factored: for an AdaMixer; what a DETR's layers share is never folded"),
        ("configs/classification/vit_digits.py", [], "only an AdaMixer or a DETR can be exported, not TimmClassifier"),
        ("configs/_base_/schedules/adamixer_1x.py", [], "adamixer_1x.py has no model"),
    ],
)
def test_refuses_other_detectors(config, options, message, dino, tmp_path, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    arguments = [config, dino[1], str(tmp_path / "out.onnx"), "--size", "96x64", *options]
    assert message in refused(TOOL, arguments, monkeypatch, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dino.pth"]


def test_says_what_to_install(tmp_path, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setattr("importlib.util.find_spec", _without("onnxruntime"))
    message = refused(TOOL, [LORS_DIGITS, "none.pth", str(tmp_path / "out.onnx")], monkeypatch, capsys)
    assert "missing: onnxruntime; install" in message and "pip install mmdet_lors[export]" in message


def _without(name):
    """importlib's ``find_spec`` in an environment that lacks a package."""
    find_spec = __import__("importlib.util").util.find_spec
    return lambda wanted, *args: None if wanted == name else find_spec(wanted, *args)
