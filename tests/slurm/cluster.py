"""A SLURM cluster of two nodes on this machine: its own munged, slurmctld and two slurmd, on loopback only."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
# Names that every resolver takes for 127.0.0.1 and 127.0.0.2, so that processes find each other by the node's name.
NODES = ("0x7f000001", "0x7f000002")
PATIENCE = 600  # seconds until something is taken to hang: far more than it needs on a loaded machine
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


def missing() -> str | None:
    """Return why there can be no cluster here; None if there can be one."""
    if os.name != "posix" or os.geteuid() != 0:
        return "slurmd and munged want root"
    absent = [name for name in (*DAEMONS, "sbatch") if not _path(name)]
    return f"not installed: {', '.join(absent)}" if absent else None


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def _configuration(folder: Path, ports: list[int]) -> str:
    host = socket.gethostname().partition(".")[0]
    settings = {
        "ClusterName": "tests",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job waits until its credential has expired: 120 s by default, 5 are the least.
        "AuthInfo": f"socket={folder}/munge.sock,cred_expire=5",
        # Else the daemons would listen on every interface.
        "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
        "SlurmctldPort": ports[0],
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool.%n",
        "SlurmctldPidFile": f"{folder}/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
        "SlurmctldLogFile": f"{folder}/slurmctld.log",
        "SlurmdLogFile": f"{folder}/slurmd.%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SlurmdParameters": "config_overrides",  # cores and memory are as said below, not as they are
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "bf_interval=1,sched_interval=1",
        "ReturnToService": 2,
        "KillWait": 5,
        "MinJobAge": 3600,
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines += [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=32 RealMemory=200000 State=UNKNOWN"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    return "\n".join([*lines, "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP", ""])


class Cluster:
    """Commands to a running cluster.

    Args:
        folder: with the cluster's files.
        environment: of its commands; jobs inherit it.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, dict(environment)

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Run one of SLURM's commands and return what it prints."""
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=self.environment)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, cwd: Path, *arguments: str) -> str:
        """Submit a batch script and return the job's id."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd)

    def job(self, job: str) -> dict[str, str]:
        """Return what is known of a job, of its first task if it is an array."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self, job: str) -> set[str]:
        """Return the states of a job's tasks; it has one if it is no array."""
        lines = self.call("scontrol", "--oneliner", "show", "job", job).splitlines()
        return {line.partition("JobState=")[2].split()[0] for line in lines}

    def finish(self, job: str) -> set[str]:
        """Wait for the end of a job and return the states it ended in."""
        wait(lambda: self.states(job) <= set(FINAL), f"job {job} to end")
        return self.states(job)


def wait(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def processes(folder: Path) -> list[int]:
    """Return the processes that live in a cluster's environment: daemons, their helpers, and jobs."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # ended meanwhile
            continue
    return found


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start a cluster, and leave no process of it behind."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: the name of a socket has at most 107 characters
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    modules = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"}
    cluster, started = Cluster(folder, inherited | own), []

    def start(*command: str | Path) -> None:
        with (folder / "daemons.log").open("a") as log:
            started.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log, cwd=folder))

    try:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(_configuration(folder, _free_ports(1 + len(NODES))))
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o400)
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *files)
        wait((folder / "munge.sock").is_socket, "munged")
        start("slurmctld", "-D", "-c", "-f", folder / "slurm.conf")
        for node in NODES:
            start("slurmd", "-D", "-c", "-N", node, "-f", folder / "slurm.conf")
        told = ["sinfo", "--noheader", "--Node", "--format=%T"]

        def idle() -> bool:
            assert all(one.poll() is None for one in started), (folder / "daemons.log").read_text()
            done = subprocess.run(told, capture_output=True, text=True, env=cluster.environment)
            return done.stdout.split() == ["idle"] * len(NODES)

        wait(idle, "idle nodes")
        yield cluster
    finally:
        while left := processes(folder):
            for process in left:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            for one in started:
                one.poll()
            time.sleep(0.1)
        for one in started:
            one.wait()
        shutil.rmtree(folder)
