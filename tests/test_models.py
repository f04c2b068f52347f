"""The plain model: its equations one by one, what it keeps for its backward pass, and what it refuses."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch

import memorizing_associations_task as task
import models
from models import hebbian_memory
from models.neurons import LIFNeuron, Spike
from models.plasticity import HebbianRule
from utils.options import Parser


def run(current, **constants):
    """Spikes and membrane of one neuron."""
    neuron = LIFNeuron(**constants)
    state, spikes, membrane = neuron.initial_state(torch.zeros(1, dtype=torch.float64)), [], []
    for value in current:
        state = neuron.step(torch.tensor([value], dtype=torch.float64), state)
        spikes.append(int(state.spikes))
        membrane.append(state.membrane.item())
    return spikes, membrane


def test_a_membrane_below_threshold_relaxes_exponentially():
    spikes, membrane = run([0.05] * 50, thr=0.1, tau_mem=20.0)
    assert sum(spikes) == 0
    assert membrane[-1] == pytest.approx(0.05 * (1 - math.exp(-50 / 20)), rel=1e-12)


def test_soft_reset_subtracts_the_threshold_and_hard_reset_starts_from_zero():
    alpha = math.exp(-1 / 20)
    spikes, soft = run([10.0, 0.0], thr=0.1)
    assert spikes == [1, 0]
    assert soft[1] == pytest.approx(alpha * soft[0] - 0.1, rel=1e-12)
    _, hard = run([10.0, 0.0], thr=0.1, perfect_reset=True)
    assert hard == [soft[0], 0.0]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_neuron_is_silent_while_refractory_and_its_membrane_keeps_integrating(steps):
    spikes, membrane = run([100.0] * 12, refractory_time_steps=steps)
    assert spikes == [int(t % (steps + 1) == 0) for t in range(12)]
    assert all(later > earlier for earlier, later in itertools.pairwise(membrane))


def test_surrogate_derivative_is_a_triangle_masked_by_refractoriness():
    u = torch.tensor([-1.5, -0.5, 0.0, 0.25, 0.25, 2.0], requires_grad=True)
    may_fire = torch.tensor([True, True, True, True, False, True])
    spikes = Spike.apply(u, may_fire, 0.5)
    assert spikes.tolist() == [0, 0, 0, 1, 0, 1]
    (gradient,) = torch.autograd.grad(spikes.sum(), u)
    assert gradient.tolist() == [0, 0.25, 0.5, 0.375, 0, 0]


def test_the_hebbian_update_follows_its_equation():
    rule = HebbianRule(w_max=0.7, gamma_pos=0.5, gamma_neg=0.2, tau_trace=5.0)
    nu = rule.update_trace(torch.tensor([[0.0, 0.4]]), torch.tensor([[1.0, 0.0]]))
    beta = math.exp(-1 / 5)
    assert nu.tolist()[0] == pytest.approx([1 - beta, 0.4 * beta])
    memory = torch.tensor([[[0.3]]])
    updated = rule.update(memory, torch.tensor([[0.6]]), torch.tensor([[0.9]]))
    assert updated.item() == pytest.approx(0.3 + 0.5 * (0.7 - 0.3) * 0.6 * 0.9 - 0.2 * 0.9**2 * 0.3)


def test_populations_with_a_mean_rate_below_a_hundredth_of_a_hertz_are_silent():
    rates = {
        "one neuron fires": torch.tensor([[0.0, 0.0], [0.0, 1.0]]),
        "just silent": 0.0099,
        "just firing": 0.01,
        "none": torch.zeros(2, 3),
        "not a number": float("nan"),
    }
    assert models.silent_populations(rates) == ["just silent", "none"]


def test_rate_regularization_uses_mean_rates():
    rates = {name: torch.full((3,), 5.0) for name in models.POPULATIONS}
    rates["read_key"] = torch.tensor([10.0, 20.0, 10.0])
    expected = 6 * (5 - 10) ** 2 + ((10 - 10) ** 2 + (20 - 10) ** 2 + (10 - 10) ** 2) / 3
    assert models.rate_regularization(rates, 10.0).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="read_key must hold one mean rate per neuron"):
        models.rate_regularization(rates | {"read_key": torch.zeros(2, 3)}, 10.0)


def test_training_never_keeps_a_memory_for_every_step():
    """Plain automatic differentiation would keep a 100 x 100 matrix for each of 400 steps, several times."""
    model = models.build_model({"num_time_steps": 40}, "reference")
    kept = set()

    def pack(tensor):
        if tensor.shape[-2:] == (100, 100):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.rand(1, 10, 10), torch.randperm(10).unsqueeze(0), torch.rand(1, 10))
    assert 0 < len(kept) <= 400 // hebbian_memory.RECOMPUTE_EVERY + 10 + 4


@pytest.mark.parametrize("steps", [1, 7, 10_000])
def test_recomputation_does_not_change_gradients(monkeypatch, steps):
    monkeypatch.setattr(hebbian_memory, "RECOMPUTE_EVERY", steps)
    golden.check(golden.load("small_defaults"), "reference")


def test_a_network_can_be_built_from_all_options_of_a_run():
    parser = Parser("")
    task.add_options(parser)
    record = vars(parser.complete())
    assert record.keys() >= models.defaults().keys() and "epochs" in record
    assert models.constants(record) == (models.Sizes(), models.Dynamics())
    assert models.build_model({"tau_mem": 20.0}, neuron=LIFNeuron(thr=0.2)).dynamics.neuron.thr == 0.2


@pytest.mark.parametrize(
    ("params", "parts", "message"),
    [
        ({"thr": 0.0}, {}, "thr must be greater than 0"),
        ({"refractory_time_steps": 1.5}, {}, "refractory_time_steps must be of type int"),
        ({"tau_mam": 10.0}, {}, "tau_mam is not an option of the network; did you mean tau_mem"),
        (
            {"tau_mem": 10.0},
            {"neuron": LIFNeuron()},
            r"tau_mem 10\.0: the given neuron has 20\.0; leave one of the two out",
        ),
        ({"w_max": 2.0}, {"rule": HebbianRule()}, r"w_max 2\.0: the given rule has 1\.0"),
        ({}, {"backend": "fast"}, "one of auto, triton, cpp, compiled, reference, or a function, not 'fast'"),
        ({}, {"backend": 3}, "or a function, not 3"),
    ],
)
def test_invalid_network_options_are_refused(params, parts, message):
    with pytest.raises(ValueError, match=message):
        models.build_model(params, **parts)


def test_every_program_refuses_an_old_pytorch_in_one_line():
    root = Path(__file__).parents[1]
    programs = [str(path) for folder in (".", "experiments", "benchmarks", "examples") for path in (root / folder).glob("*.py")]
    script = f"""import runpy, sys, torch
torch.__version__ = "2.10.0+cpu"  # as numbers this is newer than 2.7
import models
torch.__version__ = "2.6.1+cpu"
for program in {programs}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        print(end.code)"""
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    line = "error: PyTorch 2.6.1+cpu is too old: install 2.7 or later (pip install --upgrade torch)\n"
    assert done.stdout == line * len(programs)
