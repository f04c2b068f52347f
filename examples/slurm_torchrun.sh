#!/bin/bash
# Two nodes with four GPUs each: torchrun starts one process per GPU. Submit it from the root of the repository, with an
# environment active (SLURM passes it on); options of the task script may follow:
#   sbatch examples/slurm_torchrun.sh --config configs/quickstart.yaml
# Without GPUs: remove --gpus-per-node, and write --nproc_per_node N and --dist-backend gloo below.
#SBATCH --job-name=memorizing_associations
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm_%j.out

node0=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # a port for each job
output=runs/slurm${SLURM_ARRAY_TASK_ID:+_seed$SLURM_ARRAY_TASK_ID}
seed=${SLURM_ARRAY_TASK_ID:+--seed $SLURM_ARRAY_TASK_ID}
before=$(wc -l < "slurm_$SLURM_JOB_ID.out") # lines of an earlier start of this job

# One torchrun per node. Its processes get 110 s (not 30) to save after the SIGTERM that it passes on.
srun --kill-on-bad-exit=0 --wait=60 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 4 --shutdown_timeout 110 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$node0:$port" \
    memorizing_associations_task.py --dist-url env:// --dist-backend nccl \
    --output_dir "$output" --resume auto $seed "$@"
status=$?

# torchrun exits with 1 if the run failed or was interrupted, so the output is searched. An interrupted job is queued again, and
# resumes.
if ((status)) && tail -n "+$((before + 1))" "slurm_$SLURM_JOB_ID.out" | grep -q '^interrupted in epoch'; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
