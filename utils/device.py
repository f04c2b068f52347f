"""The device that a network runs on."""

import torch

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
