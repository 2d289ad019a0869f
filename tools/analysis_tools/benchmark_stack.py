"""Time what LORST adds to a training step: DeiT-Tiny with LORST in all attention and FFN weights against the plain one.

Both models take turns in one process, a few steps each, so that other load on the machine affects both. A step is
forward, backward and AdamW on random images. It prints the median times over the turns, and the median of the turns'
ratios. The allocation is the paper's (rank 32, groups 1 1 1 1 1 1 1 1 1 2 4 6 in attention, 6 4 2 1 1 1 1 1 1 1 1 1 in
FFNs).

    python tools/analysis_tools/benchmark_stack.py --threads 2 --max-ratio 1.10
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images per step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=56, metavar="PX", help="side of an image (default: %(default)s)")
    parser.add_argument("--patch", type=int, default=4, metavar="PX", help="side of a patch (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=15, metavar="N", help="turns per model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="steps per turn (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="turns not counted (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own choice)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--max-ratio", type=float, metavar="X", help="exit status 1 if LORST takes more than X x plain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_lors.analysis.timing import interleaved, ratio, seconds
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError
from mmdet_lors.lors import share_stack
from mmdet_lors.valid_json import to_json

CLASSES = 100
ATTENTION, FFN = [1] * 9 + [2, 4, 6], [6, 4, 2] + [1] * 9


def check(args: argparse.Namespace) -> None:
    """Refuse what argparse cannot know.

    Raises:
        UserError: names the option.
    """
    for name, least in dict(batch=1, size=1, patch=1, turns=1, steps=1, warm_up=0, threads=1).items():
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")
    if args.size % args.patch:
        raise UserError(f"--size {args.size} is not a multiple of --patch {args.patch}")
    if args.device not in ("cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device!r} is not available here; use cpu or cuda")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: folder {args.json.parent} does not exist")


def build(lors: bool, size: int, patch: int, device: str) -> nn.Module:
    """Build DeiT-Tiny, with LORST or without."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=size, patch_size=patch, num_classes=CLASSES)
    if lors:
        groups = {"attn.*": ATTENTION, "mlp.*": FFN}
        share_stack(model.blocks, ["attn.*", "mlp.*"], rank=32, groups=groups)
    return model.to(device).train()


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A function that trains the model by one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure and print."""
    args = parse_args()
    check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    labels = torch.randint(CLASSES, (args.batch,), device=args.device)
    models = {name: build(name == "LORST", args.size, args.patch, args.device) for name in ("plain", "LORST")}
    steps = {name: training_step(model, images, labels) for name, model in models.items()}
    timed = {name: partial(seconds, step, args.device, args.steps) for name, step in steps.items()}
    times = interleaved(timed, args.turns, args.warm_up, alternate=True)

    share = ratio(times, "LORST", "plain")
    medians = {name: median(values) for name, values in times.items()}
    parameters = {name: sum(p.numel() for p in model.blocks.parameters()) for name, model in models.items()}
    print(
        f"batch {args.batch}, {args.size} px, patch {args.patch}, {torch.get_num_threads()} threads, "
        f"{args.turns} turns of {args.steps} steps"
    )
    for name, value in medians.items():
        print(f"{name:6} {parameters[name]:>10,} parameters in the layers, {1000 * value:8.1f} ms a step")
    print(f"LORST takes {share:.3f} x the time of plain")
    if args.json:
        settings = {name: getattr(args, name) for name in ("batch", "size", "patch", "turns", "steps", "device")}
        settings["threads"] = torch.get_num_threads()
        args.json.write_text(
            to_json(dict(settings, parameters=parameters, seconds=times, ratio=share), indent=2) + "\n"
        )
    if args.max_ratio and share > args.max_ratio:
        raise UserError(f"LORST takes {share:.3f} x the time of plain, more than {args.max_ratio}")


if __name__ == "__main__":
    run(main)
