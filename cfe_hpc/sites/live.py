"""What a live Slurm says of itself: four calls of scontrol and one of sacctmgr, read into plain facts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from cfe_hpc.config.site import Preemption
from cfe_hpc.errors import SchedulerError
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.records import record
from cfe_hpc.units import parse_duration_s

__all__ = [
    "Kind",
    "LiveCluster",
    "LivePartition",
    "LiveQos",
    "Mode",
    "parse_cluster",
    "parse_weights",
    "read_cluster",
]

Mode = Literal["off", "requeue", "cancel", "suspend"]

_TIMEOUT_S = 60.0
_QOS_FIELDS = "name,preempt,preemptmode,gracetime,maxwall,mintres,maxtres,maxjobspu,maxsubmitpu,usagefactor"

_CONFIG_LINE = re.compile(r"^(\S[^=]*?)\s*= ?(.*?)\s*$")
_CONFIG_DURATION = re.compile(r"(\d+) ?(sec|min|hours?|days?)?")
_WEIGHT = re.compile(r"([^=]+)=(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)([KMGTP]?)", re.IGNORECASE)
_GIB_IN = {"K": 2.0**20, "M": 2.0**10, "": 2.0**10, "G": 1.0, "T": 2.0**-10, "P": 2.0**-20}
_UNIT_S = {"sec": 1.0, "min": 60.0, "hour": 3600.0, "hours": 3600.0, "day": 86_400.0, "days": 86_400.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of node: what a job may ask of it.

    Attributes:
        gres: its devices as a job spells them, without their number ("gpu:h200"); None without any.
        devices: of a node; 0 without a GRES.
    """

    gres: str | None
    devices: int
    cores: int
    memory_mib: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePartition:
    """A partition. Times are seconds, None without a limit.

    Attributes:
        open: jobs of plain users start there: it is up, and not root's alone.
        nodes_max: most nodes of one job; nodes_min the fewest.
        exclusive: a job gets whole nodes.
        memory_default_mib: of a node, for a job that asks for none; memory_per_core_default_mib: for each core of one.
        memory_max_mib: most of a node that a job may ask for.
        allowed_accounts: whose jobs start there, by account, and allowed_qos by QOS; None where all do.
        billing_weights: by TRES in small letters; `mem` for each GiB.
        needs_reservation: only jobs of a reservation start there.
        over_time_limit_s: its own OverTimeLimit; None where the cluster's holds, or there is none.
        kinds: its kinds of node and how many there are of each, the most frequent first.
    """

    name: str
    default: bool
    open: bool
    mode: Mode
    grace_s: float
    time_limit_s: float | None
    default_time_s: float | None
    nodes_min: int
    nodes_max: int
    exclusive: bool
    memory_default_mib: int | None
    memory_per_core_default_mib: int | None
    memory_max_mib: int | None
    allowed_accounts: tuple[str, ...] | None
    allowed_qos: tuple[str, ...] | None
    billing_weights: Mapping[str, float]
    needs_reservation: bool
    over_time_limit_s: float | None
    kinds: tuple[tuple[Kind, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveQos:
    """A quality of service.

    Attributes:
        preempts: names of those whose jobs its own may preempt.
        mode: None where the cluster's holds.
        nodes_min: fewest nodes of one job; nodes_max the most, devices_max the most devices; None without a limit.
        jobs_max: most jobs of a user that run at a time; submit_max those in the queue as well.
        cost_factor: what usage is multiplied by.
    """

    name: str
    preempts: frozenset[str]
    mode: Mode | None
    grace_s: float
    time_limit_s: float | None
    nodes_min: int | None
    nodes_max: int | None
    devices_max: int | None
    jobs_max: int | None
    submit_max: int | None
    cost_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCluster:
    """A cluster. None: this Slurm does not say.

    Attributes:
        preempt_type: "none", "partition_prio" or "qos".
        user_signal: a preempted job gets the signal of its own --signal instead of TERM.
        array_max: MaxArraySize: indices end one below.
        billing_max: a job is billed for its dearest resource alone (MAX_TRES); None where nothing is weighted.
        associations: jobs need an account that their user belongs to.
        features: what nodes of a kind offer to --constraint, if only some of them.
        reservations: their names; None where the site hides them.
        qos: None where sacctmgr gave no answer; `qos_refusal` says why.
    """

    name: str
    version: str
    preempt_type: str
    mode: Mode
    user_signal: bool
    kill_wait_s: float
    proctrack: str
    signal_children: bool | None
    job_requeue: bool
    max_batch_requeue: int | None
    over_time_limit_s: float | None
    array_max: int
    billing_max: bool | None
    associations: bool
    features: Mapping[Kind, tuple[str, ...]]
    reservations: tuple[str, ...] | None
    partitions: tuple[LivePartition, ...]
    qos: tuple[LiveQos, ...] | None
    qos_refusal: str = ""

    def preemption(self, partition: LivePartition) -> Preemption:
        """What is done to a job of this partition that names no QOS.

        With PreemptType=preempt/qos that is what is done to the QOS `normal`, where it can be read: the default of
        most sites; which one is a user's own, accounting alone knows.
        """
        if self.preempt_type == "none":
            return Preemption()
        if self.preempt_type != "qos":
            return self._preemption(partition.mode, partition.grace_s)
        if self.qos is None:
            return self._preemption(self.mode, 0.0)
        normal = next((qos for qos in self.qos if qos.name == "normal"), None)
        return Preemption() if normal is None else self.qos_preemption(normal)

    def qos_preemption(self, qos: LiveQos) -> Preemption:
        """What is done to a job of this QOS, where PreemptType=preempt/qos: nothing, unless another may preempt it."""
        if not any(qos.name in other.preempts for other in self.qos or ()):
            return Preemption()
        return self._preemption(qos.mode or self.mode, qos.grace_s)

    def _preemption(self, mode: Mode, grace_s: float) -> Preemption:
        if mode == "off":
            return Preemption()
        return Preemption(mode=mode, grace=grace_s, user_signal=self.user_signal)


def read_cluster() -> LiveCluster:
    """Ask the cluster that this machine belongs to.

    Raises:
        SchedulerError: Slurm's commands are missing, give no answer, or one that cannot be read.
    """
    config = _ask("scontrol", "show", "config")
    partitions = _ask("scontrol", "show", "partition", "-o")
    nodes = _ask("scontrol", "show", "node", "-o")
    reservations = _ask("scontrol", "show", "reservation", "-o")
    refusal = ""
    try:
        qos: str | None = run(["sacctmgr", "-nP", "show", "qos", f"format={_QOS_FIELDS}"], timeout_s=_TIMEOUT_S).stdout
    except CommandError as error:  # no accounting, or not for everyone
        qos, refusal = None, str(error)
    try:
        return replace(parse_cluster(config, partitions, nodes, reservations, qos), qos_refusal=refusal)
    except (KeyError, ValueError) as error:
        raise SchedulerError(f"scontrol: answers in words that this version does not know ({error!r})") from error


def _ask(*argv: str) -> str:
    try:
        return run(argv, timeout_s=_TIMEOUT_S).stdout
    except CommandError as error:
        raise SchedulerError(f"{error}; ask from a machine that has Slurm's commands, when `sinfo` works") from error


def parse_cluster(config: str, partitions: str, nodes: str, reservations: str, qos: str | None) -> LiveCluster:
    """The facts in the output of `scontrol show config`, `show partition -o`, `show node -o`, `show reservation -o`
    and of sacctmgr.

    Raises:
        KeyError: one of them lacks what every Slurm prints.
        ValueError: a number is none.
    """
    said = _config(config)
    parameters = f"{said.get('SlurmctldParameters', '')},{said.get('PreemptParameters', '')}".split(",")
    children = said.get("SignalChildrenProcesses")
    batch_requeue = said.get("MaxBatchRequeue")
    kinds, features = _kinds(nodes)
    found = tuple(_partition(shown, kinds, said) for shown in _records(partitions))
    weighted = any(partition.billing_weights for partition in found)
    return LiveCluster(
        name=said["ClusterName"],
        version=said["SLURM_VERSION"],
        preempt_type=said["PreemptType"].rpartition("/")[2],
        mode=_mode(said["PreemptMode"]),
        # The first until 22.05, the second since 23.02.
        user_signal=not {"preempt_send_user_signal", "send_user_signal"}.isdisjoint(parameters),
        kill_wait_s=_config_duration_s(said["KillWait"]) or 0.0,
        proctrack=said["ProctrackType"].rpartition("/")[2],
        signal_children=None if children is None else children.lower() in ("yes", "true", "1"),
        job_requeue=said["JobRequeue"] != "0",
        max_batch_requeue=None if batch_requeue is None else int(batch_requeue),
        over_time_limit_s=_config_duration_s(said.get("OverTimeLimit", "")),
        array_max=int(said["MaxArraySize"]),
        billing_max="MAX_TRES" in said.get("PriorityFlags", "").split(",") if weighted else None,
        associations="associations" in said.get("AccountingStorageEnforce", "").lower(),
        features=features,
        reservations=None if "reservations" in said.get("PrivateData", "").lower() else _reserved(reservations),
        partitions=found,
        qos=None if qos is None else tuple(_qos(line) for line in qos.splitlines() if line.strip()),
    )


def _config(shown: str) -> dict[str, str]:
    """Key to value; of a key that comes again in a later section the first."""
    found: dict[str, str] = {}
    for line in shown.splitlines():
        match = _CONFIG_LINE.match(line)
        if match and match[2] != "(null)":
            found.setdefault(match[1], match[2])
    return found


def _records(shown: str) -> Iterator[dict[str, str]]:
    """One table a line."""
    return filter(None, map(record, shown.splitlines()))


def _reserved(shown: str) -> tuple[str, ...]:
    names = (said.get("ReservationName") for said in _records(shown))
    return tuple(name for name in names if name is not None)


def _config_duration_s(text: str) -> float | None:
    """Seconds of "30 sec" or "2 min"; None for UNLIMITED and what is no duration."""
    match = _CONFIG_DURATION.fullmatch(text.strip())
    return None if match is None else int(match[1]) * _UNIT_S[match[2] or "sec"]


def _limit_s(text: str | None) -> float | None:
    """Seconds of a time limit; None for UNLIMITED, NONE and nothing."""
    try:
        return parse_duration_s(text or "")
    except ValueError:
        return None


def _mode(text: str) -> Mode:
    """Our word for a PreemptMode, which may be a list: "GANG,SUSPEND". GANG alone shares time, it preempts nobody."""
    words = text.upper().split(",")
    order: tuple[Mode, ...] = ("suspend", "requeue", "cancel")
    return next((mode for mode in order if mode.upper() in words), "off")


def _partition(said: Mapping[str, str], kinds: Mapping[str, Counter[Kind]], config: Mapping[str, str]) -> LivePartition:
    """A partition as it was shown; what it leaves open is the cluster's."""
    total, most = int(said["TotalNodes"]), said.get("MaxNodes", "UNLIMITED")
    over = said.get("OverTimeLimit", "NONE")
    # One of the two, the partition's own or else the cluster's.
    per_node, per_core = (_number(said.get(key)) for key in ("DefMemPerNode", "DefMemPerCPU"))
    if per_node is None and per_core is None:
        per_node, per_core = (_number(config.get(key)) for key in ("DefMemPerNode", "DefMemPerCPU"))
    return LivePartition(
        name=said["PartitionName"],
        default=said.get("Default") == "YES",
        open=said.get("State", "UP") in ("UP", "DRAIN") and said.get("RootOnly") != "YES",
        mode=_mode(said["PreemptMode"]),
        grace_s=float(said.get("GraceTime", "0")),
        time_limit_s=_limit_s(said.get("MaxTime")),
        default_time_s=_limit_s(said.get("DefaultTime")),
        nodes_min=max(1, int(said.get("MinNodes", "0"))),
        nodes_max=min(total, int(most)) if most.isdigit() else total,
        exclusive=said.get("OverSubscribe") == "EXCLUSIVE" or config.get("SelectType") == "select/linear",
        memory_default_mib=per_node,
        memory_per_core_default_mib=per_core,
        memory_max_mib=_number(said.get("MaxMemPerNode"), config.get("MaxMemPerNode")),
        allowed_accounts=_names(said.get("AllowAccounts", "ALL")),
        allowed_qos=_names(said.get("AllowQos", "ALL")),
        billing_weights=parse_weights(said.get("TRESBillingWeights", "")),
        needs_reservation=said.get("ReqResv") == "YES",
        over_time_limit_s=60.0 * int(over) if over.isdigit() else None,
        kinds=tuple(kinds.get(said["PartitionName"], Counter()).most_common()),
    )


def _number(*texts: str | None) -> int | None:
    """The first of these that is a number: not UNLIMITED, not left out."""
    return next((int(text) for text in texts if text is not None and text.isdigit()), None)


def _names(text: str) -> tuple[str, ...] | None:
    return None if text == "ALL" else tuple(filter(None, text.split(",")))


def parse_weights(text: str) -> dict[str, float]:
    """{"cpu": 1.0, "mem": 0.25} of "CPU=1.0,Mem=0.25G": memory is weighted for each MiB, or for the unit named."""
    found: dict[str, float] = {}
    for entry in text.split(","):
        match = _WEIGHT.fullmatch(entry.strip())
        if match:
            name, weight = match[1].lower(), float(match[2])
            found[name] = weight * _GIB_IN[match[3].upper()] if name == "mem" else weight
    return found


def _limit(text: str, tres: str) -> int | None:
    """4 of "cpu=64,gres/gpu=8,node=4" for `node`; None where it limits no such thing."""
    values = dict(entry.partition("=")[::2] for entry in text.split(","))
    return int(values[tres]) if values.get(tres, "").isdigit() else None


def _kinds(nodes: str) -> tuple[dict[str, Counter[Kind]], dict[Kind, tuple[str, ...]]]:
    """How many nodes of each kind a partition has, by its name; and the features that nodes of a kind have."""
    found: dict[str, Counter[Kind]] = {}
    features: dict[Kind, dict[str, None]] = {}
    for said in _records(nodes):
        gres, devices = _gres(said.get("Gres", ""))
        kind = Kind(
            gres=gres,
            devices=devices,
            # Without those that Slurm keeps for itself.
            cores=int(said.get("CPUEfctv", said["CPUTot"])),
            memory_mib=int(said["RealMemory"]) - int(said.get("MemSpecLimit", "0")),
        )
        offered = said.get("AvailableFeatures", "(null)")
        features.setdefault(kind, {}).update(dict.fromkeys(() if offered == "(null)" else offered.split(",")))
        for partition in filter(None, said.get("Partitions", "").split(",")):
            found.setdefault(partition, Counter())[kind] += 1
    return found, {kind: tuple(names) for kind, names in features.items()}


def _gres(text: str) -> tuple[str | None, int]:
    """("gpu:h200", 4) of "gpu:h200:4(S:0-1),shard:16": the first GRES that is an accelerator, and its number."""
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        name, _, rest = entry.partition(":")
        if name not in ("gpu", "hpu"):
            continue
        kind, _, number = rest.rpartition(":")
        return (f"{name}:{kind}" if kind else name), int(number or "1")
    return None, 0


def _qos(line: str) -> LiveQos:
    name, preempts, mode, grace, wall, least, most, jobs, submit, factor = line.rsplit("|", 9)
    return LiveQos(
        name=name,
        preempts=frozenset(filter(None, preempts.split(","))),
        mode=None if mode.lower() in ("", "cluster") else _mode(mode),
        grace_s=_limit_s(grace) or 0.0,
        time_limit_s=_limit_s(wall),
        nodes_min=_limit(least, "node"),
        nodes_max=_limit(most, "node"),
        devices_max=_limit(most, "gres/gpu"),
        jobs_max=_number(jobs),
        submit_max=_number(submit),
        cost_factor=float(factor or 1),
    )
