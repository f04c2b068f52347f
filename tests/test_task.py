"""The task script: training, exact resuming, evaluation, the record of a run, and refused options."""

import contextlib
import copy
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from golden import PUBLISHED
from helpers import assert_same_run, history, refuse
from torch.nn.functional import cross_entropy

import data
import memorizing_associations_task as task
import models
from utils import checkpoints, distributed, run
from utils.metrics import EpochMetrics, read_metrics
from utils.options import Parser

# A small network. With this seed the reading values fire, so there are gradients.
TINY = """--sequence_length 2 --num_classes 3 --num_time_steps 50 --embedding_size 20 --memory_size 20 --batch_size 128 --seed 4
    --device cpu --workers 0""".split()
RUN_OF_V03 = Path(__file__).with_name("run_of_v0.3")
SAMPLES = 300  # per epoch, instead of 9,000: 3 batches, the last one smaller


@pytest.fixture(autouse=True, scope="module")
def short_epochs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TRAINING_SAMPLES", SAMPLES)
        patch.setitem(data.EVALUATION_SAMPLES, "validation", 100)
        yield


SIZES = {"sequence_length": 2, "num_classes": 3, "feature_size": 10, "dataset_seed": 42}


def options(*words) -> dict:
    parser = Parser("")
    task.add_options(parser)
    return vars(parser.complete(parser.given([*TINY, *map(str, words)])))


def train(folder, *words, epochs=3):
    return task.main([*TINY, "--epochs", str(epochs), "--output_dir", str(folder), *map(str, words)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    assert train(folder) == 0
    return folder


@pytest.fixture
def stub(monkeypatch):
    """Training without computation: records `steps` and `splits` of the loop; tests set `rate` and `validation`."""
    seen = SimpleNamespace(rate=5.0, validation={}, steps=[], splits=[])
    evaluation_set = data.evaluation_set

    def train_step(network, optimizer, batch, *, batch_size, l2, at, **others):
        epoch, lr = int(re.match(r"epoch (\d+)", at)[1]) - 1, optimizer.param_groups[0]["lr"]
        seen.steps.append({"epoch": epoch, "lr": lr, "l2": l2, "batch_size": batch_size, "batch": batch})
        means = {"train_loss": len(batch), "train_accuracy": 50, "rate_regularization": 7}
        means |= dict.fromkeys(models.POPULATIONS, 5) | {"read_value": seen.rate}
        return {name: torch.tensor(float(mean * len(batch))) for name, mean in means.items()}

    def evaluate(model, samples, batch_size, where):
        loss, accuracy = seen.validation.get(seen.steps[-1]["epoch"], (1.0, 50.0))
        return {"loss": loss, "accuracy": accuracy}

    def recorded_set(split, *sizes, **others):
        seen.splits.append(split)
        return evaluation_set(split, *sizes, **others)

    monkeypatch.setattr(task, "train_step", train_step)
    monkeypatch.setattr(task, "evaluate", evaluate)
    monkeypatch.setattr(data, "evaluation_set", recorded_set)
    return seen


# Training


class ByHand:
    """Training in plain PyTorch: cross entropy, rate regularization, clipping in every step, Adam."""

    def __init__(self, model, max_grad_norm: float, target_rate: float = 0.0):
        self.model, self.max_grad_norm, self.target_rate, self.steps = copy.deepcopy(model), max_grad_norm, target_rate, 0
        self.moments = [(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in self.model.parameters()]

    def step(self, batch: data.Samples, learning_rate: float, l2: float) -> dict[str, torch.Tensor]:
        output = self.model(batch.features, batch.labels, batch.query)
        terms = -output.logits.log_softmax(1)[torch.arange(len(batch)), batch.answer]
        regularization = sum(((rates.mean(0) - self.target_rate) ** 2).mean() for rates in output.rates.values())
        self.model.zero_grad()
        (terms.mean() + l2 * regularization).backward()
        norm = math.sqrt(sum(weight.grad.square().sum().item() for weight in self.model.parameters()))
        assert norm > self.max_grad_norm
        self.steps += 1
        for weight, (first, second) in zip(self.model.parameters(), self.moments, strict=True):
            gradient = weight.grad * self.max_grad_norm / norm
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            root = (second / (1 - 0.999**self.steps)).sqrt()
            weight.data -= learning_rate * (first / (1 - 0.9**self.steps)) / (root + 1e-8)
        correct = (output.logits.argmax(1) == batch.answer).sum()
        sums = {"train_loss": terms.sum(), "train_accuracy": 100 * correct}
        sums |= {"rate_regularization": regularization * len(batch)}
        return sums | {name: len(batch) * rates.mean() for name, rates in output.rates.items()}

    def assert_same_weights(self, weights, tolerance: float) -> None:
        """`tolerance` is absolute; a step changes a weight by about 0.01."""
        for weight, other in zip(weights, self.model.parameters(), strict=True):
            assert (weight - other).abs().max() < tolerance


def test_two_training_steps_agree_with_the_equations():
    torch.manual_seed(4)
    model = models.build_model(options("--num_time_steps", 30), "reference").double()
    optimizer, by_hand = torch.optim.Adam(model.parameters(), lr=0.01), ByHand(model, 0.05, target_rate=3)
    for epoch, l2 in enumerate((0.0, 1e-4)):
        batch = data.training_samples(9 * epoch, 9 * epoch + 9, epoch, **SIZES)
        batch = data.Samples(batch.features.double(), batch.labels, batch.query.double(), batch.answer)
        strengths = {"l2": l2, "target_rate": 3.0, "max_grad_norm": 0.05}
        sums = task.train_step(model, optimizer, batch, batch_size=9, at="here", **strengths)
        for name, expected in by_hand.step(batch, 0.01, l2).items():
            assert sums[name].item() == pytest.approx(expected.item()), name
    by_hand.assert_same_weights(model.parameters(), 1e-6)  # clipping adds 1e-6 to the norm


def test_two_epochs_of_the_script_agree_with_the_equations(tmp_path):
    """Each epoch has one step. In the second, regularization is on, and learning rate and regularization have decayed."""
    words = "--num_time_steps 30 --max_grad_norm 0.05 --batch_size 300 --backend reference --learning_rate 0.02 --l2 0.01"
    words = [*words.split(), *"--learning_rate_decay 0.5 --l2_decay 0.25 --decay_learning_rate_every 1".split()]
    assert train(tmp_path, *words, epochs=2) == 0
    torch.manual_seed(4)
    by_hand = ByHand(models.build_model(options(*words), "reference"), 0.05)
    for epoch, learning_rate, l2 in ((0, 0.02, 0.0), (1, 0.01, 0.0025)):
        by_hand.step(data.training_samples(0, SAMPLES, epoch, **SIZES), learning_rate, l2)
    by_hand.assert_same_weights(checkpoints.load(tmp_path / checkpoints.LAST)["state_dict"].values(), 1e-5)


def test_an_epoch_uses_every_sample_once_and_weights_batches_by_size(stub, tmp_path):
    assert train(tmp_path, epochs=2) == 0
    assert [step["batch_size"] for step in stub.steps] == 2 * [128, 128, 44]
    first, second = history(tmp_path)
    assert first["train_loss"] == pytest.approx((2 * 128**2 + 44**2) / SAMPLES)  # the stub's loss is the batch size
    assert first["train_accuracy"] == 50
    assert (first["rate_regularization"], first["read_value"]) == (7, 5)
    assert first | {"epoch": 2} == second


def test_learning_rate_and_l2_decay_as_given(stub, tmp_path):
    words = "--learning_rate 0.8 --learning_rate_decay 0.5 --decay_learning_rate_every 2 --l2 8 --l2_decay 0.25".split()
    assert train(tmp_path, *words, epochs=5) == 0
    assert [step["l2"] for step in stub.steps[::3]] == [0, 8, 2, 2, 0.5]
    assert [step["lr"] for step in stub.steps[::3]] == [0.8, 0.8, 0.4, 0.4, 0.2]
    assert [line["learning_rate"] for line in history(tmp_path)] == [0.8, 0.8, 0.4, 0.4, 0.2]


@pytest.mark.parametrize("fresh", [1, 0])
def test_epochs_draw_new_samples_or_reorder_a_fixed_set(fresh, stub, tmp_path):
    assert train(tmp_path, "--inf_data", fresh, epochs=2) == 0
    first, second = (torch.cat([step["batch"].query for step in of_epoch]) for of_epoch in (stub.steps[:3], stub.steps[3:]))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0)[0], second.sort(0)[0]) == (not fresh)
    assert torch.isin(first, second).any() == (not fresh)


def test_epochs_have_the_lengths_of_the_curriculum(stub, tmp_path):
    words = "--sequence_length 5 --num_classes 6 --curriculum_start 1 --curriculum_step 2".split()
    assert train(tmp_path, *words, epochs=4) == 0
    assert [step["batch"].labels.shape[1] for step in stub.steps] == [1, 1, 1, 3, 3, 3, 5, 5, 5, 5, 5, 5]


def test_only_validation_accuracy_selects_the_best_network(stub, tmp_path):
    stub.validation = dict(enumerate([(2.0, 50.0), (0.1, 40.0), (3.0, 60.0), (0.5, 60.0)]))  # loss and accuracy disagree
    assert train(tmp_path, epochs=4) == 0
    best, last = (checkpoints.load(tmp_path / name) for name in (checkpoints.BEST, checkpoints.LAST))
    assert (best["epoch"], best["best_acc"], last["best_acc"]) == (3, 60, 60)
    assert set(stub.splits) == {"validation"}


def test_evaluation_includes_a_smaller_last_batch_and_shares_ties():
    samples = data.evaluation_set("validation", 2, 3, 5, 42)[:31]
    logits = samples.features[:, 0, :3].clone()
    logits[:9] = 0  # all three labels tie
    logits[9:11] = torch.tensor([1.0, 1.0, 0.0])
    of_sample = {tuple(query.tolist()): row for query, row in zip(samples.query, logits, strict=True)}

    def model(features, labels, query, record=False):
        found = torch.stack([of_sample[tuple(one.tolist())] for one in query])
        return models.Output(found, {}, {"memory": features})

    tested = task.evaluate(model, samples, 8, torch.device("cpu"))
    single = (logits.argmax(1) == samples.answer).double()
    assert tested["loss"] == pytest.approx(cross_entropy(logits, samples.answer).item())
    assert tested["accuracy"] == pytest.approx(100 * single.mean().item())
    shared = 9 / 3 + (samples.answer[9:11] < 2).sum().item() / 2 + single[11:].sum().item()
    assert tested["accuracy_ties_shared"] == pytest.approx(100 * shared / 31)
    assert tested["ties"] == pytest.approx(100 * 11 / 31)


def test_initial_weights_have_the_ranges_of_the_original_implementation(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "train_step", lambda *_, **__: exit())
    with contextlib.suppress(SystemExit):
        train(tmp_path, "--embedding_size", 80, "--memory_size", 100)
    for name, weight in checkpoints.load(tmp_path / checkpoints.LAST)["state_dict"].items():
        rows, columns = weight.shape
        bound = 1 / math.sqrt(columns) if name == "output_layer.weight" else math.sqrt(2 * 6 / (rows + columns))
        assert 0.9 * bound < weight.max() <= bound and 0.9 * bound < -weight.min() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_a_tiny_network_learns_two_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TRAINING_SAMPLES", 3000)
    monkeypatch.setitem(data.EVALUATION_SAMPLES, "validation", 500)
    words = "--num_classes 4 --num_time_steps 100 --embedding_size 40 --memory_size 40 --seed 1 --batch_size 50 "
    words += "--learning_rate 0.006 --curriculum_start 1"
    assert train(tmp_path, *words.split(), epochs=4) == 0
    assert history(tmp_path)[-1]["validation_accuracy"] > 90  # seeds 1 to 3: 95 to 97


# Exact resuming


def test_a_run_folder_holds_options_checkpoints_and_metrics(undisturbed):
    lines = read_metrics(undisturbed / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(line[name] > 0 for line in lines for name in (*models.POPULATIONS, "seconds"))
    best = checkpoints.load(undisturbed / checkpoints.BEST)
    assert best["best_acc"] == max(line["validation_accuracy"] for line in lines)
    assert {path.name for path in undisturbed.iterdir()} == {
        *(checkpoints.LAST, checkpoints.BEST, "metrics.jsonl", "options.yaml", ".lock")
    }


def test_recorded_options_repeat_a_run_with_any_number_of_workers(undisturbed, tmp_path):
    words = ["--config", undisturbed / "options.yaml", "--output_dir", tmp_path, "--workers", 2]
    assert task.main([str(word) for word in words]) == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_run_of_an_earlier_release_resumes(tmp_path, capsys):
    """v0.3 was interrupted in its second epoch; v0.3 also wrote whole.jsonl. Removed options are at their defaults."""
    shutil.copytree(RUN_OF_V03, tmp_path / "run")
    assert task.main(["--resume", "auto", "--output_dir", str(tmp_path / "run")]) == 0
    expected = read_metrics(RUN_OF_V03 / "whole.jsonl")
    for ours, theirs in zip(history(tmp_path / "run"), expected, strict=True):
        assert ours == pytest.approx(theirs | {"seconds": None}, rel=1e-3)  # on another CPU, rounding may flip a spike
    assert task.main(["--resume", str(tmp_path / "run"), "--evaluate"]) == 0
    again = ["--config", str(RUN_OF_V03 / "options.yaml"), "--epochs", "1", "--output_dir", str(tmp_path / "again")]
    assert task.main(again) == 0
    assert history(tmp_path / "again") == [pytest.approx(expected[0] | {"seconds": None}, rel=1e-3)]


def test_resuming_continues_exactly(undisturbed, tmp_path, monkeypatch, capsys):
    number, steps, step = signal.SIGUSR1, [], task.train_step

    def train_step(*arguments, **others):
        steps.append(1)
        if len(steps) in (2, 6):  # inside an epoch, and at the end of one
            os.kill(os.getpid(), number)
        return step(*arguments, **others)

    monkeypatch.setattr(task, "train_step", train_step)
    assert train(tmp_path) == 128 + number
    assert "in epoch 1 after 256 of 300 samples" in capsys.readouterr().out
    assert checkpoints.load(tmp_path / checkpoints.LAST)["running"]["seconds"] > 0
    assert train(tmp_path, "--resume", "auto") == 128 + number
    assert train(tmp_path, "--resume", tmp_path / checkpoints.LAST) == 0
    assert len(steps) == 3 * 3
    assert_same_run(tmp_path, undisturbed)


def test_a_run_trains_in_a_thread(tmp_path, stub):
    """Python allows signal handlers only in the main thread."""
    with ThreadPoolExecutor() as threads:
        assert threads.submit(train, tmp_path, epochs=1).result() == 0


def test_a_run_trains_without_standard_error(tmp_path, stub, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert train(tmp_path, "--resume", "auto", epochs=1) == 0


def test_a_run_signalled_during_its_last_validation_exits_with_0(tmp_path, stub, monkeypatch):
    evaluate = task.evaluate
    monkeypatch.setattr(task, "evaluate", lambda *given: os.kill(os.getpid(), signal.SIGTERM) or evaluate(*given))
    assert train(tmp_path, epochs=1) == 0


def test_curriculum_and_fixed_data_resume_exactly(tmp_path):
    extra = "--curriculum_start 1 --inf_data 0".split()
    assert train(tmp_path / "whole", *extra, epochs=2) == 0
    assert train(tmp_path / "parts", *extra, epochs=1) == 0
    assert train(tmp_path / "parts", "--resume", "auto", epochs=2) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_epoch_resumed_on_two_processes_counts_earlier_samples_once(monkeypatch):
    """Each of the two processes takes half of the later batch."""
    whole = EpochMetrics(torch.device("cpu"), {})
    whole.add(4, {"train_loss": torch.tensor(8.0), "train_accuracy": torch.tensor(4)})
    running = whole.totals()
    whole.add(6, {"train_loss": torch.tensor(3.0), "train_accuracy": torch.tensor(6)})
    expected = whole.means() | {"seconds": 0}
    assert expected["train_loss"] == 1.1
    processes = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        processes.append(EpochMetrics(torch.device("cpu"), running))
        processes[-1].add(3, {"train_loss": torch.tensor(1.5), "train_accuracy": torch.tensor(3)})
    monkeypatch.setattr(
        distributed, "all_reduce", lambda _: sum(torch.stack(list(process._sums.values())) for process in processes)
    )
    assert processes[0].means() | {"seconds": 0} == expected


# Evaluation


def evaluate(capsys, *arguments):
    capsys.readouterr()
    assert task.main(["--evaluate", *map(str, arguments)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    return float(re.fullmatch(r" \* Acc (\d+\.\d{3})", line)[1])


@pytest.mark.parametrize(("length", "accuracy"), [(2, 34.0), (3, 35.55)])
def test_a_checkpoint_of_the_original_implementation_has_its_accuracy(capsys, length, accuracy):
    found = evaluate(capsys, "--resume", PUBLISHED, "--sequence_length", length, "--device", "cpu")
    assert abs(found - accuracy) <= 0.2  # rounding may flip a spike of a few samples


def test_a_checkpoint_of_the_original_implementation_resumes_and_keeps_its_best_accuracy(capsys, tmp_path, stub):
    stub.validation = {2: (1.0, 0.1)}
    assert task.main(["--resume", str(PUBLISHED), "--epochs", "3", "--output_dir", str(tmp_path)]) == 0
    assert "in epoch 3 after 0 samples" in capsys.readouterr().out
    checkpoint = checkpoints.load(tmp_path / checkpoints.LAST)
    assert checkpoint["epoch"] == 3
    assert checkpoint["best_acc"] == checkpoints.load(PUBLISHED)["best_acc"] > 0.1
    steps = {state["step"].item() for state in checkpoint["optimizer"]["state"].values()}
    assert steps == {2 * 18}


def test_evaluating_a_run_writes_a_table_beside_its_best_network_or_to_output_dir(undisturbed, tmp_path, capsys):
    words = ["--resume", undisturbed, "--sequence_length", "1-2,3"]
    evaluate(capsys, *words)
    table = (undisturbed / "model_best.accuracy_by_length.csv").read_text()
    header, *rows = table.splitlines()
    assert header.startswith("sequence_length,accuracy,loss,trained_length")
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3"]
    evaluate(capsys, *words, "--output_dir", tmp_path / "new")
    assert (tmp_path / "new" / "accuracy_by_length.csv").read_text() == table
    words = ["--resume", undisturbed, "--evaluate", "--output_dir", tmp_path / "new" / "accuracy_by_length.csv"]
    assert "cannot be written" in refuse(capsys, *words)


def test_a_diverging_network_is_reported_with_its_constants(tmp_path, capsys):
    line = refuse(capsys, *TINY, "--gamma_pos", 1000, "--output_dir", tmp_path)
    assert "epoch 1, step 1: not finite: " in line and "--gamma_pos 1000" in line
    line = refuse(capsys, "--resume", tmp_path, "--evaluate")
    assert "evaluation: not finite: the memory" in line and "--gamma_pos 1000" in line


# What a run says and records


def test_silence_is_reported_when_it_begins_and_when_it_ends(tmp_path, capsys, stub):
    for epoch, stub.rate in enumerate((5.0, 0.0, 0.001, 2.0), start=1):
        assert train(tmp_path / "run", *(["--resume", "auto"] if epoch > 1 else []), epochs=epoch) == 0
    out = capsys.readouterr().out
    assert out.count("read_value fell silent") == out.count("read_value fires again") == 1
    assert "--curriculum_start" not in out  # sequences of 2 pairs: there is nothing shorter to begin with
    stub.rate = 0.0
    assert train(tmp_path / "longer", "--num_classes", 4, "--sequence_length", 4, epochs=1) == 0
    assert "; --curriculum_start 2 avoids it" in capsys.readouterr().out


def test_a_resumed_run_takes_its_options_from_its_checkpoint(tmp_path, stub):
    assert train(tmp_path, "--backend", "reference", epochs=1) == 0
    assert task.main(["--resume", str(tmp_path), "--epochs", "2"]) == 0
    record = yaml.safe_load((tmp_path / "options.yaml").read_text())
    assert (record["backend"], record["device"], record["memory_size"], record["epochs"]) == ("reference", "cpu", 20, 2)
    assert not record.keys() & {"world_size", "rank", "dist_url", "gpu", "resume", "output_dir"}


def test_an_unavailable_backend_of_the_checkpoint_is_replaced(tmp_path, stub, capsys):
    assert train(tmp_path, epochs=1) == 0
    path = tmp_path / checkpoints.LAST
    checkpoint = checkpoints.load(path)
    checkpoints.save(path, checkpoint | {"params": checkpoint["params"] | {"backend": "triton", "device": "cuda"}})
    assert train(tmp_path, "--resume", "auto") == 0
    assert "the checkpoint's backend triton cannot run here: " in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "options.yaml").read_text())["backend"] == "cpp"


def test_the_record_says_what_changed_and_when(tmp_path, stub, capsys):
    assert train(tmp_path, epochs=2) == 0
    before = (tmp_path / "options.yaml").read_text()
    assert train(tmp_path, "--resume", "auto", "--learning_rate", 0.01, "--batch_size", 60, epochs=3) == 0
    assert "warning: a step takes 60 samples, not 128 as before" in capsys.readouterr().out
    started, command, resumed, _, empty, *_ = (tmp_path / "options.yaml").read_text().splitlines()
    assert before.startswith(f"{started}\n{command}\n\n") and not empty
    assert re.match(r"# started [-\d]+ [:\d]+ in epoch 1 .* cpp on cpu.*host .*commit .*Python 3.*PyTorch", started)
    assert command == f"#   {shlex.join(['python', *sys.argv])}"
    assert re.match(r"# resumed .* in epoch 3 after 0 samples: .*learning_rate 0\.01 [(]checkpoint: 0\.003[)]", resumed)


def test_resuming_a_finished_run_says_so_and_changes_no_file(undisturbed, capsys):
    before = {path: path.read_bytes() for path in undisturbed.iterdir()}
    assert train(undisturbed, "--resume", "auto", epochs=2) == 0
    assert "already trained for 3 epochs; increase --epochs to continue" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in undisturbed.iterdir()} == before


@pytest.mark.parametrize("words", ["--seed 5", "--start_epoch 1", "--dataset_seed 1", "--thr 0.2", "--memory_size 30"])
def test_options_that_resuming_cannot_change_are_refused(undisturbed, capsys, words):
    name, value = words.split()
    line = refuse(capsys, "--resume", undisturbed, "--epochs", 5, name, value, status=2)
    assert f"{name[2:]} {value} (checkpoint: " in line


def test_differing_model_options_can_be_forced(undisturbed, capsys):
    words = ["--resume", undisturbed, "--evaluate", "--check_params", 0]
    evaluate(capsys, *words, "--thr", 0.2)
    assert "does not fit the network" in refuse(capsys, *words, "--memory_size", 30)


def test_runs_started_in_the_same_second_get_separate_folders(tmp_path, stub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.time, "strftime", lambda *_: "now")
    for _ in range(2):
        assert task.main([*TINY, "--epochs", "1"]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"now", "now-2"}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--resume auto", "--output_dir"),
        ("--resume .", "--resume .: no checkpoint in ."),
        ("--resume auto --evaluate --output_dir .", "no checkpoint in ."),
        ("--evaluate", "--evaluate needs a checkpoint"),
        ("--device tpu", "--device tpu"),
        ("--gpu 99", "--device cuda:99"),
        ("--logging", "pip install tensorboard"),
    ],
)
def test_a_missing_checkpoint_device_or_package_is_named(capsys, tmp_path, monkeypatch, arguments, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert names in refuse(capsys, *arguments.split())


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_training_continues_if_its_output_cannot_be_written(tmp_path, output):
    command = [sys.executable, task.__file__, *TINY, *"--num_time_steps 4 --epochs 2 --output_dir".split(), str(tmp_path)]
    if output == "closed pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_presets_are_valid(capsys):
    presets = sorted(Path(task.__file__).with_name("configs").glob("*.yaml"))
    assert presets
    for path in presets:
        assert task.main(["--config", str(path), "--print_options"]) == 0
