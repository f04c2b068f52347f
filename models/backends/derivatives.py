"""First derivatives of kernels in reverse mode, in `torch.func` and per sample. All other derivatives raise an error.

With `register_autograd` alone, an operator of `torch.library` silently returns zero for derivatives that it does not have: in
forward mode, and for a second derivative after `once_differentiable`.
"""

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from torch.autograd import Function

from models.backends import BackendError


def differentiable(operator: Any, setup_context: Callable, backward: Callable) -> Callable:
    """An operator of `torch.ops` with its gradient.

    Args:
        setup_context, backward: as in `torch.autograd.Function`; `backward` calls operators from `not_differentiable`.
    """

    def forward(*operands):
        return operator(*operands)

    # `torch.compile` counts the arguments to tell whether a ctx is among them.
    names = [argument.name for argument in operator._schema.arguments]
    setattr(forward, "__signature__", Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]))  # noqa: B010
    methods = {"forward": forward, "setup_context": setup_context, "backward": backward}
    attributes = {name: staticmethod(method) for name, method in methods.items()} | {"generate_vmap_rule": True}
    return type("Kernel", (Function,), attributes).apply  # type: ignore[attr-defined]


def not_differentiable(operator: Any) -> Callable:
    """An operator whose gradient raises: the backward pass of a kernel."""

    def setup_context(ctx, inputs, output) -> None:
        pass

    def refuse(ctx, *gradients):
        raise BackendError("kernels have no second derivatives; use --backend reference")

    return differentiable(operator, setup_context, refuse)
