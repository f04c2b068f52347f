"""Constants of the equations: each stands once, with its default, its meaning and its bounds, as a field of a dataclass.

The command line makes an option of every such field (utils/options.py), and checkpoints keep them.
"""

import math
from dataclasses import MISSING, field, fields
from typing import Any


def constant(default: Any, help: str, *, low: float | None = None, above: float | None = None, high: float | None = None):
    """A dataclass field for a constant: `low` and `high` are its least and greatest value, `above` an excluded lower bound."""
    return field(default=default, metadata={"help": help, "low": low, "above": above, "high": high})


def check_bounds(constants: Any) -> None:
    """Check every field of a dataclass that was made by `constant`.

    Raises:
        ValueError: a value is of another type or out of bounds; names the constant.
    """
    for f in fields(constants):
        if not f.metadata or f.default is MISSING:
            continue
        value, low, above, high = getattr(constants, f.name), *(f.metadata[key] for key in ("low", "above", "high"))
        wanted = type(f.default)
        if isinstance(value, bool) != (wanted is bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise ValueError(f"{f.name} must be of type {wanted.__name__}, not {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{f.name} must be finite, not {value}")
        if low is not None and value < low:
            raise ValueError(f"{f.name} must be at least {low:g}, not {value}")
        if above is not None and value <= above:
            raise ValueError(f"{f.name} must be greater than {above:g}, not {value}")
        if high is not None and value > high:
            raise ValueError(f"{f.name} must be at most {high:g}, not {value}")
