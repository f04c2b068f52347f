"""The fused CPU kernels against the reference: any sizes, any options, any number of threads."""

import dataclasses
import multiprocessing
import resource

import pytest
import torch
from helpers import OPERANDS, assert_agree, draw, outcome, strided_outcome
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

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


def operands(options, dtype):
    """The constants, and the currents and weights that the kernels get."""
    torch.manual_seed(1)
    model = models.build_model(options).to(dtype)
    features, labels, query, _ = draw(options, dtype)
    operands = *model.currents(features, labels, query), model.writing_layer.W, model.reading_layer.W
    return model.dynamics, [x.detach().requires_grad_() for x in operands]


LONG = {"length": 55, "batch": 1, "num_classes": 55, "feature_size": 9, "embedding_size": 20, "memory_size": 20}
# More samples than the number of parts into which a batch is divided. The parts' gradients are added up.
LARGE_BATCH = {"length": 1, "batch": 130, "num_classes": 4, "feature_size": 5, "embedding_size": 9, "memory_size": 9}
SMALL = {"length": 2, "batch": 4, "num_classes": 5, "feature_size": 5, "num_time_steps": 40, "embedding_size": 20}
SMALL |= {"memory_size": 9, "thr": 0.05}  # fewer value neurons than encoding neurons


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sizes)
@example(LONG | {"num_time_steps": 8, "thr": 0.05})
@example(LARGE_BATCH | {"num_time_steps": 20, "thr": 0.05})
def test_kernels_agree_with_the_plain_function_for_any_sizes_and_options(options):
    of_case = operands(options, torch.float64)
    assert_agree(outcome(cpp.store_and_recall, *of_case), outcome(models.store_and_recall, *of_case), 1e-9)


@pytest.mark.parametrize("batch", [1, 3, 130])
def test_results_do_not_depend_on_the_number_of_threads(batch):
    of_case = operands(SMALL | {"batch": batch}, torch.float32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(outcome(cpp.store_and_recall, *of_case))
    finally:
        torch.set_num_threads(before)
    assert all(results[0][name].any() for name in OPERANDS)
    for result in results[1:]:
        assert_agree(result, results[0], 0)


def test_the_readout_is_the_same_without_gradient_and_recording():
    dynamics, inputs = operands(SMALL, torch.float32)
    with torch.no_grad():
        alone, _, activity = cpp.store_and_recall(*inputs, dynamics)
    recorded, _, _ = cpp.store_and_recall(*inputs, dynamics, record=True)
    assert activity is models.store_and_recall(*inputs, dynamics)[2] is None
    assert torch.equal(alone, recorded) and recorded.any()


@pytest.mark.parametrize("record", [False, True])
def test_registered_operations_pass_opcheck(record):
    dynamics, inputs = operands(SMALL | {"batch": 2, "num_time_steps": 10}, torch.float64)
    torch.library.opcheck(cpp._forward, (*(x.detach() for x in inputs), cpp._constants(dynamics), record))


@pytest.mark.parametrize(
    "constants",
    [
        {"w_max": 1e3, "gamma_pos": 0.3 / 1e3},
        {"w_max": 1e6, "gamma_pos": 0.3 / 1e6},
        {"thr": 0.05 * 20 / 1e8, "tau_mem": 1e8},
        {"tau_trace": 1e8, "gamma_pos": 1e5, "gamma_neg": 1e5},
        {"thr": 0.1, "tau_trace": 0.5, "gamma_pos": 1.0},  # traces that decay to nothing between spikes
    ],
)
def test_extreme_constants_keep_the_precision_of_float32(constants):
    options = SMALL | {"memory_size": 24} | constants
    exact = outcome(models.store_and_recall, *operands(options, torch.float64))
    plain = outcome(models.store_and_recall, *operands(options, torch.float32))
    ours = outcome(cpp.store_and_recall, *operands(options, torch.float32))
    assert exact["write_value"].any()
    for name in (*POPULATIONS, "memory", *OPERANDS):
        allowed = 3 * (plain[name] - exact[name]).norm() + 1e-6 * exact[name].norm()
        assert (ours[name] - exact[name]).norm() <= allowed, name
    if constants.get("tau_trace") == 0.5:  # skipped updates by a decayed trace still have a gradient
        assert_agree(outcome(cpp.store_and_recall, *operands(options, torch.float64)), exact, 1e-10)


def test_float32_gradients_over_more_than_96_steps_agree_with_the_plain_function():
    """More than 96 steps need two blocks of encoding. No spike differs here, so gradients can be compared."""
    of_case = operands(SMALL | {"memory_size": 24, "num_time_steps": 130}, torch.float32)
    assert_agree(outcome(cpp.store_and_recall, *of_case), outcome(models.store_and_recall, *of_case), 1e-3)


PLACES = {
    "features": (0, (0, 0, 3)),
    "query": (2, (0, 3)),
    "write_weight of a silent neuron": (3, (0, 0)),
    "read_weight from a value": (4, (0, -1)),
}


@pytest.mark.parametrize("place", PLACES)
def test_nan_in_an_operand_reaches_the_gradients(place):
    dynamics, inputs = operands(SMALL | {"thr": 0.1}, torch.float32)
    number, element = PLACES[place]
    with torch.no_grad():
        inputs[number][element] = float("nan")
        if "silent" in place:
            inputs[0][..., 0] = 0
    functions = models.store_and_recall, cpp.store_and_recall
    theirs, ours = ({n for n, x in outcome(f, dynamics, inputs).items() if x.isnan().any()} for f in functions)
    assert ours == theirs and theirs


def recall_with_little_memory(dynamics, inputs):
    """The readout of 64 threads, and the error when memory runs out."""
    with open("/proc/self/status") as status:
        used = int(next(line for line in status if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)  # one thread's stack takes 8 MiB
    torch.set_num_threads(64)
    readout = cpp.store_and_recall(*inputs, dynamics)[0].tolist()
    try:
        cpp.store_and_recall(*inputs, dataclasses.replace(dynamics, num_time_steps=10**7))
    except BackendError as error:
        return readout, str(error)


def test_kernels_run_with_fewer_threads_and_report_running_out_of_memory():
    """If the system refuses threads, fewer do the work. If it refuses memory, one line says so."""
    dynamics, inputs = operands(SMALL | {"batch": 64}, torch.float32)
    expected = cpp.store_and_recall(*inputs, dynamics)[0].tolist()
    with multiprocessing.get_context("fork").Pool(1) as child:
        readout, message = child.apply(recall_with_little_memory, (dynamics, [x.detach() for x in inputs]))
    assert readout == expected
    assert message == "out of memory in the cpp kernels with 64 samples and 64 threads; use a smaller --batch_size"


def test_strided_and_expanded_operands_agree_with_the_plain_function():
    dynamics, inputs = operands(SMALL | {"thr": 0.03}, torch.float64)
    ours, theirs = (strided_outcome(function, dynamics, inputs) for function in (cpp.store_and_recall, models.store_and_recall))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_results_do_not_depend_on_uninitialized_memory():
    """Kernels write every result, and do not multiply unwritten memory by zero: 0 * NaN is NaN."""
    of_case = operands(SMALL, torch.float32)
    before = outcome(cpp.store_and_recall, *of_case)
    for _ in range(40):
        for size in (300, 3000, 30_000):
            [torch.full((size,), float("nan")) for _ in range(20)]  # and freed
        assert_agree(outcome(cpp.store_and_recall, *of_case), before, 0)
