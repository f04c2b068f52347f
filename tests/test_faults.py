"""Real faults: kills, full disks, damaged files, numbers that are not finite. Nothing may be lost, and nobody lied to.

The long versions, which give the figures of the README, are in benchmarks/faults.py.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch

import data
import memorizing_associations_task as task
from benchmarks import faults
from utils import checkpoints
from utils.errors import UserError
from utils.run import METRICS, Run

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = golden.FOLDER / "published_format_checkpoint.pth.tar"


@pytest.fixture(scope="module", autouse=True)
def short_epochs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TRAINING_SAMPLES", faults.SAMPLES["training"])
        patch.setitem(data.EVALUATION_SAMPLES, "validation", faults.SAMPLES["validation"])
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    assert faults.train(folder, 2) == 0
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def refused(capsys, *arguments, status=1) -> str:
    """The one line told by a command that must fail."""
    capsys.readouterr()
    assert task.main([*faults.TINY, *map(str, arguments)]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# Killed


def run_benchmark(*arguments) -> str:
    command = [sys.executable, ROOT / "benchmarks" / "faults.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_killed_trainings_end_as_the_undisturbed_one():
    assert "bitwise as the undisturbed one" in run_benchmark("killed", "--times", 6)


def test_what_a_killed_writer_left_is_removed(folder):
    (folder / f".{checkpoints.LAST}.12345.tmp").write_bytes(b"half a checkpoint")
    (folder / f".{METRICS}.12345.tmp").write_bytes(b"half")
    faults.train(folder, 2)
    assert not list(folder.glob(".*.tmp"))


# Two runs in one folder


def test_second_run_into_one_folder_is_refused(folder, capsys):
    first = Run(folder)
    first.lock()
    before = contents(folder)
    for arguments in ([], ["--resume", "auto"]):
        assert "another training is writing into it" in refused(capsys, "--output_dir", folder, *arguments)
    assert contents(folder) == before
    del first
    assert faults.train(folder, 2) == 0


def test_folders_without_locks_are_told(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("utils.run.fcntl.flock", unsupported)
    Run(tmp_path).lock()
    assert "no locks there" in capsys.readouterr().out


def test_no_checkpoint_is_overwritten_by_another_run(folder, whole, tmp_path, capsys):
    assert "holds a run already" in refused(capsys, "--output_dir", folder)
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    assert "holds a run already" in refused(capsys, "--output_dir", other, "--resume", folder / checkpoints.LAST)
    assert contents(other) == contents(whole)


def test_a_later_checkpoint_is_not_overwritten_by_an_earlier_one(folder, capsys):
    shutil.copy(folder / checkpoints.LAST, folder / checkpoints.BEST)
    assert faults.train(folder, 3) == 0
    earlier = checkpoints.load(folder / checkpoints.LAST)["epoch"] - 1
    best = checkpoints.load(folder / checkpoints.BEST)
    checkpoints.save(folder / checkpoints.BEST, best | {"epoch": earlier, "history": best["history"][:earlier]})
    assert "is later" in refused(capsys, "--resume", folder / checkpoints.BEST)


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


def test_file_too_large_stops_the_training_and_keeps_the_checkpoint(folder, capsys):
    before = contents(folder)
    with largest_file(4096):
        line = refused(capsys, "--output_dir", folder, "--resume", "auto", "--epochs", 4)
    assert checkpoints.LAST in line or checkpoints.BEST in line
    assert "cannot be written (File too large); make room or choose another --output_dir" in line
    after = contents(folder)
    assert all(after[name] == before[name] for name in (checkpoints.LAST, checkpoints.BEST, METRICS))
    assert faults.train(folder, 3) == 0


def test_new_run_without_room_says_so_before_it_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task, "train_epoch", None)  # must not be reached
    with largest_file(4096):
        assert "cannot be written (File too large)" in refused(capsys, "--output_dir", tmp_path / "run")


def test_full_disk(folder, tmp_path):
    """A disk of 100 kB, most of it taken."""
    script = f"""
        mount -t tmpfs -o size=100k none {tmp_path}/run && cp {folder}/../kept/* {tmp_path}/run/ || exit 77
        head -c 200000 /dev/zero > {tmp_path}/run/filler 2> /dev/null
        {sys.executable} -c "import sys; sys.path[:0] = ['{ROOT}']
from benchmarks import faults; from pathlib import Path; faults.shorten_epochs()
sys.exit(faults.train(Path('{tmp_path}/run'), 4))"
        status=$?
        cp {tmp_path}/run/*.tar {tmp_path}/kept/ && exit $status"""
    shutil.copytree(folder, tmp_path / "kept")
    before = (folder / checkpoints.LAST).read_bytes()
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this system lets nobody mount a small disk")
    assert done.returncode == 1
    assert "cannot be written (No space left on device); make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "kept" / checkpoints.LAST).read_bytes() == before


def test_folder_deleted_while_training(tmp_path, capsys, monkeypatch):
    folder, train_epoch = tmp_path / "run", task.train_epoch

    def delete_then_train(*arguments):
        shutil.rmtree(folder)
        return train_epoch(*arguments)

    monkeypatch.setattr(task, "train_epoch", delete_then_train)
    assert "cannot be written (No such file or directory)" in refused(capsys, "--output_dir", folder, "--epochs", 1)


def test_folder_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        assert f"--output_dir {place}" in refused(capsys, "--output_dir", place)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_read_only_folder(folder):
    """As somebody to whom the folder is read-only."""
    before = contents(folder)

    def train_as_nobody() -> int:
        os.setuid(65534)
        try:
            checkpoints.save(folder / checkpoints.LAST, checkpoints.load(folder / checkpoints.LAST))
        except UserError as error:
            return 1 if "cannot be written (Permission denied)" in str(error) else 3
        return 2

    folder.parent.chmod(0o755)
    for parent in folder.parents[:4]:
        parent.chmod(parent.stat().st_mode | 0o055)
    assert faults.in_child(train_as_nobody) == 1
    assert contents(folder) == before


# Damaged files


def test_damaged_checkpoints_are_refused_or_intact(whole):
    counts = faults.damaged_files(whole / checkpoints.LAST, times=60, seed=1)
    assert counts["refused"] > 40
    counts = faults.damaged_files(PUBLISHED, times=40, seed=2)
    assert counts["refused"] > 20


@pytest.mark.parametrize("name", sorted(faults.NOT_CHECKPOINTS))
def test_what_is_no_checkpoint_is_refused(name, tmp_path):
    path = tmp_path / "file.pth.tar"
    faults.NOT_CHECKPOINTS[name](path)
    with pytest.raises(UserError, match=r"file\.pth\.tar: ") as refusal:
        checkpoints.load(path)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("name", sorted(faults.CHANGES))
@pytest.mark.parametrize("source", ["ours", "ours without digest", "published"])
def test_changed_contents_are_refused(name, source, whole, tmp_path):
    original = torch.load(PUBLISHED if source == "published" else whole / checkpoints.LAST, weights_only=False)
    if source == "ours without digest":
        del original["digest"]
    changed = faults.CHANGES[name](original)
    if changed is None:
        pytest.skip("these files have no such part")
    torch.save(changed, tmp_path / "changed.pth.tar")
    if name in faults.UNSEEN_WITHOUT_DIGEST and source != "ours":
        return
    with pytest.raises(UserError, match=r"changed\.pth\.tar: ") as refusal:
        checkpoints.load(tmp_path / "changed.pth.tar")
    assert len(str(refusal.value).splitlines()) == 1


def test_resume_auto_falls_back_to_the_newest_whole_checkpoint(folder, capsys):
    shutil.copy(folder / checkpoints.LAST, folder / checkpoints.BEST)
    with open(folder / checkpoints.LAST, "r+b") as file:
        file.truncate(5000)
    assert faults.train(folder, 3) == 0
    told = capsys.readouterr().out
    assert f"warning: {folder / checkpoints.LAST}: damaged" in told
    assert f"going back to {folder / checkpoints.BEST}, of epoch 2" in told
    assert checkpoints.load(folder / checkpoints.LAST)["epoch"] == 3


def test_resume_auto_does_not_start_anew_where_every_checkpoint_is_damaged(folder, capsys):
    for name in (checkpoints.LAST, checkpoints.BEST):
        (folder / name).write_bytes(b"")
    before = contents(folder)
    line = refused(capsys, "--output_dir", folder, "--resume", "auto")
    assert checkpoints.LAST in line and checkpoints.BEST in line
    assert contents(folder) == before


def test_evaluate_without_a_checkpoint(tmp_path, capsys):
    assert "no checkpoint in" in refused(capsys, "--resume", "auto", "--evaluate", "--output_dir", tmp_path)


# Numbers


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dampening_factor", "1e20"], "epoch 1, step 1: not finite: gradient of input_layer.weight"),
        (["--l2", "1e38"], "epoch 2, step 1: not finite: loss, gradient of input_layer.weight"),
    ],
)
def test_not_finite_stops_before_the_step(options, told, tmp_path, capsys):
    assert told in refused(capsys, "--output_dir", tmp_path, "--epochs", 3, *options)
    finished = int(told.split(",")[0].removeprefix("epoch ")) - 1
    assert checkpoints.load(tmp_path / checkpoints.LAST)["epoch"] == finished
    assert len((tmp_path / METRICS).read_text().splitlines()) == finished


def test_a_silent_population_is_told_with_the_remedy(tmp_path, capsys):
    assert task.main([*faults.TINY, "--thr", "1e6", "--epochs", "1", "--output_dir", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "warning: write_key is silent (mean rate 0 Hz in epoch 1)" in told
    assert "another --seed" in told
    assert "--curriculum_start" in told


# Memory


def test_memory_is_estimated_within_30_percent():
    run_benchmark("memory", "--times", 1)


def test_too_large_a_batch_is_told_with_one_that_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.memory.available", lambda device: 2**30)
    line = refused(capsys, "--batch_size", 10_000_000, "--output_dir", tmp_path / "run")
    fitting = int(line.split("--batch_size ")[2].split()[0])
    assert "GiB are free" in line
    assert task.main([*faults.TINY, "--batch_size", str(fitting), "--epochs", "1", "--output_dir", str(tmp_path / "run")]) == 0


def test_a_network_that_never_fits(tmp_path, capsys):
    assert "no batch fits" in refused(capsys, "--memory_size", 10**7, "--output_dir", tmp_path)


# Time


def test_memory_does_not_grow_with_steps():
    run_benchmark("steps", "--times", 600)


@pytest.mark.slow
@pytest.mark.parametrize("fault", sorted(faults.FULL))
def test_at_full_length(fault):
    run_benchmark(fault)
