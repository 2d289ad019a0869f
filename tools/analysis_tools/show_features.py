"""How alike the features are that enter the layers of a stack, and which K per layer this suggests for LORS.

A stack is AdaMixer's decoder, the decoder of one of mmdet's DETRs, or the blocks of a vision transformer; its tokens
are queries or patches. --layers names another, whose layers take tensors of (images, tokens, channels). Four things are
measured at the input of every layer, and at the output of the last ("out"):

- CKA: linear centred kernel alignment with every other place, over all tokens of all images. 1: the same features, but
  for a rotation and a scale.
- Cosine: between a token there and the same token at another place, mean over tokens.
- Tokens alike: cosine between different tokens of an image, mean over pairs and images.
- Within a class: cosine between different instances, mean over pairs. An instance is an image (the mean of its tokens,
  and the data set's class), or for a detector a query with a score of --score-thr or more after the last layer (and its
  best class). "any" is the mean over pairs of all instances.

The suggestion gives every layer one group, and the rest in proportion to how much more alike its tokens are than in the
layer where they are least so; for MLPs, how much less than in the layer where they are most so. The LORS paper argues
so, but has no formula: this one is ours. The sum of K is that of the config, or else 2 per layer.
"""

import argparse
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config of a detector or classifier, plain or with LORS")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("--images", metavar="FOLDER", help="of pictures, for detectors (default: the test data set)")
    parser.add_argument(
        "--number",
        type=int,
        default=100,
        metavar="N",
        help="how many images, evenly spaced over all there are (default: %(default)s)",
    )
    parser.add_argument("--layers", metavar="NAME", help="of the stack in the model, such as backbone.blocks")
    parser.add_argument("--total", type=int, metavar="K", help="sum of the groups that are suggested")
    parser.add_argument("--score-thr", type=float, default=0.3, metavar="S", help="of queries (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write: .png, .pdf or .svg")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and mistakes are answered before the imports that take seconds

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmdet.models.detectors import BaseDetector
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.runner import Runner
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Subset

from mmdet_lors.adamixer import QueryBased
from mmdet_lors.analysis.arguments import check_writable
from mmdet_lors.analysis.output import console, heat_map, save_figure, two_digits
from mmdet_lors.analysis.similarity import ClassSimilarity, Similarity, suggest
from mmdet_lors.datasets.checks import check_inputs
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.config_and_weights import read_weights
from mmdet_lors.engine.launch import load_config, run
from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer
from mmdet_lors.inference.sources import images_in
from mmdet_lors.lors.targets import setting
from mmdet_lors.with_lors import layers_of

STACKS = ("decoder.stages", "decoder.layers", "network.blocks")
"""Where a stack is looked for: AdaMixer's, a DETR's, a ViT's."""


class Found(NamedTuple):
    """What was measured."""

    places: list[str]
    tokens: Similarity
    classes: ClassSimilarity
    names: Sequence[str]
    """Of the classes."""


def find_stack(model: nn.Module, name: str | None) -> str:
    """The name of the stack to look at.

    Raises:
        UserError: there is none.
    """
    if name is None:
        modules = dict(model.named_modules())
        name = next((stack for stack in STACKS if stack in modules), None)
        if name is None:
            raise UserError(
                f"{type(model).__name__} has no stack of layers at {', '.join(STACKS)}: name it by --layers"
            )
    layers_of("--layers", model, name)
    return name


@contextlib.contextmanager
def recorded(model: nn.Module, name: str) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Keep what goes through a stack: tokens (B, N, C) at all its places, and probabilities of classes (B, N, classes).

    The latter are those that a query has after the last layer, if the model has queries.
    """
    layers = layers_of("--layers", model, name)
    position = 2 if isinstance(model, QueryBased) and name == "decoder.stages" else 0
    tokens: list[Tensor] = []
    scores: list[Tensor] = []

    def keep(values: Sequence) -> None:
        value = values[position] if len(values) > position else None
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[1] < 2:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"--layers: those of {name} take {what}, not (images, tokens, channels) of several tokens")
        tokens.append(value.float().cpu())

    def keep_scores(_, inputs, output) -> None:
        if isinstance(model, QueryBased):
            found = output[-1].cls_score.sigmoid()
        else:
            found = output[0][-1]
            found = found.sigmoid() if model.bbox_head.loss_cls.use_sigmoid else found.softmax(-1)[..., :-1]
        scores.append(found.float().cpu())

    def keep_inputs(_, inputs, named) -> None:
        keep([*inputs, *named.values()])

    def keep_output(_, inputs, output) -> None:
        keep(output if isinstance(output, tuple) else (output,))

    hooks = [layer.register_forward_pre_hook(keep_inputs, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(keep_output))
    if isinstance(model, QueryBased | DetectionTransformer):
        head = model.decoder if isinstance(model, QueryBased) else model.bbox_head
        hooks.append(head.register_forward_hook(keep_scores))
    try:
        yield tokens, scores
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure(model: nn.Module, name: str, predictions: Iterable, names: Sequence[str], threshold: float) -> Found:
    """Measure in the passes of a model.

    Args:
        model: in evaluation mode.
        name: of its stack.
        predictions: runs one pass for each item that it yields, which is what the model predicts.
        names: of the classes.
        threshold: score of the queries that are instances of a class.

    Raises:
        UserError: features that cannot be compared.
    """
    places = [str(i) for i in range(len(layers_of("--layers", model, name)))] + ["out"]
    similarity, classes = None, ClassSimilarity()
    with recorded(model, name) as (tokens, scores):
        for predicted in predictions:
            if len(tokens) != len(places) or len({x.shape for x in tokens}) > 1:
                shapes = ", ".join(dict.fromkeys(str(tuple(x.shape)) for x in tokens)) or "nothing"
                raise UserError(f"{name}: a pass gave {shapes} at {len(tokens)} places, not one shape at {len(places)}")
            features = torch.stack(tokens, dim=1)
            similarity = similarity or Similarity(len(places), features.shape[-1])
            similarity.add(features)
            if scores and scores[0].shape[:2] == tokens[0].shape[:2]:
                best, labels = scores[0].max(dim=-1)
                sure = best >= threshold
                classes.add(features.transpose(1, 2)[sure], labels[sure])
            elif isinstance(predicted, list) and isinstance(predicted[0], dict):
                classes.add(features.mean(dim=2), torch.tensor([image["label"] for image in predicted]))
            tokens.clear()
            scores.clear()
    if similarity is None:
        raise UserError("there are no images")
    return Found(places, similarity, classes, names)


def budget(cfg: dict, model: nn.Module, name: str, total: int | None) -> dict[str, int]:
    """What may have private parts in this stack -> the sum of its groups: the config's, or else 2 per layer."""
    count = len(layers_of("--layers", model, name))
    found: dict[str, int] = {}
    if isinstance(model, QueryBased) and name == "decoder.stages":
        lorsa = model.decoder.lorsa
        found = {"adaptive": 2 * count if lorsa is None else sum(p.groups for p in lorsa.private if p is not None)}
    for stack in cfg.get("stacks", ()):
        if stack["layers"] == name:
            targets = [stack["targets"]] if isinstance(stack["targets"], str) else stack["targets"]
            found |= {t: sum(setting("groups", stack.get("groups", 1), t, count, minimum=0)) for t in targets}
    found = found or {"attention": 2 * count, "mlp": 2 * count}
    return found if total is None else dict.fromkeys(found, total)


def suggestions(found: Found, budgets: dict[str, int]) -> dict[str, list[int]]:
    """Groups per layer of everything that may have some."""
    alike = found.tokens.within_images()[:-1].tolist()
    return {what: suggest(alike, total, not re.search("mlp|ffn", what)) for what, total in budgets.items()}


def tables(found: Found, groups: dict[str, list[int]]) -> Iterator[Table]:
    """What was measured, by place and by class."""
    cka, cosine, alike = found.tokens.cka(), found.tokens.cosine(), found.tokens.within_images()
    grid = Table(
        title=f"{found.tokens.images} images, {found.tokens.tokens} tokens: CKA, cosine, and K that is suggested",
        title_justify="left",
    )
    for column in ("input of layer", *found.places, "cosine to the next", "tokens alike", *(f"K {g}" for g in groups)):
        grid.add_column(column, justify="right")
    last = len(found.places) - 1
    for i, place in enumerate(found.places):
        after = two_digits(cosine[i, i + 1]) if i < last else ""
        ks = (str(k[i]) if i < last else "" for k in groups.values())
        grid.add_row(place, *map(two_digits, cka[i]), after, two_digits(alike[i]), *ks)
    yield grid
    rows = class_rows(found)
    if rows:
        grid = Table(title="cosine between different instances of a class", title_justify="left")
        for column in ("class", "instances", *found.places):
            grid.add_column(column, justify="right")
        for name, count, values in rows:
            grid.add_row(name, str(count), *("-" if v.isnan() else two_digits(v) for v in values))
        yield grid


def class_rows(found: Found) -> list[tuple[str, int, Tensor]]:
    """Name, instances and similarity at every place, of each class and of any."""
    counts = found.classes.counts()
    if not counts:
        return []
    names = [found.names[label] for label in counts] + ["any"]
    means = [*found.classes.within(), found.classes.overall()]
    return list(zip(names, [*counts.values(), sum(counts.values())], means, strict=True))


def draw(found: Found, groups: dict[str, list[int]]) -> Figure:
    """Heat maps of CKA, cosine and classes; tokens' similarity with the groups that it suggests."""
    rows = class_rows(found)
    figure = Figure(figsize=(11, 9 + max(len(rows) - 15, 0) * 0.2), layout="constrained")
    (cka, cosine), (by_class, within) = figure.subplots(2, 2, height_ratios=(1, max(1, len(rows) / 15)))
    _between(cka, found, found.tokens.cka(), "CKA between the inputs of layers")
    _between(cosine, found, found.tokens.cosine(), "cosine of the same token between the inputs of layers")
    if rows:
        heat_map(by_class, torch.stack([values for _, _, values in rows]))
        by_class.set_aspect("auto")
        by_class.set_xticks(range(len(found.places)), found.places)
        by_class.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
        by_class.set_title("cosine between instances of a class", fontsize=10)
        by_class.set_xlabel("input of layer")
    else:
        by_class.axis("off")
    _groups(within, found, groups)
    return figure


def _between(ax: Axes, found: Found, values: Tensor, title: str) -> None:
    heat_map(ax, values)
    for ticks in (ax.set_xticks, ax.set_yticks):
        ticks(range(len(found.places)), found.places)
    ax.set_title(title, fontsize=10)


def _groups(ax: Axes, found: Found, groups: dict[str, list[int]]) -> None:
    bars = ax.twinx()
    width = 0.8 / len(groups)
    for i, (what, ks) in enumerate(groups.items()):
        where = [layer + (i + 0.5) * width - 0.4 for layer in range(len(ks))]
        drawn = bars.bar(where, ks, width, color=f"C{i}", alpha=0.4, label=f"K suggested: {what}")
        bars.bar_label(drawn, fontsize=9)
    bars.set_yticks([])
    bars.legend(fontsize=8, loc="upper left")
    ax.plot(found.tokens.within_images().numpy(), "o-", c="black")
    ax.set_zorder(bars.get_zorder() + 1)
    ax.patch.set_visible(False)
    ax.set_xticks(range(len(found.places)), found.places)
    ax.set_xlabel("input of layer")
    ax.set_ylabel("cosine")
    ax.set_title("cosine between different tokens of an image, and K", fontsize=10)


def spread(items: Sequence, number: int) -> list[int]:
    """Indices of that many items, evenly spaced; of all if there are no more."""
    number = min(number, len(items))
    return [i * len(items) // number for i in range(number)]


def load(cfg: Config, checkpoint: str, meant: nn.Module) -> tuple[nn.Module, Inferencer | None]:
    """The trained model in evaluation mode, and for a detector what runs it on pictures."""
    if isinstance(meant, QueryBased):
        cfg.model.decoder.compile = False  # A compiled stage would trace the hooks.
    if isinstance(meant, BaseDetector):
        inferencer = Inferencer(cfg, checkpoint, show_progress=False)
        if isinstance(meant, QueryBased):
            inferencer.model.decoder.set_test_cfg()  # all stages, with all queries
        return inferencer.model, inferencer
    weights, _ = read_weights(checkpoint, meant)
    model = MODELS.build(cfg.model)
    model.load_state_dict(weights)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), None


def passes(
    args: argparse.Namespace, cfg: Config, model: nn.Module, inferencer: Inferencer | None
) -> tuple[Iterable, Sequence[str]]:
    """An iterable that runs a pass of the model for each item, and the names of the classes.

    Raises:
        UserError: there are no images, or none that this model can be run on.
    """
    if args.images:
        if inferencer is None:
            raise UserError(f"--images: {type(model).__name__} is not a detector: leave it out for the test data set")
        pictures = images_in(args.images)
        return inferencer.stream([pictures[i] for i in spread(pictures, args.number)]), inferencer.classes
    if not cfg.get("test_dataloader"):
        raise UserError(f"config {args.config} has no test_dataloader: give --images")
    check_inputs(cfg, ("test",))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
    part = Subset(dataset, spread(dataset, args.number))
    loader = Runner.build_dataloader(dict(cfg.test_dataloader, dataset=part))
    return map(model.test_step, loader), dataset.metainfo["classes"]


def main() -> None:
    """Check everything, run the model, print the tables, draw the picture."""
    args = parse_args()
    check_writable("--out", args.out)
    if args.number < 1 or args.total is not None and args.total < 1:
        raise UserError("--number and --total must be 1 or more")
    cfg = load_config(args.config)
    meant = build_without_weights(cfg.model)
    name = find_stack(meant, args.layers)
    budgets = budget(cfg.model, meant, name, args.total)
    model, inferencer = load(cfg, args.checkpoint, meant)
    found = measure(model, name, *passes(args, cfg, model, inferencer), args.score_thr)
    groups = suggestions(found, budgets)
    save_figure(draw(found, groups), args.out)
    out = console()
    for grid in tables(found, groups):
        out.print(grid)
    for what, ks in groups.items():
        out.print(f"suggestion, by our rule (--help): {what} groups={ks}", soft_wrap=True, highlight=False)
    out.print(f"wrote {args.out}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
