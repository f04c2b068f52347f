"""The examples run from their own commands, at a tiny size, and hand in what they define."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.another_neuron import AdaptiveNeuron
from models.neurons import LIFNeuron, population


@pytest.mark.slow
@pytest.mark.parametrize("name", ["another_rule", "another_neuron"])
def test_an_example_runs_and_draws_its_figure(name, tmp_path):
    command = [sys.executable, "-m", f"examples.{name}", "1", "reference"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy") == 2
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_network_of_the_model_page_recalls_and_learns():
    text = (Path(__file__).parents[1] / "docs" / "model.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    torch.manual_seed(1)
    network = names["Recall"](4, 20)
    keys, values = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    spikes = network(keys, values, keys[:, 0])
    assert spikes.shape == (3, 20) and spikes.any()
    spikes.sum().backward()
    assert all(weight.grad.any() for weight in (network.key.weight, network.value.weight, network.feedback.weight))


def test_an_adaptive_neuron_fires_less_than_the_published_one():
    current = torch.full((1, 1, 1), 0.3)
    adaptive, lif = (int(population(neuron, current, 400).spikes.sum()) for neuron in (AdaptiveNeuron(), LIFNeuron()))
    assert 0 < adaptive < 0.8 * lif
