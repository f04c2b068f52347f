"""The generated task: pairs of random vectors and labels, and a query for the label of one of the vectors.

Shapes: N samples, L pairs in a sequence, F features, C classes.
Source: arXiv:2205.11276, "Memorizing associations" in Methods.
"""

import functools
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

TRAINING_SAMPLES = 9_000  # an epoch
EVALUATION_SAMPLES = {"validation": 1_000, "test": 2_000}

# Added to the seed of the dataset. The original implementation adds its default number of loader workers (4), and one more for
# the test set.
_EVALUATION_SEED = {"validation": 4, "test": 5}


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of one sequence length."""

    features: Tensor  # N x L x F float32 in [0, 1)
    labels: Tensor  # N x L int64, no label twice in a sample
    query: Tensor  # N x F float32, one of the L vectors
    answer: Tensor  # N int64, its label

    def __getitem__(self, index):
        """A slice or a selection of the samples."""
        return Samples(*(tensor[index] for tensor in self.tensors()))

    def __len__(self) -> int:
        return self.answer.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields in order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, device: torch.device) -> "Samples":
        if device.type == "cpu":
            return self
        return Samples(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self.tensors()))


def evaluation_set(split: str, sequence_length: int, num_classes: int, feature_size: int, dataset_seed: int) -> Samples:
    """The original validation or test set, bit for bit.

    Args:
        split: "validation" or "test".
        sequence_length: L, at most `num_classes`.
    """
    rng = np.random.default_rng(dataset_seed + _EVALUATION_SEED[split])
    size = EVALUATION_SAMPLES[split]
    features = np.empty((size, sequence_length, feature_size), np.float32)
    labels = np.empty((size, sequence_length), np.int64)
    queried = np.empty(size, np.int64)
    for n in range(size):
        features[n] = rng.random((sequence_length, feature_size))
        labels[n] = rng.choice(num_classes, sequence_length, replace=False)
        queried[n] = rng.choice(sequence_length)
    return _samples(features, labels, queried)


def training_samples(
    start: int, stop: int, epoch: int, sequence_length: int, num_classes: int, feature_size: int, dataset_seed: int
) -> Samples:
    """Training samples `start` to `stop - 1` of an epoch.

    A sample depends only on the sizes, the seed, the epoch and its index i, not on the batches: it owns the i-th block of a
    counter-based generator that is keyed by the sizes, the seed and the epoch. The evaluation sets come from a generator of
    another kind, so no random stream is used twice.
    """
    values = sequence_length * feature_size
    draws = values + num_classes + 1
    blocks = -(-draws // 4)  # Philox yields four numbers for each step of its counter
    bits = np.random.Philox(np.random.SeedSequence([dataset_seed, epoch, sequence_length, num_classes, feature_size]))
    bits.advance(start * blocks)
    uniform = np.random.Generator(bits).random((stop - start, 4 * blocks))
    features = uniform[:, :values].astype(np.float32).reshape(-1, sequence_length, feature_size)
    labels = np.argsort(uniform[:, values : values + num_classes], axis=1, kind="stable")[:, :sequence_length]
    queried = (uniform[:, values + num_classes] * sequence_length).astype(np.int64)
    return _samples(features, np.ascontiguousarray(labels), queried)


def training_length(epoch: int, sequence_length: int, curriculum_start: int = 0, curriculum_step: int = 1) -> int:
    """Pairs in the training sequences of an epoch: `curriculum_start` in epoch 0, `curriculum_step` more in each later epoch,
    up to `sequence_length`. If `curriculum_start` is 0, every epoch has `sequence_length`."""
    return min(sequence_length, curriculum_start + curriculum_step * epoch) if curriculum_start else sequence_length


def fixed_training_samples(
    start: int, stop: int, epoch: int, sequence_length: int, num_classes: int, feature_size: int, dataset_seed: int
) -> Samples:
    """Samples `start` to `stop - 1` of an epoch that shows the samples of epoch 0 in its own order."""
    whole = _training_set(TRAINING_SAMPLES, sequence_length, num_classes, feature_size, dataset_seed)
    return whole[training_order(epoch, dataset_seed)[start:stop]]


@functools.lru_cache(maxsize=2)  # a curriculum changes the length every epoch
def _training_set(samples: int, *sizes: int) -> Samples:
    return training_samples(0, samples, 0, *sizes)


def training_order(epoch: int, dataset_seed: int) -> np.ndarray:
    """The order in which an epoch shows a fixed training set."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([dataset_seed, epoch]))).permutation(TRAINING_SAMPLES)


def _samples(features: np.ndarray, labels: np.ndarray, queried: np.ndarray) -> Samples:
    rows = np.arange(len(queried))
    arrays = (features, labels, features[rows, queried], labels[rows, queried])
    return Samples(*(torch.from_numpy(array) for array in arrays))
