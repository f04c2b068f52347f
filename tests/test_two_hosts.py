"""Two hosts: network namespaces joined by a virtual cable (`ip netns`). Needs root and iproute2."""

import re
import subprocess
import time

import pytest
from helpers import NETWORK, PATIENCE, Started, wait_for_training

from utils import checkpoints

HOSTS = {"task-test-0": "10.213.77.1", "task-test-1": "10.213.77.2"}
TIMEOUT = 8  # seconds


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def unplug() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], capture_output=True)


@pytest.fixture
def hosts():
    """Two namespaces with an address each, which can reach only each other."""
    try:
        unplug()
        for host in HOSTS:
            ip("netns", "add", host)
        first, second = HOSTS
        ip("-netns", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for host, address in HOSTS.items():
            ip("-netns", host, "address", "add", f"{address}/24", "dev", "cable")
            ip("-netns", host, "link", "set", "cable", "up")
            ip("-netns", host, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as failure:
        unplug()
        reason = getattr(failure, "stderr", None) or failure
        # A laptop may not make network namespaces; CI may.
        pytest.skip(f"no network namespaces here (they need root and iproute2): {reason}")
    yield list(HOSTS)
    unplug()


@pytest.mark.slow
def test_both_hosts_end_if_one_is_cut_off(hosts, tmp_path):
    (trace := tmp_path / "trace").mkdir()
    both = [  # the documented commands for two nodes, with separate folders, since no file system is shared
        Started(
            *(*NETWORK, "--epochs", "1000", "--output_dir", tmp_path / host),
            *("--dist-url", f"tcp://{HOSTS[hosts[0]]}:23456", "--dist-backend", "gloo", "--dist_timeout", str(TIMEOUT)),
            *("--multiprocessing-distributed", "--world-size", "2", "--rank", str(rank)),
            prefix=("ip", "netns", "exec", host),
            OMP_NUM_THREADS="1",
            GLOO_SOCKET_IFNAME="cable",  # the name of this host resolves to loopback
            SMALL_TASK_TRACE=str(trace),
        )
        for rank, host in enumerate(hosts)
    ]
    wait_for_training(trace, 2)
    folder, start = tmp_path / hosts[0], time.monotonic()
    while not (folder / checkpoints.LAST).exists() and time.monotonic() < start + PATIENCE:
        time.sleep(0.1)
    ip("-netns", hosts[1], "link", "set", "cable", "down")
    for node in both:
        status, _, err = node.end(timeout=TIMEOUT + 40)
        assert status == 1 and re.fullmatch(r"error: no answer from another process(; the same command with .*)?\n", err)
    assert checkpoints.load(folder / checkpoints.LAST) and not (tmp_path / hosts[1]).exists(), "only rank 0 writes"
