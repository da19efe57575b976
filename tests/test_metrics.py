"""Exporters against a real Pushgateway, and against ones that are down, slow or broken."""

from __future__ import annotations

import http.server
import logging
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Pushgateway
from prometheus_client import CollectorRegistry, generate_latest
from run_specs import run_spec

from cfe_hpc.metrics.exporter import NullExporter, build, withdraw
from cfe_hpc.metrics.families import FAMILIES, LOGGED
from cfe_hpc.metrics.gateway import Credentials
from cfe_hpc.metrics.pushgateway import PushgatewayExporter
from cfe_hpc.metrics.scrape import ScrapeExporter
from cfe_hpc.metrics.snapshot import Snapshot
from cfe_hpc.ranks.epilogue import close_failed_attempt
from cfe_hpc.runfolder import RunFolder

RUN_ID = "toy-20260131-235959-abcd"


def snapshot(run_id: str = RUN_ID, job_name: str = "toy") -> Snapshot:
    return Snapshot(run_id=run_id, job_name=job_name, attempt=2)


def eventually(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(status: int, seen: list[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """A gateway that answers everything with `status` and keeps the requests."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append(self)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_PUT = do_DELETE = answer

        def log_message(self, *args: object) -> None:
            return None

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


@contextmanager
def silent_server() -> Iterator[str]:
    """A gateway that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_exposition_in_full() -> None:
    registry = CollectorRegistry()
    values = snapshot(job_name='odd "name"\n;é')
    registry.register(values)
    values.update({"loss": 2.5, "val/loss é": 3.0, "goodput": 0.5}, step=7)
    shown = generate_latest(registry).decode()
    labels = 'job_name="odd \\"name\\"\\n;é",run_id="toy-20260131-235959-abcd"'
    published = re.search(r"cfe_hpc_published_timestamp_seconds\{.*\} (\S+)\n", shown)
    assert published is not None and float(published.group(1)) > 1.7e9
    expected = f"""\
# HELP cfe_hpc_attempt Allocations of the run before this one.
# TYPE cfe_hpc_attempt gauge
cfe_hpc_attempt{{{labels}}} 2.0
# HELP cfe_hpc_loss Training loss of the last logged step.
# TYPE cfe_hpc_loss gauge
cfe_hpc_loss{{{labels}}} 2.5
# HELP cfe_hpc_goodput_ratio Time spent on steps that count, divided by time allocated.
# TYPE cfe_hpc_goodput_ratio gauge
cfe_hpc_goodput_ratio{{{labels}}} 0.5
# HELP cfe_hpc_step Optimizer steps done, over all attempts.
# TYPE cfe_hpc_step gauge
cfe_hpc_step{{{labels}}} 7.0
# HELP cfe_hpc_published_timestamp_seconds When the values were last published; set by the exporter.
# TYPE cfe_hpc_published_timestamp_seconds gauge
cfe_hpc_published_timestamp_seconds{{{labels}}} {published.group(1)}
# HELP cfe_hpc_logged Any other value that the job logged, by name.
# TYPE cfe_hpc_logged gauge
cfe_hpc_logged{{{labels},value="val/loss é"}} 3.0
"""
    assert sorted(shown.splitlines()) == sorted(expected.splitlines())


def test_family_names_and_keys_are_unique_and_well_formed() -> None:
    names = [family.name for family in (*FAMILIES, LOGGED)]
    assert len(set(names)) == len(names)
    assert len({family.key for family in FAMILIES}) == len(FAMILIES)
    assert all(re.fullmatch(r"cfe_hpc_[a-z_]+[a-z]", name) for name in names)


def test_names_without_end_do_not_grow_the_exposition_without_end() -> None:
    values = snapshot()
    for step in range(2000):
        values.update({f"made_up_{step}": 1.0, "loss": float(step)}, step=step)
    samples = [sample for family in values.collect() for sample in family.samples]
    assert len(samples) == 256 + 4  # attempt, step, loss, published
    assert [sample.value for sample in samples if sample.name == "cfe_hpc_loss"] == [1999.0]


def test_the_gateway_shows_the_run_while_it_trains_and_nothing_of_it_after(pushgateway: Pushgateway) -> None:
    exporter = PushgatewayExporter(pushgateway.url, snapshot(), run_id=RUN_ID, interval_s=0.05)
    exporter.publish({"loss": 4.25, "step_seconds": 0.5}, step=3)
    group = re.escape('job="cfe_hpc",job_name="toy",run_id="toy-20260131-235959-abcd"')
    eventually(lambda: bool(re.search(rf'cfe_hpc_loss{{instance="",{group}}} 4.25', pushgateway.metrics())))
    exporter.publish({"loss": 4.0}, step=4)
    eventually(lambda: bool(re.search(rf'cfe_hpc_step{{instance="",{group}}} 4\n', pushgateway.metrics())))
    assert "cfe_hpc_step_seconds" in pushgateway.metrics()
    exporter.close(5.0)
    eventually(lambda: RUN_ID not in pushgateway.metrics())  # it answers 202, "accepted"


@pytest.mark.parametrize("run_id", ["a b/c", "é;'\"$(x)", "p%2Fq+r", "a=b,c@base64"])
def test_odd_run_ids_make_one_group_that_is_deleted(pushgateway: Pushgateway, run_id: str) -> None:
    exporter = PushgatewayExporter(pushgateway.url, snapshot(run_id), run_id=run_id, interval_s=0.05)
    exporter.publish({}, step=1)
    shown = run_id.replace("\\", "\\\\").replace('"', '\\"')
    eventually(lambda: f'run_id="{shown}"' in pushgateway.metrics())
    exporter.close(5.0)
    eventually(lambda: "cfe_hpc_step" not in pushgateway.metrics())


def test_an_attempt_takes_over_the_group_of_one_that_was_killed(pushgateway: Pushgateway) -> None:
    killed = PushgatewayExporter(pushgateway.url, snapshot(), run_id=RUN_ID, interval_s=0.05)
    killed.publish({"loss": 9.0, "only_then": 1.0}, step=90)
    eventually(lambda: "only_then" in pushgateway.metrics())
    following = PushgatewayExporter(pushgateway.url, snapshot(), run_id=RUN_ID, interval_s=0.05)
    following.publish({"loss": 8.0}, step=81)
    eventually(lambda: "only_then" not in pushgateway.metrics())
    following.close(5.0)
    eventually(lambda: RUN_ID not in pushgateway.metrics())  # it answers 202, "accepted"
    killed.close(5.0)


def test_withdraw_speaks_for_a_run_that_cannot(pushgateway: Pushgateway) -> None:
    exporter = PushgatewayExporter(pushgateway.url, snapshot(), run_id=RUN_ID, interval_s=0.05)
    exporter.publish({}, step=1)
    eventually(lambda: RUN_ID in pushgateway.metrics())
    spec = run_spec(metrics={"pushgateway": pushgateway.url})
    withdraw(spec, run_id=RUN_ID, timeout_s=5.0)
    eventually(lambda: RUN_ID not in pushgateway.metrics())  # it answers 202, "accepted"
    withdraw(spec, run_id=RUN_ID, timeout_s=5.0)
    exporter.close(5.0)


def test_an_attempt_that_died_leaves_no_group(pushgateway: Pushgateway, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / RUN_ID)
    folder.control.mkdir(parents=True)
    run_spec(metrics={"pushgateway": pushgateway.url}).write(folder.run_toml)
    exporter = PushgatewayExporter(pushgateway.url, snapshot(), run_id=RUN_ID, interval_s=0.05)
    exporter.publish({}, step=1)
    eventually(lambda: RUN_ID in pushgateway.metrics())
    assert close_failed_attempt(folder, attempt=0, status=1) is False
    eventually(lambda: RUN_ID not in pushgateway.metrics())  # it answers 202, "accepted"
    exporter.close(5.0)


def test_withdrawing_from_a_gateway_that_is_down_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("cfe_hpc"), "propagate", True)
    spec = run_spec(metrics={"pushgateway": f"http://127.0.0.1:{free_port()}"})
    withdraw(spec, run_id=RUN_ID, timeout_s=5.0)
    assert f"may still hold the group of {RUN_ID}" in caplog.text


def test_a_gateway_that_is_down_is_logged_once_and_its_return_once(
    pushgateway: Pushgateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfe_hpc.metrics.pushgateway._BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr("cfe_hpc.metrics.pushgateway._BACKOFF_MAX_S", 0.05)
    monkeypatch.setattr(logging.getLogger("cfe_hpc"), "propagate", True)
    caplog.set_level(logging.INFO, "cfe_hpc")
    port = free_port()
    exporter = PushgatewayExporter(f"http://127.0.0.1:{port}", snapshot(), run_id=RUN_ID, interval_s=0.01)
    exporter.publish({}, step=1)
    eventually(lambda: "cannot reach the Pushgateway" in caplog.text)
    with forwarding(port, pushgateway.url):
        eventually(lambda: "answers again" in caplog.text)
        exporter.close(5.0)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    eventually(lambda: RUN_ID not in pushgateway.metrics())  # it answers 202, "accepted"


@contextmanager
def forwarding(port: int, target: str) -> Iterator[None]:
    """The gateway at `target`, come back on `port`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = urllib.request.Request(target + self.path, data=body, method=self.command)
            request.add_header("Content-Type", self.headers["Content-Type"])
            with urllib.request.urlopen(request, timeout=5) as answer:
                self.send_response(answer.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_PUT = do_DELETE = forward

        def log_message(self, *args: object) -> None:
            return None

    running = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def test_a_silent_gateway_holds_up_neither_publish_nor_close(caplog: pytest.LogCaptureFixture) -> None:
    with silent_server() as url:
        exporter = PushgatewayExporter(url, snapshot(), run_id=RUN_ID, push_timeout_s=30.0)
        # Each publish would take 30 s if any of them waited: the test's own time limit is far below 1000 of them.
        for step in range(1000):
            exporter.publish({"loss": 1.0}, step=step)
        exporter.close(0.2)
    exporter.publish({"loss": 1.0}, step=1001)


def test_a_broken_gateway_gets_few_pushes_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfe_hpc.metrics.pushgateway._BACKOFF_FIRST_S", 30.0)
    seen: list[http.server.BaseHTTPRequestHandler] = []
    with server(500, seen) as url:
        exporter = PushgatewayExporter(url, snapshot(), run_id=RUN_ID, interval_s=0.001)
        exporter.publish({"loss": 1.0}, step=1)
        eventually(lambda: len(seen) > 0)
        for step in range(1000):
            exporter.publish({"loss": 1.0}, step=step)
        assert [request.command for request in seen] == ["PUT"]
        exporter.close(0.5)
    assert seen[-1].command == "DELETE"


def test_the_password_goes_to_the_gateway_and_nowhere_else(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("cfe_hpc"), "propagate", True)
    monkeypatch.setenv("CFE_PUSHGATEWAY_USER", "me")
    monkeypatch.setenv("CFE_PUSHGATEWAY_PASSWORD", "s3cret:é")
    seen: list[http.server.BaseHTTPRequestHandler] = []
    with server(401, seen) as url:
        exporter = PushgatewayExporter(url, snapshot(), run_id=RUN_ID)
        exporter.publish({}, step=1)
        eventually(lambda: len(seen) > 0)
        exporter.close(0.3)
    assert seen[0].headers["Authorization"] == "Basic bWU6czNjcmV0OsOp"
    assert "401" in caplog.text
    assert "s3cret" not in caplog.text and "bWU6" not in caplog.text
    assert "s3cret" not in repr(Credentials("me", "s3cret:é"))


def test_build_gives_other_ranks_and_unconfigured_runs_an_exporter_that_does_nothing() -> None:
    configured = run_spec(metrics={"pushgateway": "http://127.0.0.1:9"})
    assert isinstance(build(configured, run_id=RUN_ID, attempt=0, rank=1), NullExporter)
    nothing = build(run_spec(), run_id=RUN_ID, attempt=0, rank=0)
    assert isinstance(nothing, NullExporter)
    nothing.publish({"loss": 1.0}, step=1)
    nothing.close(1.0)


def test_build_exports_to_all_that_is_asked_for(pushgateway: Pushgateway) -> None:
    port = free_port()
    exporter = build(run_spec(metrics={"pushgateway": pushgateway.url, "port": port}), run_id=RUN_ID, attempt=3, rank=0)
    exporter.publish({"loss": 1.5}, step=1)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert f'cfe_hpc_loss{{job_name="toy",run_id="{RUN_ID}"}} 1.5' in answer.read().decode()
    eventually(lambda: RUN_ID in pushgateway.metrics())
    exporter.close(5.0)
    eventually(lambda: RUN_ID not in pushgateway.metrics())  # it answers 202, "accepted"
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_a_port_in_use_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("cfe_hpc"), "propagate", True)
    taken = ScrapeExporter(snapshot(), port=0)
    exporter = build(run_spec(metrics={"port": taken.port}), run_id=RUN_ID, attempt=0, rank=0)
    exporter.publish({"loss": 1.0}, step=1)
    exporter.close(1.0)
    taken.close(1.0)
    assert f"metrics.port: cannot be opened: Address already in use ({taken.port})" in caplog.text


def test_a_url_with_a_password_is_refused_without_repeating_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("cfe_hpc"), "propagate", True)
    spec = run_spec(metrics={"pushgateway": "http://me:s3cret@127.0.0.1:9"})
    exporter = build(spec, run_id=RUN_ID, attempt=0, rank=0)
    exporter.publish({"loss": 1.0}, step=1)
    exporter.close(1.0)
    assert "holds a user or a password" in caplog.text
    assert "s3cret" not in caplog.text


def test_opentelemetry_is_said_to_come_later(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("cfe_hpc"), "propagate", True)
    build(run_spec(metrics={"otlp_endpoint": "http://127.0.0.1:4318"}), run_id=RUN_ID, attempt=0, rank=0)
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.otlp_endpoint is set, but this version does not export OpenTelemetry yet: ignored"
    ]
