"""Fused GPU kernels in Triton, one file per operation, with cuBLAS products between them.

Experimental: the kernels have not run on a GPU yet. The tests ran them in the interpreter of Triton 3.7.1, and Triton compiled
them for an H100.

Shapes: B batch, L pairs in a sequence, T time steps an input is held, E embedding size, M memory size. The operations take the
arguments of the plain ones (`models.neurons.population`, `models.hebbian_memory`), which define the meaning.

With the environment variable TRITON_INTERPRET=1 the kernels run in Triton's interpreter, also on a CPU, thousands of times
slower. The interpreter is for tests; `auto` then takes this backend on any device.
"""

import os

import torch
from torch import Tensor
from torch.nn.functional import linear

from models import backends
from models.dynamics import POPULATIONS, Dynamics

KNOWN = """num_time_steps readout_delay memory_feedback readout_steps thr perfect_reset refractory_time_steps tau_mem
    dampening_factor w_max gamma_pos gamma_neg tau_trace""".split()

try:
    import triton

    from models.backends.triton.population import lif
    from models.backends.triton.reading import hebbian_read
    from models.backends.triton.writing import hebbian_write

    IMPORT_ERROR = None
except ImportError as error:
    IMPORT_ERROR = error


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot run on such a device here, in one line with the remedy, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (device_type != "cuda" or torch.version.hip):
        return "it runs on NVIDIA GPUs; use --device cuda there, or the cpp backend"
    if IMPORT_ERROR:
        return f"Triton cannot be imported ({IMPORT_ERROR}); install it with `pip install triton`"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"Triton {triton.__version__} is too old; install 3.6 or later, which comes with PyTorch 2.11"
    if not interpreted and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; check nvidia-smi, CUDA_VISIBLE_DEVICES and that PyTorch is built for CUDA"
    return None


def store_and_recall(
    features_current: Tensor,
    labels_current: Tensor,
    query_current: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    dynamics: Dynamics,
    record: bool = False,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor] | None]:
    """As `models.hebbian_memory.store_and_recall`."""
    backends.constants(dynamics, KNOWN)
    backends.check_operands(features_current, labels_current, query_current, write_weight, read_weight)
    num_steps, constants = dynamics.num_time_steps, dynamics.neuron
    embedding_size = query_current.shape[-1]
    encoded = lif(torch.cat([features_current, labels_current], dim=-1), num_steps, constants)
    query = lif(query_current.unsqueeze(1), num_steps, constants)

    to_keys, to_values = write_weight.chunk(2)
    memory, write_key, write_value = hebbian_write(linear(encoded, to_keys), linear(encoded, to_values), dynamics)
    from_query, from_values = read_weight[:, :embedding_size], read_weight[:, embedding_size:]
    read_key, read_value = hebbian_read(linear(query, from_query), memory, from_values, dynamics)

    spikes = dict(zip(POPULATIONS, (*encoded.chunk(2, -1), query, write_key, write_value, read_key, read_value), strict=True))
    return (
        read_value[:, -dynamics.readout_steps :].sum(1),
        {name: z.sum(1) for name, z in spikes.items()},
        {name: z.detach() for name, z in (spikes | {"memory": memory}).items()} if record else None,
    )
