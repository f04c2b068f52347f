"""Every backend agrees with the published program."""

import golden
import pytest

from models import POPULATIONS

ON_CPU = ["cpp", "reference"]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("name", golden.FLOAT64)
def test_float64_agrees_to_the_last_spike(name, backend):
    golden.check(golden.load(name), backend)


@pytest.mark.parametrize("backend", ON_CPU)
def test_float32_differs_in_few_spikes(backend):
    """Rounding may flip a spike near threshold, after which a trajectory differs; so the share is what can be compared."""
    expected = golden.load("full_size_float32")
    output, *_ = golden.run(expected, backend)
    for name in POPULATIONS:
        share = (output.activity[name] != expected.out[name]).float().mean().item()
        assert share < 0.01, f"{share:.2%} of the spikes of {name} differ"
