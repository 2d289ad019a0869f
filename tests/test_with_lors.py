"""WithLORS: the model that comes out, its initialisation in the order in which a run does it, and wrong settings."""

import copy
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.errors import UserError
from mmdet_lors.lors import fold_stack


class Stack(BaseModule):
    """Three layers that a run's ``init_weights()`` fills in DETR's manner: Xavier for everything that is a matrix."""

    def __init__(self, loaded: str | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24)) for _ in range(3))
        self.head = nn.Linear(24, 5)
        self.loaded = loaded is not None
        if loaded:
            self.load_state_dict(torch.load(loaded))

    def init_weights(self) -> None:
        if not self.init_cfg and not self.loaded:
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        super().init_weights()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Detector(BaseModule):
    """A model around it, which initialises its children."""

    def __init__(self, backbone: dict, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.backbone = MODELS.build(backbone)
        self.last = nn.Linear(5, 2)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    for kind in (Stack, Detector):
        MODELS.register_module(f"TestWithLORS{kind.__name__}", module=kind)
    yield
    for kind in (Stack, Detector):
        MODELS.module_dict.pop(f"TestWithLORS{kind.__name__}")


def config(inner: dict | None = None, **stack) -> dict:
    stack = dict(layers="blocks", targets=["0", "2"], rank=4, groups=[1, 2, 3]) | stack
    return ConfigDict(type="WithLORS", model=dict(type="TestWithLORSStack", **inner or {}), stacks=[stack])


def plain_checkpoint(folder: Path) -> tuple[str, Stack]:
    plain = Stack()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save(plain.state_dict(), folder / "plain.pth")
    return str(folder / "plain.pth"), plain


def starts_as_the_paper_says(stack: Stack) -> bool:
    privates = [m.weight_lorst.private for m in stack.modules() if hasattr(m, "weight_lorst")]
    bounds = [(6 / private.A.shape[1]) ** 0.5 for private in privates]
    return len(privates) == 6 and all(
        not p.B.any() and 0.8 * bound < p.A.abs().max() <= bound for p, bound in zip(privates, bounds, strict=True)
    )


def test_the_model_itself_comes_out():
    built = MODELS.build(config())
    assert type(built) is Stack
    assert {name.split("_lorst")[0] for name in built.state_dict()} == set(Stack().state_dict())


def test_lors_initialisation_holds_after_the_models_own():
    """The optimizer is made before, as mmengine's runner does; what is not LORST is as in the plain model."""
    built, plain = MODELS.build(config()), Stack()
    nn.init.normal_(built.blocks[1][0].weight_lorst.private.B)
    optimizer = build_optim_wrapper(built, dict(optimizer=dict(type="SGD", lr=0.1))).optimizer
    known = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for model in (plain, built):
        torch.manual_seed(1)
        model.init_weights()
    assert starts_as_the_paper_says(built)
    assert known == [id(p) for p in built.parameters()]
    assert torch.equal(built.head.weight, plain.head.weight)
    for block in built.blocks:
        assert torch.equal(block[0].weight, plain.blocks[0][0].weight)
        assert torch.equal(block[2].weight, plain.blocks[0][2].weight)


@pytest.mark.parametrize("how", ["init_cfg", "while it is built"])
def test_trained_initialisation_comes_after_the_weights(how, tmp_path):
    path, plain = plain_checkpoint(tmp_path)
    inner = dict(loaded=path)
    if how == "init_cfg":
        inner = dict(init_cfg=dict(type="Pretrained", checkpoint=path))
    built = MODELS.build(config(inner, init="trained", rank=24, groups=1))
    built.init_weights()
    x = torch.randn(7, 24)
    assert torch.allclose(built(x), plain(x), atol=1e-5)
    mean = sum(block[0].weight for block in plain.blocks) / 3
    assert torch.allclose(built.blocks[0][0].weight_lorst.shared, mean, atol=1e-6)


def test_below_another_module(tmp_path):
    path, plain = plain_checkpoint(tmp_path)
    inner = dict(init_cfg=dict(type="Pretrained", checkpoint=path))
    detector = MODELS.build(
        dict(type="TestWithLORSDetector", backbone=config(inner, init="trained", rank=24, groups=1))
    )
    detector.init_weights()
    x = torch.randn(7, 24)
    assert torch.allclose(detector.backbone(x), plain(x), atol=1e-5)
    paper = MODELS.build(dict(type="TestWithLORSDetector", backbone=config()))
    paper.init_weights()
    assert starts_as_the_paper_says(paper.backbone)
    assert not any(hasattr(module, "_params_init_info") for module in paper.modules())


def test_a_second_initialisation_leaves_a_trained_model_alone():
    built = MODELS.build(config())
    built.init_weights()
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    built.loaded = True
    built.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_a_copy_initialises_itself():
    built = MODELS.build(config())
    copied = copy.deepcopy(built)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    copied.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    assert not torch.equal(copied.blocks[2][0].weight, built.blocks[2][0].weight)
    fold_stack(copied.blocks)
    assert [type(m) for m in copied.modules()] == [type(m) for m in Stack().modules()]


@pytest.mark.parametrize("init", ["first", "trained"])
def test_adaptive_layers_start_from_the_models_own_weights_and_stay_when_trained(init, tmp_path):
    path, plain = plain_checkpoint(tmp_path)
    inner = dict(init_cfg=dict(type="Pretrained", checkpoint=path))
    built, x = MODELS.build(config(inner, init=init, kind="adaptive", condition="mean")), torch.randn(2, 5, 24)
    known = [id(p) for p in built.parameters()]
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    built.init_weights()
    weights = [block[0].weight for block in plain.blocks]
    shared = weights[0] if init == "first" else sum(weights) / 3
    for block in built.blocks:
        assert torch.allclose(block[0](x), nn.functional.linear(x, shared, block[0].bias), atol=1e-5)
    assert known == [id(p) for p in built.parameters()] and torch.equal(built.head.weight, plain.head.weight)
    for parameter in built.parameters():
        nn.init.normal_(parameter)
    before = copy.deepcopy(built.state_dict())
    built.init_weights()  # which loads nothing a second time
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


@pytest.mark.parametrize("init", ["first", "paper", "trained"])
def test_builds_without_weights_and_twice(init):
    """As the tools do, to check a config: what is in the parameters is whatever the allocator gives."""
    cfg = config(init=init)
    before = copy.deepcopy(cfg)
    names = [list(build_without_weights(cfg).state_dict()) for _ in range(2)]
    assert names[0] == names[1] == list(MODELS.build(cfg).state_dict()) and cfg == before


def test_weights_that_are_not_there_yet_are_fitted_when_they_are():
    """NaN, as an allocator may give, until ``init_weights()``."""

    class Late(Stack):
        def __init__(self) -> None:
            super().__init__()
            for parameter in self.parameters():
                nn.init.constant_(parameter, float("nan"))

    MODELS.register_module("TestWithLORSLate", module=Late)
    cfg = config(init="trained", rank=24, groups=1)
    cfg.model.type = "TestWithLORSLate"
    built = MODELS.build(cfg)
    MODELS.module_dict.pop("TestWithLORSLate")
    built.init_weights()
    weights = [block[0].weight for block in built.blocks]
    assert all(w.isfinite().all() for w in weights) and not torch.equal(weights[0], weights[1])


def test_layers_can_be_named_one_by_one():
    cfg = config(layers=["blocks.0", "blocks.2"], groups=1)
    built = MODELS.build(cfg)
    assert [hasattr(block[0], "weight_lorst") for block in built.blocks] == [True, False, True]


@pytest.mark.parametrize(
    ("stacks", "message"),
    [
        ([], "stacks must be a list of one dict or more, got []"),
        (dict(layers="blocks"), "stacks must be a list of one dict or more"),
        (["blocks"], "stacks[0] must be a dict, got 'blocks'"),
        ([dict(targets="0")], "stacks[0].layers is missing"),
        ([dict(layers="blocks")], "stacks[0].targets is missing"),
        (
            [dict(layers="blocks", targets="0", ranks=4)],
            "stacks[0] has no field 'ranks'; its fields are layers, targets",
        ),
        ([dict(layers="block", targets="0")], "stacks[0].layers 'block': Stack has no 'block'; it has blocks, head"),
        ([dict(layers="blocks.5", targets="0")], "stacks[0].layers 'blocks.5': ModuleList has no '5'; it has 0, 1, 2"),
        ([dict(layers="head", targets="weight")], "stacks[0].layers 'head' is a Linear, not an nn.ModuleList"),
        ([dict(layers="blocks", targets="3")], "stacks[0].targets[0] '3' matches nothing in layer 0"),
        ([dict(layers="blocks", targets="1")], "stacks[0].targets[0] '1': layer 0's 1 is a ReLU, neither"),
        ([dict(layers="blocks", targets="0", rank=[1, 2])], "stacks[0].rank has 2 entries for 3 layers"),
        (
            [dict(layers="blocks", targets="0", rank=25)],
            "stacks[0].rank: layer 0's 0.weight has rank 25 x 1 groups = 25",
        ),
        (
            [dict(layers="blocks", targets="0", init="svd")],
            "stacks[0].init must be one of first, paper, trained, got 'svd'",
        ),
        (
            [dict(layers="blocks", targets="0", kind="dynamic")],
            "stacks[0].kind must be one of static, adaptive, got 'dynamic'",
        ),
        (
            [dict(layers="blocks", targets="0", kind="adaptive", condition="query")],
            "stacks[0].condition must be one of token, mean, got 'query'",
        ),
        (
            [dict(layers="blocks", targets="0"), dict(layers="blocks", targets="*")],
            "stacks[1].targets: layer 0's 0.weight is shared already",
        ),
    ],
)
def test_refuses(stacks, message):
    cfg = ConfigDict(type="WithLORS", model=dict(type="TestWithLORSStack"), stacks=stacks)
    with pytest.raises(UserError) as error:
        MODELS.build(cfg)
    assert message in str(error.value)


def test_the_inner_models_own_mistakes_stay_its_own():
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        MODELS.build(config(dict(depth=3)))
