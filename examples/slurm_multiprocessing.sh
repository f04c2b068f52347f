#!/bin/bash
# Two nodes with four GPUs each: this program starts one process for each GPU.
#   sbatch examples/slurm_multiprocessing.sh
#SBATCH --job-name=memorizing_associations
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --output=slurm_%j.out

# 120 s before its time is over, the training gets SIGUSR1, saves and leaves. Submitted again, it goes on (--resume auto).
node0=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # each job its own
export node0 port

# One task a node; a failed task ends the others. Without GPUs: --dist-backend gloo --processes_per_node N.
srun --kill-on-bad-exit=1 bash -c 'exec python memorizing_associations_task.py \
    --dist-url "tcp://$node0:$port" --dist-backend nccl --multiprocessing-distributed \
    --world-size "$SLURM_NNODES" --rank "$SLURM_NODEID" \
    --output_dir runs/slurm --resume auto'
