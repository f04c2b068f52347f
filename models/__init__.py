"""The Hebbian spiking memory network, and others on the same task. `build_model` makes one."""

from models.backends import BACKENDS, BackendError
from models.dynamics import POPULATIONS, Dynamics
from models.memorizing_associations import (
    SILENT_BELOW,
    MemorizingAssociations,
    Output,
    Sizes,
    rate_regularization,
)
from models.networks import NETWORKS, build_model, network_options, prepare_backend, spikes, training_defaults

__all__ = [
    "BACKENDS",
    "NETWORKS",
    "POPULATIONS",
    "SILENT_BELOW",
    "BackendError",
    "Dynamics",
    "MemorizingAssociations",
    "Output",
    "Sizes",
    "build_model",
    "network_options",
    "prepare_backend",
    "rate_regularization",
    "spikes",
    "training_defaults",
]
