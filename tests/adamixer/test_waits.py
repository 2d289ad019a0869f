"""How often the host waits for the device: counted on a CPU, by the calls that would wait for a GPU."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, data_samples, load_config
from mmdet.models.losses import FocalLoss
from mmdet.registry import MODELS
from mmengine.hooks import Hook
from mmengine.model import stack_batch  # computes sizes on the host
from mmengine.runner import Runner
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_lors.adamixer import criterion, data_preprocessor
from mmdet_lors.adamixer.criterion import Criterion
from mmdet_lors.lors.serving import serve
from mmdet_lors.transfer import ConstantsDoNotWait, ToHost, to_device

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    for module in (criterion, data_preprocessor):
        monkeypatch.setattr(module, "constants_do_not_wait", lambda device: ConstantsDoNotWait())


SIZED_BY_VALUES = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist}
MAKING = {torch.tensor, torch.as_tensor, torch.from_numpy}


class Waits:
    """The names of the calls that would wait."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.on_host: list[Tensor] = []
        """What the host made, or a transfer has brought to it: reading it waits for nothing."""
        self.on_its_way: list[Tensor] = []
        """What a transfer brings that nobody has waited for: it is there when the device has been waited for since."""

    def reads(self, tensor: Tensor) -> bool:
        """Whether a value of this tensor has to come from the device."""
        place = tensor.untyped_storage().data_ptr()
        return all(t.untyped_storage().data_ptr() != place for t in self.on_host)


class Operations(TorchDispatchMode):
    """Below Python, also in the backward pass: a number, or the size of a result, comes from the device."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        masks = packet in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        repeats = packet is aten.repeat_interleave and kwargs.get("output_size") is None
        number = packet is aten._local_scalar_dense and self.waits.reads(args[0]) and not _inside(stack_batch)
        if packet in SIZED_BY_VALUES or masks or repeats or number:
            self.waits.found.append(str(packet))
        return func(*args, **kwargs)


class Functions(TorchFunctionMode):
    """By Python's call: a copy to the host, or one to the device for which the host waits."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = func is Tensor.new_tensor or func in MAKING and kwargs.get("device") is not None
        if func is Tensor.to and any(isinstance(a, torch.device) for a in (*args, kwargs.get("device"))):
            waits = not (self.waits.reads(args[0]) or kwargs.get("non_blocking") or _inside(to_device))
        if func is Tensor.__getitem__ and _has(args[1], list):
            waits = True
        if func is Tensor.__setitem__ and _has(args[1], Tensor) and not isinstance(args[2], Tensor):
            waits = True
        if waits or func in TO_HOST and self.waits.reads(args[0]) and not _inside(stack_batch):
            self.waits.found.append(func.__name__)
        out = func(*args, **kwargs)
        if func is Tensor.to and _inside(ToHost.__init__):
            self.waits.on_its_way.append(out)
        if func is Tensor.cpu:
            self.waits.on_host += [out, *self.waits.on_its_way]
            self.waits.on_its_way.clear()
        if func in MAKING and not isinstance(args[0], Tensor):
            self.waits.on_host.append(out)
        return out


def _has(index: object, kind: type) -> bool:
    return any(isinstance(i, kind) for i in (index if isinstance(index, tuple) else (index,)))


def _callers() -> Iterator:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _inside(function: Callable) -> bool:
    return any(code is function.__code__ for code in _callers())


@contextmanager
def counted() -> Iterator[list[str]]:
    """Count what is called inside."""
    waits = Waits()
    with Functions(waits), Operations(waits):
        yield waits.found


def build(name: str):
    model = MODELS.build(load_config(name).model)
    model.init_weights()
    return model


@pytest.mark.parametrize("name", [PLAIN_DIGITS, LORS_DIGITS])
@pytest.mark.parametrize("num_boxes", [[3, 0, 30], [0, 0, 0]])
def test_training_waits_for_the_matching_alone(name, num_boxes):
    model, samples = build(name).train(), data_samples(num_boxes, (96, 96), 10)
    with counted() as waits:
        losses = model.loss(torch.randn(3, 3, 96, 96), samples)
        sum(value for key, value in losses.items() if "loss" in key).backward()
    assert waits == ["cpu"]


@pytest.mark.parametrize("name", [PLAIN_DIGITS, LORS_DIGITS])
def test_inference_waits_for_nothing(name):
    model, samples = build(name).eval(), data_samples([1, 1], (96, 96), 10)
    with counted() as waits, torch.no_grad():
        model.test_step(dict(inputs=[torch.zeros(3, 96, 96, dtype=torch.uint8)] * 2, data_samples=samples))
    assert waits == []


@torch.no_grad()
def test_inference_asks_whether_folded_weights_are_old_when_all_is_on_its_way(monkeypatch):
    model, samples = serve(build(LORS_DIGITS).eval()), data_samples([1, 1], (96, 96), 10)
    images, done = torch.randn(2, 3, 96, 96), []
    model.predict(images, samples)
    for stage in model.decoder.stages:
        stage.register_forward_hook(lambda *_: done.append("stage"))
    read = ToHost.read
    monkeypatch.setattr(ToHost, "read", lambda self: (done.append("read"), read(self))[1])
    with counted() as waits:
        model.predict(images, samples)
    stages = len(model.decoder.stages)
    assert done == ["stage"] * stages + ["read"] * 2 and waits == ["aten._local_scalar_dense"] * 2


class Count(Hook):
    """Counts from one iteration's start to another's, all hooks and the loop in between included."""

    priority = "HIGHEST"

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.waits, self.counting = first, last, None, ExitStack()

    def before_train_iter(self, runner: Runner, **_) -> None:
        if runner.iter == self.first - 1:  # in which numbers are read that were sent before
            self.waits = self.counting.enter_context(counted())
        if runner.iter == self.first:
            self.waits.clear()
        if runner.iter == self.last:
            self.counting.close()


@pytest.mark.parametrize("accumulative_counts", [1, 2])
def test_a_run_waits_once_an_iteration(accumulative_counts, tiny_digits, tmp_path):
    """For the matching: losses, norm and what is logged are read after the next one."""
    cfg = load_config(LORS_DIGITS)
    cfg.train_dataloader.update(num_workers=1, batch_size=2)  # reading pictures is not counted
    cfg.train_dataloader.dataset.data_root = str(tiny_digits)
    for key in list(cfg):
        if key.startswith(("val_", "test_")):
            cfg.pop(key)
    cfg.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=1)
    cfg.optim_wrapper.accumulative_counts = accumulative_counts
    cfg.update(work_dir=str(tmp_path), experiment_name=f"waits_{accumulative_counts}", log_level="WARNING")
    run, count = Runner.from_cfg(cfg), Count(first=3, last=7)
    run.register_hook(count, priority="HIGHEST")
    assert run.model.data_preprocessor._non_blocking
    run.train()
    assert count.waits == ["cpu"] * 4


def test_constants_of_mmdet_are_pinned_copies():
    x = torch.ones(2, dtype=torch.float64)
    with counted() as inside, ConstantsDoNotWait():
        made = x.new_tensor([1.5])
    assert inside == [] and made.dtype == x.dtype and made.tolist() == [1.5]
    with counted() as outside:
        x.new_tensor([1.5])
    assert outside == ["new_tensor"]


@pytest.mark.parametrize("swap", [dict(bgr_to_rgb=True), dict(rgb_to_bgr=True), dict()])
@pytest.mark.parametrize("stacked", [False, True])
def test_images_are_prepared_as_by_mmdet(swap, stacked):
    fields = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], pad_size_divisor=32, **swap)
    images = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8)
    batch = dict(inputs=images if stacked else list(images), data_samples=data_samples([1, 2], (40, 50), 10))
    ours = MODELS.build(dict(type="NonBlockingDetDataPreprocessor", **fields))
    theirs = MODELS.build(dict(type="DetDataPreprocessor", **fields))
    with counted() as waits:
        found = ours(batch, True)["inputs"]
    assert waits == [] and torch.equal(found, theirs(batch, True)["inputs"])


def test_an_index_that_is_a_mask_stays_one():
    x = torch.arange(6).view(2, 3)
    with ConstantsDoNotWait():
        assert x[[True, False], ...].tolist() == [[0, 1, 2]] and x[:, [2, 0]].tolist() == [[2, 0], [5, 3]]


def test_every_kind_of_wait_is_counted():
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    with counted() as waits:
        x[mask], x[mask].sum().item(), bool(x[0] > 0), mask.nonzero(), x.repeat_interleave(mask.long()), x.unique()
        x.new_tensor([1]), torch.tensor([1]).to(x.device), x.numpy(), x.tolist(), float(x.cpu()[0]), x[[0, 1]]
        x[torch.tensor([0])] = 1
    names = ["aten.index", "aten.index", "aten._local_scalar_dense", "aten._local_scalar_dense", "aten.nonzero"]
    names += ["aten.repeat_interleave", "aten._unique2", "new_tensor", "to", "numpy", "tolist", "cpu"]
    names += ["__getitem__", "__setitem__"]
    assert waits == names


def test_focal_loss_never_needs_an_operator_of_mmcv(monkeypatch):
    """As on a GPU whose mmcv was built without CUDA: the call that mmdet would make of labels fails."""
    from mmdet.models.losses import focal_loss

    def absent(*_):
        raise RuntimeError("sigmoid_focal_loss: implementation for device cuda:0 not found")

    monkeypatch.setattr(focal_loss, "sigmoid_focal_loss", absent)
    monkeypatch.setattr(focal_loss.torch.cuda, "is_available", lambda: True)
    model, seen = build(PLAIN_DIGITS), []
    assert isinstance(model.decoder, Criterion) and isinstance(model.decoder.loss_cls, FocalLoss)
    model.decoder.loss_cls.register_forward_pre_hook(lambda _, args: seen.append([a.shape for a in args]))
    model.loss(torch.randn(1, 3, 96, 96), data_samples([2], (96, 96), 10))
    assert seen and all(scores == targets for scores, targets in seen)
