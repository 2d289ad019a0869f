"""Trained weights for some parts of a model: copied where they are named, plain or with LORST, and refused by name."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from safetensors.torch import save_file
from test_classifier import NETWORK, PREPROCESSOR, classifier

from mmdet_lors.classification.pretrained import read_weights
from mmdet_lors.datasets.checks import check_inputs
from mmdet_lors.errors import UserError
from mmdet_lors.lors import fold_stack

ATTENTION, FFN = ["norm1", "attn"], ["norm2", "mlp"]


@pytest.fixture
def trained():
    """A network with other weights, norms included, than a new one."""
    network = classifier().network
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture
def checkpoint(trained, tmp_path):
    """Its weights in a file of DeiT's format."""
    torch.save(dict(model=trained.state_dict()), tmp_path / "deit.pth")
    return str(tmp_path / "deit.pth")


def init_cfg(checkpoint: str, parts: list[str]) -> dict:
    return dict(type="PretrainedParts", checkpoint=checkpoint, parts=parts)


@pytest.mark.parametrize("parts", [ATTENTION, FFN, ATTENTION + FFN])
def test_copies_the_named_parts_alone(parts, trained, checkpoint):
    model = classifier(init_cfg=init_cfg(checkpoint, parts))
    before = {name: weight.clone() for name, weight in model.network.state_dict().items()}
    model.init_weights()
    for name, weight in model.network.state_dict().items():
        copied = bool(set(name.split(".")) & set(parts))
        assert torch.equal(weight, trained.state_dict()[name] if copied else before[name]), name


def test_formats(trained, checkpoint, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "plain.pth")
    torch.save(dict(state_dict={f"network.{k}": v for k, v in trained.state_dict().items()}), tmp_path / "ours.pth")
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    for name in ("plain.pth", "ours.pth", "model.safetensors", "deit.pth"):
        found = read_weights(str(tmp_path / name))
        assert all(torch.equal(found[key], weight) for key, weight in trained.state_dict().items())


@pytest.mark.parametrize("init", ["first", "trained"])
def test_lorst_starts_from_the_loaded_weights(init, trained, checkpoint):
    """At full rank 'trained' is the plain model; 'first' is its first layer in all layers."""
    inner = dict(type="TimmClassifier", network=NETWORK, num_classes=10, data_preprocessor=PREPROCESSOR)
    inner["init_cfg"] = init_cfg(checkpoint, ATTENTION + FFN)
    stack = dict(layers="network.blocks", targets=["attn.*", "mlp.*"], rank=16, groups=1, init=init)
    model = MODELS.build(dict(type="WithLORS", model=inner, stacks=[stack]))
    model.init_weights()
    fold_stack(model.network.blocks)
    for i, block in enumerate(model.network.blocks):
        source = trained.blocks[i if init == "trained" else 0]
        torch.testing.assert_close(block.mlp.fc1.weight, source.mlp.fc1.weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(block.attn.qkv.bias, trained.blocks[i].attn.qkv.bias)


def test_refuses_weights_that_do_not_fit(trained, checkpoint, tmp_path):
    state = trained.state_dict()
    for change, parts, message in (
        ({}, ["atn"], "parts has 'atn', which no weight's name of VisionTransformer has"),
        ({"blocks.1.attn.qkv.weight": None}, ATTENTION, "has no blocks.1.attn.qkv.weight"),
        ({"blocks.1.mlp.fc1.bias": torch.zeros(3)}, FFN, r"blocks.1.mlp.fc1.bias of shape \(3,\) instead of \(64,\)"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(UserError, match=message):
            classifier(init_cfg=init_cfg(str(tmp_path / "changed.pth"), parts)).init_weights()


def test_a_missing_file_is_refused_before_a_run_starts():
    cfg = Config(dict(model=dict(type="WithLORS", model=dict(init_cfg=init_cfg("none.pth", ATTENTION)))))
    with pytest.raises(UserError, match="model.model.init_cfg.checkpoint: file none.pth does not exist"):
        check_inputs(cfg, ("train",))
    check_inputs(cfg, ("test",))


def test_a_download_that_fails_is_one_line():
    with pytest.raises(
        UserError, match="^init_cfg.checkpoint timm://none.* cannot be loaded: .*; a file on disk works"
    ):
        read_weights("timm://none")
