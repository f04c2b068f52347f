"""Figures: functions from arrays to matplotlib figures, in one style."""

from utils.figures.files import save

__all__ = ["save"]
