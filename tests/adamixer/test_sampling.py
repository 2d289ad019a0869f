"""The back ends of 3D sampling against each other, in value and gradient."""

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

from mmdet_lors.adamixer import sampling_backends
from mmdet_lors.adamixer.sampling import sample_3d
from mmdet_lors.adamixer.sampling_backends import BACKENDS, arrange

SIZES, STRIDES, GROUPS, CHANNELS = [(20, 24), (10, 12), (5, 6)], (4, 8, 16), 2, 3


class OnCPU:
    """mmcv's own PyTorch version of its op, for machines without CUDA: the same arguments, the same layouts."""

    @staticmethod
    def apply(value, shapes, first, locations, weights, im2col_step):
        assert value.shape[0] % im2col_step == 0
        assert first.tolist() == [0, *[h * w for h, w in shapes.tolist()]][:-1] or len(first) > 2
        return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def inputs(num_queries: int = 7, num_points: int = 5) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Levels and points, some of them outside the image and across its border."""
    feats = [torch.randn(2, GROUPS * CHANNELS, *size, dtype=torch.float64, requires_grad=True) for size in SIZES]
    shape = (2, num_queries, GROUPS, num_points)
    xy = torch.rand(*shape, 2, dtype=torch.float64) * 140 - 20
    z = 5 * torch.rand(*shape, 1, dtype=torch.float64) + 1
    return feats, torch.cat([xy, z], dim=-1).requires_grad_()


def run(backend: str, feats: list[torch.Tensor], points: torch.Tensor) -> list[torch.Tensor]:
    """The samples, and the gradients of levels and points."""
    out = sample_3d(arrange(feats, STRIDES, GROUPS, backend), points)
    grads = torch.autograd.grad((out * out.detach().cos()).sum(), [*feats, points])
    return [out.detach(), *grads]


@pytest.fixture
def deformable(monkeypatch):
    """mmcv's op where there is CUDA, its PyTorch version elsewhere."""
    monkeypatch.setattr(sampling_backends, "MultiScaleDeformableAttnFunction", OnCPU)


@pytest.mark.parametrize("backend", ["embedding_bag", "deformable"])
def test_back_ends_agree_in_value_and_gradient(backend, deformable):
    feats, points = inputs()
    for ours, expected in zip(run(backend, feats, points), run("grid_sample", feats, points), strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="mmcv's deformable attention op runs on CUDA alone")
def test_mmcvs_op_on_the_gpu_agrees():
    feats, points = inputs()
    expected = run("grid_sample", feats, points)
    feats, points = ([f.detach().cuda().requires_grad_() for f in feats], points.detach().cuda().requires_grad_())
    for ours, theirs in zip(run("deformable", feats, points), expected, strict=True):
        assert (ours.cpu() - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_levels_give_the_same(backend, deformable):
    feats, points = inputs()
    expected = run(backend, feats, points)
    last = [f.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for f in feats]
    for ours, theirs in zip(run(backend, last, points), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("backend", ["grid_sample", "embedding_bag"])
def test_what_is_kept_for_the_backward_pass_hardly_grows_with_levels(backend):
    """With more channels than a point has numbers, three levels keep less than half as much again as one."""
    shape = (1, 4, 1, 8)
    points = torch.cat([torch.rand(*shape, 2) * 80, torch.full((*shape, 1), 3.0)], dim=-1).requires_grad_()
    kept = {}
    for levels in (1, 3):
        feats = [torch.randn(1, 512, *size, requires_grad=True) for size in SIZES[:levels]]
        pyramid = arrange(feats, STRIDES[:levels], 1, backend)
        own = {t.untyped_storage().data_ptr() for t in (*feats, *pyramid.features, points)}
        seen = {}

        def pack(t, own=own, seen=seen):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = sample_3d(pyramid, points)
        kept[levels] = sum(seen.values()) + out.untyped_storage().nbytes()
    assert kept[3] < 1.5 * kept[1]


def test_half_precision_levels_are_sampled_in_float32():
    feats, points = inputs()
    for backend in ("grid_sample", "embedding_bag"):
        pyramid = arrange([f.detach().bfloat16() for f in feats], STRIDES, GROUPS, backend)
        exact = arrange([f.detach().bfloat16().float() for f in feats], STRIDES, GROUPS, backend)
        sampled = sample_3d(pyramid, points.detach().float())
        assert sampled.dtype == torch.float32
        assert torch.equal(sampled, sample_3d(exact, points.detach().float()))


def test_points_that_are_not_finite_do_not_crash():
    feats, points = inputs()
    points = points.detach().clone()
    points[0, 0, 0, 0] = torch.tensor([float("nan"), float("inf"), 1e30])
    sample_3d(arrange(feats, STRIDES, GROUPS, "embedding_bag"), points)


def test_auto_is_by_device():
    feats, _ = inputs()
    assert arrange(feats, STRIDES, GROUPS).backend == "embedding_bag"
    assert arrange([f.to("meta") for f in feats], STRIDES, GROUPS).backend == "grid_sample"
