"""A real Slurm on this host alone: munged, slurmctld and slurmd, with their files in one folder, ended by process id.

Two partitions over one node: ``normal``, and ``urgent``, whose jobs preempt those of ``normal`` (requeued after a grace
time). Needs root and Debian's slurm-wlm.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

CONFIG = """\
ClusterName=isotone-test
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=1000000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=30
KillWait=10
MinJobAge=600
InactiveLimit=0
Waittime=0
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=20000 State=UNKNOWN
PartitionName=normal Nodes={host} Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=20 OverSubscribe=NO
PartitionName=urgent Nodes={host} MaxTime=60 State=UP PriorityTier=10 OverSubscribe=NO PreemptMode=OFF
"""


class SlurmCluster:
    """The daemons and their folder.

    Args:
        folder: holds everything of the cluster.

    Attributes:
        environment: what commands of Slurm need to find this cluster and no other.
    """

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname()
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration, start the three daemons and wait until the node is idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        values = {"folder": self.folder, "host": self.host, "ctld_port": _free_port(), "d_port": _free_port()}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self.start_daemon("munged")
        wait_for(lambda: (self.folder / "munge.socket").exists(), 10, "munged's socket")
        self.start_daemon("slurmctld")
        self.start_daemon("slurmd")
        wait_for(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T").stdout, 60, "an idle node")

    def start_daemon(self, name: str) -> None:
        """Start munged, slurmctld or slurmd in the foreground of a process of its own."""
        munge = ["--key-file", "munge.key", "--socket", "munge.socket", "--pid-file", "munge.pid"]
        munge += ["--log-file", "munge.log", "--seed-file", "munge.seed"]
        arguments: dict[str, list[object]] = {
            "munged": ["--foreground", "--force", *(self.folder / m if "." in m else m for m in munge)],
            "slurmctld": ["-D", "-i", "-f", self.folder / "slurm.conf"],
            "slurmd": ["-D", "-N", self.host, "-f", self.folder / "slurm.conf"],
        }
        self._daemons[name] = subprocess.Popen(
            [shutil.which(name) or f"/usr/sbin/{name}", *map(str, arguments[name])],
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{name}.stderr").open("ab"),
            start_new_session=True,
        )

    def kill_daemon(self, name: str) -> None:
        """End a daemon as a crash would."""
        self._daemons[name].kill()
        self._daemons[name].wait()

    def stop(self) -> None:
        """Cancel what is queued, end the daemons, and every process that a job has left."""
        self.run("scancel", "--signal=KILL", "--user=root")
        for name in ("slurmd", "slurmctld", "munged"):
            daemon = self._daemons.get(name)
            if daemon and daemon.poll() is None:
                for child in psutil.Process(daemon.pid).children(recursive=True):
                    _end(child.pid)
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for process in psutil.process_iter(["cmdline", "environ"]):
            belongs = (process.info["environ"] or {}).get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if belongs and process.pid != os.getpid():
                _end(process.pid)

    def run(self, *command: object, check: bool = False) -> "subprocess.CompletedProcess[str]":
        """Run a command against this cluster."""
        return subprocess.run(
            [*map(str, command)],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=check,
            timeout=120,
        )

    def jobs(self) -> dict[str, tuple[str, str, str]]:
        """Return the queue: name, state and reason by job id."""
        lines = self.run("squeue", "-h", "-o", "%i|%j|%T|%r").stdout.splitlines()
        return {job: (name, state, reason) for job, name, state, reason in (line.split("|") for line in lines)}

    def log(self) -> str:
        """Return slurmctld's log."""
        return (self.folder / "slurmctld.log").read_text(errors="replace")


def wait_for(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: it does not after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
