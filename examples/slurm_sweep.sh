#!/bin/bash
# A sweep on any four GPUs. The tasks of the array share the folder: each takes the next run that no other
# task holds, also a run of a dead machine. Submit it from the root of the repository, with an environment active:
#   sbatch examples/slurm_sweep.sh experiments/results.yaml --output_dir runs/results
# Without GPUs: remove --gpus-per-task; a task then trains as many runs at a time as it has CPUs.
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

# A sweep gets SIGUSR1 120 s before its time limit: its runs save, and it exits with 138. Then the task is queued again.
# A task without work waits for the runs of the other tasks.
if ((status == 138 || status == 143)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
