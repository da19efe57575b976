#!/bin/bash

# Parameters
#SBATCH --account=proj
#SBATCH --constraint='a&b'
#SBATCH --cpus-per-task=3
#SBATCH --error=logs/%j.batch.err
#SBATCH --exclusive
#SBATCH --gres=gpu:h200:4
#SBATCH --job-name=train-seq
#SBATCH --licenses=fs:1
#SBATCH --mem=8193M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=logs/%j.batch.out
#SBATCH --partition=gpu-queue
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1-01:01:02

# setup
export CFE_ALLOCATED_S="$(date +%s.%N)"
export CFE_RUN_DIR=/runs/train-seq/train-seq-20260101-000000-abcd
export NCCL_NET=IB
export A='job'"'"'s'
export B='two words'
module load cuda/12.4 || exit 1
umask 027
export CFE_ATTEMPT_BASE="${CFE_ATTEMPT_BASE:-0}"
export SUBMITIT_PREEMPT_SIGNAL=URG
cd -- "$CFE_RUN_DIR" || exit 1
trap : TERM

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --kill-on-bad-exit=1 --export=ALL --ntasks="$((SLURM_JOB_NUM_NODES * 4))" --ntasks-per-node=4 --cpus-per-task=3 sh -c 'trap "" TERM USR1 USR2; exec "$@"' sh '/opt/py thon/bin/python' -u -m submitit.core._submit /proc/self/cwd/submitit


# teardown
code=$?
'/opt/py thon/bin/python' -m cfe_hpc.ranks.epilogue "$CFE_RUN_DIR" "$code"
exit "$code"
