"""The time loop of the plain model compiled by `torch.compile`, whatever its steps compute, for a CPU or a GPU."""

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from models import through_time as plain

STEPS = 5  # compiled together: more take longer to compile

torch._functorch.config.donated_buffer = False  # so that a backward pass may retain the graph
torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True  # keep what is compiled of the surrogate, too
_block = torch.compile(plain.run_steps, fullgraph=True)


def through_time(step: plain.Step, state, *inputs: Tensor, recompute_every: int | None = None):
    """As `models.through_time.through_time`. The first dimension of the inputs, and of what has as many rows, may vary: code
    is compiled once for all batch sizes but 1."""
    return plain.through_time(step, state, *inputs, recompute_every=recompute_every, run=_run_blocks)


# Every network, constant and precision of a process adds code for each of its steps, and 8 are allowed by default. A constant
# or a size that a second network has at another value would become a variable of the code, which fails then: in the
# surrogate's autograd.Function, or by the strides that it expects.
@torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024, automatic_dynamic_shapes=False)
def _run_blocks(step: plain.Step, state, *inputs: Tensor):
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
