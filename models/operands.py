"""Checks of a network's inputs."""

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def check_operands(
    weights: Iterable[tuple[str, Tensor]], feature_size: int, features: Tensor, labels: Tensor, query: Tensor
) -> None:
    """Check that the arguments of a network's `forward` fit each other and the network.

    Kernels rely on these shapes and types, and PyTorch would broadcast some wrong shapes.

    Args:
        weights: names and tensors, as `named_parameters` gives them.

    Raises:
        ValueError: an argument does not fit. The message names the argument and what was expected.
    """
    for name, x, wanted in (("features", features, "B x L x F"), ("labels", labels, "B x L"), ("query", query, "B x F")):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, not {type(x).__name__}; use torch.as_tensor")
        if x.dim() != wanted.count("x") + 1:
            raise ValueError(f"{name} must be of shape {wanted}, not {tuple(x.shape)}")
    dtype, device = features.dtype, features.device
    for name, weight in weights:
        if name.startswith("output_layer."):  # users may replace the output layer
            continue
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {weight.dtype}; the network computes in float32 or float64: use model.float()")
        if weight.dtype != dtype or weight.device != device:
            raise ValueError(f"features are {dtype} on {device}, but {name} is {weight.dtype} on {weight.device}; "
                             "convert one of them by .to(...)")  # fmt: skip
    if query.dtype != dtype:
        raise ValueError(f"query must be {dtype} like features, not {query.dtype}")
    for name, x in (("labels", labels), ("query", query)):
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, features on {device}; move it: {name}.to(...)")
    batch, pairs, size = features.shape
    if size != feature_size or query.shape[1] != feature_size:
        raise ValueError(f"features and query must end in feature_size {feature_size}, not {size} and {query.shape[1]}")
    if pairs == 0:
        raise ValueError("features must hold at least one pair")
    if tuple(labels.shape) != (batch, pairs):
        raise ValueError(f"labels must be of shape {(batch, pairs)} to match features, not {tuple(labels.shape)}")
    if query.shape[0] != batch:
        raise ValueError(f"query must have batch size {batch} like features, not {query.shape[0]}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels.dtype}")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Check that labels on a CPU are 0 to `num_classes` - 1. Elsewhere the embedding checks: reading labels on a GPU would
    wait, and labels without values (on the meta device, while tracing, inside vmap) cannot be read.

    Raises:
        ValueError: a label is out of range.
    """
    if labels.device.type != "cpu" or not labels.numel() or torch.compiler.is_compiling():
        return
    try:
        low, high = (int(bound) for bound in labels.aminmax())
    except RuntimeError:  # fake tensors and vmap
        return
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be 0 to {num_classes - 1}, not {low} to {high}")


def refuse_misspelled(given: Iterable[str], known: Sequence[str]) -> None:
    """Raises ValueError for an unknown name that is close to a known name."""
    for name in given:
        if name not in known and (close := difflib.get_close_matches(name, known, n=1, cutoff=0.85)):
            raise ValueError(f"{name} is not an option of the network; did you mean {close[0]}?")
