"""The Hebbian spiking memory network. `build_model` makes one."""

from models.memorizing_associations import SILENT_BELOW, MemorizingAssociations, Output, build_model, rate_regularization

__all__ = ["SILENT_BELOW", "MemorizingAssociations", "Output", "build_model", "rate_regularization"]
