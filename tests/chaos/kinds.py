"""The kinds of fault: one row each, with what a run must make of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KINDS", "Kind", "kind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a fault is, and what follows it.

    Attributes:
        reasons: of the `requeued` event, any of them; empty where the attempt goes on.
        grace: the attempt can save before it ends: no step may be lost.
        budget: key of [recovery] that it spends; None: none.
        holds: a run without anything left of that budget is held by it, and says so by the key.
        alone: it needs a cluster of the campaign's own: it hurts all runs there, or the cluster is of a special kind.
        node: it takes a node away for a while.
        trains: only a run of the shipped training can have it.
        prompt: it comes right when it is sent: how many steps are lost can be told from the schedule of saves.
    """

    name: str
    reasons: frozenset[str] = frozenset()
    grace: bool = True
    budget: str | None = None
    holds: bool = False
    alone: bool = False
    node: bool = False
    trains: bool = False
    prompt: bool = True


# A dead node breaks the others' connections, or Slurm tells them to stop when it has requeued the job by itself.
_NODE = frozenset({"node_failure", "communication", "requeued_already"})

KINDS: tuple[Kind, ...] = (
    Kind(name="preempt", reasons=frozenset({"preempted"}), budget="preemptions", holds=True),
    Kind(name="requeue", reasons=frozenset({"requeue_requested"})),
    Kind(name="scontrol-requeue", reasons=frozenset({"requeued_already"})),
    Kind(name="time-limit", reasons=frozenset({"time_limit"}), budget="timeouts", holds=True),
    Kind(name="kill-rank", reasons=frozenset({"failed"}), grace=False, budget="failures"),
    Kind(name="kill-slurmd", reasons=_NODE, grace=False, budget="node_failures", node=True, prompt=False),
    Kind(name="kill-node", reasons=_NODE, grace=False, budget="node_failures", node=True),
    Kind(name="stop-rank", reasons=frozenset({"hang"}), grace=False, budget="hangs", holds=True, prompt=False),
    Kind(name="nan", grace=False, budget="nans", holds=True, trains=True),
    Kind(name="memory", reasons=frozenset({"oom_host"}), grace=False, budget="host_ooms", alone=True, prompt=False),
    Kind(name="full-disk", alone=True),
    Kind(name="corrupt-shard", reasons=frozenset({"preempted"}), grace=False, budget="preemptions"),
    Kind(name="no-pushgateway", alone=True),
    Kind(name="no-controller", reasons=frozenset({"requeue_requested"}), alone=True),
)


def kind(name: str) -> Kind:
    """The row of that name."""
    return next(each for each in KINDS if each.name == name)
