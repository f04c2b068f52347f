"""The Hebbian spiking memory network. `build_model` makes one."""

from models.backends import BACKENDS, BackendError
from models.dynamics import POPULATIONS, Dynamics
from models.memorizing_associations import (
    SILENT_BELOW,
    MemorizingAssociations,
    Output,
    Sizes,
    build_model,
    rate_regularization,
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
    "rate_regularization",
]
