"""Which ranks the processes of this node have, and where the nodes meet.

Without torchrun, this program is started once on each of `--world_size` nodes. They meet, before they start their processes, at
a key-value store which node 0 holds at the address of `--dist_url`. torchrun starts the processes, which meet by themselves.
"""

import hashlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from utils.errors import UsageError, UserError
from utils.options import Options

_REPORT = 8.0  # seconds for the nodes to report after a failure


@dataclass(frozen=True)
class Ranks:
    """The ranks of this node's processes: `processes` of them, from `node * processes` on."""

    host: str  # of the store
    port: int
    node: int
    nodes: int
    processes: int  # on each node
    local_rank: int | None = None  # under torchrun: number of this process on its node

    @property
    def leads(self) -> bool:
        """Whether the checkpoint is read here, and the main process runs."""
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
        remedy = "start with torchrun, or unset TORCHELASTIC_RUN_ID"
        names = ("GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
        node, size, processes, local_rank = (_number(name, remedy) for name in names)
        if not processes or size % processes:
            raise UsageError(f"torchrun: {size} processes do not divide into nodes of {processes}; start as many on each node")
        return Ranks(*_master(remedy), node, size // processes, processes, local_rank)

    url, nodes, node = options["dist_url"], options["world_size"], options["rank"]
    if not (options["multiprocessing_distributed"] or options["processes_per_node"] or nodes > 1 or url == "env://"):
        if node > 0:
            raise UsageError(f"--rank {node}: there is one node; give their number with --world_size")
        return None
    if url == "env://":
        nodes = _number("WORLD_SIZE", "set the number of nodes, or give --world_size") if nodes == -1 else nodes
        node = _number("RANK", "set the number of this node, from 0, or give --rank") if node == -1 else node
        host, port = _master("or give --dist_url tcp://HOST:PORT")
    else:
        host, port = _address(url)
    nodes = 1 if nodes == -1 else nodes
    node = 0 if node == -1 and nodes == 1 else node
    if nodes < 1:
        raise UsageError(f"--world_size {nodes}: must be the number of nodes, at least 1")
    if not 0 <= node < nodes:
        raise UsageError(f"--rank {node}: must be the number of this node, 0 to {nodes - 1} with --world_size {nodes}")
    processes = options["processes_per_node"] or 1
    if options["multiprocessing_distributed"] and not options["processes_per_node"] and options["device"] != "cpu":
        processes = max(torch.cuda.device_count(), 1)
    if processes > 1 and (options["gpu"] is not None or options["device"].startswith("cuda:")):
        raise UsageError(f"--gpu and --device cuda:N name one GPU, but there are {processes} processes; leave them out")
    return Ranks(host, port, node, nodes, processes)


def _address(url: str) -> tuple[str, int]:
    with suppress(ValueError):  # a port out of range
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    raise UsageError(f"--dist_url {url}: must be tcp://HOST:PORT, the same on all nodes, or env://")


def _master(remedy: str) -> tuple[str, int]:
    host = os.environ.get("MASTER_ADDR", "").strip("[]")  # an IPv6 address may stand in brackets
    if not host:
        raise UsageError(f"environment variable MASTER_ADDR is empty or not set: set the host of node 0, {remedy}")
    port = _number("MASTER_PORT", f"set a free port of node 0, {remedy}")
    if not 0 < port < 2**16:
        raise UsageError(f"environment variable MASTER_PORT is {port}: set a free port of node 0, 1 to 65535, {remedy}")
    return host, port


def _number(name: str, remedy: str) -> int:
    text = os.environ.get(name, "")
    if text.isdecimal():
        return int(text)
    if text.startswith("tcp://"):
        remedy += "; Kubernetes sets this for a service named master (enableServiceLinks: false)"
    raise UsageError(f"environment variable {name} is {repr(text) if text else 'empty or not set'}, not a number: {remedy}")


class Meeting:
    """All nodes, met at their common store. It lives as long as this object of node 0.

    Raises:
        UserError: one does not come, or does not belong to the others.
    """

    def __init__(self, ranks: Ranks, options: Options):
        self.ranks, self._timeout = ranks, options["dist_timeout"]
        self._deadline = time.monotonic() + self._timeout
        try:
            address = min(socket.getaddrinfo(ranks.host, ranks.port, type=socket.SOCK_STREAM))[4][0]  # IPv4 before IPv6
        except OSError as failure:
            raise UserError(
                f"--dist_url: cannot resolve the host name {ranks.host} ({failure.strerror}); use a name that all nodes know, "
                "or the address of the node of --rank 0"
            ) from None
        try:
            with _without_cpp_log():
                self._store = self._open()
                self._cards = self._exchange(card(ranks, options) | {"address": _own_address(address)})
        except dist.DistError:
            raise UserError(f"node 0 at {ranks.host}:{ranks.port} went away before all were there; see what it says") from None
        if "GLOO_SOCKET_IFNAME" not in os.environ:  # gloo would take the interface that belongs to the host's name
            addresses = [address, *(card["address"] for card in self._cards)]
            far = next((a for a in addresses if not a.startswith("127.")), address)
            if interface := _interface(_own_address(far)):
                os.environ["GLOO_SOCKET_IFNAME"] = interface

    def _open(self) -> dist.TCPStore:
        ranks, listener = self.ranks, None
        if ranks.leads:
            try:
                listener = _listen(ranks.port)
            except OSError as failure:
                raise UserError(
                    f"--dist_url: port {ranks.port} cannot be used here ({os.strerror(failure.errno)}); choose another one, "
                    "the same on all nodes, and start one --rank 0 only (SLURM: --ntasks-per-node=1)"
                ) from None
        while not _reachable(ranks):
            if time.monotonic() > self._deadline:
                raise UserError(
                    f"nobody answered at {ranks.host}:{ranks.port} within {self._timeout:g} s; start the node of --rank 0 "
                    "there, with the same --dist_url, and see that no firewall is between"
                )
            time.sleep(0.1)
        return open_store(ranks, self._timeout, listener)

    def _exchange(self, own: dict) -> list[dict]:
        """Every node's card, once all are there and agree."""
        ranks, store, cards = self.ranks, self._store, {}
        store.add(f"started {ranks.node}", 1)
        store.set(f"card {ranks.node}", json.dumps(own))
        while len(cards) < ranks.nodes:
            late = time.monotonic() > self._deadline
            for node in range(ranks.nodes):
                if store.check([f"card {node}"]):
                    cards[node] = json.loads(store.get(f"card {node}"))
            refusal = difference(cards)
            if twice := [node for node in cards if store.add(f"started {node}", 0) > 1]:
                refusal = f"--rank {twice[0]} is taken by two nodes; give every node its own, 0 to {ranks.nodes - 1}"
            elif late and len(cards) < ranks.nodes:
                missing = ", ".join(str(node) for node in range(ranks.nodes) if node not in cards)
                refusal = refusal or (
                    f"node {missing} of {ranks.nodes} did not come within {self._timeout:g} s; start every node with the same "
                    "--dist_url and its own --rank (--world_size counts nodes), or wait longer with --dist_timeout SECONDS"
                )
            if refusal:
                time.sleep(1 if ranks.leads else 0)  # the store ends with this process; the others are to see the same
                raise UserError(refusal)
            time.sleep(0.02)
        return [cards[node] for node in range(ranks.nodes)]

    def find_cause(self, cause: str) -> tuple[str, list[str]]:
        """After a failure here: what ended the job, as far as any node reports, or "", and the nodes that do not answer.

        Args:
            cause: what failed here, or "" where another one is the reason.
        """
        ranks, causes, deadline = self.ranks, {self.ranks.node: cause}, time.monotonic() + _REPORT
        with suppress(dist.DistError), _without_cpp_log():
            # A store on a host that is cut off neither answers nor raises.
            while (ranks.leads or _reachable(ranks)) and len(causes) < ranks.nodes and time.monotonic() < deadline:
                self._store.set(f"cause {ranks.node}", cause)
                for node in range(ranks.nodes):
                    if self._store.check([f"cause {node}"]):
                        causes[node] = self._store.get(f"cause {node}").decode()
                if any(causes.values()) and not ranks.leads:
                    break
                time.sleep(0.1)
            time.sleep(1 if ranks.leads and ranks.nodes > 1 else 0)  # the store ends with this process
        silent = [0] if 0 not in causes else [node for node in range(ranks.nodes) if node not in causes]
        return cause or next(filter(None, causes.values()), ""), [self._name(node) for node in silent]

    def _name(self, node: int) -> str:
        first, last = node * self.ranks.processes, (node + 1) * self.ranks.processes - 1
        ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
        return f"node {node} ({ranks}, host {self._cards[node]['host']})"


_MUST_AGREE = ("--world_size", "--processes_per_node", "PyTorch", "this program (digest of its sources)")


def card(ranks: Ranks, options: Options) -> dict:
    """What the nodes compare before they start."""
    shared = [o.name for title in ("model", "data", "training", "curriculum") for o in options.groups[title]]
    return {
        "host": socket.gethostname(),
        **dict(zip(_MUST_AGREE, (ranks.nodes, ranks.processes, torch.__version__, _digest_of_program()), strict=True)),
        "given": {name: options[name] for name in shared if name in options.given},
        "values": {name: options[name] for name in shared},
    }


def difference(cards: dict[int, dict]) -> str | None:
    """In what the nodes that are there (node 0 among them) differ, though they must not."""
    first = cards.get(0)
    for node, other in cards.items() if first else ():
        for what in _MUST_AGREE:
            if other.get(what) != first[what]:
                return f"{what} is {first[what]} on node 0 and {other.get(what)} on node {node}; all nodes need the same"
        for name, value in other["given"].items():
            if value != first["values"][name]:
                return f"--{name} is {first['values'][name]} on node 0 and {value} on node {node}; give all nodes the same"
    return None


def _digest_of_program() -> str:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    inside = [path for folder in ("data", "models", "utils") for path in (root / folder).rglob("*")]
    for path in sorted([*root.glob("*.py"), *(path for path in inside if path.suffix in (".py", ".cpp", ".h"))]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def open_store(ranks: Ranks, timeout: float, listener: socket.socket | None = None) -> dist.TCPStore:
    """A connection to the common store, which this process holds where it has a `listener`."""
    limit, descriptor = timedelta(seconds=timeout), listener.detach() if listener else None
    return dist.TCPStore(
        ranks.host, ranks.port, None, descriptor is not None, limit, wait_for_workers=False, master_listen_fd=descriptor
    )


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _reachable(ranks: Ranks) -> bool:
    with suppress(OSError), socket.create_connection((ranks.host, ranks.port), timeout=1):
        return True
    return False


@contextmanager
def _without_cpp_log() -> Iterator[None]:
    """Hide PyTorch's log of a lost connection, a stack of C++ calls. Its level is read at `import torch`: too early."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _own_address(other: str) -> str:
    """This host's address on the way to another one."""
    with socket.socket(socket.AF_INET6 if ":" in other else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))  # sends nothing
        except OSError:
            return other
        return probe.getsockname()[0]


def _interface(own_address: str) -> str | None:
    """The network interface of one of this host's addresses (IPv4, on Linux)."""
    if sys.platform != "linux":
        return None
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                found = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()))[20:24]
                if socket.inet_ntoa(found) == own_address or (name == "lo" and own_address.startswith("127.")):
                    return name
    return None
