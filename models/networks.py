"""The networks by name, what options each has, and `build_model`, which makes one of a mapping of options.

A network is a module with `forward(features, labels, query, record=False) -> Output`; without spikes its rates are empty.
The arguments of its class are its options, under their names on the command line; a dataclass among them stands for its fields.
"""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import nn

from models import backends, memorizing_associations
from models.delta_rule import DeltaRule
from models.dynamics import Dynamics
from models.h_mem import HMem
from models.linear_attention import LinearAttention
from models.lstm import LSTM
from models.memorizing_associations import MemorizingAssociations, Sizes
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
    if name == DEFAULT:
        return _fields(Sizes()) | _fields(Dynamics())
    found = {}
    for argument, parameter in _arguments(name).items():
        found |= _fields(parameter.default) if is_dataclass(parameter.default) else {argument: parameter.default}
    return found


def training_defaults(name: str) -> dict[str, Any]:
    """Options of the training that have another default with a network."""
    return {} if spikes(name) else {"learning_rate": 0.001}


def spikes(name: str) -> bool:
    """Whether a network has spikes, and so firing rates to regularize."""
    return "thr" in network_options(name)


def _arguments(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(NETWORKS[name]).parameters


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


def build_model(options: Mapping[str, Any], backend: str = "auto", **parts: Any) -> nn.Module:
    """The network of a mapping of options under their published names (others are ignored, missing ones take their default).

    Args:
        options: `network`, one of NETWORKS, and what `network_options` lists.
        backend: one of `models.BACKENDS`; kernels know the published network only.
        parts: for the published network, a `neuron` or a `rule` in place of its own.

    Raises:
        ValueError: unknown network or backend, or a constant out of bounds.
        models.BackendError: a kernel is asked for by name to run another network than the published one.
    """
    name = options.get("network", DEFAULT)
    if name not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, not {name!r}")
    if name == DEFAULT:
        return memorizing_associations.build_model(options, backend, **parts)
    backends.check_name(backend)
    if backend not in ("auto", "reference"):
        raise backends.BackendError(f"backend {backend}: it runs {DEFAULT} only, and {name} is plain PyTorch: use auto")
    chosen = {}
    for argument, parameter in _arguments(name).items():
        default = parameter.default
        if is_dataclass(default):
            chosen[argument] = replace(default, **{f.name: options[f.name] for f in fields(default) if f.name in options})
        elif argument in options:
            chosen[argument] = options[argument]
    return NETWORKS[name](**chosen)
