"""A clean-up beside runs that live: Slurm says which do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from spine.stage import Stage


def planned(stage: Stage) -> tuple[str | None, set[Path]]:
    """A new plan, and what it would remove."""
    document = json.loads(stage.cfe("gc", "--plan", "--older", "0s", "--what", "runs", "--json").stdout)
    return document["plan"], {Path(item["path"]) for item in document["items"]}


def a_clean_up_spares_what_lives_and_what_that_needs(stage: Stage) -> None:
    done, needed = stage.submit("gpu", command=["true"]), stage.submit("gpu", command=["true"])
    for run in (done, needed):
        assert run.wait_result(60)["state"] == "COMPLETED"
        stage.cluster.wait_for_end(run.job_id)
    sleeps = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
    live = stage.submit("gpu", command=sleeps, words=("--after", needed.run_id))
    waiting = stage.submit("gpu", command=["true"], words=("--after", live.run_id))
    live.wait(lambda: "up" in live.log("out"), 60, "up")
    plan, chosen = planned(stage)
    assert plan is not None and chosen == {done.folder.path}
    stage.cfe("gc", plan)
    assert not done.folder.path.exists()
    assert all(run.folder.run_toml.exists() for run in (needed, live, waiting))
    stage.cfe("cancel", live.run_id)
    for run in (live, waiting):
        assert stage.cluster.wait_for_end(run.job_id) == "CANCELLED"
    live.wait_result(30)
    assert planned(stage)[1] == {run.folder.path for run in (needed, live, waiting)}


CASES = [a_clean_up_spares_what_lives_and_what_that_needs]
