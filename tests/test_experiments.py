"""Sweeps, the table of the committed results, and the committed networks."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import memorizing_associations_task as task
from experiments import export, summarize, sweep
from utils import checkpoints
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PRETRAINED = ROOT / "experiments" / "results", ROOT / "pretrained"
SMALL = {"num_time_steps": 10, "embedding_size": 8, "memory_size": 8, "batch_size": 3000, "device": "cpu"}


def write(path, **groups):
    path.write_text(yaml.safe_dump(groups, sort_keys=False))
    return path


def start(path, folder, *arguments):
    command = [sys.executable, str(ROOT / "experiments" / "sweep.py"), str(path), "--output_dir", str(folder), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(child):
    output, _ = child.communicate(timeout=120)
    return child.returncode, output


def test_lists_make_runs(tmp_path):
    path = write(
        tmp_path / "sweep.yaml",
        long={"sequence_length": [2, 5], "num_classes": "sequence_length", "seed": [1, 2], "epochs": 7},
        other={"sequence_length": 10, "num_classes": 30, "seed": 3, "perfect_reset": True, "test_lengths": "2-30"},
    )
    jobs = sweep.read_sweep(path, tmp_path)
    names = [f"long/sequence_length{length}-seed{seed}" for length in (2, 5) for seed in (1, 2)]
    assert [job.name for job in jobs] == [*names, "other/run"]
    assert [job.options["num_classes"] for job in jobs] == [2, 2, 5, 5, 30]
    assert [job.test_lengths for job in jobs] == ["2", "2", "5", "5", "2-30"]
    assert [job.epochs for job in jobs] == [7, 7, 7, 7, 250]
    assert jobs[-1].training()[-1] == "--perfect_reset"


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
def test_a_wrong_sweep_starts_nothing(tmp_path, capsys, group, words):
    path = write(tmp_path / "sweep.yaml", group=group)
    assert sweep.main([str(path), "--output_dir", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and words in line
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_does_not_stop_the_others_and_finished_ones_are_not_repeated(tmp_path):
    path = write(tmp_path / "sweep.yaml", small={"sequence_length": [1, 2], "seed": 1, "epochs": 1, **SMALL})
    damaged = tmp_path / "runs" / "small" / "sequence_length1" / checkpoints.LAST
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"not a checkpoint")
    status, output = finish(start(path, tmp_path / "runs", "--jobs", "2"))
    assert status == 1
    assert "1 of 2 runs done, 1 failed" in output and f"{damaged}: " in output

    whole = tmp_path / "runs" / "small" / "sequence_length2"
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert len((whole / "metrics.jsonl").read_text().splitlines()) == 1
    (tested,) = csv.DictReader((whole / "accuracy_by_length.csv").read_text().splitlines())
    assert tested["sequence_length"] == "2" and 0 <= float(tested["accuracy"]) <= 100
    assert len((whole / "command.txt").read_text().splitlines()) == 2

    damaged.unlink()
    status, output = finish(start(path, tmp_path / "runs", "--jobs", "2"))
    assert status == 0 and "2 of 2 runs done, 0 failed" in output
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before

    rows = [summarize.summary(result) for result in summarize.read_results(tmp_path / "runs")]
    assert [row["state"] for row in rows] == ["finished", "finished"]
    network = tmp_path / "network.pth.tar"
    export.export(whole / checkpoints.BEST, network)
    assert task.main(["--resume", str(network), "--epochs", "2", "--output_dir", str(tmp_path / "on"), "--device", "cpu"]) == 0


def test_an_interrupted_sweep_saves_its_runs(tmp_path):
    path = write(tmp_path / "sweep.yaml", small={"sequence_length": [1], "seed": 1, "epochs": 500, **SMALL})
    child = start(path, tmp_path / "runs", "--jobs", "1")
    run = tmp_path / "runs" / "small" / "sequence_length1"
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    status, output = finish(child)
    assert status == 128 + signal.SIGTERM and "0 of 1 runs done, 0 failed, 1 to go on with" in output
    assert "interrupted in epoch" in (run / "log.txt").read_text()
    (result,) = summarize.read_results(tmp_path / "runs")
    assert summarize.summary(result)["state"] == "unfinished"
    assert checkpoints.load(run / checkpoints.LAST)["epoch"] == len(result.metrics)


def test_the_table_is_that_of_the_raw_metrics():
    rows = [summarize.summary(result) for result in summarize.read_results(RESULTS)]
    assert (RESULTS / "table.csv").read_text(encoding="utf-8") == summarize.to_csv(rows)
    assert (RESULTS / "table.md").read_text(encoding="utf-8") == summarize.to_markdown(rows)


def test_a_damaged_run_is_named(tmp_path):
    run = tmp_path / "group" / "run"
    run.mkdir(parents=True)
    (run / "options.yaml").write_text("seed: 1\n")
    (run / "metrics.jsonl").write_text(json.dumps({"epoch": 0})[:-3] + "\n")
    with pytest.raises(UserError, match="group/run: damaged"):
        summarize.read_results(tmp_path)


def test_a_committed_network_scores_what_the_table_says(tmp_path):
    run = "recipe/sequence_length10-seed1"
    rows = csv.DictReader((RESULTS / "table.csv").read_text(encoding="utf-8").splitlines())
    row = next(row for row in rows if row["run"] == run)
    command = ["--resume", str(PRETRAINED / export.file_name(run)), "--evaluate", "--backend", "cpp", "--device", "cpu"]
    assert task.main([*command, "--output_dir", str(tmp_path)]) == 0
    (tested,) = csv.DictReader((tmp_path / "accuracy_by_length.csv").read_text().splitlines())
    # 2,000 samples; on another CPU, rounding may flip a spike that decides a sample.
    assert float(tested["accuracy"]) == pytest.approx(float(row["test_accuracy"]), abs=0.1)
