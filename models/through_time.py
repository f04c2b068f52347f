"""The time loop of the network, for any step function, and its recomputation in the backward pass."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

# step(state, *inputs at one time step) -> state, outputs at that time step. A state is a (nested) tuple of tensors.
Step = Callable[..., tuple[Any, tuple[Tensor, ...]]]

_thread = threading.local()  # `_thread.run` runs the steps instead of `run_steps` (models/backends/compiled.py)


def through_time(step: Step, state: Any, *inputs: Tensor, recompute_every: int | None = None) -> tuple[Any, tuple[Tensor, ...]]:
    """Apply `step` at every time step.

    Args:
        state: the state before the first time step.
        inputs: each B x time x ...; a step gets slices B x ...
        recompute_every: N: while gradients are recorded, keep the state only at every N-th step and recompute the steps
            between in the backward pass. None: automatic differentiation keeps every step.

    Returns:
        The state after the last time step, and the outputs, each B x time x ...
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return run_steps(step, state, *inputs)  # they differentiate the steps themselves
    run = functools.partial(getattr(_thread, "run", run_steps), step)
    leaves, structure = tree_flatten(state)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *leaves))
    if recompute_every is None or not differentiated or _learns(step, state, inputs):
        return run(state, *inputs)
    results = _Recomputed.apply(run, recompute_every, structure, len(inputs), *inputs, *leaves)
    return tree_unflatten(list(results[: len(leaves)]), structure), results[len(leaves) :]


def run_steps(step: Step, state: Any, *inputs: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    """The time loop itself."""
    outputs = []
    for now in zip(*(x.unbind(1) for x in inputs), strict=True):
        state, output = step(state, *now)
        outputs.append(output)
    return state, tuple(torch.stack(series, dim=1) for series in zip(*outputs, strict=True))


def _learns(step: Step, state: Any, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the step itself holds tensors that need a gradient: recomputation would not compute this gradient."""
    leaves, structure = tree_flatten(state)
    with torch.enable_grad(), torch.random.fork_rng(_devices(inputs)):  # a step may draw random numbers
        results = step(tree_unflatten([x.detach() for x in leaves], structure), *(x[:, 0].detach() for x in inputs))
    return any(x.requires_grad for x in tree_flatten(results)[0])


class _Recomputed(torch.autograd.Function):
    """A run through time that keeps the state at every N-th step only.

    `torch.utils.checkpoint` does the same, but the many small nodes that it leaves between large tensors fragment the heap,
    until the process is as large as if every step were kept. A step that draws random numbers draws the same ones again.
    """

    @staticmethod
    def forward(ctx, run, every, structure, number_of_inputs, *tensors):
        inputs, state = tensors[:number_of_inputs], tree_unflatten(list(tensors[number_of_inputs:]), structure)
        starts, outputs, ctx.random_states = [], [], []
        for segment in zip(*(x.split(every, 1) for x in inputs), strict=True):
            starts.append(tree_flatten(state)[0])
            ctx.random_states.append(_random_states(inputs))
            state, output = run(state, *segment)
            outputs.append(output)
        ctx.run, ctx.every, ctx.structure, ctx.starts = run, every, structure, starts
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return *tree_flatten(state)[0], *(torch.cat(series, dim=1) for series in zip(*outputs, strict=True))

    @staticmethod
    def backward(ctx, *gradients):
        tensors, number = ctx.saved_tensors, len(ctx.starts[0])
        inputs, grad_state, grad_outputs = tensors[:-number], gradients[:number], gradients[number:]
        if torch.is_grad_enabled():  # a second derivative: differentiate the whole run automatically
            with _random_numbers(inputs, ctx.random_states[0]):
                found = _gradients(ctx.run, ctx.structure, tensors, number, gradients, create_graph=True)
            return None, None, None, None, *found
        grad_segments = []
        for n, segment in reversed(list(enumerate(zip(*(x.split(ctx.every, 1) for x in inputs), strict=True)))):
            now = slice(n * ctx.every, (n + 1) * ctx.every)
            given = (*grad_state, *(None if gradient is None else gradient[:, now] for gradient in grad_outputs))
            copies = [x.detach().requires_grad_(x.is_floating_point()) for x in (*segment, *ctx.starts[n])]
            with _random_numbers(inputs, ctx.random_states[n]):
                found = _gradients(ctx.run, ctx.structure, copies, number, given)
            grad_segments.append([torch.zeros_like(x) if g is None else g for x, g in zip(segment, found, strict=False)])
            grad_state = tuple(found[len(inputs) :])
        grad_inputs = (torch.cat(series[::-1], dim=1) for series in zip(*grad_segments, strict=True))
        return None, None, None, None, *grad_inputs, *grad_state


def _devices(tensors: tuple[Tensor, ...]) -> list[torch.device]:
    return list({x.device for x in tensors if x.device.type == "cuda"})


def _random_states(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The states of the random generators of the CPU and of these tensors' GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(tensors))]


@contextlib.contextmanager
def _random_numbers(tensors: tuple[Tensor, ...], states: list[Tensor]) -> Iterator[None]:
    """Draw random numbers from these states on, inside the context."""
    with torch.random.fork_rng(_devices(tensors)):
        torch.set_rng_state(states[0])
        for device, state in zip(_devices(tensors), states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        yield


def _gradients(run, structure, tensors, number, given, create_graph=False) -> list[Tensor | None]:
    """Gradients of `tensors` (a run's inputs, then the `number` tensors of its state), from the results' gradients."""
    with torch.enable_grad():
        state, outputs = run(tree_unflatten(list(tensors[-number:]), structure), *tensors[:-number])
    results = [(x, g) for x, g in zip((*tree_flatten(state)[0], *outputs), given, strict=True) if g is not None]
    wanted = [x for x in tensors if x.requires_grad]
    found = iter(
        torch.autograd.grad(
            [x for x, _ in results], wanted, [g for _, g in results], allow_unused=True, create_graph=create_graph
        )
    )
    return [next(found) if x.requires_grad else None for x in tensors]
