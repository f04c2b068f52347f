#!/bin/bash
# Two nodes with four GPUs each: this program starts one process per GPU. Submit it from the root of the repository, with an
# environment active (SLURM passes it on); options of the task script may follow:
#   sbatch examples/slurm_multiprocessing.sh --config configs/quickstart.yaml
# Several seeds, each with its folder:
#   sbatch --array=1-10 examples/slurm_multiprocessing.sh --config configs/quickstart.yaml
# Without GPUs: remove --gpus-per-node; below replace --multiprocessing-distributed by --processes_per_node N, and nccl by gloo.
#SBATCH --job-name=memorizing_associations
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm_%j.out

node0=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # a port for each job
output=runs/slurm${SLURM_ARRAY_TASK_ID:+_seed$SLURM_ARRAY_TASK_ID}
seed=${SLURM_ARRAY_TASK_ID:+--seed $SLURM_ARRAY_TASK_ID}
export node0 port output seed

# One task per node. If a task fails, the others have time to say why.
srun --kill-on-bad-exit=0 --wait=60 bash -c 'exec python memorizing_associations_task.py \
    --dist-url "tcp://$node0:$port" --dist-backend nccl --multiprocessing-distributed \
    --world-size "$SLURM_NNODES" --rank "$SLURM_NODEID" \
    --output_dir "$output" --resume auto $seed "$@"' bash "$@"
status=$?

# A run gets SIGUSR1 120 s before its time limit, and SIGTERM before its nodes are given to another job. It saves and exits with
# 138 or 143. Then the job is queued again, and resumes.
if ((status == 138 || status == 143)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
