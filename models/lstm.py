"""A long short-term memory that sees the pairs one after the other, then the query.

Shapes: B batch, L pairs in a sequence, C classes, F features, E embedding size, M hidden units.
Source: Hochreiter, Schmidhuber, Long Short-Term Memory, 1997; `torch.nn.LSTM`.
"""

import torch
from torch import Tensor, nn

from models.memorizing_associations import Output
from models.operands import check_operands


class LSTM(nn.Module):
    """Embedding -> one layer of LSTM cells -> linear output of the last hidden state."""

    def __init__(self, num_classes: int = 10, feature_size: int = 10, embedding_size: int = 32, memory_size: int = 96):
        super().__init__()
        self.input_layer = nn.Linear(feature_size, embedding_size)
        self.embedding_layer = nn.Embedding(num_classes + 1, embedding_size)  # the last one marks the query
        self.cells = nn.LSTM(embedding_size, memory_size, batch_first=True)
        self.output_layer = nn.Linear(memory_size, num_classes)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor, record: bool = False) -> Output:
        """As `MemorizingAssociations.forward`; there are no rates, and `record` adds nothing."""
        check_operands(self, features, labels, query)
        pairs = self.input_layer(features) + self.embedding_layer(labels)
        unknown = labels.new_full((len(labels),), self.embedding_layer.num_embeddings - 1)
        asked = self.input_layer(query) + self.embedding_layer(unknown)
        hidden, _ = self.cells(torch.cat([pairs, asked.unsqueeze(1)], 1))
        return Output(self.output_layer(hidden[:, -1]), {}, None)
