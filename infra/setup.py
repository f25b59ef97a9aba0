#!/usr/bin/env python3
"""Set up, check and start this checkout: everything the Makefile's targets do, in one file.

It needs no package and no root, only Python 3.11 to 3.13. It makes environments from locks in which every file is
named by its hash, each when it is first needed:

    .venv           the platform (services, `nabla`), and on top of it the tools for tests and checks
    .venv-serving   bentoml and scikit-learn: what bento builds and, by default, jobs run in
    .venv-notebook  JupyterLab: what notebooks run in

A finished installation leaves a stamp with the hash of its lock, so that the next call costs milliseconds.
One that was broken off has no stamp: the next call takes it up again, with what the package cache has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "infra" / "locks"
SIZES = LOCKS / "sizes.json"
SUPPORTED = ((3, 13), (3, 12), (3, 11))
MACHINES = ("x86_64", "aarch64")
DISK_PER_DOWNLOAD = 5  # unpacked and with its bytecode, a megabyte of wheels takes about four on disk

# Settings that would put packages elsewhere than told, or let in files that the locks do not name.
REDIRECTS = frozenset(
    """
    PYTHONDONTWRITEBYTECODE PYTHONHOME PYTHONPATH PYTHONPYCACHEPREFIX VIRTUAL_ENV
    UV_PYTHON UV_SYSTEM_PYTHON UV_TARGET UV_PREFIX UV_CONSTRAINT UV_OVERRIDE UV_EXCLUDE UV_NO_BINARY
    PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_PYTHON PIP_CONSTRAINT PIP_NO_BINARY PIP_NO_DEPS
    PIP_REQUIRE_VIRTUALENV PIP_FIND_LINKS
    """.split()
)


class SetupError(Exception):
    """What happened, why, and what to do: the whole text a person sees."""


# -----------------------------------------------------------------------------
# Commands
# -----------------------------------------------------------------------------


def demo(args: list[str]) -> int:
    """install what is missing, start everything, run one job from code to a served model"""
    install("platform", "serving")
    return become(venv_python("platform"), "-m", "services", "demo", *args)


def up(args: list[str]) -> int:
    """start Nabla on this machine"""
    install("platform", "serving", *(["postgres"] if wants_postgres() else []))
    return become(ROOT / ".venv/bin/nabla", "up", *args)


def down(args: list[str]) -> int:
    """stop Nabla; its data stay"""
    return ask_running("down", args)


def status(args: list[str]) -> int:
    """show what runs, where, and whether it is well"""
    return ask_running("status", args)


def test(args: list[str]) -> int:
    """run the tests"""
    install("platform", "serving", "dev")
    return become(venv_python("platform"), "-m", "tests.run", *args)


def test_full(args: list[str]) -> int:
    """run the tests, the slow ones and the chaos ones too"""
    return test(["--full", *args])


def test_gpu(args: list[str]) -> int:
    """run the tests that need a GPU"""
    return test(["--gpu", *args])


def check(args: list[str]) -> int:
    """lint, types, architecture, contracts, fast tests"""
    install("platform", "dev")
    return run_checks([known for known in checks() if not args or known.name in args])


def bench(args: list[str]) -> int:
    """measure, and compare with the committed results"""
    install("platform", "serving", "dev")
    return become(venv_python("platform"), "-m", "tests.bench", *args)


def lock(args: list[str]) -> int:
    """resolve the newest versions again and write the locks (needs uv)"""
    del args
    write_locks(need_uv())
    return 0


def clean(args: list[str]) -> int:
    """remove the environments and caches; data in .nabla stay"""
    del args
    caches = (".pytest_cache", ".mypy_cache", ".ruff_cache", ".import_linter_cache")
    for name in (*ENVIRONMENT_OF.values(), *caches):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    for top in ("services", "libs", "tests", "infra"):
        for cache in sorted((ROOT / top).rglob("__pycache__")):
            shutil.rmtree(cache, ignore_errors=True)
    say("Removed the environments and caches. Your data stay in .nabla.")
    return 0


def help_(args: list[str]) -> int:
    """list the commands"""
    del args
    say("usage: make TARGET, or: python3 infra/setup.py COMMAND [ARGUMENTS]\n")
    for name, command in COMMANDS.items():
        say(f"  {name:<10} {command.__doc__}")
    return 0


COMMANDS = {
    "demo": demo,
    "test": test,
    "up": up,
    "down": down,
    "status": status,
    "check": check,
    "test-full": test_full,
    "test-gpu": test_gpu,
    "bench": bench,
    "lock": lock,
    "clean": clean,
    "help": help_,
}


def wants_postgres() -> bool:
    """Whether the settings name a PostgreSQL, whose driver the default installation does not need."""
    home = Path(os.environ.get("NABLA_HOME") or ROOT / ".nabla")
    try:
        text = (home / "nabla.toml").read_text()
    except OSError:
        text = ""
    return "postgresql://" in text + os.environ.get("NABLA_DATABASE_URL", "")


def ask_running(command: str, args: list[str]) -> int:
    """Asking whether something runs must not download 200 MB first."""
    nabla = ROOT / ".venv/bin/nabla"
    if not nabla.exists():
        say("Nabla is not installed in this checkout, so nothing runs. `make up` installs and starts it.")
        return 0 if command == "down" else 1
    return become(nabla, command, *args)


def become(program: Path, *args: str) -> NoReturn:
    """Hand this process over, so that Ctrl-C and the exit code belong to the program itself."""
    os.chdir(ROOT)
    sys.stdout.flush()
    os.execve(program, [str(program), *args], child_environment())


# -----------------------------------------------------------------------------
# Environments: which lock goes where, and whether it is already there
# -----------------------------------------------------------------------------

ENVIRONMENT_OF = {
    "platform": ".venv",
    "postgres": ".venv",
    "dev": ".venv",
    "serving": ".venv-serving",
    "notebook": ".venv-notebook",
}
# Laid on top of the platform.
LAYERS = ("postgres", "dev")


def venv_of(name: str) -> Path:
    return ROOT / ENVIRONMENT_OF[name]


def venv_python(name: str) -> Path:
    return venv_of(name) / "bin" / "python"


def stamp_of(name: str) -> Path:
    return venv_of(name) / f"nabla-{name}.stamp"


def files_of(name: str) -> list[Path]:
    extra = [LOCKS / "source.txt"] if name == "platform" else []
    return [LOCKS / f"{name}.txt", *extra]


def fingerprint(venv: Path, files: list[Path]) -> str:
    """Changes with the locks, with the Python of the environment, and when the checkout is moved."""
    digest = hashlib.sha256(f"{venv}\n{python_version_of(venv)}\n".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def is_current(name: str) -> bool:
    try:
        present = stamp_of(name).read_text().strip()
    except OSError:
        return False
    return present == fingerprint(venv_of(name), files_of(name)) and venv_python(name).exists()


def python_version_of(venv: Path) -> tuple[int, ...]:
    """The version in pyvenv.cfg, read without starting anything; () when there is no such environment."""
    try:
        found = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)", (venv / "pyvenv.cfg").read_text(), re.M)
    except OSError:
        return ()
    return tuple(int(part) for part in found.groups()) if found else ()


def install(*names: str) -> None:
    """Bring the named environments up to their locks. Two callers at once take turns."""
    if all(is_current(name) for name in names):
        return
    refuse_unsupported_machine()
    with turn():
        missing = [name for name in names if not is_current(name)]
        if not missing:
            return
        installer = find_installer()
        announce(missing, installer)
        began = time.monotonic()
        for name in missing:
            install_one(name, installer)
        compile_own_code()
        say(f"Installed in {time.monotonic() - began:.0f} s.")


def install_one(name: str, installer: Installer) -> None:
    venv = venv_of(name)
    drop_stamps(venv, name)
    if not is_usable(venv) or not installer.can_fill(venv):
        shutil.rmtree(venv, ignore_errors=True)
        installer.make(venv)
    lock_file, *sources = files_of(name)
    installer.fill(venv, lock_file, name)
    for source in sources:
        installer.build(venv, source, f"{name}: {source.stem}")
    if name == "platform":
        link_checkout(venv)
    stamp_of(name).write_text(fingerprint(venv, files_of(name)) + "\n")


def drop_stamps(venv: Path, name: str) -> None:
    """A new platform also drops what was laid on top of it."""
    stamps = [stamp_of(name)] if name in LAYERS else sorted(venv.glob("nabla-*.stamp"))
    for stamp in stamps:
        stamp.unlink(missing_ok=True)


def is_usable(venv: Path) -> bool:
    """An environment whose Python was upgraded away or is unsupported has to be made again."""
    if python_version_of(venv) not in SUPPORTED:
        return False
    return version_of(str(venv / "bin" / "python")) == python_version_of(venv)


def link_checkout(venv: Path) -> None:
    """Make `services`, `libs` and the client importable from the checkout, and `nabla` a command.

    A .pth file and a four-line script do what an editable installation would, without a build backend.
    """
    major, minor = python_version_of(venv)
    site = venv / "lib" / f"python{major}.{minor}" / "site-packages"
    (site / "nabla-checkout.pth").write_text(f"{ROOT}\n{ROOT / 'libs' / 'client'}\n")
    script = venv / "bin" / "nabla"
    script.write_text(
        "#!/bin/sh\n"
        "# written by infra/setup.py; sh, because a #! line breaks on long paths and on spaces\n"
        f"exec '{venv_quoted(venv)}/bin/python' -c "
        '\'import sys; sys.argv[0] = "nabla"; from nabla.cli import main; sys.exit(main())\' "$@"\n'
    )
    script.chmod(0o755)


def venv_quoted(venv: Path) -> str:
    return str(venv).replace("'", "'\\''")


def compile_own_code() -> None:
    """Ray workers and services start in a third of the time when nothing has to be parsed."""
    tops = [str(ROOT / top) for top in ("services", "libs") if (ROOT / top).is_dir()]
    python = venv_python("platform")
    if tops and python.exists():
        subprocess.run([python, "-m", "compileall", "-q", *tops], env=child_environment(), check=False)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Windows has no fcntl, and must still be told why it is refused: so the import is here."""
    import fcntl

    with (ROOT / ".venv.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another setup is installing into this checkout: waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -----------------------------------------------------------------------------
# Installers: uv where it is, pip otherwise
# -----------------------------------------------------------------------------


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


def has_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def answers(command: list[str]) -> bool:
    """A pyenv shim exists for a Python that is not chosen: only starting it tells."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    return False


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


# -----------------------------------------------------------------------------
# What a person sees
# -----------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


class Line:
    """One line of progress: redrawn in a terminal, written again every ten seconds anywhere else."""

    def __init__(self, title: str) -> None:
        self.title, self.began, self.shown, self.detail = title, time.monotonic(), 0.0, ""
        self.terminal = sys.stdout.isatty()

    def show(self, detail: str = "") -> None:
        self.detail = detail or self.detail
        now = time.monotonic()
        if now - self.shown < (0.1 if self.terminal else 10.0):
            return
        first, self.shown = not self.shown, now
        if self.terminal or not first:
            self._write(f"  {self.title:<20} {now - self.began:4.0f} s  {self.detail}")

    def end(self, outcome: str = "done") -> None:
        text = f"  {self.title:<20} {time.monotonic() - self.began:4.0f} s  {outcome}"
        self._write(text)
        if self.terminal:
            print(flush=True)

    def _write(self, text: str) -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]}\033[K", end="", flush=True)
        else:
            say(text)


def announce(names: list[str], installer: Installer) -> None:
    """Say what comes over the wire before it does, and stop while the disk is still usable."""
    megabytes = sum(download_mb(name) for name in names)
    say(f"Installing {' + '.join(names)} with {installer.name} for Python {chosen_version(names)}.")
    say(f"To download: about {megabytes:.0f} MB, less what the package cache has.")
    free = shutil.disk_usage(ROOT).free / 1e6
    needed = megabytes * DISK_PER_DOWNLOAD
    if free < needed:
        raise SetupError(
            f"There are {free:.0f} MB free under {ROOT}, and the installation needs about {needed:.0f} MB.\n"
            "Free some space, or move the checkout to a larger disk, and call this again."
        )


def chosen_version(names: list[str]) -> str:
    kept = python_version_of(venv_of(names[0]))
    return ".".join(map(str, kept if kept in SUPPORTED else sys.version_info[:2]))


def download_mb(name: str) -> float:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return float(json.loads(SIZES.read_text())[name][machine()])
    return 0.0


def machine() -> str:
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())


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


def child_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in REDIRECTS}


def installer_environment() -> dict[str, str]:
    patient = {"UV_HTTP_TIMEOUT": "120", "UV_COMPILE_BYTECODE_TIMEOUT": "600", "PIP_DEFAULT_TIMEOUT": "120"}
    return {**patient, **child_environment(), "NO_COLOR": "1"}


# -----------------------------------------------------------------------------
# Checks: two at a time, each with its time
# -----------------------------------------------------------------------------


class Check(NamedTuple):
    name: str
    command: list[str]
    folder: Path


def checks() -> list[Check]:
    """Slowest first, so that two workers end together."""
    tool = ROOT / ".venv" / "bin"
    proto = ROOT / "proto"
    # `make test` has the same on PostgreSQL too.
    quick = ["tests/unit", "tests/contract", "-q", "-n", "3", "-m", "not postgres and not full"]
    found = [
        Check("tests", [str(tool / "python"), "-m", "pytest", *quick], ROOT),
        Check("types", [str(tool / "mypy")], ROOT),
        Check("architecture", [str(tool / "lint-imports")], ROOT),
        Check("lint", [str(tool / "ruff"), "check", "."], ROOT),
        Check("format", [str(tool / "ruff"), "format", "--check", "."], ROOT),
        Check("buf-lint", [str(tool / "buf"), "lint"], proto),
    ]
    released = sorted(proto.glob("*.binpb*"))
    if released:
        against = [str(tool / "buf"), "breaking", "--against", released[-1].name]
        found.append(Check("buf-breaking", against, proto))
    return found


def run_checks(chosen: list[Check]) -> int:
    from concurrent.futures import ThreadPoolExecutor, as_completed

    began, failed = time.monotonic(), []
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = {pool.submit(run_check, each): each.name for each in chosen}
        for future in as_completed(running):
            name, (code, seconds, output) = running[future], future.result()
            say(f"  {'ok  ' if code == 0 else 'FAIL'}  {name:<14} {seconds:6.1f} s")
            if code:
                failed.append((name, output))
    for name, output in failed:
        say(f"\n--- {name} " + "-" * (100 - len(name)) + f"\n{output.rstrip()}")
    outcome = f"failed: {', '.join(name for name, _ in failed)}" if failed else "all passed"
    say(f"\n{len(chosen)} checks in {time.monotonic() - began:.1f} s, {outcome}.")
    return 1 if failed else 0


def run_check(check: Check) -> tuple[int, float, str]:
    began = time.monotonic()
    done = subprocess.run(
        check.command, cwd=check.folder, capture_output=True, text=True, env=child_environment(), check=False
    )
    return done.returncode, time.monotonic() - began, done.stdout + done.stderr


# -----------------------------------------------------------------------------
# Locks
# -----------------------------------------------------------------------------

LOCKED = ("platform", "source", "serving", "notebook", "postgres", "dev")
KEPT_FOR_LOCKS = ("UV_CACHE_DIR", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_HTTP_TIMEOUT", "UV_NATIVE_TLS")


def write_locks(uv: list[str]) -> None:
    """Resolve for all Pythons and machines at once, from the index alone: local files are no source."""
    import tempfile

    sizes: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in LOCKED:
            line = Line(f"lock {name}")
            compile_lock(uv, f"{name}.in", LOCKS / f"{name}.txt", ["--no-header", *lock_options(name)])
            detailed = Path(scratch) / f"pylock.{name}.toml"
            compile_lock(uv, f"{name}.txt", detailed, ["--no-deps", "--format", "pylock.toml"])
            sizes[name] = measure(name, detailed)
            line.end(", ".join(f"{mb:.0f} MB on {on}" for on, mb in sizes[name].items()))
    SIZES.write_text(json.dumps(sizes, indent=2) + "\n")


def lock_options(name: str) -> list[str]:
    if name == "platform":
        without = [line for line in (LOCKS / "source.in").read_text().split("\n") if line and line[0] != "#"]
        return [option for package in without for option in ("--no-emit-package", package)]
    if name in LAYERS:
        return ["-c", "platform.txt"]
    return ["--no-deps", "-c", "platform.txt"] if name == "source" else []


def compile_lock(uv: list[str], source: str, target: Path, options: list[str]) -> None:
    command = [*uv, "pip", "compile", source, "--output-file", str(target), "--no-config", "--universal"]
    command += ["--upgrade", "--generate-hashes", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    command += ["--python-version", "3.11", "--python", sys.executable, *options]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("UV_", "PIP_")) or name in KEPT_FOR_LOCKS
    }
    done = subprocess.run(command, cwd=LOCKS, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"{done.stderr}\nuv could not resolve {source}. Change the pin in it that is in the way.")


def measure(name: str, detailed: Path) -> dict[str, float]:
    """MB to download on each machine, for the worst of the Pythons; refuses a package with no wheel."""
    import tomllib

    packages = tomllib.loads(detailed.read_text())["packages"]
    totals = {on: max(download_bytes(name, packages, on, python) for python in SUPPORTED) for on in MACHINES}
    return {on: round(total / 1e6, 1) for on, total in totals.items()}


def download_bytes(name: str, packages: list[dict[str, Any]], on: str, python: tuple[int, int]) -> int:
    total = 0
    for package in packages:
        if not marker_admits(package.get("marker", ""), python):
            continue
        files = [package["sdist"]] if name == "source" else package.get("wheels", [])
        sizes = [file["size"] for file in files if name == "source" or wheel_fits(file["url"], on, python)]
        if not sizes:
            what = f"{package['name']} {package['version']}"
            where = f"Linux {on} with Python {python[0]}.{python[1]}"
            raise SetupError(f"{what} has no wheel for {where}. Pin another version, or move it to source.in.")
        total += max(sizes)
    return total


def marker_admits(marker: str, python: tuple[int, int]) -> bool:
    """Only what the locks hold: bounds on the Python, and systems that are not CPython on Linux."""
    if re.search(r"== '(win32|cygwin|darwin|Windows|Darwin|nt|pypy|PyPy)'", marker):
        return False
    for operator, major, minor in re.findall(r"python_(?:full_)?version (<|>=) '(\d+)\.(\d+)", marker):
        if (python < (int(major), int(minor))) != (operator == "<"):
            return False
    return True


def wheel_fits(url: str, on: str, python: tuple[int, int]) -> bool:
    """Whether a wheel's file name admits this Python on glibc 2.28 of this machine."""
    pythons, abis, systems = url.rsplit("/", 1)[-1].removesuffix(".whl").split("-")[-3:]
    if systems != "any" and not any(system_fits(system, on) for system in systems.split(".")):
        return False
    tag = f"cp{python[0]}{python[1]}"
    if tag in pythons.split(".") and abis in (tag, "abi3", "none"):
        return True
    if abis == "abi3":
        return any(int(found) <= python[1] for found in re.findall(r"cp3(\d+)", pythons))
    return abis == "none" and "py3" in pythons.split(".")


def system_fits(system: str, on: str) -> bool:
    if not system.endswith(on):
        return False
    glibc = re.match(r"manylinux_2_(\d+)_", system)
    return int(glibc.group(1)) <= 28 if glibc else system.startswith(("manylinux1", "manylinux2", "linux"))


# -----------------------------------------------------------------------------
# The Python this runs on
# -----------------------------------------------------------------------------


def refuse_unsupported_machine() -> None:
    if not sys.platform.startswith("linux") or machine() not in MACHINES:
        raise SetupError(
            f"Nabla runs on Linux, x86-64 or aarch64; this is {platform.system()} on {platform.machine()}: "
            "Ray clusters, sandboxes and GPUs need it. On Windows use WSL 2, on a Mac a Linux machine."
        )


def move_to_supported_python() -> None:
    """Start again under a supported Python when this is another one."""
    if sys.version_info[:2] in SUPPORTED:
        return
    found = find_python() or fetch_python()
    if found is None or os.environ.get("NABLA_SETUP_MOVED"):
        raise SetupError(no_python_message(sys.version_info[0], sys.version_info[1]))
    os.environ["NABLA_SETUP_MOVED"] = "1"
    sys.stdout.flush()
    os.execv(found, [found, os.path.abspath(__file__), *sys.argv[1:]])


def find_python(path: str | None = None) -> str | None:
    for major, minor in SUPPORTED:
        found = shutil.which(f"python{major}.{minor}", path=path)
        if found and version_of(found) == (major, minor):
            return found
    return None


def fetch_python() -> str | None:
    """uv may have a Python of its own, or may be able to fetch one; not relied on."""
    uv = find_uv()
    if uv is None:
        return None
    say("There is no Python 3.11, 3.12 or 3.13 on the PATH: asking uv for one, which may download it.")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run([*uv, "python", "install", "3.13"], capture_output=True, timeout=300, check=False)
        asked = subprocess.run([*uv, "python", "find", "3.13"], capture_output=True, text=True, timeout=60, check=False)
        found = asked.stdout.strip()
        if found and version_of(found) == (3, 13):
            return found
    return None


def version_of(python: str) -> tuple[int, ...]:
    """What the interpreter itself says; () when it does not start."""
    ask = [python, "-c", "import sys; print(sys.version_info[0], sys.version_info[1])"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired, ValueError):
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=False, env=child_environment())
        return tuple(int(part) for part in answer.stdout.split())
    return ()


def no_python_message(major: int, minor: int) -> str:
    return (
        f"This is Python {major}.{minor}; Nabla needs 3.11, 3.12 or 3.13 (Ray has no build for others), and "
        "none of them is on the PATH. On Debian 12 and 13 and on Ubuntu 24.04 run "
        "`apt-get update && apt-get install python3 python3-venv` as root; elsewhere install uv, which brings one with "
        "`uv python install 3.13`."
    )


def main(argv: list[str]) -> int:
    command, *args = argv or ["help"]
    if command not in COMMANDS:
        say(f"There is no command `{command}` here. These are:\n")
        help_([])
        return 2
    try:
        if command != "help":
            move_to_supported_python()
        return COMMANDS[command](args)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. What was downloaded is kept: call this again to go on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
