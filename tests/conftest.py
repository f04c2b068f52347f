"""Tests, and the processes that they start, use one thread: on small networks, more threads mostly wait for each other."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

pytest.register_assert_rewrite("helpers")

from helpers import NETWORK, run  # noqa: E402 (its assertions are rewritten first)

torch.set_num_threads(1)

# A shell makes background jobs (`&`) ignore Ctrl-C, and runs that a test interrupts would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Path:
    """A run of two epochs in one process, shared by all modules."""
    folder, trace = (tmp_path_factory.getbasetemp() / name for name in ("single", "single_trace"))
    if not folder.exists():
        trace.mkdir()
        words = (*NETWORK, "--epochs", "2", "--output_dir", folder)
        status, out, err = run(*words, OMP_NUM_THREADS="1", SMALL_TASK_TRACE=str(trace))
        assert status == 0, err
        (folder / "out").write_text(out)
        (folder / "trace").write_text((trace / "rank0").read_text())
    return folder
