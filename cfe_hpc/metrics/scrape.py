"""A port of rank 0 for Prometheus to scrape."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, start_http_server

from cfe_hpc.errors import CfeError
from cfe_hpc.metrics.snapshot import Snapshot

__all__ = ["ScrapeExporter"]

logger = logging.getLogger(__name__)


class ScrapeExporter:
    """Serves the newest values at /metrics from a thread of its own. See metrics.exporter.Exporter."""

    def __init__(self, snapshot: Snapshot, *, port: int, address: str = "0.0.0.0") -> None:
        """Open the port; 0 takes a free one, named in `port`.

        Raises:
            CfeError: the port is taken, or not this user's to open.
        """
        self._snapshot = snapshot
        registry = CollectorRegistry()
        registry.register(snapshot)
        try:
            self._server, self._thread = start_http_server(port, addr=address, registry=registry)
        except OSError as error:
            remedy = "choose another metrics.port" if error.errno == errno.EADDRINUSE else "check metrics.port"
            raise CfeError(f"metrics.port: cannot be opened: {error.strerror} ({port}); {remedy}") from error
        self.port: int = self._server.server_port
        logger.info("serving metrics on port %d", self.port)

    def publish(self, values: Mapping[str, float], *, step: int) -> None:
        self._snapshot.update(values, step=step)

    def close(self, timeout_s: float) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout_s)
