"""The one interface between a run and whatever shows its figures. Training never waits for it and never fails by it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from importlib.util import find_spec
from typing import Protocol

from cfe_hpc.config.run import RunSpec
from cfe_hpc.errors import CfeError

__all__ = ["Exporter", "NullExporter", "build", "withdraw"]

logger = logging.getLogger(__name__)


class Exporter(Protocol):
    """Somewhere to send a run's figures."""

    def publish(self, values: Mapping[str, float], *, step: int) -> None:
        """Take the newest values; see metrics.families for their names. Returns at once; never raises.

        Args:
            values: those that are new; the others keep their last value.
            step: steps done.
        """

    def close(self, timeout_s: float) -> None:
        """Take the run's figures back from wherever they would outlive it. Never raises.

        Args:
            timeout_s: seconds it may take; a gateway that does not answer in time keeps its group.
        """


class NullExporter:
    """Sends nothing anywhere."""

    def publish(self, values: Mapping[str, float], *, step: int) -> None:
        return None

    def close(self, timeout_s: float) -> None:
        return None


class _Several:
    """Exporters in one."""

    def __init__(self, exporters: Sequence[Exporter]) -> None:
        self._exporters = exporters

    def publish(self, values: Mapping[str, float], *, step: int) -> None:
        for exporter in self._exporters:
            exporter.publish(values, step=step)

    def close(self, timeout_s: float) -> None:
        for exporter in self._exporters:
            exporter.close(timeout_s)


def build(spec: RunSpec, *, run_id: str, attempt: int, rank: int) -> Exporter:
    """The exporter that a run's [metrics] ask for; one that does nothing on ranks other than 0, or when none is.

    Never raises: a run that waited days for its nodes does not die of its dashboard. What is wrong is logged once.
    Side effects: starts a thread, and opens a port when `metrics.port` is given.
    """
    wanted = spec.job.metrics
    if rank != 0:
        return NullExporter()
    if wanted.otlp_endpoint:
        logger.warning("metrics.otlp_endpoint is set, but this version does not export OpenTelemetry yet: ignored")
    if not wanted.pushgateway and wanted.port is None:
        return NullExporter()
    if find_spec("prometheus_client") is None:
        logger.warning('no metrics: prometheus_client is not installed; run: pip install "cfe-hpc[train]"')
        return NullExporter()
    from cfe_hpc.metrics.pushgateway import PushgatewayExporter
    from cfe_hpc.metrics.scrape import ScrapeExporter
    from cfe_hpc.metrics.snapshot import Snapshot

    exporters: list[Exporter] = []
    try:
        if wanted.port is not None:
            own = Snapshot(run_id=run_id, job_name=spec.job.name, attempt=attempt)
            exporters.append(ScrapeExporter(own, port=wanted.port))
        if wanted.pushgateway:
            own = Snapshot(run_id=run_id, job_name=spec.job.name, attempt=attempt)
            exporters.append(PushgatewayExporter(wanted.pushgateway, own, run_id=run_id))
    except (CfeError, OSError) as error:
        logger.warning("no metrics from here: %s", error)
    return exporters[0] if len(exporters) == 1 else _Several(exporters)


def withdraw(spec: RunSpec, *, run_id: str, timeout_s: float) -> None:
    """Take back what a run left on its Pushgateway, for ranks that were killed before they could. Never raises.

    For whoever outlives the ranks: the supervisor, the batch script, `cancel`.
    """
    url = spec.job.metrics.pushgateway
    if not url or find_spec("prometheus_client") is None:
        return
    from cfe_hpc.metrics.pushgateway import delete_group

    try:
        delete_group(url, run_id, timeout_s=timeout_s)
    except (CfeError, OSError, HTTPException) as error:
        logger.warning("the Pushgateway may still hold the group of %s: %s", run_id, error)
