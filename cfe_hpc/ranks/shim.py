"""`python -m cfe_hpc.ranks.shim`: what a launcher starts for each rank, and what becomes that rank.

It takes its place from the launcher's variables and writes down its process id, by which the node's agent reaches it
with stop signals. An exec keeps both. Stop signals arrive blocked, as the launcher has them, and stay so until the
rank can hear them; a program of the user's gets them as any program does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from cfe_hpc.ranks.child import die_with_parent
from cfe_hpc.ranks.env import RankFacts, read_facts
from cfe_hpc.ranks.pids import register
from cfe_hpc.ranks.redirect import redirect
from cfe_hpc.ranks.signals import unblock
from cfe_hpc.runfolder import RunFolder

__all__ = ["main"]


def main() -> NoReturn:
    """Become the rank: its entry's process, or the user's command. Never returns."""
    die_with_parent()
    folder = RunFolder(Path(os.environ["CFE_RUN_DIR"]))
    os.environ.update(_place())
    facts = read_facts()
    redirect(folder.logs / folder.log_stem(job_id=facts.job_id, attempt=facts.attempt, rank=facts.rank))
    if facts.restart and facts.rank == 0:
        detail = {"restart": facts.restart}
        folder.note_event("degraded", attempt=facts.attempt, rank=0, reason="restarted", detail=detail)
    if not register():
        sys.exit("error: the agent of this node has ended, and with it this attempt; look into its log")
    argv = _argv(folder, facts)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        reason = f"{argv[0]}: {error.strerror}"
        folder.note_event("failed", attempt=facts.attempt, rank=facts.rank, reason=reason)
        print(f"error: {argv[0]}: cannot be started: {error.strerror}", file=sys.stderr)
        sys.exit(127)


def _place() -> dict[str, str]:
    """The rank's place in our words. What the agent knows (node, hosts, job, attempt) stands there already."""
    env = os.environ
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {
        "CFE_WORKER": "1",
        "CFE_RANK": env["RANK"],
        "CFE_LOCAL_RANK": env["LOCAL_RANK"],
        "CFE_WORLD_SIZE": env["WORLD_SIZE"],
        "CFE_LOCAL_WORLD_SIZE": env["LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"],
        "CFE_RESTART": restart,
        # Ranks of before a restart may still listen on theirs.
        "CFE_CONTROL_PORT": str(int(env["CFE_CONTROL_PORT"]) + int(restart)),
    }


def _argv(folder: RunFolder, facts: RankFacts) -> list[str]:
    """What this process becomes."""
    # Only here: these are the models of the whole configuration.
    from cfe_hpc.config.run import RunSpec
    from cfe_hpc.config.template import fill_in
    from cfe_hpc.devices.resolve import resolve
    from cfe_hpc.ranks.bootstrap import rank_environment
    from cfe_hpc.ranks.rendezvous import Meeting

    spec = RunSpec.read(folder.run_toml)
    if spec.job.command is None:
        return [spec.provenance.python, "-u", "-m", "cfe_hpc.ranks", str(folder.path)]
    env = os.environ
    ports = {"master_port": int(env["MASTER_PORT"]), "control_port": int(env["CFE_CONTROL_PORT"])}
    env.update(rank_environment(facts, Meeting(address=env["MASTER_ADDR"], **ports), spec))
    env.update(resolve(spec.plan.accelerator).device.environment(facts))
    unblock()
    return [fill_in(word, spec.job.params) for word in spec.job.command]


if __name__ == "__main__":
    main()
