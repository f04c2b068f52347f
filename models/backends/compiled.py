"""The plain function with its time loop compiled by `torch.compile`, for any step function, on a CPU or a GPU."""

import contextlib
import functools
import sys
from collections.abc import Iterator

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from models import backends, through_time
from models.backends import BackendError
from models.dynamics import Dynamics
from models.through_time import Step, run_steps

STEPS = 5  # time steps compiled together: more steps take longer to compile

# A backward pass may retain the graph, so buffers are not donated. Each thread has its own setting: here the caller's thread,
# which takes gradients; below the check's thread, which compiles.
torch._functorch.config.donated_buffer = False
_block = torch.compile(run_steps, fullgraph=True)


def unavailable(device_type: str) -> str | None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        return f"PyTorch {torch.__version__} is too old for it; install 2.8 or later"
    return None if device_type in ("cpu", "cuda") else f"code is compiled for CPUs and GPUs, not for {device_type}"


def store_and_recall(*operands, plain) -> tuple:
    """Run `plain`, the plain function, with the compiled loop.

    Raises:
        BackendError: the code cannot be compiled, or does not compute the plain function.
    """
    features_current, _, query_current, _, read_weight, dynamics, _ = operands
    sizes = 64, query_current.shape[-1], read_weight.shape[0]
    request = str(features_current.device), dynamics, features_current.dtype, sizes, torch.get_num_threads()
    _prove(plain, backends.equations(dynamics), *request)
    return _loop()(plain)(*operands)


@contextlib.contextmanager
def _loop() -> Iterator[None]:
    """Compile the time loops of this thread."""
    through_time._thread.run = _run_blocks
    try:
        yield
    finally:
        del through_time._thread.run


@functools.cache
def _prove(
    plain, equations: tuple, device: str, dynamics: Dynamics, dtype: torch.dtype, sizes: tuple[int, int, int], threads: int
) -> None:
    """Compile for a run with these sizes, and compare with the plain function."""
    how_long = "one to three minutes, and some seconds more at the first evaluation; less if PyTorch's cache holds it"
    print(f"compiling the time loop ({how_long}) ...", file=sys.stderr, flush=True)
    try:
        backends.check(_loop()(plain), device, dynamics, plain, (dtype,), sizes)
    except BackendError as difference:
        raise BackendError(f"backend compiled: {difference}") from None
    except Exception as failure:  # from Python, C++ or Triton
        cause = str(getattr(failure, "inner_exception", failure))  # PyTorch wraps it
        reason = next((line for line in cause.splitlines() if line.strip()), type(failure).__name__)
        compiler = "a C++ compiler (g++, or set CXX)" if device == "cpu" else "Triton and a C compiler"
        remedy = f"it needs {compiler}; or use --backend reference"
        raise BackendError(f"backend compiled: torch.compile fails ({reason.strip()[:200]}); {remedy}") from failure


# Every network, constant and precision of a process adds code for each of its steps, and PyTorch allows 8 versions by default.
# With dynamic shapes, a constant or a size with another value in a second network would become a variable of the code. The code
# then fails: in the surrogate's autograd.Function, or by wrong strides. The surrogate's code is also cached.
@torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024, automatic_dynamic_shapes=False)
@torch._functorch.config.patch(donated_buffer=False, autograd_cache_allow_custom_autograd_functions=True)
def _run_blocks(step: Step, state, *inputs: Tensor):
    """Run the time loop in blocks. All blocks look alike to `torch.compile`, so that it compiles only one of them."""
    held = [x for x in (cell.cell_contents for cell in step.__closure__ or ()) if isinstance(x, Tensor)]
    for x in held:
        if x.shape[:1] == inputs[0].shape[:1]:
            torch._dynamo.maybe_mark_dynamic(x, 0)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *tree_leaves(state), *held))

    def alike(x: Tensor) -> Tensor:
        x = x.contiguous()
        x = x.view_as(x) if differentiated and x.requires_grad else x.detach()  # the same object is never given twice
        if differentiated and x.is_floating_point() and not x.requires_grad:
            x.requires_grad_()
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return x

    blocks = []
    for block in zip(*(x.split(STEPS, 1) for x in inputs), strict=True):
        state, outputs = _block(step, tree_map(alike, state), *map(alike, block))
        blocks.append(outputs)
    return state, tuple(torch.cat(series, dim=1) for series in zip(*blocks, strict=True))
