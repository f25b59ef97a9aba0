"""Which container engine this node has, with which options it works here, and why it does not.

Found out by running a container: of an engine's many needs (control groups, an OCI runtime that the kernel suits, a
stand-in before it) no list would be complete. No image is needed for it: the container's root is an empty folder with
the node's own /usr in it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.executor.adapters.runtimes.podman import podman_environment, reason_in
from services.executor.adapters.runtimes.stand_in import ANSWER, ASKED, RUNTIME_OPTION, runtime_of, with_stand_in

_TRY_LIMIT_S = 30.0
_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_NOFILE = 1024
# As whom the container of the probe runs: any user that is not root.
_PROBE_UID = 61000
_INITS = ("/usr/libexec/podman/catatonit", "/usr/lib/podman/catatonit", "/usr/bin/catatonit")
_INSTALL = "apt-get install podman catatonit crun"


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that works. `command` reaches it, `options` is what its `run` needs here besides."""

    kind: str
    command: tuple[str, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoEngine:
    """There is none. The remedy is one command, or ""."""

    reason: str
    remedy: str = ""


_FOLDERS = "nabla-podman-"
_LABEL = "org.nabla.probe"
_CGROUPFS = "--cgroup-manager=cgroupfs"
_NO_CGROUPS = "--cgroups=disabled"
_PROGRAMS = "/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin:/bin:/sbin"


def find(wanted: str) -> Engine | NoEngine:
    """The engine that the settings ask for, of those that work here."""
    return NoEngine("the settings ask for bwrap") if wanted == "bwrap" else find_podman()


@functools.cache
def find_podman() -> Engine | NoEngine:
    """Tries what podman needs, in the order of preference, once in a process: it may take a second or two."""
    podman = shutil.which("podman", path="/usr/bin:/usr/local/bin:/bin")
    if podman is None:
        return NoEngine("podman is not installed", _INSTALL)
    if not any(os.access(path, os.X_OK) for path in _INITS):
        return NoEngine("podman's init for containers (catatonit) is not installed", "apt-get install catatonit")
    remove_leftovers((podman,), Path(tempfile.gettempdir()))
    reasons = []
    with tempfile.TemporaryDirectory(prefix=_FOLDERS) as folder:
        root = _empty_root(Path(folder, "root"))
        for number, (before, options) in enumerate(_ways(podman)):
            reason = _try((podman, *before), options, root, Path(folder, str(number)))
            if not reason:
                return Engine("podman", (podman, *before), options)
            reasons.append(reason)
    return NoEngine("; ".join(dict.fromkeys(reasons)))


def _ways(podman: str) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Options before and behind `run`, best first.

    Without control groups of podman's own where its runtime can do that: the shim makes them, also where podman may
    not.
    """
    own = f"{RUNTIME_OPTION}{_info((podman,), '{{.Host.OCIRuntime.Path}}')}"
    yield from (((own,), (_NO_CGROUPS,)), ((own,), ()), ((_CGROUPFS, own), ()))
    if runc := shutil.which("runc", path=_PROGRAMS):
        other = f"{RUNTIME_OPTION}{runc}"
        yield from (((_CGROUPFS, other), ()), ((other,), ()))


def remove_leftovers(command: Sequence[str], folders: Path, over_s: float = 2 * _TRY_LIMIT_S) -> None:
    """Of probes whose process was killed in their middle.

    Args:
        over_s: so old a probe is not under way any more.
    """
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        words = [*command, "container", "prune", "--force", f"--filter=label={_LABEL}", f"--filter=until={over_s:g}s"]
        subprocess.run(words, env=podman_environment(), capture_output=True, timeout=_TRY_LIMIT_S, check=False)
    for path in folders.glob(f"{_FOLDERS}*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > over_s:
                shutil.rmtree(path, ignore_errors=True)


def image_list(engine: Engine) -> Path:
    """The file that changes whenever the engine's images do."""
    return Path(_info(engine.command, "{{.Store.GraphRoot}}/{{.Store.GraphDriverName}}-images/images.json"))


def _info(command: Sequence[str], form: str) -> str:
    words = [*command, "info", "--format", form]
    done = subprocess.run(
        words, env=podman_environment(), capture_output=True, text=True, timeout=_TRY_LIMIT_S, check=False
    )
    return done.stdout.strip()


def _empty_root(root: Path) -> Path:
    for name in ("usr", "dev", "etc", "proc", "run", "sys", "tmp"):
        (root / name).mkdir(parents=True)
    for name in _LINKS:
        if os.path.islink(f"/{name}"):
            (root / name).symlink_to(os.readlink(f"/{name}"))
    return root


def _try(command: Sequence[str], options: Iterable[str], root: Path, hold: Path) -> str:
    """Why a container does not run this way; "" when it does, with a stand-in for its runtime."""
    if not os.access(runtime_of(command), os.X_OK):
        return f"podman has no OCI runtime ({runtime_of(command) or 'podman info names none'})"
    hold.mkdir(mode=0o700)
    (hold / ANSWER).write_text("go\n")
    podman = with_stand_in(command, hold / "runtimes", hold)
    user = ["--user", f"{_PROBE_UID}:{_PROBE_UID}"] if os.geteuid() == 0 else []
    ulimits = [f"--ulimit={kind}={_NOFILE}:{_NOFILE}" for kind in ("nofile", "nproc")]
    name = f"nabla-probe-{uuid.uuid4().hex[:12]}"
    run = ["run", "--rm", f"--name={name}", "--init", "--network=none", "--log-driver=passthrough", "--cap-drop=all"]
    run += [f"--label={_LABEL}", *ulimits, *user]
    try:
        done = subprocess.run(
            [*podman, *run, *options, "--volume=/usr:/usr:ro", "--rootfs", str(root), "true"],
            env=podman_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TRY_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _remove(command, name)
        return str(error)
    if done.returncode != 0:
        _remove(command, name)
        return reason_in(done.stderr) or f"it ended with {done.returncode}"
    return "" if (hold / ASKED).exists() else "its runtime was not called in the way that the platform needs"


def _remove(command: Iterable[str], name: str) -> None:
    """A container that was made and never started is not taken away by `--rm`."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        words = [*command, "rm", "--force", "--ignore", name]
        subprocess.run(words, env=podman_environment(), capture_output=True, timeout=_TRY_LIMIT_S, check=False)
