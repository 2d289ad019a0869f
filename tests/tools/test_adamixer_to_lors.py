"""The warm start of a whole detector: outputs, what is copied, what is refused, what is left on the disk."""

import sys

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, load_config, load_tool, random_lors
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdet_lors.analysis.complexity import build_on_meta
from mmdet_lors.conversion.folding import folded_state_dict
from mmdet_lors.conversion.warm_start import WEIGHTS, start_from_plain_
from mmdet_lors.engine.checkpoint.reading import check_fit, read_checkpoint
from mmdet_lors.errors import UserError

TOOL = "model_converters/adamixer_to_lors.py"


def lors_config(**lors):
    cfg = load_config(LORS_DIGITS)
    cfg.model.decoder.lors = lors or dict(
        adaptive=dict(rank=2, groups=[1, 0, 1]), static=dict(rank=2, groups=[1, 2, 0])
    )
    return cfg


def plain_checkpoint(path, weights=None):
    if weights is None:
        model = MODELS.build(load_config(PLAIN_DIGITS).model)
        model.init_weights()
        weights = model.state_dict()
    torch.save(dict(meta=dict(epoch=12, dataset_meta=dict(classes=("0", "1"))), state_dict=weights), path)
    return path


def convert(monkeypatch, root, *arguments):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["adamixer_to_lors.py", *map(str, arguments)])
    load_tool(TOOL).main()


@pytest.mark.parametrize(
    "lors",
    [{}, dict(adaptive=dict(rank=2, groups=1)), dict(static=dict(rank=2, groups=1)), dict(static=dict(shared=False))],
)
def test_a_folded_lors_detector_comes_back(lors):
    cfg = lors_config(**lors)
    true, ours = random_lors(cfg.model), MODELS.build(cfg.model).eval()
    errors = start_from_plain_(ours, folded_state_dict(true), turns=60)
    assert max(e.fitted for e in errors.values()) < 1e-4
    assert len(errors) == 3 * (2 * (true.decoder.lorsa is not None) + (true.decoder.lorst is not None))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for output, expected in zip(ours._forward(images), true._forward(images), strict=True):
            assert torch.allclose(output.cls_score, expected.cls_score, atol=1e-3)
            assert torch.allclose(output.bboxes, expected.bboxes, atol=1e-2)


def test_published_adamixers_have_a_config_to_start():
    """At full size, 4 groups of 32 points: everything finds its place, and errors are those of the folded weights."""
    plain = build_on_meta(load_config("configs/adamixer/adamixer_r50_100-queries_1x_coco.py").model).state_dict()
    weights = {key: torch.randn(value.shape).mul_(0.02) for key, value in plain.items()}
    cfg = load_config("configs/lors/adamixer-lors_r50_100-queries_4x32_1x_coco.py")
    model = MODELS.build(cfg.model)
    errors = start_from_plain_(model, weights, turns=1)
    assert len(errors) == 18 and all(error.fitted < error.mean < 1 for error in errors.values())
    folded = folded_state_dict(model)
    assert {key: value.shape for key, value in folded.items()} == {key: value.shape for key, value in plain.items()}
    name = "decoder.stages.2.mixing.out_proj.weight"
    rest = (folded[name] - weights[name]).norm() / weights[name].norm()
    assert rest.item() == pytest.approx(errors[2, WEIGHTS[2]].fitted, rel=1e-3)


def test_writes_a_checkpoint_that_fits_and_copies_the_rest(tmp_path, monkeypatch, root, capsys):
    checkpoint, out = plain_checkpoint(tmp_path / "plain.pth"), tmp_path / "lors.pth"
    convert(monkeypatch, root, PLAIN_DIGITS, checkpoint, LORS_DIGITS, out, "--turns", 2)
    written = read_checkpoint(out)
    check_fit(MODELS.build(load_config(LORS_DIGITS).model), written, out)
    plain = read_checkpoint(checkpoint)["state_dict"]
    copied = [k for k in written["state_dict"] if not k.startswith(("decoder.lorsa", "decoder.lorst"))]
    assert len(copied) > 100 and all(torch.equal(written["state_dict"][k], plain[k]) for k in copied)
    assert written["meta"]["dataset_meta"] == dict(classes=("0", "1"))
    printed = capsys.readouterr().out
    assert printed.count("S (spatial mixing)") == printed.count("W_out (output projection)") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lors.pth", "plain.pth"]


def test_a_new_style_config_has_the_stages_of_its_classic_twin(tmp_path, monkeypatch, root):
    plain, out = plain_checkpoint(tmp_path / "plain.pth"), tmp_path / "lors.pth"
    new_style = "configs/lors/adamixer_lors_r18_digits_new_style.py"
    convert(monkeypatch, root, PLAIN_DIGITS, plain, new_style, out, "--turns", 1)
    assert out.is_file()


@pytest.mark.parametrize("halves", [("adaptive", "static"), ("adaptive",), ("static",)])
def test_ranks_within_a_budget(halves, tmp_path, monkeypatch, root, capsys):
    cfg = load_config(LORS_DIGITS)
    for half in {"adaptive", "static"} - set(halves):
        cfg.model.decoder.lors[half] = None
    cfg.dump(tmp_path / "lors_config.py")
    checkpoint, out = plain_checkpoint(tmp_path / "plain.pth"), tmp_path / "lors.pth"
    convert(
        monkeypatch, root, PLAIN_DIGITS, checkpoint, tmp_path / "lors_config.py", out, "--turns", 1, "--params", "90%"
    )
    chosen = Config.fromfile(out.with_suffix(".py")).model
    model, plain = MODELS.build(chosen), build_on_meta(load_config(PLAIN_DIGITS).model)
    check_fit(model, read_checkpoint(out), out)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, plain)]
    assert 0.89 < sizes[0] / sizes[1] <= 0.9
    printed = capsys.readouterr().out
    assert f"model = dict(decoder=dict(lors={chosen.decoder.lors.to_dict()}))" in printed
    assert f"{sizes[0]:,} parameters; wrote {out}" in printed
    assert all(len(chosen.decoder.lors[half].rank) == 3 for half in halves)


def test_refuses_a_budget(tmp_path, monkeypatch, root):
    plain = plain_checkpoint(tmp_path / "plain.pth")
    alone = load_config(LORS_DIGITS)
    alone.model.decoder.lors.static.shared = False
    alone.dump(tmp_path / "alone.py")
    for config, name, params, message in (
        (LORS_DIGITS, "lors.pth", "half", "--params 'half' must be a number, such as 30M, 900k or 60%"),
        (LORS_DIGITS, "lors.pth", "101%", "--params 101% is above the 1,905,078 of configs/adamixer"),
        (LORS_DIGITS, "lors.pth", "900k", "900,000 parameters are below the .* of LORS_CONFIG without private parts"),
        (LORS_DIGITS, "lors.bin", "90%", "OUT .*lors.bin: must end with .pth"),
        (tmp_path / "alone.py", "lors.pth", "90%", "a budget needs shared weights, but lors.static has shared=False"),
    ):
        with pytest.raises(UserError, match=message):
            convert(monkeypatch, root, PLAIN_DIGITS, plain, config, tmp_path / name, "--params", params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.py", "plain.pth"]


def nan_weights() -> dict:
    weights = MODELS.build(load_config(PLAIN_DIGITS).model).state_dict()
    weights["decoder.stages.1.mixing.out_proj.weight"][0, 0] = float("nan")
    return weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PLAIN_DIGITS, "none.pth", LORS_DIGITS), r"checkpoint .*none.pth does not exist"),
        (("configs/none.py", "plain.pth", LORS_DIGITS), r"config configs/none.py does not exist"),
        ((LORS_DIGITS, "plain.pth", LORS_DIGITS), r"model.decoder.lors is set; CONFIG must be a plain AdaMixer"),
        ((PLAIN_DIGITS, "plain.pth", PLAIN_DIGITS), r"model.decoder.lors is not set"),
        (
            (PLAIN_DIGITS, "plain.pth", "configs/lors/adamixer-lors_r50_100-queries_1x_coco.py"),
            r"model.decoder.num_stages is 3 in .*digits.py and 6 in",
        ),
        (
            ("configs/adamixer/adamixer_r50_100-queries_1x_coco.py", "plain.pth",
             "configs/lors/adamixer-lors_r50_100-queries_1x_coco.py"),
            r"model.decoder.stage.in_points is 32 in .* and 64 in .*: a warm start needs equal stages",
        ),
        ((PLAIN_DIGITS, "lors.pth", LORS_DIGITS), r"of another architecture: keys 12 missing .* unexpected"),
        ((PLAIN_DIGITS, "nan.pth", LORS_DIGITS), r"mixing.out_proj.weight holds values that are not finite"),
        ((PLAIN_DIGITS, "short.pth", LORS_DIGITS), r"it is cut short, damaged or not a checkpoint"),
        (("configs/_base_/schedules/adamixer_1x.py", "plain.pth", LORS_DIGITS), r"adamixer_1x.py has no model"),
    ],
)  # fmt: skip
def test_refuses_and_leaves_nothing_behind(arguments, message, tmp_path, monkeypatch, root):
    config, name, lors = arguments
    if name == "plain.pth":
        plain_checkpoint(tmp_path / name)
    elif name == "lors.pth":
        torch.save(dict(state_dict=MODELS.build(load_config(LORS_DIGITS).model).state_dict()), tmp_path / name)
    elif name == "nan.pth":
        plain_checkpoint(tmp_path / name, nan_weights())
    elif name == "short.pth":
        whole = plain_checkpoint(tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=message):
        convert(monkeypatch, root, config, tmp_path / name, lors, out / "lors.pth")
    assert not list(out.iterdir())


def test_refuses_bad_options(tmp_path, monkeypatch, root):
    for arguments, message in (
        (("c", "p", "l", tmp_path / "missing" / "out.pth"), "must be a file in a folder that exists"),
        (("c", "p", "l", tmp_path), "must be a file in a folder that exists"),
        (("c", "p", "l", tmp_path / "out.pth", "--turns", "0"), "--turns must be 1 or more, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            convert(monkeypatch, root, *arguments)
