"""The Hebbian spiking memory network. `build_model` makes one."""

import sys

import torch

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):  # before imports that fail with an old PyTorch
    sys.exit(f"error: PyTorch {torch.__version__} is too old: install 2.7 or later (pip install --upgrade torch)")

from models.backends import BACKENDS, BackendError
from models.dynamics import POPULATIONS, Dynamics
from models.hebbian_memory import hebbian_read, hebbian_write, store_and_recall
from models.memorizing_associations import (
    SILENT_BELOW,
    MemorizingAssociations,
    Output,
    Sizes,
    build_model,
    constants,
    defaults,
    rate_regularization,
    silent_populations,
)

__all__ = [
    "BACKENDS",
    "POPULATIONS",
    "SILENT_BELOW",
    "BackendError",
    "Dynamics",
    "MemorizingAssociations",
    "Output",
    "Sizes",
    "build_model",
    "constants",
    "defaults",
    "hebbian_read",
    "hebbian_write",
    "rate_regularization",
    "silent_populations",
    "store_and_recall",
]
