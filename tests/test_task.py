"""The task script from the command line: training, exact continuation, evaluation, and what it refuses."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
import yaml

import data
import memorizing_associations_task as task
import models
from utils import checkpoints
from utils.metrics import read_metrics
from utils.options import TASK_GROUPS

PUBLISHED = golden.FOLDER / "published_format_checkpoint.pth.tar"
# Small, and alive: the reading values of this seed fire, so that there are gradients.
TINY = """--sequence_length 2 --num_classes 3 --num_time_steps 50 --embedding_size 20 --memory_size 20 --batch_size 128 --seed 4
    --device cpu""".split()
SAMPLES = 700  # an epoch, in place of 9,000: 6 batches, the last one smaller


def train(folder, *arguments, epochs=3):
    return task.main([*TINY, "--epochs", str(epochs), "--output_dir", str(folder), *arguments])


def result(folder):
    checkpoint = checkpoints.load(folder / checkpoints.LAST)
    metrics = [line | {"seconds": None} for line in read_metrics(folder / "metrics.jsonl")]
    return checkpoint["state_dict"], checkpoint["optimizer"]["state"], metrics


def assert_same_run(ours, theirs):
    (weights, adam, metrics), (other_weights, other_adam, other_metrics) = result(ours), result(theirs)
    assert metrics == other_metrics
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert all(torch.equal(adam[n][name], other_adam[n][name]) for n in adam for name in adam[n])


@pytest.fixture(scope="module", autouse=True)
def short_epochs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TRAINING_SAMPLES", SAMPLES)
        patch.setitem(data.EVALUATION_SAMPLES, "validation", 200)
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    assert train(folder) == 0
    return folder


def refuse(capsys, *arguments, status=2):
    """The one line that a refused command prints."""
    try:
        code = task.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    message = capsys.readouterr().err.strip()
    assert code == status, message
    assert len(message.splitlines()) == 1
    assert "Traceback" not in message
    return message


def test_a_run_folder_holds_options_checkpoints_and_metrics(undisturbed):
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(line[name] > 0 for line in lines for name in (*models.POPULATIONS, "seconds"))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    options = yaml.safe_load((undisturbed / "options.yaml").read_text())
    assert options["memory_size"] == 20
    best = checkpoints.load(undisturbed / checkpoints.BEST)
    assert best["best_acc"].item() == max(line["validation_accuracy"] for line in lines)


def test_options_of_a_run_repeat_it(undisturbed, tmp_path):
    assert task.main(["--config", str(undisturbed / "options.yaml"), "--output_dir", str(tmp_path), "--device", "cpu"]) == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_do_not_depend_on_workers(undisturbed, tmp_path, workers):
    assert train(tmp_path, "--workers", str(workers)) == 0
    assert_same_run(tmp_path, undisturbed)


def test_resuming_after_an_epoch_continues_exactly(undisturbed, tmp_path):
    assert train(tmp_path, epochs=1) == 0
    assert train(tmp_path, "--resume", "auto") == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_resuming_inside_an_epoch_continues_exactly(undisturbed, tmp_path, monkeypatch, capsys, number):
    steps, step = [], task.train_step

    def train_step(*arguments):
        steps.append(1)
        if len(steps) in (3, 10):
            os.kill(os.getpid(), number)
        return step(*arguments)

    monkeypatch.setattr(task, "train_step", train_step)
    assert train(tmp_path) == 128 + number
    assert "in epoch 1 after 384 of 700 samples" in capsys.readouterr().out
    assert train(tmp_path, "--resume", "auto") == 128 + number
    assert train(tmp_path, "--resume", str(tmp_path / checkpoints.LAST)) == 0
    assert len(steps) == 3 * 6
    assert_same_run(tmp_path, undisturbed)


def test_sigterm_to_a_real_process_saves_and_leaves(tmp_path):
    tinier = ["--num_time_steps", "10", "--embedding_size", "4", "--memory_size", "4", "--epochs", "1000"]
    command = [sys.executable, "memorizing_associations_task.py", *TINY, *tinier, "--output_dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch   1/"):
                process.terminate()
                break
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in output
    assert checkpoints.load(tmp_path / checkpoints.LAST)["epoch"] >= 1


def test_a_fixed_training_set_is_learned_from_again(tmp_path):
    assert train(tmp_path, "--inf_data", "0", epochs=2) == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_curriculum_and_mixed_lengths_resume_exactly(tmp_path):
    extra = "--curriculum_start 1 --mixed_lengths 1".split()
    assert train(tmp_path / "whole", *extra, epochs=2) == 0
    assert train(tmp_path / "parts", *extra, epochs=1) == 0
    assert train(tmp_path / "parts", "--resume", "auto", epochs=2) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_no_regularization_in_the_first_epoch_only(tmp_path, undisturbed):
    assert train(tmp_path, "--l2", "0", epochs=2) == 0
    ours, theirs = result(tmp_path)[2], result(undisturbed)[2]
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]


# Published checkpoints


def evaluate(capsys, *arguments):
    assert task.main(["--evaluate", *map(str, arguments)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    return float(re.fullmatch(r" \* Acc (\d+\.\d{3})", line)[1])


@pytest.mark.parametrize(("backend", "length", "accuracy"), [("cpp", 2, 34.0), ("cpp", 3, 35.55), ("reference", 2, 34.0)])
def test_published_checkpoint_evaluates(capsys, backend, length, accuracy):
    found = evaluate(capsys, "--resume", PUBLISHED, "--sequence_length", length, "--backend", backend, "--device", "cpu")
    assert abs(found - accuracy) <= 0.2  # rounding may flip a spike of a few samples


def with_prefix(folder) -> Path:
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        checkpoint = torch.load(PUBLISHED, weights_only=True)
    checkpoint["state_dict"] = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, folder / "prefixed.pth.tar")
    return folder / "prefixed.pth.tar"


def test_published_checkpoint_with_prefix_evaluates(capsys, tmp_path):
    assert abs(evaluate(capsys, "--resume", with_prefix(tmp_path)) - 34.0) <= 0.2


def test_published_checkpoint_resumes(capsys, tmp_path):
    assert task.main(["--resume", str(PUBLISHED), "--epochs", "3", "--output_dir", str(tmp_path)]) == 0
    assert "in epoch 3 after 0 samples" in capsys.readouterr().out
    checkpoint = checkpoints.load(tmp_path / checkpoints.LAST)
    assert checkpoint["epoch"] == 3
    steps = {state["step"].item() for state in checkpoint["optimizer"]["state"].values()}
    assert steps == {2 * 18 + 2}  # Adam goes on counting: 9,000 samples in batches of 500, then 700


def test_several_lengths_give_a_table(capsys, tmp_path):
    arguments = ["--resume", PUBLISHED, "--num_classes", 3, "--sequence_length", "1-2", "3", "--output_dir", tmp_path]
    evaluate(capsys, *arguments)
    header, *rows = (tmp_path / "accuracy_by_length.csv").read_text().splitlines()
    assert header.startswith("sequence_length,accuracy,loss,trained_length")
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3"]


# Refusals


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--sequence_length 11", "--sequence_length 11 is more than --num_classes 10"),
        ("--sequence_length 0", "--sequence_length: must be at least 1"),
        ("--sequence_length 2-5", "--sequence_length: several lengths are for --evaluate"),
        ("--sequence_length 5-2 --evaluate", "--sequence_length"),
        ("--sequence_length ten", "--sequence_length"),
        ("--memory_size 0", "--memory_size: must be at least 1"),
        ("--memory-size 1.5", "--memory_size: must be a whole number"),
        ("--tau_mem -20", "--tau_mem: must be greater than 0"),
        ("--thr nan", "--thr: must be finite"),
        ("--readout_delay 0", "--readout_delay: must be at least 1"),
        ("--backend fast", "--backend: must be one of auto"),
        ("--inf_data 2", "--inf_data: must be one of 0, 1"),
        ("--memory 10", "--memory"),
        ("--config no.yaml", "no.yaml: No such file"),
        ("--curriculum_start 11", "--curriculum_start 11"),
    ],
)
def test_impossible_options_are_refused(capsys, arguments, names):
    assert names in refuse(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("memory_sise: 10", "memory_sise: no such option, did you mean memory_size?"),
        ("memory_size: ten", "memory_size: must be a whole number"),
        ("memory_size: -1", "memory_size: must be at least 1"),
        ("perfect_reset: 1", "perfect_reset: must be true or false"),
        ("- memory_size", "must hold lines like"),
        ("memory_size: [", "not a YAML file of options"),
    ],
)
def test_impossible_yaml_is_refused(capsys, tmp_path, text, names):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    message = refuse(capsys, "--config", path)
    assert names in message
    assert "config.yaml" in message


def test_flags_override_yaml(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("memory_size: 30\nl2: 1e-4\ntau-mem: 15\nperfect_reset: true\n")
    assert task.main(["--config", str(path), "--memory-size", "40", "--no-perfect-reset", "--print_options"]) == 0
    options = yaml.safe_load(capsys.readouterr().out)
    assert options["memory_size"] == 40
    assert options["l2"] == 1e-4
    assert options["tau_mem"] == 15.0
    assert options["perfect_reset"] is False


def test_differing_model_options_are_listed(capsys):
    message = refuse(capsys, "--resume", PUBLISHED, "--memory_size", 30, "--thr", 0.2, "--evaluate")
    assert "memory_size 30 (checkpoint: 20)" in message
    assert "thr 0.2 (checkpoint: 0.1)" in message
    message = refuse(capsys, "--resume", PUBLISHED, "--sequence_length", 3)
    assert "sequence_length 3 (checkpoint: 2)" in message


def test_differing_model_options_can_be_forced(capsys):
    arguments = ["--resume", PUBLISHED, "--check_params", 0]
    assert evaluate(capsys, *arguments, "--thr", 0.2) != 34.0
    assert "does not fit the network" in refuse(capsys, *arguments, "--memory_size", 30, "--evaluate", status=1)


def test_a_run_is_not_overwritten(undisturbed, capsys):
    before = result(undisturbed)[2]
    assert "holds a run already" in refuse(capsys, *TINY, "--output_dir", undisturbed, status=1)
    assert result(undisturbed)[2] == before


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--resume nowhere.pth.tar", "nowhere.pth.tar: No such file"),
        ("--resume auto", "--output_dir"),
        ("--evaluate", "--evaluate needs a checkpoint"),
        ("--device tpu", "--device tpu"),
        ("--gpu 99", "--device cuda:99"),
    ],
)
def test_what_is_missing_is_named(capsys, tmp_path, monkeypatch, arguments, names):
    monkeypatch.chdir(tmp_path)
    assert names in refuse(capsys, *arguments.split(), status=1)


# The command line, frozen

PUBLISHED_DEFAULTS = """{
    sequence_length: 10, num_classes: 10, feature_size: 10, inf_data: 1, num_time_steps: 100, workers: 4, prefetch_factor: 2,
    embedding_size: 80, memory_size: 100, w_max: 1.0, gamma_pos: 0.3, gamma_neg: 0.3, tau_trace: 20.0, readout_delay: 1,
    thr: 0.1, perfect_reset: false, refractory_time_steps: 3, tau_mem: 20.0, dampening_factor: 1.0, epochs: 250,
    batch_size: 512,
    learning_rate: 0.003, learning_rate_decay: 0.85, decay_learning_rate_every: 20, max_grad_norm: 40.0,
    l2: 1.0e-5,
    target_rate: 0.0, start_epoch: 0, resume: "", check_params: 1, evaluate: false, logging: false, print_freq: 1,
    world_size: -1, rank: -1, dist_url: "tcp://127.0.0.1:23456", dist_backend: nccl, seed: null, dataset_seed: 42, gpu: null,
    multiprocessing_distributed: false}"""


def test_every_published_option_is_there_in_both_spellings_with_its_default(capsys):
    with pytest.raises(SystemExit):
        task.main(["--help"])
    words = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    ours = {option.name: option.default for options in TASK_GROUPS.values() for option in options}
    for name, default in yaml.safe_load(PUBLISHED_DEFAULTS).items():
        assert f"--{name}" in words
        assert ours[name] == default


def test_presets_are_valid(capsys):
    for path in sorted(Path("configs").glob("*.yaml")):
        assert task.main(["--config", str(path), "--print_options"]) == 0
    assert task.main(["--print_options"]) == 0


@pytest.mark.parametrize("reader", ["that goes", "of a full disk"])
def test_training_outlives_its_output(tmp_path, reader):
    command = [sys.executable, task.__file__, *TINY, *"--num_time_steps 4 --epochs 2 --output_dir".split(), str(tmp_path)]
    if reader == "that goes":
        read, write = os.pipe()
        os.close(read)
    elif os.path.exists("/dev/full"):
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        pytest.skip("no /dev/full here")
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert ("continuing without it" in done.stderr) == (reader == "of a full disk")
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 2


def test_evaluates_at_lengths_below_the_curriculum(capsys, tmp_path):
    assert train(tmp_path, *"--curriculum_start 2 --num_time_steps 4".split(), epochs=1) == 0
    evaluate(capsys, "--resume", tmp_path / "model_best.pth.tar", "--sequence_length", 1)
