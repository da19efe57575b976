"""Limits of the live Slurm, as facts: partitions, nodes, QOS, accounts and reservations, as a user sees them now."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Amounts", "Facts", "Limits", "PartitionFacts", "Reservation", "Shape", "Use"]

Amounts = Mapping[str, float]
"""TRES to number: node, cpu, mem (MiB), billing, gres/gpu, gres/gpu:h200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A limit, and how much of it is used now."""

    limit: float
    used: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Nodes of a partition that are alike. `devices`: GRES, with and without its type, to the number of each node."""

    nodes: int
    cores: int
    memory_mib: int
    devices: Mapping[str, int]
    features: frozenset[str]
    usable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionFacts:
    """A partition. None, or inf, without a limit; an empty set of allowed names allows all."""

    name: str
    state: str
    nodes: frozenset[str]
    nodes_min: int
    nodes_max: float
    time_limit_s: float
    accounts_allowed: frozenset[str]
    accounts_denied: frozenset[str]
    qos_allowed: frozenset[str]
    qos_denied: frozenset[str]
    qos: str | None
    memory_max_mib: float
    needs_reservation: bool
    weights: Amounts
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one QOS, account or user may have. `kind` decides how squeue names what stands against a job.

    Attributes:
        owner: as messages name it: "QOS short".
        wall_s: longest time of one job; inf without.
        refuses: DenyOnLimit: sbatch refuses what exceeds it, rather than let it pend.
    """

    owner: str
    kind: str
    wall_s: float = math.inf
    job_max: Amounts = field(default_factory=dict)
    job_min: Amounts = field(default_factory=dict)
    user_max: Mapping[str, Use] = field(default_factory=dict)
    group_max: Mapping[str, Use] = field(default_factory=dict)
    jobs_max: Use | None = None
    submit_max: Use | None = None
    refuses: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Nodes that are kept for something between two times, in seconds since the epoch."""

    name: str
    start_s: float
    end_s: float
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was read.

    Attributes:
        enforced: limits of QOS and accounts hold at all.
        part_limits_refuse: EnforcePartLimits: sbatch refuses what exceeds a partition, rather than let it pend.
        memory_per_core_mib: for a job that asks for none; None where that is not how it is set.
        billing_max: a job is billed for its dearest resource alone.
        default_account: the user's; None when it has none, or that is not known.
        default_qos: of an account's jobs, by the account.
        allowed_qos: of an account's jobs, by the account; an account that is not there is not the user's.
        accounts: limits by account: those of the user in it first, then its own, then those above.
    """

    array_max: int | None
    enforced: bool
    part_limits_refuse: bool
    memory_per_core_mib: float | None
    billing_max: bool
    partitions: Mapping[str, PartitionFacts]
    qos: Mapping[str, Limits] = field(default_factory=dict)
    default_account: str | None = None
    default_qos: Mapping[str, str] = field(default_factory=dict)
    allowed_qos: Mapping[str, frozenset[str]] = field(default_factory=dict)
    accounts: Mapping[str, tuple[Limits, ...]] = field(default_factory=dict)
    reservations: tuple[Reservation, ...] = ()
