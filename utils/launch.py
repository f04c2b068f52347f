"""The processes of a distributed training: how they start, and end together when one of them fails.

Once the nodes have met (rendezvous.py) each starts its processes, one per GPU; under torchrun they are there already.
"""

import logging
import os
import shlex
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from signal import SIG_IGN, SIGABRT, SIGINT, SIGKILL, SIGTERM, signal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from models import BackendError, backends
from utils import distributed
from utils.errors import UserError, outlive_output, warn_in_one_line
from utils.interruption import SIGNALS, Interruption
from utils.options import Options
from utils.rendezvous import Meeting, Ranks, card, difference, open_store

Job = Callable[..., int]

# What each process keeps for itself; all other options are those of the first node.
_OWN_OPTIONS = ("rank", "gpu", "device")
_MOMENT = 2.0  # seconds that a process which lost another one waits before it ends, so that the cause is seen first
_GRACE = 4.0  # seconds for the processes of a node to end by themselves after one of them failed


def run(job: Job, ranks: Ranks | None, options: Options, *args) -> int:
    """Run `job(options, *args)` in every process, with a process group around it.

    Options and `args` are the first node's everywhere. Returns the exit status, after a line on stderr where a process failed.

    Raises:
        UserError, BackendError: this node cannot take part.
    """
    if ranks is None:
        return job(options, *args)
    _check_devices(ranks, options)
    options.values["world_size"] = ranks.nodes
    if ranks.local_rank is not None:
        ending = _work(job, ranks, ranks.local_rank, options, args)
        _leave(ending.status if not ending.failed else _report(ending.cause or _lost([], options), ending.details))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the processes warn
        backends.build(options["backend"], "cuda" if _uses_gpus(options) else "cpu")
    return _run_children(job, Meeting(ranks, options), options, args)


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


@dataclass(frozen=True)
class Ending:
    """How the work of a process ended."""

    status: int
    failed: bool = False
    cause: str = ""  # of a failure: what happened in this process; empty where another one is the reason
    details: str = ""  # the traceback of an unforeseen failure


def _work(job: Job, ranks: Ranks, local_rank: int, options: Options, args: tuple) -> Ending:
    """What each process does: join the others, run the job."""
    rank = ranks.rank(local_rank)
    try:
        _join(ranks, local_rank, options)
        values, args = distributed.broadcast_object((options.values, args))
        options.values = values | {name: options[name] for name in _OWN_OPTIONS}
        status = job(options, *args)
        dist.destroy_process_group()
        return Ending(status)
    except KeyboardInterrupt:
        return Ending(128 + SIGINT)
    except (UserError, BackendError) as error:
        return Ending(1, True, f"rank {rank}: {error}")
    except Exception as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            time.sleep(_MOMENT)
            return Ending(1, True)
        cause = f"rank {rank} failed: {type(error).__name__}: {str(error).strip()}".splitlines()[0]
        return Ending(1, True, cause + _remedy(options), traceback.format_exc()[-8000:])


def _join(ranks: Ranks, local_rank: int, options: Options) -> None:
    _divide_threads(ranks)
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
    if ranks.local_rank is None:
        store = dist.PrefixStore("group", open_store(ranks, options["dist_timeout"]))
        dist.init_process_group(backend, None, limit, ranks.world_size, ranks.rank(local_rank), store)
    else:
        dist.init_process_group(backend, timeout=limit)
        cards: list = [None] * ranks.world_size
        dist.all_gather_object(cards, card(ranks, options))
        if refusal := difference(dict(enumerate(cards[:: ranks.processes]))):
            raise UserError(refusal)


def _divide_threads(ranks: Ranks) -> None:
    threads = torch.get_num_threads()
    if ranks.local_rank is not None and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own, unless it was set
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    elif ranks.local_rank is not None:
        threads *= ranks.processes
    torch.set_num_threads(max(threads // ranks.processes, 1))


def _run_children(job: Job, meeting: Meeting, options: Options, args: tuple) -> int:
    """Start this node's processes and wait until they end."""
    ranks = meeting.ranks
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # PyTorch logs a lost connection with a stack of C++ calls
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)  # it tells which processes it ends
    readers, writers = zip(*(mp.get_context("spawn").Pipe(duplex=False) for _ in range(ranks.processes)), strict=True)
    with Interruption() as interruption:
        # A terminal and a batch system send signals to all; the processes ignore them, and this one passes them on as SIGTERM.
        handlers = {number: signal(number, SIG_IGN) for number in SIGNALS if number != SIGTERM}
        children = mp.spawn(_child, (job, ranks, options, args, writers), ranks.processes, join=False)
        for number, handler in handlers.items():
            signal(number, handler)
        dead, passed_on = None, False
        try:
            while not children.join(timeout=0.2, grace_period=_GRACE):
                if interruption.signal and not passed_on:
                    passed_on = True
                    for process in children.processes:
                        process.terminate()
        except mp.ProcessExitedException as exited:
            dead = exited
    endings = {n: reader.recv() for n, reader in enumerate(readers) if reader.poll()}
    if dead is None or (interruption.signal and not any(ending.cause for ending in endings.values())):
        status = max((ending.status for ending in endings.values()), default=1)
        return interruption.status if status and interruption.signal else status
    first = endings.get(dead.error_index)
    if first is None and not (options["dist_backend"] == "nccl" and dead.exit_code == -SIGABRT):  # so NCCL gives up
        how = f"was killed by {dead.signal_name}" if dead.signal_name else f"ended with status {dead.exit_code}"
        where = f"rank {ranks.rank(dead.error_index)} (process {dead.error_pid} on {socket.gethostname()})"
        first = Ending(1, True, f"{where} {how}{_remedy(options)}")
    first = next((ending for ending in (first, *endings.values()) if ending and ending.cause), Ending(1, True))
    cause, silent = meeting.find_cause(first.cause)
    silent = silent or [f"rank {ranks.rank(n)}" for n, child in enumerate(children.processes) if child.exitcode == -SIGKILL]
    return _report(cause or _lost(silent, options), first.details)


def _child(local_rank: int, job: Job, ranks: Ranks, options: Options, args: tuple, writers) -> None:
    mp._prctl_pr_set_pdeathsig(SIGKILL)  # it does not outlive its parent (on Linux; no effect elsewhere)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a process that is killed leaves behind
    ending = _work(job, ranks, local_rank, options, args)
    writers[local_rank].send(ending)
    _leave(1 if ending.failed else 0)


def _leave(status: int) -> None:
    """End this process at once: a broken process group may not come to its end, and PyTorch's threads may abort in that of the
    interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _report(message: str, details: str) -> int:
    sys.stdout.flush()
    print(details, f"error: {message}", sep="", file=sys.stderr, flush=True)
    return 1


def _lost(silent: list[str], options: Options) -> str:
    who = f"no answer from {' and '.join(silent)}" if silent else "the connection to another process is lost"
    return who + _remedy(options)


def _remedy(options: Options) -> str:
    if options["evaluate"]:
        return ""
    folder = shlex.quote(str(options["output_dir"]))
    return f"; the same command with --output_dir {folder} --resume auto resumes from the last checkpoint"
