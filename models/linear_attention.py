"""Linear attention: the memory is a plain sum of outer products of values and keys.

Shapes: B batch, L pairs in a sequence, C classes, F features, E embedding size, M memory size.
Source: Katharopoulos et al., Transformers are RNNs, ICML 2020; here the feature map is that of the embedding, and nothing is
normalized.
"""

from torch import Tensor, nn
from torch.nn.functional import silu

from models.memorizing_associations import Output
from models.operands import check_operands


class LinearAttention(nn.Module):
    """Embedding -> key and value of each pair -> memory, read with the query's key -> linear output."""

    def __init__(self, num_classes: int = 10, feature_size: int = 10, embedding_size: int = 128, memory_size: int = 128):
        super().__init__()
        self.input_layer = nn.Linear(feature_size, embedding_size)
        self.embedding_layer = nn.Embedding(num_classes, embedding_size)
        self.key = nn.Linear(embedding_size, memory_size, bias=False)
        self.value = nn.Linear(embedding_size, memory_size, bias=False)
        self.query = nn.Linear(embedding_size, memory_size, bias=False)
        self.output_layer = nn.Linear(memory_size, num_classes)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor, record: bool = False) -> Output:
        """As `MemorizingAssociations.forward`; there are no rates."""
        check_operands(self, features, labels, query)
        vectors, asked = silu(self.input_layer(features)), silu(self.input_layer(query))
        memory = self.store(vectors, self.value(self.embedding_layer(labels)))
        read_value = (memory @ self.read_key(asked).unsqueeze(-1)).squeeze(-1)
        return Output(self.output_layer(read_value), {}, {"memory": memory} if record else None)

    def store(self, vectors: Tensor, values: Tensor) -> Tensor:
        """The memory, B x M x M, after all pairs, of embedded vectors B x L x E and values B x L x M."""
        return values.mT @ self.key(vectors)

    def read_key(self, query: Tensor) -> Tensor:
        return self.query(query)
