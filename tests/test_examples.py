"""The examples run from their own commands, at a tiny size, and hand in what they define."""

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


def test_an_adaptive_neuron_fires_less_and_less():
    current = torch.full((1, 1, 1), 1.0)
    adaptive, lif = (population(neuron, current, 400).spikes[0, :, 0] for neuron in (AdaptiveNeuron(), LIFNeuron()))
    assert adaptive[:100].sum() > adaptive[300:].sum() > 0
    assert lif[300:].sum() >= lif[100:200].sum() > adaptive[300:].sum()
