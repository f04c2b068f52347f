#!/bin/bash
# A sweep on four GPUs, wherever SLURM finds them. The tasks of the array share the folder: each takes the next run that no other
# holds, and takes over what a dead machine held. Submit it from the root of the repository, with an environment active:
#   sbatch examples/slurm_sweep.sh experiments/results.yaml --output_dir runs/results
# Without GPUs: take out --gpus-per-task; a task then trains as many runs at a time as it has CPUs.
#SBATCH --job-name=memorizing_associations_sweep
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm_sweep_%a.out

srun python -m experiments.sweep "$@"
status=$?

# 120 s before its time is over the sweep gets SIGUSR1: its runs save, and it leaves with 138. The task is queued again then.
# A task without work waits for the runs of the others.
if ((status == 138 || status == 143)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
