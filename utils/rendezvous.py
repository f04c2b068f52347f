"""Where the members of a distributed training meet, and what they tell each other.

Without torchrun, this program is started once on each of `--world_size` nodes. It meets the others at a key-value store, which
the first node holds at the address of `--dist_url`. Under torchrun the processes are there already and meet by themselves.
Those who meet (nodes, or processes under torchrun) are called members here.
"""

import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from utils.errors import UserError
from utils.options import Options

_EXCHANGE = 5.0  # seconds for the members to tell each other why the job ended


class RanksError(ValueError):
    """The options or the environment give this node no place; the message says what to do."""


@dataclass(frozen=True)
class Ranks:
    """Where this node (under torchrun: this process) stands among the others."""

    host: str  # where the store is
    port: int
    node: int
    members: int
    nodes: int
    processes: int  # of this node
    local_rank: int | None  # under torchrun: number of this process on its node

    @property
    def leads(self) -> bool:
        """Whether this is where the checkpoint is read and the main process runs."""
        return self.node == 0

    @property
    def spawns(self) -> bool:
        return self.local_rank is None

    @property
    def world_size(self) -> int:
        return self.members * self.processes if self.spawns else self.members

    def name(self, member: int, host: str) -> str:
        if not self.spawns:
            return f"rank {member} (host {host})"
        first, last = member * self.processes, (member + 1) * self.processes - 1
        ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
        return f"node {member} ({ranks}, host {host})"


def find_ranks(options: Options) -> Ranks | None:
    """This node's ranks by the options, or by the environment (env://, torchrun). None: one process trains alone.

    Raises:
        RanksError: they give none.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        processes = int(environment["LOCAL_WORLD_SIZE"])
        if size % processes:
            raise RanksError(f"torchrun: {size} processes do not divide into nodes of {processes}; start as many on each node")
        address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        return Ranks(*address, rank, size, size // processes, processes, int(environment["LOCAL_RANK"]))

    url, nodes, node = options["dist_url"], options["world_size"], options["rank"]
    from_environment = url == "env://"
    if not (options["multiprocessing_distributed"] or options["processes_per_node"] or nodes > 1 or from_environment):
        if node > 0:
            raise RanksError(f"--rank {node}: there is one node; give their number with --world_size")
        return None
    if from_environment:
        try:
            url = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
            nodes = int(environment["WORLD_SIZE"]) if nodes == -1 else nodes
            node = int(environment["RANK"]) if node == -1 else node
        except (KeyError, ValueError) as missing:
            raise RanksError(
                "--dist_url env:// reads MASTER_ADDR, MASTER_PORT, WORLD_SIZE (nodes) and RANK (this node) from the "
                f"environment; missing or wrong there: {missing}"
            ) from None
    nodes = 1 if nodes == -1 else nodes
    node = 0 if node == -1 and nodes == 1 else node
    if nodes < 1:
        raise RanksError(f"--world_size {nodes}: must be the number of nodes, at least 1")
    if not 0 <= node < nodes:
        raise RanksError(f"--rank {node}: must be the number of this node, 0 to {nodes - 1} with --world_size {nodes}")
    processes = options["processes_per_node"] or 1
    if options["multiprocessing_distributed"] and not options["processes_per_node"] and options["device"] != "cpu":
        processes = max(torch.cuda.device_count(), 1)
    if processes > 1 and (options["gpu"] is not None or options["device"].startswith("cuda:")):
        raise RanksError(f"--gpu and --device cuda:N name one GPU, but there are {processes} processes; leave them out")
    return Ranks(*_address(url), node, nodes, nodes, processes, None)


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise RanksError(f"--dist_url {url}: must be tcp://HOST:PORT, the same on all nodes, or env://")


class Members:
    """All members, met at their common store.

    Raises:
        UserError: one does not come, or cannot belong to the others.
    """

    def __init__(self, ranks: Ranks, options: Options):
        self.ranks, self.options = ranks, options
        self.timeout: float = options["dist_timeout"]
        self._deadline = time.monotonic() + self.timeout
        address = self._resolve()
        self.store = self._open()
        try:
            self.cards = self._meet(_own_address(address))
        except dist.DistError:
            raise UserError(f"rank 0 at {ranks.host}:{ranks.port} went away before all were there; see what it says") from None
        if "GLOO_SOCKET_IFNAME" not in os.environ:  # gloo would take the interface that belongs to the host's name
            addresses = [address, *(card["address"] for card in self.cards)]
            far = next((a for a in addresses if not a.startswith("127.")), address)
            if interface := _interface(_own_address(far)):
                os.environ["GLOO_SOCKET_IFNAME"] = interface

    def _resolve(self) -> str:
        try:
            found = socket.getaddrinfo(self.ranks.host, self.ranks.port, type=socket.SOCK_STREAM)
            return min(found)[4][0]  # IPv4 before IPv6
        except OSError as failure:
            raise UserError(
                f"--dist_url: cannot resolve the host name {self.ranks.host} ({failure.strerror}); use a name that all nodes "
                "know, or the address of the node of rank 0"
            ) from None

    def _open(self) -> dist.Store:
        ranks = self.ranks
        holds = ranks.leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not holds and not _reachable(ranks.host, ranks.port):
            if time.monotonic() > self._deadline:
                raise UserError(
                    f"nobody answered at {ranks.host}:{ranks.port} within {self.timeout:g} s; start the node of --rank 0 "
                    "there, with the same --dist_url, and see that no firewall is between"
                )
            time.sleep(0.1)
        try:
            store = open_store(ranks, self.timeout, holds)
        except dist.DistError as failure:
            if "EADDRINUSE" in str(failure):
                raise UserError(
                    f"--dist_url: port {ranks.port} is in use on this host; choose another one, the same on all nodes"
                ) from None
            reason = str(failure).splitlines()[0]
            raise UserError(f"--dist_url: no store at {ranks.host}:{ranks.port} ({reason}); --rank 0 must run there") from None
        return dist.PrefixStore(attempt() + "members", store)

    def _meet(self, own_address: str) -> list[dict]:
        """Every member's card, once all are there and agree."""
        ranks, options = self.ranks, self.options
        shared = [o.name for group in ("model", "data", "training") for o in options.groups[group]]
        card = {
            "host": socket.gethostname(),
            "address": own_address,
            "members": ranks.members,
            "processes": ranks.processes,
            "given": {name: options[name] for name in shared if name in options.given},
            "values": {name: options[name] for name in shared},
        }
        if self.store.add(f"taken {ranks.node}", 1) > 1:
            self._refuse(f"--rank {ranks.node} is taken by another node; give every node its own, 0 to {ranks.members - 1}")
        self.store.set(f"card {ranks.node}", json.dumps(card))
        cards: dict[int, dict] = {}
        while len(cards) < ranks.members:
            if self.store.check(["refused"]):
                self._refuse(self.store.get("refused").decode())
            for member in set(range(ranks.members)) - cards.keys():
                if self.store.check([f"card {member}"]):
                    cards[member] = json.loads(self.store.get(f"card {member}"))
                    self._compare(member, cards)
            if time.monotonic() > self._deadline:
                missing = ", ".join(str(member) for member in range(ranks.members) if member not in cards)
                self._refuse(
                    f"rank {missing} of {ranks.members} did not come within {self.timeout:g} s; start every node with the same "
                    "--dist_url and its own --rank, or wait longer with --dist_timeout SECONDS"
                )
            time.sleep(0.02)
        return [cards[member] for member in range(ranks.members)]

    def _compare(self, member: int, cards: dict[int, dict]) -> None:
        card = cards[member]
        for key, option, own in (
            ("members", "world_size", self.ranks.members),
            ("processes", "processes_per_node", self.ranks.processes),
        ):
            if card[key] != own:
                a, b = sorted((card[key], own))
                self._refuse(f"--{option} is {a} on one node and {b} on another; start all nodes with the same one")
        for other in cards if 0 in cards else ():
            values = cards[0]["values"]
            for name, value in cards[other]["given"].items():
                if value != values[name]:
                    self._refuse(f"--{name} is {values[name]} on node 0 and {value} on node {other}; give all nodes the same")

    def _refuse(self, message: str) -> None:
        """Tell all who come, and leave."""
        self.store.set("refused", message)
        if self.ranks.leads:
            time.sleep(1)  # the store ends with this process
        raise UserError(message)

    def settle(self, cause: str | None, suspects: list[str]) -> str:
        """After a failure here: what ended the job, as far as any member knows.

        Args:
            cause: what failed here, or None where others are the reason.
            suspects: processes of this member that did not answer.
        """
        ranks, told = self.ranks, {self.ranks.node: cause}
        store_answers = threading.Event()

        def exchange() -> None:
            until = time.monotonic() + _EXCHANGE - 1
            self.store.set(f"end {ranks.node}", cause or "")
            self.store.check(["taken 0"])
            store_answers.set()
            while len(told) < ranks.members and not any(told.values()) and time.monotonic() < until:
                for member in set(range(ranks.members)) - told.keys():
                    if self.store.check([f"end {member}"]):
                        told[member] = self.store.get(f"end {member}").decode()
                time.sleep(0.02)
            self.store.add("settled", 1)
            while ranks.leads and self.store.add("settled", 0) < ranks.members and time.monotonic() < until:
                time.sleep(0.02)  # the store ends with this process

        # In a thread, for a store on a host that is cut off does not answer, nor does it raise.
        thread = threading.Thread(target=_quietly(exchange), daemon=True)
        thread.start()
        thread.join(_EXCHANGE)
        if known := cause or next(filter(None, told.values()), None):
            return known
        silent = [member for member in range(ranks.members) if member not in told] if store_answers.is_set() else [0]
        names = [ranks.name(member, self.cards[member]["host"]) for member in silent] or suspects
        who = f"no answer from {' and '.join(names)}" if names else "the connection between the processes is lost"
        return who + remedy(self.options)


def open_store(ranks: Ranks, timeout: float, holds: bool = False) -> dist.TCPStore:
    # C++ logs here names that cannot be looked up and what is told in one line; its level is read at `import torch`.
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        return dist.TCPStore(
            ranks.host, ranks.port, is_master=holds, timeout=timedelta(seconds=timeout), wait_for_workers=False
        )
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _quietly(function: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        with suppress(dist.DistError):  # the store is gone
            function()

    return call


def _reachable(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def _own_address(other: str) -> str:
    """This host's address on the way to another one."""
    with socket.socket(socket.AF_INET6 if ":" in other else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))  # sends nothing
        except OSError:
            return other
        return probe.getsockname()[0]


def _interface(own_address: str) -> str | None:
    """The network interface of one of this host's addresses (IPv4)."""
    if own_address.startswith("127."):
        return "lo"
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(found[20:24]) == own_address:
                return name
    return None


def attempt() -> str:
    """Prefix of the keys in the store, which under torchrun outlives a restart of the processes."""
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}: "


def remedy(options: Options) -> str:
    if options["evaluate"]:
        return ""
    return f"; the same command with --output_dir {options['output_dir']} --resume auto goes on from the last checkpoint"
