"""Installers: uv where it is, pip otherwise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from infra.install.machine import SetupError, answers, child_environment, has_module, installer_environment
from infra.install.terminal import Line

# Laid on top of the platform.
LAYERS = ("postgres", "dev")


class Installer:
    """Makes a virtual environment and fills it from a lock, never with a file whose hash is not in it."""

    name = ""

    def make(self, venv: Path) -> None:
        raise NotImplementedError

    def can_fill(self, venv: Path) -> bool:
        """Whether an environment that another installer has made will do."""
        return True

    def fill(self, venv: Path, lock_file: Path, title: str) -> None:
        raise NotImplementedError

    def build(self, venv: Path, lock_file: Path, title: str) -> None:
        raise NotImplementedError


class Uv(Installer):
    name = "uv"

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def make(self, venv: Path) -> None:
        run_logged([*self.command, "venv", "--no-config", "--python", sys.executable, str(venv)], venv.name)

    def fill(self, venv: Path, lock_file: Path, title: str) -> None:
        # `sync` also removes what a newer lock no longer names; dev lies on another lock, so it only adds
        verb = ["install", "--no-deps", "-r"] if title in LAYERS else ["sync"]
        self._pip(venv, [*verb, str(lock_file), "--only-binary", ":all:"], title)

    def build(self, venv: Path, lock_file: Path, title: str) -> None:
        self._pip(venv, ["install", "--no-deps", "-r", str(lock_file), "--no-build-isolation"], title)

    def _pip(self, venv: Path, args: list[str], title: str) -> None:
        options = ["--python", str(venv / "bin" / "python"), "--require-hashes", "--compile-bytecode"]
        run_logged([*self.command, "pip", *args, *options], title)


class Pip(Installer):
    name = "pip"

    def __init__(self, host_pip: bool) -> None:
        self.host_pip = host_pip  # the pip beside this Python fills an environment that has none of its own

    def make(self, venv: Path) -> None:
        bare = ["--without-pip"] if self.host_pip else []
        run_logged([sys.executable, "-m", "venv", *bare, str(venv)], venv.name)

    def can_fill(self, venv: Path) -> bool:
        """uv makes environments without pip, and is what was tried before when somebody is told to use pip."""
        return self.host_pip or any(venv.glob("lib/python3*/site-packages/pip"))

    def fill(self, venv: Path, lock_file: Path, title: str) -> None:
        self._pip(venv, ["--only-binary", ":all:", "--no-compile", "-r", str(lock_file)], title)
        compile_packages(venv, title)

    def build(self, venv: Path, lock_file: Path, title: str) -> None:
        self._pip(venv, ["--no-build-isolation", "--use-pep517", "-r", str(lock_file)], title)

    def _pip(self, venv: Path, args: list[str], title: str) -> None:
        if self.host_pip:
            pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
        else:
            pip = [str(venv / "bin" / "python"), "-m", "pip"]
        options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        run_logged([*pip, "install", *options, "--require-hashes", "--no-deps", *args], title)


def find_installer() -> Installer:
    """uv, else pip. NABLA_INSTALLER=pip or =uv chooses, where a mirror is set up for only one of them."""
    wanted = os.environ.get("NABLA_INSTALLER", "")
    uv = find_uv() if wanted != "pip" else None
    if uv:
        return Uv(uv)
    if wanted == "uv":
        raise SetupError(NO_UV)
    has_venv = has_module("venv")
    return choose_pip(has_venv and has_module("ensurepip"), has_venv and has_module("pip"))


def choose_pip(has_ensurepip: bool, has_pip: bool) -> Installer:
    if has_ensurepip:
        return Pip(host_pip=False)
    if has_pip:
        return Pip(host_pip=True)
    raise SetupError(no_installer_message(sys.version_info[0], sys.version_info[1]))


def find_uv(path: str | None = None) -> list[str] | None:
    """uv on the PATH, or as a module of this Python."""
    found = shutil.which("uv", path=path)
    if found and answers([found, "--version"]):
        return [found]
    if path is None and has_module("uv") and answers([sys.executable, "-m", "uv", "--version"]):
        return [sys.executable, "-m", "uv"]
    return None


NO_UV = (
    "This needs uv, and there is none on the PATH nor in this Python.\n"
    "Locks for every Python and machine at once are something only uv can resolve.\n"
    "Install it with `python3 -m pip install uv` (in a virtual environment), and call this again."
)


def need_uv() -> list[str]:
    uv = find_uv()
    if uv is None:
        raise SetupError(NO_UV)
    return uv


def no_installer_message(major: int, minor: int) -> str:
    return (
        f"Python {major}.{minor} is here, but neither uv, nor pip, nor its own ensurepip, so nothing can be "
        "installed. Debian and Ubuntu pack it apart: "
        f"run `apt-get update && apt-get install python{major}.{minor}-venv` as root, and call this again."
    )


def compile_packages(venv: Path, title: str) -> None:
    """pip compiles on one core while it installs; this uses all of them, and shows how far it is."""
    sources = sum(1 for _ in (venv / "lib").rglob("*.py"))
    command = [str(venv / "bin" / "python"), "-m", "compileall", "-j", "0", str(venv / "lib")]
    done = 0
    line = Line(f"{title}: bytecode")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=child_environment()
    ) as process:
        for output in process.stdout or ():
            done += output.startswith("Compiling")
            line.show(f"{done} of {sources} files")
    line.end()  # a package may ship a file no Python can parse, as a template: that is not an error


def run_logged(command: list[str], title: str) -> None:
    """Run an installer behind one line of progress; when it fails, show why."""
    line = Line(title)
    output: list[str] = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=installer_environment()
    )
    reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            line.show(progress_of(output))
            time.sleep(0.05)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        line.end("stopped")
        raise
    reader.join(timeout=5)
    if process.returncode:
        line.end("failed")
        raise SetupError(failure_message(title, process.returncode, "".join(output)))
    line.end()


def progress_of(output: list[str]) -> str:
    """The last thing the installer named, which with uv is a file and its size."""
    named = [text.strip() for text in output if text.strip().startswith(INTERESTING)]
    return named[-1][:70] if named else ""


INTERESTING = ("Downloading", "Downloaded", "Prepared", "Installed", "Installing", "Building", "Bytecode")
AGAIN = "call this again: it takes up where it stopped."
REASONS = (
    (
        r"hash(es)? (mismatch|are missing|did not match)|DO NOT MATCH THE HASHES",
        "A downloaded file is not the one the lock names: a broken download, or a mirror that changed it.",
        "Call this again. If it repeats, do not work around it: tell the maintainers which package it was.",
    ),
    (r"No space left|disk quota|os error 28", "The disk is full.", f"Free some space and {AGAIN}"),
    (
        r"dns error|resolve host|name resolution|connection ?(refused|reset|broken|error|aborted)"
        r"|error sending request|timed? ?out|certificate|SSL|proxy|HTTP (status|error)|unreachable",
        "The package index was not reached.",
        f"Check the network, or the mirror and proxy your installer is set up for, and {AGAIN}\n"
        "NABLA_INSTALLER=pip uses pip and its settings instead of uv.",
    ),
    (
        r"no (wheels|compatible|matching)|No matching distribution|not a supported wheel|unsatisfiable",
        "No index in reach offered a file of this package for this machine.",
        "Check the network and that your mirror carries it. Nabla supports Linux with glibc 2.28 or newer, "
        "on x86-64 and aarch64, with Python 3.11 to 3.13.",
    ),
    (r"Permission denied|os error 13", "A file here belongs to somebody else.", f"`chown` it, and {AGAIN}"),
    (r"", "The installer's last lines are above.", f"If they name nothing you can remove, {AGAIN}"),
)


def failure_message(title: str, code: int, output: str) -> str:
    tail = "\n".join("    " + text for text in output.strip().splitlines()[-12:])
    why, remedy = next(found for pattern, *found in REASONS if re.search(pattern, output, re.I))
    return f"{tail}\n\nInstalling {title} failed (exit code {code}). {why}\n{remedy}"
