"""Every backend agrees with the published program."""

import golden
import pytest

from models import POPULATIONS, backends

ON_CPU = ["cpp", "reference"]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", golden.FLOAT64)
def test_float64_agrees_to_the_last_spike(name, backend):
    golden.check(golden.load(name), backend)


@pytest.mark.parametrize("backend", ON_CPU)
def test_float32_agrees_at_full_size(backend):
    """Rounding may flip a spike near threshold, after which a trajectory differs: the share of other spikes is small, not 0."""
    expected = golden.load("full_size_float32")
    output, loss, _, grad_cross_entropy, grad_total = golden.run(expected, backend)
    for name in POPULATIONS:
        share = (output.activity[name] != expected.out[name]).float().mean().item()
        assert share < 0.01, f"{share:.2%} of the spikes of {name} differ"
    ours = {"logits": output.logits, "cross entropy": loss}
    theirs = {"logits": expected.out["logits"], "cross entropy": expected.out["cross_entropy"]}
    for kind, gradients, others in (
        ("", grad_cross_entropy, expected.grad_cross_entropy),
        ("total ", grad_total, expected.grad_total),
    ):
        ours |= {f"{kind}gradient of {name}": gradient for name, gradient in gradients.items()}
        theirs |= {f"{kind}gradient of {name}": others[name] for name in gradients}
    assert backends.compare(ours, theirs, 1e-2) is None
