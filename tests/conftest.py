"""Small networks run on one thread, here and in the processes that tests start: threads that wait for each other cost more."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

# A shell's `&` has Ctrl-C ignored, and a training that a test interrupts would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
