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
cfe_node="${SLURMD_NODENAME:-$(uname -n)}"
cfe_refuse() {
    local status=$? why="${1//[[:cntrl:]]/ }" event result
    local attempt="$((${CFE_ATTEMPT_BASE:-0} + ${SLURM_RESTART_COUNT:-0}))"
    why="${why:-what looks at the node ended with status $status}"
    printf 'error: %s\n' "$why" >&2
    '/opt/py thon/bin/python' -m cfe_hpc.ranks.refusal "$CFE_RUN_DIR" "$why" "$status" 2>/dev/null
    status=$?
    # A signal means that the job is being ended: whoever does it has the last word.
    [ "$status" -ne 0 ] && [ "$status" -le 128 ] || exit 1
    # Not even Python is there: the run must not look as if it ran.
    grep -q COMPLETED "$CFE_RUN_DIR/result.json" 2>/dev/null && exit 1
    why="${why//\\/\\\\}" why="${why//\"/\\\"}"
    event='{"time":"%s","event":"failed","run_id":"%s","attempt":%d,"host":"%s","cause":"configuration","reason":"%s"}'
    result='{"state":"FAILED","reason":"%s","final_step":null,"attempts":%d,"lost_steps":null,"goodput":null'
    result="$result"',"wall_seconds":null,"weights_sha256":null,"metrics":{}}'
    printf "$event\n" "$(date -u +%Y-%m-%dT%H:%M:%S.%3NZ)" "${CFE_RUN_DIR##*/}" "$attempt" "$cfe_node" "$why" \
        >>"$CFE_RUN_DIR/events.ndjson"
    printf "$result\n" "$why" "$((attempt + 1))" >"$CFE_RUN_DIR/result.json"
    exit 1
}
export NCCL_NET=IB
export A='job'"'"'s'
export B='two words'
cfe_module() {
    local said status init
    if ! type module >/dev/null 2>&1; then
        for init in "${LMOD_PKG:-}/init/bash" "${MODULESHOME:-}/init/bash" /etc/profile.d/lmod.sh \
            /etc/profile.d/modules.sh /usr/share/lmod/lmod/init/bash /usr/share/modules/init/bash \
            /usr/share/Modules/init/bash; do
            [ -r "$init" ] && . "$init" && type module >/dev/null 2>&1 && break
        done
        type module >/dev/null 2>&1 ||
            cfe_refuse "$1: environment.modules: there is no command \`module\` on $cfe_node ($2); take modules out, or make it known in environment.setup"
    fi
    said="$(mktemp)" || cfe_refuse "$1: environment.modules: no temporary file can be made on $cfe_node; see to \$TMPDIR"
    module load "$2" 2>"$said"
    status=$?
    cat "$said" >&2
    if [ "$status" -ne 0 ] || grep -q ':ERROR:' "$said"; then
        said="$(grep -v '^[[:space:]]*$' "$said" | head -n 1; rm -f "$said")"
        cfe_refuse "$1: environment.modules: cannot be loaded on $cfe_node ($2): ${said:-module load failed}; \`module avail\` there lists those there are"
    fi
    rm -f "$said"
}
cfe_module job.toml cuda/12.4
umask 027
[ -d /some/where ] || cfe_refuse '/some/where: the folder that the job was submitted from is not there on '"$cfe_node"'; name one that every node sees'
[ -x "$(command -v '/opt/py thon/bin/python')" ] || cfe_refuse 'job.toml: environment.python: /opt/py thon/bin/python is no program on '"$cfe_node"'; name one that every node sees'
cfe_verify='"""Run as text (`python -c`) where nothing is known to be installed: it needs the standard library alone."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time


def verify(start: str, names: list[str]) -> None:
    """Exit with 78, and say why, unless all packages are to be had. A step of Slurm writes it down for the run, too."""
    sys.path.insert(0, start)
    lacks = ", ".join(name for name in names if importlib.util.find_spec(name) is None)
    old = sys.version_info[:2] < (3, 10)
    if not lacks and not old:
        return
    host, run_dir = os.environ.get("SLURMD_NODENAME", os.uname().nodename), os.environ["CFE_RUN_DIR"]
    what = "is older than Python 3.10 on" if old else f"lacks {lacks} on"
    remedy = "name a newer one" if old else "install what is missing there, or name another one"
    why = f"environment.python: {what} {host} ({sys.executable}); {remedy}, or a venv or conda environment"
    print(f"error: {why}", file=sys.stderr)
    if "SLURM_STEP_ID" in os.environ:
        attempt = sum(int(os.environ.get(name, "0")) for name in ("CFE_ATTEMPT_BASE", "SLURM_RESTART_COUNT"))
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        event = {"time": now, "event": "failed", "run_id": os.path.basename(run_dir), "attempt": attempt}
        event.update(host=host, cause="configuration", reason=why)
        with open(os.path.join(run_dir, "events.ndjson"), "a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")
    sys.exit(78)


verify("/some/where", ["cfe_hpc", "pydantic"])'
why="$('/opt/py thon/bin/python' -c "$cfe_verify" 2>&1)" || cfe_refuse "${why#error: }"
export CFE_ATTEMPT_BASE="${CFE_ATTEMPT_BASE:-0}"
cd -- "$CFE_RUN_DIR" || exit 1
export CFE_LOG="$CFE_RUN_DIR/logs/${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}.$((CFE_ATTEMPT_BASE + ${SLURM_RESTART_COUNT:-0}))."
trap : TERM

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --kill-on-bad-exit=1 --export=ALL --ntasks="$((SLURM_JOB_NUM_NODES * 4))" --ntasks-per-node=4 --cpus-per-task=3 sh -c 'log="$CFE_LOG$SLURM_PROCID"; exec >>"$log.out" 2>>"$log.err"; trap "" TERM USR1 USR2; exec "$@"' sh '/opt/py thon/bin/python' -u "$CFE_RUN_DIR/start.py" cfe_hpc.ranks "$CFE_RUN_DIR"


# teardown
code=$?
'/opt/py thon/bin/python' -m cfe_hpc.ranks.epilogue "$CFE_RUN_DIR" "$code"
exit "$code"
