"""Slurm on one node, as a reference for the bench: its own munge, ports and folder, gone at the end."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
PATIENCE_S = 60.0


def why_no_slurm() -> str:
    """Why there is no reference here, with what would change that; "" when there is one."""
    missing = [name for name in PROGRAMS if _find(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root alone"


@dataclass(frozen=True)
class Slurm:
    """A running cluster of one node."""

    folder: Path
    environment: dict[str, str]

    def echo_s(self, number: int) -> float:
        """From `sbatch` to the job's line in its output file."""
        said = self.folder / f"said-{number}"
        command = ["sbatch", "--quiet", "--output", str(said), "--wrap", "echo hello"]
        began = time.monotonic()
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60, cwd=self.folder)
        while not said.exists() or "hello" not in said.read_text():
            if time.monotonic() - began > PATIENCE_S:
                raise TimeoutError(f"Slurm's job said nothing in {PATIENCE_S:.0f} s: {self.logs()}")
            time.sleep(0.002)
        return time.monotonic() - began

    def is_idle(self) -> bool:
        command = ["sinfo", "--noheader", "--format", "%t"]
        found = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        return found.stdout.strip() == "idle"

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-1000:] for path in sorted(self.folder.glob("*.log")))


@contextmanager
def running_slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="nabla-slurm-", dir="/tmp"))
    config = _write_config(folder)
    slurm = Slurm(folder, os.environ | {"SLURM_CONF": str(config)})
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (_munged(folder), ["slurmctld", "-D"], ["slurmd", "-D", "-N", "bench0"]):
            program = str(_find(command[0]))
            daemons.append(_started([program, *command[1:]], slurm))
        deadline = time.monotonic() + PATIENCE_S
        while not slurm.is_idle():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Slurm did not come up in {PATIENCE_S:.0f} s: {slurm.logs()}")
            time.sleep(0.1)
        yield slurm
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _started(command: list[str], slurm: Slurm) -> subprocess.Popen[bytes]:
    output = (slurm.folder / f"{Path(command[0]).name}.out.log").open("wb")
    return subprocess.Popen(command, env=slurm.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def _munged(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
    options = [f"--{name}={folder / file}" for name, file in files.items()]
    # By force: a temporary folder is less than it would have for its socket.
    return ["munged", "--foreground", "--force", f"--key-file={key}", *options]


def _write_config(folder: Path) -> Path:
    host = socket.gethostname()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    lines = {
        "ClusterName": "bench",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": free_port(),
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder / 'munge.socket'}",
        "CredType": "cred/munge",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MailProg": "/bin/true",
        "ReturnToService": 2,
    }
    text = "".join(f"{name}={value}\n" for name, value in lines.items())
    node = f"NodeName=bench0 NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={os.cpu_count()}"
    path = folder / "slurm.conf"
    path.write_text(f"{text}{node} State=UNKNOWN\nPartitionName=main Nodes=bench0 Default=YES State=UP\n")
    return path


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
