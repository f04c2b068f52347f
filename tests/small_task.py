"""The task script in float64, with short epochs and a process that fails on demand, for the tests of distributed training.

Processes that it starts import this file again, and are changed in the same way. Environment variables:

    SMALL_TASK_FAIL   rank:batch:what - in this batch the process of this rank gets a signal, all get Ctrl-C, or it raises (bug)
    SMALL_TASK_TRACE  a folder in which each process records its number of threads and its training samples
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import memorizing_associations_task as task
from utils import distributed

torch.set_default_dtype(torch.float64)
data.TRAINING_SAMPLES = 250

single_precision, train_step = data._samples, task.train_step
batches = 0


def double_precision(*arrays):
    samples = single_precision(*arrays)
    return data.Samples(samples.features.double(), samples.labels, samples.query.double(), samples.answer)


def failing_step(network, optimizer, batch, **others):
    global batches
    batches += 1
    rank, number, what = os.environ.get("SMALL_TASK_FAIL", "-1:0:").split(":")
    if (distributed.rank(), batches) == (int(rank), int(number)):
        if what == "bug":
            raise ZeroDivisionError("a bug")
        os.kill(0 if what == "Ctrl-C" else os.getpid(), signal.SIGINT if what == "Ctrl-C" else signal.Signals[what])
        time.sleep(3 if what == "Ctrl-C" else 0)  # until the signal has been passed on
    if folder := os.environ.get("SMALL_TASK_TRACE"):
        with open(Path(folder) / f"rank{distributed.rank()}", "a") as file:
            print(torch.get_num_threads(), *batch.query[:, 0].tolist(), file=file)
    return train_step(network, optimizer, batch, **others)


data._samples, task.train_step = double_precision, failing_step

if __name__ == "__main__":
    sys.exit(task.main())
