"""The device and the backend that a network runs on."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from models import BackendError, backends
from utils.errors import UserError


def choose(name: str, gpu: int | None) -> torch.device:
    """The device of --gpu or --device, with its index.

    Raises:
        UserError: there is no such device here.
    """
    name = f"cuda:{gpu}" if gpu is not None else name
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return torch.device("cuda", device.index or 0)


def available(record: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's options without a device or a backend that is not available here, so that `auto` takes another one."""
    found = dict(record)
    if found.get("device") == "cuda" and not torch.cuda.is_available():
        del found["device"]
    if (backend := found.get("backend")) in backends.KERNELS:
        try:
            backends.load(backend, "cuda" if torch.cuda.is_available() and found.get("device") != "cpu" else "cpu")
        except BackendError as reason:
            print(f"the checkpoint's backend {backend} cannot run here: {reason}", file=sys.stderr)
            del found["backend"]
    return found


def unused_gpu(device: torch.device) -> str:
    """A hint if a CPU is used although there is a GPU."""
    return "; there is a GPU: use --device cuda --backend auto" if device.type == "cpu" and torch.cuda.is_available() else ""
