"""Constants of the equations. Each is a field of a dataclass, with its default, its meaning and its bounds.

The task script has an option for every such field, and checkpoints keep its value.
"""

import math
from dataclasses import MISSING, field, fields
from operator import gt, le, lt
from typing import Any


def constant(default: Any, *, low: float | None = None, above: float | None = None, high: float | None = None):
    """A dataclass field for a constant: `low` and `high` are its least and greatest value, `above` an excluded lower bound."""
    return field(default=default, metadata={"low": low, "above": above, "high": high})


def out_of_bounds(value: Any, low: float | None, above: float | None, high: float | None) -> str | None:
    """What is wrong with a number, or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite, not {value}"
    for bound, is_beyond, words in ((low, lt, "at least"), (above, le, "greater than"), (high, gt, "at most")):
        if bound is not None and is_beyond(value, bound):
            return f"must be {words} {bound:.10g}, not {value}"
    return None


def check_bounds(constants: Any) -> None:
    """Check every field of a dataclass that was made by `constant`.

    Raises:
        ValueError: a value has another type or is out of bounds. The message names the constant.
    """
    for f in fields(constants):
        if not f.metadata or f.default is MISSING:
            continue
        value, wanted = getattr(constants, f.name), type(f.default)
        if isinstance(value, bool) != (wanted is bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise ValueError(f"{f.name} must be of type {wanted.__name__}, not {value!r}")
        if wrong := out_of_bounds(value, *(f.metadata[key] for key in ("low", "above", "high"))):
            raise ValueError(f"{f.name} {wrong}")
