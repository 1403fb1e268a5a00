#!/bin/bash
# One run on 2 machines of 8 GPUs. It goes on from its last checkpoint whenever the job starts again.
#
#     sbatch config/cluster/run.sh
#
# Submit it from the repository, with its Python environment active. Both machines must see the repository.
# Your cluster may want --account and --partition too. This script has not run on a cluster yet.
#SBATCH --job-name=run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=run-%j.txt

# torchrun passes USR1 on to train.py, and waits long enough for a large checkpoint.
source config/cluster/requeue.sh
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$head:29500" \
    --signals_to_handle=SIGTERM,SIGINT,SIGUSR1 --shutdown_timeout=500 \
    train.py config/dense_150m.py --parallel=fsdp --resume &
wait_or_requeue "$SLURM_JOB_ID"
