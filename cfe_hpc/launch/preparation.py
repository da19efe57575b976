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
from cfe_hpc.launch.interpreter import environment_folder
from cfe_hpc.launch.refusing import stated_in, unless
from cfe_hpc.runfolder import RunFolder

__all__ = ["preparation", "starter", "verification", "verification_inside"]

_VERIFY = "cfe_verify"  # shell variable with the program that looks for packages

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
""".strip()  # noqa: E501


def preparation(spec: RunSpec) -> list[str]:
    """Lines that load modules and put the virtual or conda environment first; `cfe_refuse` is defined by then.

    Raises:
        ConfigError: a path names a variable that is not set.
    """
    environment, lines = spec.job.environment, []
    if environment.modules:
        file = shlex.quote(stated_in(spec, "modules"))
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
    """Lines that end the run unless the node has the folder that ranks start in, and their interpreter with what they
    import, or their container. What is inside of that is looked at where ranks start."""
    provenance, environment = spec.provenance, spec.job.environment
    start = provenance.start_folder
    what = "folder that the job was submitted from" if provenance.start_in is None else "snapshot of the code"
    remedy = "name one that every node sees" if provenance.start_in is None else "submit the job again"
    lines = [unless(f"[ -d {shlex.quote(start)} ]", f"{start}: the {what} is not there on", remedy)]
    verifier = f"{_VERIFY}={shlex.quote(_verifier(spec))}"
    if environment.container.kind != "none":
        from cfe_hpc.launch.container import container_checks  # late: few jobs have one

        return [*lines, *container_checks(spec), verifier]
    found = environment_folder(spec)
    key = "python" if environment.python is not None or found is None else found[0]
    python = shlex.quote(provenance.python)
    what = f"{stated_in(spec, key)}: environment.{key}: {provenance.python} is no program on"
    # `command -v` takes paths and names.
    lines += [unless(f'[ -x "$(command -v {python})" ]', what, "name one that every node sees")]
    return [*lines, verifier, _looking(f'{python} -c "${_VERIFY}"')]


def verification_inside(spec: RunSpec, folder: RunFolder) -> list[str]:
    """Lines that end the run unless its container has what ranks import; none without one. What `verification` gave
    comes before."""
    if spec.job.environment.container.kind == "none":
        return []
    from cfe_hpc.launch.container import contained  # late: few jobs have one

    return [_looking(contained(spec, folder, f'{shlex.quote(spec.provenance.python)} -c "${_VERIFY}"'))]


def _looking(words: str) -> str:
    """The line that ends the run unless the program that looks for packages, run by `words`, finds them."""
    return f'why="$({words} 2>&1)" || cfe_refuse "${{why#error: }}"'


def starter(spec: RunSpec) -> str:
    """The text of start.py, which srun starts: `python start.py MODULE RUN_DIR`. On each node one task looks for the
    packages; then each is that module, in the folder where ranks start."""
    looking = f'if os.environ.get("SLURM_LOCALID", "0") == "0":\n    {_look(spec)}'
    start = json.dumps(spec.provenance.start_folder, ensure_ascii=False)
    return f"{_text('verify')}\n\n{_text('become')}\n\n{looking}\nbecome(*sys.argv[1:], {start})\n"


def _verifier(spec: RunSpec) -> str:
    """The program that looks for what the ranks import."""
    return f"{_text('verify')}\n\n{_look(spec)}"


def _look(spec: RunSpec) -> str:
    """The call by which it looks."""
    # JSON's text and lists are Python's as well, and have no single quotes, which shells write in five characters.
    arguments = (json.dumps(value, ensure_ascii=False) for value in (spec.provenance.start_folder, _packages(spec)))
    return f"verify({', '.join(arguments)})"


def _text(name: str) -> str:
    """The text of a module of ranks/ that is not imported: on a node it may be all there is of this package."""
    return (Path(cfe_hpc.__file__).parent / "ranks" / f"{name}.py").read_text(encoding="utf-8")


def _packages(spec: RunSpec) -> list[str]:
    job = spec.job
    names = ["cfe_hpc", "pydantic"]
    names += ["deepspeed"] if spec.plan.launcher == "deepspeed" else []
    names += ["torch"] if job.entry is not None or spec.plan.launcher != "srun" else []
    if job.entry == TRAIN_ENTRY:
        names += ["h5py", "numpy", *(["deepspeed"] if job.engine.kind == "deepspeed" else [])]
    elif job.entry is not None:
        names.append(job.entry.partition(":")[0].partition(".")[0])
    return list(dict.fromkeys(names))
