"""Fixtures for all tests: a quiet environment, the real Slurm, a real Pushgateway."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster, why_impossible

# Cases of shared clusters stand outside of test files; their asserts are to tell as much.
pytest.register_assert_rewrite("day_cases", "recovery_cases", "spine")


@pytest.fixture(scope="session", autouse=True)
def _quiet_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the caller's shell decides a test, and nothing stays behind in the machine's temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("CFE_", "SLURM", "SBATCH_", "MINISLURM_"))]:
            patch.delenv(name)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session")
def cluster(_quiet_environment: None) -> Iterator[Cluster]:
    """The real Slurm of this session (mark the test `slurm`); what a test leaves in it is cleared after that test."""
    running = Cluster.start()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(autouse=True)
def _tidy_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    if "cluster" not in request.fixturenames:
        yield
        return
    running: Cluster = request.getfixturevalue("cluster")
    before = running.job_ids()
    yield
    running.tidy(keep=before)


@dataclass(frozen=True)
class Pushgateway:
    """A Pushgateway of our own. `process` is there to be stopped or killed."""

    url: str
    process: subprocess.Popen[bytes]

    def metrics(self) -> str:
        """Everything it would show to Prometheus."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            return str(answer.read(), "utf-8")


@pytest.fixture
def pushgateway() -> Iterator[Pushgateway]:
    """A real prometheus-pushgateway on a free port of the loopback interface, empty."""
    program = shutil.which("prometheus-pushgateway")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("prometheus-pushgateway is not installed")
        pytest.skip("prometheus-pushgateway is not installed (scripts/test installs it)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    # Debian's keeps what it got in one file for all, and begins with it.
    argv = [program, f"--web.listen-address={address}", "--persistence.file="]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        gateway = Pushgateway(f"http://{address}", process)
        _wait_until_ready(gateway)
        yield gateway
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(gateway: Pushgateway) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            gateway.metrics()
            return
        except (urllib.error.URLError, ConnectionError):
            if gateway.process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


# The real-Slurm tests: skipped where they cannot run, but never in CI; counted; explained when they fail.


_WITH_THE_REST = {"test_day_slurm.py", "test_planner_slurm.py", "test_stops_slurm.py"}
"""Files that need Slurm, on clusters of their own, and go to the worker that is done sooner."""


@functools.cache
def _needs_slurm(path: Path) -> bool:
    return path.name not in _WITH_THE_REST and "pytest.mark.slurm" in path.read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs Slurm comes first: it takes longest, and mostly waits."""
    items.sort(key=lambda item: not _needs_slurm(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several workers each gets whole files: what a file sets up is set up once. One gets all that need Slurm."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = str(super()._split_scope(nodeid))
            return "slurm" if _needs_slurm(config.rootpath / path) else path

    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("slurm") is not None and (reason := why_impossible()) is not None:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.get_closest_marker("slurm") is None:
        return report
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"the real-Slurm tests must run in CI; this one was skipped: {report.longreprtext}"
    running = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and running is not None:
        report.sections.append(("the cluster when the test failed", running.diagnosis()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = [report for reports in terminalreporter.stats.values() for report in reports]
    reports = [each for each in found if isinstance(each, pytest.TestReport) and "slurm" in each.keywords]
    ran = {each.nodeid for each in reports if each.when == "call" and not each.skipped}
    skipped = {each.nodeid for each in reports} - ran
    terminalreporter.write_line(f"real-Slurm tests: {len(ran)} ran, {len(skipped)} skipped")
