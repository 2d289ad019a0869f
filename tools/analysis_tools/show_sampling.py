"""Show where queries look: the sampling points of every decoder stage over the image, coloured by pyramid level.

A panel is one query in one stage. A point's colour is its z, the continuous pyramid level: z = log2(stride) reads that
level most, and its neighbours by the softmax of 3D sampling. Its marker is the sampling group. The dashed box is the
one from which the stage places its points, the solid box the one that it predicts. Points beyond a panel are drawn
hollow at its edge.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", help="picture to detect in")
    parser.add_argument("config", help="config of an AdaMixer, plain or with LORS")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument(
        "--queries",
        nargs="+",
        default=["best", "2"],
        metavar="Q",
        help="'best K', by the last stage's score, or numbers of queries (default: best 2)",
    )
    parser.add_argument("--stages", nargs="+", type=int, metavar="S", help="numbers, from 0 (default: all)")
    parser.add_argument("--zoom", action="store_true", help="show points and boxes instead of the whole image")
    parser.add_argument("--levels", action="store_true", help="add the mean weight of each level below each panel")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write: .png, .pdf or .svg")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import mmcv
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from mmdet.apis import inference_detector
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import Tensor

from mmdet_lors.adamixer import QueryBased
from mmdet_lors.adamixer.boxes import xyzr_to_xyxy
from mmdet_lors.adamixer.sampling.backends import level_weights
from mmdet_lors.analysis.arguments import check_writable
from mmdet_lors.analysis.output import console, save_figure
from mmdet_lors.engine.checkpoint.config_and_weights import read_config, read_weights
from mmdet_lors.engine.config_check import check_operators
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError

MARKERS = "osD^vP*X"
COLOURS = colormaps["plasma"]
SAMPLED_FROM, PREDICTED = "white", "lime"
MARGIN = 0.1
"""Width of the margin around the image in a panel, as a share of the image's side."""


class StageView(NamedTuple):
    """One stage's points and boxes for each query of one image, in pixels of the original image."""

    points: Tensor
    """(N, G, P, 3): x, y, and z, which stays log2 of pixels of the network's input."""
    sampled_from: Tensor
    """(N, 4), the box (x1, y1, x2, y2) from which the points were placed."""
    predicted: Tensor
    """(N, 4), the box after the stage."""
    scores: Tensor
    """(N, classes)."""
    weights: Tensor
    """(N, G, P, L), the share of each pyramid level in each point."""


@torch.no_grad()
def look(model: QueryBased, image: str) -> list[StageView]:
    """Detect in one image and keep what every stage sampled.

    A forward hook on each stage's sampling module computes its points from the inputs of the call.

    Args:
        model: a detector in evaluation mode with ``cfg`` set.
        image: a file.
    """
    decoder, asked, outputs = model.decoder, [], []

    def keep_points(module, inputs, _) -> None:
        _, content, xyzr = inputs
        asked.append((module.points(content, xyzr), xyzr))

    hooks = [stage.sampling.register_forward_hook(keep_points) for stage in decoder.stages]
    hooks.append(decoder.register_forward_hook(lambda module, inputs, output: outputs.extend(output)))
    try:
        sample = inference_detector(model, image)
    finally:
        for hook in hooks:
            hook.remove()
    scale = torch.tensor(sample.scale_factor, dtype=torch.float32)
    views = []
    for (points, xyzr), output in zip(asked, outputs, strict=True):
        points, before, after = (x[0].float().cpu() for x in (points, xyzr_to_xyxy(xyzr), output.bboxes))
        weights = level_weights(points[..., 2], points.new_tensor(decoder.featmap_strides))
        points = torch.cat([points[..., :2] / scale, points[..., 2:]], dim=-1)
        scores = output.cls_score[0].sigmoid().float().cpu()
        views.append(StageView(points, before / scale.repeat(2), after / scale.repeat(2), scores, weights))
    return views


def choose_queries(words: Sequence[str], scores: Tensor) -> list[int]:
    """'best K' -> the K queries with the highest scores (N, classes), best first; numbers stay as they are.

    Raises:
        UserError: anything else, or a number that is not a query's.
    """
    count = len(scores)
    numbers = words[1:] if words[0] == "best" else words
    if not all(word.isdecimal() for word in numbers) or (words[0] == "best" and len(numbers) != 1):
        raise UserError(f"--queries {' '.join(words)}: must be 'best K' or numbers of queries")
    ids = [int(word) for word in numbers]
    if words[0] == "best":
        if not 1 <= ids[0] <= count:
            raise UserError(f"--queries best {ids[0]}: K must be 1 to {count}, the model's queries")
        return scores.amax(dim=1).topk(ids[0]).indices.tolist()
    if wrong := [i for i in ids if i >= count]:
        raise UserError(f"--queries {wrong[0]}: the model has queries 0 to {count - 1}")
    return ids


def draw(
    image: np.ndarray,
    views: Sequence[StageView],
    queries: Sequence[int],
    stages: Sequence[int],
    strides: Sequence[int],
    classes: Sequence[str] | None = None,
    zoom: bool = False,
    levels: bool = False,
) -> Figure:
    """A grid of panels, a row per query and a column per stage.

    Args:
        image: (H, W, 3), RGB.
        views: what :func:`look` returned.
        queries, stages: numbers of those to draw.
        strides: strides of the pyramid's levels, in pixels.
        classes: class names; None shows numbers.
        zoom: show the points and boxes of a panel instead of the whole image.
        levels: add a bar with the mean weight of each level below each panel.
    """
    height, width = image.shape[:2]
    panel = 2.9
    panel_height = panel * min(max(1.0 if zoom else height / width, 0.5), 1.6) + (0.6 if levels else 0.35)
    figure = Figure(figsize=(panel * len(stages) + 1.6, panel_height * len(queries) + 0.8), layout="constrained")
    axes = figure.subplots(len(queries), len(stages), squeeze=False)
    level_z = [math.log2(stride) for stride in strides]
    norm = Normalize(level_z[0] - 1, level_z[-1] + 1)
    grey = image.mean(axis=2)
    for row, query in zip(axes, queries, strict=True):
        for ax, stage in zip(row, stages, strict=True):
            view = views[stage]
            ax.imshow(grey, cmap="gray", extent=(0, width, height, 0), vmin=0, vmax=255)
            _view(ax, view, query, (width, height), zoom)
            dots = _points(ax, view.points[query], norm)
            for box, colour, style in (
                (view.sampled_from[query], SAMPLED_FROM, "--"),
                (view.predicted[query], PREDICTED, "-"),
            ):
                x1, y1, x2, y2 = box.tolist()
                outline = [withStroke(linewidth=3, foreground="black")]
                ax.add_patch(
                    Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, ls=style, lw=1.5, path_effects=outline)
                )
            score, label = view.scores[query].max(dim=0)
            name = classes[label] if classes else f"class {label}"
            ax.set_title(f"stage {stage}: {name!r}, {score:.2f}", fontsize=9)
            ax.set_xticks([])
            ax.set_yticks([])
            if levels:
                shares = view.weights[query].mean(dim=(0, 1)).tolist()
                _level_bar(ax, shares, [COLOURS(norm(z)) for z in level_z])
        row[0].set_ylabel(f"query {query}")
    bar = figure.colorbar(dots, ax=axes, extend="both", shrink=0.8, aspect=30, pad=0.02)
    bar.set_ticks(level_z, labels=[f"stride {stride}" for stride in strides])
    bar.set_label("z of the point: the level that it reads most")
    groups = views[0].points.shape[1]
    handles = [
        Line2D([], [], ls="", marker=MARKERS[g % len(MARKERS)], c="0.6", mec="black", mew=0.5) for g in range(groups)
    ]
    names = [f"group {g}" for g in range(groups)]
    for colour, style, name in ((SAMPLED_FROM, "--", "box sampled from"), (PREDICTED, "-", "box predicted")):
        outline = [withStroke(linewidth=3, foreground="black")]
        handles.append(Line2D([], [], c=colour, ls=style, path_effects=outline))
        names.append(name)
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9, handlelength=3.5
    )
    return figure


def _view(ax: Axes, view: StageView, query: int, size: tuple[int, int], zoom: bool) -> None:
    """Set the part of the plane that a panel shows; a label says how many points lie beyond it."""
    xy = view.points[query, ..., :2].reshape(-1, 2)
    low, high = torch.tensor([0.0, 0.0]), torch.tensor(size, dtype=torch.float32)
    if zoom:
        everything = torch.cat([xy, view.sampled_from[query].view(2, 2), view.predicted[query].view(2, 2)])
        low, high = everything.amin(dim=0), everything.amax(dim=0)
        # Square, so that all panels have one size.
        middle, half = (low + high) / 2, (high - low).max() / 2
        low, high = middle - half, middle + half
    margin = (high - low) * MARGIN
    low, high = low - margin, high + margin
    ax.set_xlim(low[0].item(), high[0].item())
    ax.set_ylim(high[1].item(), low[1].item())
    ax.set_facecolor("0.85")
    beyond = int(((xy < low) | (xy > high)).any(dim=1).sum())
    if beyond:
        ax.text(
            0.5,
            0.03,
            f"{beyond} of {len(xy)} points beyond",
            ha="center",
            fontsize=7,
            transform=ax.transAxes,
            zorder=4,
            bbox=dict(fc="white", ec="none", alpha=0.8, pad=1),
        )


def _points(ax: Axes, points: Tensor, norm: Normalize) -> ScalarMappable:
    """Draw points: filled inside the panel; hollow and moved to the edge if beyond it."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for group, of_group in enumerate(points):
        x, y, z = of_group.unbind(-1)
        shown = torch.stack([x.clamp(left, right), y.clamp(top, bottom)])
        inside = (shown == torch.stack([x, y])).all(dim=0)
        look = dict(marker=MARKERS[group % len(MARKERS)], s=24, zorder=3, clip_on=False)
        ax.scatter(*shown[:, inside], c=z[inside], cmap=COLOURS, norm=norm, lw=0.5, ec="black", **look)
        ax.scatter(*shown[:, ~inside], fc="none", ec=COLOURS(norm(z[~inside].numpy())), lw=1.2, **look)
    return ScalarMappable(norm, COLOURS)


def _level_bar(ax: Axes, shares: Sequence[float], colours: Sequence[tuple]) -> None:
    """Draw the mean weight of each level over the query's points, finest level on the left."""
    bar = ax.inset_axes((0, -0.1, 1, 0.08))
    bar.set_xlim(0, 1)
    bar.axis("off")
    left = 0.0
    for share, colour in zip(shares, colours, strict=True):
        bar.barh(0, share, left=left, color=colour, height=1)
        if share > 0.12:
            luminance = 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2]
            bar.text(
                left + share / 2,
                0,
                f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if luminance > 0.5 else "white",
            )
        left += share


def table(views: Sequence[StageView], queries: Sequence[int], stages: Sequence[int], strides: Sequence[int]) -> Table:
    """One row per query and stage: score, mean z, mean weight of each level, share of points outside the box."""
    grid = Table(title="sampling points, means over groups and points", title_justify="left")
    for name in ("query", "stage", "score", "z", *(f"stride {s}" for s in strides), "outside the box sampled from"):
        grid.add_column(name, justify="right")
    for query in queries:
        for stage in stages:
            view = views[stage]
            xy, (x1, y1, x2, y2) = view.points[query, ..., :2], view.sampled_from[query]
            inside = (xy[..., 0] >= x1) & (xy[..., 0] <= x2) & (xy[..., 1] >= y1) & (xy[..., 1] <= y2)
            shares = view.weights[query].mean(dim=(0, 1)).tolist()
            grid.add_row(
                str(query),
                str(stage),
                f"{view.scores[query].max():.3f}",
                f"{view.points[query, ..., 2].mean():.2f}",
                *(f"{share:.1%}" for share in shares),
                f"{1 - inside.float().mean():.1%}",
            )
    return grid


def load(cfg: Config, checkpoint: str) -> tuple[QueryBased, Sequence[str] | None]:
    """The trained detector in evaluation mode, and its classes if the checkpoint names them."""
    cfg.model.decoder.compile = False  # A compiled stage would trace the hooks.
    model = MODELS.build(cfg.model)
    weights, meta = read_weights(checkpoint, model)
    model.load_state_dict(weights)
    model.cfg = cfg
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_operators(model, cfg.model, device)
    model.to(device).eval()
    return model, meta.get("dataset_meta", {}).get("classes")


def main() -> None:
    """Check everything, detect, draw the picture, print the table."""
    args = parse_args()
    check_writable("--out", args.out)
    if not Path(args.image).is_file():
        raise UserError(f"image {args.image} does not exist")
    image = mmcv.imread(args.image)
    if image is None:
        raise UserError(f"image {args.image} cannot be read: it is not a picture, or damaged")
    cfg = read_config(args.config)
    num_stages, strides = cfg.model.decoder.num_stages, cfg.model.decoder.featmap_strides
    stages = list(range(num_stages)) if args.stages is None else args.stages
    if wrong := [stage for stage in stages if not 0 <= stage < num_stages]:
        raise UserError(f"--stages {wrong[0]}: the model has stages 0 to {num_stages - 1}")
    num_queries = cfg.model.query_generator.num_queries
    choose_queries(args.queries, torch.zeros(num_queries, 1))
    model, classes = load(cfg, args.checkpoint)
    views = look(model, args.image)
    queries = choose_queries(args.queries, views[-1].scores)
    save_figure(draw(image[..., ::-1], views, queries, stages, strides, classes, args.zoom, args.levels), args.out)
    out = console()
    out.print(table(views, queries, stages, strides))
    out.print(f"wrote {args.out}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
