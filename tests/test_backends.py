"""Every backend agrees with the plain model in both precisions, and refuses what it cannot compute."""

import contextlib
import copy
import dataclasses
import functools

import golden
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrize, prune

import models
from models import backends, store_and_recall
from models.dynamics import Dynamics
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

SMALL = {"num_time_steps": 10, "embedding_size": 8, "memory_size": 12}
ALIVE = {"num_time_steps": 30, "embedding_size": 16, "memory_size": 20, "thr": 0.02}  # all populations fire


def pairs(batch=3, length=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(batch, length, 10, generator=generator, dtype=dtype)
    return features, torch.arange(batch * length).view(batch, length) % 10, features[:, 0]


def twins(backend="cpp"):
    """A network with a backend, and its copy with the plain function."""
    torch.manual_seed(3)
    ours = models.build_model(ALIVE, backend)
    theirs = copy.deepcopy(ours)
    theirs.backend = "reference"
    return ours, theirs


def own(base, constants=(), **attributes):
    """An instance of a subclass of `base` with these attributes and constants."""
    return dataclasses.dataclass(frozen=True)(type("Own", (base,), attributes))(**dict(constants))


def assert_near(ours, exact):
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9 * exact.abs().max().item())


# Operands ---------------------------------------------------------------------------------------------------------------

MISUSES = {
    "query of another batch": (lambda m, f, c, q: m(f, c, q[:1]), "query must have batch size 3"),
    "labels for fewer pairs": (lambda m, f, c, q: m(f, c[:, :1], q), r"labels must be of shape \(3, 2\)"),
    "other features": (lambda m, f, c, q: m(f[..., :4], c, q[..., :4]), "feature_size 10, not 4 and 4"),
    "no sample dimension": (lambda m, f, c, q: m(f[0], c[0], q[0]), "features must be of shape B x L x F"),
    "no pair": (lambda m, f, c, q: m(f[:, :0], c[:, :0], q), "at least one pair"),
    "a label of exactly C": (lambda m, f, c, q: m(f, c + 5, q), "labels must be 0 to 9, not 5 to 10"),
    "a negative label": (lambda m, f, c, q: m(f, c - 1, q), "labels must be 0 to 9, not -1 to 4"),
    "labels of another type": (lambda m, f, c, q: m(f, c.int(), q), "labels must be int64"),
    "inputs in float64": (lambda m, f, c, q: m(f.double(), c, q.double()), "features are torch.float64.* is torch.float32"),
    "a query in float64": (lambda m, f, c, q: m(f, c, q.double()), "query must be torch.float32"),
    "some weights in float64": (lambda m, f, c, q: (m.input_layer.double(), m(f, c, q)), "input_layer.weight is torch.float64"),
    "weights in bfloat16": (lambda m, f, c, q: m.bfloat16()(f.bfloat16(), c, q.bfloat16()), "float32 or float64"),
    "inputs elsewhere": (lambda m, f, c, q: m(f.to("meta"), c, q), "features are .* on meta, but input_layer.weight .* on cpu"),
    "labels elsewhere": (lambda m, f, c, q: m(f, c.to("meta"), q), "labels is on meta, features on cpu"),
    "arrays": (lambda m, f, c, q: m(f.numpy(), c, q), "features must be a tensor, not ndarray; use torch.as_tensor"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_mismatched_operands_are_refused(misuse):
    """Kernels trust shapes and types, and PyTorch would broadcast one query to all."""
    call, message = MISUSES[misuse]
    with pytest.raises(ValueError, match=message):
        call(models.build_model(SMALL), *pairs())


HOOKS = {
    "fewer rows": lambda _, __, weight: weight[:-4],
    "transposed": lambda _, __, weight: weight.transpose(0, -1),
    "one more dimension": lambda _, __, weight: weight[None],
    "another type": lambda _, __, weight: weight.double(),
}


@pytest.mark.parametrize("layer", ["writing_layer", "reading_layer", "embedding_layer"])
@pytest.mark.parametrize("hook", HOOKS)
def test_the_result_of_a_hook_is_checked_before_a_kernel_reads_it(layer, hook):
    model = models.build_model(SMALL, "cpp")
    getattr(model, layer).register_forward_hook(HOOKS[hook])
    with pytest.raises((ValueError, RuntimeError)):
        model(*pairs())


def test_under_autocast_the_network_computes_in_float32_and_warns():
    model, operands = models.build_model(SMALL), pairs()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="float32 in spite of autocast"):
        logits = model(*operands).logits
    assert torch.equal(logits, model(*operands).logits)


# The check of a kernel --------------------------------------------------------------------------------------------------

lif_step, hebbian_update = LIFNeuron.step, HebbianRule.update


def floored(self, current, state):
    step = lif_step(self, current, state)
    return step._replace(membrane=step.membrane.clamp(min=-self.thr))


def clipped(self, memory, value_trace, key_trace):
    return hebbian_update(self, memory, value_trace, key_trace).clamp(max=0.3 * self.w_max)


def rooted(self, memory, value_trace, key_trace):
    """Its results are finite, but its gradient at a trace of 0 is NaN."""
    return hebbian_update(self, memory, value_trace.sqrt() * 0.5, key_trace)


@pytest.mark.parametrize(
    "where, name, changed", [(HebbianRule, "update", clipped), (HebbianRule, "update", rooted), (LIFNeuron, "step", floored)]
)
def test_kernels_refuse_an_equation_replaced_in_a_running_process(where, name, changed, monkeypatch):
    """The new equations differ only far from rest, or have no gradient at one point."""
    model = models.build_model(SMALL | {"num_time_steps": 100}, "cpp", rule=own(HebbianRule), neuron=own(LIFNeuron))
    model(*pairs())
    monkeypatch.setattr(where, name, changed)
    with pytest.raises(models.BackendError, match="backend cpp: it does not compute the model of these equations"):
        model(*pairs())
    model.backend = "auto"
    with pytest.warns(UserWarning, match=r"using the plain model, which is slow \(cpp: it does not compute"):
        logits = model(*pairs()).logits
    model.backend = "reference"
    assert torch.equal(model(*pairs()).logits, logits)


def half(self, *operands):
    return 0.5 * hebbian_update(self, *operands)


class NoDataclass:
    initial_state, step = LIFNeuron().initial_state, LIFNeuron().step


@pytest.mark.parametrize(
    "part, message",
    [
        ({"rule": own(HebbianRule, update=half)}, "does not know update of Own"),
        ({"rule": own(HebbianRule, leak=0.1, __annotations__={"leak": float})}, "has other constants than the network"),
        ({"neuron": own(LIFNeuron, alpha=property(lambda self: 0.99))}, "does not know alpha of Own"),
        ({"neuron": NoDataclass()}, "does not know NoDataclass, only LIFNeuron"),
    ],
)
def test_a_rule_or_neuron_that_a_kernel_does_not_compute_is_refused(part, message):
    model = models.build_model(SMALL, "cpp", **part)
    with pytest.raises(models.BackendError, match=f"backend cpp: it {message}"):
        model(*pairs())


class Unhashable(LIFNeuron):
    __hash__ = None


# The second neuron's constants have the size of this network; the check uses a network of another size.
@pytest.mark.parametrize("neuron", [Unhashable(), own(LIFNeuron, alpha=property(lambda self: torch.full((16,), 0.9)))])
def test_auto_uses_the_plain_model_after_any_error(neuron):
    with pytest.warns(UserWarning, match="using the plain model"):
        models.build_model({"num_time_steps": 10, "embedding_size": 16, "memory_size": 16}, neuron=neuron)(*pairs())


@pytest.mark.parametrize("number, dtype", [(4, torch.float64), *((number, torch.float32) for number in range(5))])
def test_the_check_notices_one_wrong_gradient_in_one_precision(number, dtype):
    def wrong(*operands):
        operands = list(operands)
        if operands[0].dtype == dtype:
            exact = operands[number]
            operands[number] = 1.05 * exact - (0.05 * exact).detach()  # the value, with 1.05 times its gradient
        return store_and_recall(*operands)

    with pytest.raises(models.BackendError, match=rf"\({str(dtype).removeprefix('torch.')}: gradient"):
        backends.check(wrong, "cpu", Dynamics(), store_and_recall)


def test_the_check_compares_results_near_zero():
    """This network hardly fires."""

    def more(*operands):
        readout, counts, activity = store_and_recall(*operands)
        return readout + 1e-6, counts, activity

    with pytest.raises(models.BackendError, match="readout differs"):
        backends.check(more, "cpu", Dynamics(neuron=LIFNeuron(thr=100.0), readout_steps=1), store_and_recall)


@pytest.mark.parametrize(
    "options",
    [{}, {"perfect_reset": True}, {"thr": 100.0}, {"tau_mem": 0.01}, {"readout_delay": 12}, {"gamma_pos": 100.0}],
    ids=str,
)
def test_a_right_kernel_passes_the_check_and_neurons_fire_in_it(options):
    dynamics = models.build_model(options).dynamics
    assert backends.choose("auto", "cpu", dynamics, store_and_recall) == "cpp"
    operands, dynamics = backends.tiny_case(dynamics, torch.float64, "cpu", 0, (3, 10, 18))
    _, counts, _ = store_and_recall(*operands, dynamics)
    firing = [name for name, count in counts.items() if count.any()]
    assert set(firing) >= {"features_encoded", "labels_encoded", "query_encoded", "write_key", "write_value"}
    assert options or len(firing) == 7


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "none": contextlib.nullcontext,
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "another default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "another default dtype": default_dtype,
}


@pytest.mark.filterwarnings("ignore:the network computes in float32|Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
def test_the_check_and_the_modes_of_its_caller_do_not_affect_each_other(mode):
    """The check runs in the first forward pass. If its model diverges, the caller's anomaly mode does not raise."""
    ours, theirs = twins()
    for constants in ({}, {"gamma_pos": 1e6}):
        ours.dynamics = theirs.dynamics = dataclasses.replace(ours.dynamics, rule=HebbianRule(**constants))
        operands = pairs()
        backends._choose.cache_clear()
        before = torch.random.get_rng_state(), torch.get_num_threads()
        with MODES[mode]():
            logits = ours(*operands).logits
        assert torch.equal(torch.random.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]
        if not constants:
            assert torch.equal(logits, theirs(*operands).logits)


# Library use ------------------------------------------------------------------------------------------------------------


def lesion(layer, *output):
    """A forward hook that zeroes the rows of every second neuron."""
    weight = output[-1].clone()
    weight[::2] = 0
    return weight


class Negated(nn.Module):
    def forward(self, weight):
        return -weight


def replace_forward(model):
    forward = model.writing_layer.forward
    model.writing_layer.forward = lambda: 0.5 * forward()


def change_constant(model):
    model.dynamics = dataclasses.replace(model.dynamics, neuron=LIFNeuron(thr=0.03), memory_feedback=0.7)


ALTERATIONS = {
    "a lesion by a hook": lambda model: model.writing_layer.register_forward_hook(lesion),
    "a hook of the reading layer": lambda model: model.reading_layer.register_forward_hook(lesion),
    "a pruned weight": lambda model: prune.l1_unstructured(model.writing_layer, "W", amount=0.5),
    "a parametrized weight": lambda model: parametrize.register_parametrization(model.reading_layer, "W", Negated()),
    "a replaced forward": replace_forward,
    "a lesion of the encoding": lambda model: model.input_layer.register_forward_hook(lambda *args: 0.3 * args[-1]),
    "a constant": change_constant,
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_altered_layers_and_constants_act_alike_in_every_backend(alteration):
    ours, theirs = twins()
    unaltered = theirs(*pairs()).logits
    ours(*pairs())
    for model in (ours, theirs):
        ALTERATIONS[alteration](model)
    altered = theirs(*pairs()).logits
    torch.testing.assert_close(ours(*pairs()).logits, altered, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(altered, unaltered, rtol=1e-3)


def test_a_given_function_computes_the_network():
    def half(*operands):
        readout, *others = store_and_recall(*operands)
        return 0.5 * readout, *others

    ours, theirs = twins(backend=half)
    assert torch.equal(ours(*pairs()).logits, 0.5 * theirs(*pairs()).logits)


def test_a_replaced_head_and_a_larger_embedding_work():
    """A head may be anything, also in half precision; labels are bounded by the embedding."""
    ours, _ = twins()
    ours.output_layer = nn.Sequential(nn.Linear(20, 5, dtype=torch.bfloat16), nn.ReLU())
    ours.output_layer.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    ours.embedding_layer = models.memorizing_associations.EmbeddingLayer(40, 16)
    features, labels, query = pairs()
    assert ours(features, labels + 30, query).logits.shape == (3, 5)
    with pytest.raises(ValueError, match="labels must be 0 to 39, not 35 to 40"):
        ours(features, labels + 35, query)


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")])
def test_tensors_without_values_give_shapes(mode):
    backends._choose.cache_clear()
    with mode():
        output = models.build_model(SMALL)(torch.rand(3, 2, 10), torch.zeros(3, 2).long(), torch.rand(3, 10))
    assert output.logits.shape == (3, 10) and output.rates["read_key"].shape == (3, 12)


def test_the_plain_model_records_membranes_and_memories():
    case = golden.load("small_defaults")
    output, *_ = golden.run(case, "reference")
    thr, refractory_time_steps = case.params["thr"], case.params["refractory_time_steps"]
    assert torch.equal(output.activity["memories"][:, -1], output.activity["memory"])
    for name, membrane in output.activity["membranes"].items():
        refractory = torch.zeros_like(membrane[:, 0])
        for v, spikes in zip(membrane.unbind(1), output.activity[name].unbind(1), strict=True):
            assert torch.equal(((v > thr) & (refractory == 0)).double(), spikes), name
            refractory = torch.where(refractory > 0, refractory - 1, refractory_time_steps * spikes)


# Derivatives ------------------------------------------------------------------------------------------------------------


def loss_of(model, weights, features, labels, query):
    """The loss of one sample, given without batch dimension."""
    rates = functional_call(model, weights, (features[None], labels[None], query[None])).rates
    return sum(rate.square().mean() for rate in rates.values())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_per_sample_gradients_of_torch_func_agree_with_autograd(backend):
    model = models.build_model(ALIVE, backend).double()
    backends._choose.cache_clear()  # so that the first check is inside vmap
    weights, operands = dict(model.named_parameters()), pairs(dtype=torch.float64)
    ours = vmap(grad(functools.partial(loss_of, model)), (None, 0, 0, 0))(weights, *operands)
    for n in range(3):
        loss = loss_of(model, weights, *(x[n] for x in operands))
        for name, exact in zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True):
            if exact is not None:
                assert_near(ours[name][n], exact)


def test_an_ensemble_runs_in_one_vmap():
    members = [models.build_model(ALIVE, "cpp") for _ in range(3)]
    (weights, _), operands = stack_module_state(members), pairs()
    logits = vmap(lambda weights: functional_call(members[0], weights, operands).logits)(weights)
    for ours, member in zip(logits, members, strict=True):
        torch.testing.assert_close(ours, member(*operands).logits)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_forward_mode_differentiation_raises(backend):
    model = models.build_model(ALIVE, backend)
    features, labels, query = pairs()
    with pytest.raises(RuntimeError, match="jvp"):
        jvp(lambda x: model(x, labels, query).rates["write_key"], (features,), (torch.ones_like(features),))
    model.requires_grad_(False)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        model(torch.autograd.forward_ad.make_dual(features, torch.ones_like(features)), labels, query)


def test_second_derivatives_of_the_plain_model_are_right_and_kernels_refuse_them(monkeypatch):
    model, operands = models.build_model(ALIVE, "cpp").double(), pairs(dtype=torch.float64)

    def second():
        loss = sum(rate.square().sum() for rate in model(*operands).rates.values())
        (first,) = torch.autograd.grad(loss, model.writing_layer.W, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [model.writing_layer.W, model.input_layer.weight])

    def first(weights):
        gradients = grad(functools.partial(loss_of, model))(weights, *(x[0] for x in operands))
        return sum(gradient.square().sum() for gradient in gradients.values())

    with pytest.raises(models.BackendError, match="kernels have no second derivatives; use --backend reference"):
        second()
    with pytest.raises(models.BackendError, match="no second derivatives"):
        grad(first)(dict(model.named_parameters()))
    model.backend = "reference"
    ours = second()
    monkeypatch.setattr(models.hebbian_memory, "RECOMPUTE_EVERY", None)
    for gradient, exact in zip(ours, second(), strict=True):
        assert_near(gradient, exact)


def noisy(self, current, state):
    return lif_step(self, current + 0.05 * torch.rand_like(current), state)


def test_a_neuron_that_draws_random_numbers_has_right_gradients(monkeypatch):
    """Recomputation draws the same numbers again."""
    torch.manual_seed(3)
    model, gradients = models.build_model(ALIVE, "reference", neuron=own(LIFNeuron, {"thr": 0.02}, step=noisy)).double(), []
    for every in (models.hebbian_memory.RECOMPUTE_EVERY, None):
        monkeypatch.setattr(models.hebbian_memory, "RECOMPUTE_EVERY", every)
        torch.manual_seed(5)
        loss = sum(rate.square().sum() for rate in model(*pairs(dtype=torch.float64)).rates.values())
        gradients.append(torch.autograd.grad(loss, model.writing_layer.W)[0])
    assert gradients[1].any()
    assert_near(*gradients)


def test_a_parameter_inside_a_step_gets_its_gradient():
    """Recomputation gives gradients of inputs and state only, so a step that holds a parameter is not recomputed."""
    gain = torch.tensor(0.5, requires_grad=True)

    def step(state, x):
        return (gain * state[0] + x,), (state[0],)

    state, _ = models.through_time.through_time(step, (torch.ones(1),), torch.ones(1, 4, requires_grad=True), recompute_every=2)
    (gradient,) = torch.autograd.grad(state[0].sum(), gain)
    assert gradient.item() == pytest.approx(4 * 0.5**3 + 1 + 2 * 0.5 + 3 * 0.5**2)


@pytest.mark.parametrize("backend", ["cpp", pytest.param("reference", marks=pytest.mark.slow)])
def test_torch_compile_and_export_take_the_whole_network(backend):
    """Every step of the plain function is traced, so it has few steps here."""
    model, operands = models.build_model(ALIVE if backend == "cpp" else ALIVE | {"num_time_steps": 4}, backend), pairs()
    backends._choose.cache_clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*operands).logits, model(*operands).logits)
    compiled(*operands).logits.sum().backward()
    assert model.output_layer.weight.grad is not None
    for strict in (False, True):
        exported = torch.export.export(model, operands, strict=strict)
        torch.testing.assert_close(exported.module()(*operands).logits, model(*operands).logits)
    model.writing_layer.register_forward_hook(lesion)
    torch.compiler.reset()  # the hook acts from the next compilation
    torch.testing.assert_close(compiled(*operands).logits, model(*operands).logits)
