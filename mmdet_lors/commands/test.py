"""What tools/test.py does: check a config, its data and its checkpoint, then evaluate."""

import argparse
from pathlib import Path

from mmdet.evaluation import DumpDetResults
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmdet_lors.datasets.checks import check_inputs
from mmdet_lors.datasets.evaluation import use_evaluated_data_hook
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.reading import check_fit, read_checkpoint
from mmdet_lors.engine.config_check import check_config, check_operators
from mmdet_lors.engine.launch import is_first_process, load_config
from mmdet_lors.engine.machine import use_device
from mmdet_lors.engine.new_style import type_name
from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json


def draw(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the drawing of predictions.

    Raises:
        UserError: the config's model predicts nothing that can be drawn.
    """
    if "visualization" not in cfg.default_hooks:
        raise UserError("--show and --show-dir draw boxes: this config has no default_hooks.visualization")
    folder = args.show_dir
    if type_name(cfg.default_hooks.visualization.type) == "SegVisualizationHook":
        folder = folder and str(Path(cfg.work_dir, folder).absolute())
    else:
        cfg.visualizer = dict(cfg.visualizer, type="DetectionVisualizer")
    cfg.default_hooks.visualization = dict(
        type="mmdet.PicturesHook",
        draw=True,
        interval=args.show_interval,
        show=args.show,
        wait_time=args.wait_time,
        test_out_dir=folder,
    )


def augment(cfg: Config) -> None:
    """Replace the test pipeline by the config's TTA settings, or by plain and flipped images.

    Raises:
        UserError: the test data set has no pipeline for detection.
    """
    if "pipeline" not in cfg.test_dataloader.dataset:
        raise UserError("--tta flips images and merges boxes: this config's test data set has no pipeline")
    if "tta_pipeline" not in cfg:
        steps = list(cfg.test_dataloader.dataset.pipeline)
        load, resize = steps[:1], [s for s in steps[1:] if type_name(s["type"]) == "Resize"]
        annotate = [s for s in steps if type_name(s["type"]) == "LoadAnnotations"]
        pack = dict(steps[-1])
        pack["meta_keys"] = (*pack["meta_keys"], "flip", "flip_direction")
        flips = [dict(type="RandomFlip", prob=p) for p in (1.0, 0.0)]
        choices = [resize, flips, annotate, [pack]]
        cfg.tta_pipeline = [*load, dict(type="TestTimeAug", transforms=[c for c in choices if c])]
    if "tta_model" not in cfg:
        cfg.tta_model = dict(type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100))
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def test(args: argparse.Namespace) -> None:
    """Check the inputs, then hand over to mmengine's runner."""
    use_device(args.device, args.launcher)
    cfg = load_config(args.config, args.cfg_options, args.launcher, args.work_dir)
    use_evaluated_data_hook(cfg)
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        raise UserError(f"--out {args.out}: the name must end in .pkl or .pickle")
    if is_first_process():
        check_config(cfg, ("test",))
        check_inputs(cfg, ("test",))
        model = build_without_weights(cfg.model)
        check_fit(model, read_checkpoint(args.checkpoint), args.checkpoint)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        draw(cfg, args)
    if args.tta:
        augment(cfg)
    if is_first_process():
        check_operators(model, cfg.model, get_device())
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    metrics = runner.test()
    if args.metrics and is_first_process():
        Path(args.metrics).parent.mkdir(parents=True, exist_ok=True)
        Path(args.metrics).write_text(to_json(metrics, indent=2) + "\n")
