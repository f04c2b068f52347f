"""The plain function with its time loop compiled by `torch.compile`, whatever its steps compute, for a CPU or a GPU."""

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

STEPS = 5  # compiled together: more take longer to compile

# A backward pass may retain the graph, so buffers are not donated. This setting is one of each thread: it is looked at in the
# caller's, where gradients are taken, and in that of the check, where code is compiled (below).
torch._functorch.config.donated_buffer = False
_block = torch.compile(run_steps, fullgraph=True)


def unavailable(device_type: str) -> str | None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        return f"PyTorch {torch.__version__} is too old for it; install 2.8 or later"
    return None if device_type in ("cpu", "cuda") else f"code is compiled for CPUs and GPUs, not for {device_type}"


def store_and_recall(*operands, plain) -> tuple:
    """As `plain`, the plain function, which it runs with the compiled loop.

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
    """In this thread, time loops are compiled."""
    through_time._thread.run = _run_blocks
    try:
        yield
    finally:
        del through_time._thread.run


@functools.cache
def _prove(
    plain, equations: tuple, device: str, dynamics: Dynamics, dtype: torch.dtype, sizes: tuple[int, int, int], threads: int
) -> None:
    """Compile for a training with these sizes, and compare with the plain function."""
    how_long = "one to three minutes, and some seconds more at the first evaluation; less if PyTorch's cache holds it"
    print(f"compiling the time loop ({how_long}) ...", file=sys.stderr, flush=True)
    try:
        backends.check(_loop()(plain), device, dynamics, plain, (dtype,), sizes)
    except BackendError as difference:
        raise BackendError(f"backend compiled: {difference}") from None
    except Exception as failure:  # of Python, C++ or Triton, in many layers
        cause = str(getattr(failure, "inner_exception", failure))  # PyTorch wraps it
        reason = next((line for line in cause.splitlines() if line.strip()), type(failure).__name__)
        compiler = "a C++ compiler (g++, or set CXX)" if device == "cpu" else "Triton and a C compiler"
        remedy = f"it needs {compiler}; --backend reference runs without"
        raise BackendError(f"backend compiled: torch.compile fails ({reason.strip()[:200]}); {remedy}") from failure


# Every network, constant and precision of a process adds code for each of its steps, and 8 are allowed by default. A constant
# or a size that a second network has at another value would become a variable of the code, which fails then: in the
# surrogate's autograd.Function, or by the strides that it expects. What is compiled of the surrogate is kept, too.
@torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024, automatic_dynamic_shapes=False)
@torch._functorch.config.patch(donated_buffer=False, autograd_cache_allow_custom_autograd_functions=True)
def _run_blocks(step: Step, state, *inputs: Tensor):
    """All blocks look alike to `torch.compile`, so that it compiles one of them: whether or not it starts from rest."""
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
