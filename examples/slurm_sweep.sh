#!/bin/bash
# A sweep on four GPUs, each wherever SLURM finds one: the tasks of the array share the folder, and each takes the next run
# that no other holds. Submit it from the root of the checkout, with an environment active that has requirements.txt:
#   sbatch examples/slurm_sweep.sh
#SBATCH --job-name=memorizing_sweep
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=slurm_sweep_%a.out

# 120 s before its time is over, a task's runs get SIGTERM, save and leave; another task, or the same submitted again, continues
# them. Tasks wait for runs that others hold, to take over where a machine dies: cancel those that no longer have work.
# Without GPUs: leave out --gpus-per-task; a task then trains cpus-per-task runs at a time.
exec srun python -m experiments.sweep experiments/results.yaml --output_dir runs/results
