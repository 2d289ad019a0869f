"""Checks a config's pipelines: every transform's fields, and that earlier transforms load what it needs."""

from collections.abc import Callable, Iterator
from typing import Any

from mmengine.registry import TRANSFORMS

from mmdet_lors.engine.new_style import type_name
from mmdet_lors.errors import UserError

from .signatures import bind, fields_of, find, nearest

KNOWN_PACKAGES = ("mmengine", "mmcv", "mmdet", "mmseg", "mmdet_lors", "torch")
"""Packages whose transforms' needs are known; what a user's own class loads or needs is not."""

HOLDERS = {
    "Compose",
    "KeyMapper",
    "RandomChoice",
    "RandomApply",
    "TestTimeAug",
    "MultiBranch",
    "ProposalBroadcaster",
    "MultiScaleFlipAug",
}
"""Transforms that contain others; what other classes contain, such as Albu, may not be mmdet transforms."""

BOXES = {"gt_bboxes"}
LABELLED = {"gt_bboxes", "gt_bboxes_labels", "gt_ignore_flags"}
NEEDS = dict(
    MinIoURandomCrop=BOXES,
    RandomCenterCropPad=BOXES,
    RandomErasing=BOXES,
    RandomAffine=BOXES,
    RandomShift=LABELLED,
    Mosaic=LABELLED | {"mix_results"},
    CachedMosaic=LABELLED,
    MixUp=LABELLED | {"mix_results"},
    CachedMixUp=LABELLED,
    CopyPaste=LABELLED | {"gt_masks", "mix_results"},
    FilterAnnotations=BOXES,
    SegRescale={"gt_seg_map"},
)
"""Keys without which these mmdet transforms fail; all others skip keys that they do not find."""

LOADED_BY = dict(
    img="LoadImageFromFile",
    gt_bboxes="LoadAnnotations(with_bbox=True)",
    gt_bboxes_labels="LoadAnnotations(with_bbox=True, with_label=True)",
    gt_ignore_flags="LoadAnnotations(with_bbox=True)",
    gt_masks="LoadAnnotations(with_bbox=True, with_mask=True)",
    gt_seg_map="LoadAnnotations(with_seg=True)",
    mix_results="a MultiImageMixDataset around the data set, in whose pipeline it belongs",
)

META_KEYS = {
    "img_id",
    "img_path",
    "ori_shape",
    "img_shape",
    "scale_factor",
    "flip",
    "flip_direction",
    "pad_shape",
    "batch_input_shape",
    "img_norm_cfg",
    "seg_map_path",
    "reduce_zero_label",
    "homography_matrix",
}

LOADERS = {"LoadAnnotations", "LoadEmptyAnnotations", "LoadPanopticAnnotations", "LoadTrackAnnotations"}
ANYTHING = None
"""The loaded keys cannot be known, because an unknown transform came before."""


def is_known(kind: Callable) -> bool:
    """Whether a class is from one of :data:`KNOWN_PACKAGES`."""
    return kind.__module__.split(".")[0] in KNOWN_PACKAGES


def check_pipeline(steps: Any, where: str, loaded: set[str] | None) -> set[str] | None:
    """Check the transforms of a pipeline, one after another.

    Args:
        steps: their configs.
        where: the pipeline's place in the config.
        loaded: keys that a sample already has; None if they are not known.

    Returns:
        The keys that a sample has afterwards.

    Raises:
        UserError: an unknown transform or field, a missing one, or a transform that needs a key that nothing before it
            loads.
    """
    for i, step in enumerate(steps):
        if isinstance(step, dict):
            loaded = _check_step(step, f"{where}[{i}]", loaded)
        elif not callable(step):
            raise UserError(f"{where}[{i}] must be a transform, such as dict(type=...), got {step!r}")
        else:
            loaded = ANYTHING
    return loaded


def _check_step(step: dict, where: str, loaded: set[str] | None) -> set[str] | None:
    if "type" not in step:
        raise UserError(f"{where} has no type")
    with TRANSFORMS.switch_scope_and_registry(step.get("_scope_")):
        kind = find(step["type"], TRANSFORMS, where)
        bind(kind, step, where)
        names = {base.__name__ for base in getattr(kind, "__mro__", [])}
        if kind.__name__ in ("RandomChoiceResize", "RandomResize") and is_known(kind):
            _check_inner_resize(kind, step, where)
        if names & HOLDERS:
            return _check_held(step, where, loaded)
    if not is_known(kind):
        return ANYTHING
    _check_needs(kind, step, where, loaded)
    _check_meta_keys(kind, step, where)
    return _after(kind, step, loaded)


def _check_inner_resize(kind: Callable, step: dict, where: str) -> None:
    """Check a transform that passes unknown fields on to the transform that resizes."""
    inner = find(step.get("resize_type", "Resize"), TRANSFORMS, where, "resize_type")
    own = fields_of(kind).names
    bind(inner, {key: value for key, value in step.items() if key not in own}, where, ("scale",), own)


def _check_held(step: dict, where: str, loaded: set[str] | None) -> set[str] | None:
    """Check the pipelines within a transform; what any of them loads counts as loaded."""
    if type_name(step["type"]) in ("KeyMapper", "TransformBroadcaster", "ProposalBroadcaster"):
        loaded = ANYTHING  # keys have other names inside it
    after = loaded
    for place, steps in _pipelines(step, where):
        found = check_pipeline(steps, place, loaded)
        after = ANYTHING if found is ANYTHING or after is ANYTHING else after | found
    return after


def _pipelines(step: dict, where: str) -> Iterator[tuple[str, list]]:
    """(place, pipeline) of every list of transforms in a transform's fields; TestTimeAug's are alternatives."""
    for key, value in step.items():
        if isinstance(value, dict) and "type" in value and key in ("transforms", "policies", "aug_space"):
            yield f"{where}.{key}", [value]
        elif isinstance(value, (list, tuple)) and any(isinstance(item, (dict, list, tuple)) for item in value):
            nested = [i for i, item in enumerate(value) if isinstance(item, (list, tuple))]
            if type_name(step["type"]) == "TestTimeAug" and nested:
                yield from _combined(value, f"{where}.{key}")
            elif nested:
                yield from ((f"{where}.{key}[{i}]", value[i]) for i in nested if _are_transforms(value[i]))
            elif _are_transforms(value):
                yield f"{where}.{key}", value


def _are_transforms(steps: Any) -> bool:
    return all(isinstance(step, dict) and "type" in step for step in steps)


def _combined(choices: list, where: str) -> Iterator[tuple[str, list]]:
    """The pipelines of TestTimeAug, which takes one transform from each of its lists; each occurs at least once."""
    for j in range(max(len(choice) for choice in choices)):
        yield where, [choice[min(j, len(choice) - 1)] for choice in choices if len(choice)]


def _check_needs(kind: Callable, step: dict, where: str, loaded: set[str] | None) -> None:
    if loaded is ANYTHING:
        return
    name = kind.__name__
    needs = set(NEEDS.get(name, ())) if not step.get("test_mode") else set()
    if name == "FilterAnnotations" and step.get("by_mask"):
        needs.add("gt_masks")
    if name == "CopyPaste" and step.get("paste_by_box"):
        needs.discard("gt_masks")
    if needs or name.startswith(("Resize", "RandomFlip", "Pad", "RandomCrop", "Random", "PhotoMetric", "Expand")):
        needs.add("img")
    if name in HOLDERS or name.startswith(("RandomSampling", "Load", "Pack")):
        needs.discard("img")
    for key in sorted(needs - loaded):
        raise UserError(f"{where}: {name} needs {key}, which nothing before it loads; add {LOADED_BY[key]}")


def _check_meta_keys(kind: Callable, step: dict, where: str) -> None:
    if not kind.__name__.startswith("Pack"):
        return
    for key in step.get("meta_keys") or ():
        if key not in META_KEYS and (near := nearest(str(key), META_KEYS)):
            raise UserError(f"{where}.meta_keys: nothing sets {key!r}; did you mean {near}?")


def _after(kind: Callable, step: dict, loaded: set[str] | None) -> set[str] | None:
    """The keys that a sample has after a known transform."""
    name = kind.__name__
    if loaded is ANYTHING or name in ("LoadTextAnnotations", "LoadReferImage", "InstaBoost", "InferencerLoader"):
        return ANYTHING
    if name in ("LoadImageFromFile", "LoadImageFromNDArray", "LoadMultiChannelImageFromFiles"):
        return loaded | {"img"}
    if name.startswith("Load") and name not in LOADERS | {"LoadProposals"}:
        return ANYTHING
    if name in LOADERS:
        found = set()
        if step.get("with_bbox", name != "LoadAnnotations" or "mmseg" not in kind.__module__):
            found |= {"gt_bboxes", "gt_ignore_flags"}
        if step.get("with_label", True):
            found.add("gt_bboxes_labels")
        if step.get("with_mask", name == "LoadPanopticAnnotations"):
            found.add("gt_masks")
        if step.get("with_seg", name == "LoadPanopticAnnotations" or "mmseg" in kind.__module__):
            found.add("gt_seg_map")
        return loaded | found
    return loaded | {"gt_masks"} if name == "CopyPaste" else loaded
