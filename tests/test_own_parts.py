"""An own neuron and an own rule in both scripts: --neuron and --rule."""

import sys

import pytest
from helpers import refuse

import data
import memorizing_associations_task as task
import plot_memorizing_associations_task as plot
from utils import checkpoints

TINY = """--sequence_length 2 --num_classes 3 --num_time_steps 10 --embedding_size 8 --memory_size 8 --batch_size 100 --seed 4
    --device cpu --workers 0 --backend reference""".split()
MINE = """
from dataclasses import dataclass
from models.constants import constant
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

@dataclass(frozen=True)
class Slow(LIFNeuron):
    slowness: float = constant(2.0)

    @property
    def alpha(self):
        return super().alpha ** (1 / self.slowness)

slow = Slow(tau_mem=7.0, slowness=3.0)

class Frozen(HebbianRule):
    def update(self, memory, value_trace, key_trace):
        return memory
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A module in the folder where the scripts are started."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(data, "TRAINING_SAMPLES", 100)
    monkeypatch.setattr(data, "EVALUATION_SAMPLES", {"validation": 20, "test": 20})
    yield
    sys.modules.pop("mine", None)


def run(*words) -> int:
    return task.main([*TINY, "--epochs", "1", "--output_dir", "run", *words])


def test_a_run_with_an_own_neuron_and_rule_is_resumed_tested_and_drawn(tmp_path, monkeypatch, capsys):
    own = ["--neuron", "mine:Slow", "--rule", "mine:Frozen", "--tau_mem", "5"]
    built = []
    build_model = task.models.build_model
    monkeypatch.setattr(task.models, "build_model", lambda *a, **k: built.append(build_model(*a, **k)) or built[-1])
    assert run(*own) == 0
    dynamics = built[-1].dynamics
    assert (type(dynamics.neuron).__name__, dynamics.neuron.tau_mem, dynamics.neuron.slowness) == ("Slow", 5.0, 2.0)
    assert type(dynamics.rule).__name__ == "Frozen"
    record = checkpoints.load("run/checkpoint.pth.tar")["params"]
    assert (record["neuron"], record["rule"]) == ("mine:Slow", "mine:Frozen")

    sys.modules.pop("mine")
    commands = {
        "resumed": (task.main, ["--resume", "auto", "--output_dir", "run", "--epochs", "2"]),
        "tested": (task.main, ["--resume", "run", "--evaluate"]),
        "drawn": (plot.main, ["--checkpoint_path", "run", "--figure", "memory"]),
    }
    for main, words in commands.values():
        line = refuse(capsys, *words, status=2, main=main)
        assert "give --neuron mine:Slow --rule mine:Frozen again" in line
        assert "mine" not in sys.modules  # the checkpoint names the module, and that is not enough to import it
        assert "neuron mine:slow (checkpoint: mine:Slow)" in refuse(
            capsys, *words, "--neuron", "mine:slow", "--rule", "mine:Frozen", status=2, main=main
        )
        sys.modules.pop("mine")
    for main, words in commands.values():
        assert main([*words, *own[:4]]) == 0
        assert type(built[-1].dynamics.neuron).__name__ == "Slow" and built[-1].dynamics.neuron.tau_mem == 5


def test_an_object_brings_its_constants(capsys):
    assert task.main([*TINY, "--neuron", "mine:slow", "--print_options"]) == 0
    assert "tau_mem: 7.0" in capsys.readouterr().out
    line = refuse(capsys, *TINY, "--neuron", "mine:slow", "--tau_mem", 5, "--output_dir", "run", status=2)
    assert "tau_mem 5.0: the neuron that is given has 7.0" in line


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("mine", 2, "must be MODULE:NAME"),
        ("nothing:Here", 1, "No module named 'nothing'"),
        ("mine:Fast", 1, "has no attribute 'Fast'"),
    ],
)
def test_what_cannot_be_imported_is_named(capsys, text, status, said):
    line = refuse(capsys, *TINY, "--neuron", text, status=status)
    assert "--neuron" in line and said in line


def test_a_network_of_the_paper_is_not_taken_for_one_with_an_own_neuron(capsys):
    assert run() == 0
    line = refuse(capsys, "--resume", "run", "--evaluate", "--neuron", "mine:Slow", status=2)
    assert "options differ: neuron mine:Slow (checkpoint: )" in line


def test_other_constants_of_the_own_neuron_are_refused(tmp_path, capsys):
    assert run("--neuron", "mine:Slow") == 0
    (tmp_path / "mine.py").write_text(MINE.replace("constant(2.0)", "constant(2.5)"))
    sys.modules.pop("mine")
    line = refuse(capsys, "--resume", "run", "--evaluate", "--neuron", "mine:Slow")
    assert "2.0" in line and "2.5" in line
