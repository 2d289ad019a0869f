"""Compressed backbones: built, initialised, loaded and trained as the Runner does it."""

import pytest
import timm
import torch
from conftest import load_tool
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from torch import nn

from mmdet_lors.errors import UserError
from mmdet_lors.pela import OMIT, LowRankLinear, ViTPyramid, compress

SWIN = dict(
    type="SwinTransformer", embed_dims=12, depths=[1, 2, 1, 1], num_heads=[2, 2, 4, 4], window_size=4, mlp_ratio=2
)
OMIT_SWIN = ["norm", "patch_embed", "downsample", "attn.w_msa.proj"]
COMPRESSED = dict(type="PELABackbone", backbone=SWIN, ratio=1.5, omit=OMIT_SWIN)
TIMM_SWIN = dict(img_size=128, window_size=4, embed_dim=12, depths=(1, 2, 1, 1), num_heads=(2, 2, 4, 4), mlp_ratio=2.0)
VIT = dict(depth=2, embed_dim=16, num_heads=2, img_size=64)
PYRAMID = dict(type="ViTPyramid", model_name="vit_tiny_patch16_224", vit=VIT)


def low_rank(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


def test_a_backbone_keeps_its_class_and_names():
    backbone = MODELS.build(COMPRESSED)
    assert type(backbone).__name__ == "SwinTransformer"
    assert len(low_rank(backbone)) == 3 * 5
    plain = {key for key in MODELS.build(SWIN).state_dict()}
    ours = {key.removesuffix(".U") + ".weight" if key.endswith(".U") else key for key in backbone.state_dict()}
    assert {key for key in ours if not key.endswith(".V")} == plain
    assert "stages.0.blocks.0.ffn.layers.0.0.U" in backbone.state_dict()


def test_without_weights_a_layer_starts_as_a_linear_does():
    backbone = MODELS.build(COMPRESSED)
    backbone.init_weights()
    layer = backbone.stages[3].blocks[0].ffn.layers[0][0]
    assert layer.weight.std().item() == pytest.approx((3 * 96) ** -0.5, rel=0.2)
    # Swin's own start reached everything else.
    assert not backbone.stages[0].blocks[0].attn.w_msa.proj.bias.any()


def expected_from(plain: nn.Module) -> dict:
    return compress(plain, 1.5, OMIT_SWIN)[0].state_dict()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("where", ["backbone", "PELABackbone"])
@pytest.mark.parametrize("compressed", [False, True])
def test_pretrained_weights_of_either_kind(tmp_path, where, compressed):
    """Swin loads by itself, without strictness: the layers convert what they are given."""
    plain = MODELS.build(SWIN)
    expected = expected_from(plain)
    state = expected if compressed else plain.state_dict()
    torch.save(dict(state_dict={f"backbone.{k}": v for k, v in state.items()}), tmp_path / "weights.pth")
    init_cfg = ConfigDict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"))
    inner = dict(COMPRESSED, backbone=dict(SWIN, init_cfg=init_cfg))
    backbone = MODELS.build(inner if where == "backbone" else dict(COMPRESSED, init_cfg=init_cfg))
    backbone.init_weights()
    assert equal(backbone.state_dict(), expected)


def test_mmengine_loads_either_kind_into_a_model_that_holds_it(tmp_path):
    plain = nn.ModuleDict(dict(backbone=MODELS.build(SWIN)))
    expected = {f"backbone.{k}": v for k, v in expected_from(plain["backbone"]).items()}
    for state in (plain.state_dict(), expected):
        torch.save(dict(state_dict=state), tmp_path / "weights.pth")
        model = nn.ModuleDict(dict(backbone=MODELS.build(COMPRESSED)))
        load_checkpoint(model, str(tmp_path / "weights.pth"), strict=True)
        assert equal(model.state_dict(), expected)


def test_a_file_without_the_weights_is_no_silent_start(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("mmdet_lors.pela.compressed.print_log", lambda message, **_: said.append(message))
    torch.save(dict(state_dict={"backbone.norm0.weight": torch.ones(12)}), tmp_path / "weights.pth")
    init_cfg = ConfigDict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"))
    MODELS.build(dict(COMPRESSED, init_cfg=init_cfg)).init_weights()
    assert said == [
        "15 low-rank layers of SwinTransformer were not in the checkpoint and keep their weights: "
        "stages.0.blocks.0.attn.w_msa.qkv, stages.0.blocks.0.ffn.layers.0.0, stages.0.blocks.0.ffn.layers.1, ..."
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ratio=100), "SwinTransformer cannot be compressed: ratio 100 leaves stages.0.blocks.0"),
        (dict(omit=[""]), "SwinTransformer cannot be compressed: omit leaves no Linear to compress"),
    ],
)
def test_refuses_settings(changes, message):
    with pytest.raises(UserError, match=message):
        MODELS.build(dict(COMPRESSED, **changes))


def test_any_model_by_itself():
    model = MODELS.build(dict(type="PELAModel", model=PYRAMID, ratio=2))
    assert isinstance(model, ViTPyramid) and len(low_rank(model)) == 2 * 4


def test_pyramid_of_a_vit():
    backbone = MODELS.build(dict(type="PELABackbone", backbone=PYRAMID, ratio=2))
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 16, 24), (2, 8, 8, 12), (2, 16, 4, 6), (2, 16, 2, 3)]
    assert backbone.out_channels == [m.shape[1] for m in maps]
    sum(m.mean() for m in maps).backward()
    assert all(layer.U.grad is not None for layer in low_rank(backbone).values())


@pytest.mark.parametrize("prefix", ["", "backbone.model."])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_vits_weights_behind_any_prefix(tmp_path, prefix, compressed):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT).eval()
    state = (compress(vit, 2)[0] if compressed else vit).state_dict()
    torch.save(dict(state_dict={prefix + k: v for k, v in state.items()}), tmp_path / "vit.pth")
    init_cfg = ConfigDict(type="Pretrained", checkpoint=str(tmp_path / "vit.pth"))
    backbone = MODELS.build(dict(type="PELABackbone", backbone=PYRAMID, ratio=2, init_cfg=init_cfg)).eval()
    backbone.init_weights()
    expected = {k: v for k, v in compress(vit, 2)[0].state_dict().items() if not k.startswith("head.")}
    assert equal(backbone.vit.state_dict(), expected)
    x = torch.randn(1, 3, 64, 64)
    tokens = compress(vit, 2)[0].forward_features(x)[:, 1:]
    assert torch.allclose(backbone(x)[2].flatten(2).mT, tokens, atol=1e-5)


def test_a_vits_weights_from_timm(monkeypatch):
    create = timm.create_model
    init_cfg = ConfigDict(type="Pretrained", checkpoint="timm://vit_tiny_patch16_224")
    source = create("vit_tiny_patch16_224", num_classes=0, **VIT)
    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained=False, **k: source if pretrained else create(*a, **k)
    )
    backbone = MODELS.build(dict(type="PELABackbone", backbone=PYRAMID, ratio=2, init_cfg=init_cfg))
    backbone.init_weights()
    assert equal(backbone.vit.state_dict(), compress(source, 2)[0].state_dict())


def test_pyramid_refuses(tmp_path):
    torch.save(dict(state_dict=nn.Linear(2, 2).state_dict()), tmp_path / "other.pth")
    other = timm.create_model("vit_tiny_patch16_224", **dict(VIT, depth=1))
    torch.save(other.state_dict(), tmp_path / "shallow.pth")
    for name, message in [
        ("missing", "checkpoint .* does not exist"),
        ("other", "does not hold a ViT of timm"),
        ("shallow", r"lacks \d+ of the ViT's weights \(blocks.1"),
    ]:
        init_cfg = ConfigDict(type="Pretrained", checkpoint=str(tmp_path / f"{name}.pth"))
        with pytest.raises(UserError, match=message):
            MODELS.build(dict(PYRAMID, init_cfg=init_cfg)).init_weights()
    with pytest.raises(UserError, match="model_name 'vit_enormous' is not a ViT of timm"):
        MODELS.build(dict(PYRAMID, model_name="vit_enormous"))
    with pytest.raises(UserError, match="init_cfg must be of type 'Pretrained', got 'Normal'"):
        MODELS.build(dict(PYRAMID, init_cfg=dict(type="Normal")))


def test_a_timm_swin_student_in_mmdets_swin(tmp_path):
    """extract_student's names, mmdet's conversion, and the layers' keys together give the same features."""
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **TIMM_SWIN).eval()
    for name, p in swin.named_parameters():
        if "relative_position" in name or "downsample.norm" in name:
            nn.init.normal_(p)
    student, _ = compress(swin, 1.5, (*OMIT, "attn.proj"))
    names = load_tool("model_converters/extract_student.py").original_swin_names
    weights = names({f"model.{k}": v for k, v in student.state_dict().items()}, "student.pth")
    torch.save(dict(state_dict=weights), tmp_path / "student.pth")
    init_cfg = ConfigDict(type="Pretrained", checkpoint=str(tmp_path / "student.pth"))
    backbone = MODELS.build(dict(COMPRESSED, backbone=dict(SWIN, convert_weights=True, init_cfg=init_cfg)))
    backbone.init_weights()
    backbone.eval()
    x = torch.randn(1, 3, 128, 128)
    _, theirs = student.forward_intermediates(x)
    for ours, their in zip(backbone(x), theirs, strict=True):
        expected = nn.functional.layer_norm(their.permute(0, 2, 3, 1), their.shape[1:2]).permute(0, 3, 1, 2)
        assert torch.allclose(ours, expected, atol=1e-4)


class Toy(BaseModel):
    """The smallest thing that a Runner trains around a backbone."""

    def __init__(self, backbone: dict) -> None:
        super().__init__()
        self.backbone = MODELS.build(backbone)

    def forward(self, inputs, mode="tensor"):
        return dict(loss=sum(m.square().mean() for m in self.backbone(inputs)))


def runner(model: nn.Module, work_dir, **settings) -> Runner:
    data = [torch.randn(3, 64, 64) for _ in range(4)]
    loader = dict(
        dataset=data,
        batch_size=2,
        sampler=dict(type=DefaultSampler, shuffle=False),
        collate_fn=lambda images: dict(inputs=torch.stack(images)),
    )
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=settings.pop("max_epochs", 1)),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2)),
        default_hooks=dict(logger=None),
        default_scope="mmdet",
        experiment_name=f"pela-{work_dir.name}-{id(model)}",
        **settings,
    )


def test_runner_trains_the_factors_and_resumes(tmp_path):
    plain = MODELS.build(SWIN)
    torch.save(dict(state_dict={f"backbone.{k}": v for k, v in plain.state_dict().items()}), tmp_path / "weights.pth")
    start = expected_from(plain)
    init_cfg = ConfigDict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"))
    pretrained = dict(COMPRESSED, init_cfg=init_cfg)
    first = runner(Toy(pretrained), tmp_path / "run")
    first.train()
    trained = first.model.state_dict()
    moved = {key for key, value in start.items() if not torch.equal(trained[f"backbone.{key}"], value)}
    assert {f"{name}.{factor}" for name in low_rank(first.model.backbone) for factor in "UV"} <= moved

    second = runner(Toy(pretrained), tmp_path / "run", max_epochs=1, resume=True)
    second.train()
    assert second.epoch == 1 and equal(second.model.state_dict(), trained)
