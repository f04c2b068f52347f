"""Checkpoints: written whole or not at all, read without executing anything they hold. The file format is described here.

A checkpoint is a `torch.save` dictionary of plain values and tensors. Evaluating and plotting need `params` and `state_dict`:

    params       option name -> value
    state_dict   parameter name -> tensor
    epoch        number of finished epochs, which is the epoch to resume in
    sample       training samples of that epoch already used (an interruption inside an epoch), else 0
    best_acc     highest validation accuracy so far, percent, a tensor
    optimizer    state of Adam
    history      one dictionary per epoch, the lines of the metrics file
    running      sums over the samples of the unfinished epoch
    parts        of a network saved by `save_model`: class and constants of a neuron or a rule that is not the published one

The original implementation's checkpoints are read, too: their `params` is an `argparse.Namespace`, their parameter names may
carry the prefix `module.`, and they hold `encoding_layer.encoding`, a matrix of ones that is not learned.
"""

import argparse
import contextlib
import hashlib
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

import models
from models import Dynamics, MemorizingAssociations, Sizes
from models.neurons import LIFNeuron
from models.operands import refuse_misspelled
from models.plasticity import HebbianRule
from utils.errors import UserError, shown

LAST = "checkpoint.pth.tar"
BEST = "model_best.pth.tar"

_ABSENT: dict[str, Any] = {
    "epoch": 0,
    "sample": 0,
    "best_acc": 0.0,
    "optimizer": None,
    "history": [],
    "running": {},
    "parts": {},
}
_NOT_LEARNED = "encoding_layer.encoding"
_FOREIGN = "not a checkpoint of this program or of the original implementation"
_PARTS = {"neuron": LIFNeuron, "rule": HebbianRule}  # the published ones
DEFAULTS = {"sequence_length": 10} | models.defaults()  # of the options that a network has


# A trained network, for use as a library


def load_model(
    path: str | Path, backend: str | Callable = "auto", *, neuron: Any = None, rule: Any = None
) -> MemorizingAssociations:
    """A trained network from a checkpoint, on the CPU.

    Args:
        backend: as of `models.MemorizingAssociations`.
        neuron, rule: those of the network, where it was saved with others than `LIFNeuron` and `HebbianRule`.

    Raises:
        UserError: no such file, damaged, no checkpoint, or of another neuron or rule.
    """
    with torch.device("cpu"):  # whatever the caller's default device is
        checkpoint = load(path, neuron=neuron, rule=rule)
        try:
            with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced
                model = models.build_model(checkpoint["params"], backend, neuron, rule)
        except ValueError as wrong:
            raise UserError(f"{path}: {wrong}") from wrong
        model.to(next(iter(checkpoint["state_dict"].values())).dtype)
        load_weights(model, checkpoint["state_dict"], path)
    return model


def save_model(path: str | Path, model: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Save a network so that `load_model` takes it, and, with the published neuron and rule, --evaluate and the plot script.

    Args:
        model: a `MemorizingAssociations`, or one that `torch.compile`, `DistributedDataParallel` or `AveragedModel` wraps.
        options: more to record, such as the `sequence_length` that it was trained with.

    Raises:
        ValueError: not such a network, a misspelled option, or one that is not this network's.
        UserError: the file cannot be written.
    """
    network: Any = model
    while not isinstance(network, MemorizingAssociations):
        network = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if network is None:
            raise ValueError(f"save_model takes a MemorizingAssociations, not {type(model).__name__}")
    dynamics, options = network.dynamics, options or {}
    refuse_misspelled(options, list(DEFAULTS))
    owners = ((network.sizes, Sizes), (dynamics, Dynamics), (dynamics.neuron, LIFNeuron), (dynamics.rule, HebbianRule))
    own = {field.name: getattr(part, field.name, None) for part, kind in owners for field in fields(kind) if field.metadata}
    # Plain numbers: a NumPy number, which is a float, too, is more than a reader of plain values takes.
    own = {name: type(DEFAULTS[name])(value) for name, value in own.items() if isinstance(value, bool | int | float)}
    for name, value in options.items():
        if own.get(name, value) != value:
            raise ValueError(f"{name} {value}: the network has {own[name]}")
    content = {"params": DEFAULTS | dict(options) | own, "state_dict": _own_names(network.state_dict())}
    own_parts = {name: getattr(dynamics, name) for name in _PARTS}
    content["parts"] = {name: _described(part) for name, part in own_parts.items() if type(part) is not _PARTS[name]}
    _check_shapes(content["params"], content["state_dict"])
    save(Path(path), content)


def _described(part: Any) -> dict[str, Any]:
    """The class of a neuron or rule, and its constants; others than plain ones as text."""
    values = {field.name: getattr(part, field.name) for field in fields(part)} if is_dataclass(part) else {}
    described = {name: _plain(value) for name, value in values.items()}
    return {"class": f"{type(part).__module__}.{type(part).__qualname__}", "fields": described}


def _plain(value: Any) -> Any:
    """A constant as a plain value that is the same in every process."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"tensor {value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)


def _check_parts(parts: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ValueError where neuron and rule are not those that a checkpoint was saved with. Classes are compared by name, and
    nothing is imported."""
    for name, usual in _PARTS.items():
        wanted, part = parts.get(name), given.get(name)
        if wanted and part is None:
            constants = ", ".join(f"{field}={value}" for field, value in wanted["fields"].items())
            raise ValueError(f"its {name} is {wanted['class']}({constants}); give it: load_model(path, {name}=...)")
        if part is not None:
            ours, theirs = _described(part), wanted or {"class": f"{usual.__module__}.{usual.__qualname__}"}
            differs = ours["class"].split(".")[-1] != theirs["class"].split(".")[-1]
            if differs or ours["fields"] != theirs.get("fields", ours["fields"]):
                raise ValueError(f"its {name} is {theirs}, not {ours}")


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """`model.load_state_dict`. Raises UserError, naming the file, where names or shapes differ."""
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as failure:
        reasons = "; ".join(line.strip() for line in str(failure).splitlines()[1:])
        raise UserError(f"{path}: does not fit the network ({reasons})") from failure


# Writing


def save(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` holds, at any moment, the old one or the new one, whole.

    Raises:
        UserError: the file cannot be written; what stood there stays.
    """
    write_atomically(path, lambda file: torch.save(dict(checkpoint), file))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace a file by what `write(binary file)` writes: a temporary file in the same folder, fsync, rename.

    Raises:
        UserError: it cannot be written; what stood there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # never what somebody else put there, such as a link
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as failure:  # PyTorch's writer of archives turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(failure, "strerror", None) or str(failure).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); make room or choose another --output_dir") from failure
    with contextlib.suppress(OSError):  # some file systems cannot synchronize a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_left_behind(path: Path) -> None:
    """Remove the temporary files of writers of `path` that were killed. Nobody may be writing it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


# Reading


def load(path: str | Path, *, neuron: Any = None, rule: Any = None) -> dict[str, Any]:
    """Read a checkpoint: every key described above, the original implementation's converted. What may be absent has the value
    of a new training; `optimizer` is None where the file holds no state of Adam for this network.

    Nothing in the file is executed: only tensors and plain values are unpickled.

    Args:
        neuron, rule: as of `load_model`.

    Raises:
        UserError: no such file, damaged, not such a checkpoint, or of another neuron or rule.
    """
    try:
        content = _read(Path(path))
        if not isinstance(content, dict) or not {"params", "state_dict"} <= content.keys():
            raise ValueError(_FOREIGN)
        checkpoint = {key: content.get(key, value) for key, value in _ABSENT.items()}
        for name, part in checkpoint["parts"].items():
            _check_plain(f"parts: {name}", part["fields"] | {"class": part["class"]})
        _check_parts(checkpoint["parts"], {"neuron": neuron, "rule": rule})
        params, state_dict = content["params"], _own_names(content["state_dict"])
        if isinstance(params, argparse.Namespace):
            params = vars(params) | {"inf_data": int(params.inf_data)}
        params = _checked_constants(DEFAULTS | params)
        _check_shapes(params, state_dict, [_NOT_LEARNED] if isinstance(content["params"], argparse.Namespace) else [])
        if not (state_dict.pop(_NOT_LEARNED, torch.ones(())) == 1).all():
            raise ValueError(f"state_dict: {_NOT_LEARNED} is not a matrix of ones")
        checkpoint |= {"params": params, "state_dict": state_dict, "optimizer": _adam(checkpoint["optimizer"], state_dict)}
        checkpoint["best_acc"] = float(checkpoint["best_acc"])
        checkpoint["history"] = [metrics_line(line) for line in checkpoint["history"]]
        checkpoint["running"] = _running(checkpoint["running"])
        _check_numbers(checkpoint)
    except FileNotFoundError as failure:
        raise UserError(f"{path}: no such file; give a checkpoint (...pth.tar) or the folder of a run") from failure
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror or failure}") from failure
    except ValueError as failure:
        raise UserError(f"{path}: {shown(failure)}") from failure
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError) as failure:
        raise UserError(f"{path}: {_FOREIGN}") from failure
    return checkpoint


def find(folder: Path, names: tuple[str, ...] = (LAST, BEST), quiet: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The first whole checkpoint of these names in a run folder and its path, or None. What is damaged is reported.

    Raises:
        UserError: there are checkpoints, and none is whole (with `quiet`: None).
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
            for reason in failures:
                print(f"warning: {reason}; going back to {path}, of epoch {checkpoint['epoch']}", flush=True)
            return path, checkpoint
    if failures and not quiet:
        raise UserError("; ".join(failures))
    return None


def _read(path: Path) -> Any:
    """What a `torch.save` file holds. Raises OSError, or ValueError saying what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("refused, it is compressed, which torch.save never does")
                if entry.external_attr & 0x10:  # marked as a folder, it would be read as whatever stands in memory
                    raise ValueError(f"damaged in {entry.filename!r}; use another checkpoint")
            if damaged := archive.testzip():
                raise ValueError(f"damaged in {damaged!r}; use another checkpoint")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as failure:
        raise ValueError("refused, it holds more than tensors and plain values") from failure
    except FileNotFoundError:
        raise
    except OSError as failure:
        if failure.errno and failure.filename:
            raise
        raise ValueError("damaged, or not a checkpoint; use another one") from failure
    except ValueError:
        raise
    except Exception as failure:  # there is no telling what a damaged archive or pickle raises
        raise ValueError("damaged, or not a checkpoint; use another one") from failure


def _own_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel, `torch.compile` and AveragedModel add to the names."""
    names = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state_dict.items()}
    return {name: value for name, value in names.items() if name != "n_averaged"}


def _checked_constants(params: dict[str, Any]) -> dict[str, Any]:
    """The options of a network, which must be possible. Raises ValueError."""
    try:
        _check_plain("params", params)
        models.constants(params)
    except ValueError as wrong:
        raise ValueError(f"params: {wrong}") from wrong
    return params


def _check_plain(where: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError for what is no number, word or list of them: nests may unfold without an end, as may whole numbers."""
    for name, value in values.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(one, bool | int | float | str | None) or (isinstance(one, int) and abs(one) >= 2**63):
                raise ValueError(f"{where}: {short(name)} must be a number of 64 bits, a word, or a list of them")


def _check_shapes(params: Mapping[str, Any], state_dict: Mapping[str, Tensor], optional: Collection[str] = ()) -> None:
    """See that weights have the sizes of the options and storages of their own size, before anything is built from either."""
    classes, features, embedding, memory = (params[n] for n in ("num_classes", "feature_size", "embedding_size", "memory_size"))
    wanted = {
        "input_layer.weight": (embedding, features),
        "embedding_layer.embedding.weight": (classes, embedding),
        "writing_layer.W": (2 * memory, 2 * embedding),
        "reading_layer.W": (memory, embedding + memory),
        "output_layer.weight": (classes, memory),
    }
    wanted |= {name: (embedding, embedding) for name in optional if name in state_dict}
    found = {name: tuple(weight.shape) for name, weight in state_dict.items()}
    if wrong := [f"{n} {found.get(n)}, not {wanted.get(n)}" for n in {**wanted, **found} if found.get(n) != wanted.get(n)]:
        raise ValueError(f"does not fit the network ({'; '.join(wrong)})")
    for name, weight in state_dict.items():
        size = weight.numel() * weight.element_size()
        if not weight.is_floating_point() or weight.is_meta or weight.untyped_storage().nbytes() < size:
            raise ValueError(f"state_dict: {name} holds other elements than the file")


def _adam(optimizer: Any, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Adam's state without the matrix of ones, which counts as the third parameter in the original implementation.

    None where it is not that of an Adam with PyTorch's defaults over these weights.
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
            if any(mean.shape != weight.shape for mean in means):
                return None
            moments[new] = {"step": torch.tensor(float(step))}  # PyTorch before 1.12 counted in a plain number
            moments[new] |= {"exp_avg": means[0].contiguous(), "exp_avg_sq": means[1].contiguous()}
        if any(group.get(name, value) != value for name, value in usual.items()):
            return None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    return {"state": moments, "param_groups": [usual | {"lr": float(group["lr"]), "params": list(moments)}]}


def _check_numbers(checkpoint: Mapping[str, Any]) -> None:
    """Raises ValueError for a number that is not finite, a count that is none, and a mean square that has no root."""
    for name in ("epoch", "sample"):
        if not (type(checkpoint[name]) is int and 0 <= checkpoint[name] < 10**9):
            raise ValueError(f"{name}: must be a whole number from 0")
    tensors = checkpoint["state_dict"] | {"best_acc": torch.tensor(checkpoint["best_acc"])}
    for number, moment in checkpoint["optimizer"]["state"].items() if checkpoint["optimizer"] else ():
        tensors |= {f"optimizer: {part} of parameter {number}": moment[part] for part in ("step", "exp_avg")}
        tensors[f"optimizer: exp_avg_sq of parameter {number}"] = moment["exp_avg_sq"].sqrt()
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    for part, numbers in ("running", checkpoint["running"]), *(("history", line) for line in checkpoint["history"]):
        plain = {name: value if type(value) in (int, float) else math.nan for name, value in numbers.items()}
        broken += [f"{part}: {name}" for name, value in plain.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"{', '.join(broken)}: holds a number that is not finite; use another checkpoint")


def metrics_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the metrics: that of an earlier release (nested rates, epochs counted from 0) in today's form."""
    if "rates" not in line:
        return dict(line)
    others = {name: value for name, value in line.items() if name != "rates"}
    return others | {"epoch": line["epoch"] + 1} | line["rates"]


# Sums of an unfinished epoch of v0.3: their names today, and what they are multiplied by.
_RENAMED = {"loss": ("train_loss", 1), "accuracy": ("train_accuracy", 100), "regularization": ("rate_regularization", 1)}


def _running(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums of an unfinished epoch, those of v0.3 in today's form."""
    today = {name: _RENAMED.get(name, (name, 1)) for name in sums}
    return {today[name][0]: today[name][1] * value for name, value in sums.items()}
