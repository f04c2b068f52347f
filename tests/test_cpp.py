"""The fused CPU kernels against the reference: any sizes, any options, any number of threads."""

import dataclasses
import multiprocessing
import resource

import pytest
import torch
from helpers import draw
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import models
from models import POPULATIONS
from models.backends import BackendError, cpp

sizes = st.fixed_dictionaries(
    {
        "length": st.integers(1, 4),
        "batch": st.integers(0, 4),
        "num_classes": st.integers(4, 6),
        "feature_size": st.integers(1, 5),
        "embedding_size": st.integers(1, 20),
        "memory_size": st.sampled_from([1, 2, 7, 8, 9, 16, 17, 33]),
        "num_time_steps": st.integers(1, 45),
        "readout_delay": st.integers(1, 60),
        "refractory_time_steps": st.integers(0, 5),
        "perfect_reset": st.booleans(),
        "thr": st.floats(0.02, 0.3),
        "tau_mem": st.floats(1.0, 50.0),
        "tau_trace": st.floats(0.5, 50.0),
        "w_max": st.floats(0.1, 3.0),
        "gamma_pos": st.floats(0.0, 1.0),
        "gamma_neg": st.floats(0.0, 1.0),
        "dampening_factor": st.floats(0.0, 2.0),
    }
)


def forward_and_backward(options, backend, dtype=torch.float64):
    """Logits, rates and activity, and the gradients of an objective that touches all of them."""
    torch.manual_seed(1)
    model = models.build_model(options, backend).to(dtype)
    features, labels, query, answer = draw(options, dtype)
    output = model(features, labels, query, record=True)
    objective = cross_entropy(output.logits, answer, reduction="sum")
    for n, name in enumerate(POPULATIONS):  # another weight for every count
        rates = output.rates[name]
        objective = objective + 1e-3 * (rates * torch.linspace(-1, n, rates.numel(), dtype=dtype).view_as(rates)).sum()
    gradients = torch.autograd.grad(objective, list(model.parameters()))
    return output, gradients


LONG = {"length": 55, "batch": 1, "num_classes": 55, "feature_size": 9, "embedding_size": 20, "memory_size": 20, "thr": 0.05}
LONG |= {"num_time_steps": 8}
# More samples than the parts that a batch is divided into, which add up their gradients.
LARGE_BATCH = {"length": 1, "batch": 130, "num_classes": 4, "feature_size": 5, "num_time_steps": 20}
LARGE_BATCH |= {"embedding_size": 9, "memory_size": 9, "thr": 0.05}


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sizes)
@example(LONG)
@example(LARGE_BATCH)
def test_any_sizes_and_options_agree_with_the_reference(options):
    theirs, their_gradients = forward_and_backward(options, "reference")
    ours, our_gradients = forward_and_backward(options, "cpp")
    for name in POPULATIONS:
        assert torch.equal(ours.activity[name], theirs.activity[name]), name
        torch.testing.assert_close(ours.rates[name], theirs.rates[name], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.activity["memory"], theirs.activity["memory"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-9, atol=1e-12)
    for gradient, expected in zip(our_gradients, their_gradients, strict=True):
        scale = max(expected.abs().max().item(), 1e-6) if expected.numel() else 1.0
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9 * scale)


DEFAULT = {"length": 10, "batch": 3, "num_classes": 10, "feature_size": 10, "num_time_steps": 30}


def operands(options, dtype):
    """The network, and its currents and weights as the kernels get them."""
    torch.manual_seed(1)
    model = models.build_model(options, "cpp").to(dtype)
    features, labels, query, _ = draw(options, dtype)
    operands = *model.currents(features, labels, query), model.writing_layer.W, model.reading_layer.W
    return model, [x.detach().requires_grad_() for x in operands]


@pytest.mark.parametrize("batch", [1, 3, 130])
def test_results_do_not_depend_on_the_number_of_threads(batch):
    model, inputs = operands(DEFAULT | {"batch": batch, "length": 2}, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            readout, spike_counts, _ = cpp.store_and_recall(*inputs, model.dynamics)
            outputs = [readout, *spike_counts.values()]
            gradients = torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])
            results.append((*outputs, *gradients))
    finally:
        torch.set_num_threads(before)
    assert all(gradient.any() for gradient in gradients)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_the_readout_alone_and_without_gradient():
    model = models.build_model(DEFAULT, "cpp")
    features, labels, query, _ = draw(DEFAULT, torch.float32)
    with torch.no_grad():
        alone = model(features, labels, query)
    recorded = model(features, labels, query, record=True)
    assert alone.activity is None
    assert torch.equal(alone.logits, recorded.logits)
    torch.autograd.grad(recorded.logits.sum(), list(model.parameters()))


def test_every_element_of_the_results_is_written():
    """Memory that is handed out again holds what was there: poison it."""
    poison = [torch.full((n,), float("nan")) for n in (1_000, 10_000, 100_000, 1_000_000) for _ in range(4)]
    expected = forward_and_backward(DEFAULT, "cpp", torch.float32)
    del poison
    again = forward_and_backward(DEFAULT, "cpp", torch.float32)
    assert torch.equal(again[0].logits, expected[0].logits)
    for tensor in (*again[0].activity.values(), *again[0].rates.values(), *again[1], again[0].logits):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("record", [False, True])
def test_registered_operations_pass_opcheck(record):
    options = {"length": 2, "batch": 2, "num_classes": 4, "feature_size": 3, "embedding_size": 5, "memory_size": 6}
    model, inputs = operands(options | {"num_time_steps": 10}, torch.float64)
    torch.library.opcheck(cpp._forward, (*(x.detach() for x in inputs), cpp._constants(model.dynamics), record))


# ------------------------------------------------------------------------------------------------------------- numbers


def outcome(model, inputs, backend):
    """Recorded spikes and memory, and the gradients of a sum in which every count and readout has another weight."""
    function = cpp.store_and_recall if backend == "cpp" else models.store_and_recall
    readout, counts, activity = function(*inputs, model.dynamics, record=True)
    results = readout, *counts.values()
    seeds = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in results]
    names = "features", "labels", "query", "write_weight", "read_weight"
    gradients = torch.autograd.grad(results, inputs, seeds)
    return {name: activity[name] for name in (*POPULATIONS, "memory")} | dict(zip(names, gradients, strict=True))


SMALL = {"length": 2, "batch": 4, "num_classes": 5, "feature_size": 5, "num_time_steps": 40, "embedding_size": 20}


@pytest.mark.parametrize(
    "constants",
    [
        {"thr": 0.05, "w_max": 1e3, "gamma_pos": 0.3 / 1e3},
        {"thr": 0.05, "w_max": 1e6, "gamma_pos": 0.3 / 1e6},
        {"thr": 0.05 * 20 / 1e8, "tau_mem": 1e8},
        {"thr": 0.05, "tau_trace": 1e8, "gamma_pos": 1e5, "gamma_neg": 1e5},
        {"tau_trace": 0.5, "gamma_pos": 1.0},  # traces that decay to nothing between spikes
    ],
)
def test_extreme_constants_keep_the_precision_of_float32(constants):
    options = SMALL | {"memory_size": 24} | constants
    exact = outcome(*operands(options, torch.float64), "reference")
    plain = outcome(*operands(options, torch.float32), "reference")
    ours = outcome(*operands(options, torch.float32), "cpp")
    assert exact["write_value"].any()
    for name, expected in exact.items():
        allowed = 3 * (plain[name] - expected).norm() + 1e-6 * expected.norm()
        assert (ours[name] - expected).norm() <= allowed, name


@pytest.mark.parametrize("place", ["features", "query", "write_weight of a silent neuron", "read_weight"])
def test_what_is_not_a_number_reaches_the_gradients(place):
    model, inputs = operands(SMALL | {"memory_size": 9}, torch.float32)
    with torch.no_grad():
        if "silent" in place:
            inputs[0][..., 0] = 0
            inputs[3][0, 0] = float("nan")
        elif place == "read_weight":
            inputs[4][0, -1] = float("nan")
        else:
            inputs[{"features": 0, "query": 2}[place]].view(-1)[3] = float("nan")
    theirs, ours = outcome(model, inputs, "reference"), outcome(model, inputs, "cpp")
    reached = {name for name in theirs if theirs[name].isnan().any()}
    assert reached == {name for name in ours if ours[name].isnan().any()}
    assert reached


def recall_with_little_memory(model, inputs):
    """What 64 threads read out, and the error where the memory is too little."""
    with open("/proc/self/status") as status:
        used = int(next(line for line in status if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)  # of a thread's stack alone 8 MiB
    torch.set_num_threads(64)
    readout = cpp.store_and_recall(*inputs, model.dynamics)[0].tolist()
    try:
        cpp.store_and_recall(*inputs, dataclasses.replace(model.dynamics, num_time_steps=10**7))
    except BackendError as error:
        return readout, str(error)


def test_fewer_threads_and_no_more_memory():
    """Where the system grants no more threads fewer do the work; where it grants no more memory one line says so."""
    model, inputs = operands(SMALL | {"memory_size": 9, "batch": 64}, torch.float32)
    expected = cpp.store_and_recall(*inputs, model.dynamics)[0].tolist()
    with multiprocessing.get_context("fork").Pool(1) as child:
        readout, message = child.apply(recall_with_little_memory, (model, [x.detach() for x in inputs]))
    assert readout == expected
    assert message == "out of memory in the cpp kernels with 64 samples and 64 threads; use a smaller --batch_size"


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_gradients_over_more_than_96_steps(precision):
    """Where no spike differs, they are those of the plain function."""
    options = SMALL | {"memory_size": 24, "num_time_steps": 130, "thr": 0.05}
    torch.set_float32_matmul_precision(precision)
    try:
        theirs, ours = (outcome(*operands(options, torch.float32), backend) for backend in ("reference", "cpp"))
    finally:
        torch.set_float32_matmul_precision("highest")
    for name in POPULATIONS:
        assert torch.equal(ours[name], theirs[name]), name
    for name in ("features", "labels", "query", "write_weight", "read_weight", "memory"):
        assert (ours[name] - theirs[name]).norm() <= 1e-3 * theirs[name].norm(), name


def test_strided_and_expanded_operands_and_gradients():
    model, inputs = operands(SMALL | {"memory_size": 9, "thr": 0.03}, torch.float64)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    strided[2] = inputs[2].detach()[:1].expand(4, -1).requires_grad_()  # one query for all
    assert not any(x.is_contiguous() for x in strided)
    gradients = []
    for function in (cpp.store_and_recall, models.store_and_recall):
        readout, counts, _ = function(*strided, model.dynamics)
        assert counts["read_key"].any() and readout.any()
        results = readout, *counts.values()
        seeds = [torch.tensor(0.5 + n, dtype=torch.float64).expand_as(x) for n, x in enumerate(results)]
        gradients.append(torch.autograd.grad(results, strided, seeds))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_trace_that_has_decayed_still_has_a_gradient():
    """Its updates change nothing and are skipped; what they would have stored reaches the key's surrogate derivatives."""
    options = SMALL | {"memory_size": 24, "tau_trace": 0.5, "gamma_pos": 1.0}
    expected, ours = (outcome(*operands(options, torch.float64), backend) for backend in ("reference", "cpp"))
    for name, value in expected.items():
        assert (ours[name] - value).norm() <= 1e-10 * value.norm(), name


def test_what_memory_held_before_does_not_matter():
    """A product of zero and what stands in memory that nobody has written is not zero where that is not a number."""
    model, inputs = operands(SMALL | {"memory_size": 9}, torch.float32)  # fewer values than encoding neurons
    for _ in range(40):
        for size in (300, 3000, 30_000):
            [torch.full((size,), float("nan")) for _ in range(20)]  # and freed
        assert not any(tensor.isnan().any() for tensor in outcome(model, inputs, "cpp").values())
