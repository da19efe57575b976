"""A real Prometheus scrapes a run's own port."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cfe_hpc.metrics.scrape import ScrapeExporter
from cfe_hpc.metrics.snapshot import Snapshot


def query(url: str, expression: str) -> list[dict[str, Any]]:
    words = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{words}", timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
    except urllib.error.HTTPError as error:
        error.close()
        return []
    except OSError:
        return []


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (scripts/test installs it)")
def test_prometheus_reads_the_values_with_their_labels(tmp_path: Path) -> None:
    exporter = ScrapeExporter(Snapshot(run_id="r-1", job_name="é", attempt=2), port=0, address="127.0.0.1")
    exporter.publish({"loss": 2.5, "val_loss": 3.5}, step=7)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        f'scrape_configs: [{{job_name: run, static_configs: [{{targets: ["127.0.0.1:{exporter.port}"]}}]}}]\n'
    )
    argv = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    process = subprocess.Popen(
        [*argv, f"--web.listen-address={address}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not (found := query(f"http://{address}", '{__name__=~"cfe_hpc_.*loss|cfe_hpc_logged|cfe_hpc_step"}')):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
        exporter.close(2.0)
    labels = {"run_id": "r-1", "job_name": "é", "job": "run", "instance": f"127.0.0.1:{exporter.port}"}
    assert sorted((one["metric"].pop("__name__"), one["metric"], one["value"][1]) for one in found) == [
        ("cfe_hpc_logged", {**labels, "value": "val_loss"}, "3.5"),
        ("cfe_hpc_loss", labels, "2.5"),
        ("cfe_hpc_step", labels, "7"),
    ]
