"""What a cluster looks like: its settings, its folder, its ports, and the text of every configuration file."""

from __future__ import annotations

import errno
import random
import socket
from dataclasses import dataclass, field
from pathlib import Path

from minislurm.errors import MinislurmError

__all__ = ["Folder", "Settings", "cgroup_conf", "free_port_block", "gres_conf", "slurm_conf", "slurmdbd_conf"]

GPUS_PER_NODE = 4
GAUDIS_PER_NODE = 8
CPUS_PER_NODE = 8
MEMORY_MIB = 8000

# Below the ports that the ranks of a run meet on (20000 and up) and those that Linux gives to outgoing connections
# (32768 and up), so that the port of a node that is down for a while is not taken by a stranger.
_FIRST_PORT, _LAST_PORT, _BLOCK = 10240, 19968, 64

MAX_NODES = _BLOCK - 3


@dataclass(frozen=True)
class Settings:
    """What `up` was asked for, and the ports it found."""

    nodes: int
    gaudi_nodes: int
    user_signal: bool
    memory_limits: bool = False
    cgroups: bool = False
    conf: dict[str, str] = field(default_factory=dict)
    first_port: int = 0
    password: str = ""

    @property
    def gpu_names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    @property
    def gaudi_names(self) -> list[str]:
        return [f"g{i}" for i in range(1, self.gaudi_nodes + 1)]

    @property
    def node_names(self) -> list[str]:
        return self.gpu_names + self.gaudi_names

    @property
    def slurmctld_port(self) -> int:
        return self.first_port

    @property
    def slurmdbd_port(self) -> int:
        return self.first_port + 1

    @property
    def mariadb_port(self) -> int:
        return self.first_port + 2

    def slurmd_port(self, node: str) -> int:
        return self.first_port + 3 + self.node_names.index(node)


@dataclass(frozen=True)
class Folder:
    """Where a cluster keeps everything it writes."""

    root: Path

    @property
    def record(self) -> Path:
        return self.root / "cluster.json"

    @property
    def slurm_conf(self) -> Path:
        return self.root / "etc" / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        return self.root / "run" / "munge"

    @property
    def munge_key(self) -> Path:
        return self.root / "etc" / "munge.key"

    @property
    def mariadb_socket(self) -> Path:
        return self.root / "run" / "sql"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    def log(self, daemon: str) -> Path:
        return self.logs / f"{daemon}.log"

    def output(self, daemon: str) -> Path:
        """What a daemon prints before it has opened its own log."""
        return self.logs / f"{daemon}.out"

    def devices(self, kind: str, count: int) -> list[Path]:
        return [self.root / "dev" / f"{kind}{i}" for i in range(count)]

    def spool(self, node: str) -> Path:
        return self.root / "spool" / node


def free_port_block(size: int) -> int:
    """The first of a block of TCP ports of which none is taken.

    The caller holds a lock until its daemons listen: then a block is seen as taken by any other cluster.

    Raises:
        MinislurmError: no block is free.
    """
    starts = list(range(_FIRST_PORT, _LAST_PORT, _BLOCK))
    random.shuffle(starts)
    for start in starts:
        if all(_is_free(start + i) for i in range(size)):
            return start
    raise MinislurmError(
        f"no {size} TCP ports in a row are free between {_FIRST_PORT} and {_LAST_PORT}; end what holds them"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def slurm_conf(settings: Settings, folder: Folder, hostname: str) -> str:
    """The text of slurm.conf."""
    root = folder.root
    parameters = "SlurmctldParameters=preempt_send_user_signal" if settings.user_signal else ""
    # Every second, or a step that takes too much has ended by itself before it is looked at.
    memory = "JobAcctGatherParams=OverMemoryKill\nJobAcctGatherFrequency=task=1" if settings.memory_limits else ""
    track, task = ("proctrack/cgroup", "task/cgroup") if settings.cgroups else ("proctrack/linuxproc", "task/none")
    lines = f"""
ClusterName=minislurm
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={settings.slurmctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder.munge_socket}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={folder.log("slurmctld")}
SlurmdLogFile={root}/log/slurmd-%n.log
PlugStackConfig={root}/etc/plugstack.conf
SlurmctldDebug=verbose
SlurmdDebug=verbose
{parameters}
{memory}
SlurmdParameters=config_overrides
ProctrackType={track}
TaskPlugin={task}
JobAcctGatherType=jobacct_gather/linux
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=100000,requeue_delay=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize=1001
KillWait=5
SlurmdTimeout=12
SlurmctldTimeout=60
ReturnToService=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={settings.slurmdbd_port}
AccountingStoragePass={folder.munge_socket}
AccountingStorageTRES=gres/gpu
GresTypes=gpu
""".strip().splitlines()
    lines = [line for line in lines if line and line.partition("=")[0] not in settings.conf]
    lines += [f"{key}={value}" for key, value in settings.conf.items()]
    nodes = [(name, f"gpu:h200:{GPUS_PER_NODE}") for name in settings.gpu_names]
    nodes += [(name, f"gpu:gaudi3:{GAUDIS_PER_NODE}") for name in settings.gaudi_names]
    for name, gres in nodes:
        lines.append(
            f"NodeName={name} NodeHostname={hostname} NodeAddr=127.0.0.1 Port={settings.slurmd_port(name)} "
            f"CPUs={CPUS_PER_NODE} RealMemory={MEMORY_MIB} Gres={gres} State=UNKNOWN"
        )
    gpu_nodes, gaudi_nodes = ",".join(settings.gpu_names), ",".join(settings.gaudi_names)
    times = "DefaultTime=30 MaxTime=1-00:00:00 State=UP"
    lines.append(f"PartitionName=gpu Nodes={gpu_nodes} Default=YES PriorityTier=10 PreemptMode=OFF {times}")
    lines.append(f"PartitionName=spot Nodes={gpu_nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 {times}")
    lines.append(f"PartitionName=spot-cancel Nodes={gpu_nodes} PriorityTier=1 PreemptMode=CANCEL GraceTime=10 {times}")
    if gaudi_nodes:
        lines.append(f"PartitionName=gaudi Nodes={gaudi_nodes} PriorityTier=10 PreemptMode=OFF {times}")
    return "\n".join(lines) + "\n"


def gres_conf(settings: Settings, folder: Folder) -> str:
    """The text of gres.conf; the files are device nodes, or Slurm sets no CUDA_VISIBLE_DEVICES."""
    lines = [
        f"NodeName={','.join(settings.gpu_names)} Name=gpu Type=h200 File={folder.root}/dev/gpu[0-{GPUS_PER_NODE - 1}]"
    ]
    if settings.gaudi_names:
        lines.append(
            f"NodeName={','.join(settings.gaudi_names)} Name=gpu Type=gaudi3 "
            f"File={folder.root}/dev/accel[0-{GAUDIS_PER_NODE - 1}]"
        )
    return "\n".join(lines) + "\n"


def slurmdbd_conf(settings: Settings, folder: Folder) -> str:
    """The text of slurmdbd.conf; it holds the database's password."""
    return f"""AuthType=auth/munge
AuthInfo=socket={folder.munge_socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={settings.slurmdbd_port}
SlurmUser=root
PidFile={folder.root}/run/slurmdbd.pid
LogFile={folder.log("slurmdbd")}
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={settings.mariadb_port}
StorageUser=slurm
StoragePass={settings.password}
StorageLoc=slurm
"""


def cgroup_conf(settings: Settings, version: tuple[int, int]) -> str:
    """The text of cgroup.conf: containers seldom own a cgroup tree. The key is unknown to versions before 23.11."""
    if settings.cgroups:
        return "CgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\nConstrainRAMSpace=yes\nConstrainSwapSpace=no\n"
    return "CgroupPlugin=disabled\n" if version >= (23, 11) else "\n"
