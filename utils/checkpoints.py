"""Checkpoints: written whole or not at all, read without executing anything they hold. The file format is described here.

A checkpoint is a `torch.save` dictionary of plain values and tensors, under the keys of the published program. Evaluating and
plotting need `params` and `state_dict` only:

    params       option name -> value
    state_dict   parameter name -> tensor
    epoch        number of finished epochs, which is the epoch to resume in
    sample       training samples of that epoch already used (an interruption inside an epoch), else 0
    best_acc     highest validation accuracy so far, percent, a tensor
    optimizer    state of Adam
    history      one dictionary per epoch, the lines of the metrics file
    running      sums over the samples of the unfinished epoch
    time_stamp, log_dir
    parts        of a network saved by `save_model`: class and constants of a neuron or a rule that is not the published one
    digest       SHA-256 over all the others

The digest vouches for a file of this program. Published checkpoints have none, and are converted and checked: their `params` is
an `argparse.Namespace`, their parameter names may carry the prefix `module.`, and they hold `encoding_layer.encoding`, a matrix
of ones that is not learned. A file of weights alone, `torch.save(model.state_dict(), path)`, is read, too.
"""

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

import models
from models import Dynamics, MemorizingAssociations, Sizes
from models.neurons import LIFNeuron
from models.operands import refuse_misspelled
from models.plasticity import HebbianRule
from utils.errors import UserError
from utils.options import MODEL, RECORDED, REMOVED, SEQUENCE_LENGTH, check_removed

LAST = "checkpoint.pth.tar"
BEST = "model_best.pth.tar"

# What a checkpoint need not hold.
_ABSENT = {"epoch": 0, "sample": 0, "best_acc": torch.tensor(0.0), "optimizer": None, "history": [], "running": {}}
_ABSENT |= {"time_stamp": "", "log_dir": "", "parts": {}}
_NOT_LEARNED = "encoding_layer.encoding"
# PyTorch's defaults, with which this program and the published one train.
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "maximize": False}
_FOREIGN = "not a checkpoint of this program or of the published one"


# A trained network, for use as a library


def load_model(
    path: str | Path, backend: str | Callable = "auto", *, neuron: Any = None, rule: Any = None, **options: Any
) -> MemorizingAssociations:
    """A trained network from a checkpoint, on the CPU.

    Args:
        backend: as of `models.MemorizingAssociations`.
        neuron, rule: those of the network, where it was saved with others than `LIFNeuron` and `HebbianRule`.
        options: model options, for a file of weights alone, which does not hold them.

    Raises:
        TypeError: no such model option.
        UserError: no such file, damaged, no network of this program, of another neuron or rule, or of other options.
    """
    if unknown := sorted(options.keys() - {option.name for option in MODEL}):
        raise TypeError(f"load_model: {', '.join(unknown)} is no model option")
    checkpoint = load(path, options, neuron=neuron, rule=rule)
    params, state_dict = checkpoint["params"], checkpoint["state_dict"]
    for name, value in options.items():
        if params[name] != value:
            raise UserError(f"{path}: {name} is {params[name]!r}, not {value!r}; leave it out")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # initial weights are drawn, and replaced
            model = models.build_model(params, backend, neuron, rule)
    except ValueError as wrong:
        raise UserError(f"{path}: {wrong}") from wrong
    model.to(next(iter(state_dict.values())).dtype)
    load_weights(model, state_dict, path)
    return model


def save_model(path: str | Path, model: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Save a network so that `load_model` takes it, and, with the published neuron and rule, --evaluate and the plot script.

    Args:
        model: a `MemorizingAssociations`, or one that `torch.compile`, `DistributedDataParallel` or `AveragedModel` wraps.
        options: more to record, such as the `sequence_length` that it was trained with.

    Raises:
        ValueError: not such a network, an impossible or misspelled option, or one that is not this network's.
        UserError: the file cannot be written.
    """
    network = model
    while not isinstance(network, MemorizingAssociations):
        network = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if network is None:
            raise ValueError(f"save_model takes a MemorizingAssociations, not {type(model).__name__}")
    refuse_misspelled(options or {}, [option.name for option in MODEL])
    dynamics = network.dynamics
    owners = ((network.sizes, Sizes), (dynamics, Dynamics), (dynamics.neuron, LIFNeuron), (dynamics.rule, HebbianRule))
    own = {field.name: getattr(part, field.name, None) for part, kind in owners for field in fields(kind) if field.metadata}
    # Plain numbers: a NumPy number, which is a float, too, is more than a reader of plain values takes.
    params = {o.name: o.kind(own[o.name]) if isinstance(own.get(o.name), bool | int | float) else o.default for o in MODEL}
    for option in MODEL:
        if option.name in (options or {}):
            try:
                value = option.convert(options[option.name])
            except ValueError as wrong:
                raise ValueError(f"{option.name} {wrong}") from None
            if option is not SEQUENCE_LENGTH and value != params[option.name]:
                raise ValueError(f"{option.name} {value}: the network has {params[option.name]}")
            params[option.name] = value
    content = {"params": params, "state_dict": _own_names(network.state_dict()), "parts": {}}
    for name, usual in _USUAL_PARTS.items():
        if type(part := getattr(dynamics, name)) is not usual:
            content["parts"][name] = _described(part)
    with torch.random.fork_rng(devices=[]):
        usual_network = models.build_model(params, "reference", dynamics.neuron, dynamics.rule)
        load_weights(usual_network, content["state_dict"], path)
    save(Path(path), content)


_USUAL_PARTS = {"neuron": LIFNeuron, "rule": HebbianRule}


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
    for name, usual in _USUAL_PARTS.items():
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
    archive = io.BytesIO()
    torch.save({**checkpoint, "digest": digest(checkpoint)}, archive)
    write_atomically(path, lambda file: file.write(archive.getbuffer()))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replace a file by what `write(binary file)` writes: a temporary file in the same folder, fsync, rename.

    Raises:
        UserError: it cannot be written; what stood there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as failure:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"{path}: cannot be written ({failure.strerror}); make room or choose another --output_dir"
        ) from failure


def remove_left_behind(path: Path) -> None:
    """Remove the temporary files of writers of `path` that were killed. Nobody may be writing it."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


# Reading


def load(path: str | Path, given: Mapping[str, Any] | None = None, *, neuron: Any = None, rule: Any = None) -> dict[str, Any]:
    """Read a checkpoint: every key described above but the digest, published ones converted.

    `optimizer` is None where the file holds no state of Adam for this network, and what else may be absent has the value of a
    new training. A warning names the model options that the file does not hold and that are taken as their defaults.

    Nothing in the file is executed: only tensors and plain values are unpickled.

    Args:
        given: model options for a file of weights alone.
        neuron, rule: as of `load_model`.

    Raises:
        UserError: no such file, damaged, not such a checkpoint, or of another neuron or rule.
    """
    try:
        content = _read(Path(path))
        if not isinstance(content, dict):
            raise ValueError(_FOREIGN)
        if "digest" not in content:
            content = _converted(content)
        elif content.pop("digest") != digest(content):
            raise ValueError(
                "damaged: its contents do not have the digest they were written with; use another checkpoint (or, where they "
                "were changed on purpose, remove the digest, too)"
            )
        _check_parts(content.get("parts", {}), {"neuron": neuron, "rule": rule})
        params = content.get("params")
        if params is None:
            params = _params_of_weights(content["state_dict"], given or {})
        params, missing = _completed(vars(params) if isinstance(params, argparse.Namespace) else params)
        if missing and not isinstance(content.get("params"), argparse.Namespace):  # that program knows no others
            assumed = ", ".join(f"{name} {params[name]}" for name in missing)
            warnings.warn(f"{path} does not hold every model option; assumed: {assumed}", stacklevel=2)
    except FileNotFoundError as failure:
        raise UserError(f"{path}: no such file; give a checkpoint (...pth.tar) or the folder of a run") from failure
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror or failure}") from failure
    except ValueError as failure:
        raise UserError(f"{path}: {failure}") from failure
    except (ArithmeticError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError) as failure:
        raise UserError(f"{path}: {_FOREIGN}") from failure
    checkpoint = {key: content.get(key, value) for key, value in _ABSENT.items()}
    if not (checkpoint["optimizer"] or {}).get("state"):
        checkpoint["optimizer"] = None
    return checkpoint | {"params": params, "state_dict": content["state_dict"]}


def find(folder: Path, names: tuple[str, ...] = (LAST, BEST)) -> tuple[Path, dict[str, Any]] | None:
    """The first whole checkpoint of these names in a run folder and its path, or None. What is damaged is reported.

    Raises:
        UserError: there are checkpoints, and none is whole.
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
            for failure in failures:
                print(f"warning: {failure}; going back to {path}, of epoch {checkpoint['epoch']}", flush=True)
            return path, checkpoint
    if failures:
        raise UserError("; ".join(failures))
    return None


def _read(path: Path) -> Any:
    """What a `torch.save` file holds. Raises OSError, or ValueError saying what is wrong with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            # A record that is marked as a folder (0x10) would be read as whatever stands in memory.
            folders = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
            if damaged := archive.testzip() or next(folders, None):
                raise ValueError(f"damaged in {damaged!r}; use another checkpoint")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as failure:
        raise ValueError("refused, it holds more than tensors and plain values") from failure
    except (OSError, ValueError):
        raise
    except Exception as failure:  # there is no telling what a damaged archive or pickle raises
        raise ValueError("damaged, or not a checkpoint; use another one") from failure


# Files for which no digest vouches


def _converted(content: dict[str, Any]) -> dict[str, Any]:
    """A published checkpoint, one that somebody stripped, or weights alone, in our form: checked."""
    if "state_dict" not in content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"state_dict": content}
    state_dict = _own_names(content["state_dict"])
    ones = state_dict.pop(_NOT_LEARNED, torch.ones(()))
    if not (ones == 1).all():
        raise ValueError(f"state_dict: {_NOT_LEARNED} is not a matrix of ones")
    params, epoch, best_acc = (content.get(key) for key in ("params", "epoch", "best_acc"))
    if not (epoch is None or (type(epoch) is int and 0 <= epoch < 10**9)):
        raise ValueError("epoch: must be a whole number from 0")
    best_acc = torch.as_tensor(best_acc or 0.0).double().reshape(())
    optimizer = _adam(content.get("optimizer"), state_dict)
    tensors = state_dict | {"best_acc": best_acc}
    for number, moment in optimizer["state"].items() if optimizer else ():
        # A mean square that is negative, which cannot be, has no root.
        tensors |= {f"optimizer: {part} of parameter {number}": moment[part] for part in ("step", "exp_avg")}
        tensors[f"optimizer: exp_avg_sq of parameter {number}"] = moment["exp_avg_sq"].sqrt()
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{', '.join(broken)}: holds a number that is not finite; use another checkpoint")
    return {"params": params, "state_dict": state_dict, "epoch": epoch or 0, "best_acc": best_acc, "optimizer": optimizer}


def _own_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel, `torch.compile` and AveragedModel add to the names."""
    names = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state_dict.items()}
    return {name: value for name, value in names.items() if name != "n_averaged"}


def _adam(optimizer: Any, weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Adam's state without the matrix of ones, which counts as the third parameter in published checkpoints.

    None where it is not that of an Adam with PyTorch's defaults over these weights.
    """
    try:
        (group,), state = optimizer["param_groups"], optimizer["state"]
        numbers = list(group["params"])
        if len(numbers) == len(weights) + 1:
            del numbers[2]
        # PyTorch before 1.12 counted the steps in a plain number.
        moments = {new: state[old] | {"step": torch.as_tensor(state[old]["step"]).float()} for new, old in enumerate(numbers)}
        for moment, weight in zip(moments.values(), weights.values(), strict=True):
            if (moment["step"].ndim, moment["exp_avg"].shape, moment["exp_avg_sq"].shape) != (0, weight.shape, weight.shape):
                return None
        if any(group.get(name, usual) != usual for name, usual in _ADAM.items()):
            return None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    return {"state": moments, "param_groups": [group | {"params": list(moments)}]}


# Options


def _params_of_weights(state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a network whose weights are all that is known, and the model options that are given."""
    num_classes, memory_size = state_dict["output_layer.weight"].shape
    embedding_size, feature_size = state_dict["input_layer.weight"].shape
    sizes = {"num_classes": num_classes, "memory_size": memory_size}
    sizes |= {"embedding_size": embedding_size, "feature_size": feature_size}
    params = {option.name: given[option.name] for option in MODEL if option.name in given} | sizes
    if isinstance(length := params.get("sequence_length"), tuple):  # those to evaluate
        params["sequence_length"] = max(length)
    return params


def _completed(params: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of a run, through the table of options, and the names of the missing ones that take their defaults."""
    completed = {}
    for option in RECORDED:
        if option.name in params:
            value = params[option.name]
            try:
                # The published `inf_data` is true or false.
                completed[option.name] = option.convert(int(value) if option.name == "inf_data" else value)
            except (TypeError, ValueError) as wrong:
                raise ValueError(f"params: {option.name} {wrong}") from wrong
    for name in REMOVED.keys() & params:
        try:
            check_removed(name, params[name])
        except ValueError as wrong:
            raise ValueError(f"params: {name} {params[name]}: {wrong}") from None
    missing = {option.name: option.default for option in MODEL if option.name not in completed}
    return missing | completed, list(missing)


# The digest


def digest(content: Mapping[str, Any]) -> str:
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


def time_stamp() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
