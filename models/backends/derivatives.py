"""First derivatives of kernels: right in reverse mode, in `torch.func` and per sample; all others raise, and none is zero.

An operator of `torch.library` with `register_autograd` alone drops the derivatives that it does not have: its forward mode is
zero in silence, and so is what `once_differentiable` leaves of a second derivative.
"""

from collections.abc import Callable
from inspect import Parameter, Signature

from torch.autograd import Function

from models.backends import BackendError


def differentiable(forward: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """An operator with its gradient.

    Args:
        forward: the operator, of `torch.ops`.
        setup_context, backward: as of `torch.autograd.Function`; what `backward` calls is made by `not_differentiable`.
    """

    class Kernel(Function):
        generate_vmap_rule = True

    def run(*operands):
        return forward(*operands)

    # By their number `torch.compile` tells whether a ctx is among the arguments.
    names = [argument.name for argument in forward._schema.arguments]
    run.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    Kernel.forward, Kernel.setup_context, Kernel.backward = map(staticmethod, (run, setup_context, backward))
    return Kernel.apply


def not_differentiable(operator: Callable) -> Callable:
    """An operator whose gradient raises: the backward pass of a kernel."""

    def setup_context(ctx, inputs, output) -> None:
        pass

    def refuse(ctx, *gradients):
        raise BackendError("kernels have no second derivatives; use --backend reference")

    return differentiable(operator, setup_context, refuse)
