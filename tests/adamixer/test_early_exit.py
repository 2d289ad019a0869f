"""Early exit: the stages and queries that are left compute what they would have, and training does not notice."""

import pytest
import torch
from conftest import LORS_DIGITS, ROOT, data_samples, load_config, load_tool, random_lors, refused
from mmdet.registry import MODELS

from mmdet_lors.adamixer.early_exit import EarlyExit
from mmdet_lors.adamixer.sampling.backends import arrange
from mmdet_lors.conversion.export import TensorDetector
from mmdet_lors.errors import UserError
from mmdet_lors.lors.serving import serve

TOOL = "analysis_tools/early_exit.py"
IMAGES = torch.randn(2, 3, 64, 96)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = random_lors(load_config(LORS_DIGITS).model)
    for stage in built.decoder.stages:
        torch.nn.init.normal_(stage.reg_branch[-1].weight, std=0.02)
        torch.nn.init.normal_(stage.cls_branch[-1].weight, std=0.3)
    return built


@pytest.fixture(autouse=True)
def _as_before(model):
    yield
    model.decoder.set_test_cfg(**load_config(LORS_DIGITS).model.test_cfg)
    serve(model.eval(), False)


def detect(model, **test_cfg):
    model.decoder.set_test_cfg(**test_cfg)
    with torch.no_grad():
        return model.decoder.detect(*model._start(IMAGES, None))


@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_fewer_stages_say_what_they_say_on_the_way(model, num_stages, served):
    with torch.no_grad():
        expected = model._forward(IMAGES)[num_stages - 1]
    serve(model, served)
    boxes, scores, labels = detect(model, num_stages=num_stages)
    best, index = expected.cls_score.sigmoid().flatten(1).topk(100)
    assert torch.allclose(scores, best, atol=1e-5)
    if not served:
        assert torch.equal(labels, index % 10)
        assert torch.equal(boxes, expected.bboxes.gather(1, (index // 10)[..., None].expand(-1, -1, 4)))


def test_the_best_queries_go_on_alone(model):
    decoder, (feats, xyzr, content) = model.decoder, model._start(IMAGES, None)
    with torch.no_grad():
        outputs = decoder(feats, xyzr, content, EarlyExit(3, [7, 4]))
        first = decoder(feats, xyzr, content)[0]
        best = first.cls_score.max(dim=2).values.argsort(dim=1, descending=True)[:, :7]
        rows = torch.arange(2)[:, None]
        # Stage 1 again, as the only one: on the seven best of each image, and no others.
        decoder.early_exit = EarlyExit(3)
        stage, pyramid = decoder.stages[1], arrange(feats, decoder.featmap_strides, 2, decoder.sampling)
        expected = stage(
            pyramid, first.xyzr[rows, best], first.content[rows, best],
            lambda q: decoder.lorsa(q, layer=1), lambda x: decoder.lorst(x, layer=1),
        )  # fmt: skip
    assert [output.cls_score.shape[1] for output in outputs] == [20, 7, 4]
    for found, value in zip((outputs[1].cls_score, outputs[1].xyzr, outputs[1].content), expected, strict=True):
        assert torch.allclose(found, value, atol=1e-5)


def test_keeping_all_queries_changes_nothing_but_their_order(model):
    whole, kept = detect(model), detect(model, keep_queries=[20, 20])
    assert torch.allclose(whole[1], kept[1], atol=1e-5) and torch.allclose(whole[0], kept[0], atol=1e-3)


def test_training_and_raw_outputs_go_all_the_way(model):
    samples = data_samples([2, 3], (64, 96), 10)
    whole = model.loss(IMAGES, samples)
    model.decoder.set_test_cfg(num_stages=1)
    assert all(torch.equal(value, whole[name]) for name, value in model.loss(IMAGES, samples).items())
    assert len(model._forward(IMAGES)) == 3


@torch.no_grad()
def test_from_config_to_predictions_and_export(model):
    cfg = load_config(LORS_DIGITS).model
    early = MODELS.build(cfg | dict(test_cfg=dict(num_stages=2, keep_queries=[6], max_per_img=30))).eval()
    early.load_state_dict(model.state_dict())
    boxes, scores, _ = detect(model, num_stages=2, keep_queries=[6], max_per_img=30)
    samples = early.predict(IMAGES, data_samples([0, 0], (64, 96), 10), rescale=False)
    assert torch.equal(torch.stack([s.pred_instances.bboxes for s in samples]), boxes)
    exported = TensorDetector(early, {})
    assert torch.equal(exported(IMAGES.flip(1))[1], scores) and scores.shape == (2, 30)


@pytest.mark.parametrize(
    ("test_cfg", "message"),
    [
        (dict(num_stages=0), "num_stages must be a whole number from 1, got 0"),
        (dict(num_stages=True), "num_stages must be a whole number from 1, got True"),
        (dict(num_stages=4), "num_stages is 4, but the decoder has 3 stages"),
        (dict(num_stage=2), "test_cfg.num_stage is unknown; known: max_per_img, num_stages, keep_queries"),
        (dict(keep_queries=10), "keep_queries must be a list of whole numbers from 1, got 10"),
        (dict(keep_queries=[10, 0]), "keep_queries must be a list of whole numbers from 1"),
        (dict(keep_queries=[10]), "keep_queries has 1 numbers; 3 stages need 2"),
        (dict(num_stages=2, keep_queries=[10, 5]), "keep_queries has 2 numbers; 2 stages need 1"),
        (dict(keep_queries=[5, 10]), "keep_queries [5, 10] must not grow"),
        (dict(keep_queries=[30, 10]), "keep_queries begins with 30, but there are 20 queries"),
    ],
)
def test_refuses(test_cfg, message):
    with pytest.raises(UserError) as error:
        MODELS.build(load_config(LORS_DIGITS).model | dict(test_cfg=test_cfg))
    assert message in str(error.value)


def test_the_tool_has_a_row_for_every_setting(model, tiny_digits, tmp_path, call_tool, capsys):
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "model.pth")
    options = [f"test_dataloader.dataset.data_root={tiny_digits}/", "test_dataloader.num_workers=0"]
    options += [
        "test_dataloader.persistent_workers=False",
        f"test_evaluator.ann_file={tiny_digits}/annotations/val.json",
    ]
    call_tool(TOOL, LORS_DIGITS, tmp_path / "model.pth", "--keep-queries", "9", "8,4", "--rounds", "1", "--cfg-options",
              *options)  # fmt: skip
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [row[:2] for row in rows if row]
    assert rows == [["3", "all"], ["2", "all"], ["1", "all"], ["3", "9 9"], ["3", "8 4"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds and --batches must be 1 or more"),
        (["--num-stages", "4"], "num_stages is 4, but the decoder has 3 stages"),
        (["--keep-queries", "5,10"], "must not grow"),
    ],
)
def test_the_tool_names_mistakes(arguments, message, monkeypatch, capsys):
    config = str(ROOT / LORS_DIGITS)
    assert message in refused(TOOL, [config, "none.pth", *arguments], monkeypatch, capsys)


def test_the_tool_refuses_other_detectors(monkeypatch, capsys):
    load_tool(TOOL)
    other = str(next((ROOT / "configs").rglob("vit-lors_digits.py")))
    assert "is not an AdaMixer" in refused(TOOL, [other, "none.pth"], monkeypatch, capsys)
