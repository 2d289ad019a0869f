"""The points that are drawn are those that the stages sampled; the arguments that are refused."""

from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, is_picture, load_config, load_tool, random_lors, refused
from torch import nn

from mmdet_lors.adamixer import sampling
from mmdet_lors.adamixer.sampling.backends import level_weights

TOOL = "analysis_tools/show_sampling.py"
VIT = "configs/classification/vit-lors_digits.py"


@pytest.fixture
def picture(tmp_path) -> Path:
    """Noise of 60 x 48 pixels, which the digits' pipeline enlarges to 96 x 77."""
    path = tmp_path / "noise.png"
    mmcv.imwrite(np.random.default_rng(0).integers(0, 255, (48, 60, 3), dtype=np.uint8), str(path))
    return path


def trained(name: str, path: Path) -> nn.Module:
    """A model that has moved away from its start, and its checkpoint in a file."""
    model = random_lors(load_config(name).model)
    for stage in model.decoder.stages:
        nn.init.normal_(stage.sampling.offset.weight, std=0.1)
        nn.init.normal_(stage.reg_branch[-1].weight, std=0.1)
    torch.save(dict(meta=dict(dataset_meta=dict(classes=tuple("abcdefghij"))), state_dict=model.state_dict()), path)
    return model


@pytest.mark.parametrize("config", [PLAIN_DIGITS, LORS_DIGITS])
def test_points_shown_are_the_points_sampled(config, picture, tmp_path, monkeypatch):
    tool = load_tool(TOOL)
    trained(config, tmp_path / "model.pth")
    model, classes = tool.load(load_config(config), str(tmp_path / "model.pth"))
    assert classes == tuple("abcdefghij")
    seen, sample_3d = [], sampling.sample_3d

    def recording(pyramid, points):
        seen.append(points)
        return sample_3d(pyramid, points)

    monkeypatch.setattr(sampling, "sample_3d", recording)
    views = tool.look(model, str(picture))
    assert len(views) == len(seen) == 3
    scale = torch.tensor([96 / 60, 77 / 48])
    for view, points in zip(views, seen, strict=True):
        assert view.points.shape == (20, *points.shape[2:])
        torch.testing.assert_close(view.points[..., :2] * scale, points[0, ..., :2])
        assert torch.equal(view.points[..., 2], points[0, ..., 2])
        assert torch.equal(view.weights, level_weights(points[0, ..., 2], torch.tensor([4, 8, 16])))
    assert torch.allclose(views[0].sampled_from, torch.tensor([0.0, 0.0, 60.0, 48.0]), atol=1e-3)
    for before, after in zip(views, views[1:], strict=False):
        assert torch.equal(before.predicted, after.sampled_from)
    assert not model.decoder._forward_hooks and not model.decoder.stages[0].sampling._forward_hooks


def test_best_queries_are_those_of_the_highest_scores():
    choose = load_tool(TOOL).choose_queries
    scores = torch.tensor([[0.1, 0.2], [0.9, 0.1], [0.3, 0.5]])
    assert choose(["best", "2"], scores) == [1, 2]
    assert choose(["2", "0"], scores) == [2, 0]


def test_sampling_draws_a_grid(picture, tmp_path, call_tool, capsys):
    trained(LORS_DIGITS, tmp_path / "model.pth")
    for options in ((), ("--zoom", "--levels", "--queries", "3", "7", "--stages", "0", "2")):
        call_tool(TOOL, picture, LORS_DIGITS, tmp_path / "model.pth", "--out", tmp_path / "out.png", *options)
        assert is_picture(tmp_path / "out.png")
    tool = load_tool(TOOL)
    model, classes = tool.load(load_config(LORS_DIGITS), str(tmp_path / "model.pth"))
    views = tool.look(model, str(picture))
    figure = tool.draw(mmcv.imread(str(picture)), views, [3, 7], [0, 2], (4, 8, 16), classes)
    assert [ax.get_title()[:7] for ax in figure.axes[:4]] == ["stage 0", "stage 2"] * 2
    for ax, (query, stage) in zip(figure.axes, ((3, 0), (3, 2), (7, 0), (7, 2)), strict=False):
        drawn = sum(len(dots.get_offsets()) for dots in ax.collections)
        assert drawn == views[stage].points[query, ..., 0].numel()
    printed = capsys.readouterr().out
    score = views[2].scores[7].max().item()
    assert f"│     7 │     2 │ {score:.3f} │ {views[2].points[7, ..., 2].mean():.2f} " in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.png", LORS_DIGITS, "none.pth"), "image none.png does not exist"),
        ((LORS_DIGITS, LORS_DIGITS, "none.pth"), "cannot be read: it is not a picture"),
        (("{}", LORS_DIGITS, "none.pth"), "checkpoint none.pth does not exist"),
        (("{}", LORS_DIGITS, "none.pth", "--stages", "3"), "--stages 3: the model has stages 0 to 2"),
        (("{}", LORS_DIGITS, "none.pth", "--queries", "20"), "--queries 20: the model has queries 0 to 19"),
        (("{}", LORS_DIGITS, "none.pth", "--queries", "best", "0"), "--queries best 0: K must be 1 to 20"),
        (("{}", LORS_DIGITS, "none.pth", "--queries", "worst"), "--queries worst: must be 'best K' or numbers"),
        (("{}", VIT, "none.pth"), "has no model.decoder: it is not an AdaMixer"),
        (("{}", LORS_DIGITS, "none.pth", "--out", "x.gif"), "--out x.gif: must end with .png or"),
        (("{}", LORS_DIGITS, "none.pth", "--out", "none/x.png"), "must be a file in a folder that exists"),
    ],
)
def test_sampling_refuses(arguments, message, picture, tmp_path, monkeypatch, root, capsys):
    monkeypatch.chdir(root)
    arguments = [argument.format(picture) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out.png")]
    assert message in refused(TOOL, arguments, monkeypatch, capsys)
    assert not (tmp_path / "out.png").exists()
