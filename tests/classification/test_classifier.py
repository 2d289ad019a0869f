"""The classifier's losses against values computed by hand, its predictions, and what it refuses."""

import pytest
import torch
from mmdet.registry import MODELS
from torch.nn import functional as F

from mmdet_lors.classification import TimmClassifier
from mmdet_lors.errors import UserError

NETWORK = dict(
    model_name="vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2
)
PREPROCESSOR = dict(type="ImgDataPreprocessor", mean=[127.5], std=[127.5])


def classifier(**fields) -> TimmClassifier:
    settings = dict(type="TimmClassifier", network=NETWORK, num_classes=10, data_preprocessor=PREPROCESSOR)
    return MODELS.build(dict(settings, **fields))


@pytest.fixture
def images():
    return torch.randn(4, 1, 16, 16)


@pytest.fixture
def labels():
    return torch.tensor([0, 3, 9, 3])


def test_loss_is_cross_entropy_to_smoothed_targets(images, labels):
    model = classifier(label_smoothing=0.1)
    targets = 0.9 * F.one_hot(labels, 10) + 0.1 / 10
    expected = -(targets * model(images).log_softmax(1)).sum(1).mean()
    assert model(images, labels, mode="loss")["loss"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_mixed_images_are_learned_with_mixed_targets(images, labels, monkeypatch):
    model = classifier(label_smoothing=0.1, mixup=dict(mixup_alpha=0.8))
    monkeypatch.setattr(model.mixup, "_params_per_batch", lambda: (0.7, False))
    mixed = 0.7 * images + 0.3 * images.flip(0)
    smoothed = 0.9 * F.one_hot(labels, 10) + 0.1 / 10
    targets = 0.7 * smoothed + 0.3 * smoothed.flip(0)
    expected = -(targets * model(mixed).log_softmax(1)).sum(1).mean()
    before = images.clone()
    assert model(images, labels, mode="loss")["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(images, before)


def test_erased_rectangles_are_noise_in_the_network_alone(images, labels):
    model = classifier(random_erasing=dict(probability=1.0, min_area=0.2, mode="pixel"))
    seen, before = [], images.clone()
    model.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images, labels, mode="loss")
    changed = (seen[0] != images).flatten(1).float().mean(1)
    assert torch.equal(images, before) and ((changed > 0.15) & (changed < 0.4)).all()  # of at most a third
    model.predict(images)
    assert torch.equal(seen[1], images)


def test_predictions_are_probabilities_beside_the_label(images, labels):
    model = classifier().eval()
    found = model(images, labels, mode="predict")
    scores = torch.stack([sample["scores"] for sample in found])
    torch.testing.assert_close(scores, model(images).softmax(1))
    assert [sample["label"] for sample in found] == [0, 3, 9, 3]
    assert model(images, mode="predict")[0]["label"] is None


def test_images_are_normalised_by_the_data_preprocessor():
    data = dict(inputs=torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), data_samples=torch.tensor([1, 2]))
    out = classifier().data_preprocessor(data, training=True)
    assert out["inputs"].flatten().tolist() == [-1.0, 1.0] and out["data_samples"].tolist() == [1, 2]


def test_loss_is_in_float32_under_autocast(images, labels):
    model = classifier(mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0), label_smoothing=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, labels, mode="loss")["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_init_weights_leaves_timms_initialisation_alone():
    model = classifier()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_other_architectures(labels):
    model = classifier(network=dict(model_name="resnet10t", in_chans=1))
    assert model(torch.randn(4, 1, 32, 32), labels, mode="loss")["loss"].isfinite()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(network=dict(model_name="deit_tinny")), "network.model_name 'deit_tinny' is not a model .* close to it"),
        (dict(network=dict(depth=3)), "network.model_name is missing; network has depth"),
        (dict(network=dict(NETWORK, embed_dim=17)), "network vit_tiny_patch16_224: "),
        (dict(mixup=dict(alpha=1.0)), "mixup: .*unexpected keyword argument 'alpha'"),
        (dict(random_erasing=dict(mode="grey")), "random_erasing: .*'mode': 'grey'"),
        (dict(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\), got 1.5"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        classifier(**fields)


def test_mixup_refuses_an_odd_batch(images, labels):
    model = classifier(mixup=dict(mixup_alpha=0.8))
    with pytest.raises(UserError, match="even number of images in every batch of a process, got 3"):
        model(images[:3], labels[:3], mode="loss")
