"""The time loops of the network, and the choice of who runs them.

A backend is a module with two functions:

    unavailable(device_type) -> str | None     why it cannot run on such a device here, in one line with the remedy, or None
    store_and_recall(features_current, ..., dynamics, record) -> Recalled        as in `reference`, which defines the meaning
"""

import functools
import importlib
import warnings

from torch import Tensor

from models.backends.reference import POPULATIONS, Dynamics, Recalled

__all__ = [
    "BACKENDS",
    "POPULATIONS",
    "BackendError",
    "Dynamics",
    "Recalled",
    "check_backend",
    "resolve_backend",
    "store_and_recall",
]

# From the fastest to the slowest: the order in which `auto` tries them.
BACKENDS = ("auto", "triton", "cpp", "reference")


class BackendError(RuntimeError):
    """A backend asked for by name cannot run here."""


def check_backend(name: str) -> None:
    """Raises ValueError for a name that is not one of BACKENDS."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")


@functools.cache
def resolve_backend(name: str, device_type: str) -> tuple[str, dict[str, str]]:
    """The backend that runs on a device ("cpu", "cuda"), and for each faster one why it does not.

    `auto` takes the fastest that runs and warns where that is the reference; a backend asked for by name runs or raises.

    Raises:
        ValueError: no such backend.
        BackendError: the backend asked for cannot run here.
    """
    check_backend(name)
    if name != "auto":
        if reason := _module(name).unavailable(device_type):
            raise BackendError(f"backend {name} cannot run here: {reason}")
        return name, {}
    why_not = {}
    for candidate in BACKENDS[1:]:
        reason = _module(candidate).unavailable(device_type)
        if reason is None:
            break
        why_not[candidate] = reason
    if candidate == "reference":
        reasons = "; ".join(f"{faster}: {why}" for faster, why in why_not.items())
        warnings.warn(f"using the slow reference backend ({reasons})", stacklevel=2)
    return candidate, why_not


def _module(name: str):
    return importlib.import_module(f"models.backends.{name}")


def store_and_recall(*args: Tensor | Dynamics, record: bool, backend: str) -> Recalled:
    """`reference.store_and_recall` by the backend of that name, on the device of the first argument."""
    name, _ = resolve_backend(backend, args[0].device.type)
    return _module(name).store_and_recall(*args, record=record)
