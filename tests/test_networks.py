"""The other networks: what they compute, how large they are, that they learn, and that all of the task script serves them."""

import math
import os
import signal

import golden
import pytest
import torch
import yaml
from test_distributed import assert_same_training, distributed, run
from test_task import assert_same_run, refuse
from torch.nn.functional import cross_entropy

import data
import memorizing_associations_task as task
import models
import plot_memorizing_associations_task as plot
from models.networks import NETWORKS, network_options
from models.neurons import LIFNeuron
from utils import checkpoints
from utils.options import network_defaults

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


def test_h_mem_may_add_outer_products_of_signed_keys_and_values():
    torch.manual_seed(1)
    samples = data.training_samples(0, 5, 0, 3, TINY["num_classes"], TINY["feature_size"], 1)
    for rectified in (True, False):
        model = models.build_model(TINY | {"network": "h_mem", "rule": "sum", "rectified": rectified})
        activity = model(samples.features, samples.labels, samples.query, record=True).activity
        outer_products = torch.einsum("blv,blk->bvk", activity["write_value"], activity["write_key"])
        torch.testing.assert_close(activity["memory"], outer_products)
        assert all(bool((activity[name] < 0).any()) != rectified for name in ("write_key", "write_value", "read_key"))


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_has_as_many_parameters_as_the_spiking_one(name):
    assert size(models.build_model({"network": name})) == pytest.approx(size(models.build_model({})), rel=0.1)


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_recalls_from_what_it_was_shown(name):
    """Another label of the pair that is asked for changes the answer, so does another query, and every parameter takes part."""
    torch.manual_seed(1)
    model = models.build_model(TINY | {"network": name, "thr": 0.01})
    samples = data.training_samples(0, 20, 0, 3, TINY["num_classes"], TINY["feature_size"], 1)
    output = model(samples.features, samples.labels, samples.query)
    assert bool(output.rates) == models.spikes(name)
    cross_entropy(output.logits, samples.answer).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    asked = (samples.labels == samples.answer.unsqueeze(1)).long()
    relabelled = model(samples.features, (samples.labels + asked) % TINY["num_classes"], samples.query)
    requeried = model(samples.features, samples.labels, samples.query.roll(1, 0))
    before_the_last = asked[:, -1] == 0
    for other in (relabelled, requeried):
        assert (other.logits - output.logits)[before_the_last].abs().max() > 1e-6


@pytest.mark.parametrize("name", ["recurrent_lif", "adaptive_lif"])
def test_rates_are_spikes_per_second(name):
    torch.manual_seed(1)
    model = models.build_model(TINY | {"network": name, "thr": 0.01})
    samples = data.training_samples(0, 20, 0, 3, TINY["num_classes"], TINY["feature_size"], 1)
    output = model(samples.features, samples.labels, samples.query, record=True)
    for population, spikes in output.activity.items():
        assert spikes.any()
        torch.testing.assert_close(output.rates[population], 1000 * spikes.mean(1))  # a step is 1 ms


@pytest.mark.parametrize("name", OTHERS)
def test_a_process_whose_part_of_a_batch_is_empty_takes_part(name):
    model = models.build_model(TINY | {"network": name})
    samples = data.training_samples(0, 0, 0, 3, TINY["num_classes"], TINY["feature_size"], 1)
    model(samples.features, samples.labels, samples.query).logits.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


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
    silent = adaptive.neuron.step(-100 * current[:, 0], neurons)
    later = adaptive.neuron.step(-100 * current[:, 0], silent)
    assert not silent.spikes.any() and silent.adaptation.all()
    torch.testing.assert_close(later.adaptation, math.exp(-1 / 20) * silent.adaptation)


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
    for network in models.NETWORKS.keys() - {"hebbian_snn"}:
        with pytest.raises(ValueError, match="neuron: hebbian_snn alone takes another one"):
            models.build_model({"network": network}, neuron=LIFNeuron())
    with pytest.raises(TypeError, match="nuron"):
        models.build_model({}, nuron=LIFNeuron())


# The task script

RUN = "--sequence_length 2 --num_classes 3 --feature_size 5 --batch_size 62 --seed 1 --workers 0 --device cpu".split()


def script(network: str, folder, *more) -> list[str]:
    """A command line of the task script for a tiny network."""
    sizes = {name: value for name, value in TINY.items() if name in network_options(network) and name not in ("num_classes",)}
    sizes |= {"embedding_size": 8, "memory_size": 12, "feature_size": 5}
    options = [f"--{name}={value}" for name, value in sizes.items() if name in network_options(network)]
    return [*RUN, "--network", network, *options, "--output_dir", str(folder), *more]


@pytest.fixture
def short_epochs(monkeypatch):
    monkeypatch.setattr(data, "TRAINING_SAMPLES", 250)
    monkeypatch.setattr(data, "EVALUATION_SAMPLES", {"validation": 100, "test": 100})


@pytest.mark.parametrize("name", OTHERS)
def test_a_killed_training_continues_bit_for_bit_and_is_tested_at_other_lengths(
    name, short_epochs, tmp_path, monkeypatch, capsys
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert task.main(script(name, whole, "--epochs", "2")) == 0
    assert f"{name}: " in capsys.readouterr().out
    steps, step = [], task.train_step

    def train_step(*arguments, **others):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **others)

    monkeypatch.setattr(task, "train_step", train_step)
    assert task.main(script(name, killed, "--epochs", "2")) == 128 + signal.SIGTERM
    assert task.main(["--resume", str(killed), "--output_dir", str(killed)]) == 0  # the network comes from the checkpoint
    assert_same_run(killed, whole)

    capsys.readouterr()
    assert task.main(["--resume", str(whole), "--evaluate", "--sequence_length", "1,3"]) == 0
    assert "sequence_length   3  loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", [n if n == "recurrent_lif" else pytest.param(n, marks=pytest.mark.slow) for n in OTHERS])
def test_two_processes_train_as_one_does(name, tmp_path):
    """In float64; the last batch of an epoch has fewer samples than there are processes, so that one of them has none."""
    one, two = tmp_path / "one", tmp_path / "two"
    command = script(name, one, "--epochs", "1", "--batch_size", "83")
    assert run(*command)[0] == 0
    status, _, err = run(*script(name, two, "--epochs", "1", "--batch_size", "83"), *distributed(2))
    assert status == 0, err
    assert_same_training(one, two)


def test_a_network_has_its_own_options_and_defaults(capsys):
    task.main(["--network", "h_mem", "--print_options"])
    record = yaml.safe_load(capsys.readouterr().out)
    assert (record["gamma_pos"], record["gamma_neg"], record["learning_rate"]) == (0.1, 0.1, 0.001)
    assert not {"thr", "readout_delay", "l2", "l2_decay", "positions"} & record.keys()
    assert network_defaults("hebbian_snn")["gamma_pos"] == 0.3
    assert refuse(capsys, "--network", "lstm", "--thr", "0.2", status=2).endswith(
        "--thr: --network lstm has no such option; leave that out (--help lists the options)"
    )
    assert "--l2, --rule: --network transformer has no" in refuse(
        capsys, "--network", "transformer", "--rule", "sum", "--l2", "1", status=2
    )
    assert "--rectified: --network hebbian_snn has no" in refuse(capsys, "--rectified", "false", status=2)


def test_a_checkpoint_knows_its_network(short_epochs, tmp_path, capsys):
    """One without a network, as all before there were others, is of the published one."""
    assert task.main(script("lstm", tmp_path, "--epochs", "1")) == 0
    file = tmp_path / checkpoints.BEST
    assert "network transformer (checkpoint: lstm)" in refuse(capsys, "--network", "transformer", "--resume", file, status=2)
    assert "--gamma_pos: --network lstm has no" in refuse(capsys, "--resume", file, "--gamma_pos", "1", "--evaluate", status=2)
    assert "cpp: it runs hebbian_snn only" in refuse(capsys, "--resume", file, "--evaluate", "--backend", "cpp", status=1)
    assert plot.main(["--checkpoint_path", str(file)]) == 1
    assert "of the network lstm; only hebbian_snn has the spikes and memory" in capsys.readouterr().err
    assert checkpoints.load(golden.FOLDER / "published_format_checkpoint.pth.tar")["params"]["network"] == "hebbian_snn"
    model = models.build_model({"network": "lstm", "memory_size": 5})
    checkpoints.save_model(tmp_path / "mine.pth.tar", model, {"network": "lstm", "memory_size": 5})
    loaded = checkpoints.load_model(tmp_path / "mine.pth.tar")
    assert torch.equal(loaded.output_layer.weight, model.output_layer.weight)
