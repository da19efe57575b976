"""The newest values of a run, written by the training thread and read by exporters' threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cfe_hpc.metrics.families import LABELS, LOGGED, Family, family_of

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

__all__ = ["Snapshot"]

# A job that makes up a new name every step would grow the exposition without end.
_LOGGED_NAMES_MAX = 256


class Snapshot:
    """The newest value of everything published. A prometheus_client collector; safe between threads."""

    def __init__(self, *, run_id: str, job_name: str, attempt: int) -> None:
        self._labels = dict(zip(LABELS, (run_id, job_name), strict=True))
        self._values: dict[str, float] = {"attempt": float(attempt)}
        self._logged = 0
        # Held for microseconds on both sides, never during input or output.
        self._lock = threading.Lock()

    def update(self, values: Mapping[str, float], *, step: int) -> None:
        """Take newer values; those not named keep their last one."""
        with self._lock:
            for key, value in values.items():
                if key not in self._values and family_of(key) is None:
                    if self._logged >= _LOGGED_NAMES_MAX:
                        continue
                    self._logged += 1
                self._values[key] = value
            self._values["step"] = step
            self._values["published"] = time.time()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The families that have a value, each with its sample; prometheus_client calls it."""
        from prometheus_client.core import GaugeMetricFamily

        with self._lock:
            values = dict(self._values)
        logged = self._gauge(GaugeMetricFamily, LOGGED, (*LABELS, "value"))
        for key, value in values.items():
            family = family_of(key)
            if family is None:
                logged.add_metric((*self._labels.values(), key), value)
            else:
                gauge = self._gauge(GaugeMetricFamily, family, LABELS)
                gauge.add_metric(tuple(self._labels.values()), value)
                yield gauge
        if logged.samples:
            yield logged

    @staticmethod
    def _gauge(make: type[GaugeMetricFamily], family: Family, labels: tuple[str, ...]) -> GaugeMetricFamily:
        return make(family.name, family.help, labels=labels)
