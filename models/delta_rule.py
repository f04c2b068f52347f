"""Fast weights with the delta rule: each pair replaces what the memory holds for its key, instead of adding to it.

Shapes as in linear_attention.py.
Source: Schlag, Irie, Schmidhuber, Linear Transformers Are Secretly Fast Weight Programmers, ICML 2021.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.linear_attention import LinearAttention


class DeltaRule(LinearAttention):
    """Linear attention with keys of length 1 and the update W + beta (v - W k) k^T; beta, in 0..1, depends on the vector."""

    def __init__(self, num_classes: int = 10, feature_size: int = 10, embedding_size: int = 128, memory_size: int = 128):
        super().__init__(num_classes, feature_size, embedding_size, memory_size)
        self.write_strength = nn.Linear(embedding_size, 1)

    def store(self, vectors: Tensor, values: Tensor) -> Tensor:
        keys, strengths = normalize(self.key(vectors), dim=-1), torch.sigmoid(self.write_strength(vectors))
        # All pairs at once: what pair n writes, u_n = beta_n (v_n - sum of u_m (k_m k_n) over the pairs m before it), is the
        # solution of a triangular system with ones on its diagonal.
        overlap = strengths * (keys @ keys.mT)
        written = torch.linalg.solve_triangular(overlap, strengths * values, upper=False, unitriangular=True)
        return written.mT @ keys

    def read_key(self, query: Tensor) -> Tensor:
        return normalize(self.query(query), dim=-1)
