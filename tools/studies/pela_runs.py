"""What pela_study.py runs: its variants, and how each is trained, compressed and evaluated once."""

import json
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from mmdet.registry import MODELS
from torch import Tensor, nn

from mmdet_lors.analysis.study import call, evaluate, last_epoch_only, once, read, train
from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.checkpoint.reading import read_checkpoint, write_checkpoint

PLAIN = "configs/classification/vit_digits.py"
DISTILLER = "configs/pela/pela-distiller_vit_digits.py"
COMPRESSED = "configs/pela/pela_vit_digits.py"


@dataclass(frozen=True)
class Variant:
    """One row of the study."""

    name: str
    what: str
    losses: tuple[str, ...] | None = None
    """PELA's losses that it trains with, besides the base loss; None is not trained after compression."""
    paper: tuple[float, float] | None = None
    """Top-1 of DeiT-Base and Swin-Base on ImageNet, per cent; None where the paper's Table 7 has no such row."""

    def options(self) -> list[str]:
        """--cfg-options that switch the other losses off."""
        return [f"model.{loss}_loss=None" for loss in ("feature", "perturbation") if loss not in self.losses]


TEACHER = Variant("plain", "the teacher, not compressed", paper=(81.80, 83.50))
DIRECT = Variant("compressed", "factorised, no further training", paper=(61.08, 77.60))
TRAINED = [
    Variant("base loss", "trained with the classifier's loss alone", ()),
    Variant("feature", "and feature distillation", ("feature",), (80.90, 82.89)),
    Variant("perturbation", "and weight perturbation", ("perturbation",), (80.55, 82.86)),
    BOTH := Variant("both", "and both", ("feature", "perturbation"), (80.96, 82.54)),
]
VARIANTS = [TEACHER, DIRECT, *TRAINED]


@dataclass(frozen=True)
class Study:
    """Its settings, and where its runs are."""

    ratio: float
    epochs: int
    teacher_epochs: int
    work: Path
    teachers: Path
    """A folder of classification_study.py, whose plain models serve when they trained as long."""

    def teacher_folder(self, seed: int) -> Path:
        """Of the plain model of this seed."""
        same = self.teacher_epochs == epochs_of(PLAIN)
        return (self.teachers if same else self.work / f"{self.teacher_epochs}-epochs") / f"vit_digits_seed-{seed}"

    def folder(self, variant: Variant, seed: int) -> Path:
        """Of one run; another ratio or length has another."""
        settings = f"ratio-{self.ratio:g}_{self.teacher_epochs}-epochs"
        settings += f"_{self.epochs}-epochs" if variant.losses is not None else ""
        return self.work / settings / f"{variant.name.replace(' ', '-')}_seed-{seed}"

    def run(self, variant: Variant, seed: int) -> dict:
        """The outcome of a variant with a seed, trained or evaluated now or before."""
        if variant is TEACHER:
            return self.teach(seed)
        return self.compress(seed) if variant is DIRECT else self.recover(variant, seed)

    def teach(self, seed: int) -> dict:
        """Train and evaluate a plain model.

        Returns:
            ``top1`` and ``top5`` in per cent, ``seconds`` of training.
        """
        folder = self.teacher_folder(seed)

        def work() -> dict:
            seconds = train(PLAIN, folder, schedule(PLAIN, self.teacher_epochs, seed))
            return accuracy(evaluate(PLAIN, self.teacher(seed), folder)) | dict(seconds=seconds)

        return once(folder, work)

    def teacher(self, seed: int) -> Path:
        """Checkpoint of the plain model."""
        return self.teacher_folder(seed) / f"epoch_{self.teacher_epochs}.pth"

    def compress(self, seed: int) -> dict:
        """Factorise a plain model and evaluate what is left.

        Returns:
            ``top1`` and ``top5`` in per cent, ``seconds`` of the factorisation.
        """
        folder = self.folder(DIRECT, seed)

        def work() -> dict:
            checkpoint = folder / "compressed.pth"
            weights = read_checkpoint(self.teacher(seed))["state_dict"]
            begin = time.monotonic()
            model = factorised(weights, self.ratio)
            seconds = time.monotonic() - begin
            write_checkpoint(dict(meta={}, state_dict=model.state_dict()), checkpoint)
            found = accuracy(evaluate(COMPRESSED, checkpoint, folder, self.settings()))
            return found | dict(seconds=seconds)

        return once(folder, work)

    def recover(self, variant: Variant, seed: int) -> dict:
        """Train a compressed model, take it out of the distiller and evaluate it.

        Returns:
            ``top1`` and ``top5`` in per cent, ``seconds`` of training, ``extract`` and ``test`` in seconds; ``losses``,
            the first and the last epoch's.
        """
        folder = self.folder(variant, seed)

        def work() -> dict:
            options = [*self.settings(), *variant.options(), f"model.teacher_checkpoint={self.teacher(seed)}"]
            seconds = train(DISTILLER, folder, [*options, *schedule(DISTILLER, self.epochs, seed)])
            student, begin = folder / "student.pth", time.monotonic()
            source = str(folder / f"epoch_{self.epochs}.pth")
            call("tools/model_converters/extract_student.py", source, str(student), log=folder / "log.txt")
            extracted = time.monotonic()
            found = accuracy(evaluate(COMPRESSED, student, folder, self.settings()))
            times = dict(seconds=seconds, extract=extracted - begin, test=time.monotonic() - extracted)
            return found | times | dict(losses=first_and_last_losses(folder))

        return once(folder, work)

    def settings(self) -> list[str]:
        """--cfg-options of compression."""
        return [f"model.ratio={self.ratio:g}"]


def epochs_of(config: str) -> int:
    """How long a config trains by itself."""
    return read(config).train_cfg.max_epochs


def schedule(config: str, epochs: int, seed: int) -> list[str]:
    """--cfg-options of a run's seed and length; warm-up and decay keep their shares of it."""
    cfg = read(config)
    warmup = max(1, round(epochs * cfg.param_scheduler[0].end / cfg.train_cfg.max_epochs))
    options = [f"randomness.seed={seed}", f"train_cfg.max_epochs={epochs}", *last_epoch_only(epochs)]
    options += [f"param_scheduler.0.end={warmup}", f"param_scheduler.1.begin={warmup}"]
    return [*options, f"param_scheduler.1.end={epochs}", f"param_scheduler.1.T_max={epochs - warmup}"]


def compressed_model(ratio: float) -> dict:
    """The config of the compressed classifier."""
    return dict(deepcopy(read(COMPRESSED).model), ratio=ratio)


def factorised(weights: Mapping[str, Tensor], ratio: float) -> nn.Module:
    """The compressed classifier, filled with the plain one's weights."""
    model = MODELS.build(compressed_model(ratio))
    model.load_state_dict(weights)
    return model.eval()


def first_and_last_losses(folder: Path) -> dict[str, tuple[float, float]]:
    """What training logged at the end of its first and of its last epoch, by the losses' names."""
    newest = max(folder.glob("*/vis_data/scalars.json"))
    logged = [line for line in map(json.loads, newest.read_text().splitlines()) if "loss" in line]
    return {name: (value, logged[-1][name]) for name, value in logged[0].items() if name.startswith("loss")}


def accuracy(metrics: Mapping) -> dict:
    """Top-1 and top-5, per cent."""
    return dict(top1=metrics["accuracy/top1"], top5=metrics["accuracy/top5"])


def parameters(model_cfg: dict) -> int:
    """Of the whole classifier."""
    return sum(p.numel() for p in build_without_weights(model_cfg).parameters())
