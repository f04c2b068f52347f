"""Figures: functions from arrays to matplotlib figures, in one style. They know nothing of models or files."""

from utils.figures.activity import ALL, Activity, Population, Trial, Zoom, membranes, memory, overview, rates
from utils.figures.style import FORMATS, save, style

__all__ = [
    "ALL",
    "FORMATS",
    "Activity",
    "Population",
    "Trial",
    "Zoom",
    "membranes",
    "memory",
    "overview",
    "rates",
    "save",
    "style",
]
