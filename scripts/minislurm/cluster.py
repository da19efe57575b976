"""One cluster: brought up, looked at, hurt on purpose, and taken down."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from minislurm import cgroups, layout
from minislurm.errors import MinislurmError
from minislurm.layout import Folder, Settings
from minislurm.processes import Process, descendants, end, holders_of, spawn, wait_until

__all__ = ["Cluster"]

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sinfo", "sacctmgr", "munged", "mariadbd", "mariadb-install-db")
PORTS_LOCK = Path("/run/minislurm-ports.lock")
PACKAGES = "slurm-wlm slurmdbd munge mariadb-server"

# A unix socket's path ends at 107 characters, and slurmstepd's is <root>/spool/<node>/<node>_<job>.<step>.
_MAX_ROOT_LENGTH = 68


class Cluster:
    """A cluster in a folder of its own. Methods that change it take the folder's lock."""

    def __init__(self, root: Path) -> None:
        self.folder = Folder(root.absolute())
        self.settings = Settings(nodes=0, gaudi_nodes=0, user_signal=False)
        self.daemons: dict[str, Process] = {}
        path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"
        self.env = {"PATH": path, "SLURM_CONF": str(self.folder.slurm_conf), "LC_ALL": "C.UTF-8"}

    # What scripts/slurm calls

    def up(self, wanted: Settings, *, timeout_s: float) -> str:
        """Bring the cluster up, or complete one that is half there; what to tell the user.

        Raises:
            MinislurmError: it is not ready in time, another shape of it is up, or this machine lacks something.
        """
        deadline = time.monotonic() + timeout_s
        began = time.monotonic()
        self._check_machine(wanted)
        with self._lock():
            if self._load() and all(
                self.daemons[name].alive() for name in self.daemons if not name.startswith("slurmd-")
            ):
                if replace(self.settings, first_port=0, password="") != wanted:
                    raise MinislurmError(f"{self.folder.root}: a cluster of another shape is up; take it down first")
                for node in self.settings.node_names:
                    self._start_node(node)
            else:
                self._wipe()
                with _reserved_ports():
                    self._start(wanted, deadline)
            self._wait_for_nodes(deadline)
        return f"up in {time.monotonic() - began:.1f} s: {self.folder.root}"

    def down(self) -> str:
        """End every process of the cluster and remove its folder."""
        if not self.folder.root.is_dir():
            return f"not up: {self.folder.root}"
        with self._lock():
            self._load()
            self._wipe()
            self.folder.root.rmdir()
        return f"down: {self.folder.root}"

    def status(self) -> str:
        """Daemons and their pids, then what sinfo says."""
        self._require_record()
        lines = [f"{n:<14} {p.pid:>8}  {'running' if p.alive() else 'gone'}" for n, p in self.daemons.items()]
        return "\n".join(lines) + "\n\n" + self._ask(["sinfo", "-N", "-o", "%.6N %.12P %.10T %.12G %.20E"])

    def exports(self) -> dict[str, str]:
        """The environment in which Slurm's commands speak to this cluster."""
        self._require_record()
        return {"SLURM_CONF": str(self.folder.slurm_conf), "MINISLURM_DIR": str(self.folder.root)}

    def kill_node(self, node: str) -> str:
        """SIGKILL the slurmd of a node, its step daemons and all their processes, as if its power had failed."""
        with self._lock():
            self._require_node(node)
            slurmd = self.daemons[f"slurmd-{node}"]
            steps = self._steps(node)
            below = descendants(steps)
            # Stopped first and killed bottom up at one blow: nobody may live to report another one's death.
            for process in [slurmd, *steps, *below]:
                process.signal(signal.SIGSTOP)
            _check_gone(end([slurmd, *steps, *below]))
        return f"killed {node}: slurmd, {len(steps)} step daemons, {len(below)} processes of jobs"

    def kill_slurmd(self, node: str) -> str:
        """SIGKILL the slurmd of a node alone: its step daemons and their processes go on, and nobody can reach them."""
        with self._lock():
            self._require_node(node)
            _check_gone(end([self.daemons[f"slurmd-{node}"]]))
        return f"killed the slurmd of {node}"

    def pause_controller(self) -> str:
        """Have slurmctld answer nobody until `resume_controller`."""
        return self._signal_controller(signal.SIGSTOP, "paused")

    def resume_controller(self) -> str:
        """Have slurmctld answer again."""
        return self._signal_controller(signal.SIGCONT, "goes on")

    def _signal_controller(self, number: int, word: str) -> str:
        with self._lock():
            self._require_record()
            self.daemons["slurmctld"].signal(number)
        return f"slurmctld {word}"

    def start_node(self, node: str, *, timeout_s: float) -> str:
        """Start the slurmd of a node that was killed and wait until Slurm calls it usable."""
        with self._lock():
            self._require_node(node)
            self._start_node(node)
            self._wait_for_nodes(time.monotonic() + timeout_s, only=node)
        return f"started {node}"

    # Starting

    def _start(self, wanted: Settings, deadline: float) -> None:
        self.settings = replace(
            wanted,
            first_port=layout.free_port_block(3 + wanted.nodes + wanted.gaudi_nodes),
            password=secrets.token_hex(16),
        )
        self._save()
        try:
            if wanted.cgroups:
                cgroups.take(self.folder.root)
            self._write_files()
            self._start_munged()
            self._start_mariadb(deadline)
            self._start_slurmdbd(deadline)
            self._spawn("slurmctld", ["slurmctld", "-D", "-c"])
            for node in self.settings.node_names:
                self._start_node(node)
        except BaseException:
            self._end_all()
            raise

    def _write_files(self) -> None:
        root, settings = self.folder.root, self.settings
        for name in ("etc", "run", "log", "dev", "state", "spool", "db"):
            (root / name).mkdir()
        for node in settings.node_names:
            self.folder.spool(node).mkdir()
        etc = root / "etc"
        self.folder.slurm_conf.write_text(layout.slurm_conf(settings, self.folder, socket.gethostname().split(".")[0]))
        (etc / "gres.conf").write_text(layout.gres_conf(settings, self.folder))
        (etc / "cgroup.conf").write_text(layout.cgroup_conf(settings, _slurm_version(self._ask(["slurmd", "-V"]))))
        (etc / "plugstack.conf").write_text("")
        _write_private(etc / "slurmdbd.conf", layout.slurmdbd_conf(settings, self.folder).encode())
        _write_private(self.folder.munge_key, secrets.token_bytes(128))
        _write_private(
            etc / "init.sql",
            "CREATE DATABASE IF NOT EXISTS slurm;\n"
            f"CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '{settings.password}';\n"
            "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n".encode(),
        )
        gpus = self.folder.devices("gpu", layout.GPUS_PER_NODE)
        for path in [*gpus, *self.folder.devices("accel", layout.GAUDIS_PER_NODE)]:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))

    def _start_munged(self) -> None:
        run = self.folder.root / "run"
        self._spawn(
            "munged",
            [
                "munged",
                "--foreground",
                "--force",
                f"--socket={self.folder.munge_socket}",
                f"--key-file={self.folder.munge_key}",
                f"--pid-file={run}/munged.pid",
                f"--log-file={self.folder.log('munged')}",
                f"--seed-file={run}/munged.seed",
            ],
        )

    def _start_mariadb(self, deadline: float) -> None:
        root = self.folder.root
        common = ["--no-defaults", "--user=root", f"--datadir={root}/db"]
        install = ["mariadb-install-db", *common, "--skip-test-db", "--auth-root-authentication-method=socket"]
        self._spawn("mariadb-install-db", install)
        if not wait_until(lambda: not self.daemons["mariadb-install-db"].alive(), deadline=deadline):
            raise self._not_ready("the database's folder is not made in time", "mariadb-install-db")
        del self.daemons["mariadb-install-db"]
        self._spawn(
            "mariadb",
            [
                "mariadbd",
                *common,
                f"--socket={self.folder.mariadb_socket}",
                "--bind-address=127.0.0.1",
                f"--port={self.settings.mariadb_port}",
                "--skip-name-resolve",
                f"--pid-file={root}/run/mariadb.pid",
                f"--init-file={root}/etc/init.sql",
                "--skip-log-bin",
                # The first three are what slurmdbd asks for; nothing here has to outlive a power cut.
                "--innodb-buffer-pool-size=128M",
                "--innodb-log-file-size=64M",
                "--innodb-lock-wait-timeout=900",
                "--innodb-flush-log-at-trx-commit=0",
            ],
        )
        self._wait_for_port("mariadb", self.settings.mariadb_port, deadline)

    def _start_slurmdbd(self, deadline: float) -> None:
        self._spawn("slurmdbd", ["slurmdbd", "-D"])
        self._wait_for_port("slurmdbd", self.settings.slurmdbd_port, deadline)
        for what in (["cluster", "minislurm"], ["account", "research"], ["user", "root", "account=research"]):
            self._ask(["sacctmgr", "-i", "add", *what])

    def _start_node(self, node: str) -> None:
        name = f"slurmd-{node}"
        if name not in self.daemons or not self.daemons[name].alive():
            self._spawn(name, ["slurmd", "-D", "-N", node])

    def _spawn(self, name: str, argv: Sequence[str]) -> None:
        self.daemons[name] = spawn(argv, env=self.env, output=self.folder.output(name), cwd=self.folder.root)
        self._save()

    # Readiness

    def _wait_for_port(self, name: str, port: int, deadline: float) -> None:
        def ready() -> bool:
            if not self.daemons[name].alive():
                raise self._not_ready(f"{name} ended as it started", name)
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        if not wait_until(ready, deadline=deadline):
            raise self._not_ready(f"{name} does not listen on port {port}", name)

    def _wait_for_nodes(self, deadline: float, only: str | None = None) -> None:
        names = [only] if only else self.settings.node_names
        query = ["sinfo", "-h", "-N", "-n", ",".join(names), "-o", "%N %t"]
        states: dict[str, str] = {}

        def ready() -> bool:
            with contextlib.suppress(MinislurmError):  # slurmctld does not answer yet
                for line in self._ask(query).splitlines():
                    name, state = line.split()
                    states[name] = state
            return all(states.get(name) in ("idle", "mix", "alloc", "comp") for name in names)

        if not wait_until(ready, deadline=deadline, pause_s=0.2):
            missing = [name for name in names if states.get(name) not in ("idle", "mix", "alloc", "comp")]
            shown = ", ".join(f"{name} is {states.get(name, 'unknown')}" for name in missing)
            raise self._not_ready(f"not all nodes are up in time: {shown}", "slurmctld", f"slurmd-{missing[0]}")

    def _not_ready(self, problem: str, *names: str) -> MinislurmError:
        tails = [problem]
        for name in names:
            for path in (self.folder.log(name), self.folder.output(name)):
                lines = path.read_text(errors="replace").splitlines()[-25:] if path.exists() else []
                tails += [f"--- end of {path}", *lines] if lines else []
        return MinislurmError("\n".join(tails))

    # Ending

    def _steps(self, node: str) -> list[Process]:
        """The step daemons of a node: each holds that node's log open."""
        return holders_of(self.folder.log(f"slurmd-{node}"), command="slurmstepd")

    def _end_all(self) -> None:
        # First those that could start something new; each with its children, which a SIGKILL would orphan.
        daemons = list(self.daemons.values())
        left = end([*daemons, *descendants(daemons)])
        for node in self.settings.node_names:
            steps = self._steps(node)
            left += end([*steps, *descendants(steps)])
        _check_gone(left)

    def _wipe(self) -> None:
        """End what runs and empty the folder, which must be ours."""
        if not self.folder.record.exists() and any(self.folder.root.iterdir()):
            raise MinislurmError(f"{self.folder.root}: not a cluster's folder and not empty; name another with --dir")
        self._end_all()
        if self.settings.cgroups:
            cgroups.give_back(self.folder.root, self.settings.node_names)
        self.daemons = {}
        # The record goes last: a cluster that is half removed can still be recognised and removed.
        for entry in sorted(self.folder.root.iterdir(), key=lambda path: path == self.folder.record):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    # The record

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the folder for ourselves; made when missing."""
        while True:
            self.folder.root.mkdir(parents=True, exist_ok=True)
            held = os.open(self.folder.root, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX)
                if not self.folder.root.is_dir() or os.fstat(held).st_ino != self.folder.root.stat().st_ino:
                    continue  # it was taken down, and perhaps made anew, while we waited
                yield
                return
            finally:
                os.close(held)

    def _load(self) -> bool:
        if not self.folder.record.exists():
            return False
        record = json.loads(self.folder.record.read_text())
        self.settings = Settings(**record["settings"])
        self.daemons = {name: Process(**process) for name, process in record["daemons"].items()}
        return True

    def _save(self) -> None:
        record = {"settings": asdict(self.settings), "daemons": {n: asdict(p) for n, p in self.daemons.items()}}
        aside = self.folder.record.with_suffix(".new")
        _write_private(aside, json.dumps(record, indent=1).encode())
        os.replace(aside, self.folder.record)

    def _require_record(self) -> None:
        if not self._load():
            raise MinislurmError(f"no cluster is up in {self.folder.root}; bring one up with: scripts/slurm up")

    def _require_node(self, node: str) -> None:
        self._require_record()
        if f"slurmd-{node}" not in self.daemons:
            raise MinislurmError(f"no node {node!r}; the nodes are {' '.join(self.settings.node_names)}")

    # The machine

    def _check_machine(self, wanted: Settings) -> None:
        if os.geteuid() != 0:
            raise MinislurmError("Slurm's daemons change users and make device nodes: run this as root")
        missing = [name for name in PROGRAMS if shutil.which(name, path=self.env["PATH"]) is None]
        if missing:
            install = f"apt-get install --no-install-recommends {PACKAGES}"
            raise MinislurmError(f"missing: {' '.join(missing)}; install with: {install}")
        if len(str(self.folder.root)) > _MAX_ROOT_LENGTH:
            raise MinislurmError(
                f"{self.folder.root}: too long for the unix sockets below it (at most {_MAX_ROOT_LENGTH} characters); "
                "name a shorter one with --dir"
            )
        if re.search(r"[^\w./-]", str(self.folder.root)):
            raise MinislurmError(f"{self.folder.root}: slurm.conf takes no such characters; name another with --dir")
        total = wanted.nodes + wanted.gaudi_nodes
        if wanted.nodes < 1 or wanted.gaudi_nodes < 0 or total > layout.MAX_NODES:
            raise MinislurmError(f"at least one gpu node and at most {layout.MAX_NODES} nodes in all")

    def _ask(self, argv: Sequence[str], *, timeout_s: float = 20.0) -> str:
        try:
            done = subprocess.run(
                list(argv), env=self.env, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            raise MinislurmError(f"`{' '.join(argv[:3])}` gave no answer within {timeout_s:.0f} s") from error
        if done.returncode != 0:
            raise MinislurmError(f"`{' '.join(argv)}` failed: {(done.stderr or done.stdout).strip()}")
        return done.stdout


@contextlib.contextmanager
def _reserved_ports() -> Iterator[None]:
    """One cluster of this machine at a time looks for ports and starts to listen on them."""
    with open(PORTS_LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(content)


def _slurm_version(text: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", text)
    if found is None:
        raise MinislurmError(f"`slurmd -V` names no version: {text.strip()}")
    return int(found[1]), int(found[2])


def _check_gone(left: Sequence[Process]) -> None:
    if left:
        raise MinislurmError(f"still there after SIGKILL: pids {' '.join(str(process.pid) for process in left)}")
