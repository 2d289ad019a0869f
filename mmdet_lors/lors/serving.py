"""Serving a stack folded: its plain weights are kept in memory beside the parameters, which nobody touches."""

import torch
from torch import Tensor, nn


class Servable(nn.Module):
    """A stack of ``num_layers`` layers whose low-rank parts can be folded away while it serves.

    What is folded is no parameter and no buffer: it is not in the state dict. It is dropped as soon as the weights may
    change: by ``train()``, by loading a state dict, by a move to another device or data type.
    """

    num_layers: int

    def __init__(self) -> None:
        super().__init__()
        self.folded: list | None = None

    def fold_for_serving(self, layer: int) -> object:
        """What layer i needs to serve, tensors only."""
        raise NotImplementedError

    @torch.no_grad()
    def serve(self, mode: bool = True) -> "Servable":
        """Fold every layer for inference, or drop what was folded."""
        self.folded = [self.fold_for_serving(i) for i in range(self.num_layers)] if mode else None
        return self

    def train(self, mode: bool = True) -> "Servable":
        if mode:
            self.folded = None
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "Servable":
        self.folded = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], *args, **kwargs) -> None:
        self.folded = None
        super()._load_from_state_dict(state_dict, *args, **kwargs)


def serve(model: nn.Module, mode: bool = True) -> nn.Module:
    """Switch every :class:`Servable` part of a model to folded weights, or back; its parameters stay as they are."""
    for module in model.modules():
        if isinstance(module, Servable):
            module.serve(mode)
    return model
