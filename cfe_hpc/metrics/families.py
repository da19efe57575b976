"""Every metric there is: one row each. What a job logs under another name goes to `cfe_hpc_logged{value="<name>"}`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILIES", "LABELS", "LOGGED", "Family", "family_of"]

LABELS = ("run_id", "job_name")
"""Labels of every sample. The run's id alone is unique; the job's name groups runs on a dashboard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One metric, a gauge.

    Attributes:
        key: the name under which values are published, as in heartbeat.ndjson.
        name: as Prometheus sees it, ending in its unit where it has one.
        unit: in words, for the documentation.
        help: one line.
    """

    key: str
    name: str
    unit: str
    help: str


FAMILIES: tuple[Family, ...] = (
    Family(key="step", name="cfe_hpc_step", unit="steps", help="Optimizer steps done, over all attempts."),
    Family(key="total_steps", name="cfe_hpc_total_steps", unit="steps", help="Optimizer steps of the whole run."),
    Family(key="attempt", name="cfe_hpc_attempt", unit="attempts", help="Allocations of the run before this one."),
    Family(key="loss", name="cfe_hpc_loss", unit="as the job logs it", help="Training loss of the last logged step."),
    Family(
        key="step_seconds",
        name="cfe_hpc_step_seconds",
        unit="seconds",
        help="Time of one step, mean since the last logged one.",
    ),
    Family(
        key="tokens_per_second",
        name="cfe_hpc_tokens_per_second",
        unit="tokens per second",
        help="Tokens trained on per second, all ranks together.",
    ),
    Family(
        key="checkpoint_seconds",
        name="cfe_hpc_checkpoint_seconds",
        unit="seconds",
        help="Time that the last checkpoint kept training waiting.",
    ),
    Family(
        key="checkpoint_bytes",
        name="cfe_hpc_checkpoint_bytes",
        unit="bytes",
        help="Size of the last checkpoint, all shards together.",
    ),
    Family(
        key="lost_steps",
        name="cfe_hpc_lost_steps",
        unit="steps",
        help="Steps done and not in the checkpoint that the next attempt resumed from.",
    ),
    Family(
        key="goodput",
        name="cfe_hpc_goodput_ratio",
        unit="ratio, 0 to 1",
        help="Time spent on steps that count, divided by time allocated.",
    ),
    Family(
        key="published",
        name="cfe_hpc_published_timestamp_seconds",
        unit="seconds since the epoch",
        help="When the values were last published; set by the exporter.",
    ),
)

LOGGED = Family(
    key="", name="cfe_hpc_logged", unit="as the job logs it", help="Any other value that the job logged, by name."
)

_BY_KEY = {family.key: family for family in FAMILIES}


def family_of(key: str) -> Family | None:
    """The row of a published value; None for one that belongs under LOGGED."""
    return _BY_KEY.get(key)
