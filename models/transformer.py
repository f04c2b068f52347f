"""A Transformer encoder: pairs and query are its tokens, and the answer is read from the query's.

Shapes: B batch, L pairs in a sequence, C classes, F features, E embedding size.
Source: Vaswani et al., Attention Is All You Need, 2017; `torch.nn.TransformerEncoderLayer`, normalized before each part.
"""

import math

import torch
from torch import Tensor, nn

from models.memorizing_associations import Output
from models.operands import check_operands


class Transformer(nn.Module):
    """Two layers of four heads; the feed-forward parts are twice as wide as the embedding.

    Args:
        positions: add sinusoidal positions to the pairs. Without them the pairs are a set, in no order.
    """

    def __init__(self, num_classes: int = 10, feature_size: int = 10, embedding_size: int = 56, positions: bool = False):
        super().__init__()
        self.positions = positions
        self.input_layer = nn.Linear(feature_size, embedding_size)
        self.embedding_layer = nn.Embedding(num_classes + 1, embedding_size)  # the last one marks the query
        layer = nn.TransformerEncoderLayer(
            embedding_size, nhead=4, dim_feedforward=2 * embedding_size, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(embedding_size), enable_nested_tensor=False)
        self.output_layer = nn.Linear(embedding_size, num_classes)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor, record: bool = False) -> Output:
        """As `MemorizingAssociations.forward`; there are no rates, and `record` adds nothing."""
        check_operands(self, features, labels, query)
        tokens = self.input_layer(features) + self.embedding_layer(labels)
        if self.positions:
            tokens = tokens + sinusoids(tokens.shape[1], tokens.shape[2]).to(tokens)
        unknown = labels.new_full((len(labels),), self.embedding_layer.num_embeddings - 1)
        asked = self.input_layer(query) + self.embedding_layer(unknown)
        encoded = self.encoder(torch.cat([tokens, asked.unsqueeze(1)], 1))
        return Output(self.output_layer(encoded[:, -1]), {}, None)


def sinusoids(length: int, size: int) -> Tensor:
    """Positions, length x size: sines, then cosines, of wavelengths from 2 pi to 20,000 pi."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(size // 2) / (size // 2))
    angles = torch.arange(length).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)
