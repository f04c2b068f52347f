"""Figures: functions from arrays to matplotlib figures, in one style. They know nothing of models."""

from utils.figures.files import save

__all__ = ["save"]
