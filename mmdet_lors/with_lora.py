"""Adds LoRA to any registered model, from its config, and merges it again."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet_lors.engine.checkpoint.reading import check_fit
from mmdet_lors.engine.new_style import type_name
from mmdet_lors.errors import UserError
from mmdet_lors.pela.choice import why_whole

NAME = "WithLoRA"


@MODELS.register_module(NAME)
def with_lora(
    model: dict,
    targets: Sequence[str] = (),
    rank: int = 8,
    alpha: float | None = None,
    train: Sequence[str] = (),
    checkpoint: str | None = None,
) -> nn.Module:
    r"""Build a model, freeze it, and add adapters of low rank to the layers that ``targets`` names.

    .. math:: h = W_0 x + \frac{\alpha}{r} B A x

    :math:`W_0` (out, in) is the frozen weight of an ``nn.Linear``; :math:`A` (r, in) starts Kaiming-uniform and
    :math:`B` (out, r) zero, so that training starts from the frozen model. Of an ``nn.Conv2d``, A has its kernel and B
    is 1 x 1. Source: Hu et al., LoRA (arXiv 2106.09685), equation 3; peft makes the layers.

    The model itself is returned, its layers replaced. Frozen BatchNorms keep their statistics in training as well.
    With ``checkpoint``, checkpoints hold what is trained alone, and the rest comes from that file wherever the model is
    built. Without it they hold everything, and the model also loads a file of the plain one (``init_cfg``,
    ``load_from``).

    Args:
        model: config of any registered model.
        targets: names of layers, or patterns such as ``decoder.stages.*.ffn.*``.
        rank: r.
        alpha: the adapters are multiplied by alpha / rank; None for alpha = rank.
        train: names or patterns of the model's own parameters that are trained too, such as a head for new classes or
            LORS's private parts, ``decoder.lorst.private.*``.
        checkpoint: file or address of the plain model's weights. A parameter in ``train`` that the file does not have,
            or has in another shape, starts anew.

    Raises:
        UserError: names the setting, and what is wrong with it; or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"{NAME} needs peft: pip install -e .[lora]") from error
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UserError(f"{NAME}.rank must be an integer of 1 or more, got {rank!r}")
    if alpha is not None and not alpha > 0:
        raise UserError(f"{NAME}.alpha must be above 0, got {alpha!r}")
    # A copy: mmdet's DETRs write into their config, which could not be built again.
    built = MODELS.build(deepcopy(model))
    there = {name: m for name, m in built.named_modules() if name and isinstance(m, nn.Linear | nn.Conv2d)}
    layers = _matching("targets", targets, there, "layers that can be adapted")
    for name in layers:
        if reason := _why_not(built, name):
            raise UserError(f"{NAME}.targets: {name} cannot be adapted: {reason}")
    trained = _matching("train", train, dict(built.named_parameters()), "parameters")
    if not layers and not trained:
        raise UserError(f"{NAME} trains nothing: targets and train are both empty")

    loaded = set() if checkpoint is None else _load(checkpoint, built, trained)
    built.requires_grad_(False)
    parameters = [built.get_parameter(name).requires_grad_() for name in trained]
    kept = built.state_dict() if checkpoint is None else _changed(built)
    built.lora_frozen = tuple(name for name in built.state_dict() if name not in kept)
    built.lora_layers = tuple(layers)
    if layers:
        names = "|".join(map(re.escape, layers))  # a list would also mean names that end with these
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=names), built)
        for parameter in parameters:  # peft has frozen them
            parameter.requires_grad_()

    # Not bound methods, which are pickled by a name that the model does not have.
    if hasattr(built, "init_weights"):
        init = vars(built).get("init_weights") or partial(type(built).init_weights, built)
        built.init_weights = partial(_init_weights, built, init, loaded)
    built.train = partial(_train, built)
    built.loads_instead = partial(_loads_instead, built)
    built.register_state_dict_post_hook(_as_plain)
    built.register_load_state_dict_pre_hook(_from_plain)
    return built


def without_lora(config: Any) -> Any:
    """A copy of a model's config in which every :func:`with_lora` is the model that it was given."""
    if isinstance(config, Mapping):
        if type_name(config.get("type", "")) in (NAME, with_lora.__name__):
            return without_lora(config["model"])
        return {key: without_lora(value) for key, value in config.items()}
    return type(config)(map(without_lora, config)) if isinstance(config, list | tuple) else deepcopy(config)


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    r"""The plain model of equal outputs, in float64 on the CPU: its weights are :math:`W_0 + \frac{\alpha}{r} B A`.

    Args:
        model: what :func:`with_lora` returned, or holds it; it is left as it is.
    """
    model = deepcopy(model).cpu().double()
    for adapted in [module for module in model.modules() if hasattr(module, "lora_layers")]:
        for name in adapted.lora_layers:
            layer = adapted.get_submodule(name)
            layer.merge()
            adapted.set_submodule(name, layer.base_layer)
        adapted.lora_layers = adapted.lora_frozen = ()
    return model


def _matching(field: str, patterns: Sequence[str], there: Mapping[str, Any], what: str) -> list[str]:
    """The names that fit one of the patterns, each of which has to fit one.

    Raises:
        UserError: no list of patterns, or one that matches nothing.
    """
    if not isinstance(patterns, Sequence) or isinstance(patterns, str):
        raise UserError(f"{NAME}.{field} must be a list of names or patterns, got {patterns!r}")
    for i, pattern in enumerate(patterns):
        if not any(fnmatchcase(name, str(pattern)) for name in there):
            names = ", ".join(list(there)[:8]) + (", ..." if len(there) > 8 else "")
            raise UserError(f"{NAME}.{field}[{i}] {pattern!r} matches nothing; {what}: {names or 'none'}")
    return [name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _why_not(model: nn.Module, name: str) -> str | None:
    """Why this layer cannot have an adapter."""
    layer = model.get_submodule(name)
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight instead of calling it; train it whole, by its name in train"
    if isinstance(layer, nn.Linear) and (reason := why_whole(layer)):
        return reason
    if isinstance(layer, nn.Conv2d) and (layer.groups, layer.dilation, layer.padding_mode) != (1, (1, 1), "zeros"):
        return "peft adapts no nn.Conv2d with groups, dilation or another padding than zeros"
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is layer.weight]
    return f"its weight has several names, {' and '.join(names)}" if len(names) > 1 else None


def _load(checkpoint: str, model: nn.Module, trained: Sequence[str]) -> set[str]:
    """Fill the model with the weights of a file; returns the names of those that were there.

    Raises:
        UserError: no such file, or one that does not hold all that is frozen.
    """
    for module in model.modules():
        # A backbone's own weights would be read, or downloaded, for nothing.
        if isinstance(cfg := getattr(module, "init_cfg", None), Mapping) and cfg.get("type") == "Pretrained":
            module.init_cfg = None
    found = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu", logger="silent")
    weights = {k.removeprefix("module."): v for k, v in found.get("state_dict", found).items()}
    ours = model.state_dict()
    new = {k for k in trained if k not in weights or weights[k].shape != ours[k].shape}
    # Zeros, since a model that is built to be checked has no values.
    check_fit(model, weights | {k: torch.zeros_like(ours[k]) for k in new}, checkpoint)
    model.load_state_dict({k: v for k, v in weights.items() if k not in new}, strict=False)
    return ours.keys() - new


def _changed(model: nn.Module) -> set[str]:
    """Names of what training changes: parameters that want a gradient, and the buffers beside them."""
    names = set()
    for path, module in model.named_modules():
        own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
        own += [name for name, _ in module.named_buffers(recurse=False) if own]
        names |= {f"{path}.{name}".lstrip(".") for name in own}
    return names


@torch.no_grad()
def _init_weights(self: nn.Module, init: Callable, loaded: set[str]) -> None:
    """Run the model's own ``init_weights()`` on its plain layers; what was loaded as it was built stays."""
    names, self.lora_layers = self.lora_layers, ()
    layers = [self.get_submodule(name) for name in names]
    try:
        for name, layer in zip(names, layers, strict=True):
            self.set_submodule(name, layer.base_layer)
        before = [(tensor, tensor.clone()) for name, tensor in _tensors(self).items() if name in loaded]
        init()
        for tensor, values in before:
            tensor.copy_(values)
    finally:
        for name, layer in zip(names, layers, strict=True):
            self.set_submodule(name, layer)
        self.lora_layers = names


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    """The model's own ``train()``, but for frozen BatchNorms."""
    type(self).train(self, mode)
    for module in self.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()
    return self


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _renamed(self: nn.Module) -> dict[str, str]:
    """Name in the plain model -> name here, of the weights of layers with an adapter."""
    layers = {name: self.get_submodule(name).base_layer for name in self.lora_layers}
    return {f"{name}.{k}": f"{name}.base_layer.{k}" for name, layer in layers.items() for k in layer.state_dict()}


def _adapters(self: nn.Module) -> list[str]:
    return [name for name in _tensors(self) if ".lora_A." in name or ".lora_B." in name]


def _loads_instead(self: nn.Module) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """What a file of the plain model lacks, for ``check_fit``: adapters, where files hold everything."""
    return ([] if self.lora_frozen else _adapters(self)), {}


def _as_plain(self: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A state dict has the plain model's names and, with a checkpoint, nothing that is frozen."""
    for plain, ours in _renamed(self).items():
        state[prefix + plain] = state.pop(prefix + ours)
    for name in self.lora_frozen:
        del state[prefix + name]


def _from_plain(self: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading: add what is frozen, or the adapters that a file of the plain model lacks, as they are now."""
    own, renamed, adapters = _tensors(self), _renamed(self), _adapters(self)
    lacking = adapters if not any(prefix + name in state for name in adapters) else ()
    for name in self.lora_frozen or lacking:
        state[prefix + name] = own[renamed.get(name, name)].detach()
    for plain, ours in renamed.items():
        if prefix + plain in state:
            state[prefix + ours] = state.pop(prefix + plain)
