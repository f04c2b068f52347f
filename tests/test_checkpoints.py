"""Checkpoints: written in an order that no crash can spoil, read only where they are whole, and whoever wrote them."""

import argparse
import csv
import os
import random
import shutil
import stat
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import PUBLISHED
from helpers import assert_same, refuse

import data
import memorizing_associations_task as task
import models
from examples.another_neuron import AdaptiveNeuron
from examples.another_rule import OjaRule
from experiments import export
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule
from utils import checkpoints
from utils.checkpoints import BEST, LAST
from utils.errors import UserError

RUN_OF_V03 = Path(__file__).with_name("run_of_v0.3")


def published() -> dict:
    return torch.load(PUBLISHED, weights_only=False)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """The published network and its Adam in a file of this program."""
    path = tmp_path_factory.mktemp("ours") / "ours.pth.tar"
    past = {"history": [{"epoch": 1, "train_loss": 1.2}, {"epoch": 2, "train_loss": 1.1}]}
    checkpoints.save(path, checkpoints.load(PUBLISHED) | past)
    return path


# Writing


def test_contents_reach_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    """No kill shows this order, only a crash of the machine does. Some file systems cannot synchronize a folder."""
    calls, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        calls.append(("fsync", "folder" if stat.S_ISDIR(status.st_mode) else status.st_size))
        if stat.S_ISDIR(status.st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    def recorded_replace(source, target):
        calls.append(("replace", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    checkpoints.save(tmp_path / "a.pth.tar", {"epoch": 1, "weights": torch.zeros(100)})
    size = (tmp_path / "a.pth.tar").stat().st_size
    assert calls == [("fsync", size), ("replace", "a.pth.tar"), ("fsync", "folder")]
    assert torch.load(tmp_path / "a.pth.tar")["epoch"] == 1


def test_a_temporary_file_follows_no_link_that_was_planted(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f".a.pth.tar.{os.getpid()}.tmp").symlink_to(tmp_path / "precious")
    checkpoints.save(tmp_path / "a.pth.tar", {"epoch": 1})
    assert (tmp_path / "precious").read_text() == "precious"
    assert torch.load(tmp_path / "a.pth.tar") == {"epoch": 1} and not (tmp_path / "a.pth.tar").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"precious", "a.pth.tar"}


def test_a_failed_write_leaves_what_stood_there_and_nothing_else(tmp_path):
    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    with pytest.raises(UserError, match=r"a: cannot be written \(No space left on device\); make room"):
        checkpoints.write_atomically(tmp_path / "a", fails)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a: cannot be written \(.*dead is a link to what is not there\)"):
        checkpoints.write_atomically(tmp_path / "dead" / "a", fails)
    with pytest.raises(UserError, match=r"dead: .*dead is a link to what is not there; give a checkpoint"):
        checkpoints.load(tmp_path / "dead")


# Damage


def cut(content: bytearray, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flip_a_bit(content: bytearray, rng: random.Random) -> bytes:
    """Anywhere, in the archive's directory, or in one of its headers."""
    headers = [i for i in range(len(content)) if content[i : i + 4] == b"PK\3\4"]
    directory = range(content.index(b"PK\1\2"), len(content))
    place = rng.choice([rng.randrange(len(content)), rng.choice(directory), rng.choice(headers) + rng.randrange(60)])
    content[place] ^= 1 << rng.randrange(8)
    return content


def overwrite_a_block(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    content[start : start + 512] = rng.choice([bytes(512), rng.randbytes(512)])
    return content


@pytest.mark.parametrize("times", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["ours", "published"])
def test_damaged_files_are_refused_or_hold_what_was_written(times, kind, ours, tmp_path):
    path = ours if kind == "ours" else PUBLISHED
    rng, copy = random.Random(1), tmp_path / "damaged.pth.tar"
    original, known = path.read_bytes(), checkpoints.load(path)
    damages = [cut, flip_a_bit, overwrite_a_block]
    refused = 0
    for number in range(times):
        copy.write_bytes(damages[number % len(damages)](bytearray(original), rng))
        try:
            assert_same(checkpoints.load(copy), known, f"damage {number} was loaded:")
        except UserError as refusal:
            assert str(refusal).startswith(f"{copy}: ") and len(str(refusal).splitlines()) == 1
            refused += 1
    assert refused > times / 2


def test_archives_that_torch_never_writes_are_refused(tmp_path):
    path, content = tmp_path / "other.pth.tar", bytearray(PUBLISHED.read_bytes())
    content[content.index(b"PK\1\2", content.index(b"PK\1\2") + 1) + 38] |= 0x10  # a folder: read as what stands in memory
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged in .*; use another checkpoint"):
        checkpoints.load(path)
    with zipfile.ZipFile(PUBLISHED) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as compressed:
        for entry in archive.infolist():
            compressed.writestr(entry.filename, archive.read(entry))
    with pytest.raises(UserError, match=r"other\.pth\.tar: refused, it is compressed, which torch\.save never does"):
        checkpoints.load(path)


def changed(content: dict, *path_and_value) -> dict:
    """With what stands under a path of keys replaced; a callable gets the old value, None removes it."""
    *path, last, value = path_and_value
    part = content
    for key in path:
        part = vars(part[key]) if isinstance(part[key], argparse.Namespace) else part[key]
    part[last] = value(part[last]) if callable(value) else value
    if value is None:
        del part[last]
    return content


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ("writing_layer.W: .*not finite", ("state_dict", "writing_layer.W", lambda w: w * float("nan"))),
        ("does not fit the network .*input_layer.weight", ("state_dict", "input_layer.weight", None)),
        ("not a matrix of ones", ("state_dict", "encoding_layer.encoding", lambda w: w + 1)),
        ("epoch: must be a whole number", ("epoch", "3")),
        ("best_acc: .*not finite", ("best_acc", torch.tensor(float("nan")))),
        ("exp_avg of parameter 0: .*not finite", ("optimizer", "state", 0, "exp_avg", lambda m: m / 0)),
        ("exp_avg_sq of parameter 1: .*not finite", ("optimizer", "state", 1, "exp_avg_sq", lambda m: m - 1)),
        ("memory_size must be of type int", ("params", "memory_size", "many")),
        ("thr must be finite", ("params", "thr", float("nan"))),
        ("params: epochs: must be a number of 64 bits, a word,", ("params", "epochs", 10**400)),
        ("does not fit the network .*writing_layer.W", ("params", "memory_size", 21)),
        ("running: train_loss: holds a number that is not finite", ("running", {"train_loss": float("inf")})),
        ("history: train_loss: holds a number", ("history", [{"train_loss": "1.2"}])),
        ("sample: must be a whole number", ("sample", -1)),
    ],
    ids=range(14),
)
def test_damaged_fields_are_named(message, path, tmp_path):
    torch.save(changed(published(), *path), tmp_path / "changed.pth.tar")
    with pytest.raises(UserError, match=rf"changed\.pth\.tar: .*{message}") as refusal:
        checkpoints.load_model(tmp_path / "changed.pth.tar", "reference")
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; give a checkpoint"),
        (b"", "damaged, or not a checkpoint"),
        (b"memory_size: 100\n", "damaged, or not a checkpoint"),
        ([1, 2], "not a checkpoint of this program or of the original implementation"),
        ({"epoch": 3, "model": {}, "state_dict": {}}, "not a checkpoint of this program or of the original implementation"),
    ],
    ids=range(5),
)
def test_what_is_no_checkpoint_is_refused(content, message, tmp_path):
    path = tmp_path / "file.pth.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"file\.pth\.tar: {message}"):
        checkpoints.load(path)


# Files that lack something


def with_optimizer(optimizer) -> dict:
    content = published()
    weights = [weight.clone().requires_grad_() for weight in content["state_dict"].values()]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adapted = optimizer(weights)
    adapted.step()
    return content | {"optimizer": adapted.state_dict()}


NO_ADAM = {
    "stripped": lambda: {key: published()[key] for key in ("params", "state_dict")},
    "emptied": lambda: published() | {"optimizer": {"state": {}, "param_groups": []}},
    "SGD": lambda: with_optimizer(lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9)),
    "AdamW": lambda: with_optimizer(torch.optim.AdamW),
    "of other shapes": lambda: changed(published(), "optimizer", "state", 0, "exp_avg", lambda m: m[1:]),
}


@pytest.mark.parametrize("kind", NO_ADAM)
def test_networks_without_adam_are_read_all_the_same(kind, tmp_path):
    torch.save(NO_ADAM[kind](), tmp_path / "network.pth.tar")
    checkpoint = checkpoints.load(tmp_path / "network.pth.tar")
    assert checkpoint["optimizer"] is None
    assert checkpoints.load(PUBLISHED)["optimizer"] is not None
    assert checkpoint["epoch"] == (0 if kind == "stripped" else 2)


def test_adam_of_old_pytorch_counts_its_steps_in_plain_numbers(tmp_path):
    content = published()
    for moment in content["optimizer"]["state"].values():
        moment["step"] = int(moment["step"])
    torch.save(content, tmp_path / "old.pth.tar")
    assert_same(checkpoints.load(tmp_path / "old.pth.tar"), checkpoints.load(PUBLISHED))


def test_a_stripped_network_evaluates_and_trains_on(tmp_path, capsys, monkeypatch):
    path = str(tmp_path / "stripped.pth.tar")
    torch.save(NO_ADAM["stripped"](), path)
    assert task.main(["--resume", path, "--evaluate", "--device", "cpu"]) == 0
    assert " * Acc 34.0" in capsys.readouterr().out
    monkeypatch.setattr(data, "TRAINING_SAMPLES", 100)
    monkeypatch.setitem(data.EVALUATION_SAMPLES, "validation", 50)
    assert task.main(["--resume", path, "--epochs", "1", "--output_dir", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert f"{path} contains no optimizer state; Adam starts from scratch" in capsys.readouterr().out
    optimizer = checkpoints.load(tmp_path / "run" / LAST)["optimizer"]
    assert {moment["step"].item() for moment in optimizer["state"].values()} == {1}


def test_an_option_that_came_later_has_its_default_and_a_key_that_is_not_known_is_ignored(ours, tmp_path):
    content = changed(torch.load(ours), "params", "tau_trace", None)
    torch.save(content | {"digest": "f" * 64, "log_dir": "runs/1"}, tmp_path / "other.pth.tar")
    assert_same(checkpoints.load(tmp_path / "other.pth.tar"), checkpoints.load(ours))


def test_the_unfinished_epoch_of_v03_is_read():
    """Its sums have other names, and it counted correct samples where there are percents today."""
    path = RUN_OF_V03 / LAST
    ours, theirs = checkpoints.load(path), torch.load(path)
    renamed = {"loss": "train_loss", "accuracy": "train_accuracy", "regularization": "rate_regularization"}
    expected = {renamed.get(name, name): value for name, value in theirs["running"].items()}
    assert ours["running"] == expected | {"train_accuracy": 100 * theirs["running"]["accuracy"]}
    assert (ours["epoch"], ours["sample"], ours["best_acc"]) == (1, 128, 41.0)
    (line,) = ours["history"]
    assert line["epoch"] == 1 and line["write_key"] == theirs["history"][0]["rates"]["write_key"]
    assert_same(ours["state_dict"], dict(theirs["state_dict"]))


def test_removed_options_of_a_checkpoint_are_refused_unless_they_changed_nothing(ours, tmp_path, capsys):
    path = tmp_path / "v0.3.pth.tar"
    for options, status in (({"network": "lstm"}, 1), ({"mixed_lengths": 2}, 1), ({"network": "hebbian_snn"}, 0)):
        content = torch.load(ours)
        torch.save(content | {"params": content["params"] | options}, path)
        assert task.main(["--resume", str(path), "--evaluate", "--device", "cpu"]) == status
        name = next(iter(options))
        expected = f"error: {path}: params: --{name}: removed after v0.3; see CHANGELOG.md\n"
        assert capsys.readouterr().err == (expected if status else "")


def test_the_best_checkpoint_does_not_overwrite_one_inside_the_same_epoch(tmp_path, capsys):
    source, last, best = (folder / name for folder, name in ((RUN_OF_V03, LAST), (tmp_path, LAST), (tmp_path, BEST)))
    shutil.copy(source, last)
    checkpoints.save(best, torch.load(source) | {"sample": 0, "running": {}})
    assert f"{last} is the last checkpoint of this run; resume that" in refuse(
        capsys, "--resume", best, "--output_dir", tmp_path
    )
    assert last.read_bytes() == source.read_bytes()


def test_the_newest_whole_checkpoint_of_a_folder_is_found(ours, tmp_path, capsys):
    assert checkpoints.find(tmp_path) is None
    for name in (LAST, BEST):
        shutil.copy(ours, tmp_path / name)
    assert checkpoints.find(tmp_path)[0].name == LAST
    (tmp_path / LAST).write_bytes(b"")
    assert checkpoints.find(tmp_path)[0].name == BEST
    assert f"going back to {tmp_path / BEST}, of epoch 2" in capsys.readouterr().err
    (tmp_path / BEST).write_bytes(b"")
    assert checkpoints.find(tmp_path, quiet=True) is None
    with pytest.raises(UserError, match=rf"{LAST}: damaged.*; .*{BEST}: damaged"):
        checkpoints.find(tmp_path)


# Use as a library


@pytest.mark.parametrize("trained", [{"sequence_length": 2}, {}])
def test_a_network_is_saved_loaded_and_evaluated(trained, tmp_path):
    path, sizes = tmp_path / "mine.pth.tar", {"num_classes": 3, "num_time_steps": 40, "embedding_size": 16, "memory_size": 20}
    model = models.build_model(sizes)
    model.load_state_dict(checkpoints.load(PUBLISHED)["state_dict"])
    checkpoints.save_model(path, model, trained)
    assert task.main(["--resume", str(path), "--evaluate", "--device", "cpu", "--sequence_length", "1,2"]) == 0
    rows = list(csv.DictReader((tmp_path / "mine.accuracy_by_length.csv").read_text().splitlines()))
    assert [(row["sequence_length"], row["trained_length"]) for row in rows] == [(n, "2" if trained else "") for n in "12"]
    assert rows[1]["accuracy"] == "34.0"
    published = logits(checkpoints.load_model(PUBLISHED, "reference"))
    assert torch.equal(logits(checkpoints.load_model(path, "reference")), published)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 21}, "memory_size 21: the network has 20"),
        ({"thr": 0.2}, "thr 0.2: the network has 0.1"),
        ({"thr": -1.0}, r"thr -1\.0: the network has 0\.1"),
        ({"tau_men": 20.0}, "tau_men is no option of the network; did you mean tau_mem"),
    ],
)
def test_a_network_is_not_saved_with_options_of_another(options, message, tmp_path):
    model = models.build_model({"memory_size": 20})
    with pytest.raises(ValueError, match=message):
        checkpoints.save_model(tmp_path / "mine.pth.tar", model, options)
    with pytest.raises(ValueError, match="takes a MemorizingAssociations, not Linear"):
        checkpoints.save_model(tmp_path / "mine.pth.tar", torch.nn.Linear(1, 1))
    assert not list(tmp_path.iterdir())


TINY = {"num_classes": 3, "num_time_steps": 10, "embedding_size": 8, "memory_size": 8}


def logits(model):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(4, 2, 10, generator=generator)
    with torch.no_grad():
        return model(features, torch.tensor([[0, 1]] * 4), features[:, 0], record=True).activity["write_value"]


def test_constants_changed_in_a_network_are_saved(tmp_path):
    model = models.build_model(TINY, "reference")
    model.dynamics = replace(model.dynamics, rule=HebbianRule(gamma_neg=0.02), readout_delay=3)
    checkpoints.save_model(tmp_path / "mine.pth.tar", model, {"sequence_length": 2})
    loaded = checkpoints.load_model(tmp_path / "mine.pth.tar", "reference")
    assert loaded.dynamics == model.dynamics
    params = checkpoints.load(tmp_path / "mine.pth.tar")["params"]
    assert (params["gamma_neg"], params["sequence_length"]) == (0.02, 2)
    assert models.build_model(params).dynamics == model.dynamics  # all of them


def test_an_own_neuron_and_an_own_rule_are_to_be_given_again(tmp_path, capsys):
    path, parts = tmp_path / "mine.pth.tar", {"neuron": AdaptiveNeuron(strength=40.0), "rule": OjaRule(eta=0.1)}
    model = models.build_model(TINY, "reference", **parts)
    checkpoints.save_model(path, model, {"sequence_length": 2})
    assert torch.equal(logits(checkpoints.load_model(path, "reference", **parts)), logits(model))
    assert not torch.equal(logits(models.build_model(TINY, "reference")), logits(model))
    saved = r"neuron AdaptiveNeuron\(.*strength=40\.0\), rule OjaRule\(.*eta=0\.1\)"
    for given, message in (
        ({}, f"has {saved}, not the published neuron and rule; give those of the file: --neuron and --rule, or load_model\\("),
        ({"neuron": parts["neuron"]}, rf"has {saved}, not neuron AdaptiveNeuron\(.*\); give"),
        (parts | {"neuron": AdaptiveNeuron(strength=41.0)}, rf"has {saved}, not .*strength=41\.0"),
        (parts | {"rule": HebbianRule()}, rf"has {saved}, not neuron AdaptiveNeuron\([^()]*\); give"),
    ):
        with pytest.raises(UserError, match=rf"mine\.pth\.tar: {message}"):
            checkpoints.load_model(path, **given)
    assert "has neuron AdaptiveNeuron(" in refuse(capsys, "--resume", path, "--evaluate")
    with pytest.raises(UserError, match=r"has the published neuron and rule, not rule OjaRule"):
        checkpoints.load_model(PUBLISHED, rule=OjaRule())


@dataclass(frozen=True)
class OddNeuron(LIFNeuron):
    gains: torch.Tensor = field(default_factory=lambda: torch.zeros(2000))
    surrogate: object = torch.relu
    strength: float = 1.0


def test_constants_of_any_kind_are_saved_and_compared(tmp_path):
    path, other = tmp_path / "mine.pth.tar", torch.zeros(2000)
    other[1000] = 9.0
    neuron = OddNeuron(strength=np.float64(0.5))
    checkpoints.save_model(path, models.build_model({**TINY, "w_max": np.float64(2.0)}, "reference", neuron=neuron))
    assert checkpoints.load_model(path, "reference", neuron=OddNeuron(strength=0.5)).dynamics.rule.w_max == 2.0
    with pytest.raises(UserError, match="has neuron OddNeuron"):
        checkpoints.load_model(path, "reference", neuron=OddNeuron(strength=0.5, gains=other))
    with pytest.raises(UserError, match=r"has neuron OddNeuron\(.*relu.*, not .*sigmoid"):
        checkpoints.load_model(path, "reference", neuron=OddNeuron(strength=0.5, surrogate=torch.sigmoid))


def test_wrapped_networks_and_double_precision_come_back_as_they_were(tmp_path):
    model, path = models.build_model(TINY).double(), tmp_path / "mine.pth.tar"
    for wrapped in (model, torch.optim.swa_utils.AveragedModel(model), torch.compile(model)):
        checkpoints.save_model(path, wrapped)
        with torch.device("meta"):
            loaded = checkpoints.load_model(path)
        assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_saving_and_loading_draw_no_random_numbers(tmp_path):
    model = models.build_model(TINY)
    torch.manual_seed(1)
    checkpoints.load_model(PUBLISHED)
    checkpoints.save_model(tmp_path / "mine.pth.tar", model)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)


# For the original implementation


def types(value):
    """Keys, shapes and types of a nest of dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape)
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace, {name: type(option) for name, option in vars(value).items()}
    if isinstance(value, dict):
        return type(value), {key: types(part) for key, part in value.items()}
    return [types(part) for part in value] if isinstance(value, list) else type(value)


def test_a_published_checkpoint_comes_back_as_it_was(ours, tmp_path):
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


def test_networks_without_adam_are_written_for_the_original_implementation(tmp_path):
    checkpoints.save_model(tmp_path / "mine.pth.tar", models.build_model({}), {})
    assert export.main([str(tmp_path / "mine.pth.tar"), str(tmp_path / "published.pth.tar")]) == 0
    written = torch.load(tmp_path / "published.pth.tar", weights_only=False)
    optimizer = torch.optim.Adam([torch.nn.Parameter(weight) for weight in written["state_dict"].values()])
    optimizer.load_state_dict(written["optimizer"])  # as the original implementation does
    assert types(written["params"])[1].keys() == types(published()["params"])[1].keys()
