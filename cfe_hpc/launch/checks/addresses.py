"""Checks of ports and addresses."""

from __future__ import annotations

from collections.abc import Iterator

from cfe_hpc.errors import Problem
from cfe_hpc.launch.checks.facts import Facts

__all__ = ["not_yet"]


def not_yet(facts: Facts) -> Iterator[Problem]:
    endpoint = facts.job.metrics.otlp_endpoint
    if endpoint is not None:
        what, remedy = "this version does not export OpenTelemetry", "use pushgateway or port"
        yield facts.problem("job.metrics.otlp_endpoint", what, remedy, endpoint)
