"""Faults: kills, full disks, damaged files, numbers that are not finite. Nothing may be lost, and errors are one line."""

import contextlib
import errno
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_same_run, refuse

import data
import memorizing_associations_task as task
import plot_memorizing_associations_task as plot
from experiments import sweep
from utils import checkpoints, run
from utils.errors import UserError, out_of_memory_in_one_line
from utils.run import METRICS, OPTIONS

TINY = """--sequence_length 2 --num_classes 2 --num_time_steps 20 --embedding_size 8 --memory_size 8 --batch_size 64 --seed 1
    --device cpu --workers 1""".split()


def train(folder: Path, epochs: int) -> int:
    return task.main([*TINY, "--epochs", str(epochs), "--resume", "auto", "--output_dir", str(folder)])


@pytest.fixture(scope="module", autouse=True)
def short_epochs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TRAINING_SAMPLES", 320)
        patch.setitem(data.EVALUATION_SAMPLES, "validation", 32)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    assert train(folder, 2) == 0
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(capsys, *arguments) -> str:
    return refuse(capsys, *TINY, *arguments)


# Killed


def in_child(body, kill_after: float | None = None) -> int:
    """Run `body` in a forked process, without its output. Returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            torch.set_num_threads(1)  # threads do not survive a fork
            status = body()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_while_writing(number: int, folder: Path, epochs: int) -> int:
    """Train until SIGKILL at a point of writing checkpoints: in turn half written, not yet renamed, just renamed."""
    points = itertools.count()

    def point() -> None:
        if next(points) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    write_atomically, replace = checkpoints.write_atomically, os.replace

    def write_in_parts(path, write):
        def both_halves(file):
            content = io.BytesIO()
            write(content)
            half = len(content.getvalue()) // 2
            file.write(content.getvalue()[:half])
            file.flush()
            point()
            file.write(content.getvalue()[half:])

        write_atomically(path, both_halves if path.suffix == ".tar" else write)

    def replace_between_points(source, target):
        if Path(target).suffix == ".tar":
            point()
        replace(source, target)
        if Path(target).suffix == ".tar":
            point()

    checkpoints.write_atomically, os.replace = write_in_parts, replace_between_points
    return train(folder, epochs)


@pytest.mark.parametrize("times", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_and_resumed_runs_end_like_an_undisturbed_run(times, tmp_path, whole):  # `whole` imports all before the forks
    """Every second kill comes while a checkpoint is written. Weights and metrics stay the same, bit for bit."""
    rng, epochs, kills = random.Random(0), 3 if times < 10 else 10, 0
    folder, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    start = time.perf_counter()
    assert in_child(lambda: train(undisturbed, epochs)) == 0
    epoch_seconds = (time.perf_counter() - start) / epochs
    while kills < times or folder.exists():
        if kills == times:
            status = in_child(lambda: train(folder, epochs))
        elif kills % 2:
            status = in_child(lambda: kill_while_writing(rng.randrange(9), folder, epochs))
        else:
            status = in_child(lambda: train(folder, epochs), kill_after=rng.uniform(0, 2) * epoch_seconds)
        assert status in (-signal.SIGKILL, 0), f"a resumed run exited with {status}"
        check_metrics(folder)
        if status == 0:
            assert_same_run(folder, undisturbed, (checkpoints.LAST, checkpoints.BEST))
            assert not list(folder.glob(".*.tmp")), "temporary files are left"
            shutil.rmtree(folder)
        else:
            kills += 1


def check_metrics(folder: Path) -> None:
    """No line of the metrics file may be lost, doubled or torn."""
    if (folder / METRICS).exists() and (folder / checkpoints.LAST).exists():
        epochs = [json.loads(line)["epoch"] for line in (folder / METRICS).read_text().splitlines()]
        finished = checkpoints.load(folder / checkpoints.LAST)["epoch"]
        assert epochs == list(range(1, len(epochs) + 1))
        assert finished <= len(epochs) <= finished + 1  # the checkpoint follows the file


def test_the_checkpoint_is_written_last(folder, monkeypatch):
    """If it came before the metrics, a kill in between would lose the last epoch's line permanently."""
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (written.append(Path(target).name), replace(source, target)))
    run.save(folder, checkpoints.load(folder / checkpoints.LAST), is_best=True)
    assert written == [checkpoints.BEST, METRICS, checkpoints.LAST]


@pytest.mark.parametrize("number", range(3))  # half written, not yet renamed, just renamed
def test_a_run_killed_while_writing_its_first_checkpoint_can_start_again(number, tmp_path, whole):
    folder = tmp_path / "killed"
    assert in_child(lambda: kill_while_writing(number, folder, 2)) == -signal.SIGKILL
    assert (folder / checkpoints.LAST).exists() == (number == 2)
    assert train(folder, 2) == 0
    assert_same_run(folder, whole, (checkpoints.LAST, checkpoints.BEST))
    assert contents(folder).keys() == contents(whole).keys()


# The folder of a run


@pytest.mark.parametrize(
    ("standing", "words", "message"),
    [
        ("whole", "", "holds a run already"),
        ("whole", "--resume {other}/checkpoint.pth.tar", "holds a run already"),
        ("whole", "--resume {folder}/model_best.pth.tar", "checkpoint.pth.tar is the last checkpoint of this run; resume it"),
        ("gone", "", "holds a run already"),
        ("gone", "--resume auto", f"holds {OPTIONS} and {METRICS} of a run, but no checkpoint"),
        ("empty", "--resume auto", "checkpoint.pth.tar: damaged"),
        ("locked", "--resume auto", "another process is writing into it"),
    ],
)
def test_a_run_is_not_overwritten(standing, words, message, folder, whole, capsys):
    for name in (checkpoints.LAST, checkpoints.BEST):
        if standing == "gone":
            (folder / name).unlink()
        elif standing == "empty":
            (folder / name).write_bytes(b"")
    before = contents(folder)
    with run.locked(folder) if standing == "locked" else contextlib.nullcontext():
        arguments = words.format(folder=folder, other=whole).split()
        assert message in refused(capsys, "--output_dir", folder, "--epochs", 9, *arguments)
    assert contents(folder) == before


def test_the_lock_is_released_when_main_raises(folder, monkeypatch):
    monkeypatch.setattr(task, "train_step", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:  # a notebook keeps exceptions and the objects they refer to
        train(folder, 4)
    with run.locked(folder):
        assert kept


@pytest.mark.parametrize(
    "failure", [NotImplementedError(), OSError(errno.ENOLCK, "No locks"), OSError(errno.EACCES, "No access")]
)
def test_runs_and_sweeps_work_without_file_locks(failure, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(run.FileLock, "acquire", fail)
    if getattr(failure, "errno", None) == errno.EACCES:
        with pytest.raises(UserError, match="cannot be used"), run.locked(tmp_path / "run"):
            pass
        with pytest.raises(OSError), sweep.hold(tmp_path / "run"):
            pass
        return
    with run.locked(tmp_path / "run"):
        assert "no file locks there" in capsys.readouterr().err
    with sweep.hold(tmp_path / "run") as is_ours:
        assert is_ours


def test_the_best_checkpoint_resumes_in_another_folder_or_if_the_last_is_damaged(folder, tmp_path):
    resumed = [*TINY, "--resume", str(folder / checkpoints.BEST), "--epochs", "3"]
    assert task.main([*resumed, "--output_dir", str(tmp_path / "other")]) == 0
    os.truncate(folder / checkpoints.LAST, 5000)
    assert task.main(resumed) == 0
    assert_same_run(folder, tmp_path / "other")


# Disk


@contextlib.contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond `size` bytes, as under a quota."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (task.main, "--output_dir dead/run"),
        (task.main, "--resume dead --evaluate"),
        (plot.main, "--metrics dead"),
        (plot.main, "--metrics {whole} --output dead/figures"),
    ],
)
def test_a_dead_link_is_reported_as_a_dead_link(main, words, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dead").symlink_to("nowhere/at/all")
    assert "dead is a broken link" in refuse(capsys, *words.format(whole=whole).split(), main=main)


def test_a_file_size_limit_stops_the_run_and_keeps_the_checkpoint(folder, capsys):
    before = contents(folder)
    with largest_file(4096):
        line = refused(capsys, "--output_dir", folder, "--resume", "auto", "--epochs", 4)
    assert contents(folder) == before, "only the old files remain"
    assert "cannot be written (File too large); make room or choose another --output_dir" in line
    assert train(folder, 3) == 0


def test_an_unwritable_output_dir_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        assert f"--output_dir {place}" in refused(capsys, "--output_dir", place)


# Damaged files


def test_resume_auto_falls_back_to_the_newest_whole_checkpoint(folder, capsys):
    shutil.copy(folder / checkpoints.LAST, folder / checkpoints.BEST)
    os.truncate(folder / checkpoints.LAST, 5000)
    assert train(folder, 3) == 0
    assert f"going back to {folder / checkpoints.BEST}, of epoch 2" in capsys.readouterr().err
    assert checkpoints.load(folder / checkpoints.LAST)["epoch"] == 3


# Numbers and memory


@pytest.mark.parametrize(
    ("options", "message", "finished"),
    [
        ("--dampening_factor 1e20", "epoch 1, step 1: not finite: gradient of input_layer.weight", 0),
        ("--l2 1e38", "epoch 2, step 1: not finite: loss, gradient of input_layer.weight", 1),
    ],
)
def test_a_non_finite_number_stops_the_run_before_the_step(options, message, finished, tmp_path, capsys):
    assert message in refused(capsys, "--output_dir", tmp_path, "--epochs", 3, *options.split())
    checkpoint = checkpoints.load(tmp_path / checkpoints.LAST)
    assert checkpoint["epoch"] == len(checkpoint["history"]) == finished


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes"), torch.OutOfMemoryError("CUDA")]
)
def test_running_out_of_memory_gives_one_line_with_the_remedy(error):
    for size, remedy in ((64, "--batch_size 32"), (1, "choose a smaller --memory_size")):
        with pytest.raises(UserError, match=f"out of memory; .*{remedy}"), out_of_memory_in_one_line(size):
            raise error
