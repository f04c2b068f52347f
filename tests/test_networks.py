"""The other networks: what they compute, how large they are, that they learn."""

import golden
import pytest
import torch
from torch.nn.functional import cross_entropy

import data
import models
from models.networks import NETWORKS, network_options

OTHERS = [name for name in NETWORKS if name != "hebbian_snn"]
TINY = {"num_classes": 5, "feature_size": 4, "embedding_size": 8, "memory_size": 12, "num_time_steps": 6, "readout_steps": 3}


def size(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_h_mem_is_the_published_variant_without_spikes():
    expected = golden.load("non_spiking_defaults")
    model = models.build_model(expected.params | {"network": "h_mem"}).double()
    model.load_state_dict(expected.state)
    inputs = expected.inputs
    output = model(inputs["features"], inputs["labels"], inputs["query"], record=True)
    loss = cross_entropy(output.logits, inputs["answer"])
    loss.backward()
    ours = {"logits": output.logits, "cross_entropy": loss} | output.activity
    ours |= {f"gradient of {name}": weight.grad for name, weight in model.named_parameters()}
    theirs = expected.out | {f"gradient of {name}": value for name, value in expected.grad_cross_entropy.items()}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        error = (ours[name] - value).abs().max() / value.abs().max()
        assert error <= 1e-9, f"{name} differs by {error:.3g}"


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_has_as_many_parameters_as_the_spiking_one(name):
    assert size(models.build_model({"network": name})) == pytest.approx(size(models.build_model({})), rel=0.1)


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_recalls_from_what_it_was_shown(name):
    """Another label of the pair that is asked for changes the answer, and every parameter takes part."""
    torch.manual_seed(1)
    model = models.build_model(TINY | {"network": name, "thr": 0.01})
    samples = data.training_samples(0, 20, 0, 3, TINY["num_classes"], TINY["feature_size"], 1)
    output = model(samples.features, samples.labels, samples.query)
    assert bool(output.rates) == models.spikes(name)
    cross_entropy(output.logits, samples.answer).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    asked = (samples.labels == samples.answer.unsqueeze(1)).long()
    other = model(samples.features, (samples.labels + asked) % TINY["num_classes"], samples.query)
    assert (other.logits - output.logits).abs().max() > 1e-6


def test_the_delta_rule_writes_one_pair_after_the_other():
    torch.manual_seed(1)
    model = models.build_model(TINY | {"network": "delta_rule"}).double()
    vectors, values = torch.randn(2, 4, 8).double(), torch.randn(2, 4, 12).double()
    memory = torch.zeros(2, 12, 12).double()
    for n in range(4):
        key = torch.nn.functional.normalize(model.key(vectors[:, n]), dim=-1)
        error = values[:, n] - torch.einsum("bvk,bk->bv", memory, key)
        memory = memory + torch.einsum("bv,bk->bvk", model.write_strength(vectors[:, n]).sigmoid() * error, key)
    torch.testing.assert_close(model.store(vectors, values), memory)


def test_positions_tell_the_pairs_apart():
    """Without them a Transformer sees a set; with them their order matters."""
    samples = data.training_samples(0, 5, 0, 3, TINY["num_classes"], TINY["feature_size"], 1)
    for positions in (False, True):
        torch.manual_seed(1)
        model = models.build_model(TINY | {"network": "transformer", "positions": positions})
        logits = [model(samples.features[:, o], samples.labels[:, o], samples.query).logits for o in ([0, 1, 2], [2, 0, 1])]
        assert torch.allclose(*logits, atol=1e-5) != positions


def test_a_neuron_that_fires_raises_its_threshold():
    plain = models.build_model(TINY | {"network": "recurrent_lif"})
    adaptive = models.build_model(TINY | {"network": "adaptive_lif", "adaptation": 5.0, "tau_adaptation": 20.0})
    unadaptive = models.build_model(TINY | {"network": "adaptive_lif", "adaptation": 0.0})
    current, spikes = torch.full((1, 1, 3), 1.0), []
    for model in (plain, unadaptive, adaptive):
        neurons, fired = model.neuron.initial_state(current[:, 0]), 0
        for _ in range(100):
            neurons = model.neuron.step(current[:, 0], neurons)
            fired += neurons.spikes.sum().item()
        spikes.append(fired)
    assert spikes[0] == spikes[1] > 2 * spikes[2] > 0


def test_linear_attention_learns():
    """Three pairs of three classes, in a hundred steps."""
    torch.manual_seed(1)
    model = models.build_model({"network": "linear_attention", "num_classes": 3, "embedding_size": 32, "memory_size": 32})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    samples = data.training_samples(0, 6_000, 0, 3, 3, 10, 1)
    for start in range(0, 6_000, 60):
        batch = samples[start : start + 60]
        optimizer.zero_grad()
        cross_entropy(model(batch.features, batch.labels, batch.query).logits, batch.answer).backward()
        optimizer.step()
    test = data.evaluation_set("validation", 3, 3, 10, 42)
    assert (model(test.features, test.labels, test.query).logits.argmax(1) == test.answer).float().mean() > 0.9


def test_each_option_is_of_a_network():
    assert network_options("lstm") == {"num_classes": 10, "feature_size": 10, "embedding_size": 32, "memory_size": 96}
    assert network_options("adaptive_lif").keys() > network_options("recurrent_lif").keys()
    assert {"gamma_pos", "thr", "memory_feedback"} <= network_options("hebbian_snn").keys()
    with pytest.raises(ValueError, match="network must be one of hebbian_snn"):
        models.build_model({"network": "hebbian"})
    with pytest.raises(models.BackendError, match="cpp: it runs hebbian_snn only"):
        models.build_model({"network": "lstm"}, "cpp")
