"""Figures: functions from arrays to matplotlib figures, in one style. They know nothing of models."""

from utils.figures.activity import ALL, Trial, Zoom, membranes, memory, overview
from utils.figures.animation import animate, frame_times
from utils.figures.curves import Curves, accuracy_by_length, training_curves
from utils.figures.files import FORMATS, check_writable, choose_files, save, show

__all__ = [
    "ALL",
    "FORMATS",
    "Curves",
    "Trial",
    "Zoom",
    "accuracy_by_length",
    "animate",
    "check_writable",
    "choose_files",
    "frame_times",
    "membranes",
    "memory",
    "overview",
    "save",
    "show",
    "training_curves",
]
