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

slow = Slow(tau_mem=7.0, slowness=3.0)

class Frozen(HebbianRule):
    def update(self, memory, value_trace, key_trace):
        return memory
"""
OWN = ["--neuron", "mine:Slow", "--rule", "mine:Frozen"]
COMMANDS = {
    "resumed": (task.main, ["--resume", "auto", "--output_dir", "run", "--epochs", "2"]),
    "tested": (task.main, ["--resume", "run", "--evaluate"]),
    "drawn": (plot.main, ["--checkpoint_path", "run", "--figure", "memory"]),
}


@pytest.fixture(autouse=True)
def built(tmp_path, monkeypatch):
    """Write the module `mine` where the scripts start. Returns the list of networks that they build."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(data, "TRAINING_SAMPLES", 100)
    monkeypatch.setattr(data, "EVALUATION_SAMPLES", {"validation": 20, "test": 20})
    built, build_model = [], task.models.build_model
    monkeypatch.setattr(task.models, "build_model", lambda *a, **k: built.append(build_model(*a, **k)) or built[-1])
    yield built
    sys.modules.pop("mine", None)


def run(*words) -> int:
    return task.main([*TINY, "--epochs", "1", "--output_dir", "run", *words])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_with_an_own_neuron_and_rule_is_resumed_tested_and_drawn(command, built, capsys):
    main, words = COMMANDS[command]
    assert run(*OWN, "--tau_mem", "5") == 0
    dynamics = built[-1].dynamics
    assert (type(dynamics.neuron).__name__, dynamics.neuron.tau_mem, dynamics.neuron.slowness) == ("Slow", 5.0, 2.0)
    assert type(dynamics.rule).__name__ == "Frozen"
    record = checkpoints.load("run/checkpoint.pth.tar")["params"]
    assert (record["neuron"], record["rule"]) == ("mine:Slow", "mine:Frozen")

    sys.modules.pop("mine")
    assert f"give {' '.join(OWN)} again" in refuse(capsys, *words, status=2, main=main)
    assert "mine" not in sys.modules  # a module is not imported because a checkpoint names it
    other = ["--neuron", "mine:slow", *OWN[2:]]
    assert "neuron mine:slow (checkpoint: mine:Slow)" in refuse(capsys, *words, *other, status=2, main=main)
    assert main([*words, *OWN]) == 0
    assert checkpoints.described(built[-1].dynamics) == checkpoints.described(dynamics)


def test_options_take_the_constants_of_a_given_neuron_object(capsys):
    assert task.main([*TINY, "--neuron", "mine:slow", "--print_options"]) == 0
    assert "tau_mem: 7.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--neuron mine", 2, "--neuron: must be MODULE:NAME"),
        ("--neuron nothing:Here", 1, "No module named 'nothing'"),
        ("--neuron math:pi", 2, "neuron: must have the methods of LIFNeuron; 3.14"),
        ("--rule mine:slow", 2, "lacks update_trace, update"),
        ("--rule mine:Fast", 1, "has no attribute 'Fast'"),
        ("--neuron mine:slow --tau_mem 5", 2, "tau_mem 5.0: the given neuron has 7.0"),
    ],
)
def test_an_unusable_neuron_or_rule_is_named(capsys, words, status, said):
    assert said in refuse(capsys, *TINY, *words.split(), "--output_dir", "run", status=status)


def test_a_neuron_that_differs_from_the_checkpoint_is_refused(tmp_path, capsys):
    assert run() == 0
    tested = ["--resume", "run", "--evaluate", "--neuron", "mine:Slow"]
    assert "options differ: neuron mine:Slow (checkpoint: )" in refuse(capsys, *tested, status=2)
    (tmp_path / "run").rename(tmp_path / "other")
    assert run("--neuron", "mine:Slow") == 0
    (tmp_path / "mine.py").write_text(MINE.replace("constant(2.0)", "constant(2.5)"))
    sys.modules.pop("mine")
    line = refuse(capsys, *tested)
    assert "2.0" in line and "2.5" in line
