"""Time what PELA saves and what it costs: inference before and after, compression, and exact against randomised SVD.

With --training: time and memory of a training step of both, AdamW and cross entropy, as in the paper's Table 8, and how
large a batch of the compressed one needs no more memory, which its Table 9 uses.

Everything is measured in this one run, on the CPU by default. Times are medians over repeats in which the two sides
take turns, so that both see the same machine. Weights are random unless --checkpoint gives trained ones. Random ones
are a hard case: their singular values fall slowly, so that much is cut off and directions are hard to tell apart.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="deit_base_patch16_224", help="name of a timm model (default: %(default)s)")
    parser.add_argument("--checkpoint", help="its weights: a file or timm://NAME (default: random ones)")
    parser.add_argument("--ratio", type=float, default=2, help="compression ratio (default: %(default)s)")
    parser.add_argument("--omit", nargs="*", help="names of layers to leave uncompressed (default: the paper's)")
    parser.add_argument("--batch", type=int, default=8, help="images per call (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="repeats of each side (default: %(default)s)")
    parser.add_argument("--training", action="store_true", help="a training step of both instead")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_lors.analysis.output import console
from mmdet_lors.analysis.timing import hardware, interleaved, ratio, seconds
from mmdet_lors.analysis.training_memory import training_memory
from mmdet_lors.classification.classifier import create_network
from mmdet_lors.classification.pretrained import read_weights
from mmdet_lors.engine.checkpoint.reading import check_fit
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError
from mmdet_lors.pela import OMIT, LowRankLinear, compress
from mmdet_lors.pela.low_rank import best_factors
from mmdet_lors.valid_json import to_json


@dataclass(frozen=True)
class Pair:
    """Seconds of the original and of the compressed side, medians over the same number of repeats."""

    original: float
    compressed: float

    @property
    def share(self) -> float:
        """The compressed side's share of the original's time."""
        return self.compressed / self.original


@dataclass(frozen=True)
class Factorisation:
    """One way to factorise all weights: seconds, and the relative error over all of them, ||W - V U^T|| / ||W||."""

    seconds: float
    error: float


@torch.inference_mode()
def compare(
    original: Callable[[], object], compressed: Callable[[], object], repeats: int, device: torch.device
) -> Pair:
    """Time both in turn, after one call of each that does not count."""
    sides = dict(original=original, compressed=compressed)
    found = interleaved({name: partial(seconds, call, device) for name, call in sides.items()}, repeats)
    return Pair(**{name: median(times) for name, times in found.items()})


def inputs_of_linears(model: nn.Module, names: Sequence[str], images: Tensor) -> list[Tensor]:
    """The input of each of these layers when the model runs on these images."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name in names
    ]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in names]


def all_layers(layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """A function that calls each layer once with its own input."""

    def call() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)

    return call


def lowrank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same by :func:`torch.svd_lowrank`, with 16 directions and 4 turns more: near the best, but not the best."""
    left, values, right = torch.svd_lowrank(weight, min(rank + 16, *weight.shape), niter=4)
    half = values[:rank].sqrt()
    return right[:, :rank] * half, left[:, :rank] * half


def svd_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same as :func:`best_factors`, by a full SVD in the weight's own precision."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    half = values[:rank].sqrt()
    return right[:rank].T * half, left[:, :rank] * half


def factorise_all(
    weights: Sequence[Tensor], ranks: Sequence[int], how: Callable[[Tensor, int], tuple[Tensor, Tensor]]
) -> Factorisation:
    """Factorise every weight; returns the time and the error over all of them."""
    pairs = []
    taken = seconds(lambda: pairs.extend(map(how, weights, ranks)), weights[0].device)
    rest = sum(
        (w.double() - V.double() @ U.double().T).square().sum() for w, (U, V) in zip(weights, pairs, strict=True)
    )
    return Factorisation(taken, (rest / sum(w.double().square().sum() for w in weights)).sqrt().item())


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict:
    """All figures of the report and of --json."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = create_network(args.model).to(device).eval()
    if args.checkpoint:
        weights = read_weights(args.checkpoint)
        check_fit(model, weights, args.checkpoint)
        model.load_state_dict(weights)
    images = torch.randn(args.batch, *model.default_cfg["input_size"], device=device)

    made = []
    compressing = seconds(lambda: made.append(compress(model, args.ratio, args.omit)), device)
    compressed, report = made[0]
    names = [layer.name for layer in report]
    inputs = inputs_of_linears(model, names, images)
    sides = [[side.get_submodule(name) for name in names] for side in (model, compressed)]
    assert all(isinstance(layer, LowRankLinear) for layer in sides[1])
    linears = compare(*(all_layers(side, inputs) for side in sides), args.repeats, device)
    del inputs
    whole = compare(lambda: model(images), lambda: compressed(images), args.repeats, device)

    weights, ranks = [layer.weight for layer in sides[0]], [layer.rank for layer in report]
    ways = {
        "exact": best_factors,
        "torch.svd_lowrank": lowrank_factors,
        "torch.linalg.svd": svd_factors,
    }
    return dict(
        model=args.model,
        checkpoint=args.checkpoint,
        ratio=args.ratio,
        omit=args.omit,
        batch=args.batch,
        repeats=args.repeats,
        machine=hardware(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
        layers=len(report),
        parameters=[sum(p.numel() for p in side.parameters()) for side in (model, compressed)],
        compressing=compressing,
        linears=linears,
        whole=whole,
        factorisation={name: factorise_all(weights, ranks, how) for name, how in ways.items()},
    )


def measure_training(args: argparse.Namespace) -> dict:
    """The figures of --training: seconds of a step, and bytes."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    original = create_network(args.model).to(device).train()
    compressed, _ = compress(original, args.ratio, args.omit)
    images = torch.randn(args.batch, *original.default_cfg["input_size"], device=device)
    labels = torch.randint(original.num_classes, (args.batch,), device=device)

    def prepare(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], Tensor]]:
        return torch.optim.AdamW(model.parameters()), lambda: F.cross_entropy(model(images), labels)

    def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    models = dict(original=original, compressed=compressed)
    parts = {name: prepare(model) for name, model in models.items()}
    memory = {name: training_memory(model, *parts[name]) for name, model in models.items()}
    timed = {name: partial(seconds, partial(step, *part), device) for name, part in parts.items()}
    found = interleaved(timed, args.repeats, alternate=True)
    return dict(
        model=args.model,
        ratio=args.ratio,
        batch=args.batch,
        machine=hardware(device),
        seconds={name: median(times) for name, times in found.items()},
        share=ratio(found, "compressed", "original"),
        weights={name: m.weights for name, m in memory.items()},
        activations={name: m.activations for name, m in memory.items()},
        largest_batch=memory["compressed"].largest_batch(args.batch, memory["original"]),
    )


def print_training(result: dict) -> None:
    """Print a table and what it was measured on."""
    out = console()
    out.print(f"{result['model']}, ratio {result['ratio']}, batch {result['batch']}, {result['machine']}")
    grid = Table("", title="a training step", title_justify="left")
    for column in ("original", "compressed", "share"):
        grid.add_column(column, justify="right")
    seconds = [result["seconds"][name] for name in ("original", "compressed")]
    grid.add_row("ms per image", *(f"{1e3 * s / result['batch']:.1f}" for s in seconds), f"{result['share']:.3f}")
    total = [0, 0]
    for label in ("weights", "activations"):
        sizes = [result[label][name] for name in ("original", "compressed")]
        total = [a + b for a, b in zip(total, sizes, strict=True)]
        grid.add_row(f"{label}, GB", *(f"{b / 1e9:.3f}" for b in sizes), f"{sizes[1] / sizes[0]:.3f}")
    grid.add_row("both, GB", *(f"{b / 1e9:.3f}" for b in total), f"{total[1] / total[0]:.3f}")
    out.print(grid)
    out.print(
        "weights: with gradients and AdamW's state; activations: what autograd keeps. As much memory as the original "
        f"at batch {result['batch']} is enough for batch {result['largest_batch']} of the compressed."
    )


def print_report(result: dict) -> None:
    """Print two tables and what they were measured on."""
    out = console()
    before, after = result["parameters"]
    out.print(
        f"{result['model']}, ratio {result['ratio']}: {before:,} -> {after:,} parameters, {result['layers']} layers "
        f"compressed in {result['compressing']:.1f} s\n{result['machine']}, {result['threads']} threads, torch "
        f"{result['torch']}, batch {result['batch']}, median of {result['repeats']}",
        soft_wrap=True,
    )
    times = Table(title="inference", title_justify="left")
    for column in ("", "original, s", "compressed, s", "share"):
        times.add_column(column, justify="right" if column else "left")
    for label, key in (("Linear layers together", "linears"), ("whole model", "whole")):
        pair: Pair = result[key]
        times.add_row(label, f"{pair.original:.4f}", f"{pair.compressed:.4f}", f"{pair.share:.3f}")
    out.print(times)
    ways = Table(title="factorising all weights", title_justify="left")
    for column in ("", "seconds", "relative error"):
        ways.add_column(column, justify="right" if column else "left")
    for label, way in result["factorisation"].items():
        ways.add_row(label, f"{way.seconds:.2f}", f"{way.error:.6f}")
    out.print(ways)


def plain(value: Any) -> Any:
    """The same without dataclasses, as JSON has it."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return asdict(value) if is_dataclass(value) else value


def main() -> None:
    """Measure, print the report, and write it."""
    args = parse_args()
    for option in ("batch", "repeats"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option} must be 1 or more, got {getattr(args, option)}")
    if args.omit is None:
        args.omit = list(OMIT)
    try:
        result = measure_training(args) if args.training else measure(args)
    except ValueError as error:
        raise UserError(str(error)) from error
    (print_training if args.training else print_report)(result)
    if args.json:
        args.json.write_text(to_json(plain(result), indent=1) + "\n")


if __name__ == "__main__":
    run(main)
