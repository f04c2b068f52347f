"""Distributed training: the same result as one process, messages printed once, and one error line if something fails.

Real processes run `small_task.py` in float64, over gloo on loopback.
"""

import itertools
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import (
    GLOO,
    NETWORK,
    TORCHRUN,
    Started,
    assert_same_training,
    distributed,
    free_port,
    refuse,
    run,
    wait_for_training,
)

import memorizing_associations_task as task
from utils import checkpoints, launch
from utils.errors import UserError
from utils.interruption import Interruption
from utils.options import Parser


def check_steps(single: Path, trace: Path, processes: int, threads: int = 1) -> None:
    """Check that the processes together saw the samples of one process, each with its share of the threads."""
    steps = [path.read_text().splitlines() for path in sorted(trace.iterdir())]
    assert len(steps) == processes
    assert {step.split()[0] for rank in steps for step in rank} == {str(threads)}
    seen = [[x for part in parts for x in part.split()[1:]] for parts in zip(*steps, strict=True)]
    expected = [step.split()[1:] for step in (single / "trace").read_text().splitlines()]
    assert len(seen) >= 7 and seen == expected[: len(seen)]


def test_three_processes_train_like_one_and_one_resumes_after_ctrl_c(single, tmp_path):
    (trace := tmp_path / "trace").mkdir()
    words = (*NETWORK, "--epochs", "2", "--output_dir", tmp_path / "run")
    status, out, err = run(
        *(*words, *distributed(3)), OMP_NUM_THREADS="3", SMALL_TASK_TRACE=str(trace), SMALL_TASK_FAIL="1:7:Ctrl-C"
    )
    assert (status, err) == (128 + signal.SIGINT, "")
    assert out.count("interrupted in epoch 2 after 124 of 250 samples") == out.count("parameters on") == 1
    check_steps(single, trace, 3)
    status, _, err = run(*words, "--resume", "auto")
    assert status == 0, err
    assert_same_training(single, tmp_path / "run")


@pytest.mark.slow
def test_torchrun_trains_like_one_process(single, tmp_path):
    (trace := tmp_path / "trace").mkdir()
    words = (*NETWORK, "--epochs", "2", "--output_dir", tmp_path / "run", *GLOO)
    status, _, err = run(*words, prefix=TORCHRUN, OMP_NUM_THREADS="1", SMALL_TASK_TRACE=str(trace))
    assert status == 0, err
    # torchrun sets one thread by default, so the program divides the cores instead
    check_steps(single, trace, 2, threads=max(1, len(os.sched_getaffinity(0)) // 2))
    assert_same_training(single, tmp_path / "run")


def test_two_nodes_train_like_one_process_with_the_options_of_rank_0(single, tmp_path):
    """--batch_size counts for a node: two nodes with 31 each make up a batch of 62."""
    where = ("--world_size", "2", *GLOO, "--dist_url", f"tcp://127.0.0.1:{free_port()}")
    words = (*NETWORK, "--epochs", "2", "--batch_size", "31", "--output_dir", tmp_path / "first")
    first = Started(*words, *where, "--rank", "0", OMP_NUM_THREADS="1")
    second = Started(*where, "--rank", "1", "--output_dir", tmp_path / "second", OMP_NUM_THREADS="1")
    assert (second.end(), first.end()[0]) == ((0, "", ""), 0)
    assert_same_training(single, tmp_path / "first")
    assert not (tmp_path / "second").exists(), "only rank 0 writes"


@pytest.mark.slow
def test_evaluation_by_two_processes_gives_the_accuracy_of_one(single):
    words = (*NETWORK, "--evaluate", "--resume", single / checkpoints.BEST)
    assert run(*words)[1] == run(*words, *distributed(2))[1]


# Failures and signals


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("1:7:SIGKILL", r"rank 1 \(process 1 terminated with signal SIGKILL, id \d+ on \S+\)"),
        pytest.param("1:7:SIGSTOP", "no answer from another process", marks=pytest.mark.slow),
        pytest.param("1:7:bug", "rank 1 failed: ZeroDivisionError: a bug", marks=pytest.mark.slow),
    ],
)
def test_a_dead_process_ends_the_job_and_leaves_the_last_checkpoint(tmp_path, failure, message):
    words = (*NETWORK, "--output_dir", tmp_path, "--epochs", "2")
    status, _, err = run(*words, *distributed(2), "--dist_timeout", "5", SMALL_TASK_FAIL=failure)
    remedy = re.escape(f"; the same command with --output_dir {tmp_path} --resume auto resumes from the last checkpoint")
    assert status == 1
    assert re.fullmatch(f"error: {message}{remedy}", err.splitlines()[-1])
    assert err.count("Traceback") == ("bug" in failure)
    assert checkpoints.load(tmp_path / checkpoints.LAST)["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_program_alone_reaches_all_its_processes(tmp_path, number):
    """SIGKILL cannot be passed on, but it also leaves no process behind: `end` checks this."""
    (trace := tmp_path / "trace").mkdir()
    words = (*NETWORK, "--output_dir", tmp_path / "run", "--epochs", "1000")
    started = Started(*words, *distributed(2), SMALL_TASK_TRACE=str(trace))
    wait_for_training(trace, 2)
    os.kill(started.process.pid, number)
    status, out, err = started.end()
    if number == signal.SIGTERM:
        assert (status, out.count("interrupted"), err) == (128 + number, 1, "")


def test_interruption_handles_every_signal_that_is_not_ignored():
    """The program must not undo `nohup`, which makes it ignore SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        outside = signal.signal(number, signal.default_int_handler)  # the tests themselves may run under `nohup`
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.status == 128 + number
        signal.signal(number, signal.SIG_IGN)
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.status == 0
        signal.signal(number, outside)


# Nodes that do not connect


def options(*words):
    parser = Parser("")
    task.add_options(parser)
    return parser.complete(parser.given(words))


ENVIRONMENT = {"MASTER_ADDR": "::1", "MASTER_PORT": "29", "WORLD_SIZE": "4", "RANK": "3"}
TORCHRUN_ENVIRONMENT = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "GROUP_RANK": "1"}


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ("--world_size 2", {}, "--rank -1: must be the number of this node, from 0, and below --world_size 2"),
        ("--rank 1", {}, "--rank 1: must be the number of this node, from 0, and below --world_size 1"),
        ("--world_size 0 --multiprocessing_distributed", {}, "--world_size 0: must be the number of nodes, at least 1"),
        ("--world_size 2 --rank 0 --dist_url tcp://host:99999", {}, "--dist_url tcp://host:99999: must be tcp://HOST:PORT"),
        ("--processes_per_node 2 --gpu 0", {}, "--gpu and --device cuda:N name one GPU, but there are 2 processes"),
        ("--dist_url env://", {}, "environment variable WORLD_SIZE is '': set it, or give --world_size"),
        ("--dist_url env://", ENVIRONMENT | {"MASTER_PORT": "tcp://x:29"}, "environment variable MASTER_PORT is 'tcp://x:29'"),
        ("", ENVIRONMENT | {"TORCHELASTIC_RUN_ID": "x"}, "environment variable GROUP_RANK is ''"),
        (
            "--multiprocessing_distributed --device cpu",
            {},
            "--dist_backend nccl: no usable GPU here; for CPUs: --dist_backend gloo",
        ),
        ("--world_size 2 --rank 1 --dist_backend gloo --dist_url tcp://nowhere.invalid:29", {}, "--dist_url: cannot resolve"),
    ],
)
def test_impossible_ranks_are_refused(words, environment, message, capsys, monkeypatch, tmp_path):
    for name in ENVIRONMENT.keys() | TORCHRUN_ENVIRONMENT.keys():
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status = 1 if "--dist_backend" in message or "resolve" in message else 2
    assert message in refuse(capsys, *words.split(), "--output_dir", tmp_path / "run", status=status)
    assert not (tmp_path / "run").exists()


def test_ranks_are_counted_as_in_the_original_implementation(monkeypatch):
    def ranks(*words):
        return launch.find_ranks(options(*words))

    assert ranks() is None
    one = ranks("--multiprocessing-distributed", "--processes_per_node", "3")
    assert (one.nodes, one.world_size, one.local_rank) == (1, 3, None)
    two = ranks("--processes_per_node", "3", "--world-size", "2", "--rank", "1", "--dist-url", "tcp://[::1]:29")
    assert (two.nodes, two.world_size, two.node, two.url, two.rank(2)) == (2, 6, 1, "tcp://[::1]:29", 5)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    four = ranks("--dist-url", "env://", "--processes_per_node", "2")
    assert (four.nodes, four.world_size, four.node, four.url) == (4, 8, 3, "tcp://[::1]:29")
    for name, value in TORCHRUN_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    torchrun = ranks()
    assert (torchrun.nodes, torchrun.world_size, torchrun.local_rank, torchrun.rank(1)) == (2, 4, 1, 3)
    leaders = []
    for node, local_rank in itertools.product("01", "01"):
        monkeypatch.setenv("GROUP_RANK", node)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        leaders.append(ranks().leads)
    assert leaders == [True, False, False, False]


@pytest.mark.parametrize(
    ("rank", "taken", "message"),
    [("0", False, "not all nodes met at"), ("1", False, "not all nodes met at"), ("0", True, "the port of --dist_url")],
)
def test_nodes_that_do_not_connect_raise_an_error(rank, taken, message, monkeypatch):
    monkeypatch.setattr(launch.threading.Timer, "start", lambda timer: None)  # the timer would end the tests if PyTorch is late
    with socket.socket() as other:
        other.bind(("", 0))
        url = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        if taken:
            other.listen()
        else:
            other.close()
        given = options("--dist_backend", "gloo", "--dist_timeout", "1", "--world_size", "2", "--rank", rank, "--dist_url", url)
        with pytest.raises(UserError, match=f"{message} {url}"):
            launch._join(launch.find_ranks(given), 0, given)


@pytest.mark.slow
def test_a_node_stops_waiting_for_a_port_that_does_not_answer(tmp_path):
    """Another program may use the port. PyTorch alone would wait forever."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        words = ["--world_size", "2", "--rank", "1", *GLOO, "--dist_timeout", "2", "--dist_url", url]
        status, _, err = run(*words, "--output_dir", tmp_path)
    assert status == 1 and err.startswith(f"error: rank 1: not all nodes met at {url} within 2 s")


def test_nodes_with_different_software_are_refused(monkeypatch, capsys):
    def gather(found, own):
        found[:] = [f"{software} on node 0", own]

    def leave(status):
        raise SystemExit(status)

    software = launch._software()
    monkeypatch.setattr(launch, "_join", lambda *_: None)
    monkeypatch.setattr(launch.dist, "all_gather_object", gather)
    monkeypatch.setattr(launch.os, "_exit", leave)
    monkeypatch.setattr(launch.distributed, "broadcast_object", lambda value: (*value[:2], software))
    monkeypatch.setattr(launch, "commit", lambda: "another")
    with pytest.raises(SystemExit, match="1"):
        launch._work(0, lambda *_: 7, launch.Ranks("tcp://host:29", 1, 2, 1), None, (), "")
    expected = f"error: rank 1: {software} on node 0, commit another and PyTorch {torch.__version__} on node 1; all nodes need"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("name", ["slurm_multiprocessing", "slurm_torchrun"])
def test_the_slurm_examples_pass_valid_options_to_the_task_script(name, tmp_path):
    """SLURM and Python are replaced: `srun` starts its command on this host, `python` and `torchrun` print their arguments."""
    fakes = {"srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"', "scontrol": "echo node0", "python": 'echo "$@"'}
    for program, text in (fakes | {"torchrun": fakes["python"]}).items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    (tmp_path / "slurm_1.out").touch()
    job = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "x"}
    command = ["bash", Path(task.__file__).with_name("examples") / f"{name}.sh", "--epochs", "3"]
    environment = os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout.split()
    given = options(*words[words.index("memorizing_associations_task.py") + 1 :])
    assert (given.resume, given.output_dir, given.seed, given.epochs) == ("auto", "runs/slurm_seed7", 7, 3)
