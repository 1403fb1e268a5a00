#!/bin/bash
# A study on many machines of 8 GPUs: each task of this array makes one share of config/paper/study.py.
#
#     sbatch config/cluster/study.sh --families="['dense','moe']"
#     sbatch --dependency=afterok:JOB config/cluster/study.sh --families="['upcycled']"
#
# Submit it from the repository, with its Python environment active. All tasks must see the repository. The
# models upcycled from one dense trunk are made by one task unless, as above, the dense models come first.
# Your cluster may want --account and --partition too. This script has not run on a cluster yet.
#SBATCH --job-name=study
#SBATCH --array=1-10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=study-%A_%a.txt

source config/cluster/requeue.sh
srun python sweep.py config/paper/study.py --shard="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@" &
wait_or_requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
