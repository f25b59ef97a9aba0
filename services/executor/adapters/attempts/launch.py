"""From a spec to a process that stands ready: pipes, control group, walls, ways through them, then the
command.

The command is held until all around it stands (a front door that does not listen yet would be a connection
refused in the user's first line), and let go by `Job.release`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping

from services.executor.adapters.attempts import forward, kernel, processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec, Isolation, MalformedSpec
from services.executor.adapters.networks import network
from services.executor.adapters.networks.network import ReadyNetwork
from services.executor.adapters.runtimes import cgroup
from services.executor.adapters.runtimes.build_sandbox import build_sandbox
from services.executor.adapters.runtimes.cgroup import Cgroup
from services.executor.adapters.runtimes.job_view import prepare_folders
from services.executor.adapters.runtimes.plain import Plain
from services.executor.adapters.runtimes.podman import Podman
from services.executor.adapters.runtimes.runtime import Job, LaunchRefused, Runtime
from services.executor.adapters.runtimes.sandbox import Bwrap

_STRAYS_LIMIT_S = 5.0

RUNTIMES: Mapping[Isolation, Runtime] = {
    "bwrap": Bwrap(),
    "process": Plain(),
    "podman": Podman(),
    "build": build_sandbox(),
}


def launch(spec: AttemptSpec, folder: AttemptFolder, group: Cgroup | None, ready: ReadyNetwork | None = None) -> Job:
    """Everything but the command itself. Raises LaunchRefused; the caller sweeps what is left of the try.

    Args:
        ready: a network such as the spec asks for.
    """
    if os.geteuid() == 0 and spec.run_as_uid is None:
        raise LaunchRefused("the platform runs as root here, and the spec names no other uid to run the job as")
    with _told_as_refusal():
        prepare_folders(spec, folder)
        joined = network.open_network(spec.network, spec.attempt_id, folder.path.parent.parent, ready)
    try:
        with _told_as_refusal():
            job = RUNTIMES[spec.isolation].start(spec, folder, group, joined)
            job.network = joined
            if spec.is_walled:
                _open_ways(job, spec)
    except LaunchRefused:
        if joined is not None:
            joined.close()
        raise
    return job


def clean_up(folder: AttemptFolder) -> None:
    """Remove what of an attempt outlives its processes: for one whose shim ended, however it did."""
    with contextlib.suppress(MalformedSpec):
        spec = folder.read_spec()
        RUNTIMES[spec.isolation].clean_up(spec, folder)


def end_strays(folder: AttemptFolder) -> None:
    """End what is left of an attempt whose shim was killed, and whoever should have seen that: then its processes
    belong to nobody, and are told by their control group, or by the attempt's name in their environment.
    """
    attempt_id = folder.path.name
    deadline = time.monotonic() + _STRAYS_LIMIT_S
    while strays := {*cgroup.members(attempt_id), *processes.tagged(f"NABLA_ATTEMPT_ID={attempt_id}")}:
        processes.signal_each(strays, signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    clean_up(folder)
    while not cgroup.remove_leftover(attempt_id) and time.monotonic() < deadline:
        time.sleep(0.01)  # what was killed may be there until it is reaped


def _open_ways(job: Job, spec: AttemptSpec) -> None:
    uid = spec.run_as_uid if os.geteuid() == 0 else None
    inside = job.network.descriptor if job.network else kernel.open_network(job.root)
    ready = job.network.listeners if job.network else forward.NOTHING_READY
    if job.network:
        job.ways.extend(job.network.ways)
    job.ways.extend(network.open_services(spec.network, inside, uid, ready))
    if spec.front_door:
        job.ways.append(forward.open_front_door(inside, spec.front_door, uid, ready))
    if spec.expose_ports:
        way, ports = forward.expose(inside, spec.expose_ports, uid)
        job.ways.append(way)
        job.ports.update(ports)


@contextlib.contextmanager
def _told_as_refusal() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LaunchRefused(str(error)) from error
