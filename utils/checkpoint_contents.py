"""What a checkpoint holds, checked: types, shapes, finite numbers, and the digest it was written with.

The format is described in `utils/checkpoints.py`.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import data
import models
from utils.options import MODEL, RECORDED

KEYS = ("epoch", "sample", "state_dict", "best_acc", "optimizer", "params", "history", "running", "time_stamp", "log_dir")

_PUBLISHED_KEYS = {"epoch", "state_dict", "best_acc", "optimizer", "params"}
_NOT_LEARNED = "encoding_layer.encoding"
# What Adam is set to beside its learning rate; this program and the published one keep PyTorch's defaults.
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}


def checked(content: Any) -> dict[str, Any]:
    """A checkpoint of this program or of the published one, in our form.

    Raises:
        ValueError: it is not one, or it is damaged; the message says where.
    """
    try:
        return _checked(content)
    except ValueError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError) as failure:
        raise ValueError("not a checkpoint of this program or of the published one") from failure


def _checked(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not _PUBLISHED_KEYS & content.keys():
        raise ValueError("not a checkpoint of this program or of the published one")
    published = not {"sample", "history", "running", "digest"} & content.keys()
    if missing := (_PUBLISHED_KEYS if published else set(KEYS)) - content.keys():
        raise ValueError(f"lacks {', '.join(sorted(missing))}; use another checkpoint")

    params = _checked_params(content["params"])
    try:
        with torch.device("meta"):
            weights = models.build_model(params, "reference").state_dict()
    except RuntimeError as failure:
        raise ValueError("params: impossible sizes") from failure
    state_dict = _checked_state(content["state_dict"], weights)
    optimizer = _checked_optimizer(content["optimizer"], weights)
    best_acc = torch.as_tensor(content["best_acc"]).double().reshape(())
    _check_tensor("best_acc", best_acc, torch.Size([]))
    checkpoint = {"sample": 0, "history": [], "running": {}, "time_stamp": "", "log_dir": ""} | content
    _check_position(checkpoint)
    if "digest" in content and content["digest"] != digest({key: content[key] for key in KEYS}):
        raise ValueError("damaged, its contents do not have the digest they were written with; use another checkpoint")
    checked = {"params": params, "state_dict": state_dict, "optimizer": optimizer, "best_acc": best_acc}
    return {key: checkpoint[key] for key in KEYS} | checked


def _checked_params(params: Any) -> dict[str, Any]:
    """The options that make the network, its data and its training, through the table of options."""
    params = vars(params) if isinstance(params, argparse.Namespace) else params
    if not isinstance(params, dict) or not all(_is_plain(value) for value in params.values()):
        raise ValueError("params: not options")
    checked = {option.name: option.default for option in MODEL}  # what an older checkpoint lacks had its default
    for option in RECORDED:
        if option.name in params:
            value = params[option.name]
            try:
                # The published `inf_data` is true or false.
                checked[option.name] = option.convert(int(value) if option.name == "inf_data" else value)
            except (TypeError, ValueError) as wrong:
                raise ValueError(f"params: {option.name} {wrong}") from wrong
    if not isinstance(checked["sequence_length"], int):
        raise ValueError("params: sequence_length must be a whole number")
    return checked


def _is_plain(value: Any) -> bool:
    """Whether it is what an option can be."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, int) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _checked_state(state: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError("state_dict: not names and tensors")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    ones = state.pop(_NOT_LEARNED, None)
    if ones is not None and not (isinstance(ones, Tensor) and ones.numel() <= 1e8 and (ones == 1).all()):
        raise ValueError(f"state_dict: {_NOT_LEARNED} is not a matrix of ones")
    if differing := sorted(state.keys() ^ weights.keys()):
        raise ValueError(f"state_dict: {', '.join(differing)} missing or unknown")
    for name, weight in weights.items():
        _check_tensor(f"state_dict: {name}", state[name], weight.shape)
    return state


def _checked_optimizer(optimizer: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Adam's state, without the constant encoding matrix that published checkpoints count as their third parameter."""
    try:
        (group,), state = optimizer["param_groups"], optimizer["state"]
        parameters, moments = list(group["params"]), {number: dict(state[number]) for number in state}
        unusual = [name for name, usual in _ADAM.items() if repr(group.get(name, usual)) != repr(usual)]
    except (AttributeError, LookupError, TypeError, ValueError) as failure:
        raise ValueError("optimizer: not the state of Adam") from failure
    if unusual:
        raise ValueError(f"optimizer: {', '.join(unusual)} differ from PyTorch's defaults, with which this program trains")
    if parameters == [0, 1, 2, 3, 4, 5]:
        number = {0: 0, 1: 1, 3: 2, 4: 3, 5: 4}
        moments = {number.get(old, old): moment for old, moment in moments.items() if old != 2}
    elif parameters != [0, 1, 2, 3, 4]:
        raise ValueError("optimizer: not the parameters of this network")
    if moments and sorted(moments, key=repr) != [0, 1, 2, 3, 4]:
        raise ValueError("optimizer: parameters missing or unknown")
    for (name, weight), moment in zip(weights.items(), (moments[n] for n in sorted(moments)), strict=False):
        if not {"step", "exp_avg", "exp_avg_sq"} <= moment.keys():
            raise ValueError(f"optimizer: not the state of Adam for {name}")
        for average in ("exp_avg", "exp_avg_sq"):
            _check_tensor(f"optimizer: {average} of {name}", moment[average], weight.shape)
        step = moment["step"]
        _check_tensor(
            f"optimizer: step of {name}", step if isinstance(step, Tensor) else torch.tensor(float(step)), torch.Size([])
        )
        if float(step) < 0 or moment["exp_avg_sq"].min() < 0:
            raise ValueError(f"optimizer: the step or a mean square of {name} is negative or not finite")
    return {"state": moments, "param_groups": [group | {"params": [0, 1, 2, 3, 4]}]}


def _check_tensor(name: str, tensor: Any, shape: torch.Size) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
        raise ValueError(f"{name} is not a tensor of floating-point numbers")
    if tensor.shape != shape:
        raise ValueError(f"{name} is of shape {tuple(tensor.shape)}, not {tuple(shape)} as its params say")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds a number that is not finite")


def _check_position(checkpoint: dict[str, Any]) -> None:
    """Where a training stands, and the numbers of its past."""
    epoch, sample, history, running = (checkpoint[key] for key in ("epoch", "sample", "history", "running"))
    for name, value, end in (("epoch", epoch, 10**9), ("sample", sample, data.TRAINING_SAMPLES)):
        if type(value) is not int or not 0 <= value < end:
            raise ValueError(f"{name}: must be a whole number from 0 to {end - 1}")
    if not isinstance(history, list) or not all(isinstance(metrics, dict) for metrics in history):
        raise ValueError("history: not a list of dictionaries")
    if [metrics.get("epoch") for metrics in history] != list(range(epoch - len(history), epoch)):
        raise ValueError("history: not that of the epochs before this one")
    for metrics in history:
        _check_numbers("history", metrics | metrics.get("rates", {}), but="rates")
    if not isinstance(running, dict) or bool(running) != bool(sample):
        raise ValueError("running: not the sums over the samples of this epoch")
    _check_numbers("running", running)
    if not all(isinstance(checkpoint[key], str) for key in ("time_stamp", "log_dir")):
        raise ValueError("time_stamp or log_dir: not text")


def _check_numbers(what: str, numbers: dict[str, Any], but: str = "") -> None:
    for name, value in numbers.items():
        if not isinstance(name, str):
            raise ValueError(f"{what}: {name!r} is no name")
        if name != but and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{what}: {name} is not a finite number")


def digest(content: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and every bit of what a checkpoint holds, as 64 hexadecimal digits."""
    found = hashlib.sha256()
    for part in _bytes_of(content):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def _bytes_of(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(value, (dict, list, tuple)):
        yield f"{'dict' if isinstance(value, dict) else type(value).__name__} {len(value)}".encode()
        for part in value.items() if isinstance(value, dict) else value:
            yield from _bytes_of(part)
    else:
        yield f"{type(value).__name__} {value!r}".encode()
