"""The layers: what holds weights. They know nothing of time, which is in `models.backends`.

Names of modules and parameters are those of the published checkpoints.
"""

import math

import torch
from torch import Tensor, nn

XAVIER_GAIN = math.sqrt(2)


def xavier_uniform(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape), gain=XAVIER_GAIN))


class InputLayer(nn.Linear):
    """Embeds a vector: a = W_in x, without bias. `weight` is E x F."""

    def __init__(self, feature_size: int, embedding_size: int):
        super().__init__(feature_size, embedding_size, bias=False)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=XAVIER_GAIN)


class EmbeddingLayer(nn.Module):
    """Embeds a label: a row of a table. `embedding.weight` is C x E."""

    def __init__(self, num_classes: int, embedding_size: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, embedding_size)
        nn.init.xavier_uniform_(self.embedding.weight, gain=XAVIER_GAIN)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)


class WritingLayer(nn.Module):
    """Drives keys and values while writing. `W` is 2M x 2E: rows keys, values; columns vectors, labels."""

    def __init__(self, embedding_size: int, memory_size: int):
        super().__init__()
        self.W = xavier_uniform(2 * memory_size, 2 * embedding_size)


class ReadingLayer(nn.Module):
    """Drives the keys while reading. `W` is M x (E + M): columns query, value neurons (feedback)."""

    def __init__(self, embedding_size: int, memory_size: int):
        super().__init__()
        self.W = xavier_uniform(memory_size, embedding_size + memory_size)
