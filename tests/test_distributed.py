"""Distributed training: the same training as one process, one voice, and an end in good order when something fails.

Real processes over gloo on loopback run `small_task.py`, in float64.
"""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
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
    """Together the processes have seen what one process sees, each with its part of the threads."""
    steps = [path.read_text().splitlines() for path in sorted(trace.iterdir())]
    assert len(steps) == processes
    assert {step.split()[0] for rank in steps for step in rank} == {str(threads)}
    seen = [[x for part in parts for x in part.split()[1:]] for parts in zip(*steps, strict=True)]
    expected = [step.split()[1:] for step in (single / "trace").read_text().splitlines()]
    assert len(seen) >= 7 and seen == expected[: len(seen)]


def check_one_voice(single: Path, out: str) -> None:
    """The lines of the output are those of one process, as far as they go."""
    of_this_run = r"  [\d,]+ samples/s.*|/\S*/model_best|.* parameters learn .*|interrupted in epoch .*\n"
    lines, single_lines = (re.sub(of_this_run, "", t, flags=re.M).splitlines() for t in (out, (single / "out").read_text()))
    assert len(lines) >= 3 and lines == single_lines[: len(lines)]


def test_three_processes_train_as_one_does_and_one_resumes_after_ctrl_c(single, tmp_path):
    (trace := tmp_path / "trace").mkdir()
    words = (*NETWORK, "--epochs", "2", "--output_dir", tmp_path / "run")
    status, out, err = run(
        *(*words, *distributed(3)), OMP_NUM_THREADS="3", SMALL_TASK_TRACE=str(trace), SMALL_TASK_FAIL="1:7:Ctrl-C"
    )
    assert (status, err) == (128 + signal.SIGINT, "")
    assert out.count("interrupted in epoch 2 after 124 of 250 samples") == 1
    check_steps(single, trace, 3)
    check_one_voice(single, out)
    status, _, err = run(*words, "--resume", "auto")
    assert status == 0, err
    assert_same_training(single, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in single.iterdir()} - {"out", "trace"}


@pytest.mark.slow
def test_torchrun_trains_as_one_process_does(single, tmp_path):
    (trace := tmp_path / "trace").mkdir()
    status, out, err = run(
        *(*NETWORK, "--epochs", "2", "--output_dir", tmp_path / "run", *GLOO),
        prefix=TORCHRUN,
        OMP_NUM_THREADS="1",
        SMALL_TASK_TRACE=str(trace),
    )
    assert status == 0, err
    # torchrun's one thread is not a choice: the cores are divided
    check_steps(single, trace, 2, threads=max(1, len(os.sched_getaffinity(0)) // 2))
    check_one_voice(single, out)
    assert_same_training(single, tmp_path / "run")


@pytest.mark.slow
def test_a_run_interrupted_on_one_process_goes_on_with_three(single, tmp_path):
    where = ("--epochs", "2", "--output_dir", tmp_path)
    assert run(*NETWORK, *where, SMALL_TASK_FAIL="0:7:SIGTERM")[0] == 128 + signal.SIGTERM
    status, _, err = run(*NETWORK, *where, "--resume", "auto", *distributed(3))
    assert status == 0, err
    assert_same_training(single, tmp_path)


@pytest.mark.slow
def test_evaluation_by_two_processes_gives_the_accuracy_of_one(single):
    words = (*NETWORK, "--evaluate", "--resume", single / checkpoints.BEST)
    assert run(*words)[1] == run(*words, *distributed(2))[1]


@pytest.mark.slow
def test_processes_share_a_kernel_built_once_and_a_drawn_seed(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *store_and_recall.cpp*) echo built >> {tmp_path}/built;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "MEMORIZING_ASSOCIATIONS_CACHE": str(tmp_path / "cache")}
    words = (*NETWORK, "--backend", "cpp", "--epochs", "1", "--seed", "none", "--output_dir", tmp_path / "run")
    status, out, err = run(*words, *distributed(2), **environment)
    assert status == 0, err
    assert (tmp_path / "built").read_text() == "built\n"
    (seed,) = re.findall(r", seed (\d+),", out)
    assert checkpoints.load(tmp_path / "run" / checkpoints.LAST)["params"]["seed"] == int(seed)


# Failures of a process


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("1:7:SIGKILL", r"rank 1 \(process 1 terminated with signal SIGKILL, id \d+ on \S+\)"),
        pytest.param("1:7:SIGSTOP", "no answer from another process", marks=pytest.mark.slow),
        pytest.param("1:7:bug", "rank 1 failed: ZeroDivisionError: a bug", marks=pytest.mark.slow),
        pytest.param("0:7:user", "rank 0: the disk is full", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_ends_all_and_the_last_checkpoint_goes_on(tmp_path, failure, message):
    words = (*NETWORK, "--output_dir", tmp_path, "--epochs", "2")
    status, _, err = run(*words, *distributed(2), "--dist_timeout", "5", SMALL_TASK_FAIL=failure)
    remedy = re.escape(f"; the same command with --output_dir {tmp_path} --resume auto resumes from the last checkpoint")
    assert status == 1
    assert re.fullmatch(f"error: {message}{'' if 'user' in failure else remedy}", err.splitlines()[-1])
    assert err.count("Traceback") == ("bug" in failure)
    assert len(err.splitlines()) < (20 if "bug" in failure else 4)  # PyTorch tells which process it ends.
    assert checkpoints.load(tmp_path / checkpoints.LAST)["epoch"] == 1


@pytest.mark.slow
def test_a_death_ends_every_node(tmp_path):
    where = ("--world_size", "2", *GLOO, "--dist_url", f"tcp://127.0.0.1:{free_port()}", "--output_dir", tmp_path)
    nodes = [
        Started(*NETWORK, "--epochs", "2", *where, "--rank", str(rank), SMALL_TASK_FAIL="1:3:SIGKILL") for rank in range(2)
    ]
    messages = (
        "no answer from another process; the same command .* --resume auto resumes from the last checkpoint",
        r"rank 1 \(process 0 terminated with signal SIGKILL, id \d+ on \S+\)",
    )
    for node, message in zip(nodes, messages, strict=True):
        status, _, err = node.end()
        assert status == 1
        assert re.fullmatch(f"error: {message}\n", err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_all", "prefix"),
    [(signal.SIGHUP, False, ()), (signal.SIGTERM, True, ()), (signal.SIGTERM, False, TORCHRUN), (signal.SIGKILL, False, ())],
)
def test_a_signal_reaches_all_saves_once_and_leaves_no_process(tmp_path, number, to_all, prefix):
    (trace := tmp_path / "trace").mkdir()
    words = (*NETWORK, "--output_dir", tmp_path / "run", "--epochs", "1000")
    started = Started(*words, *(GLOO if prefix else distributed(2)), prefix=prefix, SMALL_TASK_TRACE=str(trace))
    wait_for_training(trace, 2)
    (os.killpg if to_all else os.kill)(started.process.pid, number)
    status, out, err = started.end()
    if number == signal.SIGKILL:
        assert status == -number
        return
    assert status == 128 + number or (prefix and status)  # torchrun's own
    assert out.count("interrupted") == 1 and (prefix or err == "")
    assert checkpoints.load(tmp_path / "run" / checkpoints.LAST)["epoch"] < 1000


def test_interruption_heeds_all_signals_but_those_that_were_ignored():
    """As `nohup` does, which the program must not undo."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.status == 128 + number
        previous = signal.signal(number, signal.SIG_IGN)
        with Interruption() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.status == 0
        signal.signal(number, previous)


def test_ctrl_c_outside_a_training_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.socket, "getaddrinfo", interrupted)
    assert task.main(["--world_size", "2", "--rank", "1", "--dist_backend", "gloo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.slow
def test_windows_is_told_in_one_line():
    """Without the modules and signals that Windows lacks, so that no import of them comes first."""
    program = (
        "import signal, sys, torch._dynamo; sys.platform = 'win32'; sys.modules['fcntl'] = None; "
        "del signal.SIGUSR1, signal.SIGHUP; import memorizing_associations_task"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "WSL2" in done.stderr


# Nodes that do not find together


def options(*words):
    parser = Parser("")
    task.add_options(parser)
    return parser.complete(parser.given(words))


def ranks(*words):
    return launch.find_ranks(options(*words))


ENVIRONMENT = {"MASTER_ADDR": "::1", "MASTER_PORT": "29", "WORLD_SIZE": "4", "RANK": "3"}
TORCHRUN_ENVIRONMENT = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "GROUP_RANK": "1"}


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ("--world_size 2", {}, "--rank -1: must be the number of this node, from 0, and below --world_size 2"),
        ("--world_size 2 --rank 2", {}, "--rank 2: must be the number of this node, from 0, and below --world_size 2"),
        ("--rank 1", {}, "--rank 1: must be the number of this node, from 0, and below --world_size 1"),
        ("--world_size 0 --multiprocessing_distributed", {}, "--world_size 0: must be the number of nodes, at least 1"),
        ("--world_size 2 --rank 0 --dist_url 127.0.0.1:1", {}, "--dist_url 127.0.0.1:1: must be tcp://HOST:PORT"),
        ("--world_size 2 --rank 0 --dist_url tcp://host:99999", {}, "--dist_url tcp://host:99999: must be tcp://HOST:PORT"),
        ("--processes_per_node 2 --gpu 0", {}, "--gpu and --device cuda:N name one GPU, but there are 2 processes"),
        ("--dist_url env://", {}, "environment variable WORLD_SIZE is '': set it, or give --world_size"),
        ("--dist_url env://", ENVIRONMENT | {"WORLD_SIZE": ""}, "environment variable WORLD_SIZE is '': set it"),
        (
            "--dist_url env://",
            ENVIRONMENT | {"MASTER_PORT": "tcp://10.0.0.1:29"},
            "environment variable MASTER_PORT is 'tcp://10.0.0.1:29': set it",
        ),
        ("--dist_url env://", ENVIRONMENT | {"MASTER_ADDR": ""}, "environment variable MASTER_ADDR is ''"),
        ("", ENVIRONMENT | {"TORCHELASTIC_RUN_ID": "x"}, "environment variable GROUP_RANK is ''"),
    ],
)
def test_ranks_that_cannot_be_are_a_usage_error(words, environment, message, capsys, monkeypatch):
    for name in ENVIRONMENT.keys() | TORCHRUN_ENVIRONMENT.keys():
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert task.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_nodes_are_counted_as_published(monkeypatch):
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


def join(*words: str) -> str:
    """What a process says that does not meet the others."""
    given = options("--dist_backend", "gloo", "--dist_timeout", "1", *words)
    with pytest.raises(UserError) as refused:
        launch._join(launch.find_ranks(given), 0, given)
    return str(refused.value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_node_that_never_comes(rank):
    url = f"tcp://127.0.0.1:{free_port()}"
    assert join("--world_size", "2", "--rank", rank, "--dist_url", url).startswith(f"not all nodes met at {url} within 1 s")


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        said = join("--world_size", "2", "--rank", "0", "--dist_url", url)
    assert said.startswith(f"the port of --dist_url {url} cannot be used here")


@pytest.mark.slow
def test_what_listens_and_does_not_answer_is_waited_for_a_while(tmp_path):
    """As the other node of a port in use does; PyTorch waits without an end."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        words = ["--world_size", "2", "--rank", "1", *GLOO, "--dist_timeout", "2", "--dist_url", url]
        status, _, err = run(*words, "--output_dir", tmp_path)
    assert status == 1 and len(err.splitlines()) == 1
    assert err.startswith(f"error: rank 1: not all nodes met at {url} within 2 s")


def test_two_nodes_train_as_one_process_does_with_the_options_of_rank_0(single, tmp_path):
    """--batch_size counts for a node: two nodes with 31 each make up a batch of 62."""
    where = ("--world_size", "2", *GLOO, "--dist_url", f"tcp://127.0.0.1:{free_port()}")
    words = (*NETWORK, "--epochs", "2", "--batch_size", "31", "--output_dir", tmp_path / "first")
    first = Started(*words, *where, "--rank", "0", OMP_NUM_THREADS="1")
    second = Started(*where, "--rank", "1", "--output_dir", tmp_path / "second", OMP_NUM_THREADS="1")
    assert (second.end(), first.end()[0]) == ((0, "", ""), 0)
    assert_same_training(single, tmp_path / "first")
    assert not (tmp_path / "second").exists(), "only rank 0 writes"


def test_nodes_with_another_program_are_refused(monkeypatch, capsys):
    software = launch._software()

    def gather(found, own):
        found[:] = [f"{software} on node 0", own]

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(launch, "_join", lambda *_: None)
    monkeypatch.setattr(launch.dist, "all_gather_object", gather)
    monkeypatch.setattr(launch.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(launch.os, "_exit", leave)
    monkeypatch.setattr(launch.distributed, "broadcast_object", lambda value: (*value[:2], software))
    ranks = launch.Ranks("tcp://host:29", 1, 2, 1)
    with pytest.raises(SystemExit, match="7"):
        launch._work(0, lambda *_: 7, ranks, None, (), "")
    monkeypatch.setattr(launch, "commit", lambda: "another")
    with pytest.raises(SystemExit, match="1"):
        launch._work(0, lambda *_: 7, ranks, None, (), "")
    expected = f"error: rank 1: {software} on node 0, commit another and PyTorch {torch.__version__} on node 1; all nodes need"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--multiprocessing_distributed", "--dist_backend nccl: no GPU for it here; on CPUs: --dist_backend gloo"),
        ("--world_size 2 --rank 1 --dist_backend gloo --dist_url tcp://nowhere.invalid:29",
         "--dist_url: cannot resolve the host name nowhere.invalid ("),
    ],
)  # fmt: skip
def test_what_a_node_lacks_is_told_before_there_is_a_folder(words, message, capsys, tmp_path):
    if "nccl" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU for NCCL")
    assert refuse(capsys, *words.split(), "--output_dir", tmp_path / "run").startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()
