"""Sweeps, the table of the committed results, and the committed networks."""

import csv
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

import data
import memorizing_associations_task as task
import models
from experiments import analyze, summarize, sweep
from utils import checkpoints
from utils import results as runs
from utils import run as run_folder
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PRETRAINED = ROOT / "experiments" / "results", ROOT / "pretrained"
SMALL = {"num_time_steps": 10, "embedding_size": 8, "memory_size": 8, "batch_size": 3000, "device": "cpu"}


def write(path, **groups):
    path.write_text(yaml.safe_dump(groups, sort_keys=False))
    return path


def start(path, folder, *arguments):
    command = [sys.executable, "-m", "experiments.sweep", str(path), "--output_dir", str(folder), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(child):
    output, _ = child.communicate(timeout=120)
    return child.returncode, output


def test_a_sweep_makes_a_run_for_each_combination_of_listed_values(tmp_path):
    path = write(
        tmp_path / "sweep.yaml",
        long={"sequence_length": [2, 5], "num_classes": "sequence_length", "seed": [1, 2], "epochs": 7},
        other={"sequence_length": 10, "num_classes": 30, "seed": 3, "perfect_reset": True, "test_lengths": "2-30"},
    )
    jobs = sweep.read_sweep(path, tmp_path)
    names = [f"long/sequence_length{length}-seed{seed}" for length in (2, 5) for seed in (1, 2)]
    assert [job.name for job in jobs] == [*names, "other/run"]
    assert [job.options["num_classes"] for job in jobs] == [2, 2, 5, 5, 30]
    assert [job.test_lengths for job in jobs] == [(2,), (2,), (5,), (5,), tuple(range(2, 31))]
    assert [job.options["epochs"] for job in jobs] == [7, 7, 7, 7, 250]
    assert jobs[-1].command(testing=False)[-1] == "--perfect_reset=true"
    assert jobs[-1].command(testing=True)[-2:] == ["--evaluate", f"--sequence_length={','.join(map(str, range(2, 31)))}"]


def test_the_sweep_file_is_read_as_strictly_as_a_config(tmp_path):
    """Values are read as on the command line, and a group's own options override merged ones."""
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "a: &a {seed: [010], batch-size: 7, perfect_reset: [true]}\nb: [{<<: *a, seed: [3], perfect-reset: false}]\n"
    )
    first, second = sweep.read_sweep(path, tmp_path)
    assert (first.name, second.name) == ("a/seed010-perfect_resetTrue", "b/seed3")
    wanted = {"seed": (10, 3), "batch_size": (7, 7), "perfect_reset": (True, False)}
    assert {name: (first.options[name], second.options[name]) for name in wanted} == wanted
    for text, words in {"a: {seed: 1, seed: 2}": "seed is given twice", "a: {seed: 1:30}": "1:30", "a:": "options"}.items():
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            sweep.read_sweep(path, tmp_path)


def signal_when(words, runs_that_print_them, folder, number, delay=0):
    """Send a signal to this process when so many runs have printed these words."""

    def wait():
        while sum(words in log.read_text() for log in folder.rglob("log.txt")) < runs_that_print_them:
            time.sleep(0.1)
        time.sleep(delay)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


def test_a_sweep_reports_a_killed_run_with_its_signal_and_skips_a_run_held_elsewhere(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "sweep.yaml", group={"seed": [1, 2]})
    killed = [sys.executable, "-c", "import os; print('epoch 1', flush=True); os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(sweep.Job, "command", lambda *_, **__: killed)
    held = FileLock(tmp_path / "group" / "seed1" / run_folder.LOCK)
    Path(held.lock_file).parent.mkdir(parents=True)
    with held:
        signal_when("epoch 1", 1, tmp_path, signal.SIGTERM, delay=2)  # otherwise the sweep waits for the other process
        assert sweep.main([str(path), "--output_dir", str(tmp_path), "--jobs", "1"]) == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "0 of 2 runs done, 1 failed, 1 unfinished\nfailed: group/seed2: killed by signal 9 (Killed)" in out
    assert "group/seed1" not in out


def test_an_interrupted_sweep_lets_its_runs_save(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "sweep.yaml", group={"seed": [1, 2, 3]})
    save = "import signal, time; signal.signal(15, lambda *_: exit(print('saved') or 143)); "
    save += "print('at work', flush=True); time.sleep(60)"
    monkeypatch.setattr(sweep.Job, "command", lambda *_, **__: [sys.executable, "-c", save])
    signal_when("at work", 2, tmp_path, signal.SIGUSR1)
    assert sweep.main([str(path), "--output_dir", str(tmp_path), "--jobs", "2"]) == 128 + signal.SIGUSR1
    assert "0 of 3 runs done, 0 failed, 3 unfinished" in capsys.readouterr().out
    assert [log.read_text() for log in tmp_path.rglob("log.txt")] == ["at work\nsaved\n"] * 2


def test_a_sweep_gives_its_gpus_to_its_runs_in_turn(tmp_path, monkeypatch):
    path = write(tmp_path / "sweep.yaml", group={"seed": [1, 2, 3, 4]})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, jobs, expected in ((None, None, ["0", "1"]), ("4,6", 3, ["4", "6", "4"]), ("GPU-a,GPU-b", 1, ["GPU-a"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert sweep.find_gpus(jobs, threads=1) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    shown = "import os, time; print('on', os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(1); exit(1)"  # both slots are taken
    monkeypatch.setattr(sweep.Job, "command", lambda *_, **__: [sys.executable, "-c", shown])
    assert sweep.main([str(path), "--output_dir", str(tmp_path)]) == 1
    assert sorted(log.read_text() for log in tmp_path.rglob("log.txt")) == ["on 4\n"] * 2 + ["on 6\n"] * 2


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"seed": 1, "memory_sise": 3}, "memory_sise"),
        ({"seed": 1, "epochs": [3, "many"]}, "epochs"),
        ({"seed": 1, "resume": "auto"}, "resume"),
        ({"seed": 1, "sequence_length": [5, 20]}, "num_classes"),
        ({"seed": 1, "test_lengths": "2-11"}, "test_lengths"),
        ({"epochs": 3}, "seed"),
    ],
)
def test_an_invalid_sweep_starts_no_run(tmp_path, capsys, group, words):
    path = write(tmp_path / "sweep.yaml", group=group)
    assert sweep.main([str(path), "--output_dir", str(tmp_path / "runs")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and words in line
    assert not (tmp_path / "runs").exists()


def lines(path):
    return path.read_text().splitlines()


@pytest.mark.slow
def test_two_sweeps_share_the_runs_of_a_folder_and_continue_after_a_failed_run(tmp_path, capsys):
    group = {"sequence_length": [1, 2], "seed": 1, "epochs": 1, "backend": "reference", **SMALL}
    path = write(tmp_path / "sweep.yaml", small=group)
    damaged, whole = (tmp_path / "runs" / "small" / f"sequence_length{n}" for n in (1, 2))
    damaged.mkdir(parents=True)
    (damaged / checkpoints.LAST).write_bytes(b"not a checkpoint")
    other = start(path, tmp_path / "runs", "--jobs", "1")
    mine = sweep.main([str(path), "--output_dir", str(tmp_path / "runs"), "--jobs", "1"]), capsys.readouterr().out
    for status, output in (mine, finish(other)):
        assert status == 1
        assert "1 of 2 runs done, 1 failed" in output and f"{damaged / checkpoints.LAST}: " in output
    assert ["--evaluate" in line for line in lines(whole / "command.txt")] == [False, True]
    assert all(": OMP_NUM_THREADS=1 python memorizing_associations_task.py " in line for line in lines(whole / "command.txt"))
    assert len(lines(whole / "metrics.jsonl")) == 1
    assert sum("backend reference" in line for line in lines(whole / "log.txt")) == 2, "trained and tested with its backend"
    (tested,) = csv.DictReader(lines(whole / "accuracy_by_length.csv"))
    assert tested["sequence_length"] == "2"

    # A finished run is not repeated, even if its metrics are lost.
    metrics = whole / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.unlink()
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir() if "lock" not in path.name}
    write(path, small=group | {"sequence_length": [2]})
    assert sweep.main([str(path), "--output_dir", str(tmp_path / "runs"), "--jobs", "1"]) == 0
    assert "1 of 1 runs done, 0 failed" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    metrics.write_text(kept)
    (job,) = sweep.read_sweep(path, tmp_path / "runs")
    assert job.is_tested() and not dataclasses.replace(job, test_lengths=(1, 2)).is_tested(), "tested at these lengths"
    os.utime(whole / checkpoints.BEST)
    assert not job.is_tested(), "the table is older than the network"
    (result,) = runs.read_results(tmp_path / "runs")
    assert summarize.summary(result)["state"] == "finished"

    # A run with other options than the file's is refused.
    write(path, small=group | {"gamma_neg": 0.02})
    assert sweep.main([str(path), "--output_dir", str(tmp_path / "runs")]) == 1
    assert "gamma_neg 0.02 (run: 0.3)" in capsys.readouterr().err

    runs.write_groups([result], tmp_path / "kept")
    assert runs.read_results(tmp_path / "kept") == [result]


def test_results_yaml_describes_every_committed_run():
    """Committed runs are not repeated, so nothing else notices if the file changes their options."""
    jobs = {job.name: job for job in sweep.read_sweep(ROOT / "experiments" / "results.yaml", Path("runs"))}
    kept = {result.name: result for result in runs.read_results(RESULTS)}
    assert kept.keys() <= jobs.keys()
    for name in kept:
        assert jobs[name].differences(kept[name].options) == [], name


def test_the_committed_table_agrees_with_the_raw_metrics():
    rows = [summarize.summary(result) for result in runs.read_results(RESULTS)]
    assert (RESULTS / "table.csv").read_text(encoding="utf-8") == runs.to_csv(rows)
    assert (RESULTS / "table.md").read_text(encoding="utf-8") == summarize.to_markdown(rows)


def test_accuracy_figures_distinguish_epochs_and_silent_seeds():
    results = runs.read_results(RESULTS)
    rows = [summarize.summary(result) for result in results]
    drawn = dict(summarize.figures(results, rows))
    published, others = drawn["accuracy_against_length"].axes
    points = {line.get_label(): line.get_ydata() for line in published.lines}
    wanted = [r for r in rows if r["training"] == "published options" and 1 < r["num_classes"] == r["sequence_length"]]
    for epochs, learned in itertools.product((250, 100, 40, 30, 12), (True, False)):
        mine = [r["test_accuracy"] for r in wanted if r["of_epochs"] == epochs and (r["outcome"] == "learned") is learned]
        label = f"{epochs} epochs" + ": silent, or accuracy at chance" * (not learned)
        assert sorted(points.pop(label, [])) == sorted(mine)
    assert list(points) == ["chance: one of the labels shown"]
    circles = next(line for line in others.lines if line.get_label() == "recipe, 40 epochs")
    (line,) = [line for line in others.lines if line.get_ls() == "-" and line.get_color() == circles.get_color()]
    mean = dict(zip(*line.get_data(), strict=True))
    mine = [row["test_accuracy"] for row in rows if row["run"].startswith("recipe/") and row["sequence_length"] == 10]
    assert len(mine) >= 3 and mean[10] == pytest.approx(sum(mine) / len(mine))
    legend = [text.get_text().split(" (")[0] for text in drawn["accuracy_by_tested_length"].legends[0].texts]
    assert legend[:2] == ["recipe, rule tuned", "recipe"] and "published, 15 epochs, silent" in legend
    assert summarize.line_labels(["b", "a", "b"]) == {"b": "b", "a": "a"}


def test_copying_runs_adds_them_to_the_kept_runs(tmp_path):
    """An untested run is not copied. A kept run is replaced only by a run with more epochs."""
    head = "# started today in epoch 1; host a, commit f6e3168d6d, Python 3\n#   python task.py --seed 1\n"
    epoch, kept = '{"epoch": 1, "validation_accuracy": 50.0}\n', tmp_path / "kept"
    for seed, metrics in ((1, epoch + epoch.replace("1", "2")), (2, epoch), (3, epoch)):
        folder = tmp_path / "runs" / f"seed{seed}"
        make_run(folder, metrics, head + yaml.safe_dump(sweep.DEFAULTS | {"seed": seed}))
        if seed != 3:
            (folder / "accuracy_by_length.csv").write_text("sequence_length,accuracy\n10,50.0\n")
    first, second, _ = runs.read_results(tmp_path / "runs")
    old = [first._replace(name="old/seed1", metrics=first.metrics[:1]), second._replace(name="old/seed2", commands=["by hand"])]
    runs.write_groups(old, kept)
    assert summarize.main([str(tmp_path / "runs"), "--output_dir", str(kept), "--copy", "old"]) == 0
    (one, two) = runs.read_results(kept)
    assert (one.name, len(one.metrics), one.commands) == ("old/seed1", 2, ["f6e3168d6d: python task.py --seed 1"])
    assert (two.name, two.commands) == ("old/seed2", ["by hand"])
    assert [row["run"] for row in csv.DictReader(lines(kept / "table.csv"))] == ["old/seed1", "old/seed2"]


def test_a_table_has_the_columns_of_all_rows_and_an_untested_length_has_no_accuracy():
    assert runs.to_csv([{"a": 1}, {"a": 2, "b": 3}]) == "a,b\n1,\n2,3\n"
    run = runs.Result("group/run", {}, [], [], [{"sequence_length": "20", "accuracy": "50.0"}])
    assert (summarize.accuracy_at(run, 10), summarize.accuracy_at(run, 20)) == (None, 50.0)


OPTIONS = {"seed": 1, "sequence_length": 2, "num_classes": 2}


def make_run(folder, metrics='{"epoch": 1, "validation_accuracy": 50.0}\n', options=OPTIONS):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.yaml").write_text(options if isinstance(options, str) else yaml.safe_dump(options))
    (folder / "metrics.jsonl").write_text(metrics)


def test_a_run_folder_names_its_run_and_runs_are_sorted_by_number(tmp_path):
    names = [f"readout_delay{delay}" for delay in (0, 3, 10)]
    for name in names:
        make_run(tmp_path / name, options=OPTIONS | {"readout_delay": name})
    assert [result.name for result in runs.read_results(tmp_path)] == names
    assert [result.name for result in runs.read_results(tmp_path / names[0])] == names[:1]
    runs.write_groups(runs.read_results(tmp_path), tmp_path / "kept")  # without a group
    assert [result.name for result in runs.read_results(tmp_path / "kept")] == names


@pytest.mark.parametrize("content", [{"metrics": '{"epoch": '}, {"options": "- 1\n"}, {"options": "seed: a\n"}])
def test_a_damaged_run_is_named(tmp_path, content):
    make_run(tmp_path / "group" / "run", **content)
    with pytest.raises(UserError, match=r"group/run.*damaged"):
        runs.read_results(tmp_path)


def test_a_table_with_the_byte_order_mark_of_excel_is_read(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfsequence_length,accuracy\r\n2,50.0\r\n")
    assert runs.read_results(tmp_path / "a.csv")[0].tests == [{"sequence_length": "2", "accuracy": "50.0"}]


def test_a_committed_network_scores_what_the_table_says(tmp_path):
    run = "recipe/sequence_length10-seed2"
    rows = csv.DictReader((RESULTS / "table.csv").read_text(encoding="utf-8").splitlines())
    row = next(row for row in rows if row["run"] == run)
    command = f"--evaluate --backend cpp --device cpu --resume {PRETRAINED}/{run.replace('/', '-')}.pth.tar".split()
    assert task.main([*command, "--output_dir", str(tmp_path)]) == 0
    (tested,) = csv.DictReader((tmp_path / "accuracy_by_length.csv").read_text().splitlines())
    # 2,000 samples; on another CPU, rounding may flip a spike that decides a sample.
    assert float(tested["accuracy"]) == pytest.approx(float(row["test_accuracy"]), abs=0.1)


class Exact(torch.nn.Module):
    """A made-up network. It answers with the label of the vector nearest to the query, or of the second nearest if the first
    pair is asked for. After a pause, and with gamma_neg 0, it always answers 9, which is wrong."""

    def __init__(self, gamma_neg):
        super().__init__()
        self.wrong = gamma_neg == 0
        self.output_layer = torch.nn.Identity()

    def load_state_dict(self, state_dict):
        pass

    def forward(self, features, labels, query):
        order = torch.cdist(query[:, None], features)[:, 0].argsort(1)
        named = labels.gather(1, torch.where(order[:, 0] == 0, order[:, 1], order[:, 0])[:, None])[:, 0].long()
        named = torch.full_like(named, 9) if self.wrong else named
        return models.Output(torch.nn.functional.one_hot(named, 10).float(), None, None)

    def currents(self, features, labels, query):
        return features, labels, query

    def store_and_recall(self, features, labels, query):
        assert features.shape[1] == labels.shape[1] == 4 and not features[:, -1].any(), "a pair's time without input"
        return torch.nn.functional.one_hot(torch.full((len(query),), 9), 10), None


def test_the_analysis_of_a_made_up_network_gives_the_expected_numbers(monkeypatch):
    """Three pairs on a line, at 0, 1 and 3. The second is nearest to the first, so wrong answers name its label."""
    params = {"sequence_length": 3, "num_classes": 10, "feature_size": 1, "dataset_seed": 1, "gamma_neg": 0.3}
    features, labels = torch.tensor([[[0.0], [1.0], [3.0]]]).expand(8, 3, 1), torch.tensor([[5, 6, 7]]).expand(8, 3)
    asked = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    test = data.Samples(features, labels, features[range(8), asked], labels[range(8), asked])
    monkeypatch.setattr(checkpoints, "load", lambda path: {"params": params, "state_dict": {}})
    monkeypatch.setattr(models, "build_model", lambda options: Exact(options["gamma_neg"]))
    monkeypatch.setattr(data, "evaluation_set", lambda *_, **__: test)
    fresh = {1_000_000: test[:4]}  # by the epoch
    monkeypatch.setattr(data, "training_samples", lambda start, stop, epoch, **_: fresh[epoch])
    tables = {}
    for table, row in analyze.analyse(Path("made-up")):
        tables.setdefault(table, []).append(row)
    assert [tuple(row.values()) for row in tables["position"]] == [(1, 2, 0.0), (2, 3, 100.0), (3, 3, 100.0)]
    (errors,) = tables["errors"]
    assert errors == {"sequence_length": 3, "accuracy": 75.0, "errors": 2, "label_not_shown": 0.0, "of_nearest_vector": 100.0,
                      "of_nearest_three": 100.0, "of_later_pair": 100.0, "mean_positions_later": 1.0}  # fmt: skip
    assert [tuple(row.values()) for row in tables["pause"]] == [(False, 100.0, 60.0), (True, 0.0, 0.0)]
    depression = {row["gamma_neg"]: (row["accuracy"], row["first_half"], row["second_half"]) for row in tables["depression"]}
    assert depression == dict.fromkeys((0.3, 0.2, 0.1, 0.02), (75.0, 0.0, 100.0)) | {0.0: (0.0, 0.0, 0.0)}
    assert [tuple(row.values()) for row in tables["fresh"]] == [(0.3, 20_000, 50.0), (0.0, 20_000, 0.0)]
    quiet, *noisy = tables["noise"]
    assert quiet == {"deviation": 0.0, "accuracy": 75.0, "nearest": 100.0} and [row["deviation"] for row in noisy][-1] == 0.3
    assert all(row["nearest"] == 100 for row in noisy[:2]) and min(row["accuracy"] for row in noisy) >= 50


def test_the_analysis_agrees_with_the_evaluation(tmp_path, monkeypatch, capsys):
    """For two networks with one file name: by position, without noise, and with the gamma_neg of training."""
    monkeypatch.setattr(data, "TRAINING_SAMPLES", 200)
    tiny = "--sequence_length 2 --num_classes 3 --num_time_steps 20 --embedding_size 10 --memory_size 10 --epochs 1"
    best = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        constants = ["--gamma_neg", "0.1", "--thr", "0.03", "--batch_size", "100", "--seed", seed]
        assert task.main([*tiny.split(), *constants, "--output_dir", str(folder)]) == 0
        best.append(str(folder / checkpoints.BEST))
        assert task.main(["--resume", best[-1], "--evaluate"]) == 0
    accuracies = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if " * Acc" in line]
    monkeypatch.setattr(analyze, "FRESH", 1000)
    assert analyze.main([*best, best[0], "--output_dir", str(tmp_path)]) == 0

    def rows(table, network, **of):
        found = csv.DictReader((tmp_path / f"{table}.csv").read_text().splitlines())
        return [r for r in found if r["network"] == network and all(float(r[name]) == value for name, value in of.items())]

    for network, accuracy in zip(("1/model_best", "2/model_best"), accuracies, strict=True):
        positions = [(int(row["samples"]), float(row["accuracy"])) for row in rows("position", network)]
        assert sum(samples for samples, _ in positions) == 2000
        assert sum(samples * share for samples, share in positions) / 2000 == pytest.approx(accuracy, abs=0.01)
        (errors,), (quiet,) = rows("errors", network), rows("noise", network, deviation=0)
        (trained,) = rows("depression", network, gamma_neg=0.1)
        assert float(errors["accuracy"]) == float(quiet["accuracy"]) == float(trained["accuracy"]) == accuracy
        assert float(quiet["nearest"]) == 100
        (fresh,) = rows("fresh", network, gamma_neg=0.1)
        assert fresh["samples"] == "1000" and 0 < abs(float(fresh["accuracy"]) - accuracy) < 6
        for table in ("noise", "depression"):
            assert len({row["accuracy"] for row in rows(table, network)}) > 1


def test_the_figure_of_what_networks_recall_averages_positions_and_leaves_out_what_two_pairs_cannot_show():
    tables: dict[str, list[dict]] = {"position": [], "errors": [], "noise": []}
    for network, pairs in (("recipe-sequence_length12-seed1", 12), ("other", 2)):
        for n in range(1, pairs + 1):
            row = {"position": n, "samples": 3 if n == 1 else 1, "accuracy": 10.0 * n}
            tables["position"].append({"network": network} | row)
        tables["noise"].append({"network": network, "deviation": 0.0, "accuracy": 50.0, "nearest": 100.0})
        shares = dict.fromkeys(("of_nearest_vector", "of_later_pair", "label_not_shown"), 40.0)
        tables["errors"].append({"network": network, "sequence_length": pairs} | shares)
    position, noise, errors = analyze.draw(tables).axes
    points = position.lines[1].get_xydata().tolist()  # the network with two pairs is drawn first
    assert points == [[1.25, 12.5], *([n, 10.0 * n] for n in range(3, 13))]  # 11 neighbours in 10 parts, and the last alone
    assert [line.get_label() for line in noise.lines] == ["other", "12", "exact memory, 12 pairs"]
    assert [bar.get_height() for bar in errors.patches] == [40.0] * 3


def test_a_write_that_fails_leaves_the_kept_runs(tmp_path, monkeypatch):
    first = runs.Result("g/a", {"sequence_length": 2, "num_classes": 2, "seed": 1}, [], [{"epoch": 1}], [])
    runs.write_groups([first], tmp_path)
    monkeypatch.setattr(runs, "GROUP_TESTS", "missing/tests.csv")
    with pytest.raises(UserError, match=r"tests.csv: cannot be written"):
        runs.write_groups([first, first._replace(name="g/b")], tmp_path)
    assert [run.name for run in runs.read_results(tmp_path)] == ["g/a"]
