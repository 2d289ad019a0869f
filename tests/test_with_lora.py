"""WithLoRA: its equation, what is trained and kept, plain files and files of adapters, merging, wrong settings."""

import pickle
import sys
from copy import deepcopy
from pathlib import Path

import mmdet
import pytest
import torch
from conftest import LORS_DIGITS, PLAIN_DIGITS, ROOT, data_samples, load_config, refused
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from mmdet_lors.engine.checkpoint.reading import check_fit, read_checkpoint
from mmdet_lors.errors import UserError
from mmdet_lors.inference import Inferencer
from mmdet_lors.with_lora import merged, without_lora

LORA_DIGITS = "configs/lora/adamixer-lora_r18_digits.py"
ADAMIXER = ["backbone.layer?.*.conv?", "decoder.stages.*.ffn.*", "decoder.stages.*.cls_branch.*"]
MODELS_TO_ADAPT = {
    "plain": (lambda: load_config(PLAIN_DIGITS).model, ADAMIXER),
    "LORS": (lambda: load_config(LORS_DIGITS).model, ADAMIXER),
    "DINO": (
        lambda: load_config("configs/lors/other_detectors/dino_r18_digits.py").model,
        ["encoder.*proj", "encoder.*.ffn.*", "decoder.*.ffn.*", "bbox_head.cls_branches.*"],
    ),
    "RetinaNet": (
        lambda: load_mmdets("retinanet/retinanet_r18_fpn_1x_coco.py"),
        ["neck.*.conv", "bbox_head.*.conv", "bbox_head.retina_cls"],
    ),
    "classifier": (
        lambda: Config.fromfile(ROOT / "configs/classification/vit_digits.py").model,
        ["network.blocks.*"],
    ),
}
"""Models, and layers of theirs."""


class Net(BaseModule):
    """A convolution, a BatchNorm, two Linears and an attention; its ``init_weights()`` fills all Linears anew."""

    def __init__(self, classes: int = 3, fill: float = 0.0, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.conv, self.norm = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 6, 1, groups=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, classes)
        nn.init.constant_(self.head.weight, fill)

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, nn.Linear) and not self.init_cfg:
                nn.init.constant_(module.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(self.hidden(x + self.attention(x, x, x)[0]))


class Around(BaseModule):
    """A model with a backbone."""

    def __init__(self, backbone: dict) -> None:
        super().__init__()
        self.backbone, self.last = MODELS.build(backbone), nn.Linear(3, 2)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    for kind in (Net, Around):
        MODELS.register_module(f"TestWithLoRA{kind.__name__}", module=kind)
    yield
    for kind in (Net, Around):
        MODELS.module_dict.pop(f"TestWithLoRA{kind.__name__}")


def load_mmdets(name: str) -> ConfigDict:
    """The model of one of mmdet's own configs, without anything to download."""
    cfg = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / name).model
    cfg.backbone.init_cfg = None
    return cfg


def config(classes: int = 3, inner: dict | None = None, **settings) -> ConfigDict:
    net = dict(type="TestWithLoRANet", classes=classes, **inner or {})
    return ConfigDict(type="WithLoRA", model=net, **dict(targets=["conv", "hidden"], rank=2) | settings)


def randomised(model: nn.Module, std: float = 0.1) -> nn.Module:
    """With other values in all that is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model.eval()


def write(model: nn.Module, path: Path) -> str:
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)


@pytest.fixture
def base(tmp_path) -> tuple[str, Net]:
    """A file of the plain model, and the model."""
    net = Net()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    net.norm.running_mean.normal_()
    return write(net, tmp_path / "base.pth"), net.eval()


def test_a_layer_computes_the_papers_equation_and_starts_as_it_was(base):
    path, net = base
    model = MODELS.build(config(checkpoint=path, alpha=6)).double().eval()
    x, pixels = torch.randn(4, 6).double(), torch.randn(1, 3, 8, 8).double()
    net = net.double()
    assert torch.equal(model.hidden(x), net.hidden(x)) and torch.equal(model.conv(pixels), net.conv(pixels))
    assert list(model.hidden.lora_A.default.weight.shape) == [2, 6] and model.hidden.lora_A.default.weight.any()
    randomised(model)
    A, B = model.hidden.lora_A.default.weight, model.hidden.lora_B.default.weight
    W = net.hidden.weight + 6 / 2 * B @ A
    torch.testing.assert_close(model.hidden(x), x @ W.T + net.hidden.bias, rtol=0, atol=1e-12)


def test_what_is_frozen_stays_to_the_last_bit_in_training(base):
    path, net = base
    model = MODELS.build(config(checkpoint=path, train=["head.*"])).train()
    assert not model.norm.training and model.conv.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):  # B is zero at first, and A has no gradient
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    before, after = net.state_dict(), merged(model).state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k].float())}
    assert changed == {"conv.weight", "hidden.weight", "head.weight", "head.bias"}
    for name in ("conv", "hidden"):
        assert torch.equal(model.get_submodule(name).base_layer.weight, before[f"{name}.weight"])


def test_a_batch_norm_that_is_trained_is_kept_with_its_statistics(base):
    path, net = base
    model = MODELS.build(config(checkpoint=path, targets=[], train=["norm.*"])).train()
    model(torch.randn(2, 3, 8, 8))
    assert set(model.state_dict()) == {k for k in net.state_dict() if k.startswith("norm.")}
    assert not torch.equal(model.state_dict()["norm.running_mean"], net.norm.running_mean)


@torch.no_grad()
def test_files_of_adapters_are_exchanged_in_one_model(base, tmp_path):
    path, net = base
    x, files, expected = torch.randn(2, 3, 8, 8), [], []
    for i in range(2):
        model = randomised(MODELS.build(config(checkpoint=path)))
        files.append(write(model, tmp_path / f"{i}.pth"))
        expected.append(model(x))
    assert set(read_checkpoint(files[0])["state_dict"]) == {
        f"{layer}.lora_{half}.default.weight" for layer in ("conv", "hidden") for half in "AB"
    }
    model = MODELS.build(config(checkpoint=path)).eval()
    for file, output in zip(files, expected, strict=True):
        model.load_state_dict(read_checkpoint(file)["state_dict"])
        assert torch.equal(model(x), output)
    load_checkpoint(model, files[0], strict=True)  # mmengine's
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(model(x), expected[0]) and torch.equal(copied(x), expected[0])
    assert list(copied.state_dict()) == list(model.state_dict())
    check_fit(model, read_checkpoint(files[0]), files[0])
    with pytest.raises(UserError, match=r"base\.pth is of another architecture"):
        check_fit(model, read_checkpoint(path), path)


@torch.no_grad()
def test_without_a_checkpoint_files_are_whole_and_plain_ones_load(base, tmp_path):
    path, net = base
    x = torch.randn(2, 3, 8, 8)
    model = MODELS.build(config()).eval()
    check_fit(model, read_checkpoint(path), path)
    assert not load_checkpoint(model, path, strict=True).get("missing") and torch.equal(model(x), net(x))
    assert set(model.state_dict()) > set(net.state_dict())
    trained = write(randomised(model), tmp_path / "whole.pth")
    again = MODELS.build(config()).eval()
    check_fit(again, read_checkpoint(trained), trained)
    load_checkpoint(again, trained, strict=True)
    assert torch.equal(again(x), model(x)) and not torch.equal(model(x), net(x))


def test_init_weights_is_the_models_own_and_leaves_adapters_as_they_start(base):
    path, net = base
    pretrained = dict(init_cfg=dict(type="Pretrained", checkpoint=path))
    model = MODELS.build(dict(type="TestWithLoRAAround", backbone=config(inner=pretrained)))
    model.init_weights()
    assert torch.equal(model.backbone.hidden.base_layer.weight, net.hidden.weight)
    model = MODELS.build(config())
    model.init_weights()
    assert (model.hidden.base_layer.weight == 0.5).all() and not model.hidden.lora_B.default.weight.any()
    # What the file has stays; a head for more classes is the model's own, whatever it has before init_weights().
    model = MODELS.build(config(classes=4, inner=dict(fill=torch.nan), checkpoint=path, train=["head.*"]))
    model.init_weights()
    assert torch.equal(model.hidden.base_layer.weight, net.hidden.weight) and (model.head.weight == 0.5).all()
    copied = deepcopy(model)
    nn.init.zeros_(copied.head.weight)
    copied.init_weights()
    assert (copied.head.weight == 0.5).all()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS_TO_ADAPT)
def test_merged_models_give_equal_outputs(name, tmp_path):
    cfg, targets = MODELS_TO_ADAPT[name]
    plain = MODELS.build(cfg())
    plain.init_weights()
    lora = dict(type="WithLoRA", model=cfg(), targets=targets, rank=3, checkpoint=write(plain, tmp_path / "base.pth"))
    model = randomised(MODELS.build(lora), std=0.02)
    again = MODELS.build(without_lora(lora)).eval()
    again.load_state_dict({k: v.float() for k, v in merged(model).state_dict().items()})
    images = torch.randn(2, 1, 32, 32) if name == "classifier" else torch.randn(2, 3, 96, 128)
    ours, theirs, before = (outputs(m, images) for m in (model, again, plain.eval()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert max((a - b).abs().max() for a, b in zip(ours, before, strict=True)) > 1e-3


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What a model computes of images, without post-processing."""
    if hasattr(model, "decoder") and not hasattr(model, "bbox_head"):
        return [value for stage in model._forward(images) for value in (stage.cls_score, stage.bboxes)]
    samples = data_samples([0] * len(images), tuple(images.shape[2:]), 1)
    found = model(images, samples, mode="tensor")
    found = [found] if isinstance(found, Tensor) else found
    return [value for kind in found for value in ([kind] if isinstance(kind, Tensor) else kind)]


def scores(inferencer: Inferencer, image: Path) -> Tensor:
    [(_, sample)] = inferencer.stream([image])
    return sample.pred_instances.scores


def test_lors_trains_its_private_parts_with_the_shared_weight_frozen(tmp_path):
    cfg = load_config(LORS_DIGITS).model
    path = write(MODELS.build(cfg), tmp_path / "base.pth")
    model = MODELS.build(dict(type="WithLoRA", model=cfg, train=["decoder.lors?.private.*"], checkpoint=path))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("decoder.lors") and ".private." in n}
    assert set(model.state_dict()) == trained and not model.decoder.lorst.shared.requires_grad


def test_the_digits_adapters_are_below_two_per_cent(tmp_path):
    cfg = Config.fromfile(ROOT / LORA_DIGITS).model
    plain = MODELS.build(cfg.model)
    cfg.checkpoint = write(plain, tmp_path / "base.pth")
    model = MODELS.build(cfg)
    trained, all_of_them = (sum(v.numel() for v in m.state_dict().values()) for m in (model, plain))
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad) == 33_694
    assert trained / all_of_them < 0.02


@torch.no_grad()
@pytest.mark.parametrize("tool", ["fold_lors", "publish_model"])
def test_the_tools_fold_it_and_the_result_detects_the_same(tool, tmp_path, tiny_digits, call_tool):
    cfg = Config.fromfile(ROOT / LORA_DIGITS)
    cfg.model.checkpoint = write(MODELS.build(cfg.model.model), tmp_path / "base.pth")
    cfg.dump(tmp_path / "lora.py")
    adapters = write(randomised(MODELS.build(cfg.model), std=0.02), tmp_path / "adapters.pth")
    image = next((tiny_digits / "val").iterdir())
    expected = scores(Inferencer(tmp_path / "lora.py", adapters, "cpu"), image)
    out = tmp_path / "folded"
    if tool == "fold_lors":
        call_tool("deployment/fold_lors.py", tmp_path / "lora.py", adapters, f"{out}.pth")
        found = scores(Inferencer(f"{out}.py", f"{out}.pth", "cpu"), image)
    else:
        call_tool("model_converters/publish_model.py", tmp_path / "lora.py", adapters, out, "--fold")
        found = scores(Inferencer(out, device="cpu"), image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(targets=["hiden"]), r"targets\[0\] 'hiden' matches nothing; layers that can be adapted: conv, .*head"),
        (dict(targets="hidden"), "targets must be a list of names or patterns, got 'hidden'"),
        (dict(targets=["norm"]), r"targets\[0\] 'norm' matches nothing"),
        (dict(targets=["attention.*"]), r"attention\.out_proj cannot be adapted: nn\.MultiheadAttention reads its"),
        (dict(targets=["grouped"]), "grouped cannot be adapted: peft adapts no nn.Conv2d with groups"),
        (dict(train=["heads.*"]), r"train\[0\] 'heads\.\*' matches nothing; parameters: conv\.weight, .*\.\.\."),
        (dict(targets=[]), "trains nothing: targets and train are both empty"),
        (dict(rank=0), "rank must be an integer of 1 or more, got 0"),
        (dict(rank=2.5), "rank must be an integer of 1 or more, got 2.5"),
        (dict(alpha=-1), "alpha must be above 0, got -1"),
        (dict(checkpoint="none.pth"), "checkpoint none.pth does not exist"),
        (
            dict(classes=4, checkpoint="{base}"),
            r"base\.pth is of another architecture: .*head\.weight \(3, 5\) instead",
        ),
    ],
)
def test_a_wrong_setting_is_named(settings, message, base):
    settings = {k: v.format(base=base[0]) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(UserError, match=message) as error:
        MODELS.build(config(**settings))
    assert "\n" not in str(error.value)


def test_layers_that_share_a_weight_and_computed_weights_are_refused():
    class Tied(Net):
        def __init__(self, **settings) -> None:
            super().__init__(**settings)
            self.twin = nn.Linear(6, 5)
            self.twin.weight = self.hidden.weight

    MODELS.register_module("TestWithLoRATied", module=Tied)
    try:
        with pytest.raises(UserError, match=r"hidden cannot be adapted: its weight has several names, hidden\.weight"):
            MODELS.build(dict(config(), model=dict(type="TestWithLoRATied")))
    finally:
        MODELS.module_dict.pop("TestWithLoRATied")
    adamixer = load_config(PLAIN_DIGITS).model
    with pytest.raises(UserError, match=r"parameter_generator cannot be adapted: AdaptiveWeights does more than x W"):
        MODELS.build(dict(type="WithLoRA", model=adamixer, targets=["decoder.*.parameter_generator"]))


def test_peft_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"WithLoRA needs peft: pip install -e \.\[lora\]"):
        MODELS.build(config())


def test_train_names_the_target_that_matches_nothing(tiny_digits, work, monkeypatch, capsys):
    options = ["--cfg-options", "model.targets=[decoder.stage.*]", "model.checkpoint=none.pth"]
    options += [f"{split}_dataloader.dataset.data_root={tiny_digits}/" for split in ("train", "val", "test")]
    options += [f"{split}_evaluator.ann_file={tiny_digits}/annotations/val.json" for split in ("val", "test")]
    message = refused("train.py", [str(ROOT / LORA_DIGITS), *work, *options], monkeypatch, capsys)
    assert "targets[0] 'decoder.stage.*' matches nothing" in message
