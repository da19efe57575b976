"""A user's own script, started by hand: the README's few lines, stopped and taken up again."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

SCRIPT = """
    import sys, time, torch
    import cfe_hpc

    run = cfe_hpc.join()
    torch.manual_seed(7)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run.track(model=model, optimizer=optimizer)
    for step in run.steps(40):
        loss = (model(torch.randn(8, 4)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
        time.sleep(float(sys.argv[1]))
    print("done")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "my train.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def start(script: Path, pause_s: float, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "error:Converting a tensor", str(script), str(pause_s)],
        cwd=script.parent,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def only_run(script: Path) -> Path:
    (run,) = (script.parent / "runs" / "my-train").iterdir()
    return run


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def test_stopped_by_hand_and_taken_up_again_it_ends_with_the_same_weights(script, tmp_path):
    whole = start(script, 0)
    assert whole.communicate(timeout=120)[0] == "done\n"
    assert whole.returncode == 0
    undisturbed = result(only_run(script))
    assert (undisturbed["state"], undisturbed["final_step"]) == ("COMPLETED", 40)

    other = tmp_path / "second"
    other.mkdir()
    again = other / script.name
    again.write_text(script.read_text())
    stopped = start(again, 0.05)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        beats = list((other / "runs").glob("*/*/heartbeat.ndjson"))
        if beats and len(beats[0].read_text().splitlines()) >= 5:
            break
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    out, err = stopped.communicate(timeout=60)
    assert (stopped.returncode, out) == (128 + signal.SIGTERM, ""), err
    run = only_run(again)
    assert result(run)["state"] == "CANCELLED"
    assert 5 <= result(run)["final_step"] < 40

    resumed = start(again, 0, CFE_RUN_DIR=str(run))
    out, err = resumed.communicate(timeout=120)
    assert (resumed.returncode, out) == (0, "done\n"), err
    ended = result(run)
    assert (ended["state"], ended["attempts"], ended["lost_steps"]) == ("COMPLETED", 2, 0)
    assert ended["weights_sha256"] == undisturbed["weights_sha256"]


def test_joining_needs_torch_only_when_there_are_others(tmp_path):
    probe = (
        "import sys, cfe_hpc; run = cfe_hpc.join(); "
        "print([m for m in ('torch', 'h5py', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
