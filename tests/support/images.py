"""Images made on this machine, without a registry: a small Debian from the files of packages that are installed."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

PACKAGES = ("coreutils", "dash", "grep", "hostname", "libc6", "procps", "zlib1g", "libexpat1")
PYTHON_PACKAGES = ("python3-minimal", "{0}-minimal", "lib{0}-minimal", "lib{0}-stdlib")
FOLDERS = ("dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var")
# A user of the image's own, for jobs that ask for one.
APP_UID = 1234
USERS = f"root:x:0:0::/root:/bin/sh\napp:x:{APP_UID}:{APP_UID}::/:/bin/sh\n"
LEFT_OUT = ("/share/doc", "/share/man", "/share/locale", "/gconv", "/test/", "/__pycache__/")
MARK = "made-for-tests"


@functools.cache
def tiny_image() -> bytes:
    """A tar of a root file system with a shell, the usual commands and Python: 40 MB."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in FOLDERS:
            _add_folder(archive, name)
        for name, text in (("etc/passwd", USERS), ("etc/group", f"root:x:0:\napp:x:{APP_UID}:\n"), (f"etc/{MARK}", "")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
        for file in _files():
            archive.add(file, file.lstrip("/"), recursive=False)
    return content.getvalue()


@functools.cache
def why_no_image() -> str:
    """Why the image cannot be made here, or ""."""
    if not shutil.which("dpkg") or not Path("/usr/bin/python3").exists():
        return "the image of the tests is made of Debian's packages, and this is no Debian with python3"
    return ""


def _add_folder(archive: tarfile.TarFile, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
    archive.addfile(member)


def _files() -> Iterator[str]:
    """Every path once, by its real folder: packages name /bin/sh, and /bin is a link to usr/bin."""
    seen = {"/", *(f"/{name}" for name in FOLDERS)}
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            seen.add(f"/{name}")
            yield f"/{name}"
    for package in _packages():
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False).stdout
        for path in listed.splitlines():
            real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            if real not in seen and os.path.lexists(real) and not any(part in f"{real}/" for part in LEFT_OUT):
                seen.add(real)
                yield real


def _packages() -> list[str]:
    """The wanted ones, with the libraries that their programs load."""
    python = os.path.basename(os.path.realpath("/usr/bin/python3"))
    wanted = [*PACKAGES, *(package.format(python) for package in PYTHON_PACKAGES)]
    programs = ["/usr/bin/python3", "/bin/ls", "/bin/cp", "/bin/ps", "/bin/grep", "/bin/sort"]
    programs += [str(path) for path in Path("/usr/lib", python, "lib-dynload").glob("*.so")]
    loaded = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    libraries = {word for line in loaded.splitlines() for word in line.split() if word.startswith("/lib")}
    for library in sorted(libraries):
        for spelling in (library, os.path.realpath(library)):
            owner = subprocess.run(["dpkg", "-S", spelling], capture_output=True, text=True, check=False).stdout
            if owner:
                wanted.append(owner.split(":", 1)[0])
    return list(dict.fromkeys(wanted))


def unpacked_image(folder: Path) -> Path:
    """The same as a folder."""
    root = folder / "rootfs"
    root.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(tiny_image())) as archive:
        archive.extractall(root, filter="fully_trusted")
    return root


@contextlib.contextmanager
def podman_image(engine: Sequence[str]) -> Iterator[str]:
    """The image in podman's store, under a name of this process alone, for as long as the block runs."""
    name = f"localhost/nabla-test-{os.getpid()}:{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="nabla-image-") as folder:
        tar = Path(folder, "image.tar")
        tar.write_bytes(tiny_image())
        _podman(engine, "import", "--quiet", str(tar), name)
    try:
        yield name
    finally:
        _podman(engine, "rmi", "--force", "--ignore", name)


def _podman(engine: Sequence[str], *words: str) -> None:
    done = subprocess.run([*engine, *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
