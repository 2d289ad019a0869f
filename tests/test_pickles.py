"""Every kind of model that this package builds can be copied, saved whole or as a state dict, sent to a process."""

import copy
import io
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import LORS_DIGITS, ROOT, load_config, random_lors
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor, nn

from mmdet_lors.lors import share_stack
from mmdet_lors.lors.serving import serve
from mmdet_lors.pela import LowRankLinear, compress


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def of_config(name: str) -> nn.Module:
    cfg = Config.fromfile(ROOT / "configs" / name).model
    inner = cfg.get("model", cfg)
    if "backbone" in inner:
        inner.backbone.init_cfg = None
    return randomised(MODELS.build(cfg))


def distiller(folder: Path) -> nn.Module:
    """With its teacher."""
    cfg = Config.fromfile(ROOT / "configs/pela/pela-distiller_vit_digits.py").model
    torch.save(dict(state_dict=MODELS.build(cfg.teacher).state_dict()), folder / "teacher.pth")
    cfg.teacher_checkpoint = str(folder / "teacher.pth")
    model = MODELS.build(cfg)
    model.init_weights()
    return model.eval()


def with_lora() -> nn.Module:
    """Without a checkpoint, so that its state dict is whole."""
    cfg = Config.fromfile(ROOT / "configs/lora/adamixer-lora_r18_digits.py").model
    return randomised(MODELS.build(dict(cfg, checkpoint=None)))


def stack() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    share_stack(model.layers, ["self_attn.*", "linear?"], rank=2, groups=[1, 0, 2])
    return randomised(model)


def adaptive_stack() -> nn.Module:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 3)
    share_stack(model.layers, "linear?", rank=2, groups=[1, 0, 2], kind="adaptive")
    return randomised(model)


MODELS_TO_BUILD = {
    "AdaMixer with LORS": lambda folder: random_lors(load_config(LORS_DIGITS).model),
    "AdaMixer with LORS, served": lambda folder: serve(random_lors(load_config(LORS_DIGITS).model)),
    "DINO WithLORS": lambda folder: of_config("lors/other_detectors/dino-lors_r18_digits.py"),
    "AdaMixer on a compressed Swin": lambda folder: of_config("pela/adamixer-lors_pela-swin_digits.py"),
    "AdaMixer with LoRA": lambda folder: with_lora(),
    "distiller": distiller,
    "classifier": lambda folder: distiller(folder).student,
    "shared nn.TransformerEncoder": lambda folder: stack(),
    "adaptive nn.TransformerDecoder": lambda folder: adaptive_stack(),
    "compressed nn.TransformerEncoder": lambda folder: compress(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), 1.2, omit=()
    )[0].eval(),
}


@cache
def built(name: str, folder: Path) -> nn.Module:
    torch.manual_seed(2)
    return MODELS_TO_BUILD[name](folder)


def values(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    items = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else []
    return [v for item in items for v in values(item)]


@torch.no_grad()
def outputs(name: str, model: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)
    if "Encoder" in name:
        return [model(torch.randn(2, 5, 16))]
    if "Decoder" in name:
        return [model(torch.randn(2, 5, 16), torch.randn(2, 3, 16))]
    if name in ("distiller", "classifier"):
        return values(model(torch.randn(2, 1, 32, 32), mode="tensor"))
    if "DINO" in name:
        return values(model.backbone(torch.randn(1, 3, 64, 64))) + [p for n, p in model.named_parameters()]
    return values(model._forward(torch.randn(1, 3, 64, 64)))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def through_torch(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
    "a copy of a copy": lambda model: through_torch(copy.deepcopy(model)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", MODELS_TO_BUILD)
def test_a_copy_is_equal_and_its_own(name, how, folder):
    model = built(name, folder)
    expected, copied = outputs(name, model), COPIES[how](model)
    assert type(copied) is type(model) and [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    assert list(copied.state_dict()) == list(model.state_dict()) and same(outputs(name, copied), expected)
    # As many parameters: what was shared is one still; and none of the original's memory.
    ours, theirs = list(copied.parameters()), list(model.parameters())
    assert len(ours) == len(theirs) and not {p.data_ptr() for p in ours} & {p.data_ptr() for p in theirs}
    with torch.no_grad():
        for parameter in ours:
            parameter.add_(0.1)
    assert same(outputs(name, model), expected) and not same(outputs(name, copied), expected)
    copied.load_state_dict(model.state_dict())
    assert same(outputs(name, copied), expected)


@pytest.mark.parametrize("name", ["AdaMixer with LORS", "DINO WithLORS", "AdaMixer on a compressed Swin", "distiller"])
@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_a_copys_init_weights_is_its_own(name, how, folder):
    model = built(name, folder)
    before, copied = copy.deepcopy(model.state_dict()), COPIES[how](model)
    copied.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # The distiller starts from its teacher again, and who was initialised is not initialised once more.
    changed = any(not torch.equal(value, before[key]) for key, value in copied.state_dict().items())
    assert changed == (name not in ("AdaMixer with LORS", "distiller"))


def receive(models: dict[str, nn.Module], out: Path) -> None:
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=True)
    torch.save({name: [t.clone() for t in outputs(name, model)] for name, model in models.items()}, out)


def test_a_spawned_process_gets_them(folder, tmp_path):
    models = {name: copy.deepcopy(built(name, folder)) for name in MODELS_TO_BUILD}
    process = mp.get_context("spawn").Process(target=receive, args=(models, tmp_path / "outputs.pt"))
    process.start()
    process.join()
    assert process.exitcode == 0
    for name, found in torch.load(tmp_path / "outputs.pt").items():
        expected = outputs(name, models[name])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True)), name


def test_weights_are_loaded_without_code(folder):
    """A state dict is tensors alone, also one of weights that are computed."""
    for name in MODELS_TO_BUILD:
        model = built(name, folder)
        torch.save(model.state_dict(), file := io.BytesIO())
        file.seek(0)
        assert list(torch.load(file, weights_only=True)) == list(model.state_dict())
    layer = next(m for m in built("compressed nn.TransformerEncoder", folder).modules() if isinstance(m, LowRankLinear))
    torch.save(layer.weight.detach(), file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), layer.weight)
