"""Similarities against formulas on the whole matrix, and the features of the tool against those of the model."""

from contextlib import contextmanager

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, is_picture, load_config, load_tool, refused, write_random_lors
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_lors.analysis.similarity import ClassSimilarity, Similarity, allocate, suggest

TOOL = "analysis_tools/show_features.py"
VIT = "configs/classification/vit-lors_digits.py"
DINO = "configs/lors/other_detectors/dino-lors_r18_digits.py"


def similarity(*places: torch.Tensor) -> Similarity:
    """Of features (B, N, C) at some places, taken one image at a time."""
    features = torch.stack(places, dim=1)
    found = Similarity(features.shape[1], features.shape[3])
    for image in features:
        found.add(image[None])
    return found


def direct_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = (z.double().flatten(0, 1) for z in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return ((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())).item()


def test_cka_is_that_of_the_whole_matrix():
    x, y = torch.randn(5, 7, 4) + 30, torch.randn(5, 7, 4) - 100
    found = similarity(x, y).cka()
    assert found.diagonal().tolist() == pytest.approx([1, 1])
    assert found[0, 1].item() == found[1, 0].item() == pytest.approx(direct_cka(x, y))
    assert 0 < found[0, 1] < 0.9


def test_cka_of_rotated_scaled_and_moved_features_is_1():
    x = torch.randn(5, 7, 4).double()
    rotation, _ = torch.linalg.qr(torch.randn(4, 4).double())
    assert similarity(x, 3 * x @ rotation - 2).cka()[0, 1].item() == pytest.approx(1)
    assert similarity(x, x * torch.tensor([9, 1, 1, 1])).cka()[0, 1].item() < 0.9


def test_features_without_anything_in_common():
    """Centred columns that are orthogonal, and features that are constant: 0, and no NaN."""
    a, b = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])
    x, y = (torch.stack([column, 2 * column], dim=1).expand(7, 4, 2) for column in (a, b))
    constant = torch.full((7, 4, 2), 3.3).double()  # whose sums are not exact
    found = similarity(x, y, constant, torch.zeros(7, 4, 2))
    expected = torch.zeros(4, 4).double()
    expected[0, 0] = expected[1, 1] = 1
    assert torch.allclose(found.cka(), expected, atol=1e-12)
    assert found.cosine()[2, 2].item() == pytest.approx(1) and found.cosine()[3].tolist() == [0] * 4


def test_cosines_are_means_over_tokens_and_pairs():
    x, y = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double()
    found = similarity(x, y)
    assert found.cosine()[0, 1].item() == pytest.approx(torch.cosine_similarity(x, y, dim=-1).mean().item())
    pairs = [torch.cosine_similarity(i[a], i[b], dim=0) for i in y for a in range(5) for b in range(a)]
    assert found.within_images()[1].item() == pytest.approx(torch.stack(pairs).mean().item())


def test_classes_are_compared_within_and_with_all():
    east, north = torch.tensor([[2.0, 0]]), torch.tensor([[0.0, 3]])
    found = ClassSimilarity()
    found.add(torch.stack([east, 5 * east, north]), torch.tensor([4, 4, 4]))
    found.add(torch.stack([north]), torch.tensor([1]))
    assert found.counts() == {1: 1, 4: 3}
    within = found.within()
    assert within[0].isnan().all() and within[1].tolist() == pytest.approx([1 / 3])
    assert found.overall().tolist() == pytest.approx([2 / 6])


def test_suggestion_grows_with_similarity_or_falls():
    """Similarity that grows linearly gives the paper's K for AdaMixer."""
    alike = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert suggest(alike, 12, alike_more=True) == [1, 1, 2, 2, 3, 3]
    assert suggest(alike, 12, alike_more=False) == [3, 3, 2, 2, 1, 1]
    assert suggest([0.5] * 3, 7, alike_more=True) == [3, 2, 2]
    assert suggest([0.3], 4, alike_more=False) == [4]


@pytest.mark.parametrize(("total", "expected"), [(2, [0, 1, 1]), (3, [1, 1, 1]), (11, [1, 3, 7])])
def test_allocation_adds_up(total, expected):
    assert allocate([0, 1, 3], total) == expected


@contextmanager
def hooked(module, outputs: list):
    """Append what the module returns."""
    hook = module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    yield
    hook.remove()


def test_queries_are_those_of_the_decoder(tmp_path):
    """Features, classes and K of a detector, against what its stages return."""
    tool = load_tool(TOOL)
    checkpoint = write_random_lors(tmp_path)
    cfg = load_config(LORS_DIGITS)
    cfg.model.test_cfg = dict(num_stages=2, keep_queries=[7])  # which the tool does not keep to
    model, inferencer = tool.load(cfg, checkpoint, tool.build_without_weights(cfg.model))
    images = list(torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8).numpy())
    outputs = []
    with torch.no_grad(), hooked(model.decoder, outputs):
        list(inferencer.stream(images))
    stages = [torch.cat([image[i].content for image in outputs]) for i in range(3)]
    best, label = torch.cat([image[-1].cls_score for image in outputs]).sigmoid().max(dim=-1)
    threshold = best.median().item()
    found = tool.measure(model, "decoder.stages", inferencer.stream(images), range(10), threshold)
    assert found.places == ["0", "1", "2", "out"] and found.tokens.images == 2 and found.tokens.tokens == 40
    start = model.query_generator([(64, 64)] * 2)[1].detach()
    assert found.tokens.cka()[1, 3].item() == pytest.approx(direct_cka(stages[0], stages[2]), rel=1e-5)
    cosine = torch.cosine_similarity(start, stages[1], dim=-1).mean().item()
    assert found.tokens.cosine()[0, 2].item() == pytest.approx(cosine, rel=1e-5, abs=1e-6)
    expected = label[best >= threshold].bincount().tolist()
    assert 0 < sum(expected) < 40
    assert found.classes.counts() == {i: n for i, n in enumerate(expected) if n}
    assert tool.budget(cfg.model, model, "decoder.stages", None) == {"adaptive": 4}


def test_detector_over_a_folder(tmp_path, tiny_digits, call_tool, capsys):
    checkpoint = write_random_lors(tmp_path)
    folder, out = tiny_digits / "val", tmp_path / "o.png"
    call_tool(TOOL, LORS_DIGITS, checkpoint, "--images", folder, "--number", 3, "--score-thr", 0, "--out", out)
    printed = capsys.readouterr().out
    assert "3 images, 60 tokens" in printed and "any │        60" in printed
    assert sum(groups_in(printed, "adaptive")) == 4
    assert is_picture(out)


def test_mlps_get_groups_where_tokens_differ():
    tool = load_tool(TOOL)
    apart, equal = torch.eye(2)[None], torch.ones(1, 2, 2)
    found = tool.Found(["0", "1", "out"], similarity(apart, equal, equal), ClassSimilarity(), [])
    budgets = {"attn.*": 6, "adaptive": 3, "mlp.*": 6, "ffn.0": 3}
    expected = {"attn.*": [1, 5], "adaptive": [1, 2], "mlp.*": [5, 1], "ffn.0": [2, 1]}
    assert tool.suggestions(found, budgets) == expected


def groups_in(printed: str, what: str) -> list[int]:
    """The suggested groups."""
    return [int(k) for k in printed.split(f"{what} groups=[")[1].split("]")[0].split(",")]


def test_vision_transformer_over_its_data_set(tmp_path, call_tool, capsys):
    """Instances are the images of the data set, and K sums to the config's per target."""
    model = MODELS.build(Config.fromfile(ROOT / VIT).model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    call_tool(TOOL, VIT, tmp_path / "model.pth", "--number", 20, "--out", tmp_path / "out.png")
    printed = capsys.readouterr().out
    assert "20 images, 340 tokens" in printed and "any │        20" in printed
    assert sum(groups_in(printed, "attn.*")) == sum(groups_in(printed, "mlp.*")) == 9
    assert is_picture(tmp_path / "out.png")


def test_queries_of_a_detr_have_classes(tmp_path, tiny_digits, call_tool, capsys):
    model = MODELS.build(load_config_of(DINO))
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    arguments = (DINO, tmp_path / "model.pth", "--images", tiny_digits / "val", "--number", 2, "--score-thr", 0)
    call_tool(TOOL, *arguments, "--total", 7, "--out", tmp_path / "out.png")
    printed = capsys.readouterr().out
    assert "any │        40" in printed
    assert sum(groups_in(printed, "ffn.*")) == sum(groups_in(printed, "self_attn.*")) == 7
    call_tool(TOOL, *arguments, "--layers", "encoder.layers", "--out", tmp_path / "out.png")
    printed = capsys.readouterr().out
    assert "any" not in printed and sum(groups_in(printed, "mlp")) == 2  # of one layer, whose tokens are no queries


def load_config_of(name: str) -> dict:
    return Config.fromfile(ROOT / name).model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LORS_DIGITS, "none.pth"), "checkpoint none.pth does not exist"),
        ((LORS_DIGITS, "README.md"), "checkpoint README.md is not a checkpoint"),
        (("none.py", "none.pth"), "config none.py does not exist"),
        (("configs/_base_/default_runtime.py", "none.pth"), "has no model"),
        ((LORS_DIGITS, "none.pth", "--number", "0"), "--number and --total must be 1 or more"),
        ((LORS_DIGITS, "none.pth", "--layers", "decoder.lorsa"), "is a LORSA, not an nn.ModuleList"),
        ((LORS_DIGITS, "none.pth", "--layers", "neck.x"), "--layers 'neck.x': ChannelMapping has no 'x'"),
        ((LORS_DIGITS, "none.pth", "--out", "none/x.png"), "--out none/x.png: must be a file in a folder that exists"),
        ((LORS_DIGITS, "none.pth", "--out", "x.txt"), "--out x.txt: must end with .png"),
    ],
)
def test_features_refuses(arguments, message, monkeypatch, root, capsys, tmp_path):
    monkeypatch.chdir(root)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out.png")]
    assert message in refused(TOOL, [*arguments, *out], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "{empty}"], "folder {empty} has no images"),
        (["--images", "{empty}/none"], "folder {empty}/none cannot be read"),
        (["--images", "{val}", "--layers", "backbone.layer1"], "take shape (1, 32, "),
    ],
)
def test_features_refuses_inputs(arguments, message, monkeypatch, root, capsys, tmp_path, tiny_digits):
    monkeypatch.chdir(root)
    names = dict(empty=tmp_path / "empty", val=tiny_digits / "val")
    names["empty"].mkdir()
    model = [LORS_DIGITS, write_random_lors(tmp_path), "--out", str(tmp_path / "out.png")]
    given = [argument.format(**names) for argument in arguments]
    assert message.format(**names) in refused(TOOL, model + given, monkeypatch, capsys)
    assert not (tmp_path / "out.png").exists()


def test_features_needs_a_stack_it_knows(monkeypatch, root, capsys, tmp_path):
    monkeypatch.chdir(root)
    (tmp_path / "rcnn.py").write_text('_base_ = "mmdet::_base_/models/faster-rcnn_r50_fpn.py"\n')
    arguments = [str(tmp_path / "rcnn.py"), "none.pth", "--out", str(tmp_path / "out.png")]
    assert "FasterRCNN has no stack of layers at decoder.stages" in refused(TOOL, arguments, monkeypatch, capsys)


def test_pictures_are_for_detectors(monkeypatch, root, capsys, tmp_path, tiny_digits):
    monkeypatch.chdir(root)
    model = MODELS.build(load_config_of(VIT))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    arguments = [
        VIT,
        str(tmp_path / "model.pth"),
        "--images",
        str(tiny_digits / "val"),
        "--out",
        str(tmp_path / "o.png"),
    ]
    assert "--images: TimmClassifier is not a detector" in refused(TOOL, arguments, monkeypatch, capsys)


def test_images_are_evenly_spaced():
    spread = load_tool(TOOL).spread
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread(range(3), 9) == [0, 1, 2] and spread([], 5) == []
    assert load_tool(TOOL).find_stack(MODELS.build(load_config(PLAIN_DIGITS).model), None) == "decoder.stages"
