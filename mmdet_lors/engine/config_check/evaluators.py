"""Checks a config's evaluators, and that they report the metrics that hooks and schedulers monitor."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.registry import EVALUATOR, HOOKS, METRICS, PARAM_SCHEDULERS

from mmdet_lors.engine.new_style import type_name
from mmdet_lors.errors import UserError

from .signatures import bind, find, meant

COCO_ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
COCO_RECALLS = ("AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000")
COCO_METRICS = ("bbox", "segm", "proposal", "proposal_fast")


def check_evaluator(evaluator: dict | list, where: str) -> list[str] | None:
    """Check an evaluator's metrics.

    Returns:
        The names of their results, in order; None if one of the metrics is not known here.

    Raises:
        UserError: an unknown metric or field, or a missing one.
    """
    own = isinstance(evaluator, dict) and "metrics" in evaluator
    if own:
        kind = find(evaluator.get("type", "Evaluator"), EVALUATOR, where)
        bind(kind, evaluator, where)
    metrics = evaluator["metrics"] if own else evaluator
    several = isinstance(metrics, (list, tuple))
    inner = f"{where}.metrics" if own else where
    found: list[str] | None = []
    for i, metric in enumerate(metrics if several else [metrics]):
        place = f"{inner}[{i}]" if several else inner
        if not isinstance(metric, dict):
            found = None
            continue
        if "type" not in metric:
            raise UserError(f"{place} has no type")
        with METRICS.switch_scope_and_registry(metric.get("_scope_")):
            kind = find(metric["type"], METRICS, place)
            bind(kind, metric, place)
        names = _names(kind, metric, place)
        found = None if names is None or found is None else [*found, *names]
    return None if own and type_name(evaluator.get("type", "Evaluator")) != "Evaluator" else found


def _names(kind: Callable, metric: dict, where: str) -> list[str] | None:
    """The names of a metric's results, with its prefix."""
    prefix = metric.get("prefix") or getattr(kind, "default_prefix", None)
    ours = {base.__name__ for base in getattr(kind, "__mro__", ()) if base.__module__.startswith("mmdet_lors.")}
    name = kind.__name__
    if name == "CocoMetric" or (ours and issubclass(kind, METRICS.get("mmdet.CocoMetric"))):
        names = _coco_names(metric, where)
    elif name == "Accuracy" and ours:
        names = [f"top{k}" for k in metric.get("topk", (1, 5))]
    elif name == "IoUMetric" and kind.__module__.startswith("mmseg."):
        extra = dict(mIoU=("mIoU", "mAcc"), mDice=("mDice", "mAcc"), mFscore=("mFscore", "mPrecision", "mRecall"))
        wanted = metric.get("iou_metrics", ["mIoU"])
        names = ["aAcc", *(n for m in ([wanted] if isinstance(wanted, str) else wanted) for n in extra.get(m, (m,)))]
    else:
        return None
    return [f"{prefix}/{n}" if prefix else n for n in names]


def _coco_names(metric: dict, where: str) -> list[str]:
    if metric.get("format_only"):
        return []
    wanted, items = metric.get("metric", "bbox"), metric.get("metric_items")
    names = []
    for i in (item for item in items or () if item not in COCO_ITEMS + COCO_RECALLS):
        raise UserError(f"{where}.metric_items has no {i!r}{meant(i, COCO_ITEMS + COCO_RECALLS)}")
    for one in [wanted] if isinstance(wanted, str) else wanted:
        if one not in COCO_METRICS:
            raise UserError(f"{where}.metric has no {one!r}{meant(str(one), COCO_METRICS)}")
        if one == "proposal_fast":
            names += [f"AR@{n}" for n in metric.get("proposal_nums", (100, 300, 1000))]
        elif one == "proposal":
            names += items or COCO_RECALLS
        else:
            if metric.get("classwise"):
                names.append("*_precision")  # of each class
            names += [f"{one}_{item}" for item in items or COCO_ITEMS]
    return names


def check_monitors(cfg: dict, given: list[str] | None, hooks: dict[str, dict]) -> None:
    """Check that what hooks and schedulers monitor is among the validation's results.

    Args:
        cfg: the whole config.
        given: the names of the results.
        hooks: every hook's config, by its place.

    Raises:
        UserError: a monitored metric that the validation does not report.
    """
    for where, name in _monitored(cfg, hooks):
        if given is not None and name != "auto" and not any(fnmatchcase(name, n) for n in given):
            listed = ", ".join(given) or "nothing"
            raise UserError(f"{where} monitors {name!r}, but val_evaluator reports {listed}; set it to one of these")


def _monitored(cfg: dict, hooks: dict[str, dict]) -> Iterator[tuple[str, str]]:
    """(place, name) of every metric that a hook or scheduler monitors."""
    for where, hook in hooks.items():
        kind = find(hook["type"], HOOKS, where)
        if not isinstance(kind, type):
            continue
        if issubclass(kind, CheckpointHook) and hook.get("save_best"):
            best = hook["save_best"]
            yield from ((f"{where}.save_best", name) for name in ([best] if isinstance(best, str) else best))
        elif issubclass(kind, EarlyStoppingHook) and "monitor" in hook:
            yield f"{where}.monitor", hook["monitor"]
    schedulers = cfg.get("param_scheduler") or []
    for i, scheduler in enumerate([schedulers] if "type" in schedulers else schedulers):
        if not isinstance(scheduler, dict):
            continue
        kind = find(scheduler["type"], PARAM_SCHEDULERS, "param_scheduler")
        if "ReduceOnPlateau" in kind.__name__:
            yield f"param_scheduler[{i}].monitor", scheduler.get("monitor", "loss")
