"""Figures: functions from arrays to matplotlib figures, in one style. They know nothing of models or files."""

from utils.figures.activity import ALL, Activity, Population, Trial, Zoom, membranes, memory, overview, rates, representative
from utils.figures.curves import TRAINING_PANELS, Curves, accuracy_by_length, training_curves
from utils.figures.style import FORMATS, save, style

__all__ = [
    "ALL",
    "FORMATS",
    "TRAINING_PANELS",
    "Activity",
    "Curves",
    "Population",
    "Trial",
    "Zoom",
    "accuracy_by_length",
    "membranes",
    "memory",
    "overview",
    "rates",
    "representative",
    "save",
    "style",
    "training_curves",
]
