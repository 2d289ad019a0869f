"""The back ends of 3D sampling against each other, in value and gradient."""

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

from mmdet_lors.adamixer.sampling import backends, sample_3d
from mmdet_lors.adamixer.sampling.backends import BACKENDS, NEEDS, arrange, choose
from mmdet_lors.errors import UserError

SIZES, STRIDES, GROUPS = [(21, 24), (11, 12), (5, 6)], (4, 8, 16), 2


class OnCPU:
    """mmcv's own PyTorch version of its op, for machines without CUDA: the same arguments, the same layouts."""

    @staticmethod
    def apply(value, shapes, first, locations, weights, im2col_step):
        assert value.shape[0] % im2col_step == 0
        assert first.tolist() == [0, *[h * w for h, w in shapes.tolist()]][:-1] or len(first) > 2
        return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


def inputs(num_queries: int = 7, num_points: int = 5, channels: int = 3) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Levels and points, some of them outside the image and across its border."""
    feats = [torch.randn(2, GROUPS * channels, *size, dtype=torch.float64, requires_grad=True) for size in SIZES]
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
    """mmcv's op through its PyTorch version."""
    monkeypatch.setattr(backends, "MultiScaleDeformableAttnFunction", OnCPU)
    monkeypatch.setitem(NEEDS, "deformable", lambda device: "")


@pytest.mark.parametrize("channels", [3, 24])
@pytest.mark.parametrize("backend", ["embedding_bag", "deformable", "triton"])
def test_back_ends_agree_in_value_and_gradient(backend, channels, deformable):
    feats, points = inputs(channels=channels)
    for ours, expected in zip(run(backend, feats, points), run("grid_sample", feats, points), strict=True):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        assert (ours - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["embedding_bag", "deformable", "triton"])
def test_back_ends_agree_on_the_gpu(backend):
    feats, points = inputs(channels=24)
    expected = run("grid_sample", feats, points)
    feats, points = ([f.detach().cuda().requires_grad_() for f in feats], points.detach().cuda().requires_grad_())
    if why := NEEDS.get(backend, lambda device: "")(points.device):
        pytest.skip(f"{backend} does not run on this GPU: {why}")
    for ours, theirs in zip(run(backend, feats, points), expected, strict=True):
        assert (ours.cpu() - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize(
    ("dtype", "value", "gradient"),
    [(torch.float32, 1e-6, 1e-6), (torch.float16, 1e-3, 1e-3), (torch.bfloat16, 8e-3, 8e-3)],
)
def test_the_kernel_in_lower_precision(dtype, value, gradient):
    """It computes in float32, and rounds what it returns."""
    feats, points = inputs(channels=16)
    low = [feat.detach().to(dtype).requires_grad_() for feat in feats]
    low_points = points.detach().float().requires_grad_()
    exact = [feat.detach().double().requires_grad_() for feat in low]
    exact_points = low_points.detach().double().requires_grad_()
    out = sample_3d(arrange(exact, STRIDES, GROUPS, "grid_sample"), exact_points)
    low_out = sample_3d(arrange(low, STRIDES, GROUPS, "triton"), low_points)
    assert low_out.dtype == dtype
    assert (low_out - out).norm() <= value * out.norm()
    grad = torch.randn_like(low_out)
    expected = torch.autograd.grad(out, [*exact, exact_points], grad.double())
    found = torch.autograd.grad(low_out, [*low, low_points], grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= gradient * theirs.norm()


@pytest.mark.parametrize("shape", [(0, 4, 2, 5), (2, 0, 2, 5), (1, 1, 2, 1)])
def test_the_kernel_takes_any_number_of_points(shape):
    batch, _, groups, _ = shape
    feats = [torch.randn(batch, groups * 8, *size, requires_grad=True) for size in SIZES]
    points = (torch.rand(*shape, 3) * 5 + 1).requires_grad_()
    for ours, theirs in zip(run("triton", feats, points), run("embedding_bag", feats, points), strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)


def test_the_kernel_is_an_operator_that_compiles_whole():
    feats, points = inputs(channels=8)
    pyramid = arrange([feat.detach() for feat in feats], STRIDES, GROUPS, "triton")
    compiled = torch.compile(sample_3d, fullgraph=True, backend="aot_eager")
    points = points.detach().requires_grad_()
    (ours,) = torch.autograd.grad(compiled(pyramid, points).sum(), points)
    (theirs,) = torch.autograd.grad(sample_3d(pyramid, points).sum(), points)
    assert torch.equal(ours, theirs)
    torch.compiler.reset()


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


@pytest.mark.parametrize("backend", ["embedding_bag", "triton"])
def test_points_that_are_not_finite_do_not_crash(backend):
    feats, points = inputs()
    points = points.detach().clone()
    points[0, 0, 0, 0] = torch.tensor([float("nan"), float("inf"), 1e30])
    others = sample_3d(arrange(feats, STRIDES, GROUPS, backend), points)[:, 1:]
    assert others.isfinite().all()


CPU, CUDA, MPS, XPU = (torch.device(device) for device in ("cpu", "cuda", "mps", "xpu"))


@pytest.mark.parametrize(
    ("device", "runs", "chosen"),
    [
        (CPU, ["triton", "deformable"], "embedding_bag"),
        (CUDA, ["triton", "deformable"], "triton"),
        (CUDA, ["deformable"], "deformable"),
        (CUDA, ["triton"], "triton"),
        (CUDA, [], "grid_sample"),  # a driver, mmcv built without CUDA, no Triton
        (MPS, [], "embedding_bag"),
        (XPU, [], "grid_sample"),
        (torch.device("meta"), [], "grid_sample"),
    ],
)
def test_auto_takes_the_fastest_that_runs(device, runs, chosen, monkeypatch):
    for name in NEEDS:
        monkeypatch.setitem(NEEDS, name, lambda device, name=name: "" if name in runs else "missing")
    assert choose(device) == chosen


def test_auto_is_deterministic_where_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose(CUDA) == "embedding_bag"


def test_mmcvs_operator_is_not_reached_where_it_was_not_compiled(monkeypatch):
    monkeypatch.setattr(backends, "get_compiling_cuda_version", lambda: "not available")
    assert "without CUDA operators" in NEEDS["deformable"](CUDA)
    monkeypatch.setattr(backends, "get_compiling_cuda_version", lambda: "13.0")
    assert not NEEDS["deformable"](CUDA)


def test_a_back_end_that_does_not_run_here_is_refused_in_one_line():
    feats, _ = inputs()
    with pytest.raises(UserError, match="^decoder.sampling 'deformable' does not run on cpu: it is a CUDA operator$"):
        arrange(feats, STRIDES, GROUPS, "deformable")
