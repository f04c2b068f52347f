"""The examples, the notebook and the program in docs/model.md run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.another_neuron import AdaptiveNeuron
from examples.another_rule import OjaRule
from models.neurons import LIFNeuron, population

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "associative_memory.ipynb"


def printed(notebook) -> str:
    outputs = [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def check_notebook(notebook) -> None:
    """The notebook recalls images from corrupted copies, learns its own vectors, and contains every figure."""
    text = printed(notebook)
    assert "20 of 20 images recalled from themselves" in text
    assert int(re.search(r"(\d+) of 20 images recalled from a copy", text)[1]) >= 14
    last = re.findall(r"accuracy +([\d.]+) %.*silent: (.*)", text)[-1]
    assert float(last[0]) > 95 and last[1] == "none"
    assert float(re.search(r"([\d.]+) % of 380 recalled", text)[1]) > 85
    assert json.dumps(notebook).count('"image/png"') == 7


def test_the_notebook_is_committed_with_its_outputs():
    assert NOTEBOOK.stat().st_size < 10**6
    check_notebook(json.loads(NOTEBOOK.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_running_the_notebook_gives_its_stated_results():
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    check_notebook(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["another_rule", "another_neuron"])
def test_an_example_runs_and_draws_its_figure(name, tmp_path):
    command = [sys.executable, "-m", f"examples.{name}"]
    environment = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_network_of_the_model_page_recalls_and_learns():
    text = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    torch.manual_seed(1)
    network = names["Recall"](4, 20)
    keys, values = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    spikes = network(keys, values, keys[:, 0])
    assert spikes.shape == (3, 20) and spikes.any()
    spikes.sum().backward()
    assert all(weight.grad.any() for weight in (network.key.weight, network.value.weight, network.feedback.weight))


def test_the_lines_of_the_page_on_own_data_give_gradients():
    text = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert names["output"].logits.shape == (20, 4)
    assert all(weight.grad.any() for weight in names["network"].parameters())


def test_an_adaptive_neuron_fires_less_than_the_default_one():
    current = torch.full((1, 1, 1), 0.3)
    adaptive, lif = (int(population(neuron, current, 400).spikes.sum()) for neuron in (AdaptiveNeuron(), LIFNeuron()))
    assert 0 < adaptive < 0.8 * lif


def test_ojas_rule_lets_a_weight_decay_where_the_value_neuron_is_active():
    rule, weight, active, still = OjaRule(), torch.full((1, 1, 1), 0.5), torch.full((1, 1), 0.5), torch.zeros(1, 1)
    assert rule.update(weight, active, still).item() == pytest.approx(0.5 - 0.3 * 0.5 * 0.5 * 0.5)
    assert rule.update(weight, still, active).item() == 0.5
    assert rule.update(0 * weight, active, active).item() == pytest.approx(0.3 * 0.5 * 0.5)
