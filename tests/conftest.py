"""Small networks on one thread: threads that wait for each other would cost more than they do, on a busy machine most of all."""

import torch

torch.set_num_threads(1)
