"""UperNet on compressed backbones: Table 2's models, one step, and the tools on a data set of ADE20K's form."""

import json
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, forget_visualizers, load_tool, refused
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.structures import PixelData
from mmengine.utils import is_installed
from PIL import Image
from torch import nn

from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.errors import UserError
from mmdet_lors.pela import LowRankLinear, compress

DEIT = "upernet_pela-deit-base_8xb2-160k_ade20k-512x512"
SWIN = "upernet_pela-swin-base_8xb2-160k_ade20k-512x512"
SWIN_2, LARGE = SWIN.replace("base", "base-ratio-2"), DEIT.replace("deit-base", "deit3-large")
CONFIGS = {
    # parameters, and of the backbone, before; after; low-rank layers; Table 2 in millions
    DEIT: ((120_574_508, 86_433_024), (78_088_748, 43_947_264), 48, (121.4, 78.9)),
    SWIN: ((121_279_716, 86_745_016), (95_675_620, 61_140_920), 72, (121.3, 79.3)),
    SWIN_2: ((121_279_716, 86_745_016), (79_313_636, 44_778_936), 96, (121.3, 79.3)),
    LARGE: ((427_358_508, 304_195_584), (276_216_108, 153_053_184), 96, (428.4, 277.2)),
}
VIT = dict(depth=4, embed_dim=16, num_heads=2, img_size=64)
MAPS = dict(type="ViTMaps", model_name="vit_tiny_patch16_224", out_indices=[0, 1, 2, 3], vit=VIT)

needs_mmseg = pytest.mark.skipif(
    not is_installed("mmsegmentation"), reason="mmsegmentation is not installed: pip install -e .[seg]"
)


@pytest.fixture(autouse=True)
def _mmdets_scope_afterwards():
    yield
    init_default_scope("mmdet")


@cache
def load(name: str) -> Config:
    """A config. Shared between tests: not to be changed."""
    return Config.fromfile(ROOT / f"configs/pela/{name}.py")


@contextmanager
def mmseg_scope():
    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def low_rank(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}


# Drop path would leave blocks without a gradient, with two images often.
SMALL = {
    DEIT: dict(
        backbone=dict(
            backbone=dict(
                model_name="vit_tiny_patch16_224", out_indices=[0, 1, 2, 3], vit=dict(VIT, drop_path_rate=0.0)
            )
        ),
        decode_head=dict(in_channels=[16] * 4, channels=8),
        auxiliary_head=dict(in_channels=16, channels=8),
    ),
    SWIN: dict(
        backbone=dict(
            backbone=dict(embed_dims=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, drop_path_rate=0.0)
        ),
        decode_head=dict(in_channels=[8, 16, 32, 64], channels=8),
        auxiliary_head=dict(in_channels=32, channels=8),
    ),
}


def small(name: str) -> Config:
    """The config with narrow layers, a 64 x 64 crop and nothing to download."""
    cfg = load(name).copy()
    cfg.merge_from_dict(dict(model=dict(SMALL[name], data_preprocessor=dict(size=(64, 64)))))
    for backbone in (cfg.model.backbone, cfg.model.backbone.backbone):
        backbone.pop("init_cfg", None)
    return cfg


@needs_mmseg
@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_with_this_many_parameters(name):
    before, after, layers, _ = CONFIGS[name]
    cfg = load(name).model
    with mmseg_scope():
        model = build_without_weights(cfg)
        plain = build_without_weights(dict(cfg, backbone=cfg.backbone.backbone))
    assert (count(model), count(model.backbone)) == after and (count(plain), count(plain.backbone)) == before
    assert len(low_rank(model)) == len(low_rank(model.backbone)) == layers and not low_rank(plain)


@needs_mmseg
def test_the_rest_is_mmsegmentations_own_config():
    for name, base in (
        (DEIT, "vit/vit_deit-b16_upernet_8xb2-160k_ade20k-512x512.py"),
        (SWIN, "swin/swin-base-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"),
    ):
        ours, theirs = load(name).to_dict(), Config.fromfile(_mmseg_config(base)).to_dict()
        for field in ("train_dataloader", "val_evaluator", "optim_wrapper", "param_scheduler", "train_cfg"):
            assert _without_scope(ours[field]) == theirs[field], field
        for field in ("decode_head", "auxiliary_head", "data_preprocessor"):
            assert _without_scope(ours["model"][field]) == theirs["model"][field], field
        assert ours["train_cfg"]["max_iters"] == 160_000 and ours["train_dataloader"]["batch_size"] == 2
        assert ours["model"]["data_preprocessor"]["size"] == (512, 512)
    # The Swin inside is theirs, too; the DeiT inside has one bias more, that of its patches.
    assert load(SWIN).model.backbone.backbone.to_dict() == theirs["model"]["backbone"]
    with mmseg_scope():
        deit = Config.fromfile(_mmseg_config("vit/vit_deit-b16_upernet_8xb2-160k_ade20k-512x512.py")).model
        theirs = build_without_weights(deit.backbone)
    assert count(theirs) + 768 == CONFIGS[DEIT][0][1]


def _mmseg_config(path: str) -> str:
    import mmseg

    return str(Path(mmseg.__file__).parent / ".mim/configs" / path)


def _without_scope(value):
    if isinstance(value, dict):
        return {k: _without_scope(v) for k, v in value.items() if k != "_scope_"}
    return [_without_scope(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", CONFIGS)
def test_what_compression_saves_beside_the_papers_table(name):
    """The ViTs and Swin-B at ratio 2 save what Table 2 says; Swin-B at ratio 1.5 saves 25.6 M, as in Table 1."""
    (before, _), (after, _), _, paper = CONFIGS[name]
    ours, theirs = round((before - after) / 1e6, 1), round(paper[0] - paper[1], 1)
    assert (ours, theirs) == {DEIT: (42.5, 42.5), LARGE: (151.1, 151.2), SWIN: (25.6, 42.0), SWIN_2: (42.0, 42.0)}[name]


@pytest.mark.parametrize(("name", "classifier"), [(SWIN_2, 0), (LARGE, 1025_000)])
def test_table_2s_other_models_are_within_0_3_per_cent(name, classifier):
    """The paper's DeiT-III-L seems to have ImageNet's classifier still; without it ours are 0.2 and 0.4 % smaller."""
    (before, _), (after, _), _, paper = CONFIGS[name]
    assert [n + classifier for n in (before, after)] == [pytest.approx(1e6 * million, rel=0.003) for million in paper]


@needs_mmseg
@pytest.mark.parametrize("name", SMALL)
def test_forward_and_backward(name):
    from mmseg.structures import SegDataSample

    with mmseg_scope():
        model = MODELS.build(small(name).model)
    model.init_weights()
    meta = dict(img_shape=(64, 64), ori_shape=(64, 64))
    samples = [
        SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=torch.randint(150, (1, 64, 64)))) for _ in range(2)
    ]
    images = torch.randn(2, 3, 64, 64)
    losses = model.train().loss(images, samples)
    assert {"decode.loss_ce", "aux.loss_ce"} <= losses.keys()
    # At the start every class is about as likely.
    assert losses["decode.loss_ce"].item() == pytest.approx(np.log(150), rel=0.3)
    sum(value for key, value in losses.items() if "loss" in key).backward()
    layers = low_rank(model)
    assert len(layers) == {DEIT: 4 * 4, SWIN: 5 * 3}[name]
    assert all(layer.U.grad.any() and layer.V.grad.any() for layer in layers.values())
    assert all(p.grad is not None for p in model.parameters()), "distributed training refuses unused parameters"
    [prediction, _] = model.eval().predict(images, samples)
    assert prediction.seg_logits.data.shape == (150, 64, 64) and prediction.pred_sem_seg.data.shape == (1, 64, 64)


@needs_mmseg
def test_mmsegs_swin_loads_weights_of_either_kind(tmp_path):
    cfg = small(SWIN).model.backbone
    with mmseg_scope():
        plain = MODELS.build(cfg.backbone)
    plain.init_weights()
    expected = compress(plain, cfg.ratio, cfg.omit)[0].state_dict()
    for state in (plain.state_dict(), expected):
        torch.save(dict(state_dict={f"backbone.{k}": v for k, v in state.items()}), tmp_path / "weights.pth")
        cfg.backbone.init_cfg = ConfigDict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"))
        with mmseg_scope():
            backbone = MODELS.build(cfg)
        backbone.init_weights()
        found = backbone.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


@needs_mmseg
def test_mmdets_swin_which_reads_a_student_takes_the_same_settings():
    """docs/pela_recipes.md: a student keeps the original names, which mmdet's Swin converts, and mmseg's does not."""
    cfg = small(SWIN).model.backbone
    changed = dict(cfg, backbone=dict(cfg.backbone, type="mmdet.SwinTransformer", convert_weights=True))
    with mmseg_scope():
        ours, theirs = MODELS.build(changed), MODELS.build(cfg)
    for backbone in (ours, theirs):
        backbone.eval()
    assert type(ours) is not type(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert all(torch.equal(a, b) for a, b in zip(ours(x), theirs(x), strict=True))


def test_maps_of_a_vit_are_its_blocks():
    backbone = MODELS.build(dict(MAPS, out_indices=[1, 3])).eval()
    x = torch.randn(2, 3, 64, 96)
    tokens = []
    for i in (1, 3):
        backbone.vit.blocks[i].register_forward_hook(lambda module, args, out: tokens.append(out[:, 1:]))
    maps = backbone(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 4, 6)] * 2 and backbone.out_channels == [16, 16]
    assert all(torch.equal(m.flatten(2).mT, t) for m, t in zip(maps, tokens, strict=True))


@pytest.mark.parametrize("indices", [[], [0, 2], [1, 1, 3], [3, 1], [1, 4], [-1, 3]])
def test_maps_refuse(indices):
    with pytest.raises(UserError, match="out_indices must rise from 0 or more to the last block, 3: "):
        MODELS.build(dict(MAPS, out_indices=indices))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_vit_of_another_image_size_brings_its_weights(tmp_path, compressed):
    """As DeiT does, trained at 224 pixels: positions are interpolated to 512, everything else is as it was."""
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, **dict(VIT, img_size=32)).eval()
    state = (compress(vit, 2)[0] if compressed else vit).state_dict()
    torch.save(dict(state_dict={f"network.{k}": v for k, v in state.items()}), tmp_path / "vit.pth")
    init_cfg = ConfigDict(type="Pretrained", checkpoint=str(tmp_path / "vit.pth"))
    backbone = MODELS.build(dict(type="PELABackbone", backbone=MAPS, ratio=2, init_cfg=init_cfg)).eval()
    backbone.init_weights()
    expected = compress(vit, 2)[0].state_dict()
    found = backbone.vit.state_dict()
    assert expected["pos_embed"].shape[1] == 1 + 2 * 2 and found["pos_embed"].shape[1] == 1 + 4 * 4
    assert all(torch.equal(found[k], expected[k]) for k in found if k != "pos_embed")
    # The class token's position is no place in the image: it stays. The mean of the others does, nearly.
    assert torch.equal(found["pos_embed"][:, 0], expected["pos_embed"][:, 0])
    means = [state["pos_embed"][:, 1:].mean(1) for state in (found, expected)]
    assert torch.allclose(*means, atol=1e-2)


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory) -> Path:
    """Eight images whose brightness is their class, in ADE20K's folders."""
    root = tmp_path_factory.mktemp("ade")
    generator = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(4):
            labels = np.kron(generator.integers(0, 3, (4, 4)), np.ones((16, 16))).astype(np.uint8)
            Image.fromarray(np.repeat(labels[..., None] * 80, 3, axis=2)).save(root / f"images/{split}/{i}.jpg")
            Image.fromarray(labels).save(root / f"annotations/{split}/{i}.png")
    return root


def options(data: Path, name: str) -> list[str]:
    """--cfg-options for a run of seconds."""
    settings = ["model.data_preprocessor.size=(64,64)", "train_cfg.max_iters=2", "train_cfg.val_interval=2"]
    settings += ["default_hooks.checkpoint.interval=2", "train_dataloader.dataset.pipeline.2.scale=(64,64)"]
    settings += ["train_dataloader.dataset.pipeline.3.crop_size=(64,64)", "env_cfg.mp_cfg.mp_start_method=None"]
    for split in ("train", "val", "test"):
        settings += [f"{split}_dataloader.dataset.data_root={data}", f"{split}_dataloader.num_workers=0"]
        settings += [f"{split}_dataloader.persistent_workers=False"]
        if split != "train":
            settings += [f"{split}_dataloader.dataset.pipeline.1.scale=(64,64)"]

    def flat(node: dict, path: str):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from flat(value, f"{path}.{key}")
            else:
                yield f"{path}.{key}={value}".replace(" ", "")

    init_cfg = "model.backbone.init_cfg" if name == DEIT else "model.backbone.backbone.init_cfg"
    return ["--cfg-options", *settings, *flat(SMALL[name], "model"), f"{init_cfg}=None"]


def call(tool: str, monkeypatch, *arguments: str) -> None:
    forget_visualizers()
    module = load_tool(tool)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    module.main()


@needs_mmseg
@pytest.mark.parametrize("name", SMALL)
def test_the_tools_train_and_evaluate(name, ade20k, tmp_path, monkeypatch):
    config = str(ROOT / f"configs/pela/{name}.py")
    work = ["--work-dir", str(tmp_path)]
    call("train.py", monkeypatch, config, *work, *options(ade20k, name))
    assert (tmp_path / "iter_2.pth").is_file()
    metrics = ["--metrics", str(tmp_path / "metrics.json"), "--out", str(tmp_path / "raw.pkl")]
    pictures = ["--show-dir", "pictures", "--show-interval", "2"]
    call(
        "test.py", monkeypatch, config, str(tmp_path / "iter_2.pth"), *work, *metrics, *pictures, *options(ade20k, name)
    )
    if name == SWIN:
        call("test.py", monkeypatch, config, str(tmp_path / "iter_2.pth"), "--tta", *work, *options(ade20k, name))
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text())["mIoU"] <= 100
    assert (tmp_path / "raw.pkl").is_file() and len(list(tmp_path.glob("pictures/**/*.jpg"))) == 2


@needs_mmseg
def test_train_refuses_missing_data(work, ade20k, tmp_path, monkeypatch, capsys):
    config = str(ROOT / f"configs/pela/{SWIN}.py")
    settings = options(tmp_path / "nowhere", SWIN)
    assert "nowhere does not exist; docs/pela_recipes.md" in refused(
        "train.py", [config, *work, *settings], monkeypatch, capsys
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused("train.py", [config, *work, *options(empty, SWIN)], monkeypatch, capsys)
    assert f"img_path folder {empty}/images/training does not exist" in message
    settings = [*options(ade20k, SWIN), "model.decode_head.num_classes=3"]
    message = refused("train.py", [config, *work, *settings], monkeypatch, capsys)
    assert "model.decode_head.num_classes is 3, but train_dataloader's data set has 150 classes" in message


@pytest.mark.parametrize("name", SMALL)
def test_without_mmsegmentation_the_tools_say_so_in_one_line(name, work, monkeypatch, capsys):
    monkeypatch.setattr("mmengine.config.config.is_installed", lambda package: package != "mmsegmentation")
    message = refused("train.py", [str(ROOT / f"configs/pela/{name}.py"), *work], monkeypatch, capsys)
    assert "mmsegmentation is not installed" in message and message.endswith("pip install -e .[seg]")
