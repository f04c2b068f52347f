"""Checkpoints: written whole or not at all, and read without executing anything in them. This text describes the format.

A checkpoint is a `torch.save` dictionary of plain values and tensors. Evaluating and plotting need `params` and `state_dict`:

    params       option name -> value
    state_dict   parameter name -> tensor
    epoch        number of finished epochs, which is the epoch to resume in
    sample       training samples of that epoch already used, if a signal interrupted it, else 0
    best_acc     highest validation accuracy so far, percent, a tensor
    optimizer    state of Adam
    history      one dictionary per epoch, the lines of the metrics file
    running      sums over the samples of the unfinished epoch
    parts        text that describes an own neuron and an own rule, for comparison only: nothing is imported by its names

The original implementation's checkpoints can also be read: their `params` is an `argparse.Namespace`, their parameter names may
carry the prefix `module.`, and they hold `encoding_layer.encoding`, a matrix of ones that is not learned.
"""

import argparse
import contextlib
import hashlib
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

import models
from models import Dynamics, MemorizingAssociations
from models.neurons import LIFNeuron
from models.operands import refuse_misspelled
from models.plasticity import HebbianRule
from utils.errors import UserError, reason, shown

LAST = "checkpoint.pth.tar"
BEST = "model_best.pth.tar"
DEFAULTS = models.defaults()
_ONES = "encoding_layer.encoding"  # in the original implementation, not learned
_MORE = "refused, it holds more than tensors and plain values"
_FOREIGN = "not a checkpoint of this program or of the original implementation"


# A trained network, for use as a library


def load_model(
    path: str | Path, backend: str | Callable = "auto", *, neuron: Any = None, rule: Any = None
) -> MemorizingAssociations:
    """A trained network from a checkpoint, on the CPU.

    Args:
        backend: as in `models.MemorizingAssociations`.
        neuron, rule: the network's own neuron and rule, if it was saved with any.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint, or its neuron or rule differs.
    """
    checkpoint = load(path)
    try:
        with torch.device("meta"):  # the initial weights are replaced, so they take no memory and no random numbers
            model = models.build_model(checkpoint["params"], backend, neuron, rule)
    except ValueError as wrong:
        raise UserError(f"{path}: {wrong}") from wrong
    _check_parts(model, checkpoint["parts"], path)
    model.load_state_dict(checkpoint["state_dict"], assign=True)
    return model


def save_model(path: str | Path, model: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Save a network for `load_model`, and, with the paper's neuron and rule, for --evaluate and the plot script.

    Args:
        model: a `MemorizingAssociations`, or one that `torch.compile`, `DistributedDataParallel` or `AveragedModel` wraps.
        options: more options to record, such as the `sequence_length` in training.

    Raises:
        ValueError: the model is no such network, or an option is misspelled or differs from the network's.
        UserError: the file cannot be written.
    """
    network: Any = model
    while not isinstance(network, MemorizingAssociations):
        network = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if network is None:
            raise ValueError(f"save_model takes a MemorizingAssociations, not {type(model).__name__}")
    dynamics, options = network.dynamics, options or {}
    refuse_misspelled(options, [*DEFAULTS, "sequence_length"])
    parts = (network.sizes, dynamics, dynamics.neuron, dynamics.rule)
    own = {name: getattr(part, name) for part in parts for name in DEFAULTS if hasattr(part, name)}
    # Plain numbers only: `load` refuses NumPy numbers, even those that are also Python floats.
    own = {name: type(DEFAULTS[name])(value) for name, value in own.items() if isinstance(value, bool | int | float)}
    for name, value in options.items():
        if own.get(name, value) != value:
            raise ValueError(f"{name} {value}: the network has {own[name]}")
    params, weights = DEFAULTS | dict(options) | own, _own_names(network.state_dict())
    _check_weights(params, weights, path)
    save(Path(path), {"params": params, "state_dict": weights, "parts": described(dynamics)})


def described(dynamics: Dynamics) -> str:
    """Classes and constants of an own neuron and an own rule, as a text that is the same in every process. The paper's neuron
    and rule are left out, because their constants are options."""
    texts = []
    for name, part in {"neuron": dynamics.neuron, "rule": dynamics.rule}.items():
        if type(part) not in (LIFNeuron, HebbianRule):
            constants = [f"{field}={_text(getattr(part, field))}" for field in getattr(part, "__dataclass_fields__", ())]
            texts.append(f"{name} {type(part).__name__}({', '.join(constants)})")
    return ", ".join(texts)


def _text(constant: Any) -> str:
    if isinstance(constant, Tensor):
        content = constant.detach().cpu().double().numpy().tobytes()
        return f"tensor {tuple(constant.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    constant = constant.item() if isinstance(constant, np.generic) else constant
    return getattr(constant, "__qualname__", None) or repr(constant)


def load_weights(model: MemorizingAssociations, checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Give a network the weights of a checkpoint. Raises UserError if the file's neuron, rule or sizes differ."""
    _check_parts(model, checkpoint["parts"], path)
    _fill(model, checkpoint["state_dict"], path)


def _check_parts(model: MemorizingAssociations, saved: str, path: str | Path) -> None:
    if saved != (own := described(model.dynamics)):
        usual = "the paper's neuron and rule"
        remedy = "give the file's by --neuron and --rule, or by load_model(path, neuron=..., rule=...)"
        raise UserError(f"{path}: has {shown(saved or usual)}, not {own or usual}; {remedy}")


def _fill(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as failure:
        reasons = shown("; ".join(line.strip() for line in str(failure).splitlines()[1:]))
        raise UserError(f"{path}: does not fit the network ({reasons})") from failure


# Writing


def save(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint. At any moment, `path` holds either the whole old file or the whole new file.

    Raises:
        UserError: the file cannot be written; the old file stays.
    """
    write_atomically(path, lambda file: torch.save(dict(checkpoint), file))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace a file by what `write(binary file)` writes: a temporary file in the same folder, fsync, rename.

    Raises:
        UserError: the file cannot be written; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # never a file or a link that somebody else put there
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as failure:  # PyTorch turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        why = reason(failure, path) if isinstance(failure, OSError) else str(failure).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({why}); make room or choose another --output_dir") from failure
    with contextlib.suppress(OSError):  # some file systems cannot synchronize a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_left_behind(path: Path) -> None:
    """Remove the temporary files of killed writers of `path`. No process may be writing `path`."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


# Reading


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, also of the original implementation: the result has every key described above.

    A key that the file lacks has the value of a new run; `optimizer` is None if the file holds no state of Adam for this
    network. Nothing in the file is executed: only tensors and plain values are unpickled.

    Raises:
        UserError: the file is missing, damaged or not a checkpoint.
    """
    path = Path(path)
    try:
        content = _read(path)
        if not isinstance(content, dict) or not {"params", "state_dict"} <= content.keys():
            raise ValueError(_FOREIGN)
        params, weights = _options(content["params"]), _own_names(content["state_dict"])
        _check_weights(params, weights, path)
        if not (weights.pop(_ONES, torch.ones((), device="cpu")) == 1).all():
            raise ValueError(f"state_dict: {_ONES} is not a matrix of ones")
        checkpoint = {
            "params": params,
            "state_dict": {name: _finite(name, weight) for name, weight in weights.items()},
            "epoch": _count("epoch", content.get("epoch", 0)),
            "sample": _count("sample", content.get("sample", 0)),
            "best_acc": _number("best_acc", float(content.get("best_acc", 0.0))),
            "optimizer": _adam(content.get("optimizer", None), weights),
            "history": [_numbers("history", metrics_line(line)) for line in content.get("history", ())],
            "running": _today(_numbers("running", content.get("running", {}))),
            "parts": _word("parts", content.get("parts", "")),
        }
    except OSError as failure:
        remedy = "; give a checkpoint (...pth.tar) or the folder of a run"
        raise UserError(f"{path}: {reason(failure, path)}{remedy}") from failure
    except ValueError as failure:
        raise UserError(f"{path}: {shown(failure)}") from failure
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError) as failure:
        raise UserError(f"{path}: {_FOREIGN}") from failure
    return checkpoint


def find(folder: Path, names: tuple[str, ...] = (LAST, BEST), quiet: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The path and content of the first undamaged checkpoint of these names in a run folder, or None. Damaged checkpoints are
    reported.

    Raises:
        UserError: all checkpoints are damaged (with `quiet`: None).
    """
    failures = []
    for path in (folder / name for name in names):
        if not path.exists():
            continue
        try:
            checkpoint = load(path)
        except UserError as failure:
            failures.append(str(failure))
        else:
            for damage in failures:
                print(f"warning: {damage}; going back to {path}, of epoch {checkpoint['epoch']}", file=sys.stderr)
            return path, checkpoint
    if failures and not quiet:
        raise UserError("; ".join(failures))
    return None


def _read(path: Path) -> Any:
    """The content of a `torch.save` file. Raises OSError, or ValueError that says what is wrong with the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("refused, it is compressed, which torch.save never does")
                if entry.external_attr & 0x10:  # an entry marked as a folder would be read as arbitrary memory
                    raise ValueError(f"damaged in {entry.filename!r}; use another checkpoint")
                if entry.filename.endswith(".pkl") and b"bytearray" in archive.read(entry):  # a few bytes make one of any size
                    raise ValueError(_MORE)
            if damaged := archive.testzip():
                raise ValueError(f"damaged in {damaged!r}; use another checkpoint")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as failure:
        raise ValueError(_MORE) from failure
    except ValueError:
        raise
    except Exception as failure:  # a damaged archive or pickle may raise anything
        if isinstance(failure, OSError) and failure.filename:  # the file cannot be opened
            raise
        raise ValueError("damaged, or not a checkpoint; use another one") from failure


# The content of a file, checked and converted to today's form. Errors are ValueErrors.


def _plain(name: str, value: Any) -> Any:
    """A number, a word, or a list of them. Nested lists and longer integers are refused: they may be arbitrarily large."""
    for one in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(one, bool | int | float | str | None) or (isinstance(one, int) and abs(one) >= 2**63):
            raise ValueError(f"{name}: must be a 64-bit number, a word, or a list of them")
    return value


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: must be a word")
    return value


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 10**9:
        raise ValueError(f"{name}: must be a whole number from 0")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name}: holds a number that is not finite; use another checkpoint")
    return value


def _numbers(where: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(f"{where}: {name}", value) for name, value in values.items()}


def _finite(name: str, tensor: Tensor) -> Tensor:
    _number(name, float(tensor.abs().max()))  # not finite if any element is not
    return tensor


def _today(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums of an unfinished epoch; v0.3 had other names, and counted correct samples instead of percents."""
    renamed = {"loss": ("train_loss", 1), "accuracy": ("train_accuracy", 100), "regularization": ("rate_regularization", 1)}
    today = {name: renamed.get(name, (name, 1)) for name in sums}
    return {today[name][0]: today[name][1] * value for name, value in sums.items()}


def metrics_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the metrics; v0.3 nested the rates, and counted epochs from 0."""
    if "rates" not in line:
        return {**line}
    others = {name: value for name, value in line.items() if name != "rates"}
    return others | {"epoch": line["epoch"] + 1} | line["rates"]


def _options(params: Any) -> dict[str, Any]:
    """The options, checked; the original implementation keeps them in a namespace."""
    if isinstance(params, argparse.Namespace):
        params = vars(params) | {"inf_data": int(params.inf_data)}
    params = {name: _plain(f"params: {name}", value) for name, value in params.items()}
    models.constants(params)
    return DEFAULTS | params


def _own_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, without the prefixes and counts of DistributedDataParallel, `torch.compile` and AveragedModel."""
    names = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state_dict.items()}
    return {name: value for name, value in names.items() if name != "n_averaged"}


def _check_weights(params: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that weights have storages of their own size and fit the options, before a network is built from them."""
    for name, weight in weights.items():
        size = weight.numel() * weight.element_size()
        if not weight.is_floating_point() or weight.is_meta or weight.untyped_storage().nbytes() < size:
            raise ValueError(f"state_dict: {name} must hold floats, all of them in the file")
    with torch.device("meta"):  # without memory
        network = MemorizingAssociations(*models.constants(params))
    _fill(network, {name: weight.to("meta") for name, weight in weights.items() if name != _ONES}, path)


def _adam(optimizer: Any, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Adam's state without the matrix of ones, which counts as the third parameter in the original implementation.

    None if it is not the state of an Adam with PyTorch's defaults for these weights.
    """
    usual = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}
    try:
        (group,), state = optimizer["param_groups"], optimizer["state"]
        numbers = list(group["params"])
        if len(numbers) == len(weights) + 1:
            del numbers[2]
        moments = {}
        for new, (old, weight) in enumerate(zip(numbers, weights.values(), strict=True)):
            step, *means = (state[old][part] for part in ("step", "exp_avg", "exp_avg_sq"))
            if float(step) < 0 or any(mean.shape != weight.shape for mean in means):
                return None
            moments[new] = {"step": torch.tensor(float(step), device="cpu")}  # before PyTorch 1.12, steps were a plain number
            moments[new] |= {"exp_avg": means[0].contiguous(), "exp_avg_sq": means[1].contiguous()}
        if any(group.get(name, value) != value for name, value in usual.items()):
            return None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    for number, moment in moments.items():
        for part, tensor in (moment | {"exp_avg_sq": moment["exp_avg_sq"].sqrt()}).items():
            _finite(f"optimizer: {part} of parameter {number}", tensor)
    return {"state": moments, "param_groups": [usual | {"lr": float(group["lr"]), "params": list(moments)}]}
