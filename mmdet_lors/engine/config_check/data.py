"""Data loaders of a config, their data sets, and those within these."""

from typing import Any

from mmengine.config import Config
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS
from torch.utils.data import DataLoader

from mmdet_lors.errors import UserError

from .pipelines import ANYTHING, LOADED_BY, check_pipeline, is_known
from .signatures import bind, check_node, nearest


def check_dataloader(loader: Any, where: str) -> set[str] | None:
    """Check a data loader; returns the keys of a sample, as :func:`check_pipeline` does."""
    if not isinstance(loader, dict):
        return ANYTHING
    batches = loader.get("batch_sampler")
    named = ("num_batch_per_epoch", "disable_subprocess_warning")
    bind(DataLoader, loader, where, supplied=("dataset",), named=named)
    if "dataset" not in loader:
        raise UserError(f"{where} has no dataset")
    check_node(loader.get("sampler"), f"{where}.sampler", DATA_SAMPLERS, supplied=("dataset", "seed"))
    check_node(batches, f"{where}.batch_sampler", DATA_SAMPLERS, supplied=("sampler", "batch_size"))
    check_node(loader.get("collate_fn"), f"{where}.collate_fn", FUNCTIONS, supplied=("data_batch", "batch"))
    given = ("worker_id", "num_workers", "rank", "seed")
    check_node(loader.get("worker_init_fn"), f"{where}.worker_init_fn", FUNCTIONS, supplied=given)
    for field, least in (("batch_size", 1), ("num_workers", 0)):
        if isinstance(loader.get(field), int) and loader[field] < least:
            raise UserError(f"{where}.{field} must be {least} or more, got {loader[field]}")
    if loader.get("shuffle") and loader.get("sampler"):
        raise UserError(f"{where}.shuffle: the sampler decides the order; set {where}.sampler.shuffle")
    if batches and loader.get("drop_last"):
        raise UserError(f"{where}.drop_last: the batch sampler decides it; set {where}.batch_sampler.drop_last")
    return _check_dataset(loader["dataset"], f"{where}.dataset", set())


def _check_dataset(dataset: Any, where: str, mixed: set[str]) -> set[str] | None:
    """Check a data set, those within it, and their pipelines; returns the keys of its samples."""
    if not isinstance(dataset, dict):
        return ANYTHING
    kind = check_node(dataset, where, DATASETS)
    inner = [(f"{where}.dataset", dataset["dataset"])] if isinstance(dataset.get("dataset"), dict) else []
    if isinstance(dataset.get("datasets"), (list, tuple)):
        inner += [(f"{where}.datasets[{i}]", part) for i, part in enumerate(dataset["datasets"])]
    several = {base.__name__ for base in getattr(kind, "__mro__", ())} & {"MultiImageMixDataset"}
    loaded = mixed if is_known(kind) else ANYTHING
    with DATASETS.switch_scope_and_registry(dataset.get("_scope_")):
        for place, part in inner:
            found = _check_dataset(part, place, mixed)
            loaded = ANYTHING if found is ANYTHING or loaded is ANYTHING else loaded | found
        if several and loaded is not ANYTHING:
            loaded = loaded | {"mix_results"}
        if is_known(kind):
            _check_settings(dataset, where)
        steps = dataset.get("pipeline")
        if isinstance(steps, (str, dict)):
            raise UserError(f"{where}.pipeline must be a list of transforms, got {steps!r}")
        return check_pipeline(steps, f"{where}.pipeline", loaded) if isinstance(steps, (list, tuple)) else loaded


def check_targets(cfg: Config, loaded: set[str]) -> None:
    """Refuse a training pipeline that does not load what predictions are compared with."""
    if "img" in loaded and not any(key.startswith("gt_") for key in loaded):
        loader = LOADED_BY["gt_bboxes"]
        raise UserError(f"train_dataloader: its pipeline loads no annotations; add {loader}")
    head = cfg.get("model", {}).get("roi_head")
    if isinstance(head, dict) and head.get("mask_head") and loaded and "gt_masks" not in loaded:
        loader = LOADED_BY["gt_masks"]
        raise UserError(f"train_dataloader: model.roi_head.mask_head needs gt_masks; add {loader}")


def _check_settings(dataset: dict, where: str) -> None:
    """Check fields that are dictionaries themselves: data sets read some of their keys and ignore the rest."""
    known = dict(
        metainfo={"classes", "palette"},
        filter_cfg={"filter_empty_gt", "min_size", "bbox_min_size"},
        data_prefix={"img", "img_path", "seg", "seg_map_path"},
    )
    for field, keys in known.items():
        node = dataset.get(field)
        if not isinstance(node, dict):
            continue
        for key in node:
            near = nearest(key, keys, cutoff=0.8)
            if key not in keys and near:
                raise UserError(f"{where}.{field}.{key}: no data set reads it; did you mean {near}?")
