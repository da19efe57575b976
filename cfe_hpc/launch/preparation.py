"""Shell lines that prepare a node and verify it: modules, a virtual environment, the interpreter, packages.

What is missing ends the run with one line that says so, before a rank starts.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import cfe_hpc
from cfe_hpc.config.environment import TRAIN_ENTRY
from cfe_hpc.config.run import RunSpec
from cfe_hpc.launch.container import container_checks
from cfe_hpc.launch.interpreter import environment_folder

__all__ = ["VERIFY", "VERIFYING", "preparation", "refusal", "verification"]

VERIFY = "cfe_verify"
"""Shell variable with the program that looks for packages."""

VERIFYING = 'verify=$1; shift; [ "${SLURM_LOCALID:-}" != 0 ] || "$1" -c "$verify" || exit 78'
"""Words of the task's shell: the first task of each node looks for packages, with the interpreter that it will run."""

_REFUSE = r"""
cfe_refuse() {
    local why="${1//[[:cntrl:]]/ }" attempt="$((${CFE_ATTEMPT_BASE:-0} + ${SLURM_RESTART_COUNT:-0}))" event result
    printf 'error: %s\n' "$why" >&2
    PYTHON -m cfe_hpc.ranks.refusal "$CFE_RUN_DIR" "$why" 2>/dev/null && exit 1
    # Not even Python is there: the run must not look as if it ran.
    why="${why//\\/\\\\}" why="${why//\"/\\\"}"
    event='{"time":"%s","event":"failed","run_id":"%s","attempt":%d,"host":"%s","cause":"configuration","reason":"%s"}'
    result='{"state":"FAILED","reason":"%s","final_step":null,"attempts":%d,"lost_steps":null,"goodput":null'
    result="$result"',"wall_seconds":null,"weights_sha256":null,"metrics":{}}'
    printf "$event\n" "$(date -u +%Y-%m-%dT%H:%M:%S.%3NZ)" "${CFE_RUN_DIR##*/}" "$attempt" "$(uname -n)" "$why" \
        >>"$CFE_RUN_DIR/events.ndjson"
    printf "$result\n" "$why" "$((attempt + 1))" >"$CFE_RUN_DIR/result.json"
    exit 1
}
""".strip()

# Modules 3.2 returns 0 whatever happens; shells that no login has set up know no `module`.
_MODULES = r"""
cfe_module() {
    local said status init
    if ! type module >/dev/null 2>&1; then
        for init in "${LMOD_PKG:-}/init/bash" "${MODULESHOME:-}/init/bash" /etc/profile.d/lmod.sh \
            /etc/profile.d/modules.sh /usr/share/lmod/lmod/init/bash /usr/share/modules/init/bash \
            /usr/share/Modules/init/bash; do
            [ -r "$init" ] && . "$init" && type module >/dev/null 2>&1 && break
        done
        type module >/dev/null 2>&1 ||
            cfe_refuse "$1: environment.modules: there is no command \`module\` on $(uname -n) ($2); take modules out, or make it known in environment.setup"
    fi
    said="$(mktemp)" || cfe_refuse "$1: environment.modules: no temporary file can be made on $(uname -n); see to \$TMPDIR"
    module load "$2" 2>"$said"
    status=$?
    cat "$said" >&2
    if [ "$status" -ne 0 ] || grep -q ':ERROR:' "$said"; then
        said="$(grep -v '^[[:space:]]*$' "$said" | head -n 1; rm -f "$said")"
        cfe_refuse "$1: environment.modules: cannot be loaded on $(uname -n) ($2): ${said:-module load failed}; \`module avail\` there lists those there are"
    fi
    rm -f "$said"
}
""".strip()  # noqa: E501


def refusal(spec: RunSpec) -> list[str]:
    """Lines that define `cfe_refuse WHY`, which ends the run as an error of configuration does."""
    return _REFUSE.replace("PYTHON", shlex.quote(spec.provenance.batch_python)).splitlines()


def preparation(spec: RunSpec) -> list[str]:
    """Lines that load modules and put the virtual or conda environment first; `cfe_refuse` is defined by then.

    Raises:
        ConfigError: a path names a variable that is not set.
    """
    environment, lines = spec.job.environment, []
    if environment.modules:
        file = shlex.quote(_file(spec, "modules"))
        lines += _MODULES.splitlines()
        lines += [f"cfe_module {file} {shlex.quote(module)}" for module in environment.modules]
    found = environment_folder(spec)
    if found is None or environment.container.kind != "none":
        return lines
    kind, folder = found
    quoted = shlex.quote(str(folder))
    variable = "VIRTUAL_ENV" if kind == "venv" else "CONDA_PREFIX"
    lines += [f'export {variable}={quoted} PATH={shlex.quote(str(folder / "bin"))}"${{PATH:+:$PATH}}"']
    lines += ["unset PYTHONHOME"]
    if kind == "conda":
        lines += [f'for script in {quoted}/etc/conda/activate.d/*.sh; do [ -r "$script" ] && . "$script"; done']
    return lines


def verification(spec: RunSpec) -> list[str]:
    """Lines that end the run unless the node has the folder that ranks start in and their interpreter; the variable
    VERIFY is set by then. Whether that has the packages is asked where ranks start."""
    lines = []
    provenance, inside = spec.provenance, spec.job.environment.container.kind != "none"
    start = provenance.start_folder
    what = "snapshot" if provenance.start_in is not None else "folder that the job was submitted from"
    remedy = "submit the job again" if provenance.start_in is not None else "name one that every node sees"
    lines += [_unless(f"-d {shlex.quote(start)}", f"{start}: the {what} is not there on", remedy)]
    if not inside:
        found = environment_folder(spec)
        key = "python" if spec.job.environment.python is not None or found is None else found[0]
        what = f"{_file(spec, key)}: environment.{key}: {provenance.python} is no program on"
        # `command -v` takes paths and names.
        there = f'-x "$(command -v {shlex.quote(provenance.python)})"'
        lines += [_unless(there, what, "name one that every node sees")]
    return [*lines, *container_checks(spec), f"{VERIFY}={shlex.quote(_verifier(spec))}"]


def _unless(test: str, what: str, remedy: str) -> str:
    return f"""[ {test} ] || cfe_refuse {shlex.quote(what + " ")}"$(uname -n)"{shlex.quote("; " + remedy)}"""


def _file(spec: RunSpec, key: str) -> str:
    """Where a key of `[environment]` came from; the job file where nobody has set it."""
    origin = spec.origins.get(f"job.environment.{key}", "default")
    return spec.provenance.job_file if origin == "default" else origin


def _verifier(spec: RunSpec) -> str:
    """The program that looks for what the ranks import."""
    # The text of a module that is not imported: on a node it may be all there is of this package.
    source = (Path(cfe_hpc.__file__).parent / "ranks" / "verify.py").read_text(encoding="utf-8")
    # JSON's text and lists are Python's as well, and have no single quotes, which shells write in five characters.
    arguments = (json.dumps(value, ensure_ascii=False) for value in (spec.provenance.start_folder, _packages(spec)))
    return f"{source}\n\nverify({', '.join(arguments)})"


def _packages(spec: RunSpec) -> list[str]:
    job = spec.job
    names = ["cfe_hpc", "pydantic"]
    names += ["submitit"] if spec.site.scheduler == "slurm" else []
    names += ["deepspeed"] if spec.plan.launcher == "deepspeed" else []
    names += ["torch"] if job.entry is not None or spec.plan.launcher != "srun" else []
    if job.entry == TRAIN_ENTRY:
        names += ["h5py", "numpy", *(["deepspeed"] if job.engine.kind == "deepspeed" else [])]
    elif job.entry is not None:
        names.append(job.entry.partition(":")[0].partition(".")[0])
    return list(dict.fromkeys(names))
