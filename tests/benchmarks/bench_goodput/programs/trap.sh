#!/bin/bash
#SBATCH --partition=spot --nodes=2 --ntasks-per-node=1 --cpus-per-task=8 --time=60
#SBATCH --requeue --open-mode=append --output=trap.log --signal=B:USR1@60
# The usual recipe: the batch shell hears of the end, tells the ranks, and has the job requeued when they have saved
# (https://chicago-aiscience.github.io/checkpointing, https://gitlab.com/NERSC/nersc.gitlab.io/-/issues/459,
# docs/tips/slurm.md of jean-zay-doc; those whose ranks hear TERM, too, as in
# https://kempnerinstitute.github.io/KempnerForge/resilience/slurm-preemption.html).
# More forgiving than most: whatever ends early is requeued, not only what the trap has heard of.
trap 'kill -USR1 "$ranks"' USR1
srun --cpus-per-task=8 --kill-on-bad-exit=0 "$PYTHON" -u script.py "$STEPS" "$EVERY" $SIGNALS &
ranks=$!
wait "$ranks"
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done
[ -e finished ] || scontrol requeue "$SLURM_JOB_ID"
