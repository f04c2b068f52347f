"""The processes of a distributed run: how they start, connect, agree and end.

Without torchrun, this program is started once on each of `--world_size` nodes and starts one process per GPU there by
`torch.multiprocessing`. torchrun starts the processes itself. All processes connect to rank 0 at `--dist_url`.
"""

import argparse
import os
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from signal import SIGINT
from typing import NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from models import BackendError, backends
from utils import distributed
from utils.errors import UsageError, UserError, prepare_output
from utils.interruption import Interruption
from utils.run import commit

_MOMENT = 2.0  # seconds that a process waits before it reports a lost process, so that the cause is reported first
_GRACE = 4.0  # seconds for the processes of a node to end by themselves after one of them failed
_TOLD, _LOST = 1, 3  # exit status of a process that has reported its error, and of one that lost another process

_NO_PORT = (
    "the port of --dist_url {url} cannot be used here (in use, or reserved); choose another port, the same on all nodes, "
    "and start --rank 0 only once (SLURM: --ntasks-per-node=1)"
)
_NOT_MET = (
    "not all nodes met at {url} within {seconds:g} s; start --rank 0 at this address, every other node with its own --rank, "
    "and all nodes with the same --dist_url, --world_size (number of nodes) and number of processes; or wait longer "
    "(--dist_timeout SECONDS); check that no firewall and no other program blocks the port; on hosts whose own name is "
    "loopback, set GLOO_SOCKET_IFNAME to the network interface"
)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a node's processes, the first of which is `node * processes`."""

    url: str  # tcp://HOST:PORT of rank 0
    node: int
    nodes: int
    processes: int  # on each node
    local_rank: int | None = None  # under torchrun: number of this process on its node

    @property
    def leads(self) -> bool:
        """Whether the checkpoint is read and rank 0 runs here."""
        return self.node == 0 and not self.local_rank

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    def rank(self, local_rank: int) -> int:
        return self.node * self.processes + local_rank


def find_ranks(args: argparse.Namespace) -> Ranks | None:
    """This node's ranks from the options or the environment (env://, torchrun). None: one process trains alone.

    Raises:
        UsageError: the options or the environment are wrong.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
        node, size, processes, local_rank = (int(_variable(name)) for name in names)
        if size % processes:
            raise UsageError(f"torchrun: {size} processes do not divide into nodes of {processes}; start equally many on each")
        return Ranks(_url_of_environment(), node, size // processes, processes, local_rank)

    url, nodes, node = args.dist_url, args.world_size, args.rank
    if url == "env://":
        nodes = int(_variable("WORLD_SIZE")) if nodes == -1 else nodes
        node = int(_variable("RANK")) if node == -1 else node
        url = _url_of_environment()
    nodes = 1 if nodes == -1 else nodes
    node = 0 if node == -1 and nodes == 1 else node
    if nodes < 1:
        raise UsageError(f"--world_size {nodes}: must be the number of nodes, at least 1")
    if not 0 <= node < nodes:
        raise UsageError(f"--rank {node}: must be the number of this node, from 0, and below --world_size {nodes}")
    several = args.multiprocessing_distributed or args.processes_per_node
    if nodes == 1 and args.dist_url != "env://" and not several:
        return None
    processes = args.processes_per_node or 1
    if args.multiprocessing_distributed and not args.processes_per_node and args.device != "cpu":
        processes = max(torch.cuda.device_count(), 1)
    if processes > 1 and (args.gpu is not None or args.device.startswith("cuda:")):
        raise UsageError(f"--gpu and --device cuda:N name one GPU, but there are {processes} processes; leave them out")
    with suppress(ValueError):  # a port out of range
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return Ranks(url, node, nodes, processes)
    raise UsageError(f"--dist_url {url}: must be tcp://HOST:PORT, the same on all nodes, or env://")


def _url_of_environment() -> str:
    host = _variable("MASTER_ADDR", ".+").strip("[]")  # an IPv6 address may stand in brackets
    return f"tcp://[{host}]:{_variable('MASTER_PORT')}" if ":" in host else f"tcp://{host}:{_variable('MASTER_PORT')}"


def _variable(name: str, pattern: str = r"\d+") -> str:
    text = os.environ.get(name, "")
    if not re.fullmatch(pattern, text):
        remedy = "set it, or give --world_size, --rank and --dist_url tcp://HOST:PORT"
        raise UsageError(f"environment variable {name} is {text!r}: {remedy}")
    return text


def check(ranks: Ranks | None, args: argparse.Namespace) -> None:
    """Raises UserError if this node cannot take part."""
    if ranks is None:
        return
    gpus = _gpus(args)
    if args.dist_backend == "nccl" and not (gpus and dist.is_nccl_available()):
        raise UserError("--dist_backend nccl: no usable GPU here; for CPUs: --dist_backend gloo --processes_per_node N")
    if args.dist_backend == "mpi" and not dist.is_mpi_available():
        raise UserError("--dist_backend mpi: this PyTorch is built without MPI; use gloo (CPUs) or nccl (GPUs)")
    if gpus and ranks.processes > gpus:
        raise UserError(f"--processes_per_node {ranks.processes}: there are {gpus} GPUs, one per process; or use --device cpu")
    try:
        socket.getaddrinfo(urlsplit(ranks.url).hostname, None)
    except (OSError, UnicodeError) as failure:
        own = "use a name that all nodes know, or the address of the node of --rank 0"
        raise UserError(f"--dist_url: cannot resolve the host name {urlsplit(ranks.url).hostname} ({failure}); {own}") from None


def _gpus(args: argparse.Namespace) -> int:
    return torch.cuda.device_count() if args.device != "cpu" else 0


def run(job: Callable[..., int], ranks: Ranks | None, args: argparse.Namespace, *others, remedy: str = "") -> int:
    """Run `job(args, *others)` in every process of a process group, with rank 0's `args` and `others`.

    Args:
        remedy: printed if a process died.

    Returns:
        The exit status. If a process failed, a line on stderr says so.
    """
    if ranks is None:
        return job(args, *others)
    if ranks.local_rank is not None:
        _work(ranks.local_rank, job, ranks, args, others, remedy)
    for kernel in backends.KERNELS:
        if args.backend in ("auto", kernel):
            with suppress(BackendError):  # each process raises it again
                backends.load(kernel, "cuda" if _gpus(args) else "cpu")  # compile once, before the processes start
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # PyTorch logs a lost connection with a stack of C++ calls
    with Interruption() as interruption:
        children, passed_on = mp.spawn(_work, (job, ranks, args, others, remedy), ranks.processes, join=False), False
        try:
            while not children.join(timeout=0.2, grace_period=_GRACE):
                if interruption.signal and not passed_on:
                    passed_on = True
                    for process in children.processes:
                        process.terminate()
            return 0
        except mp.ProcessExitedException as exited:
            dead = exited
    if interruption.signal or dead.exit_code > 128:  # the processes saved
        return interruption.status or dead.exit_code
    if dead.exit_code == _LOST:
        print(f"error: no answer from another process{remedy}", file=sys.stderr, flush=True)
    elif dead.exit_code != _TOLD:
        rank, host = ranks.rank(dead.error_index), socket.gethostname()
        print(f"error: rank {rank} ({dead}, id {dead.error_pid} on {host}){remedy}", file=sys.stderr, flush=True)
    return 1


def _work(local_rank: int, job: Callable[..., int], ranks: Ranks, args, others: tuple, remedy: str) -> NoReturn:
    """A process joins the others, runs the job with rank 0's arguments and reports an error.

    It ends by `os._exit`: a broken process group may never shut down, and PyTorch's threads may abort as the interpreter ends.
    """
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore, which a killed process leaves behind
    rank, status = ranks.rank(local_rank), _TOLD
    try:
        _join(ranks, local_rank, args)
        args, others, software = distributed.broadcast_object((args, others, _software()))
        found: list[str] = [""] * ranks.world_size
        dist.all_gather_object(found, f"{_software()} on node {ranks.node}")
        if wrong := [ours for ours in found if not ours.startswith(f"{software} on ")]:
            raise UserError(f"{software} on node 0, {wrong[0]}; all nodes need the same")
        status = job(args, *others)
        dist.destroy_process_group()
    except KeyboardInterrupt:
        status = 128 + SIGINT
    except (UserError, BackendError) as error:
        print(f"error: rank {rank}: {error}", file=sys.stderr)
    except Exception as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            time.sleep(_MOMENT)
            status = _LOST
            if ranks.local_rank is not None:
                print(f"error: rank {rank}: no answer from another process{remedy}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"error: rank {rank} failed: {type(error).__name__}: {error}{remedy}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _software() -> str:
    return f"commit {commit()} and PyTorch {torch.__version__}"


def _join(ranks: Ranks, local_rank: int, args: argparse.Namespace) -> None:
    """Connect to the other processes.

    Raises:
        UserError: not all processes connect in time.
    """
    threads = torch.get_num_threads()
    if ranks.local_rank is None:
        threads //= ranks.processes
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun sets 1 unless the user set a number
        threads = len(os.sched_getaffinity(0)) // ranks.processes
    torch.set_num_threads(max(threads, 1))
    prepare_output()
    if ranks.rank(local_rank):
        warnings.simplefilter("ignore")  # rank 0 warns
    if args.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local_rank if ranks.processes > 1 else args.gpu or 0)
    backend = "cpu:gloo,cuda:nccl" if args.dist_backend == "nccl" else args.dist_backend
    not_met = _NOT_MET.format(url=ranks.url, seconds=args.dist_timeout)

    def give_up() -> None:  # PyTorch waits forever if another program listens at this address
        print(f"error: rank {ranks.rank(local_rank)}: {not_met}", file=sys.stderr, flush=True)
        os._exit(_TOLD)

    watch = threading.Timer(args.dist_timeout + 2, give_up)
    watch.daemon = True
    watch.start()
    try:
        limit = timedelta(seconds=args.dist_timeout)
        dist.init_process_group(backend, ranks.url, limit, ranks.world_size, ranks.rank(local_rank))
    except RuntimeError as failure:
        if re.search("EADDRINUSE|EACCES", str(failure)):
            raise UserError(_NO_PORT.format(url=ranks.url)) from failure
        if re.search("(?i)timed? ?out|failed to connect|gloo", str(failure)):
            raise UserError(not_met) from failure
        raise
    finally:
        watch.cancel()
