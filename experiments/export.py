"""Convert a checkpoint of this program, with Adam's state, for the original implementation.

python -m experiments.export runs/quickstart/model_best.pth.tar quickstart.pth.tar
"""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path

import torch

from experiments.sweep import DEFAULTS
from utils import checkpoints
from utils.errors import UserError, in_one_line

# The options of the original implementation, in its order. It derives `distributed` from them.
PUBLISHED_OPTIONS = """sequence_length num_classes feature_size inf_data num_time_steps workers prefetch_factor embedding_size
    memory_size w_max gamma_pos gamma_neg tau_trace readout_delay thr perfect_reset refractory_time_steps tau_mem
    dampening_factor epochs batch_size learning_rate learning_rate_decay decay_learning_rate_every max_grad_norm l2 target_rate
    start_epoch resume evaluate logging print_freq world_size rank dist_url dist_backend seed dataset_seed gpu
    multiprocessing_distributed""".split()


@in_one_line
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of this program")
    parser.add_argument("file", type=Path, help="file to write for the original implementation")
    args = parser.parse_args(argv)
    content = published(checkpoints.load(args.checkpoint), args.checkpoint)
    checkpoints.write_atomically(args.file, lambda file: torch.save(content, file))
    return 0


def published(checkpoint: dict, source: Path) -> dict:
    """The content for the original implementation. Raises UserError for a model option that it does not know."""
    params = DEFAULTS | checkpoint["params"]
    own = [name for name in checkpoints.DEFAULTS if name not in PUBLISHED_OPTIONS]
    if unknown := [f"{name} {params[name]}" for name in own if params[name] != DEFAULTS[name]]:
        raise UserError(f"{source}: the original implementation has no {', '.join(unknown)}")
    options = {name: params[name] for name in PUBLISHED_OPTIONS}
    options |= {"inf_data": bool(options["inf_data"]), "resume": "", "evaluate": False, "distributed": False}

    weights = list(checkpoint["state_dict"].items())
    weights.insert(2, ("encoding_layer.encoding", torch.ones(params["embedding_size"], params["embedding_size"])))
    # The matrix of ones counts as a parameter, but is not learned and has no state.
    optimizer = torch.optim.Adam([weight for _, weight in weights], lr=options["learning_rate"]).state_dict()
    if ours := checkpoint["optimizer"]:
        optimizer["param_groups"][0] |= {"lr": ours["param_groups"][0]["lr"]}
        optimizer["state"] = {number: ours["state"][n] for n, number in enumerate((0, 1, 3, 4, 5))}
    kept = {"epoch": checkpoint["epoch"], "log_dir": str(source.parent), "time_stamp": "", "optimizer": optimizer}
    kept |= {"state_dict": OrderedDict(weights), "best_acc": torch.tensor(checkpoint["best_acc"], dtype=torch.float32)}
    return kept | {"params": argparse.Namespace(**options)}


if __name__ == "__main__":
    sys.exit(main())
