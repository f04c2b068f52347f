"""Small networks run on one thread, here and in the processes that tests start: threads that wait for each other cost more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
