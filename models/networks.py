"""The networks by name, what options each has, and `build_model`, which makes one of a mapping of options.

A network is a module with `forward(features, labels, query, record=False) -> Output`; without spikes its rates are empty.
The arguments of its class are its options, under their names on the command line; a dataclass among them stands for its fields.
"""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import nn

from models import backends
from models.delta_rule import DeltaRule
from models.h_mem import HMem
from models.linear_attention import LinearAttention
from models.lstm import LSTM
from models.memorizing_associations import MemorizingAssociations
from models.recurrent_spiking import AdaptiveLIF, RecurrentLIF
from models.transformer import Transformer

NETWORKS = {
    "hebbian_snn": MemorizingAssociations,
    "h_mem": HMem,
    "linear_attention": LinearAttention,
    "delta_rule": DeltaRule,
    "transformer": Transformer,
    "lstm": LSTM,
    "recurrent_lif": RecurrentLIF,
    "adaptive_lif": AdaptiveLIF,
}
DEFAULT = "hebbian_snn"


def network_options(name: str) -> dict[str, Any]:
    """The model options that a network has, with its defaults."""
    found = {}
    for argument, default in _arguments(name).items():
        found |= _fields(default) if is_dataclass(default) else {argument: default}
    return found


def training_defaults(name: str) -> dict[str, Any]:
    """Options of the training that have another default with a network."""
    return {} if spikes(name) else {"learning_rate": 0.001}


def spikes(name: str) -> bool:
    """Whether a network has spikes, and so firing rates to regularize."""
    return "thr" in network_options(name)


def _arguments(name: str) -> dict[str, Any]:
    """The arguments of a network's class, with their defaults."""
    arguments = inspect.signature(NETWORKS[name]).parameters
    return {argument: parameter.default for argument, parameter in arguments.items() if argument != "backend"}


def _fields(constants: Any) -> dict[str, Any]:
    """Names and values of a dataclass's fields, and of the dataclasses among them."""
    found = {}
    for field in fields(constants):
        value = getattr(constants, field.name)
        found |= _fields(value) if is_dataclass(value) else {field.name: value}
    return found


def prepare_backend(model: nn.Module, device_type: str) -> tuple[str, dict[str, str]]:
    """As `MemorizingAssociations.prepare_backend`; the other networks are plain PyTorch."""
    return model.prepare_backend(device_type) if isinstance(model, MemorizingAssociations) else ("reference", {})


def build_model(options: Mapping[str, Any], backend: str = "auto", neuron: Any = None, rule: Any = None) -> nn.Module:
    """The network of a mapping of options under their published names (others are ignored, missing ones take their default).

    Args:
        options: `network`, one of NETWORKS, and what `network_options` lists.
        backend: one of `models.BACKENDS`; kernels know the published network only.
        neuron, rule: for the published network, in place of its own: objects with the same methods.

    Raises:
        ValueError: unknown network or backend, a constant out of bounds, or a part for a network that takes none.
        models.BackendError: a kernel is asked for by name to run another network than the published one.
    """
    name = options.get("network", DEFAULT)
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, not {name!r}")
    backends.check_name(backend)
    if name != DEFAULT and backend not in ("auto", "reference"):
        raise backends.BackendError(f"backend {backend}: it runs {DEFAULT} only, and {name} is plain PyTorch: use auto")
    parts = {part: given for part, given in {"neuron": neuron, "rule": rule}.items() if given is not None}
    if parts and name != DEFAULT:
        raise ValueError(f"{', '.join(parts)}: {DEFAULT} alone takes another one; change {name} itself")
    chosen = {"backend": backend} if name == DEFAULT else {}
    for argument, default in _arguments(name).items():
        chosen[argument] = _filled(default, options, parts) if is_dataclass(default) else options.get(argument, default)
    return NETWORKS[name](**chosen)


def _filled(default: Any, options: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """A dataclass of constants with the values of a mapping of options; `parts` stand for dataclasses among its fields."""
    values = {}
    for field in fields(default):
        value = getattr(default, field.name)
        values[field.name] = _filled(value, options, parts) if is_dataclass(value) else options.get(field.name, value)
        values[field.name] = parts.get(field.name, values[field.name])
    return replace(default, **values)
