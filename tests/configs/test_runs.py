"""Every file of configs/ trains two iterations, validates, saves, resumes for one more and is tested.

By default one config of every base; ``--every-config`` runs all.
"""

import json
import os
from functools import partial
from pathlib import Path
from shutil import rmtree

import data_sets
import pytest
from conftest import ROOT, run
from mmengine.config import Config
from mmengine.utils import is_installed
from runs import Run
from settings import arguments, one_more, settings, write_teacher

from mmdet_lors.engine.new_style import classic

REPRESENTATIVES = {
    "lors/adamixer-lors_r50_100-queries_1x_coco": "R50",
    "adamixer/adamixer_r50_100-queries_crop-ms-480-800-3x_coco": "plain",
    "lors/adamixer-lors_r101_300-queries_crop-ms-480-800-3x_coco": "R101",
    "lors/adamixer-lors_swin-s_300-queries_crop-ms-480-800-3x_coco": "Swin",
    "lors/adamixer-lors_x101-32x4d-dcn_300-queries_crop-ms-480-800-3x_coco": "X101-DCN",
    "pela/adamixer-lors_pela-deit-base_300-queries_crop-ms-480-800-3x_coco": "PELA",
    "pela/cascade-mask-rcnn_pela-swin-base_crop-ms-480-800-3x_coco": "masks",
    "lors/other_detectors/dab-detr-lors_r50_8xb2-50e_coco": "DAB-DETR",
    "lors/other_detectors/deformable-detr-lors_r50_16xb2-50e_coco": "Deformable DETR",
    "lors/other_detectors/dino-lors_r50_8xb2-12e_coco": "DINO",
    "classification/deit-tiny-lors_cifar100": "classifier",
    "pela/pela-distiller_deit-base_imagenet": "distiller",
    "pela/upernet_pela-swin-base_8xb2-160k_ade20k-512x512": "UperNet",
    "lors/adamixer-lors_r18_digits": "digits",
    "lora/adamixer-lora_r18_digits": "LoRA",
}
"""What runs by default: one config of every base."""
CONFIGS = sorted(
    path.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for path in (ROOT / "configs").rglob("*.py")
    if "_base_" not in path.parts
)


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        chosen = CONFIGS if metafunc.config.getoption("every_config") else list(REPRESENTATIVES)
        metafunc.parametrize("name", chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A current folder with data/."""
    root = tmp_path_factory.mktemp("run")
    data_sets.make_all(root)
    return root


@pytest.fixture
def work(tmp_path) -> Path:
    """A run's folder, removed after it: 67 of them have 200 GB of checkpoints."""
    yield tmp_path / "work"
    rmtree(tmp_path / "work", ignore_errors=True)


def prepare_process(folder: Path) -> None:
    """Runs that no power failure has to spare do not wait for the disk, which takes most of their time."""
    os.fsync = int
    data_sets.know_cifar100(folder / "data/cifar100")


def last_validation(work: Path) -> dict:
    """The metrics that a run has logged last."""
    [log] = sorted(work.glob("*/vis_data/scalars.json"))[-1:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if "loss" not in line][-1]


def test_every_base_is_run_by_default():
    assert set(REPRESENTATIVES) <= set(CONFIGS)


def test_trains_validates_saves_resumes_and_is_tested(name, folder, work, tmp_path):
    if name.startswith("pela/upernet") and not is_installed("mmsegmentation"):
        pytest.skip("mmsegmentation is not installed: pip install -e .[seg]")
    config = ROOT / "configs" / f"{name}.py"
    cfg = classic(Config.fromfile(config))
    short = settings(cfg, tmp_path)
    write_teacher(cfg, short)
    prepare = partial(prepare_process, folder)
    start = partial(Run, config, work, folder=folder, prepare=prepare)
    start(*arguments(short)).done(600)
    saved = sorted(work.glob("*_[12].pth"))
    assert [path.stem in ("epoch_1", "iter_2") for path in saved if not path.name.startswith("best")] == [True]
    resumed = start("--resume", *arguments(one_more(short))).done(600)
    assert "resuming from" in resumed.output()
    end = next(path for stem in ("epoch_2", "iter_3") if (path := work / f"{stem}.pth").exists())
    validated = last_validation(work)
    metrics = tmp_path / "metrics.json"
    test = start(str(end), "--metrics", str(metrics), *arguments(short), tool="test.py").done(600)
    tested = json.loads(metrics.read_text())
    # A detector with a score threshold may find nothing yet, of which mmdet's metric gives no figure.
    assert tested or "testing results of the whole dataset is empty" in test.output()
    assert {key: validated[key] for key in tested} == pytest.approx(tested, nan_ok=True)


def test_two_processes_train_on_coco(folder, work, tmp_path):
    name = "lors/adamixer-lors_r50_100-queries_1x_coco"
    short = settings(Config.fromfile(ROOT / f"configs/{name}.py"), tmp_path)
    short["train_dataloader.num_batch_per_epoch"] = 1
    del short["model.query_generator.num_queries"]  # here, all of the config's
    script, config = ROOT / "tools/dist_train.sh", ROOT / f"configs/{name}.py"
    options = ["--work-dir", str(work), *arguments(short)]
    done = run("bash", str(script), str(config), "2", *options, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (work / "epoch_1.pth").is_file()
