"""The device computes what the CPU does: golden values, sampling back ends, mixed precision, compiled stages."""

import time
from collections.abc import Sequence
from functools import partial

import golden as golden_files
import torch
from analysis_tools.decoder_benchmark.case import Case, total
from torch import Tensor

from mmdet_lors.adamixer.sampling import sample_3d
from mmdet_lors.adamixer.sampling.backends import arrange
from mmdet_lors.adamixer.stage import StageOutput
from mmdet_lors.conversion.reference import DROPPED, convert

from .check import Machine, Sheet, error, name_of

HALVES = (torch.float16, torch.bfloat16)
STRIDES = (4, 8, 16, 32)


def golden(machine: Machine, sheet: Sheet) -> None:
    """Section 2: operators, stages, losses and gradients against the recorded ones.

    Random weights amplify rounding a million times from stage to stage: in float32 only what has recorded inputs, or is
    the first stage's, is compared.
    """
    measured = {}
    for name in golden_files.NAMES:
        for backend in machine.back_ends():
            for dtype in (torch.float64, torch.float32):
                recorded, model = golden_files.load(name)
                model.decoder.sampling = backend
                model.to(machine.device, dtype)
                label, most = f"{name}, {backend}, {name_of(dtype)}", 1e-8 if dtype == torch.float64 else 1e-4
                feats = [feat.to(machine.device, dtype).requires_grad_() for feat in recorded["feats"]]
                found = operator_errors(recorded, model, feats)
                outputs = model.decoder(feats, *model.query_generator(recorded["image_sizes"]))
                found["first stage"] = stage_error(outputs[0], recorded["stages"][0])
                if dtype == torch.float64:
                    found["stages"] = max(map(stage_error, outputs, recorded["stages"]))
                    found |= loss_errors(recorded, model, feats)
                measured |= {f"{label}: {what}": (value, most) for what, value in found.items()}
    sheet.limits(measured)


def operator_errors(recorded: dict, model: torch.nn.Module, feats: Sequence[Tensor]) -> dict[str, float]:
    """Of sampling and of every stage's mixing, on recorded inputs."""
    decoder, given = model.decoder, recorded["op_sampling"]
    content, points, mixed = (
        t.to(feats[0].device, feats[0].dtype)
        for t in (recorded["query_content"], given["sample_points"], given["sampled"])
    )
    groups = recorded["params"]["groups"]
    points = points.squeeze(2).unflatten(2, (groups, -1))
    pyramid = arrange(feats, recorded["featmap_strides"], groups, decoder.sampling)
    out = recorded["op_mixing"]["out"]
    errors = []
    for i, (stage, expected) in enumerate(
        zip(decoder.stages, out if decoder.lorsa else [out], strict=bool(decoder.lorsa))
    ):
        halves = [half and partial(half, layer=i) for half in (decoder.lorsa, decoder.lorst)]
        if not decoder.lorsa:  # recorded without its norm
            stage.mixing.norm, norm = torch.nn.Identity(), stage.mixing.norm
        errors.append(error(stage.mixing(mixed, content, *halves), expected))
        if not decoder.lorsa:
            stage.mixing.norm = norm
    return {"sampling": error(sample_3d(pyramid, points), given["sampled"]), "mixing": max(errors)}


def stage_error(output: StageOutput, expected: dict) -> float:
    """The largest of what a stage predicts."""
    keys = ("cls_score", "query_xyzr", "bboxes", "query_content")
    return max(error(ours, expected[key]) for ours, key in zip(output, keys, strict=True))


def loss_errors(recorded: dict, model: torch.nn.Module, feats: Sequence[Tensor]) -> dict[str, float]:
    """Of the losses, and of all gradients together."""
    samples = golden_files.samples(recorded)
    for sample in samples:
        sample.gt_instances = sample.gt_instances.to(feats[0].device)
    losses = model.decoder.loss(feats, *model.query_generator(recorded["image_sizes"]), samples)
    total(losses).backward()
    kept = {key: grad for key, grad in recorded["grads"].items() if key not in DROPPED}
    expected, found = convert(kept, recorded["params"]["groups"]), dict(model.named_parameters())
    ours = torch.cat([found[key].grad.flatten() for key in expected])
    return {
        "losses": max(abs(losses[key].item() - x) / max(abs(x), 1e-30) for key, x in recorded["losses"].items()),
        "gradients": error(ours, torch.cat([grad.flatten() for grad in expected.values()])),
    }


def levels(batch: int, channels: int, size: tuple[int, int], machine: Machine) -> list[Tensor]:
    """Random feature levels of an image of (H, W) pixels."""
    return [torch.randn(batch, channels, -(-size[0] // s), -(-size[1] // s), device=machine.device) for s in STRIDES]


def random_points(
    shape: tuple[int, ...], size: tuple[int, int], machine: Machine, outside: float = 0.0
) -> tuple[Tensor, Tensor]:
    """xy and z in float32, up to a share of the image outside it.

    No x or y is so near to the middle of a cell, on any level, that rounding could move it into another.
    """
    width_height = torch.tensor([size[1], size[0]], device=machine.device)
    xy = (torch.rand(*shape, 2, device=machine.device) * (1 + 2 * outside) - outside) * width_height
    return xy.floor() + 0.25, 5 * torch.rand(*shape, 1, device=machine.device) + 1


def sampled(feats: Sequence[Tensor], xy: Tensor, z: Tensor, backend: str) -> dict[str, Tensor]:
    """Samples, and the gradients of levels, xy and z."""
    feats, xy, z = (
        [f.detach().requires_grad_() for f in feats],
        xy.detach().requires_grad_(),
        z.detach().requires_grad_(),
    )
    out = sample_3d(arrange(feats, STRIDES, xy.shape[2], backend), torch.cat([xy, z], dim=-1))
    *of_feats, of_xy, of_z = torch.autograd.grad((out.double() * out.detach().double().cos()).sum(), [*feats, xy, z])
    return dict(value=out.detach(), levels=torch.cat([g.flatten() for g in of_feats]), xy=of_xy, z=of_z)


def sampling(machine: Machine, sheet: Sheet) -> None:
    """Section 3: every back end against grid_sample in float64; then its time and bandwidth."""
    size, measured = (135, 203), {}  # odd at every level
    for groups, points, channels in ((2, 9, 48), (4, 32, 256)):
        feats = levels(2, channels, size, machine)
        xy, z = random_points((2, 23, groups, points), size, machine, outside=0.1)
        for dtype in (torch.float32, *HALVES):
            rounded = [f.to(dtype) for f in feats]
            exact = sampled([f.double() for f in rounded], xy.double(), z.double(), "grid_sample")
            for backend in machine.back_ends():
                found = sampled(rounded, xy, z, backend)
                for what, expected in exact.items():
                    most = 2e-2 if dtype in HALVES else 1e-5 if what == "value" else 1e-4
                    label = f"{backend}, {name_of(dtype)}, {groups} x {points}: {what}"
                    measured[label] = error(found[what], expected), most
    for backend in machine.back_ends():
        if backend == "deformable":  # mmcv's operator divides by the batch
            continue
        empty = sampled([f[:0] for f in feats], xy[:0], z[:0], backend)
        measured[f"{backend}: elements of an empty batch"] = sum(t.numel() for t in empty.values()), 0
    sheet.limits(measured)
    wrong = {label.partition(",")[0] for label, (value, most) in measured.items() if not value <= most}
    sampling_speed(machine, sheet, wrong)


def sampling_speed(machine: Machine, sheet: Sheet, wrong: set[str]) -> None:
    """Times of all back ends; bytes are the least: 16 cells read and a sample written a point."""
    size = (64, 96) if machine.tiny else (800, 1344)
    channels, batch, times = 256, 2, {}
    copies = machine.figure("environment", "copy bytes/s")
    sheet.parts.append(
        f"{size[0]} x {size[1]} pixels, batch {batch}, {channels} channels. A time is of sampling alone, its levels "
        "already arranged. GB/s counts the least bytes (of each point, 4 cells of 4 levels read and a sample written) "
        "over the forward time, in brackets its share of the copy's."
    )
    header = ["groups x points", "queries", "levels", "back end", "forward, us", "forward + backward, us", "GB/s"]
    rows, sheet.figures["times"] = sheet.table(*header), times
    for groups, points, queries in [(2, 64, 300), (2, 64, 100), (4, 32, 300), (4, 32, 100)][: 1 if machine.tiny else 4]:
        queries = 10 if machine.tiny else queries
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            feats = [f.to(dtype).requires_grad_() for f in levels(batch, channels, size, machine)]
            xy, z = random_points((batch, queries, groups, points), size, machine)
            at = torch.cat([xy, z], dim=-1).requires_grad_()
            for backend in machine.back_ends():
                pyramid = arrange(feats, STRIDES, groups, backend)
                held = pyramid._replace(features=tuple(f.detach().requires_grad_() for f in pyramid.features))

                def forward(held=held, at=at):
                    with torch.no_grad():
                        return sample_3d(held, at)

                def both(held=held, at=at):
                    out = sample_3d(held, at)
                    torch.autograd.grad(out, [*held.features, at], torch.ones_like(out))

                turns, repeats = (3, 1) if machine.tiny else (20, 10)  # a GPU works while the host prepares the next
                out = forward()
                cell = (channels // groups) * held.features[0].element_size() * 16
                floor = at.shape[:-1].numel() * (cell + (channels // groups) * out.element_size())
                taken = [machine.median_time(call, turns, most=0.2, repeats=repeats) for call in (forward, both)]
                times[f"{groups}x{points}, {queries}, {name_of(dtype)}, {backend}"] = dict(
                    forward=taken[0], both=taken[1], floor_bytes=floor
                )
                share = f" ({100 * floor / taken[0] / copies:.0f} %)" if copies else ""
                rows.append([
                    f"{groups} x {points}", str(queries), name_of(dtype), backend, *(f"{t * 1e6:.0f}" for t in taken),
                    f"{floor / taken[0] / 1e9:.0f}{share}",
                ])  # fmt: skip
                machine.save()
    best = {}
    for dtype in ("float32", "bfloat16"):
        keys = [key for key in times if key.startswith("2x64, ") and f", {dtype}, " in key]
        found = {key.rpartition(", ")[2]: times[key]["both"] for key in reversed(keys)}  # of the most queries
        best[dtype] = min(found.keys() - wrong, key=found.get, default="auto")
    sheet.figures["fastest"] = best
    sheet.note += f"; fastest in float32 {best['float32']}, in bfloat16 {best['bfloat16']}"


def small_case(machine: Machine, **options: object) -> Case:
    """The LORS R50 decoder at small size; the same weights and levels each time. Half precision takes a CPU long."""
    queries, stages = (4, 2) if machine.tiny else (20, 6)
    options = dict(stages=stages) | options
    return Case("LORS", "backward", queries, 2, (128, 96), "decoder", str(machine.device), **options)


def step(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """Losses, and all gradients in one row."""
    case.model.zero_grad()
    losses = case.losses()
    total(losses).backward()
    grads = [p.grad.flatten().double() for p in case.model.parameters() if p.grad is not None]
    return {k: v.detach() for k, v in losses.items()}, torch.cat(grads)


def hold_matching(case: Case) -> None:
    """Match as the first time: one match that flips changes everything."""
    assign, held = case.model.decoder.assign, []

    def first(*args):
        if not held:
            held.append(assign(*args))
        return held[0]

    case.model.decoder.assign = first


LIMITS = {torch.bfloat16: (2e-2, 2.0, 1e-2, 0.1), torch.float16: (2e-3, 0.2, 1e-3, 0.01)}
"""Of logits, relative; boxes, pixels; loss, relative; gradients, 1 - cosine; as in tests/adamixer/test_precision.py."""


def precision(machine: Machine, sheet: Sheet) -> None:
    """Section 4: autocast against float32."""
    case = small_case(machine)
    hold_matching(case)
    losses, grads = step(case)
    outputs, measured = case.outputs(), {}
    for dtype, (logits, pixels, loss, angle) in LIMITS.items():
        case.amp = dtype
        half_losses, half_grads = step(case)
        half_outputs = case.outputs()
        pairs = list(zip(half_outputs, outputs, strict=True))
        name = name_of(dtype)
        ours, theirs = total(half_losses), total(losses)
        not_finite = sum((~torch.isfinite(t)).sum().item() for t in (ours, half_grads, *half_outputs[-1]))
        measured |= {
            f"{name}: logits": (max(error(a.cls_score, b.cls_score) for a, b in pairs), logits),
            f"{name}: boxes, pixels": (max((a.bboxes - b.bboxes).abs().max().item() for a, b in pairs), pixels),
            f"{name}: loss": (abs(ours / theirs - 1).item(), loss),
            f"{name}: gradients, 1 - cosine": (1 - torch.cosine_similarity(half_grads, grads, dim=0).item(), angle),
            f"{name}: numbers that are not finite": (not_finite, 0),
        }
    sheet.limits(measured)


def compiled(machine: Machine, sheet: Sheet) -> None:
    """Section 5: stages compiled as one graph each against the same ones not compiled."""
    arguments = dict(backend="aot_eager") if machine.tiny else True
    measured, stages = {}, 2 if machine.tiny else 3
    backend = machine.figure("sampling", "fastest", {}).get("float32", "auto")
    eager = small_case(machine, stages=stages, sampling=backend)
    losses, grads = step(eager)
    case = small_case(machine, stages=stages, sampling=backend, compile=arguments)
    begin = time.perf_counter()
    found_losses, found_grads = step(case)
    taken = time.perf_counter() - begin
    measured["losses"] = max(abs(found_losses[k] / v - 1).item() for k, v in losses.items() if "loss" in k and v), 1e-4
    measured["gradients"] = error(found_grads, grads), 1e-3
    sheet.limits(measured)
    sheet.figures["first step"] = taken
    sheet.note += f"; the first step of {stages} stages took {taken:.1f} s"
    sheet.parts.append(f"{stages} stages, sampling {backend}; the first step, with compilation: {taken:.1f} s.")
    torch.compiler.reset()
