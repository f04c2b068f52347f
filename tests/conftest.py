"""Small networks run on one thread: threads that wait for each other would cost more than they do."""

import torch

torch.set_num_threads(1)
