"""Two processes equal one at the same global batch, on the CPU over gloo: gradients, and weights after every step."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.multiprocessing as mp
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, data_samples, free_port, load_config, load_tool
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import Tensor, nn

from mmdet_lors.engine.zero import ZeroOptimizer
from mmdet_lors.errors import UserError
from mmdet_lors.pela import LowRankLinear

DISTILLER_DIGITS = "configs/pela/pela-distiller_vit_digits.py"
CLIP = 1.0
"""Largest norm of a gradient, as in the configs: it has to be taken over all ranks' gradient."""


class Batch(NamedTuple):
    """A global batch: images on rank 0, and objects of every image or None where there are only labels."""

    first: int
    objects: list[int]

    def parts(self) -> list[slice]:
        """What each of two ranks takes."""
        return [slice(0, self.first), slice(self.first, len(self.objects))]


DETECTION = {
    "objects everywhere but in one image": Batch(2, [3, 0, 1, 5]),
    "rank 1 without objects": Batch(2, [2, 1, 0, 0]),
    "three images on rank 0, one on rank 1": Batch(3, [1, 4, 2, 3]),
    "a smaller last batch": Batch(1, [2, 1]),
    "one object in all": Batch(2, [0, 1, 0, 0]),
    "no object at all": Batch(2, [0, 0, 0, 0]),
}
CLASSIFICATION = {"two images each": Batch(2, [0] * 4), "a smaller last batch": Batch(1, [0] * 2)}


def detector(name: str, **paths: str) -> nn.Module:
    """A detector in eval mode: batch norm's statistics are those of a process, not of the whole batch."""
    cfg = load_config(name)
    for half, path in paths.items():
        cfg.model.decoder.lors[half].path = path
    model = MODELS.build(cfg.model)
    model.init_weights()
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.double().eval()


def distiller(teacher: str) -> nn.Module:
    """The distiller of the digits, whose student is no longer its teacher."""
    cfg = Config.fromfile(ROOT / DISTILLER_DIGITS).model
    cfg.teacher_checkpoint = teacher
    model = MODELS.build(cfg)
    model.init_weights()
    for layer in model.student.modules():
        if isinstance(layer, LowRankLinear):
            layer.reset_parameters()
    return model.double().eval()


def write_teacher(path: Path) -> None:
    torch.manual_seed(1)
    teacher = MODELS.build(Config.fromfile(ROOT / DISTILLER_DIGITS).model.teacher)
    torch.save(dict(state_dict=teacher.state_dict()), path)


def cases(folder: Path) -> dict[str, tuple[Callable[[], nn.Module], dict[str, Batch]]]:
    """Models to build and their batches."""
    lors = partial(partial, detector, LORS_DIGITS)
    return {
        "plain": (partial(detector, PLAIN_DIGITS), DETECTION),
        "lors-weights": (lors(adaptive="weights", static="features"), DETECTION),
        "lors-fold": (lors(adaptive="fold", static="fold"), DETECTION),
        "pela-distiller": (partial(distiller, str(folder / "teacher.pth")), CLASSIFICATION),
    }


def inputs(batch: Batch, number: int, detection: bool) -> tuple[Tensor, list | Tensor]:
    """Images and data samples of a global batch, on every rank the same."""
    torch.manual_seed(10 + number)
    if detection:
        images = torch.randn(len(batch.objects), 3, 64, 64, dtype=torch.float64)
        return images, data_samples(batch.objects, (64, 64), 10)
    return torch.randn(len(batch.objects), 1, 32, 32, dtype=torch.float64), torch.arange(len(batch.objects))


def optimizer_of(model: nn.Module) -> OptimWrapper:
    optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.05)
    return build_optim_wrapper(model, dict(optimizer=optimizer, clip_grad=dict(max_norm=CLIP)))


def train(
    build: Callable[[], nn.Module], batches: dict[str, Batch], rank: int | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """One step per batch; gradients before and weights after it, of this rank's part or, without a rank, of all."""
    torch.manual_seed(5)
    bare = build()
    detection = batches is DETECTION
    model = bare
    if rank is not None:
        model = MMDistributedDataParallel(bare, broadcast_buffers=False, find_unused_parameters=False)
    optimizer = optimizer_of(model)
    gradients, weights = {}, {}
    for number, (name, batch) in enumerate(batches.items()):
        images, samples = inputs(batch, number, detection)
        part = slice(None) if rank is None else batch.parts()[rank]
        loss, _ = bare.parse_losses(model(images[part], samples[part], mode="loss"))
        loss.backward()
        gradients[name] = {n: p.grad.clone() for n, p in bare.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        weights[name] = {n: p.detach().clone() for n, p in bare.named_parameters()}
    return gradients, weights


class Images:
    """A data set of high and wide images."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def get_data_info(self, i: int) -> dict:
        return dict(width=1 + i % 3, height=2)


ZERO = ["optim_wrapper.optimizer.type=ZeroOptimizer", "optim_wrapper.optimizer.optimizer_type=AdamW"]
STRATEGY = [
    "runner_type=FlexibleRunner",
    "strategy.type=DDPStrategy",
    "strategy.model_wrapper.type=MMDistributedDataParallel",
    "strategy.model_wrapper.device_ids=None",
    "strategy.model_wrapper.broadcast_buffers=False",
]
RUNS = {
    "adamw": [([], 2)],
    "zero-resumed": [(ZERO, 1), (ZERO, 2)],
    "adamw-then-zero": [([], 1), (ZERO, 2)],
    "strategy-zero": [(STRATEGY + ZERO, 2)],
}
"""Runs of tools/train.py in two processes: (settings, number of epochs); the second goes on from the first."""


def run_tool(name: str, data: Path, folder: Path) -> None:
    """One of RUNS: two iterations an epoch, the second smaller."""
    settings = [f"val_evaluator.ann_file={data}/annotations/val.json"]
    for split in ("train", "val"):
        settings += [f"{split}_dataloader.dataset.data_root={data}", f"{split}_dataloader.num_workers=0"]
        settings.append(f"{split}_dataloader.persistent_workers=False")
    settings += ["train_dataloader.batch_size=3", "train_dataloader.dataset.indices=10"]
    tool = load_tool("train.py")
    for more, epochs in RUNS[name]:
        arguments = [str(ROOT / LORS_DIGITS), "--launcher", "pytorch", "--work-dir", str(folder / name), "--resume"]
        experiment = f"experiment_name={name}-{epochs}"
        sys.argv = [
            "train.py",
            *arguments,
            "--cfg-options",
            *settings,
            *more,
            f"train_cfg.max_epochs={epochs}",
            experiment,
        ]
        tool.main()


def share_of_the_state(model: nn.Module) -> tuple[float, str]:
    """This process's part of AdamW's values after a step; what saving says when nothing was collected before."""
    optimizer = ZeroOptimizer(model.parameters(), "AdamW", lr=1e-3)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    kept = sum(state["exp_avg"].numel() for state in optimizer.optim.state.values())
    try:
        message = str(optimizer.state_dict())
    except RuntimeError as error:
        message = str(error)
    return kept / sum(p.numel() for p in model.parameters()), message


def worker(rank: int, port: int, folder: Path, data: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=True)
    MMLogger.get_current_instance().setLevel("WARNING")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    results = {name: train(*case, rank) for name, case in cases(folder).items()}
    for number in (9, 10):
        sampler = DefaultSampler(Images(number), seed=0)
        results[f"order of {number}"] = list(sampler)
        results[f"batch sizes of {number}"] = [len(batch) for batch in AspectRatioBatchSampler(sampler, 2)]
    results["share of the state"], results["uncollected"] = share_of_the_state(detector(LORS_DIGITS))
    torch.save(results, folder / f"rank{rank}.pth")
    for name in RUNS:
        run_tool(name, data, folder)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, tiny_digits):
    """Folder, and results of both ranks: name -> (gradients, weights), both batch -> name -> tensor."""
    folder = tmp_path_factory.mktemp("two")
    write_teacher(folder / "teacher.pth")
    mp.spawn(worker, args=(free_port(), folder, tiny_digits), nprocs=2)
    return folder, [torch.load(folder / f"rank{rank}.pth") for rank in range(2)]


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Over all tensors, the norm of the difference over the norm."""
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).norm() / (ours[k].norm() + 1e-6)).item() for k in ours)


@pytest.mark.parametrize("name", ["plain", "lors-weights", "lors-fold", "pela-distiller"])
def test_gradients_and_weights_equal_those_of_one_process(name, two_processes):
    """Within 1e-9 of their norm, in float64; both ranks have the same, bit for bit."""
    folder, ranks = two_processes
    build, batches = cases(folder)[name]
    gradients, weights = train(build, batches, None)
    for batch in batches:
        assert largest_difference(gradients[batch], ranks[0][name][0][batch]) <= 1e-9, batch
        assert largest_difference(weights[batch], ranks[0][name][1][batch]) <= 1e-9, batch
        for first, second in zip(ranks[0][name], ranks[1][name], strict=True):
            assert all(torch.equal(value, second[batch][key]) for key, value in first[batch].items())


@pytest.mark.parametrize("number", [9, 10])
def test_ranks_share_the_order_of_one_process(number, two_processes):
    """Each takes every second image; an odd number is filled up with the first image."""
    _, ranks = two_processes
    order = list(DefaultSampler(Images(number), seed=0))
    order += order[: number % 2]
    assert [rank[f"order of {number}"] for rank in ranks] == [order[0::2], order[1::2]]
    assert ranks[0][f"batch sizes of {number}"] == ranks[1][f"batch sizes of {number}"] == [2, 2, 1]


def saved(folder: Path, name: str) -> tuple[dict[str, Tensor], dict]:
    """Weights, and the optimizer's state, of a run's last checkpoint."""
    checkpoint = torch.load(folder / name / "epoch_2.pth")
    # mmengine's strategies keep the prefix of the wrapper, which every loader takes off.
    weights = {name.removeprefix("module."): value for name, value in checkpoint["state_dict"].items()}
    return weights, checkpoint["optimizer"]["state"]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "adamw"])
def test_a_sharded_optimizer_does_what_the_plain_one_does(name, two_processes):
    """Bit for bit, as does a run that goes on from its checkpoint; the checkpoint has the whole state."""
    folder, _ = two_processes
    (weights, state), (their_weights, their_state) = saved(folder, "adamw"), saved(folder, name)
    assert all(torch.equal(value, their_weights[key]) for key, value in weights.items())
    assert state.keys() == their_state.keys() and len(state) > 100
    for key, moments in state.items():
        assert all(torch.equal(value, their_state[key][moment]) for moment, value in moments.items())


def test_each_process_keeps_half_of_the_state(two_processes):
    _, ranks = two_processes
    shares = [rank["share of the state"] for rank in ranks]
    assert sum(shares) == 1 and all(0.45 < share < 0.55 for share in shares)


def test_saving_without_collecting_is_an_error_and_does_not_hang(two_processes):
    _, ranks = two_processes
    assert "not been consolidated" in ranks[0]["uncollected"] and ranks[1]["uncollected"] == "{}"


def test_a_sharded_optimizer_needs_more_than_one_process():
    message = "shares its state between processes: start the run with tools/dist_train.sh"
    with pytest.raises(UserError, match=message):
        ZeroOptimizer(nn.Linear(1, 1).parameters(), "AdamW", lr=1e-3)
