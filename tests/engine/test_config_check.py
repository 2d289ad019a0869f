"""Every part of a config is looked at, and what is wrong is named with its place and the nearest known name."""

from pathlib import Path

import mmdet
import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT
from mmdet.registry import DATASETS, HOOKS, METRICS, OPTIMIZERS, TRANSFORMS
from mmengine.config import Config
from mmengine.hooks import Hook

from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.config_check import check_config
from mmdet_lors.engine.launch import load_config
from mmdet_lors.errors import UserError

VIT = "configs/classification/vit-lors_digits.py"
COCO = "configs/lors/adamixer-lors_r50_300-queries_crop-ms-480-800-3x_coco.py"
MASKS = "configs/pela/cascade-mask-rcnn_pela-swin-base_crop-ms-480-800-3x_coco.py"
ALL = ("train", "val", "test")
PIPELINE = "train_dataloader.dataset.pipeline"


def check(name, options=None):
    check_config(load_config(ROOT / name, options), ALL)


ONE_FIELD = {
    # key of a digits config: a value -> what the line says
    "optim_wraper.optimizer.lr": (0.1, "nothing reads 'optim_wraper'; did you mean optim_wrapper?"),
    "lr": (0.1, "did you mean optim_wrapper.optimizer.lr?"),
    "max_epochs": (3, "did you mean train_cfg.max_epochs?"),
    "data_root": ("/nowhere", "has no effect: .*train_dataloader.dataset.data_root"),
    "optim_wrapper.optimizer.weight_decy": (0.1, "optim_wrapper.optimizer.weight_decy: AdamW .*mean weight_decay?"),
    "optim_wrapper.optimizer.type": ("AdamWW", "optim_wrapper.optimizer.type: 'AdamWW' .*mean AdamW?"),
    "optim_wrapper.optimizer.lr": (-1.0, "optim_wrapper.optimizer: Invalid learning rate"),
    "optim_wrapper.clip_grad.max_norms": (1, "optim_wrapper.clip_grad.max_norms: .*mean max_norm?"),
    "optim_wrapper.paramwise_cfg.norm_decay_mul": (0, "did you mean norm_decay_mult?"),
    "optim_wrapper.constructor": ("LayerDecay", "optim_wrapper.constructor: 'LayerDecay' is not"),
    "train_cfg.max_epoch": (3, "train_cfg.max_epoch: .*did you mean max_epochs?"),
    "train_cfg.val_interval": (0, "train_cfg.val_interval must be 1 or more, got 0"),
    "val_cfg.type": ("ValLop", "val_cfg.type: 'ValLop' .*mean ValLoop?"),
    "test_cfg.fp32": (True, "test_cfg.fp32: TestLoop"),
    "param_scheduler.0.start": (0.1, r"param_scheduler\[0\].start: LinearLR .*mean start_factor?"),
    "param_scheduler.1.begin": (20, r"param_scheduler\[1\]: end should be larger than begin"),
    "default_hooks.chekpoint.interval": (1, "default_hooks.chekpoint has no type; did you mean checkpoint?"),
    "default_hooks.checkpoint.intervall": (1, "default_hooks.checkpoint.intervall: .*mean interval?"),
    "default_hooks.logger.interva": (1, "did you mean interval?"),
    "custom_hooks.0.type": ("ServeFolded", r"custom_hooks\[0\].type: .*mean ServeFoldedHook?"),
    "custom_hooks.1.priority": ("HIGHER", r"custom_hooks\[1\].priority must be a number"),
    "train_dataloader.batchsize": (2, "train_dataloader.batchsize: .*mean batch_size?"),
    "train_dataloader.batch_size": (0, "train_dataloader.batch_size must be 1 or more"),
    "train_dataloader.shuffle": (True, "set train_dataloader.sampler.shuffle"),
    "train_dataloader.sampler.shufle": (True, "train_dataloader.sampler.shufle: .*mean shuffle?"),
    "train_dataloader.batch_sampler.type": ("AspectRatio", "mean AspectRatioBatchSampler?"),
    "train_dataloader.collate_fn.type": ("pseudo_colate", "mean pseudo_collate?"),
    "train_dataloader.dataset.ann_fil": ("x", "train_dataloader.dataset.ann_fil: .*mean ann_file?"),
    "val_dataloader.dataset.classes": (("a",), r"val_dataloader.dataset.classes: .*it is now metainfo=dict\(classes="),
    "test_dataloader.dataset.metainfo.CLASSES": (("a",), "test_dataloader.dataset.metainfo.CLASSES: .*mean classes?"),
    "train_dataloader.dataset.filter_cfg.filter_empty": (True, "mean filter_empty_gt?"),
    "train_dataloader.dataset.data_prefix.imgs": ("x", "mean img?"),
    f"{PIPELINE}.2.scal": ((3, 3), r"train_dataloader.dataset.pipeline\[2\].scal: Resize .*mean scale?"),
    f"{PIPELINE}.2.type": ("Rezise", r"train_dataloader.dataset.pipeline\[2\].type: .*mean Resize?"),
    "test_dataloader.dataset.pipeline.3.meta_keys": (("scale_factr",), "nothing sets 'scale_factr'; .*scale_factor?"),
    "val_evaluator.metric": ("proposal", "save_best monitors 'coco/bbox_mAP', but val_evaluator reports coco/AR@100"),
    "val_evaluator.metric_items": (["mAP_50"], "save_best monitors .* reports coco/bbox_mAP_50; set it"),
    "val_evaluator.prefix": ("mine", "but val_evaluator reports mine/bbox_mAP,"),
    "test_evaluator.metric_items": (["mAP50"], "test_evaluator.metric_items has no 'mAP50'; did you mean mAP_50?"),
    "default_hooks.checkpoint.save_best": (["coco/bbox_mAP", "mAP"], "monitors 'mAP'"),
    "visualizer.vis_backends.0.type": ("WandbVis", r"visualizer.vis_backends\[0\].type: .*mean WandbVisBackend?"),
    "log_processor.windowsize": (1, "log_processor.windowsize: .*mean window_size?"),
    "log_level": ("INFOO", "log_level must be"),
    "randomness.sed": (1, "randomness.sed: .*mean seed?"),
    "env_cfg.mp_cfg.mp_start": ("fork", "env_cfg.mp_cfg.mp_start: .*mean mp_start_method?"),
    "env_cfg.cudnn": (True, "env_cfg.cudnn: nothing reads it; did you mean cudnn_benchmark?"),
    "auto_scale_lr.base_batchsize": (1, "mean base_batch_size?"),
    "model_wrapper_cfg.find_unused": (True, "mean find_unused_parameters?"),
    "tta_model.type": ("DetTTA", "tta_model.type: 'DetTTA' .*mean DetTTAModel?"),
    "val_dataloader": (None, "config has val_cfg, but no val_dataloader"),
}


@pytest.mark.parametrize("key", ONE_FIELD)
def test_one_wrong_field_is_named(key):
    value, line = ONE_FIELD[key]
    with pytest.raises(UserError, match=line.replace("?", r"\?")) as refused:
        check(LORS_DIGITS, {key: value})
    assert "\n" not in str(refused.value)


MODEL = {
    "model.backbone.dept": (18, "model.backbone.dept: ResNet .*mean depth?"),
    "model.backbone.type": ("ResNett", "model.backbone.type: .*mean ResNet?"),
    "model.decoder.stage.in_pionts": (3, "model.decoder.stage.in_pionts: .*mean in_points?"),
    "model.train_cfg.assigner.type": ("Hungarian", "model.train_cfg.assigner.type: .*mean HungarianAssigner?"),
    "model.data_preprocessor.menu": (1, "model.data_preprocessor.menu: .*mean mean?"),
}


@pytest.mark.parametrize("key", MODEL)
def test_the_models_fields_as_well(key):
    value, line = MODEL[key]
    with pytest.raises(UserError, match=line.replace("?", r"\?")):
        build_without_weights(load_config(ROOT / LORS_DIGITS, {key: value}).model)


def load(**flags):
    return [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", **flags)]


PACK = [dict(type="PackDetInputs")]
BOXES = dict(with_bbox=True)
PIPELINES = {
    "no masks": ([*load(**BOXES), dict(type="CopyPaste")], r"pipeline\[2\]: CopyPaste needs gt_masks"),
    "no others": ([*load(**BOXES), dict(type="Mosaic")], r"pipeline\[2\]: Mosaic needs mix_results"),
    "no boxes": ([*load(with_bbox=False), dict(type="MinIoURandomCrop")], "needs gt_bboxes, which nothing before it"),
    "no masks to filter by": ([*load(**BOXES), dict(type="FilterAnnotations", by_mask=True)], "needs gt_masks"),
    "no map": ([*load(**BOXES), dict(type="SegRescale")], "needs gt_seg_map"),
    "no image": ([dict(type="Resize", scale=(9, 9)), *load(**BOXES)], r"pipeline\[0\]: Resize needs img"),
    "no annotations": ([*load()[:1], *PACK], "loads no annotations"),
    "in a choice": (
        [*load(**BOXES), dict(type="RandomChoice", transforms=[[dict(type="RandomFlip", p=1)], []])],
        r"pipeline\[2\].transforms\[0\]\[0\].p: RandomFlip has no such field",
    ),
    "in a choice's resize": (
        [*load(**BOXES), dict(type="RandomChoiceResize", scales=[(9, 9)], keep_ration=True)],
        r"pipeline\[2\].keep_ration: Resize has no such field; did you mean keep_ratio",
    ),
    "in a branch": (
        [*load(**BOXES), dict(type="MultiBranch", branch_field=["a"], a=[dict(type="PackDet")])],
        r"pipeline\[2\].a\[0\].type: 'PackDet' is not",
    ),
    "in test-time augmentation": (
        [*load(**BOXES), dict(type="TestTimeAug", transforms=[[dict(type="Resize", size=(9, 9))], PACK])],
        r"pipeline\[2\].transforms\[0\].size: Resize",
    ),
    "not a list": ("LoadImageFromFile", "pipeline must be a list"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_that_cannot_work(name):
    steps, line = PIPELINES[name]
    cfg = load_config(ROOT / LORS_DIGITS)
    cfg.train_dataloader.dataset.pipeline = steps
    with pytest.raises(UserError, match=line):
        check_config(cfg, ALL)


def test_a_pipeline_around_several_images():
    cfg = load_config(ROOT / LORS_DIGITS)
    cfg.train_dataloader.dataset.pipeline = load(**BOXES, with_mask=True)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type="MultiImageMixDataset", dataset=inner, pipeline=[dict(type="CopyPaste"), *PACK]
    )
    check_config(cfg, ALL)
    inner.pipeline = load(**BOXES)
    cfg.train_dataloader.dataset.dataset = inner
    with pytest.raises(UserError, match=r"train_dataloader.dataset.pipeline\[0\]: CopyPaste needs gt_masks"):
        check_config(cfg, ALL)
    inner.ann_fil = "x"
    cfg.train_dataloader.dataset = dict(
        type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[inner])
    )
    with pytest.raises(UserError, match=r"train_dataloader.dataset.dataset.datasets\[0\].ann_fil: "):
        check_config(cfg, ALL)


def test_masks_that_the_model_learns_are_loaded():
    cfg = load_config(ROOT / MASKS)
    check_config(cfg, ALL)
    cfg.train_dataloader.dataset.pipeline[1] = dict(type="LoadAnnotations", with_bbox=True)
    with pytest.raises(UserError, match=r"model.roi_head.mask_head needs gt_masks; add LoadAnnotations\("):
        check_config(cfg, ALL)


def test_lists_of_metrics_and_what_waits_for_them():
    cfg = load_config(ROOT / VIT)
    cfg.val_evaluator = [dict(type="Accuracy", topk=(1,)), dict(type="Accuracy", topk=(5,), prefix="other")]
    cfg.custom_hooks = [dict(type="EarlyStoppingHook", monitor="other/top5", rule="greater")]
    check_config(cfg, ALL)
    cfg.custom_hooks[0].monitor = "accuracy/top5"
    with pytest.raises(UserError, match=r"custom_hooks\[0\].monitor monitors .* reports accuracy/top1, other/top5"):
        check_config(cfg, ALL)
    cfg.custom_hooks = []
    cfg.param_scheduler = dict(type="ReduceOnPlateauLR", monitor="top1")
    with pytest.raises(UserError, match="monitor monitors 'top1'"):
        check_config(cfg, ALL)
    cfg.val_evaluator = dict(metrics=[dict(type="Accuracy", top=(1,))])
    with pytest.raises(UserError, match=r"val_evaluator.metrics\[0\].top: Accuracy .*mean topk"):
        check_config(cfg, ALL)


@pytest.mark.parametrize(
    "options",
    [
        {"default_hooks.checkpoint.save_best": "auto", "val_evaluator.metric": "proposal"},
        {"default_hooks.checkpoint.save_best": "coco/AR@100", "val_evaluator.metric": "proposal"},
        {"default_hooks.checkpoint.save_best": None, "val_evaluator.metric_items": ["mAP_50"]},
        {"val_evaluator.metric": ["bbox", "segm"]},
        {"val_evaluator.classwise": True},
        {"train_dataloader.num_workers": 1},
        {"work_dir": "x", "resume": True, "find_unused_parameters": True, "experiment_name": "x"},
        {"train_dataloader.num_batch_per_epoch": 3, "optim_wrapper.accumulative_counts": 2},
    ],
)
def test_right_settings_pass(options):
    check(LORS_DIGITS, options)


def test_without_workers_what_they_alone_need_is_left_out():
    options = {"val_dataloader.num_workers": 1}
    for loader in ("train_dataloader", "val_dataloader"):
        options |= {f"{loader}.persistent_workers": True, f"{loader}.prefetch_factor": 4}
    cfg = load_config(ROOT / LORS_DIGITS, options)
    assert cfg.train_dataloader.num_workers == 0
    assert not {"persistent_workers", "prefetch_factor"} & set(cfg.train_dataloader)
    assert cfg.val_dataloader.persistent_workers and cfg.val_dataloader.prefetch_factor == 4


class Base:
    def __init__(self, a, b=1):
        pass


class HandsOn(Base):
    def __init__(self, *args, c=2, **kwargs):
        super().__init__(*args, **kwargs)


class GivesOne(HandsOn):
    def __init__(self, d, **kwargs):
        self.e = kwargs.pop("e", None)
        super().__init__(3, b=kwargs.get("b", 4), **kwargs)


class TakesAll(Base):
    def __init__(self, **kwargs):
        self.settings = dict(kwargs)
        super().__init__(kwargs["a"])


@pytest.mark.parametrize(
    ("kind", "fields", "line"),
    [
        (HandsOn, dict(a=1, b=2, c=3), None),
        (HandsOn, dict(a=1, x=2), "x: HandsOn has no such field; it has a, b, c"),
        (HandsOn, dict(b=1), "HandsOn needs a"),
        (GivesOne, dict(d=1, e=2, c=3), None),
        (GivesOne, dict(d=1, a=2), "a: GivesOne has no such field; it has c, d, e"),
        (TakesAll, dict(anything=1, goes=2), None),
        (lambda x, **rest: x, dict(x=1, y=2), None),
        (lambda x: x, dict(x=1, y=2), "y: .* has no such field"),
    ],
)
def test_signatures_are_followed_as_far_as_they_are_handed_on(kind, fields, line):
    cfg = load_config(ROOT / LORS_DIGITS)
    cfg.custom_hooks = [dict(type=kind, **fields)]
    if line is None:
        check_config(cfg, ALL)
    else:
        with pytest.raises(UserError, match=r"custom_hooks\[0\]\.?:? ?" + line):
            check_config(cfg, ALL)


def test_a_users_own_classes_pass(monkeypatch):
    @TRANSFORMS.register_module(name="OwnLoader", force=True)
    class Loader:
        def __init__(self, *anything, **more):
            self.more = more

    @DATASETS.register_module(name="OwnData", force=True)
    class Data(torch.utils.data.Dataset):
        def __init__(self, **settings):
            self.settings = settings

    @METRICS.register_module(name="OwnMetric", force=True)
    class Metric:
        def __init__(self, of, **settings):
            pass

    @HOOKS.register_module(name="OwnHook", force=True)
    class OwnHook(Hook):
        def __new__(cls, *args, **kwargs):
            return super().__new__(cls)

    @OPTIMIZERS.register_module(name="own_optimizer", force=True)
    def own_optimizer(params, **settings):
        raise AssertionError("is not built")

    cfg = load_config(ROOT / PLAIN_DIGITS)
    cfg.train_dataloader.dataset.pipeline = [dict(type="OwnLoader", classes=1), dict(type="CopyPaste"), *PACK]
    cfg.val_dataloader.dataset = dict(type="OwnData", classes=["a"], metainfo=dict(clases=1), pipeline=[len])
    cfg.val_evaluator = dict(type="OwnMetric", of=1, whatever=2)
    cfg.custom_hooks = [dict(type="OwnHook", x=1), OwnHook()]
    cfg.optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="own_optimizer", rates=1))
    check_config(cfg, ALL)


def test_a_users_own_variables_pass(tmp_path):
    (tmp_path / "my.py").write_text(
        f"_base_ = {str(ROOT / LORS_DIGITS)!r}\n"
        "rate = 1e-3\nmodels = 'my notes'\nbackbones = [18]\n"
        "optim_wrapper = dict(optimizer=dict(lr=rate))\nprint_models = models\n"
        "randomness = dict(seed=_base_.randomness.seed)\n"
    )
    check(tmp_path / "my.py")
    (tmp_path / "typo.py").write_text(f"_base_ = {str(ROOT / LORS_DIGITS)!r}\noptim_wraper = dict(type='x')\n")
    with pytest.raises(UserError, match=r"optim_wraper: nothing reads this key .*mean optim_wrapper\?"):
        check(tmp_path / "typo.py")


@pytest.mark.parametrize("name", [LORS_DIGITS, VIT, COCO, MASKS])
def test_the_projects_configs_pass(name):
    check(name)


UPSTREAM = {"MOTChallengeMetrics", "eval_mode"}
"""Fields of mmdet's own configs that its classes do not have."""


def mmdets() -> list[str]:
    folder = Path(mmdet.__file__).parent / ".mim/configs"
    found = [p for p in sorted(folder.rglob("*.py")) if p.parent.name not in ("_base_", "common", "datasets", "odinw")]
    return [str(p) for p in found if not p.stem.endswith("_tta")]


@pytest.mark.parametrize("path", mmdets()[::40], ids=lambda path: Path(path).stem)
def test_mmdets_configs_pass(path):
    try:
        cfg = load_config(path)
    except UserError as error:
        # A package, or another file of mmdet's, that is not there.
        assert "needs what is not there" in str(error) or "cannot be read" in str(error)
        return
    splits = ALL if cfg.get("train_dataloader") else ("test",)
    try:
        check_config(cfg, splits)
    except UserError as error:
        assert any(known in str(error) for known in UPSTREAM), error


def test_nothing_is_built_of_the_data_or_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(ROOT / LORS_DIGITS)
    cfg.train_dataloader.dataset.data_root = "/nowhere"
    check_config(cfg, ALL)
    assert not list(tmp_path.iterdir())
