"""The device and the backend that a network runs on."""

import torch

import models
from utils import distributed
from utils.distributed import print_rank0
from utils.errors import UserError
from utils.options import Options


def choose_device(options: Options) -> torch.device:
    """The device of --gpu or --device; one that comes from a checkpoint and is not here gives way to `auto`.

    Raises:
        UserError: there is no such device here.
    """
    name = f"cuda:{options['gpu']}" if options["gpu"] is not None else options["device"]
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        if not options.given & {"device", "gpu"}:
            return torch.device("cpu")
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return device


def choose_backend(model: torch.nn.Module, device: torch.device, options: Options) -> str:
    """The backend that runs a network, which proves here that it computes it. Prints which one, and why not a faster one.

    One that comes from a checkpoint and does not run here gives way to `auto`.

    Raises:
        models.BackendError: the backend asked for by name cannot run this network here.
    """
    try:
        backend, why_not = model.prepare_backend(device.type)
    except models.BackendError as error:
        if distributed.broadcast_object("backend" in options.given):
            raise
        print_rank0(f"the checkpoint's run used another backend: {error}")
        model.backend = "auto"
        backend, why_not = model.prepare_backend(device.type)
    reasons = (f" ({name}: {why})" for name, why in why_not.items() if name != "triton" or device.type == "cuda")
    line = f"backend {backend} on {device}{''.join(reasons)}"
    if device.type == "cpu" and torch.cuda.is_available() and not options.given & {"device", "gpu"}:
        line += "; there is a GPU, which --device cuda --backend auto uses"
    print_rank0(line)
    return backend
