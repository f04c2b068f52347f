"""The published variant without spikes: rectified keys and values, one Hebbian update a pair.

Shapes: B batch, L pairs in a sequence, C classes, F features, E embedding size, M memory size.
Source: the published program of arXiv:2205.11276, its newest version.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from models.hebbian_memory import XAVIER_GAIN
from models.memorizing_associations import EmbeddingLayer, Output
from models.operands import check_operands
from models.plasticity import HebbianRule

RULES = ("hebbian", "sum")


class _Weights(nn.Module):
    """A matrix under its published name, `W`."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns), gain=XAVIER_GAIN))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W.T


class HMem(nn.Module):
    """Embedding -> Hebbian memory of rectified keys and values -> linear output.

    Args:
        rule: one of RULES: the published rule of plasticity.py, or to add the outer product of value and key.
        rectified: whether keys and values are rectified.
    """

    def __init__(
        self,
        num_classes: int = 10,
        feature_size: int = 10,
        embedding_size: int = 80,
        memory_size: int = 120,  # published: 100; 120 gives it as many parameters as the spiking network
        w_max: float = 1.0,
        gamma_pos: float = 0.1,
        gamma_neg: float = 0.1,
        rule: str = "hebbian",
        rectified: bool = True,
    ):
        super().__init__()
        self.update = HebbianRule(w_max, gamma_pos, gamma_neg).update
        self.rule, self.activation = rule, relu if rectified else nn.Identity()
        self.input_layer = nn.Linear(feature_size, embedding_size, bias=False)
        nn.init.xavier_uniform_(self.input_layer.weight, gain=XAVIER_GAIN)
        self.embedding_layer = EmbeddingLayer(num_classes, embedding_size)
        self.writing_layer = _Weights(2 * memory_size, 2 * embedding_size)
        self.reading_layer = _Weights(memory_size, embedding_size)
        self.output_layer = nn.Linear(memory_size, num_classes, bias=False)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor, record: bool = False) -> Output:
        """As `MemorizingAssociations.forward`; there are no rates."""
        check_operands(self, features, labels, query)
        vectors, asked = relu(self.input_layer(features)), relu(self.input_layer(query))
        names = relu(self.embedding_layer(labels))
        keys, values = self.activation(self.writing_layer(torch.cat([vectors, names], -1))).chunk(2, -1)
        memory = self.store(keys, values)
        read_key = self.activation(self.reading_layer(asked))
        read_value = (memory @ read_key.unsqueeze(-1)).squeeze(-1)
        activity = None
        if record:
            activity = {"features_encoded": vectors, "labels_encoded": names, "query_encoded": asked, "write_key": keys}
            activity |= {"write_value": values, "read_key": read_key, "read_value": read_value, "memory": memory}
        return Output(self.output_layer(read_value), {}, activity)

    def store(self, keys: Tensor, values: Tensor) -> Tensor:
        """The memory, B x M x M, after all pairs. Keys and values: B x L x M."""
        if self.rule == "sum":
            return values.mT @ keys
        memory = keys.new_zeros(len(keys), values.shape[-1], keys.shape[-1])
        for key, value in zip(keys.unbind(1), values.unbind(1), strict=True):
            memory = self.update(memory, value, key)
        return memory
