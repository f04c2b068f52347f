"""Every backend computes what the plain model does, in both precisions, and refuses what it would get wrong."""

import copy
import dataclasses
import warnings

import golden
import pytest
import torch
from torch.nn.utils import parametrize, prune

import models
from models import backends
from models.dynamics import Dynamics
from models.hebbian_memory import WritingLayer
from models.memorizing_associations import reference
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

SMALL = {"num_time_steps": 10, "embedding_size": 8, "memory_size": 12}


def run_float32(name, backend):
    """Logits, rates, memory and gradients of a golden case in float32."""
    case = golden.load(name)
    cast = {k: {n: x.float() if x.is_floating_point() else x for n, x in getattr(case, k).items()} for k in ("state", "inputs")}
    output, _, _, grad_cross_entropy, grad_total = golden.run(case._replace(dtype=torch.float32, **cast), backend)
    results = {"logits": output.logits, "memory": output.activity["memory"]}
    results |= {f"rates of {n}": x for n, x in output.rates.items()}
    results |= {f"gradient of {n}": x for n, x in grad_cross_entropy.items()}
    return results | {f"total gradient of {n}": x for n, x in grad_total.items()}


@pytest.mark.parametrize("name", golden.FLOAT64[:-1])
def test_float32_kernels_have_the_results_and_gradients_of_the_plain_model(name):
    """Every training runs in float32, and its kernels are other code than those of float64."""
    assert backends.compare(run_float32(name, "cpp"), run_float32(name, "reference"), 1e-2) is None


# What does not belong together ------------------------------------------------------------------------------------------


def pairs(batch=3, length=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(batch, length, 10, generator=generator, dtype=dtype)
    return features, torch.arange(batch * length).view(batch, length) % 10, features[:, 0]


MISUSES = {
    "query of another batch": (lambda m, f, c, q: m(f, c, q[:1]), "query must be of batch size 3"),
    "labels for fewer pairs": (lambda m, f, c, q: m(f, c[:, :1], q), r"labels must be of shape \(3, 2\)"),
    "other features": (lambda m, f, c, q: m(f[..., :4], c, q[..., :4]), "feature_size 10, not 4 and 4"),
    "no sample dimension": (lambda m, f, c, q: m(f[0], c[0], q[0]), "features must be of shape B x L x F"),
    "no pair": (lambda m, f, c, q: m(f[:, :0], c[:, :0], q), "at least one pair"),
    "a label too large": (lambda m, f, c, q: m(f, c + 7, q), "labels must be 0 to 9, not 7 to 12"),
    "a negative label": (lambda m, f, c, q: m(f, c - 1, q), "labels must be 0 to 9, not -1 to 4"),
    "labels of another type": (lambda m, f, c, q: m(f, c.int(), q), "labels must be int64"),
    "inputs in float64": (lambda m, f, c, q: m(f.double(), c, q.double()), "features must be torch.float32"),
    "some weights in float64": (lambda m, f, c, q: (m.input_layer.double(), m(f, c, q)), "input_layer.weight is torch.float64"),
    "weights in bfloat16": (lambda m, f, c, q: m.bfloat16()(f.bfloat16(), c, q.bfloat16()), "float32 or float64"),
    "inputs elsewhere": (lambda m, f, c, q: m(f.to("meta"), c, q), "features is on meta, the network on cpu"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_operands_that_do_not_belong_together_are_refused(misuse):
    """Kernels trust shapes and types, and PyTorch would broadcast one query to all."""
    call, message = MISUSES[misuse]
    with pytest.raises(ValueError, match=message):
        call(models.build_model(SMALL), *pairs())


def test_autocast_is_computed_in_float32_with_a_note():
    model, operands = models.build_model(SMALL), pairs()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="float32 in spite of autocast"):
        logits = model(*operands).logits
    assert torch.equal(logits, model(*operands).logits)


@pytest.mark.parametrize(
    "constant, value, message",
    [
        ("readout_delay", 0, "at least 1"),
        ("refractory_time_steps", 2**63 - 1, "at most"),
        ("refractory_time_steps", 1.5, "must be of type int"),
        ("tau_mem", float("nan"), "must be finite"),
        ("thr", 0.0, "must be greater than 0"),
        ("memory_size", 0, "at least 1"),
    ],
)
def test_a_constant_out_of_bounds_is_refused_by_name(constant, value, message):
    with pytest.raises(ValueError, match=f"{constant} {message}|{constant} must be {message}"):
        models.build_model({constant: value})


# The proof --------------------------------------------------------------------------------------------------------------


def oja(self, memory, value_trace, key_trace):
    nu, kappa = value_trace.unsqueeze(-1), key_trace.unsqueeze(-2)
    return memory + self.gamma_pos * nu * (kappa - nu * memory)


def superspike(ctx, grad_spikes):
    u, may_fire = ctx.saved_tensors
    return grad_spikes * may_fire / (1 + u.abs()) ** 2, None, None


@pytest.mark.parametrize("where, name, changed", [(HebbianRule, "update", oja), (models.neurons.Spike, "backward", superspike)])
def test_a_changed_equation_is_not_computed_by_kernels_of_the_old_one(where, name, changed, monkeypatch):
    monkeypatch.setattr(where, name, staticmethod(changed) if where is models.neurons.Spike else changed)
    backends._difference.cache_clear()  # another process
    try:
        with pytest.raises(models.BackendError, match="backend cpp: it does not compute the model of these equations"):
            models.build_model(SMALL, "cpp")(*pairs())
        with pytest.warns(UserWarning, match=r"using the plain model.*cpp: it does not compute"):
            backends._warn_of_the_plain_model.cache_clear()
            chosen, _ = models.build_model(SMALL).prepare_backend("cpu")
        assert chosen == "reference"
    finally:
        backends._difference.cache_clear()


@dataclasses.dataclass(frozen=True)
class LeakyRule(HebbianRule):
    leak: float = 0.1

    def update(self, memory, value_trace, key_trace):
        return (1 - self.leak) * super().update(memory, value_trace, key_trace)


def test_a_rule_or_a_constant_that_a_kernel_does_not_know_is_refused_by_name(monkeypatch):
    with pytest.raises(models.BackendError, match="does not know LeakyRule"):
        models.build_model(SMALL, "cpp", rule=LeakyRule())(*pairs())
    plain = models.build_model(SMALL, "reference", rule=LeakyRule(leak=0.0))
    published = models.build_model(SMALL, "reference")
    published.load_state_dict(plain.state_dict())
    assert torch.equal(plain(*pairs()).logits, published(*pairs()).logits)
    monkeypatch.setitem(backends.KNOWN, LIFNeuron, backends.KNOWN[LIFNeuron] - {"tau_mem"})
    with pytest.raises(models.BackendError, match="does not know the constant tau_mem of LIFNeuron"):
        models.build_model(SMALL, "cpp")(*pairs())


@pytest.mark.parametrize("number, dtype", [(4, torch.float64), *((number, torch.float32) for number in range(5))])
def test_a_kernel_that_is_wrong_in_one_gradient_and_one_precision_does_not_pass(number, dtype, monkeypatch):
    def wrong(*operands, **others):
        operands = list(operands)
        if operands[0].dtype == dtype:
            exact = operands[number]
            operands[number] = 1.05 * exact - (0.05 * exact).detach()  # the value, with 1.05 times its gradient
        return reference(*operands, **others)

    monkeypatch.setitem(backends._programs, "cpp", wrong)
    backends._difference.cache_clear()
    try:
        found = backends._difference("cpp", "cpu", Dynamics(), reference, ())
        assert found and str(dtype).removeprefix("torch.") in found and "gradient" in found
    finally:
        backends._difference.cache_clear()


@pytest.mark.parametrize(
    "options",
    [{}, {"perfect_reset": True}, {"thr": 100.0}, {"tau_mem": 0.01}, {"readout_delay": 12}, {"gamma_pos": 100.0}],
    ids=str,
)
def test_the_proof_holds_for_a_right_kernel_and_lets_neurons_fire(options):
    dynamics = models.build_model(options).dynamics
    assert backends.choose("cpp", "cpu", dynamics, reference)[0] == "cpp"
    operands, dynamics = backends.tiny_case(dynamics, torch.float64, "cpu", 0)
    _, counts, _ = reference(*operands, dynamics)
    firing = [name for name, count in counts.items() if count.any()]
    assert set(firing) >= {"features_encoded", "labels_encoded", "query_encoded", "write_key", "write_value"}
    assert options or len(firing) == 7


# Library use ------------------------------------------------------------------------------------------------------------


def test_hooks_of_a_layer_are_run_or_the_kernel_is_refused():
    """Pruning makes the weight in a hook before the layer's forward."""
    model = models.build_model(SMALL)
    prune.random_unstructured(model.writing_layer, "W", amount=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the plain model
        rates = model(*pairs()).rates
    plain = models.build_model(SMALL, "reference")
    plain.load_state_dict(
        {k.removesuffix("_orig"): v for k, v in model.state_dict().items() if not k.endswith("mask")}
        | {"writing_layer.W": model.writing_layer.W_orig * model.writing_layer.W_mask}
    )
    assert all(torch.equal(rate, rates[name]) for name, rate in plain(*pairs()).rates.items())
    model.backend = "cpp"
    with pytest.raises(models.BackendError, match="does not run the hooks of WritingLayer"):
        model(*pairs())


class SilentWriting(WritingLayer):
    def forward(self, *operands, **others):
        memory, key, value = super().forward(*operands, **others)
        return 0 * memory, key, value


def test_a_kernel_does_not_stand_for_a_layer_that_computes_something_else():
    model = models.build_model(SMALL, "cpp")
    model.writing_layer.__class__ = SilentWriting
    with pytest.raises(models.BackendError, match="does not know the layer SilentWriting"):
        model(*pairs())


class Negated(torch.nn.Module):
    def forward(self, weight):
        return -weight


def test_a_parametrized_weight_reaches_the_kernel():
    model = models.build_model(SMALL, "cpp")
    negative = copy.deepcopy(model)
    with torch.no_grad():
        negative.writing_layer.W.neg_()
    parametrize.register_parametrization(model.writing_layer, "W", Negated())
    assert all(torch.equal(rate, negative(*pairs()).rates[name]) for name, rate in model(*pairs()).rates.items())


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


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_second_derivative_is_right_or_raises(backend, monkeypatch):
    options = {"num_time_steps": 30, "embedding_size": 16, "memory_size": 20}
    model = models.build_model(options, backend).double()

    def second():
        rates = model(*pairs(dtype=torch.float64)).rates
        (first,) = torch.autograd.grad(sum(r.square().sum() for r in rates.values()), model.writing_layer.W, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [model.writing_layer.W, model.input_layer.weight])

    if backend == "cpp":
        with pytest.raises(RuntimeError, match="no autograd formula"):
            second()
        return
    ours = second()
    monkeypatch.setattr(models.hebbian_memory, "RECOMPUTE_EVERY", None)
    for gradient, exact in zip(ours, second(), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-9 * exact.abs().max().item())


def test_a_step_that_learns_itself_gets_its_gradient():
    """Recomputation knows the inputs and the state, not what a step holds: such a step is differentiated as it is."""
    gain = torch.tensor(0.5, requires_grad=True)

    def step(state, x):
        return (gain * state[0] + x,), (state[0],)

    state, _ = models.through_time.through_time(step, (torch.ones(1),), torch.ones(1, 4, requires_grad=True), recompute_every=2)
    (gradient,) = torch.autograd.grad(state[0].sum(), gain)
    assert gradient.item() == pytest.approx(4 * 0.5**3 + 1 + 2 * 0.5 + 3 * 0.5**2)


def test_torch_compile_takes_the_whole_network_once_its_backend_is_chosen():
    model, operands = models.build_model(SMALL, "cpp"), pairs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.prepare_backend("cpu")
    torch.testing.assert_close(compiled(*operands).logits, model(*operands).logits)
    compiled(*operands).logits.sum().backward()
    assert model.output_layer.weight.grad is not None
    assert torch.export.export(model, operands).module()(*operands).logits.shape == (3, 10)
