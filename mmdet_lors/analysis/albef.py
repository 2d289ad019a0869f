"""The layers of ALBEF (arXiv:2107.07651), to be counted: what the PELA paper compresses in its Tables 4 to 6.

A ViT-B/16 for the image; BERT-base for the text, whose last 6 layers also attend to the image; for question answering
6 more such layers, which write the answer. Every part but the matching head is there twice in training, the second time
as the moving average that ALBEF distils from.
"""

from copy import deepcopy

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, HIDDEN, PROJECTED = 768, 12, 3072, 256
VOCABULARY, POSITIONS = 30522, 512
LAYERS, FUSION_LAYERS, DECODER_LAYERS = 12, 6, 6
IMAGE_SIZE, PATCH = 384, 16


class Attention(nn.Module):
    """BERT's attention of x (B, N, 768) to a source (B, M, 768), with its sum and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, y in ((self.query, x), (self.key, source), (self.value, source))
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(x + self.output(mixed))


class Layer(nn.Module):
    """A layer of BERT, with attention to the image where ``fusion``."""

    def __init__(self, fusion: bool) -> None:
        super().__init__()
        self.attention = Attention()
        self.crossattention = Attention() if fusion else None
        self.intermediate, self.output = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        x = self.attention(x, x)
        if self.crossattention is not None:
            x = self.crossattention(x, image)
        return self.norm(x + self.output(F.gelu(self.intermediate(x))))


class Text(nn.Module):
    """BERT's embeddings and layers, of which the last ``fusion`` attend to the image."""

    def __init__(self, layers: int, fusion: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.types = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Layer(fusion=i >= layers - fusion) for i in range(layers))

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions.weight[: tokens.shape[1]] + self.types.weight[0]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, image)
        return x


class Answer(nn.Module):
    """The decoder of answers: BERT's layers with causal attention, and its prediction of words with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = Text(DECODER_LAYERS, DECODER_LAYERS)
        self.transform, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.bias = nn.Parameter(torch.empty(VOCABULARY))

    def forward(self, tokens: Tensor, question: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.transform(self.bert(tokens, question))))
        return F.linear(x, self.bert.words.weight, self.bias)


class ALBEF(nn.Module):
    """All weights of a training run.

    Args:
        answers: question answering instead of retrieval: a decoder, and neither projections nor matching.
    """

    def __init__(self, answers: bool = False) -> None:
        super().__init__()
        parts = dict(
            image=timm.create_model("vit_base_patch16_224", img_size=IMAGE_SIZE, num_classes=0),
            text=Text(LAYERS, FUSION_LAYERS),
        )
        if answers:
            parts["answer"] = Answer()
        else:
            parts |= dict(image_proj=nn.Linear(WIDTH, PROJECTED), text_proj=nn.Linear(WIDTH, PROJECTED))
        self.online = nn.ModuleDict(parts)
        self.momentum = deepcopy(self.online)
        self.matching = None if answers else nn.Linear(WIDTH, 2)
        self.temperature = None if answers else nn.Parameter(torch.empty(()))

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        """An image (B, 3, 384, 384) and its text (B, N) -> scores of matching (B, 2), or an answer (B, N, 30522)."""
        seen = self.online["image"].forward_features(image)
        read = self.online["text"](tokens, seen)
        return self.matching(read[:, 0]) if self.matching is not None else self.online["answer"](tokens, read)
