"""The Hebbian spiking memory network. `build_model` makes one; `kernels` runs it through time."""

from models.memorizing_associations import MemorizingAssociations, Output, build_model, rate_regularization

__all__ = ["MemorizingAssociations", "Output", "build_model", "rate_regularization"]
