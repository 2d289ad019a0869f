"""Every file of configs/ builds what its name says, and the papers' parameter counts come out."""

from functools import cache

import pytest
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, load_config
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from rates import learning_rates
from torch import nn

from mmdet_lors.analysis.complexity import build_on_meta

BACKBONES = {
    # type and depth, for Swin its blocks per stage
    "r18": ("ResNet", 18),
    "r50": ("ResNet", 50),
    "r101": ("ResNet", 101),
    "swin-s": ("SwinTransformer", [2, 2, 18, 2]),
    "x101-32x4d-dcn": ("ResNeXt", 101),
}
LONG = "crop-ms-480-800-3x"
SCHEDULES = {
    "1x": dict(epochs=12, steps=[8, 11], crop=False),
    LONG: dict(epochs=36, steps=[24, 33], crop=True),
    "ms-480-800-3x": dict(epochs=36, steps=[27, 33], crop=False),
}

ZOO = [
    # backbone, queries, schedule, parameters of AdaMixer, and with LORS
    ("r50", 100, "1x", 134_790_504, 59_866_472),
    ("r50", 300, "1x", 134_841_704, 59_917_672),
    ("r50", 100, LONG, 134_790_504, 59_866_472),
    ("r50", 300, LONG, 134_841_704, 59_917_672),
    ("r101", 300, LONG, 153_833_832, 78_909_800),
    ("swin-s", 300, LONG, 159_557_874, 84_633_842),
    ("x101-32x4d-dcn", 300, LONG, 156_034_180, 81_110_148),
]


ELSEWHERE = ("configs/_base_/", "configs/classification/", "configs/lors/other_detectors/", "configs/pela/")
ELSEWHERE += ("configs/lors/adamixer_lors_r18_digits_new_style.py", "configs/lora/")
"""No row here: parts of configs, and what the tests of classification, of PELA, of LoRA, of new-style configs and
tests/configs/test_other_detectors.py have."""


def plain_path(backbone: str, queries: int, schedule: str) -> str:
    return f"configs/adamixer/adamixer_{backbone}_{queries}-queries_{schedule}_coco.py"


def lors_path(backbone: str, queries: int, schedule: str) -> str:
    return f"configs/lors/adamixer-lors_{backbone}_{queries}-queries_{schedule}_coco.py"


PLAIN, LORS = plain_path("r50", 100, "1x"), lors_path("r50", 100, "1x")


def ablation(name: str) -> str:
    return f"configs/lors/ablations/{name}.py"


LORSA = dict(shared=True, rank=[16] * 6, groups=[1, 1, 2, 2, 3, 3])
LORST = dict(shared=True, rank=[8] * 6)


def row(decoder: int, **changes) -> dict:
    """What the LORS paper's main config builds, 1x with 100 queries, but for these changes.

    ``decoder`` is its number of parameters, ``sampling`` is groups x points.
    """
    main = dict(backbone="r50", queries=100, schedule="1x", stages=6, sampling=(2, 64), lorsa=LORSA, lorst=LORST)
    return dict(main, decoder=decoder) | changes


def digits(decoder: int, **changes) -> dict:
    """What the digits configs build; their schedule is not one of COCO's and is not checked."""
    small = dict(backbone="r18", queries=20, schedule=None, stages=3, sampling=(2, 16))
    return row(decoder, **small, **changes)


TABLE = {
    PLAIN_DIGITS: digits(1_189_974, lorsa=None, lorst=None),
    LORS_DIGITS: digits(652_886, lorsa=dict(LORSA, rank=[8] * 3, groups=[1, 1, 2]), lorst=dict(LORST, rank=[8] * 3)),
    plain_path("r50", 100, "ms-480-800-3x"): row(
        110_272_296, schedule="ms-480-800-3x", sampling=(4, 32), lorsa=None, lorst=None
    ),
    plain_path("r101", 100, "ms-480-800-3x"): row(
        110_272_296, backbone="r101", schedule="ms-480-800-3x", sampling=(4, 32), lorsa=None, lorst=None
    ),
    plain_path("r50", 100, "2x64_1x"): row(135_536_424, lorsa=None, lorst=None),
    lors_path("r50", 100, "4x32_1x"): row(34_344_744, sampling=(4, 32)),
    ablation("table4_lorsa-only"): row(75_706_152, lorst=None),
    ablation("table4_lorst-only"): row(69_914_408, sampling=(4, 32), lorsa=None),
    ablation("table5_lorsa-shared-only"): row(32_018_216, lorsa=dict(LORSA, rank=[None] * 6, groups=[0] * 6)),
    ablation("table5_lorsa-private-only"): row(22_716_200, lorsa=dict(LORSA, shared=False)),
    ablation("table6_lorsa-rank-8_groups-111111"): row(32_455_976, lorsa=dict(LORSA, rank=[8] * 6, groups=[1] * 6)),
    ablation("table6_lorsa-rank-16_groups-111111"): row(33_683_240, lorsa=dict(LORSA, groups=[1] * 6)),
    ablation("table6_lorsa-rank-16_groups-222222"): row(35_348_264, lorsa=dict(LORSA, groups=[2] * 6)),
    ablation("table6_lorsa-rank-32_groups-111111"): row(38_506_280, lorsa=dict(LORSA, rank=[32] * 6, groups=[1] * 6)),
    ablation("table7_lorst-rank-2"): row(34_159_400, lorst=dict(LORST, rank=[2] * 6)),
    ablation("table7_lorst-rank-4"): row(34_555_688, lorst=dict(LORST, rank=[4] * 6)),
    ablation("table7_lorst-rank-16"): row(36_933_416, lorst=dict(LORST, rank=[16] * 6)),
    ablation("table7_lorst-rank-32"): row(40_103_720, lorst=dict(LORST, rank=[32] * 6)),
    **{
        ablation(f"table8_stages-{n}"): dict(
            row(decoder, lorsa=dict(LORSA, rank=[16] * n, groups=groups), lorst=dict(LORST, rank=[8] * n)), stages=n
        )
        for n, decoder, groups in [
            (3, 28_184_468, [1, 2, 3]),
            (9, 42_512_060, [1] * 3 + [2] * 3 + [3] * 3),
            (12, 49_675_856, [1] * 4 + [2] * 4 + [3] * 4),
        ]
    },
}
for backbone, queries, schedule, _, _ in ZOO:
    settings = dict(backbone=backbone, queries=queries, schedule=schedule)
    TABLE[plain_path(backbone, queries, schedule)] = dict(
        row(110_272_296, sampling=(4, 32), lorsa=None, lorst=None), **settings
    )
    TABLE[lors_path(backbone, queries, schedule)] = dict(row(35_348_264), **settings)

PAPER = {
    # Decoder parameters in millions, as the LORS paper's Tables 6, 7 and 8 give them.
    ablation("table6_lorsa-rank-8_groups-111111"): 32,
    ablation("table6_lorsa-rank-16_groups-111111"): 34,
    ablation("table6_lorsa-rank-16_groups-222222"): 35,
    LORS: 35,
    ablation("table6_lorsa-rank-32_groups-111111"): 38,
    ablation("table7_lorst-rank-2"): 34,
    ablation("table7_lorst-rank-4"): 34,
    ablation("table7_lorst-rank-16"): 37,
    ablation("table7_lorst-rank-32"): 40,
    ablation("table8_stages-3"): 28,
    ablation("table8_stages-9"): 42,
    ablation("table8_stages-12"): 50,
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@cache
def config(name: str) -> Config:
    """A config as a file gives it. Shared between tests: not to be changed."""
    return load_config(name)


@cache
def build(name: str) -> nn.Module:
    """The detector of a config, on the meta device. Shared between tests: not to be changed."""
    return build_on_meta(config(name).model)


def built(name: str) -> dict:
    """What a config really builds, read off the modules, in the table's terms."""
    model = build(name)
    backbone, decoder = model.backbone, model.decoder
    is_swin = type(backbone).__name__ == "SwinTransformer"
    depth = [len(stage.blocks) for stage in backbone.stages] if is_swin else backbone.depth
    lorsa, lorst = decoder.lorsa, decoder.lorst
    (sampling,) = {(s.sampling.num_groups, s.sampling.num_points) for s in decoder.stages}
    return dict(
        backbone=(type(backbone).__name__, depth),
        queries=model.query_generator.content.num_embeddings,
        max_per_img=decoder.max_per_img,
        stages=len(decoder.stages),
        sampling=sampling,
        lorsa=lorsa
        and dict(
            shared=lorsa.shared is not None,
            rank=[private and private.rank for private in lorsa.private],
            groups=[private.groups if private else 0 for private in lorsa.private],
        ),
        lorst=lorst and dict(shared=lorst.shared is not None, rank=[len(private.A) for private in lorst.private]),
        decoder=count(decoder),
    )


def test_the_table_has_every_config():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py")}
    assert {name for name in files if not name.startswith(ELSEWHERE)} == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_builds_what_the_table_says(name):
    expected = dict(TABLE[name], max_per_img=TABLE[name]["queries"], backbone=BACKBONES[TABLE[name]["backbone"]])
    del expected["schedule"]
    assert built(name) == expected


@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name]["schedule"]])
def test_trains_as_its_name_says(name):
    cfg, expected = config(name), SCHEDULES[TABLE[name]["schedule"]]
    warm_up, steps = cfg.param_scheduler
    assert warm_up.end == (1000 if TABLE[name]["backbone"] == "swin-s" else 500)
    assert cfg.train_cfg.max_epochs == expected["epochs"]
    rates = learning_rates([steps], 2.5e-5, expected["epochs"])[:-1]
    assert [i for i, rate in enumerate(rates) if i and rate < rates[i - 1]] == expected["steps"]
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert any(step.type == "RandomChoice" for step in pipeline) == expected["crop"]
    assert build_optim_wrapper(nn.Linear(1, 1), cfg.optim_wrapper).optimizer.defaults["lr"] == 2.5e-5


@pytest.mark.parametrize("name", TABLE)
def test_dumps_and_loads(name, tmp_path):
    config(name).dump(tmp_path / "dumped.py")
    assert Config.fromfile(tmp_path / "dumped.py").to_dict() == config(name).to_dict()


@pytest.mark.parametrize(("backbone", "queries", "schedule", "plain", "lors"), ZOO)
def test_parameters_of_the_zoo(backbone, queries, schedule, plain, lors):
    """The reference's counts, but for its 4 constant position values per query, where the design notes have them."""
    assert count(build(plain_path(backbone, queries, schedule))) == plain
    assert count(build(lors_path(backbone, queries, schedule))) == lors


@pytest.mark.parametrize(("backbone", "queries", "schedule"), [training[:3] for training in ZOO])
def test_a_pair_differs_by_lors_alone(backbone, queries, schedule):
    plain, lors = (config(path(backbone, queries, schedule)).to_dict() for path in (plain_path, lors_path))
    sizes = [
        [d["model"]["decoder"]["stage"].pop(field) for field in ("num_groups", "in_points")] for d in (plain, lors)
    ]
    assert sizes == [[4, 32], [2, 64]]
    assert lors["model"]["decoder"].pop("lors") is not None
    assert plain == lors


@pytest.mark.parametrize("name", PAPER)
def test_decoder_totals_of_the_papers_tables(name):
    """The paper's millions are the weight matrices alone, rounded: without biases and norms, which are 0.3 % of it."""
    matrices = sum(p.numel() for p in build(name).decoder.parameters() if p.dim() > 1)
    assert round(matrices / 1e6) == PAPER[name]


def test_x101_has_deformable_convolutions_in_its_last_three_stages():
    backbone = build(lors_path("x101-32x4d-dcn", 300, LONG)).backbone
    layers = [getattr(backbone, f"layer{i}") for i in (1, 2, 3, 4)]
    assert [hasattr(layer[0].conv2, "conv_offset") for layer in layers] == [False, True, True, True]
    assert backbone.groups == 32 and backbone.base_width == 4 and backbone.frozen_stages == 1 and backbone.norm_eval


@pytest.mark.parametrize("path", [plain_path, lors_path])
def test_swin_has_drop_path_and_decays_neither_norms_nor_position_biases(path):
    name = path("swin-s", 300, LONG)
    model = build(name)
    assert model.backbone.stages[-1].blocks[-1].attn.drop.drop_prob == pytest.approx(0.2)
    assert all(p.requires_grad for p in model.parameters())
    optimizer = build_optim_wrapper(model, config(name).optim_wrapper)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm) for p in m.parameters()}
    tables = {id(p) for key, p in model.named_parameters() if key.endswith("relative_position_bias_table")}
    assert len(tables) == 24 and len(norms) > 100
    for key, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if id(p) in norms | tables else 1e-4), key


@pytest.mark.parametrize("name", [PLAIN, LORS])
def test_other_backbones_decay_every_parameter(name):
    optimizer = build_optim_wrapper(build(name), config(name).optim_wrapper)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
