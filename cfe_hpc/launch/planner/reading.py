"""What the live Slurm limits: partitions, nodes, QOS, accounts and reservations, as a user sees them now.

`sbatch --test-only` looks at nodes alone: on 22.05 it names a start time for jobs that exceed the time limit of their
partition, a limit of their QOS or account, or are not allowed there, which then pend for ever. So the limits are read
here, and judged by `planner.obstacles`.
"""

from __future__ import annotations

import getpass
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cfe_hpc.errors import SchedulerError
from cfe_hpc.launch.planner.facts import Facts, Limits, PartitionFacts, Reservation, Shape, Use
from cfe_hpc.process import CommandError, run
from cfe_hpc.ranks.nodelist import expand
from cfe_hpc.ranks.records import record
from cfe_hpc.sites.live import parse_weights
from cfe_hpc.units import epoch_s, parse_duration_s, parse_size_bytes

__all__ = ["parse_facts", "read_facts"]

_TIMEOUT_S = 15.0

_QOS_FIELDS = "name,flags,maxwall,maxtres,mintres,maxtrespu,grptres,maxjobspu,maxsubmitpu"
_ASSOCIATION_FIELDS = "account,partition,defaultqos,qos"
_SINFO_FIELDS = "%R|%D|%c|%m|%G|%f|%t"

# What sinfo adds to the state of a node that does not answer, is powered down, and so on.
_FLAGS = "*~#!%$@^-+"
_USABLE = frozenset({"idle", "alloc", "mix", "comp", "resv", "plnd", "blocked", "maint"})


def read_facts() -> Facts:
    """Ask the cluster that this machine belongs to: at most seven calls, whatever there is to plan.

    Raises:
        SchedulerError: Slurm's commands are missing, give no answer, or one that cannot be read.
    """
    user = getpass.getuser()
    config = _ask("scontrol", "show", "config")
    questions: dict[str, tuple[str, ...]] = {
        "partitions": ("scontrol", "show", "partition", "-o"),
        "shapes": ("sinfo", "-h", "-a", "-e", "-o", _SINFO_FIELDS),
        "reservations": ("scontrol", "show", "reservation", "-o"),
    }
    databases: dict[str, tuple[str, ...]] = {}
    if _enforced(config):
        questions["usage"] = ("scontrol", "show", "assoc_mgr", f"users={user}", "flags=assoc,qos", "-o")
        databases["qos"] = ("sacctmgr", "-nP", "show", "qos", f"format={_QOS_FIELDS}")
        databases["associations"] = (
            *("sacctmgr", "-nP", "show", "assoc", f"user={user}", f"cluster={_config(config).get('ClusterName', '')}"),
            f"format={_ASSOCIATION_FIELDS}",
        )
    # The controller gets one question after the other; the database is slow, and asked beside it.
    with ThreadPoolExecutor(2) as pool:
        slow = {name: pool.submit(_ask, *argv, optional=True) for name, argv in databases.items()}
        texts = {"config": config, **{name: _ask(*argv, optional=name == "usage") for name, argv in questions.items()}}
        texts |= {name: future.result() for name, future in slow.items()}
    try:
        return parse_facts(texts)
    except (KeyError, ValueError) as error:
        raise SchedulerError(f"scontrol: answers in words that this version does not know ({error!r})") from error


def _ask(*argv: str, optional: bool = False) -> str:
    try:
        return run(argv, timeout_s=_TIMEOUT_S).stdout
    except CommandError as error:
        # The database may be away while the controller is not: it goes on by what it remembers, and so do we. And
        # some sites keep to themselves what others use.
        if optional:
            return ""
        raise SchedulerError(f"{error}; ask from a machine that has Slurm's commands, when `sinfo` works") from error


def parse_facts(texts: Mapping[str, str]) -> Facts:
    """The facts in what scontrol, sinfo and sacctmgr printed, by what was asked for; see `read_facts`.

    Raises:
        KeyError: one of them lacks what every Slurm prints.
        ValueError: a number is none.
    """
    config = _config(texts["config"])
    shapes = _shapes(texts["shapes"])
    usage = texts.get("usage", "")
    associations = [line.split("|") for line in texts.get("associations", "").splitlines() if line.count("|") == 3]
    per_core = config.get("DefMemPerCPU", "")
    return Facts(
        array_max=int(config["MaxArraySize"]) if "MaxArraySize" in config else None,
        enforced=_enforced(texts["config"]),
        part_limits_refuse=config.get("EnforcePartLimits", "NO").upper() != "NO",
        memory_per_core_mib=float(per_core) if per_core.isdigit() else None,
        billing_max="MAX_TRES" in config.get("PriorityFlags", "").split(","),
        partitions={
            said["PartitionName"]: _partition(said, shapes.get(said["PartitionName"], ()))
            for said in _records(texts["partitions"])
        },
        qos={limits.owner.partition(" ")[2]: limits for limits in _qos(texts.get("qos", ""), usage)},
        default_account=_default_account(usage),
        default_qos={account: qos for account, partition, qos, _ in associations if qos and not partition},
        allowed_qos=_allowed_qos(associations),
        accounts=_accounts(usage),
        reservations=tuple(_reservations(texts.get("reservations", ""))),
    )


def _allowed_qos(associations: Iterable[Sequence[str]]) -> dict[str, frozenset[str]]:
    """By account; one may have an association for each partition, too."""
    found: dict[str, frozenset[str]] = {}
    for account, _, _, names in associations:
        found[account] = found.get(account, frozenset()).union(names.split(","))
    return found


def _enforced(config: str) -> bool:
    enforce = _config(config).get("AccountingStorageEnforce", "none").lower()
    return bool({"associations", "limits", "qos", "safe", "all"}.intersection(enforce.split(",")))


def _config(shown: str) -> dict[str, str]:
    lines = (line.partition("=") for line in shown.splitlines())
    return {key.strip(): value.strip() for key, equals, value in lines if equals and value.strip() != "(null)"}


def _records(shown: str) -> Iterator[dict[str, str]]:
    return filter(None, map(record, shown.splitlines()))


def _names(text: str | None) -> frozenset[str]:
    """Names of a list; none for ALL and what is not there."""
    return frozenset() if text in (None, "ALL", "(null)", "N/A", "") else frozenset(str(text).split(","))


def _limit(text: str | None) -> float:
    """A number; inf for UNLIMITED and what is not there."""
    return float(text) if text is not None and text.isdigit() else math.inf


def _wall_s(text: str | None) -> float:
    """Seconds of a limit on time, which scontrol gives in minutes when it is of an account; inf without."""
    try:
        return 60.0 * float(text) if text and text.isdigit() else parse_duration_s(text or "")
    except ValueError:
        return math.inf


def _partition(said: Mapping[str, str], shapes: tuple[Shape, ...]) -> PartitionFacts:
    nodes = said.get("Nodes", "")
    return PartitionFacts(
        name=said["PartitionName"],
        state=said["State"],
        nodes=frozenset(expand(nodes)) if nodes not in ("", "(null)") else frozenset(),
        nodes_min=int(said.get("MinNodes", "0")),
        nodes_max=_limit(said.get("MaxNodes")),
        time_limit_s=_wall_s(said.get("MaxTime")),
        accounts_allowed=_names(said.get("AllowAccounts")),
        accounts_denied=_names(said.get("DenyAccounts")),
        qos_allowed=_names(said.get("AllowQos")),
        qos_denied=_names(said.get("DenyQos")),
        qos=None if said.get("QoS", "N/A") == "N/A" else said["QoS"],
        memory_max_mib=_limit(said.get("MaxMemPerNode")),
        needs_reservation=said.get("ReqResv") == "YES",
        weights=parse_weights(said.get("TRESBillingWeights", "")),
        shapes=shapes,
    )


def _shapes(shown: str) -> dict[str, tuple[Shape, ...]]:
    found: dict[str, tuple[Shape, ...]] = {}
    for line in filter(None, map(str.strip, shown.splitlines())):
        partition, nodes, cores, memory, gres, features, state = line.split("|")
        shape = Shape(
            nodes=int(nodes),
            cores=int(cores.rstrip("+")),
            memory_mib=int(memory.rstrip("+")),
            devices=_devices(gres),
            features=_names(features),
            usable=state.rstrip(_FLAGS) in _USABLE and not state.endswith("*"),
        )
        found[partition] = (*found.get(partition, ()), shape)
    return found


def _devices(text: str) -> dict[str, int]:
    """{"gpu": 4, "gpu:h200": 4} of "gpu:h200:4(S:0-1)"."""
    found: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", text).split(","):
        name, _, rest = entry.partition(":")
        kind, _, number = rest.rpartition(":")
        if number.isdigit():
            for key in {name, f"{name}:{kind}" if kind else name}:
                found[key] = found.get(key, 0) + int(number)
    return found


def _amounts(text: str) -> dict[str, float]:
    """TRES to number of "node=2,mem=4G,gres/gpu=4"; memory in MiB."""
    found = {}
    for entry in filter(None, text.split(",")):
        name, _, number = entry.partition("=")
        if re.fullmatch(r"[\d.]+[KMGTP]?", number, re.IGNORECASE):
            unitless = number[-1].isdigit()
            found[name] = float(number) if name != "mem" or unitless else parse_size_bytes(number) / 2**20
    return found


def _uses(text: str) -> dict[str, Use]:
    """TRES to limit and use of "cpu=N(0),node=1(3)", of those that have a limit."""
    entries = re.findall(r"([^,=]+)=(\d+)\((\d+)\)", text)
    return {name: Use(limit=float(limit), used=float(used)) for name, limit, used in entries}


def _use(text: str) -> Use | None:
    match = re.fullmatch(r"(\d+)\((\d+)\)", text)
    return None if match is None else Use(limit=float(match[1]), used=float(match[2]))


def _qos(limits: str, usage: str) -> Iterator[Limits]:
    used = {said["QOS"].partition("(")[0]: said for said in _records(usage) if "QOS" in said}
    blocks = dict(re.findall(r"^QOS=([^(]+)\(.*User Limits= *\S+?=\{([^}]*)\}", usage, re.MULTILINE))
    for line in filter(None, limits.splitlines()):
        name, flags, wall, job_max, job_min, user_max, group, jobs, submit = line.split("|")
        mine = record(blocks.get(name, ""))
        now = _uses(mine.get("MaxTRESPU", ""))
        yield Limits(
            owner=f"QOS {name}",
            kind="QOS",
            wall_s=_wall_s(wall),
            job_max=_amounts(job_max),
            job_min=_amounts(job_min),
            user_max={key: now.get(key, Use(limit=limit)) for key, limit in _amounts(user_max).items()},
            group_max=_uses(used.get(name, {}).get("GrpTRES", ""))
            or {key: Use(limit=limit) for key, limit in _amounts(group).items()},
            jobs_max=_use(mine.get("MaxJobsPU", "")) or (Use(limit=float(jobs)) if jobs else None),
            submit_max=_use(mine.get("MaxSubmitJobsPU", "")) or (Use(limit=float(submit)) if submit else None),
            refuses="DenyOnLimit" in flags.split(","),
        )


def _default_account(usage: str) -> str | None:
    mine = (said for said in _records(usage) if said.get("UserName"))
    return next((said["Account"] for said in mine if said.get("DefAssoc") == "Yes"), None)


def _accounts(usage: str) -> dict[str, tuple[Limits, ...]]:
    """Limits that hold for the user's jobs of each account: its own there, the account's, and those above it."""
    said = [found for found in _records(usage) if "Account" in found]
    own = {found["Account"]: found for found in said if found.get("UserName")}
    above = {found["Account"]: found for found in said if not found.get("UserName")}
    found: dict[str, tuple[Limits, ...]] = {}
    for account, mine in own.items():
        chain = [_association(mine, f"user in account {account}")]
        name: str | None = account
        while name in above and len(chain) <= len(above):
            chain.append(_association(above[name], f"account {name}"))
            name = above[name].get("ParentAccount", "").partition("(")[0]
        found[account] = tuple(chain)
    return found


def _association(said: Mapping[str, str], owner: str) -> Limits:
    return Limits(
        owner=owner,
        kind="Assoc",
        wall_s=_wall_s(said.get("MaxWallPJ")),
        job_max=_amounts(said.get("MaxTRESPJ", "")),
        group_max=_uses(said.get("GrpTRES", "")),
        jobs_max=_use(said.get("MaxJobs", "")),
        submit_max=_use(said.get("MaxSubmitJobs", "")),
    )


def _reservations(shown: str) -> Iterator[Reservation]:
    for said in _records(shown):
        start_s, end_s = epoch_s(said.get("StartTime")), epoch_s(said.get("EndTime"))
        nodes = said.get("Nodes", "")
        if "ReservationName" in said and start_s is not None and end_s is not None and nodes not in ("", "(null)"):
            yield Reservation(
                name=said["ReservationName"],
                start_s=start_s,
                end_s=end_s,
                nodes=frozenset(expand(nodes)),
            )
