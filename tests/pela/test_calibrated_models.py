"""Compressed models that are fitted to their outputs when they load plain weights, from a config's data."""

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import Tensor, nn

from mmdet_lors.errors import UserError
from mmdet_lors.pela import LowRankConv2d, compress, second_moments
from mmdet_lors.pela.compressed import calibration_batches
from mmdet_lors.pela.low_rank import LowRank

VIT = Config.fromfile(ROOT / "configs/classification/vit_digits.py")
RESNET = dict(type="ResNet", depth=18, in_channels=1, base_channels=8, stem_channels=8)
OMIT = ["stem"]


@pytest.fixture
def data() -> dict:
    return dict(dataset=VIT.val_dataloader.dataset, images=20)


@pytest.fixture
def preprocessor() -> dict:
    return VIT.model.data_preprocessor


@pytest.fixture
def weights(tmp_path) -> str:
    torch.manual_seed(0)
    torch.save(MODELS.build(RESNET).state_dict(), tmp_path / "plain.pth")
    return str(tmp_path / "plain.pth")


def expected(path: str, settings: dict) -> nn.Module:
    """What compress makes of the file's weights and the same images."""
    plain = MODELS.build(RESNET)
    plain.load_state_dict(torch.load(path))
    moments = second_moments(plain, calibration_batches(settings, plain), OMIT, True)
    return compress(plain, 3, OMIT, calibration=moments, convolutions=True)[0]


def outputs(model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    model.eval()  # mmdet's returns nothing
    with torch.no_grad():
        return model(torch.randn(2, 1, 64, 64))[-1]


@pytest.mark.parametrize("how", ["init_cfg", "load_state_dict"])
def test_a_backbone_is_fitted_wherever_it_loads_plain_weights(how, weights, data, preprocessor):
    settings = dict(data, data_preprocessor=preprocessor)
    config = dict(type="PELABackbone", backbone=RESNET, ratio=3, omit=OMIT, convolutions=True, calibration=settings)
    if how == "init_cfg":
        config["init_cfg"] = dict(type="Pretrained", checkpoint=weights)
    backbone = MODELS.build(config)
    assert isinstance(backbone.layer1[0].conv1, LowRankConv2d) and isinstance(backbone.conv1, LowRankConv2d)
    if how == "init_cfg":
        backbone.init_weights()
    else:
        backbone.load_state_dict(torch.load(weights))
    fitted = expected(weights, settings)
    assert torch.equal(outputs(backbone), outputs(fitted))
    # A file of the compressed model is taken as it is.
    again = MODELS.build(dict(config, init_cfg=None))
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(outputs(again), outputs(fitted))


def test_inside_a_detector(weights, data, preprocessor):
    settings = dict(data, data_preprocessor=preprocessor)
    config = dict(type="PELABackbone", backbone=RESNET, ratio=3, omit=OMIT, convolutions=True, calibration=settings)
    whole = nn.Sequential(nn.Linear(2, 2), MODELS.build(config))
    whole.load_state_dict({f"1.{key}": value for key, value in torch.load(weights).items()}, strict=False)
    assert torch.equal(outputs(whole[1]), outputs(expected(weights, settings)))


def test_a_classifier_and_its_distiller(tmp_path, data):
    teacher = dict(VIT.model)
    torch.manual_seed(0)
    plain = MODELS.build(teacher)
    path = str(tmp_path / "teacher.pth")
    torch.save(dict(state_dict=plain.state_dict()), path)
    fitted, report = compress(plain, 4, calibration=calibration_batches(data, plain))
    assert all(layer.output_error < 1 for layer in report)
    ours = MODELS.build(dict(type="PELAModel", model=teacher, ratio=4, calibration=data))
    ours.load_state_dict(plain.state_dict())
    distiller = MODELS.build(
        dict(type="PELADistiller", teacher=teacher, teacher_checkpoint=path, ratio=4, calibration=data)
    )
    distiller.init_weights()
    images = torch.randn(2, 1, 32, 32)
    found = [model.eval().network(images) for model in (fitted, ours, distiller.student)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    # And not what the weights alone would give.
    assert not torch.allclose(found[0], compress(plain, 4)[0].eval().network(images), atol=1e-4)


def test_distils_convolutions(tmp_path):
    network = dict(model_name="resnet10t", in_chans=1)
    teacher = dict(
        type="TimmClassifier", network=network, num_classes=4, data_preprocessor=dict(type="ImgDataPreprocessor")
    )
    torch.save(dict(state_dict=MODELS.build(teacher).state_dict()), tmp_path / "teacher.pth")
    losses = {
        f"{name}_loss": dict(type=kind)
        for name, kind in (("feature", "FeatureDistillationLoss"), ("perturbation", "WeightPerturbationLoss"))
    }
    model = MODELS.build(
        dict(
            type="PELADistiller",
            teacher=teacher,
            teacher_checkpoint=str(tmp_path / "teacher.pth"),
            ratio=2,
            blocks=r"layer\d\.\d",
            convolutions=True,
            **losses,
        )
    )
    model.init_weights()
    found = model(torch.randn(2, 1, 32, 32), torch.tensor([0, 1]), mode="loss")
    pairs = [(model.teacher.network.get_submodule(name), layer) for name, layer in model.student.network.named_modules()
             if isinstance(layer, LowRank)]  # fmt: skip
    assert len(pairs) > 10
    worst = [(layer.weight - plain.weight).abs().max().square() for plain, layer in pairs]
    assert torch.allclose(found["loss_perturbation"], sum(worst) / len(worst)) and found["loss_feature"] > 0
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(calibration=[1]), "calibration must be a dict with a dataset"),
        (dict(calibration=dict(images=3)), "calibration must be a dict with a dataset"),
        (dict(image=3), "calibration has no field 'image'; its fields are dataset, images, batch_size"),
        (dict(images=0), "calibration.images must be 1 or more, got 0"),
    ],
)
def test_refuses_settings(changes, message, data):
    calibration = changes.get("calibration", dict(data, **changes))
    with pytest.raises(UserError, match=message):
        MODELS.build(dict(type="PELABackbone", backbone=RESNET, ratio=3, convolutions=True, calibration=calibration))


def test_refuses_data(weights, data):
    backbone = dict(type="PELABackbone", backbone=RESNET, ratio=3, omit=OMIT, convolutions=True)
    with pytest.raises(UserError, match="calibration.data_preprocessor is missing"):
        MODELS.build(dict(backbone, calibration=data)).load_state_dict(torch.load(weights))
    broken = dict(type="ImgDataPreprocessor", mean=[float("inf")], std=[1.0])
    with pytest.raises(UserError, match="calibration: what goes into conv1 is not finite"):
        MODELS.build(dict(backbone, calibration=dict(data, data_preprocessor=broken))).load_state_dict(
            torch.load(weights)
        )
