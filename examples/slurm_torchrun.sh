#!/bin/bash
# Two nodes with four GPUs each: torchrun starts one process for each GPU.
#   sbatch examples/slurm_torchrun.sh
#SBATCH --job-name=memorizing_associations
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm_%j.out

# 120 s before its time is over, torchrun gets SIGTERM and passes it on (SIGUSR1 it would not); the training saves and leaves.
# Submitted again, it goes on (--resume auto).
node0=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # each job its own

# One torchrun a node. Without GPUs: --nproc_per_node N and --dist_backend gloo.
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 4 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$node0:$port" \
    memorizing_associations_task.py --dist-url env:// --dist-backend nccl \
    --output_dir runs/slurm --resume auto
