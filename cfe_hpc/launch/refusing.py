"""Shell lines that end a run, with one line that says why, when its node lacks something."""

from __future__ import annotations

import shlex

from cfe_hpc.config.run import RunSpec

__all__ = ["refusal", "stated_in", "unless"]

_REFUSE = r"""
cfe_node="${SLURMD_NODENAME:-$(uname -n)}"
cfe_refuse() {
    local status=$? why="${1//[[:cntrl:]]/ }" event result
    local attempt="$((${CFE_ATTEMPT_BASE:-0} + ${SLURM_RESTART_COUNT:-0}))"
    why="${why:-what looks at the node ended with status $status}"
    printf 'error: %s\n' "$why" >&2
    PYTHON -m cfe_hpc.ranks.refusal "$CFE_RUN_DIR" "$why" "$status" 2>/dev/null
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
""".strip()


def refusal(spec: RunSpec) -> list[str]:
    """Lines that define `cfe_refuse WHY`, which ends the run as an error of configuration does, and `cfe_node`, the
    node's name."""
    return _REFUSE.replace("PYTHON", shlex.quote(spec.provenance.batch_python)).splitlines()


def stated_in(spec: RunSpec, key: str) -> str:
    """The file that a key of `[environment]` came from; the job file where nobody has set it."""
    origin = spec.origins.get(f"job.environment.{key}", "default")
    return spec.provenance.job_file if origin == "default" else origin


def unless(test: str, what: str, remedy: str) -> str:
    """The line that ends the run unless `test`, shell words, succeeds.

    Args:
        what: is not there; the node's name follows.
        remedy: what to do about it.
    """
    return f"""{test} || cfe_refuse {shlex.quote(f"{what} ")}"$cfe_node"{shlex.quote(f"; {remedy}")}"""
