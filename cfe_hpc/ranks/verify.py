"""Run as text (`python -c`) where nothing is known to be installed: it needs the standard library alone."""

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
