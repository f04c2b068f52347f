"""Shared by several test modules: comparing runs, refusals, samples, processes over gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

import data
import memorizing_associations_task as task
from models import POPULATIONS
from utils import checkpoints
from utils.metrics import read_metrics

# Runs


def history(folder) -> list[dict]:
    return [line | {"seconds": None} for line in read_metrics(folder / "metrics.jsonl")]


def assert_same(one, other, where=""):
    """Check that nested dictionaries, lists, tensors and plain values are bit-identical, except `seconds`."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one.keys() - {"seconds"}:
            assert_same(one[name], other[name], f"{where} {name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (part, other_part) in enumerate(zip(one, other, strict=True)):
            assert_same(part, other_part, f"{where} {number}")
    else:
        assert one == other, where


def assert_same_run(ours, theirs, names=(checkpoints.LAST,)):
    """Check that two folders hold bit-identical runs; their options may differ."""
    for name in names:
        one, other = (checkpoints.load(folder / name) | {"params": None} for folder in (ours, theirs))
        assert_same(one, other, name)
    assert history(ours) == history(theirs)


def refuse(capsys, *arguments, status=1, main=task.main):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


def draw(options, dtype, seed=0):
    samples = data.training_samples(
        0, options["batch"], 0, options["length"], options["num_classes"], options["feature_size"], seed
    )
    return samples.features.to(dtype), samples.labels, samples.query.to(dtype), samples.answer


# Functions that compute the network

OPERANDS = "features", "labels", "query", "write_weight", "read_weight"


def outcome(function, dynamics, inputs):
    """All results, the recording, and the gradients of a sum of all readouts and counts, each with another weight."""
    readout, counts, activity = function(*inputs, dynamics, record=True)
    results = readout, *counts.values()
    seeds = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for x in results]
    gradients = torch.autograd.grad(results, inputs, seeds)
    recorded = {name: activity[name] for name in (*POPULATIONS, "memory")}
    counted = {f"counts of {name}": count.detach() for name, count in counts.items()}
    return recorded | counted | {"readout": readout.detach()} | dict(zip(OPERANDS, gradients, strict=True))


def strided_outcome(function, dynamics, inputs):
    """Results and gradients without contiguous operands: they are transposed, one query and each seed are expanded."""
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    strided[2] = inputs[2].detach()[:1].expand_as(inputs[2]).requires_grad_()
    assert not any(x.is_contiguous() for x in strided)
    readout, counts, _ = function(*strided, dynamics)
    assert counts["read_key"].any() and readout.any()
    results = readout, *counts.values()
    seeds = [x.new_tensor(0.5 + n).expand_as(x) for n, x in enumerate(results)]
    return *results, *torch.autograd.grad(results, strided, seeds)


def assert_agree(ours, theirs, tolerance):
    """Check that memory and gradients agree to a share of their norm, and everything else exactly."""
    for name, expected in theirs.items():
        if name in (*OPERANDS, "memory"):
            assert (ours[name] - expected).norm() <= tolerance * expected.norm() + 1e-15, name
        else:
            assert torch.equal(ours[name], expected), name


# Processes that run small_task.py in float64, over gloo on loopback

SMALL_TASK = Path(__file__).with_name("small_task.py")
# 250 samples in batches of 62: 2 are left for the last, fewer than there are processes. All populations emit spikes.
NETWORK = (
    "--sequence_length 2 --num_classes 3 --feature_size 5 --num_time_steps 30 --embedding_size 20 --memory_size 20 --w_max 4 "
    "--gamma_pos 2 --seed 1 --batch_size 62 --workers 0"
).split()
GLOO = ["--dist_backend", "gloo", "--dist_timeout", "60"]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PATIENCE = 120  # seconds for processes to start on a busy machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Started:
    """A program with all the processes that it starts."""

    def __init__(self, *words, prefix=(), **environment):
        self.mark = f"TEST_MARK={uuid.uuid4()}"
        name, value = self.mark.split("=")
        environment = os.environ | {"OMP_NUM_THREADS": "2", name: value} | environment
        self.process = subprocess.Popen(
            [*prefix, *(() if prefix == TORCHRUN else (sys.executable,)), SMALL_TASK, *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, timeout: float = PATIENCE) -> tuple[int, str, str]:
        """Its exit status, stdout and stderr. No process may be left behind."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"left behind: {left}"
        return self.process.returncode, out, err

    def processes(self) -> list[str]:
        return [folder.name for folder in Path("/proc").glob("[0-9]*") if self._belongs(folder)]

    def _belongs(self, folder: Path) -> bool:
        try:
            return self.mark in (folder / "environ").read_text(errors="replace")
        except OSError:
            return False


def run(*words, **options) -> tuple[int, str, str]:
    return Started(*words, **options).end()


def distributed(processes: int) -> list[str]:
    return [*GLOO, "--processes_per_node", str(processes), "--dist_url", f"tcp://127.0.0.1:{free_port()}"]


def assert_same_training(folder: Path, other: Path) -> None:
    """Check that weights and Adam's state agree to 1e-9, and counts of samples exactly."""
    a, b = (checkpoints.load(path / checkpoints.LAST) for path in (folder, other))
    for name, weight in a["state_dict"].items():
        torch.testing.assert_close(weight, b["state_dict"][name], rtol=0, atol=1e-9)
    for number, state in a["optimizer"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(value, b["optimizer"]["state"][number][name], rtol=1e-9, atol=1e-9)
    assert len(a["history"]) == len(b["history"]) > 0
    for line, other_line in zip(a["history"], b["history"], strict=True):
        for name in ("train_accuracy", "validation_accuracy", "learning_rate"):
            assert line[name] == other_line[name]
        assert line.pop("seconds") > 0 and other_line.pop("seconds") > 0
        assert line == pytest.approx(other_line, rel=1e-9)
        assert all(line[name] > 0 for name in POPULATIONS)


def wait_for_training(trace: Path, processes: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(list(trace.iterdir())) < processes and time.monotonic() < deadline:
        time.sleep(0.05)
