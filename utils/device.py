"""The device and the backend that a network runs on."""

import torch

import models
from models import backends
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
    return device if device.type == "cpu" else torch.device("cuda", device.index or 0)


def choose_backend(model: models.MemorizingAssociations, device: torch.device, options: Options) -> str:
    """The backend that runs a network on a device, which is checked here. Prints which one it is.

    One that comes from a checkpoint and does not run here gives way to `auto`.

    Raises:
        models.BackendError: the backend asked for by name cannot run this network here.
    """
    try:
        backend = backends.choose(model.backend, str(device), model.dynamics, models.store_and_recall)
    except models.BackendError as error:
        if distributed.broadcast_object("backend" in options.given):
            raise
        print_rank0(f"the checkpoint's run used another backend: {error}")
        model.backend = "auto"
        backend = backends.choose(model.backend, str(device), model.dynamics, models.store_and_recall)
    line = f"backend {backend} on {device.type}"
    if device.type == "cpu" and torch.cuda.is_available() and not options.given & {"device", "gpu"}:
        line += "; there is a GPU, which --device cuda --backend auto uses"
    print_rank0(line)
    return backend
