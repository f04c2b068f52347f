"""The compiled time loop agrees with the plain one, for any neuron, and is compiled once for all batches."""

import threading

import golden
import pytest
import torch
from torch import Tensor

import models
from examples.another_neuron import AdaptiveNeuron
from models.backends import compiled
from models.hebbian_memory import hebbian_read
from models.neurons import LIFNeuron, population
from models.through_time import run_steps


@pytest.fixture
def traced(monkeypatch):
    """Trace graphs of two steps and run them operation by operation. Generating code would take a minute."""
    monkeypatch.setattr(compiled, "STEPS", 2)
    monkeypatch.setattr(compiled, "_block", torch.compile(run_steps, fullgraph=True, backend="aot_eager"))
    compiled._prove.cache_clear()
    yield
    compiled._prove.cache_clear()


def by_compiled_loop(function, *operands):
    with compiled._loop():
        return function(*operands)


@pytest.mark.slow
def test_compiled_code_agrees_with_the_original_implementation():
    golden.check(golden.load("other_constants"), "compiled")


@pytest.fixture
def codes(monkeypatch):
    """The operand types of each traced graph, and whether its buffers are donated. No code is generated."""
    found = []

    def record(graph, operands):
        found.append(([type(x) for x in operands], torch._functorch.config.donated_buffer))
        return graph

    monkeypatch.setattr(compiled, "_block", torch.compile(run_steps, fullgraph=True, backend=record))
    return found


def test_only_the_batch_is_a_variable_of_the_compiled_code(codes):
    """If a second network's sizes or constants were variables, generating its code would fail."""
    for neurons, constants in ((5, {}), (7, {}), (7, {"thr": 0.2, "tau_mem": 15.0}), (7, {"refractory_time_steps": 1})):
        by_compiled_loop(population, LIFNeuron(**constants), torch.rand(3, 2, neurons), 5)
    assert [types for types, _ in codes] == 4 * [[torch.SymInt] + 4 * [Tensor]]
    for batch, steps in ((4, 5), (7, 10), (3, 5)):  # a step may hold batched tensors: reading holds the memory
        currents, memory, weight = torch.rand(batch, steps, 6), torch.rand(batch, 6, 6), torch.rand(6, 6)
        by_compiled_loop(hebbian_read, currents, memory, weight, models.Dynamics())
    assert len(codes) == 5


def test_buffers_are_not_donated_in_any_thread(codes):
    """Donation would spoil the gradients of a retained graph. The setting is per thread, and a check has its own thread."""
    thread = threading.Thread(target=by_compiled_loop, args=(population, LIFNeuron(), torch.rand(3, 2, 5), 5))
    thread.start()
    thread.join()
    assert [donated for _, donated in codes] == [False] and not torch._functorch.config.donated_buffer


@pytest.mark.usefixtures("traced")
def test_a_neuron_with_another_state_is_compiled():
    current = torch.rand(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def activity_and_gradient(neuron):
        spikes, membrane = population(neuron, current, 4)
        weights = torch.arange(membrane.numel()).view_as(membrane)
        return spikes, membrane, *torch.autograd.grad((membrane * weights + spikes).sum(), current)

    theirs = activity_and_gradient(AdaptiveNeuron(strength=100.0))
    ours = by_compiled_loop(activity_and_gradient, AdaptiveNeuron(strength=100.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not torch.equal(activity_and_gradient(LIFNeuron())[1], theirs[1])  # the adaptation matters


def no_compiler(*_):
    raise RuntimeError("no compiler found\nmany lines")


def wrong(step, state, *inputs):
    state, outputs = run_steps(step, state, *inputs)
    return state, tuple(1.05 * x - (0.05 * x).detach() for x in outputs)  # the values, with 1.05 times their gradients


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "block, message",
    [
        (torch.compile(run_steps, fullgraph=True, backend=no_compiler), r"backend compiled: .*no compiler found.*g\+\+"),
        (wrong, "backend compiled: it does not compute the model"),
    ],
)
def test_failing_or_wrong_compiled_code_is_refused_in_one_line(block, message, monkeypatch):
    monkeypatch.setattr(compiled, "_block", block)
    model = models.build_model({"num_time_steps": 8, "embedding_size": 8, "memory_size": 8}, "compiled")
    with pytest.raises(models.BackendError, match=message) as failure:
        model(torch.rand(4, 2, 10), torch.zeros(4, 2).long(), torch.rand(4, 10))
    assert "\n" not in str(failure.value)
