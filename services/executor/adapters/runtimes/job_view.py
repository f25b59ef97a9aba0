"""What a job sees, whatever runs it: its mounts, its environment, its command.

In every class NABLA_WORKSPACE, NABLA_ARTIFACTS and NABLA_STORAGE are the paths to use; only behind walls are they
/workspace, /artifacts and /storage. HOME is in the private /tmp, not in /workspace: caches and histories that
tools leave there are not the user's work, and are not kept with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.networks import network, network_names

SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
# Of an image's own environment these are replaced: they name places and people of the image, not of the job.
_NOT_THE_IMAGES = ("HOME", "TMPDIR", "USER", "LOGNAME")


@dataclass(frozen=True, slots=True)
class Mount:
    """A path of the host and where the job sees it."""

    source: str
    inside: str
    writable: bool = False


def wrapped_command(spec: AttemptSpec) -> list[str]:
    """Through sh in every class, so that "not found" is 127 and "not executable" 126 whoever starts it.

    An image without a shell starts the words as they are.
    """
    command = spec.command
    if isinstance(command, str):
        return ["/bin/sh", "-c", command]
    if spec.image is not None and not spec.image.has_shell:
        return command
    return ["/bin/sh", "-c", 'exec "$@"', "sh", *command]


def job_environment(
    spec: AttemptSpec, folder: AttemptFolder, of_image: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The whole environment of the command: what the platform promises goes over what the user gave, that over
    what the image says, that over defaults.
    """
    tmp = "/tmp" if spec.is_walled else str(folder.tmp)
    defaults = {
        "PATH": SYSTEM_PATH,
        "HOME": f"{tmp}/home",
        "TMPDIR": tmp,
        "USER": "nabla",
        "LOGNAME": "nabla",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
    }
    image = {name: value for name, value in (of_image or {}).items() if name not in _NOT_THE_IMAGES}
    environment = defaults | image | network.variables(spec.network) | spec.env | _promised(spec, folder)
    if "PYTHONPATH" in image and "PYTHONPATH" in spec.env:
        environment["PYTHONPATH"] = f"{spec.env['PYTHONPATH']}:{image['PYTHONPATH']}"
    if spec.environment_prefix is not None:
        environment["PATH"] = f"{spec.environment_prefix}/bin:{environment['PATH']}"
        environment["VIRTUAL_ENV"] = spec.environment_prefix
    return environment


def _promised(spec: AttemptSpec, folder: AttemptFolder) -> dict[str, str]:
    walled = spec.is_walled
    promised = {
        "NABLA_ATTEMPT_ID": spec.attempt_id,
        "NABLA_JOB_ID": spec.job_id,
        "NABLA_ISOLATION": spec.isolation,
        "NABLA_WORKSPACE": "/workspace" if walled else workspace_of(spec, folder),
        "NABLA_ARTIFACTS": "/artifacts" if walled else artifacts_of(spec, folder),
        "CUDA_VISIBLE_DEVICES": _visible_gpus(spec),
        # By default the fastest is CUDA's first; the platform, as the driver, counts along the bus.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # For programs that go by it. Images of CUDA's say "all", whatever they were given.
        "NVIDIA_VISIBLE_DEVICES": _visible_gpus(spec) or "void",
    }
    for bind in spec.binds_rw:
        if bind.inside == "/storage":
            promised["NABLA_STORAGE"] = "/storage" if walled else bind.host
    return promised


def prepare_folders(spec: AttemptSpec, folder: AttemptFolder) -> None:
    """Make what the job writes to, and give it to the uid that the job runs as.

    Only root can and need do so. Files with a second name are left alone: they may be links into a store that
    many attempts share.
    """
    (folder.tmp / "home").mkdir(mode=0o700, exist_ok=True)
    if os.geteuid() != 0 or spec.run_as_uid is None:
        return
    if spec.isolation == "process":
        folder.path.chmod(0o711)  # the job passes through to its workspace; the records stay 0600
    for path in (workspace_of(spec, folder), artifacts_of(spec, folder), str(folder.tmp)):
        _give(path, spec.run_as_uid)


def mounts_for(spec: AttemptSpec, folder: AttemptFolder) -> list[Mount]:
    """All that the job sees besides the system, outer paths before those inside them."""
    own = [
        Mount(str(folder.tmp), "/tmp", writable=True),
        Mount(workspace_of(spec, folder), "/workspace", writable=True),
        Mount(artifacts_of(spec, folder), "/artifacts", writable=True),
    ]
    given = [Mount(*bind) for bind in spec.binds_ro] + [Mount(*bind, writable=True) for bind in spec.binds_rw]
    prefix = [] if spec.environment_prefix is None else environment_mounts(spec.environment_prefix)
    return sorted([*own, *prefix, *given], key=lambda mount: mount.inside.count("/"))


def environment_mounts(prefix: str) -> list[Mount]:
    """A virtualenv and the base interpreter that it points to, both at their own paths.

    A virtualenv is not whole: its bin/python is a link to, and its standard library lies in, the prefix that
    made it (~/.pyenv/versions/..., uv's folder, /usr). Both spellings of that prefix are shown, because such
    prefixes are often links themselves (uv: cpython-3.11 -> cpython-3.11.7).
    """
    shown = [prefix]
    linked = str(Path(f"{prefix}/bin/python").resolve().parents[1])
    for base in (_base_by_config(prefix), linked):
        if base and base not in shown and not base.startswith("/usr") and _holds_python(base):
            shown.append(base)
    return [Mount(path, path) for path in shown]


def hosts_file(spec: AttemptSpec) -> str:
    """A gang's ranks find their own name at the node's address: what they tell their peers must be true there."""
    gang = spec.network.gang
    own = f" {spec.attempt_id}" if gang is None else f"\n{gang.node_address} {spec.attempt_id}"
    return f"127.0.0.1 localhost{own}\n::1 localhost\n"


def resolver_file(spec: AttemptSpec) -> str:
    """resolv.conf: the node's, but for whom to ask where the network is the job's own."""
    if spec.network.leads_out:
        return network_names.resolver_file()
    with suppress(OSError):
        return Path("/etc/resolv.conf").read_text(errors="replace")
    return ""


def _visible_gpus(spec: AttemptSpec) -> str:
    """CUDA counts the devices that it can open: behind walls the given ones are 0, 1, ...; without,
    themselves.

    Where the node has no such device (GPUs that Ray was only told of) their numbers are passed on as they
    are.
    """
    renumbered = spec.is_walled and spec.gpu_devices
    return ",".join(str(n if renumbered else index) for n, index in enumerate(sorted(spec.gpu_indices)))


def _base_by_config(prefix: str) -> str | None:
    with suppress(OSError):
        for line in Path(prefix, "pyvenv.cfg").read_text().splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "home":
                return str(Path(value.strip()).parent)
    return None


def _holds_python(base: str) -> bool:
    """Is this a Python installation? pyvenv.cfg is a file that could name any folder of the host, and / holds one."""
    return base != "/" and any(Path(base, "lib").glob("python3.*/os.py"))


def workspace_of(spec: AttemptSpec, folder: AttemptFolder) -> str:
    return spec.workspace_path or str(folder.workspace)


def artifacts_of(spec: AttemptSpec, folder: AttemptFolder) -> str:
    return spec.artifacts_path or str(folder.artifacts)


def uid_of(spec: AttemptSpec) -> int:
    return os.geteuid() if spec.run_as_uid is None else spec.run_as_uid


def _give(path: str, uid: int) -> None:
    os.makedirs(path, mode=0o700, exist_ok=True)
    for _, _, files, folder in os.fwalk(path, follow_symlinks=False):
        os.fchown(folder, uid, uid)
        for name in files:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if status.st_uid != uid and status.st_nlink == 1:
                os.chown(name, uid, uid, dir_fd=folder, follow_symlinks=False)
