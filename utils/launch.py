"""The processes of a distributed training: how they start, and end together when one of them fails.

Once the members have met (rendezvous.py) each node starts its processes, one a GPU; under torchrun they are there already.
"""

import ctypes
import math
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from signal import SIG_IGN, SIGABRT, SIGINT, SIGKILL, SIGTERM, SIGUSR1, Signals, signal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from models import BackendError, backends
from utils import distributed
from utils.errors import UserError, outlive_output, warn_in_one_line
from utils.interruption import Interruption
from utils.options import Options
from utils.rendezvous import Members, Ranks, attempt, open_store, remedy

Job = Callable[..., int]

# What each process keeps for itself; all other options are those of the first node.
_OWN_OPTIONS = ("rank", "gpu", "device")
_GRACE = 5.0  # seconds for the processes of a node to end by themselves after one of them failed


def run(job: Job, ranks: Ranks | None, options: Options, *args) -> int:
    """Run `job(options, *args)` in every process, with a process group around it.

    Options and `args` are the first node's everywhere. Returns the exit status, after a line on stderr where a process failed.

    Raises:
        UserError, BackendError: this node cannot take part.
    """
    if ranks is None:
        return job(options, *args)
    _check_devices(ranks, options)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # PyTorch logs a lost connection with a stack of C++ calls
    if ranks.spawns:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the processes warn
            backends.build(options["backend"], "cuda" if _uses_gpus(options) else "cpu")
    options.values["world_size"] = ranks.nodes
    members = Members(ranks, options)
    if ranks.spawns:
        return _run_children(job, members, options, args)
    return _run_here(job, members, options, args)


def _uses_gpus(options: Options) -> bool:
    return options["device"] != "cpu" and torch.cuda.is_available()


def _check_devices(ranks: Ranks, options: Options) -> None:
    backend, gpus = options["dist_backend"], torch.cuda.device_count() if _uses_gpus(options) else 0
    if backend == "nccl" and not (gpus and dist.is_nccl_available()):
        raise UserError("--dist_backend nccl: no GPU for it here; on CPUs: --dist_backend gloo --processes_per_node N")
    if backend == "mpi" and not dist.is_mpi_available():
        raise UserError("--dist_backend mpi: this PyTorch is built without MPI; use gloo (CPUs) or nccl (GPUs)")
    if gpus and ranks.processes > gpus:
        raise UserError(f"--processes_per_node {ranks.processes}: only {gpus} GPUs here, one a process; or use --device cpu")


# The processes


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    status: int
    failed: bool = False
    cause: str | None = None  # of a failure: what happened in this process. None where another one is the reason
    details: str = ""  # the traceback of an unforeseen one
    suspect: str = ""  # the name of a process that did not end by itself after another one failed


def _work(job: Job, ranks: Ranks, local_rank: int, options: Options, args: tuple) -> Ending:
    """What each process does: join the others, run the job."""
    rank = ranks.node * ranks.processes + local_rank if ranks.spawns else ranks.node
    try:
        _join(ranks, rank, local_rank, options)
        values, args = distributed.broadcast_object((options.values, args))
        options.values = values | {name: options[name] for name in _OWN_OPTIONS}
        status = job(options, *args)
        dist.destroy_process_group()
        return Ending(status)
    except (UserError, BackendError) as error:
        return Ending(1, True, f"rank {rank}: {error}")
    except Exception as error:
        if _lost(error):
            return Ending(1, True)
        cause = f"rank {rank} failed: {type(error).__name__}: {str(error).strip()}".splitlines()[0]
        return Ending(1, True, cause + remedy(options), traceback.format_exc())


def _join(ranks: Ranks, rank: int, local_rank: int, options: Options) -> None:
    _divide_threads(ranks)
    warn_in_one_line()
    outlive_output()
    if rank:
        warnings.simplefilter("ignore")  # rank 0 warns
    if _uses_gpus(options):
        if ranks.processes > 1:
            options.values["gpu"] = local_rank
        torch.cuda.set_device(options["gpu"] or 0)
    limit = timedelta(seconds=options["dist_timeout"])
    backend = "cpu:gloo,cuda:nccl" if options["dist_backend"] == "nccl" else options["dist_backend"]
    store = dist.PrefixStore(attempt() + "group", open_store(ranks, options["dist_timeout"]))
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks.world_size, timeout=limit)


def _divide_threads(ranks: Ranks) -> None:
    threads = torch.get_num_threads()
    if not ranks.spawns and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own, unless it was set
        threads = len(os.sched_getaffinity(0))
    elif not ranks.spawns:
        threads *= ranks.processes
    torch.set_num_threads(max(threads // ranks.processes, 1))


def _lost(error: Exception) -> bool:
    """Whether another process is the reason: its connection closed, or it did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _run_here(job: Job, members: Members, options: Options, args: tuple) -> int:
    """Under torchrun: run the job in this process."""
    ending = _work(job, members.ranks, members.ranks.local_rank, options, args)
    if not ending.failed:
        return ending.status
    message = members.settle(ending.cause, [])
    if ending.cause or members.ranks.local_rank == 0:
        _tell(ending.details, message)
    os._exit(1)  # a process group that is broken may not come to its end


def _run_children(job: Job, members: Members, options: Options, args: tuple) -> int:
    """Start this node's processes and wait until they end."""
    ranks = members.ranks
    readers, writers = zip(*(mp.get_context("spawn").Pipe(duplex=False) for _ in range(ranks.processes)), strict=True)
    # They inherit that these are ignored: a terminal and a batch system send signals to all, and this process passes them on.
    previous = {number: signal(number, SIG_IGN) for number in (SIGINT, SIGUSR1)}
    try:
        children = mp.spawn(_child, (job, ranks, options, args, writers), ranks.processes, join=False).processes
        with Interruption() as interruption:
            endings = _wait(children, readers, ranks, options, interruption)
    finally:
        for number, handler in previous.items():
            signal(number, handler)
    failed = [ending for ending in endings if ending.failed]
    if not failed or (interruption.signal and not any(ending.cause for ending in failed)):
        status = max(ending.status for ending in endings)
        return interruption.status if status and interruption.signal else status
    first = next((ending for ending in failed if ending.cause), failed[0])
    message = members.settle(first.cause, [ending.suspect for ending in failed if ending.suspect])
    _tell(first.details, message)
    return 1


def _child(local_rank: int, job: Job, ranks: Ranks, options: Options, args: tuple, writers) -> None:
    ctypes.CDLL(None).prctl(1, SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive its parent
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is killed leaves behind
    ending = _work(job, ranks, local_rank, options, args)
    writers[local_rank].send(ending)
    sys.stdout.flush()
    sys.stderr.flush()
    # A process group that is broken may not come to its end, and PyTorch's threads may abort at that of the interpreter.
    os._exit(ending.status)


def _wait(children, readers, ranks: Ranks, options: Options, interruption: Interruption) -> list[Ending]:
    """How the processes ended, in that order. Where one failed the others have a short time to end, too."""
    endings: dict[int, Ending] = {}
    stopping, limit = False, math.inf
    while len(endings) < len(children):
        living = {child.sentinel: n for n, child in enumerate(children) if n not in endings}
        for sentinel in wait(living, timeout=0.2):
            n = living.pop(sentinel)
            children[n].join()
            endings[n] = _ending(children[n], readers[n], ranks, n, options, interruption)
        if interruption.signal and not stopping:
            stopping = True
            for n in living.values():
                children[n].terminate()
        if limit == math.inf and any(ending.failed for ending in endings.values()):
            limit = time.monotonic() + _GRACE
        if time.monotonic() > limit:
            for n in living.values():
                children[n].kill()
                children[n].join()
                endings[n] = Ending(1, True, suspect=f"rank {ranks.node * ranks.processes + n}")
    return list(endings.values())


def _ending(child, reader, ranks: Ranks, local_rank: int, options: Options, interruption: Interruption) -> Ending:
    if reader.poll():
        return reader.recv()
    if child.exitcode == -SIGTERM and interruption.signal:
        return Ending(interruption.status)  # before the training began
    rank = ranks.node * ranks.processes + local_rank
    how = f"was killed by {Signals(-child.exitcode).name}" if child.exitcode < 0 else f"ended with status {child.exitcode}"
    if options["dist_backend"] == "nccl" and child.exitcode == -SIGABRT:
        return Ending(1, True)  # so NCCL ends a process when another one does not answer
    return Ending(1, True, f"rank {rank} (process {child.pid} on {socket.gethostname()}) {how}{remedy(options)}")


def _tell(details: str, message: str) -> None:
    sys.stdout.flush()
    print(details, f"error: {message}", sep="", file=sys.stderr, flush=True)
