"""The check of what a network is given, for all networks and backends."""

import torch
from torch import Tensor, nn


def check_operands(model: nn.Module, features: Tensor, labels: Tensor, query: Tensor) -> None:
    """See that the arguments of a network's `forward` belong together and to it.

    Kernels read and write by these shapes and types, and PyTorch would broadcast some that are wrong.

    Raises:
        ValueError: naming the argument, and what was expected.
    """
    dtype, device = model.output_layer.weight.dtype, model.output_layer.weight.device
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the network's weights are {dtype}; it computes in float32 or float64: use model.float()")
    for name, weight in model.named_parameters():
        if weight.dtype != dtype or weight.device != device:
            raise ValueError(f"{name} is {weight.dtype} on {weight.device}, output_layer.weight {dtype} on {device}; "
                             "convert the whole network: model.to(...)")  # fmt: skip
    for name, x, wanted in (("features", features, "B x L x F"), ("labels", labels, "B x L"), ("query", query, "B x F")):
        if x.dim() != wanted.count("x") + 1:
            raise ValueError(f"{name} must be of shape {wanted}, not {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, the network on {device}; move it: {name}.to(...)")
        if name != "labels" and x.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} as the network's weights are, not {x.dtype}")
    (batch, pairs, size), F = features.shape, model.input_layer.in_features
    num_classes = model.output_layer.out_features
    if size != F or query.shape[1] != F:
        raise ValueError(f"features and query must end in feature_size {F}, not {size} and {query.shape[1]}")
    if pairs == 0:
        raise ValueError("features must hold at least one pair, not 0")
    if tuple(labels.shape) != (batch, pairs):
        raise ValueError(f"labels must be of shape {(batch, pairs)} as features has it, not {tuple(labels.shape)}")
    if query.shape[0] != batch:
        raise ValueError(f"query must be of batch size {batch} as features is, not {query.shape[0]}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels.dtype}")
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():  # elsewhere this would wait
        low, high = labels.aminmax()
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must be 0 to {num_classes - 1}, not {int(low)} to {int(high)}")
