"""What comes out of each block of a Transformer, collected while it runs."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

BLOCKS = r"(.+\.)?blocks\.\d+"
"""Names of the blocks of timm's ViT and Swin, and of mmdet's Swin."""


def block_names(model: nn.Module, pattern: str = BLOCKS) -> list[str]:
    """Names of the blocks of a model, in its order.

    Args:
        model: any module.
        pattern: regular expression that the whole name matches; ``(.+\\.)?layers?\\.\\d+`` for
            transformers' BERT and ViT.

    Raises:
        ValueError: no name matches.
    """
    modules = [name for name, _ in model.named_modules()]
    names = [name for name in modules if re.fullmatch(pattern, name)]
    if not names:
        lists = dict.fromkeys(re.sub(r"\d+", "*", n) for n in modules if re.search(r"\.\d+$", n))
        raise ValueError(
            f"blocks {pattern!r} matches no module; the model has {', '.join(lists) or 'no numbered ones'}"
        )
    return names


@contextmanager
def record_tokens(model: nn.Module, pattern: str = BLOCKS) -> Iterator[list[Tensor]]:
    """While inside, every block's output is appended to the list that this yields, in the order in which they run.

    A block that returns several things has its tokens first, (B, tokens, channels) or (B, H, W, channels).

    Raises:
        ValueError: see :func:`block_names`.
    """
    tokens: list[Tensor] = []

    def record(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        tokens.append(output if isinstance(output, Tensor) else output[0])

    hooks = [model.get_submodule(name).register_forward_hook(record) for name in block_names(model, pattern)]
    try:
        yield tokens
    finally:
        for hook in hooks:
            hook.remove()
