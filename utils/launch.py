"""The processes of a distributed training: their ranks, how they start and meet, and how all end when one of them fails.

Without torchrun, this program is started once on each of `--world_size` nodes and starts one process per GPU there; torchrun
starts the processes itself. All meet at a key-value store of rank 0, at the address of `--dist_url`.
"""

import fcntl
import functools
import hashlib
import logging
import os
import re
import shlex
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
from pathlib import Path
from signal import SIG_IGN, SIGABRT, SIGINT, SIGKILL, SIGTERM, signal
from typing import NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from models import BackendError, backends
from utils import distributed
from utils.errors import UsageError, UserError, outlive_output, warn_in_one_line
from utils.interruption import SIGNALS, Interruption
from utils.options import CURRICULUM, DATA, MODEL, TRAINING, Options

_OWN_OPTIONS = ("rank", "gpu", "device")  # each process keeps its own; all other options are those of rank 0
_MOMENT = 2.0  # seconds that a process which lost another one waits before it ends, so that the cause is seen first
_NO_ANSWER = "error: no answer from"
_GRACE = 4.0  # seconds for the processes of a node to end by themselves after one of them failed

# Why processes do not meet: what PyTorch raises, and what it means.
_MEETING_ERRORS = {
    "EADDRINUSE|EACCES": "the port of --dist_url {url} cannot be used here (in use, or reserved); choose another one, the same "
    "on all nodes, and start one --rank 0 only (SLURM: --ntasks-per-node=1)",
    "(?i)timed out.* connect": "nobody answered at {url} within {timeout:g} s; start the node of --rank 0 there, with the same "
    "--dist_url, and see that no firewall is between",
    "(?i)timed? ?out": "not all nodes came to {url} within {timeout:g} s; start every node with the same --dist_url, "
    "--world_size (number of nodes) and number of processes, each with its own --rank, or wait longer: --dist_timeout SECONDS",
}


@dataclass(frozen=True)
class Ranks:
    """The ranks of a node's processes: `processes` of them, from `node * processes` on."""

    url: str  # tcp://HOST:PORT of rank 0
    node: int
    nodes: int
    processes: int  # on each node
    local_rank: int | None = None  # under torchrun: number of this process on its node

    @property
    def leads(self) -> bool:
        """Whether the checkpoint is read here, and rank 0 runs."""
        return self.node == 0 and not self.local_rank

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    def rank(self, local_rank: int) -> int:
        return self.node * self.processes + local_rank


def find_ranks(options: Options) -> Ranks | None:
    """This node's ranks by the options, or by the environment (env://, torchrun). None: one process trains alone.

    Raises:
        UsageError: they give none.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
        node, size, processes, local_rank = (int(_variable(name)) for name in names)
        if size % processes:
            raise UsageError(f"torchrun: {size} processes do not divide into nodes of {processes}; start as many on each node")
        return Ranks(_url_of_environment(), node, size // processes, processes, local_rank)

    url, nodes, node = options["dist_url"], options["world_size"], options["rank"]
    if url == "env://":
        nodes = int(_variable("WORLD_SIZE")) if nodes == -1 else nodes
        node = int(_variable("RANK")) if node == -1 else node
        url = _url_of_environment()
    nodes = 1 if nodes == -1 else nodes
    node = 0 if node == -1 and nodes == 1 else node
    if nodes < 1:
        raise UsageError(f"--world_size {nodes}: must be the number of nodes, at least 1")
    if not 0 <= node < nodes:
        raise UsageError(f"--rank {node}: must be the number of this node, from 0, and below --world_size {nodes}, the nodes")
    several = options["multiprocessing_distributed"] or options["processes_per_node"]
    if nodes == 1 and options["dist_url"] != "env://" and not several:
        return None
    processes = options["processes_per_node"] or 1
    if options["multiprocessing_distributed"] and not options["processes_per_node"] and options["device"] != "cpu":
        processes = max(torch.cuda.device_count(), 1)
    if processes > 1 and (options["gpu"] is not None or options["device"].startswith("cuda:")):
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


def run(job: Callable[..., int], ranks: Ranks | None, options: Options, *args) -> int:
    """Run `job(options, *args)` in every process, with a process group around it.

    Options and `args` are rank 0's everywhere. Returns the exit status, after a line on stderr where a process failed.

    Raises:
        UserError, BackendError: this node cannot take part.
    """
    if ranks is None:
        return job(options, *args)
    _check_devices(ranks, options)
    _choose_interface(ranks)
    options.values["world_size"] = ranks.nodes
    if ranks.local_rank is not None:
        _child(ranks.local_rank, job, ranks, options, args, functools.partial(print, file=sys.stderr))
    for kernel in backends.KERNELS:
        if options["backend"] in ("auto", kernel):
            with suppress(BackendError):  # which each process raises, too
                backends.load(kernel, "cuda" if _uses_gpus(options) else "cpu")  # compiled once, before there are processes
    return _run_children(job, ranks, options, args)


def _uses_gpus(options: Options) -> bool:
    return options["device"] != "cpu" and torch.cuda.is_available()


def _check_devices(ranks: Ranks, options: Options) -> None:
    backend, gpus = options["dist_backend"], torch.cuda.device_count() if _uses_gpus(options) else 0
    if backend == "nccl" and not (gpus and dist.is_nccl_available()):
        raise UserError("--dist_backend nccl: no GPU for it here; on CPUs: --dist_backend gloo --processes_per_node N")
    if backend == "mpi" and not dist.is_mpi_available():
        raise UserError("--dist_backend mpi: this PyTorch is built without MPI; use gloo (CPUs) or nccl (GPUs)")
    if gpus and ranks.processes > gpus:
        raise UserError(f"--processes_per_node {ranks.processes}: only {gpus} GPUs here, one per process; or use --device cpu")


def _choose_interface(ranks: Ranks) -> None:
    """Have gloo use the network interface that leads to rank 0 (IPv4, on Linux). It would take that of this host's own name,
    which may stand for loopback."""
    host = urlsplit(ranks.url).hostname
    try:
        family, *_, address = min(socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM))  # IPv4 before IPv6
    except (OSError, UnicodeError) as failure:
        remedy = "use a name that all nodes know, or the address of the node of --rank 0"
        raise UserError(f"--dist_url: cannot resolve the host name {host} ({failure}); {remedy}") from None
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if ranks.nodes > 1 and address[0].startswith("127."):
        address = ("192.0.2.1", 9)  # any address elsewhere: other nodes cannot reach loopback
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address; 0x8915: SIOCGIFADDR
                own = fcntl.ioctl(probe, 0x8915, name.encode().ljust(256, b"\0"))[20:24]
                if socket.inet_ntoa(own) == probe.getsockname()[0]:
                    os.environ["GLOO_SOCKET_IFNAME"] = name


def _run_children(job: Callable[..., int], ranks: Ranks, options: Options, args: tuple) -> int:
    """Start this node's processes and wait until they end."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # PyTorch logs a lost connection with a stack of C++ calls
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)  # it reports which processes it ends
    reader, writer = mp.get_context("spawn").Pipe(duplex=False)  # the first to fail is the first to write
    with Interruption() as interruption:
        # A terminal and a batch system send signals to all; the processes ignore them, and this one passes them on as SIGTERM.
        handlers = {number: signal(number, SIG_IGN) for number in SIGNALS if number != SIGTERM}
        children = mp.spawn(_child, (job, ranks, options, args, writer.send), ranks.processes, join=False)
        for number, handler in handlers.items():
            signal(number, handler)
        passed_on = False
        try:
            while not children.join(timeout=0.2, grace_period=_GRACE):
                if interruption.signal and not passed_on:
                    passed_on = True
                    for process in children.processes:
                        process.terminate()
            return 0
        except mp.ProcessExitedException as exited:
            dead = exited
    if dead.exit_code > 128 or (interruption.signal and dead.exit_code == -SIGTERM):  # by a signal, after it saved or before
        return interruption.status or dead.exit_code
    stuck = [rank for rank, process in enumerate(children.processes) if process.exitcode == -SIGKILL]
    if dead.exit_code == 1 and reader.poll():
        message = reader.recv()
        if stuck and message.startswith(_NO_ANSWER):  # the others knew no better
            message = f"{_NO_ANSWER} rank {ranks.rank(stuck[0])}{_remedy(options)}"
    elif options["dist_backend"] == "nccl" and dead.exit_code == -SIGABRT:  # so NCCL gives up
        message = f"{_NO_ANSWER} another process{_remedy(options)}"
    else:
        how = f"was killed by {dead.signal_name}" if dead.signal_name else f"ended with status {dead.exit_code}"
        process = f"rank {ranks.rank(dead.error_index)} (process {dead.error_pid} on {socket.gethostname()})"
        message = f"error: {process} {how}{_remedy(options)}"
    print(message, file=sys.stderr, flush=True)
    return 1


def _child(local_rank: int, job: Callable[..., int], ranks: Ranks, options: Options, args: tuple, tell: Callable) -> NoReturn:
    """What each process does: join the others, run the job, tell what failed.

    It ends at once: a broken process group may not come to its end, and PyTorch's threads may abort in that of the interpreter.
    """
    mp._prctl_pr_set_pdeathsig(SIGKILL)  # it does not outlive its parent (on Linux; no effect elsewhere)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is killed leaves behind
    rank, status, others = ranks.rank(local_rank), 1, []
    try:
        _join(ranks, local_rank, options)
        args, others = _agree(ranks, options, args)
        status = job(options, *args)
        dist.destroy_process_group()
    except KeyboardInterrupt:
        status = 128 + SIGINT
    except (UserError, BackendError) as error:
        tell(f"error: rank {rank}: {error}")
    except Exception as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            time.sleep(_MOMENT)
            who = others[0] if len(others) == 1 else "another process"  # PyTorch does not name it
            tell(f"{_NO_ANSWER} {who}{_remedy(options)}")
        else:
            cause = f"rank {rank} failed: {type(error).__name__}: {str(error).strip()}".splitlines()[0]
            tell(f"{traceback.format_exc()[-3000:]}error: {cause}{_remedy(options)}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _join(ranks: Ranks, local_rank: int, options: Options) -> None:
    """Meet the other processes."""
    threads = torch.get_num_threads()
    if ranks.local_rank is None:
        threads //= ranks.processes
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own, unless it was set
        threads = len(os.sched_getaffinity(0)) // ranks.processes
    torch.set_num_threads(max(threads, 1))
    warn_in_one_line()
    outlive_output()
    if ranks.rank(local_rank):
        warnings.simplefilter("ignore")  # rank 0 warns
    if _uses_gpus(options):
        if ranks.processes > 1:
            options.values["gpu"] = local_rank
        torch.cuda.set_device(options["gpu"] or 0)
    backend = "cpu:gloo,cuda:nccl" if options["dist_backend"] == "nccl" else options["dist_backend"]
    limit = timedelta(seconds=options["dist_timeout"])
    try:
        dist.init_process_group(backend, ranks.url, limit, ranks.world_size, ranks.rank(local_rank))
    except RuntimeError as failure:
        for words, message in _MEETING_ERRORS.items():
            if re.search(words, str(failure)):
                raise UserError(message.format(url=ranks.url, timeout=options["dist_timeout"])) from failure
        raise


def _agree(ranks: Ranks, options: Options, args: tuple) -> tuple[tuple, list[str]]:
    """Take the options and `args` of rank 0. Returns `args`, and what the other nodes are called.

    Raises:
        UserError: on every process, where a node differs from node 0 in what must be the same.
    """
    values, args, theirs = distributed.broadcast_object((options.values, args, _software()))
    theirs |= {f"--{name}": value for name, value in values.items()}
    given = [option.name for option in (*MODEL, *DATA, *TRAINING, *CURRICULUM) if option.name in options.given]
    ours = _software() | {f"--{name}": options[name] for name in given}
    differing = [
        f"{what} is {theirs.get(what)} on node 0 and {value} on node {ranks.node}; all nodes need the same"
        for what, value in ours.items()
        if value != theirs.get(what)
    ]
    first, last = ranks.rank(0), ranks.rank(ranks.processes - 1)
    own_ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    found = [("", [])] * ranks.world_size
    dist.all_gather_object(found, (f"node {ranks.node} ({own_ranks}, host {socket.gethostname()})", differing))
    for _, differences in found:
        if differences:
            raise UserError(differences[0])
    options.values = values | {name: options[name] for name in _OWN_OPTIONS}
    return args, [name for node, (name, _) in enumerate(found[:: ranks.processes]) if node != ranks.node]


def _software() -> dict[str, str]:
    """The versions of PyTorch and of this program."""
    root = Path(__file__).parents[1]
    inside = [path for folder in ("data", "models", "utils") for path in (root / folder).rglob("*")]
    program = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *(path for path in inside if path.suffix in (".py", ".cpp", ".h"))]):
        program.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return {"PyTorch": torch.__version__, "this program (digest of its sources)": program.hexdigest()[:12]}


def _remedy(options: Options) -> str:
    if options["evaluate"]:
        return ""
    folder = shlex.quote(str(options["output_dir"]))
    return f"; the same command with --output_dir {folder} --resume auto resumes from the last checkpoint"
