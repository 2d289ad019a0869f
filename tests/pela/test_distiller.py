"""Intermediate pre-training: what is trained, frozen, saved and refused; and the student's way out."""

import copy
import os
import sys

import pytest
import torch
import torch.multiprocessing as mp
from conftest import free_port, load_tool
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.dataset import DefaultSampler
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from mmdet_lors.engine.build import build_without_weights
from mmdet_lors.engine.launch import run
from mmdet_lors.errors import UserError
from mmdet_lors.pela import LowRankLinear, PELADistiller, compress

NETWORK = dict(
    model_name="vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, in_chans=1, drop_path_rate=0.5
)
TEACHER = dict(
    type="TimmClassifier",
    network=NETWORK,
    num_classes=4,
    data_preprocessor=dict(type="ImgDataPreprocessor", mean=[10.0], std=[2.0]),
)
IMAGES, LABELS = torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 2, 3])


@pytest.fixture
def teacher_file(tmp_path) -> str:
    torch.manual_seed(1)
    teacher = MODELS.build(TEACHER)
    torch.save(dict(state_dict=teacher.state_dict()), tmp_path / "teacher.pth")
    return str(tmp_path / "teacher.pth")


def config(teacher_file: str, **changes) -> dict:
    settings = dict(
        type="PELADistiller",
        teacher=TEACHER,
        teacher_checkpoint=teacher_file,
        ratio=2,
        feature_loss=dict(type="FeatureDistillationLoss", loss_weight=2.0),
        perturbation_loss=dict(type="WeightPerturbationLoss", loss_weight=3.0, eps=0.01),
    )
    return dict(settings, **changes)


def distiller(teacher_file: str, **changes) -> PELADistiller:
    model = MODELS.build(config(teacher_file, **changes))
    model.init_weights()
    return model


def test_the_student_starts_as_the_factorised_teacher(teacher_file):
    model = distiller(teacher_file)
    expected, _ = compress(model.teacher.network, 2)
    ours = model.student.network.state_dict()
    assert ours.keys() == expected.state_dict().keys()
    assert all(torch.equal(value, ours[key]) for key, value in expected.state_dict().items())


def test_the_teacher_is_frozen_unseen_and_moves_along(teacher_file):
    model = distiller(teacher_file)
    assert all(key.startswith("student.network.") for key in model.state_dict())
    mine = {id(p) for p in model.parameters()}
    assert not any(id(p) in mine or p.requires_grad for p in model.teacher.parameters())
    assert not model.train().teacher.training and model.student.training
    assert {p.dtype for p in model.double().teacher.parameters()} == {torch.float64}
    copied = copy.deepcopy(model)
    assert (
        copied.teacher is not model.teacher and copied.teacher.network.blocks[0].attn.qkv.weight.dtype == torch.float64
    )


def test_losses_are_the_sum_of_the_papers_equation_7(teacher_file):
    model = distiller(teacher_file).eval()
    losses = model(IMAGES, LABELS, mode="loss")
    student, teacher = model.student.network, model.teacher.network
    feature = []
    s, t = ((n.pos_drop(n._pos_embed(n.patch_embed(IMAGES)))) for n in (student, teacher))
    for ours, theirs in zip(student.blocks, teacher.blocks, strict=True):
        s, t = ours(s), theirs(t)
        feature.append((s - t).square().mean())
    perturbation = [
        ((layer.weight - teacher.get_submodule(name).weight).abs().max() - 0.01).square()
        for name, layer in student.named_modules()
        if isinstance(layer, LowRankLinear)
    ]
    assert len(feature) == 2 and len(perturbation) == 8
    assert losses.keys() == {"loss", "loss_feature", "loss_perturbation"}
    assert torch.allclose(losses["loss"], model.student(IMAGES, LABELS, mode="loss")["loss"])
    assert torch.allclose(losses["loss_feature"], 2 * sum(feature) / 2)
    assert torch.allclose(losses["loss_perturbation"], 3 * sum(perturbation) / 8)


def test_each_loss_can_be_left_out(teacher_file):
    assert distiller(teacher_file, feature_loss=None)(IMAGES, LABELS, mode="loss").keys() == {
        "loss",
        "loss_perturbation",
    }
    assert distiller(teacher_file, perturbation_loss=None)(IMAGES, LABELS, mode="loss").keys() == {
        "loss",
        "loss_feature",
    }


def test_the_teacher_sees_the_mixed_images(teacher_file):
    """At full rank a student equals its teacher, unless they look at different images."""
    teacher = dict(TEACHER, mixup=dict(mixup_alpha=0.8), network=dict(NETWORK, drop_path_rate=0.0))
    model = distiller(teacher_file, teacher=teacher, perturbation_loss=None)
    model.student.network.load_state_dict(model.teacher.network.state_dict())
    for layer in model.student.network.modules():
        if isinstance(layer, LowRankLinear):
            torch.nn.init.zeros_(layer.U)
    for layer in model.teacher.network.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.zeros_(layer.weight)
    assert model(IMAGES, LABELS, mode="loss")["loss_feature"].item() == 0


def test_predicts_as_its_student_and_shares_its_preprocessor(teacher_file):
    model = distiller(teacher_file).eval()
    assert model.data_preprocessor is model.student.data_preprocessor
    batch = dict(inputs=list(torch.randint(255, (4, 1, 32, 32), dtype=torch.uint8)), data_samples=LABELS)
    ours = model.val_step(batch)
    theirs = model.student.val_step(batch)
    assert all(torch.equal(a["scores"], b["scores"]) for a, b in zip(ours, theirs, strict=True))


def test_steps_move_every_weight_and_bring_the_student_nearer(teacher_file):
    feature_loss = dict(type="FeatureDistillationLoss", loss_weight=100.0)
    model = distiller(teacher_file, student=dict(network=dict(drop_path_rate=0.0)), feature_loss=feature_loss)
    for layer in model.student.modules():
        if isinstance(layer, LowRankLinear):
            layer.reset_parameters()
    assert model.student.network.blocks[1].drop_path1.__class__ is torch.nn.Identity
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), 1e-3))
    batch = dict(inputs=list(IMAGES * 2 + 10), data_samples=LABELS)
    first, *_, last = [model.train_step(batch, optimizer)["loss_feature"].item() for _ in range(10)]
    assert last < first
    assert all(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(frozen[key], value) for key, value in model.teacher.state_dict().items())


def test_autocast(teacher_file):
    model = distiller(teacher_file, student=dict(network=dict(drop_path_rate=0.0)))
    exact = model(IMAGES, LABELS, mode="loss")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(IMAGES, LABELS, mode="loss")
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert torch.equal(losses["loss_perturbation"], exact["loss_perturbation"])
    assert torch.allclose(losses["loss_feature"], exact["loss_feature"], rtol=0.1)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def worker(rank: int, port: int, teacher_file: str, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=True)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    images, labels = torch.load(out)
    # The Runner wraps first and initialises then.
    model = MMDistributedDataParallel(
        MODELS.build(config(teacher_file)), broadcast_buffers=False, find_unused_parameters=False
    )
    model.module.init_weights()
    model.eval()
    for _ in range(2):
        model.zero_grad()
        half = slice(2 * rank, 2 * rank + 2)
        sum(model(images[half], labels[half], mode="loss").values()).backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.module.named_parameters()}, out)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_at_the_same_global_batch(teacher_file, tmp_path):
    out = tmp_path / "exchange.pt"
    torch.save((IMAGES, LABELS), out)
    mp.spawn(worker, args=(free_port(), teacher_file, str(out)), nprocs=2)
    model = distiller(teacher_file).eval()
    sum(model(IMAGES, LABELS, mode="loss").values()).backward()
    for key, grad in torch.load(out).items():
        assert torch.allclose(model.get_parameter(key).grad, grad, rtol=1e-4, atol=1e-6), key


def runner(teacher_file: str, work_dir, **settings) -> Runner:
    data = [dict(inputs=(image * 2 + 10), data_samples=label) for image, label in zip(IMAGES, LABELS, strict=True)]
    return Runner(
        model=config(teacher_file),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=data,
            batch_size=2,
            sampler=dict(type=DefaultSampler, shuffle=False),
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=settings.pop("max_epochs")),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-3)),
        default_hooks=dict(logger=None),
        default_scope="mmdet",
        experiment_name=f"distil-{len(settings)}-{work_dir.parent.name}",
        **settings,
    )


def test_runner_trains_saves_the_student_alone_resumes_and_the_student_comes_out(
    teacher_file, tmp_path, monkeypatch, capsys
):
    work_dir = tmp_path / "run"
    runner(teacher_file, work_dir, max_epochs=1).train()
    first = torch.load(work_dir / "epoch_1.pth")["state_dict"]
    assert all(key.startswith("student.network.") for key in first)

    resumed = runner(teacher_file, work_dir, max_epochs=2, resume=True)
    resumed.train()
    assert resumed.epoch == 2 and resumed.model.teacher is not None
    key = "student.network.blocks.0.mlp.fc1.U"
    assert not torch.equal(resumed.model.state_dict()[key], first[key])

    tool = load_tool("model_converters/extract_student.py")
    monkeypatch.setattr(sys, "argv", ["extract_student.py", str(work_dir / "epoch_2.pth"), str(tmp_path / "out.pth")])
    tool.main()
    assert f"wrote {tmp_path / 'out.pth'}: 40 weights" in capsys.readouterr().out
    classifier = MODELS.build(dict(type="PELAModel", model=TEACHER, ratio=2))
    classifier.load_state_dict(torch.load(tmp_path / "out.pth")["state_dict"])
    with torch.no_grad():
        assert torch.equal(classifier.eval()(IMAGES), resumed.model.eval()(IMAGES))


def test_a_config_is_checked_without_the_teachers_file():
    model = build_without_weights(config("nowhere.pth"))
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) == 8
    with pytest.raises(UserError, match=r"the teacher has no weights yet: call init_weights\(\) first"):
        model.teacher  # noqa: B018


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher_checkpoint="nowhere.pth"), "checkpoint nowhere.pth does not exist"),
        (dict(teacher=dict(TEACHER, num_classes=5)), r"is of another architecture: .*head.weight \(4, 16\) instead of"),
        (dict(student=dict(network=dict(depth=1))), "the student has 1 blocks, the teacher 2: model.student must not"),
        (dict(student=dict(network=dict(embed_dim=24))), "the student cannot start from the teacher's weights: size"),
        (dict(blocks="stage"), "model.blocks 'stage' matches no module; the model has blocks"),
        (dict(ratio=60), "TimmClassifier cannot be compressed: ratio 60 leaves network.blocks.0"),
    ],
)
def test_refuses(teacher_file, changes, message):
    with pytest.raises(UserError, match=message):
        distiller(teacher_file, **changes)


@pytest.mark.parametrize(
    ("weights", "arguments", "message"),
    [
        ({"backbone.weight": torch.zeros(1)}, [], "holds no student: it is not a checkpoint of a PELA"),
        ({"student.network.blocks.0.attn.qkv.U": torch.zeros(1)}, ["--mmdet-swin"], "is not a Swin of timm"),
        (
            {
                "student.network.patch_embed.proj.weight": torch.zeros(1),
                "student.network.layers.0.blocks.0.attn.qkv.U": torch.zeros(1),
                "student.network.layers.1.downsample.reduction.U": torch.zeros(1),
            },
            ["--mmdet-swin"],
            "the student's downsample layers are compressed; 'downsample' must be in omit",
        ),
        (None, [], "does not exist"),
    ],
)
def test_extracting_refuses_with_one_line_and_writes_nothing(tmp_path, monkeypatch, weights, arguments, message):
    if weights is not None:
        torch.save(dict(state_dict=weights), tmp_path / "in.pth")
    out = tmp_path / "out.pth"
    monkeypatch.setattr(sys, "argv", ["extract_student.py", str(tmp_path / "in.pth"), str(out), *arguments])
    with pytest.raises(SystemExit, match=message):
        run(load_tool("model_converters/extract_student.py").main)
    assert not out.exists()
