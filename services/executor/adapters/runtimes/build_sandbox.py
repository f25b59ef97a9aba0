"""Class `build`: where podman builds an image from what a stranger wrote.

A build must be root among users of its own: it unpacks files of many owners, and its steps install packages. So podman
runs whole, and not only its steps, in a user namespace over a range of users that nobody else on the node has, in a
root put together of the node's /usr, its own store and the context: whatever it or a step of it does, outside it is a
user without any right, and what other teams and the platform have is not in its file system at all. Steps are run by
podman's own `chroot` isolation, with the few capabilities that images are built with, none of them over the node.

The network is the job's; without one there is loopback alone.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import NoReturn

from services.executor.adapters.attempts import kernel
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec
from services.executor.adapters.runtimes.job_view import (
    Mount,
    hosts_file,
    job_environment,
    mounts_for,
    resolver_file,
    uid_of,
    wrapped_command,
)
from services.executor.adapters.runtimes.rlimits import limit
from services.executor.adapters.runtimes.runtime import JoinedNetwork, LaunchRefused
from services.executor.adapters.runtimes.sandbox import (
    Bwrap,
    Ends,
    become_bwrap,
    handed_over,
    installation_of,
    stage,
    system_folders,
)

# Users and groups of a build, as many as images may have.
RANGE = 65_536
STORE_VARIABLE = "NABLA_BUILD_STORE"
_POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}'
_ETC_COPIED = ("ld.so.cache", "nsswitch.conf")


def build_sandbox() -> Bwrap:
    """Runtime of class `build`."""
    return Bwrap(_enter)


def _enter(spec: AttemptSpec, folder: AttemptFolder, ends: Ends, shim: int, network: JoinedNetwork | None) -> NoReturn:
    """As root alone: who else may hand out a range of users is a matter of each node's own settings."""
    if os.geteuid() != 0:
        raise LaunchRefused("images are built only where the platform is root")
    limit(resource.RLIMIT_CORE, 0)
    bwrap, root = spec.bwrap_path, installation_of(spec.bwrap_path)
    *mounts, own = stage([*mounts_for(spec, folder), Mount(root, root)])
    bwrap = own.source + bwrap.removeprefix(root)
    if network is not None:
        kernel.enter_network(network.descriptor)
    kernel.become_root_of(uid_of(spec), RANGE)
    options = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent"]
    options += ["--new-session", "--clearenv", "--cap-add", "ALL", "--hostname", spec.attempt_id]
    options += [] if network is not None else ["--unshare-net"]
    options += [*system_folders(), "--dev", "/dev", "--tmpfs", "/run", "--dir", "/sys", "--dir", "/var/tmp"]
    for name, text in _etc(spec).items():
        options += ["--perms", "0644", "--file", str(handed_over(text)), f"/etc/{name}"]
    for mount in mounts:
        options += [("--ro-bind", "--bind")[mount.writable], mount.source, mount.inside]
    for name, value in job_environment(spec, folder).items():
        options += ["--setenv", name, value]
    become_bwrap(bwrap, [*options, "--chdir", "/workspace"], wrapped_command(spec), ends, shim)


def _etc(spec: AttemptSpec) -> dict[str, bytes]:
    """The node's own settings of podman name its stores and registries: none of them is here."""
    store = spec.env.get(STORE_VARIABLE, "/store")
    texts = {
        "passwd": "root:x:0:0:root:/tmp/home:/bin/sh\n",
        "group": "root:x:0:\n",
        "hosts": hosts_file(spec),
        "resolv.conf": resolver_file(spec),
        "containers/policy.json": _POLICY,
        "containers/storage.conf": f'[storage]\ndriver = "overlay"\ngraphroot = "{store}"\nrunroot = "/run/storage"\n',
    }
    copied = {name: Path("/etc", name).read_bytes() for name in _ETC_COPIED if Path("/etc", name).is_file()}
    return copied | {name: text.encode() for name, text in texts.items()}
