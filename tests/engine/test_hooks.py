"""Evaluation runs folded, and leaves nothing of it behind; pictures of predictions are all kept."""

import os
from pathlib import Path
from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from conftest import LORS_DIGITS, load_config, random_lors
from mmdet.structures import DetDataSample
from mmengine.runner.runner import _SlicedDataset
from mmengine.structures import InstanceData
from mmengine.visualization import LocalVisBackend, Visualizer

from mmdet_lors.engine.hooks import ServeFoldedHook
from mmdet_lors.errors import UserError
from mmdet_lors.visualization import DetectionVisualizer, PicturesHook


def test_validation_and_test_run_folded_and_end_factored():
    cfg = load_config(LORS_DIGITS)
    model = random_lors(cfg.model)
    runner, hook = SimpleNamespace(model=model), ServeFoldedHook()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for start, end in (
        (hook.before_val_epoch, hook.after_val_epoch),
        (hook.before_test_epoch, hook.after_test_epoch),
    ):
        start(runner)
        model.eval()  # as mmengine's loops do after the hook
        assert model.decoder.lorsa.folded is not None and model.decoder.lorst.folded is not None
        end(runner)
        assert model.decoder.lorsa.folded is None and model.decoder.lorst.folded is None
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in before)


def test_every_run_has_the_hooks():
    hooks = [hook["type"] for hook in load_config(LORS_DIGITS).custom_hooks]
    assert hooks == ["ServeFoldedHook", "StopOnNonFiniteHook"]


NAMES = ["cam1/0.png", "cam2/0.png", "cam2/0.tif", "cam2/0.PNG", "../else/0.png", "../else/0.png", "x" * 251 + ".png"]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """PicturesHook on images of these names: what it wrote below the folder, by mode."""
    monkeypatch.setattr(Visualizer, "get_current_instance", lambda: visualizer)
    backend = LocalVisBackend(save_dir=str(tmp_path / "backend"))
    visualizer = DetectionVisualizer(name="pictures", vis_backends=[backend], save_dir=str(tmp_path))
    visualizer.dataset_meta = dict(classes=("a",), palette=[(0, 200, 0)])
    folder = tmp_path / "data" / "images"
    paths = [str(folder / name) for name in NAMES]
    for place, path in enumerate(paths):
        Path(os.path.normpath(path)).parent.mkdir(parents=True, exist_ok=True)
        mmcv.imwrite(np.full((8, 9, 3), 20 * place, np.uint8), os.path.normpath(path))
    plain = SimpleNamespace(data_prefix=dict(img=str(folder)), pipeline=SimpleNamespace(transforms=[]))
    # As num_batch_per_epoch wraps a data set.
    dataset = _SlicedDataset(SimpleNamespace(datasets=[plain, plain]), len(NAMES))
    loader = SimpleNamespace(batch_size=4, dataset=dataset)
    runner = SimpleNamespace(
        work_dir=str(tmp_path), timestamp="now", iter=7, test_dataloader=loader, val_dataloader=loader
    )

    def draw(mode: str, **fields) -> list[str]:
        hook = PicturesHook(draw=True, interval=1, **fields)
        for batch in range(2):
            samples = [sample_of(path) for path in paths[4 * batch : 4 * batch + 4]]
            getattr(hook, f"after_{mode}_iter")(runner, batch, {}, samples)
        out = tmp_path / "now" if fields else tmp_path / "backend"
        return sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*"))

    return draw


def sample_of(path: str) -> DetDataSample:
    sample = DetDataSample(metainfo=dict(img_path=path, ori_shape=(8, 9)))
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor([[1.0, 1, 5, 5]]), scores=torch.ones(1), labels=torch.zeros(1, dtype=torch.long)
    )
    return sample


def test_every_picture_of_a_test_is_kept_under_the_path_of_its_image(drawn, tmp_path):
    found = drawn("test", test_out_dir="pics")
    elsewhere = (tmp_path / "data" / "else").as_posix().lstrip("/")
    assert len(found) == len(NAMES)
    expected = {"cam1/0.png", "cam2/0.png", "cam2/0-2.PNG", "cam2/0.tif.png", f"{elsewhere}/0.png"}
    assert {f"pics/{name}" for name in expected | {f"{elsewhere}/0-2.png"}} < set(found)
    colours = {int(mmcv.imread(str(tmp_path / "now" / name))[-1, -1, 0]) for name in found}
    assert len(colours) == len(set(NAMES)), "pictures of other images"


@pytest.mark.parametrize("mode", ["val", "test"])
def test_every_picture_has_a_name_of_its_own_in_the_back_ends(mode, drawn):
    found = drawn(mode)
    assert len(found) == len(NAMES) and f"vis_image/{mode}_cam2_0.png_{7 if mode == 'val' else 1}.png" in found


def test_a_picture_that_cannot_be_written_is_named(drawn, tmp_path):
    (tmp_path / "now").mkdir()
    (tmp_path / "now" / "pics").write_text("")
    with pytest.raises(UserError, match="picture .*cam1/0.png cannot be written"):
        drawn("test", test_out_dir="pics")
