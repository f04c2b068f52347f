"""Checkpoints: a crash spoils none, damaged ones are refused, those of the original implementation are read and written."""

import argparse
import csv
import io
import os
import random
import stat
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import PUBLISHED
from helpers import assert_same

import data
import memorizing_associations_task as task
import models
import plot_memorizing_associations_task as plot
from examples.another_neuron import AdaptiveNeuron
from examples.another_rule import OjaRule
from experiments import export
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule
from utils import checkpoints
from utils.checkpoints import LAST
from utils.errors import UserError


def published() -> dict:
    return torch.load(PUBLISHED, weights_only=False)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """The checkpoint of the original implementation, saved by this program."""
    path = tmp_path_factory.mktemp("ours") / "ours.pth.tar"
    past = {"history": [{"epoch": 1, "train_loss": 1.2}, {"epoch": 2, "train_loss": 1.1}]}
    checkpoints.save(path, checkpoints.load(PUBLISHED) | past)
    return path


# Writing


def test_saving_syncs_the_file_before_renaming_it_and_the_folder_after(tmp_path, monkeypatch):
    """Only a crash of the machine shows a wrong order; a killed process does not."""
    calls, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        calls.append(("fsync", "folder" if stat.S_ISDIR(status.st_mode) else status.st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(("replace", new.name)), replace(old, new)))
    checkpoints.save(tmp_path / "a.pth.tar", {"epoch": 1, "weights": torch.zeros(100)})
    size = (tmp_path / "a.pth.tar").stat().st_size
    assert calls == [("fsync", size), ("replace", "a.pth.tar"), ("fsync", "folder")]


def test_saving_does_not_write_through_a_planted_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f".a.pth.tar.{os.getpid()}.tmp").symlink_to(tmp_path / "precious")
    checkpoints.save(tmp_path / "a.pth.tar", {"epoch": 1})
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "a.pth.tar").is_symlink()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError, match=r"a: cannot be written \(No space left on device\); make room"):
        checkpoints.write_atomically(tmp_path / "a", fails)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# Damage


def damaged(content: bytearray, rng: random.Random) -> bytes:
    """The content cut off, with one bit flipped (anywhere, or in the archive's directory), or with a block overwritten."""
    kind, place = rng.choice(["cut", "bit", "directory", "block"]), rng.randrange(len(content))
    if kind == "cut":
        return content[:place]
    if kind == "block":
        content[place : place + 512] = rng.choice([bytes(512), rng.randbytes(512)])
        return content
    place = rng.randrange(content.index(b"PK\1\2"), len(content)) if kind == "directory" else place
    content[place] ^= 1 << rng.randrange(8)
    return content


@pytest.mark.parametrize("kind", ["ours", "published"])
def test_damaged_files_are_refused_or_load_unchanged(kind, ours, tmp_path):
    path, copy, rng, refused = ours if kind == "ours" else PUBLISHED, tmp_path / "damaged.pth.tar", random.Random(1), 0
    original, known = path.read_bytes(), checkpoints.load(path)
    for number in range(100):
        copy.write_bytes(damaged(bytearray(original), rng))
        try:
            assert_same(checkpoints.load(copy), known, f"damage {number} was loaded:")
        except UserError as refusal:
            assert str(refusal).startswith(f"{copy}: ") and len(str(refusal).splitlines()) == 1
            refused += 1
    assert refused > 50


def of_a_folder() -> bytes:
    """An entry is marked as a folder: PyTorch would read uninitialized memory."""
    content = bytearray(PUBLISHED.read_bytes())
    content[content.index(b"PK\1\2", content.index(b"PK\1\2") + 1) + 38] |= 0x10
    return content


def compressed() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(PUBLISHED) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in archive.infolist():
            other.writestr(entry.filename, archive.read(entry))
    return packed.getvalue()


NO_CHECKPOINT = [
    (None, "No such file or directory; give a checkpoint"),
    (b"memory_size: 100\n", "damaged, or not a checkpoint"),
    (of_a_folder(), "damaged in .*; use another checkpoint"),
    (compressed(), "refused, it is compressed"),
    ([1, 2], "not a checkpoint of this program or of the original implementation"),
    ({"epoch": 3, "model": {}, "state_dict": {}}, "not a checkpoint of this program or of the original implementation"),
]


@pytest.mark.parametrize(("content", "message"), NO_CHECKPOINT, ids=range(len(NO_CHECKPOINT)))
def test_a_file_that_is_no_checkpoint_is_refused(content, message, tmp_path):
    path = tmp_path / "file.pth.tar"
    if isinstance(content, bytes | bytearray):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"file\.pth\.tar: {message}"):
        checkpoints.load(path)


def changed(content: dict, *path_and_value) -> dict:
    """Replace the value under a path of keys. A callable gets the old value, None removes it."""
    *path, last, value = path_and_value
    part = content
    for key in path:
        part = vars(part[key]) if isinstance(part[key], argparse.Namespace) else part[key]
    part[last] = value(part[last]) if callable(value) else value
    if value is None:
        del part[last]
    return content


WRONG_FIELDS = [
    ("writing_layer.W: .*not finite", ("state_dict", "writing_layer.W", lambda w: w * float("nan"))),
    ("does not fit the network .*input_layer.weight", ("state_dict", "input_layer.weight", None)),
    ("not a matrix of ones", ("state_dict", "encoding_layer.encoding", lambda w: w + 1)),
    ("epoch: must be a whole number", ("epoch", "3")),
    ("sample: must be a whole number", ("sample", -1)),
    ("best_acc: .*not finite", ("best_acc", torch.tensor(float("nan")))),
    ("exp_avg of parameter 0: .*not finite", ("optimizer", "state", 0, "exp_avg", lambda m: m / 0)),
    ("exp_avg_sq of parameter 1: .*not finite", ("optimizer", "state", 1, "exp_avg_sq", lambda m: m - 1)),
    ("memory_size must be of type int", ("params", "memory_size", "many")),
    ("thr must be finite", ("params", "thr", float("nan"))),
    ("params: epochs: must be a 64-bit number, a word,", ("params", "epochs", 10**400)),
    ("running: train_loss: holds a number that is not finite", ("running", {"train_loss": float("inf")})),
    ("history: train_loss: holds a number", ("history", [{"train_loss": "1.2"}])),
]


@pytest.mark.parametrize(("message", "path"), WRONG_FIELDS, ids=range(len(WRONG_FIELDS)))
def test_wrong_fields_are_named(message, path, tmp_path):
    torch.save(changed(published(), *path), tmp_path / "changed.pth.tar")
    with pytest.raises(UserError, match=rf"changed\.pth\.tar: .*{message}") as refusal:
        checkpoints.load_model(tmp_path / "changed.pth.tar", "reference")
    assert len(str(refusal.value).splitlines()) == 1


# Files that lack something


@pytest.mark.parametrize(
    "change",
    [
        ("optimizer", None),
        ("optimizer", {"state": {}, "param_groups": []}),
        ("optimizer", "param_groups", 0, "weight_decay", 0.01),
        ("optimizer", "state", 0, "exp_avg", lambda m: m[1:]),
    ],
    ids=range(4),
)
def test_networks_without_a_valid_adam_state_are_read(change, tmp_path):
    torch.save(changed(published(), *change), tmp_path / "network.pth.tar")
    assert_same(checkpoints.load(tmp_path / "network.pth.tar"), checkpoints.load(PUBLISHED) | {"optimizer": None})


def test_a_checkpoint_of_weights_and_options_alone_is_evaluated_and_trained(tmp_path, capsys, monkeypatch):
    path = str(tmp_path / "stripped.pth.tar")
    torch.save({key: published()[key] for key in ("params", "state_dict")}, path)
    assert task.main(["--resume", path, "--evaluate", "--device", "cpu"]) == 0
    assert " * Acc 34.0" in capsys.readouterr().out
    monkeypatch.setattr(data, "TRAINING_SAMPLES", 100)
    monkeypatch.setitem(data.EVALUATION_SAMPLES, "validation", 50)
    assert task.main(["--resume", path, "--epochs", "1", "--output_dir", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert f"{path} contains no optimizer state; Adam starts from scratch" in capsys.readouterr().out
    optimizer = checkpoints.load(tmp_path / "run" / LAST)["optimizer"]
    assert {moment["step"].item() for moment in optimizer["state"].values()} == {1}


def test_a_missing_option_gets_its_default_and_an_unknown_key_is_ignored(ours, tmp_path):
    content = changed(torch.load(ours), "params", "tau_trace", None)
    torch.save(content | {"digest": "f" * 64, "log_dir": "runs/1"}, tmp_path / "other.pth.tar")
    assert_same(checkpoints.load(tmp_path / "other.pth.tar"), checkpoints.load(ours))


@pytest.mark.parametrize(("option", "refused"), [({"network": "lstm"}, True), ({"network": "hebbian_snn"}, False)])
def test_a_removed_option_in_a_checkpoint_is_refused_unless_at_its_default(option, refused, ours, tmp_path, capsys):
    path, content = tmp_path / "v0.3.pth.tar", torch.load(ours)
    torch.save(content | {"params": content["params"] | option}, path)
    assert task.main(["--resume", str(path), "--evaluate", "--device", "cpu"]) == refused
    assert ("--network: removed after v0.3; see CHANGELOG.md" in capsys.readouterr().err) == refused


# Use as a library


def test_a_network_is_saved_loaded_and_evaluated(tmp_path, capsys):
    path, sizes = tmp_path / "mine.pth.tar", {"num_classes": 3, "num_time_steps": 40, "embedding_size": 16, "memory_size": 20}
    model = models.build_model(sizes)
    model.load_state_dict(checkpoints.load(PUBLISHED)["state_dict"])
    checkpoints.save_model(path, model, {"sequence_length": 2})
    assert task.main(["--resume", str(path), "--evaluate", "--device", "cpu", "--sequence_length", "1,2"]) == 0
    rows = list(csv.DictReader((tmp_path / "mine.accuracy_by_length.csv").read_text().splitlines()))
    assert [(row["sequence_length"], row["trained_length"]) for row in rows] == [("1", "2"), ("2", "2")]
    assert rows[1]["accuracy"] == "34.0"
    # A saved network may have been trained on other vectors than the test set's; the original implementation's was not.
    said = []
    for network in (path, PUBLISHED):
        capsys.readouterr()
        assert task.main(["--resume", str(network), "--evaluate", "--device", "cpu"]) == 0
        assert plot.main(["--checkpoint_path", str(network), "--figure", "memory", "--output", str(tmp_path / "m.png")]) == 0
        said.append(capsys.readouterr().out.count("note: no dataset_seed is recorded"))
    assert said == [2, 0]


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (models.build_model({}), {"memory_size": 21}, "memory_size 21: the network has 100"),
        (models.build_model({}), {"thr": -1.0}, r"thr -1\.0: the network has 0\.1"),
        (models.build_model({}), {"tau_men": 20.0}, "tau_men is not an option of the network; did you mean tau_mem"),
        (torch.nn.Linear(1, 1), {}, "takes a MemorizingAssociations, not Linear"),
    ],
    ids=range(4),
)
def test_a_network_that_does_not_fit_its_options_is_not_saved(network, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints.save_model(tmp_path / "mine.pth.tar", network, options)
    assert not list(tmp_path.iterdir())


TINY = {"num_classes": 3, "num_time_steps": 10, "embedding_size": 8, "memory_size": 8}


def test_constants_changed_in_a_network_are_saved(tmp_path):
    model = models.build_model(TINY, "reference")
    model.dynamics = replace(model.dynamics, rule=HebbianRule(gamma_neg=0.02), readout_delay=3)
    checkpoints.save_model(tmp_path / "mine.pth.tar", model, {"sequence_length": 2})
    loaded = checkpoints.load_model(tmp_path / "mine.pth.tar", "reference")
    assert loaded.dynamics == model.dynamics
    params = checkpoints.load(tmp_path / "mine.pth.tar")["params"]
    assert (params["gamma_neg"], params["sequence_length"]) == (0.02, 2)
    assert models.build_model(params).dynamics == model.dynamics  # all constants


@dataclass(frozen=True)
class OddNeuron(LIFNeuron):
    gains: torch.Tensor = field(default_factory=lambda: torch.zeros(2000))
    surrogate: object = torch.relu


OWN = {"neuron": AdaptiveNeuron(strength=40.0), "rule": OjaRule(eta=0.1)}
ODD = {"neuron": OddNeuron()}
GAINS = torch.zeros(2000).index_fill(0, torch.tensor(1000), 9.0)  # its repr equals that of zeros
SAVED = r"has neuron AdaptiveNeuron\(.*strength=40\.0\), rule OjaRule\(.*eta=0\.1\)"


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        (OWN, {}, f"{SAVED}, not the paper's neuron and rule; give the file's by --neuron and --rule, or by load_model"),
        (OWN, {"neuron": OWN["neuron"]}, rf"{SAVED}, not neuron AdaptiveNeuron\(.*\); give"),
        (OWN, OWN | {"neuron": AdaptiveNeuron(strength=41.0)}, rf"{SAVED}, not .*strength=41\.0"),
        (OWN, OWN | {"rule": HebbianRule()}, rf"{SAVED}, not neuron AdaptiveNeuron\([^()]*\); give"),
        ({}, {"rule": OWN["rule"]}, "has the paper's neuron and rule, not rule OjaRule"),
        (ODD, {"neuron": OddNeuron(gains=GAINS)}, "has neuron OddNeuron"),
        (ODD, {"neuron": OddNeuron(surrogate=torch.sigmoid)}, r"has neuron OddNeuron\(.*relu.*, not .*sigmoid"),
    ],
    ids=range(7),
)
def test_loading_requires_the_neuron_and_rule_of_the_file(saved, given, message, tmp_path):
    model, path = models.build_model(TINY, "reference", **saved), tmp_path / "mine.pth.tar"
    checkpoints.save_model(path, model)
    assert checkpoints.load_model(path, "reference", **saved).dynamics == model.dynamics
    with pytest.raises(UserError, match=rf"mine\.pth\.tar: {message}"):
        checkpoints.load_model(path, **given)


def test_wrapped_and_double_precision_networks_load_unchanged(tmp_path):
    model, path = models.build_model({**TINY, "w_max": np.float64(2.0)}).double(), tmp_path / "mine.pth.tar"
    for wrapped in (model, torch.optim.swa_utils.AveragedModel(model), torch.compile(model)):
        checkpoints.save_model(path, wrapped)
        with torch.device("meta"):
            loaded = checkpoints.load_model(path)
        assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
        assert loaded.dynamics.rule.w_max == 2


# For the original implementation


def types(value):
    """Keys, shapes and types of nested dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape)
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace, {name: type(option) for name, option in vars(value).items()}
    if isinstance(value, dict):
        return type(value), {key: types(part) for key, part in value.items()}
    return [types(part) for part in value] if isinstance(value, list) else type(value)


def test_exporting_restores_a_checkpoint_of_the_original_implementation(ours, tmp_path):
    path = tmp_path / "published.pth.tar"
    assert export.main([str(ours), str(path)]) == 0
    written, original = torch.load(path, weights_only=False), published()
    assert types(written) == types(original)
    assert list(vars(written["params"])) == list(vars(original["params"]))
    assert list(written["state_dict"]) == list(original["state_dict"])
    assert_same(dict(written["state_dict"]), dict(original["state_dict"]))
    assert_same(written["optimizer"]["state"], original["optimizer"]["state"])
    model = checkpoints.DEFAULTS.keys() & vars(original["params"])
    assert len(model) == 15 and all(vars(written["params"])[n] == vars(original["params"])[n] for n in model)


def test_a_network_without_adam_is_exported_for_the_original_implementation(tmp_path):
    checkpoints.save_model(tmp_path / "mine.pth.tar", models.build_model({}), {})
    assert export.main([str(tmp_path / "mine.pth.tar"), str(tmp_path / "published.pth.tar")]) == 0
    written = torch.load(tmp_path / "published.pth.tar", weights_only=False)
    optimizer = torch.optim.Adam([torch.nn.Parameter(weight) for weight in written["state_dict"].values()])
    optimizer.load_state_dict(written["optimizer"])  # as the original implementation does
    assert vars(written["params"]).keys() == vars(published()["params"]).keys()
