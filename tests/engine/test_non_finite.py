"""A run that computes NaN stops, names images and the first tensor, and updates no weight with it."""

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import LORS_DIGITS, ROOT, free_port, load_config
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmdet_lors.classification import SklearnDigits, TimmClassifier
from mmdet_lors.engine import non_finite
from mmdet_lors.engine.first_non_finite import first_non_finite
from mmdet_lors.engine.non_finite import StopOnNonFiniteHook
from mmdet_lors.errors import UserError

OPTIMIZERS = [dict(type="SGD", momentum=0.9), dict(type="AdamW", fused=True)]


@pytest.fixture
def log(monkeypatch):
    """The messages of the run's log."""
    lines = []
    monkeypatch.setattr(non_finite, "print_log", lambda message, *_: lines.append(message))
    return lines


class Spoil(torch.autograd.Function):
    """The identity, with NaN in its output or in its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: bool, backward: bool) -> Tensor:
        ctx.backward = backward
        return x * float("nan") if forward else x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad * float("nan") if ctx.backward else grad, None, None


class Spoiler(nn.Module):
    """NaN in the steps whose numbers are given, from 0; a repeated step does what its first run did."""

    forward_at, backward_at, step = (), (), 0

    def forward(self, x: Tensor) -> Tensor:
        return Spoil.apply(x, self.step in self.forward_at, self.step in self.backward_at)


class Small(BaseModel):
    """first -> spoiler -> last -> mean square; plus infinity in the steps of ``infinite_at``, which has no gradient."""

    infinite_at = ()

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spoiler, self.last = nn.Linear(3, 4), Spoiler(), nn.Linear(4, 1)
        self.images = 2 * get_world_size()

    def forward(self, inputs: Tensor, data_samples: list, mode: str) -> dict:
        self.spoiler.step = int(inputs[0][0] - 1) // self.images
        loss = self.last(self.spoiler(self.first(torch.stack(list(inputs))))).square().mean()
        return dict(loss_square=loss + torch.inf if self.spoiler.step in self.infinite_at else loss)


class Points(Dataset):
    metainfo = dict()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict:
        sample = DetDataSample(metainfo=dict(img_id=100 + index, img_path=f"{index}.png"))
        return dict(inputs=torch.full((3,), 1.0 + index), data_samples=sample)


def runner(
    work,
    model=None,
    data=None,
    wrapper=None,
    hook=None,
    collate=pseudo_collate,
    loop="EpochBasedTrainLoop",
    interval=100,
    default_hooks=(),
    **fields,
) -> Runner:
    """Two images a step, six steps an epoch, which are logged at its end."""
    runner.number = getattr(runner, "number", 0) + 1
    optimizer = dict(type="SGD", lr=0.01, momentum=0.9)
    return Runner(
        model=model or Small(),
        work_dir=str(work),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=data or Points(),
            collate_fn=collate,
        ),
        train_cfg=dict(type=loop, max_epochs=1),
        optim_wrapper=wrapper or dict(type="OptimWrapper", optimizer=optimizer, clip_grad=dict(max_norm=1.0)),
        custom_hooks=[hook or dict(type="StopOnNonFiniteHook"), dict(type=Weights)],
        default_hooks=dict(default_hooks, logger=dict(type="LoggerHook", interval=interval)),
        experiment_name=f"non_finite_{runner.number}",
        default_scope="mmdet",
        log_level="WARNING",
        **fields,
    )


class Weights(Hook):
    """The weights before every step."""

    def before_train(self, runner: Runner) -> None:
        runner.weights = []

    def before_train_iter(self, runner: Runner, **_) -> None:
        runner.weights.append([p.detach().clone() for p in runner.model.parameters()])


def same(weights: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def stopped(trained: Runner) -> str:
    with pytest.raises(UserError) as error:
        trained.train()
    assert "\n" not in str(error.value)
    assert same(list(trained.model.parameters()), trained.weights[-1])
    assert all(p.isfinite().all() for p in trained.model.parameters())
    assert not list(Path(trained.work_dir).glob("*.pth"))
    return str(error.value)


@pytest.mark.parametrize(("interval", "stops_at"), [(100, 3), (1, 2)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_a_nan_loss_stops_with_images_and_the_first_module(optimizer, interval, stops_at, tmp_path):
    """The host learns of it a step later, or where a line is logged; nothing is updated meanwhile."""
    wrapper = dict(type="OptimWrapper", optimizer=dict(optimizer, lr=0.01), clip_grad=dict(max_norm=1.0))
    trained = runner(tmp_path, wrapper=wrapper, interval=interval)
    trained.model.spoiler.forward_at = (2,)
    assert stopped(trained) == (
        "loss is nan at epoch 1, iteration 3, on images 104 (4.png), 105 (5.png); "
        "first non-finite: output of spoiler (Spoiler), last (Linear)"
    )
    assert trained.iter == stops_at and same(trained.weights[2], trained.weights[-1])


def test_a_nan_gradient_of_a_finite_loss_stops(tmp_path):
    trained = runner(tmp_path)
    trained.model.spoiler.backward_at = (1,)
    assert stopped(trained) == (
        "gradient norm is nan at epoch 1, iteration 2, on images 102 (2.png), 103 (3.png); "
        "first non-finite: gradient of the output of first"
    )


def test_a_step_that_fails_for_another_reason_is_told_by_its_images(tmp_path, log):
    trained = runner(tmp_path)
    trained.model.last.register_forward_pre_hook(lambda module, x: {}["no"])
    with pytest.raises(KeyError, match="no"):
        trained.train()
    assert log[-1] == "the training step failed on images 100 (0.png), 101 (1.png)"


def test_nan_weights_are_named(tmp_path):
    trained = runner(tmp_path)
    with torch.no_grad():
        trained.model.last.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="loss is nan .*; first non-finite: weight last.bias$"):
        trained.train()


def test_nan_boxes_and_pixels_are_named():
    class Boxes(Small):
        def forward(self, inputs: Tensor, data_samples: list, mode: str) -> dict:
            return dict(loss=sum(sample.gt_instances.bboxes.sum() for sample in data_samples))

    batch = pseudo_collate([Points()[i] for i in range(3)])
    for i, sample in enumerate(batch["data_samples"]):
        sample.gt_instances = InstanceData(bboxes=torch.full((1, 4), torch.nan if i == 1 else 1.0))
    batch["inputs"][2] /= 0
    assert first_non_finite(Boxes(), batch, nullcontext()) == [
        "pixels of the batch's image 2",
        "boxes of the batch's image 1",
        "loss loss",
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_patience_skips_updates_and_goes_on(optimizer, tmp_path):
    wrapper = dict(type="OptimWrapper", optimizer=dict(optimizer, lr=0.01))
    trained = runner(tmp_path, wrapper=wrapper, hook=dict(type="StopOnNonFiniteHook", patience=3))
    trained.model.spoiler.forward_at, trained.model.spoiler.backward_at = (1, 2), (4,)
    model = trained.train()
    weights = [*trained.weights, list(model.parameters())]
    # Before and after each of six steps; momentum did not move them either.
    assert [same(weights[i], weights[i + 1]) for i in range(6)] == [False, True, True, False, True, False]
    assert all(p.isfinite().all() for p in model.parameters())
    assert "train_step" not in vars(model) and "found_inf" not in vars(trained.optim_wrapper.optimizer)
    steps = {int(state["step"]) for state in trained.optim_wrapper.optimizer.state.values() if "step" in state}
    assert steps in (set(), {3})


def test_running_statistics_are_not_spoilt_either(tmp_path):
    trained = runner(tmp_path, hook=dict(type="StopOnNonFiniteHook", patience=2))
    trained.model.last = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    trained.model.spoiler.forward_at = (3,)
    norm = trained.train().last[0]
    assert norm.running_var.isfinite().all() and norm.num_batches_tracked == 5


def test_patience_counts_steps_in_a_row(tmp_path):
    trained = runner(tmp_path, hook=dict(type="StopOnNonFiniteHook", patience=2))
    trained.model.spoiler.forward_at = (0, 2, 4, 5)
    assert "epoch 1, iteration 6" in stopped(trained)


def test_accumulated_gradients(tmp_path):
    wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01), accumulative_counts=3)
    trained = runner(tmp_path, wrapper=wrapper, hook=dict(type="StopOnNonFiniteHook", patience=2))
    trained.model.spoiler.backward_at = (1,)  # spoils the update after step 2, and none after it
    model = trained.train()
    weights = [*trained.weights, list(model.parameters())]
    assert same(weights[0], weights[5]) and not same(weights[5], weights[6])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("clip", [None, dict(max_norm=1e6), dict(type="value", clip_value=1e6)])
def test_the_gradient_norm_is_logged(clip, tmp_path):
    optimizer = dict(type="SGD", lr=0.0)
    trained = runner(tmp_path, wrapper=dict(type="OptimWrapper", optimizer=optimizer, clip_grad=clip))
    model = trained.train()
    norms = trained.message_hub.get_scalar("train/grad_norm").data[0]
    assert len(norms) == 6
    batch = dict(inputs=torch.full((2, 3), 11.0) + torch.arange(2.0)[:, None], data_samples=[])
    model(**batch, mode="loss")["loss_square"].backward()
    assert norms[-1] == pytest.approx(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])), rel=1e-5)


@pytest.mark.parametrize("schedule", sorted((ROOT / "configs/_base_/schedules").glob("*.py")), ids=lambda p: p.stem)
def test_a_schedule_that_clips_logs_the_norm_that_it_clips(schedule):
    clip = Config.fromfile(schedule).optim_wrapper.get("clip_grad")
    assert clip is None or clip.norm_type == 2  # without clipping, the hook takes the norm itself: the test above


@pytest.mark.parametrize("name", ["default_runtime", "classification_runtime"])
def test_every_run_has_the_hook(name):
    hooks = Config.fromfile(ROOT / f"configs/_base_/{name}.py").custom_hooks
    assert dict(type="StopOnNonFiniteHook") in hooks


@pytest.mark.parametrize("field", ["patience", "max_skipped_steps"])
def test_settings_below_one(field):
    with pytest.raises(UserError, match=f"StopOnNonFiniteHook.{field} must be 1 or more, got 0"):
        StopOnNonFiniteHook(**{field: 0})


def test_bfloat16_on_a_cpu(tmp_path):
    wrapper = dict(type="CPUAmpOptimWrapper", optimizer=dict(type="SGD", lr=0.01))
    trained = runner(tmp_path, wrapper=wrapper)
    trained.model.spoiler.forward_at = (2,)
    message = stopped(trained)
    assert message.startswith("loss is nan at epoch 1, iteration 3, on images 104") and "output of spoiler" in message


@pytest.fixture
def scaled(monkeypatch):
    """mmengine's AmpOptimWrapper with its loss scaler, on a CPU."""
    monkeypatch.setattr(amp_optimizer_wrapper, "is_cuda_available", lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, "GradScaler", partial(torch.amp.GradScaler, "cpu"))

    def wrapper(scale: float, fused: bool) -> dict:
        optimizer = dict(type="AdamW", lr=0.01, fused=fused)
        return dict(type="AmpOptimWrapper", dtype="bfloat16", loss_scale=dict(init_scale=scale), optimizer=optimizer)

    return wrapper


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, dict(max_norm=1.0)])
def test_the_loss_scaler_may_skip_steps(scaled, fused, clip, tmp_path):
    # The loss is about 100 ** 2: it overflows at 2 ** 127, and no more at 2 ** 111.
    wrapper = dict(scaled(2.0**127, fused), clip_grad=clip)
    wrapper["loss_scale"]["backoff_factor"] = 2.0**-16
    trained = runner(tmp_path, wrapper=wrapper)
    nn.init.constant_(trained.model.last.bias, 100)
    model = trained.train()
    weights = [*trained.weights, list(model.parameters())]
    assert [same(weights[i], weights[i + 1]) for i in range(6)] == [True, False, False, False, False, False]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_scaler_skips_at_most_so_many(scaled, fused, tmp_path):
    trained = runner(tmp_path, wrapper=scaled(1.0, fused), hook=dict(type="StopOnNonFiniteHook", max_skipped_steps=4))
    trained.model.spoiler.backward_at = (1, 2, 3, 4, 5)
    message = stopped(trained)
    assert message.startswith(
        "scaled gradient is not finite 4 times in a row; the loss scale is now 0.03125 at epoch 1, iteration 5"
    )
    assert message.endswith("gradient of the output of first")


def test_a_nan_loss_with_a_loss_scaler_stops_at_once(scaled, tmp_path):
    trained = runner(tmp_path, wrapper=scaled(1.0, False))
    trained.model.spoiler.forward_at = (1,)
    assert stopped(trained).startswith("loss is nan at epoch 1, iteration 2")


def test_the_log_has_the_details(tmp_path, log):
    trained = runner(tmp_path)
    trained.model.spoiler.forward_at = (2,)
    stopped(trained)
    assert log[-1] == (
        "loss is nan at epoch 1, iteration 3\nimages: 104 (4.png), 105 (5.png)\nnot finite:\n"
        "  output of spoiler (Spoiler), last (Linear)\n  loss loss_square"
    )


class SpoilModule(Hook):
    """NaN out of a module from a step on."""

    def __init__(self, name: str, at: int) -> None:
        self.name, self.at = name, at

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        if runner.iter == self.at:
            runner.model.get_submodule(self.name).register_forward_hook(lambda m, i, out: out * float("nan"))


@pytest.mark.parametrize(
    ("module", "first"),
    [
        ("backbone.layer2.0.conv1", "output of backbone.layer2.0.conv1 (Conv2d), backbone.layer2.0.bn1 (BatchNorm2d)"),
        ("decoder.stages.2.ffn", "output of decoder.stages.2.ffn (FFN), "),
        ("decoder.loss_iou", "output of decoder.loss_iou (GIoULoss)"),
    ],
)
def test_adamixer(module, first, tiny_digits, tmp_path):
    cfg = load_config(LORS_DIGITS)
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    cfg.train_dataloader.dataset.data_root = str(tiny_digits)
    for key in list(cfg):
        if key.startswith(("val_", "test_")):
            cfg.pop(key)
    cfg.update(work_dir=str(tmp_path), experiment_name=f"adamixer_{module}", log_level="WARNING")
    trained = Runner.from_cfg(cfg)
    trained.register_hook(Weights())
    trained.register_hook(SpoilModule(module, 1))
    message = stopped(trained)
    assert f"first non-finite: {first}" in message and "iteration 2, on images" in message and ".png), " in message


@pytest.mark.parametrize("loop", ["EpochBasedTrainLoop", "ResumableEpochLoop"])
def test_classification_names_the_images_places(loop, tmp_path):
    model = TimmClassifier(
        dict(model_name="vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, embed_dim=24, in_chans=1),
        num_classes=10,
        data_preprocessor=dict(type="ImgDataPreprocessor", mean=[0], std=[255]),
    )
    trained = runner(
        tmp_path,
        model=model,
        data=SklearnDigits("train", dict(input_size=16, is_training=True)),
        collate=dict(type="default_collate"),
        loop=loop,
    )
    trained.register_hook(SpoilModule("network.blocks.0.mlp", 3))
    message = stopped(trained)
    assert message.startswith("loss is nan at epoch 1, iteration 4, on images at place 6, at place 7; first non-finite")
    assert "output of network.blocks.0.mlp.fc1" not in message and "output of network.blocks.0.mlp" in message


def worker(rank: int, port: int, out: Path) -> None:
    """One of two processes; the second computes NaN, then in another run infinity, in its second step."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=True)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for kind in ("nan", "inf"):
        trained = runner(
            out / kind,
            launcher="pytorch",
            env_cfg=dict(dist_cfg=dict(backend="gloo")),
            cfg=dict(model_wrapper_cfg=dict(type="MMDistributedDataParallel", device_ids=None)),
        )
        model = trained.model.module
        if rank and kind == "nan":
            model.spoiler.forward_at = (1,)
        elif rank:
            model.infinite_at = (1,)  # seen by this process alone: every gradient is finite
        try:
            trained.train()
        except UserError as error:
            assert same(list(model.parameters()), trained.weights[1]) == (kind == "nan")
            (out / f"{kind}_{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_two_processes_stop_together(tmp_path):
    mp.spawn(worker, (free_port(), tmp_path), nprocs=2)
    for rank in (0, 1):
        for kind, first in (("nan", "output of spoiler (Spoiler), last (Linear)"), ("inf", "loss loss_square")):
            assert (tmp_path / f"{kind}_{rank}.txt").read_text() == (
                f"loss is {kind} in process 1 at epoch 1, iteration 2, on images 105 (5.png), 107 (7.png); "
                f"first non-finite: {first}"
            )
