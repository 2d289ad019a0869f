"""A published model: one folder that stands for config and checkpoint, equal to what it was made of."""

import json
import shutil

import pytest
import torch
from conftest import LORS_DIGITS, ROOT, load_config, load_tool, refused, write_random_lors
from mmdet.registry import MODELS
from mmengine.config import Config
from safetensors.torch import load_file, save_file

from mmdet_lors.engine.checkpoint.reading import Damaged, read_checkpoint
from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer, inferencer

TOOL = "model_converters/publish_model.py"
CLASSES = list("0123456789")


@pytest.fixture(scope="module")
def published(tmp_path_factory, root):
    """A digits checkpoint, and the folders of it as it is and folded."""
    folder = tmp_path_factory.mktemp("published")
    checkpoint = write_random_lors(folder)
    (folder / "metrics.json").write_text(json.dumps({"coco/bbox_mAP": 0.25}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, options in (("lors", ["--metrics", str(folder / "metrics.json")]), ("plain", ["--fold"])):
            patch.setattr("sys.argv", [TOOL, LORS_DIGITS, checkpoint, str(folder / name), *options])
            load_tool(TOOL).main()
    assert sorted(p.name for p in folder.iterdir()) == ["lors", "lors.pth", "metrics.json", "plain"]
    return folder


def test_the_folder_holds_the_weights_a_flat_config_and_a_card(published):
    expected = torch.load(published / "lors.pth", weights_only=True)["state_dict"]
    found = load_file(published / "lors" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())
    text = (published / "lors" / "config.py").read_text()
    assert "_base_" not in text and not any(field in text for field in ("work_dir", "launcher", "load_from"))
    assert Config.fromfile(published / "lors" / "config.py").model == Config.fromfile(ROOT / LORS_DIGITS).model
    card = (published / "lors" / "README.md").read_text()
    size = sum(p.numel() for p in MODELS.build(load_config(LORS_DIGITS).model).parameters())
    for part in (
        f"`QueryBased` with LORS of mmdet_lors, {size / 1e6:.2f} M parameters",
        ", ".join(CLASSES),
        "| coco/bbox_mAP | 0.25 |",
        "license: unknown",
        'Inferencer("lors")',
    ):
        assert part in card, part
    assert "with LORS" not in (published / "plain" / "README.md").read_text()
    assert Config.fromfile(published / "plain" / "config.py").model.decoder.lors is None


def predictions(picture, *arguments):
    """The classes of an inferencer, and what it finds in a picture."""
    found = Inferencer(*arguments, device="cpu", show_progress=False)
    return list(found.classes), next(iter(found.stream(picture)))[1].pred_instances


def test_the_folder_stands_for_config_and_checkpoint(published, root, tiny_digits):
    picture = str(next((tiny_digits / "val").iterdir()))
    _, expected = predictions(picture, root / LORS_DIGITS, published / "lors.pth")
    for arguments in ([published / "lors"], [str(published / "plain")], [root / LORS_DIGITS, published / "lors"]):
        classes, found = predictions(picture, *arguments)
        assert classes == CLASSES
        assert torch.allclose(found.scores, expected.scores, atol=1e-4)
        assert torch.allclose(found.bboxes, expected.bboxes, atol=1e-2)


def test_tools_take_the_folder(published, tiny_digits, tmp_path, call_tool):
    model, metrics = published / "lors", tmp_path / "metrics.json"
    options = [
        f"test_dataloader.dataset.data_root={tiny_digits}/",
        "test_dataloader.num_workers=0",
        f"test_evaluator.ann_file={tiny_digits}/annotations/val.json",
    ]
    call_tool("test.py", model, model, "--work-dir", tmp_path, "--metrics", metrics, "--cfg-options", *options)
    assert "coco/bbox_mAP" in json.loads(metrics.read_text())
    call_tool("deployment/fold_lors.py", model, model, tmp_path / "folded.pth")
    folded = read_checkpoint(tmp_path / "folded.pth")
    assert folded["meta"]["dataset_meta"]["classes"] == CLASSES
    plain = read_checkpoint(published / "plain")["state_dict"]
    assert all(torch.equal(value, plain[name]) for name, value in folded["state_dict"].items())


def test_from_the_hub(published, root, monkeypatch):
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(published / "lors")

    monkeypatch.setattr(inferencer, "snapshot_download", download)
    assert list(Inferencer.from_pretrained("user/name", device="cpu").classes) == CLASSES
    Inferencer.from_pretrained("user/name@v1", root / LORS_DIGITS, device="cpu")
    weights = "model.safetensors"
    assert asked == [("user/name", None, [weights, "config.py"]), ("user/name", "v1", [weights])]

    monkeypatch.setattr(inferencer, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match="user/name cannot be downloaded: no network"):
        Inferencer.from_pretrained("user/name")


def test_damaged_weights_are_named(published, tmp_path):
    shutil.copytree(published / "lors", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    whole = file.read_bytes()
    for part in (whole[: len(whole) // 2], b"", b"x" * 100):
        file.write_bytes(part)
        with pytest.raises(Damaged, match=r"model.safetensors \(\d+ bytes\) cannot be read: it is cut short"):
            read_checkpoint(tmp_path / "model")
    weights = load_file(published / "lors" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "lorst" not in k}, file)
    with pytest.raises(UserError, match="another architecture"):
        Inferencer(tmp_path / "model", device="cpu")
    file.unlink()
    with pytest.raises(UserError, match=r"model.safetensors does not exist"):
        Inferencer(tmp_path / "model", device="cpu")
    with pytest.raises(UserError, match="a checkpoint is needed"):
        Inferencer(tmp_path / "model" / "config.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{here}/lors.pth", "{here}/plain"], "plain exists already"),
        (["{here}/lors.pth", "{here}/none/new"], "none does not exist"),
        (["{here}/none.pth", "{here}/new"], "none.pth does not exist"),
        (["{here}/lors.pth", "{here}/new", "--metrics", "{here}/lors.pth"], "--metrics"),
        (["{here}/plain", "{here}/new"], "is of another architecture"),
    ],
)
def test_mistakes_leave_nothing_behind(arguments, message, published, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    arguments = [argument.format(here=published) for argument in arguments]
    assert message in refused(TOOL, [LORS_DIGITS, *arguments], monkeypatch, capsys)
    assert not (published / "new").exists() and not list(published.glob(".*"))


def test_nothing_to_fold(published, tmp_path, monkeypatch, root, capsys):
    adaptive = "configs/classification/vit-lors-adaptive_digits.py"
    torch.save(MODELS.build(Config.fromfile(root / adaptive).model).state_dict(), tmp_path / "vit.pth")
    arguments = [str(root / adaptive), str(tmp_path / "vit.pth"), str(tmp_path / "new"), "--fold"]
    assert "nothing to fold" in refused(TOOL, arguments, monkeypatch, capsys)
    plain = str(published / "plain")
    assert "nothing to fold" in refused(TOOL, [plain, plain, str(published / "new"), "--fold"], monkeypatch, capsys)
