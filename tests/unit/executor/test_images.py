"""Images without an engine: who is in them, which of them stay, what of a job goes into a container's configuration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.executor.adapters.attempts.attempt_folder import AttemptFolder, AttemptSpec, Bind, Image, MalformedSpec
from services.executor.adapters.runtimes import image_root, seccomp
from services.executor.adapters.runtimes.podman import job_config, reason_in, run_command
from services.executor.domain.images import (
    BadUser,
    Kept,
    accounts_in,
    folder_name,
    groups_in,
    other_machine,
    pull_problem,
    registry_of,
    too_many,
    user_of,
)

pytestmark = pytest.mark.unit

CONFIG = {
    "process": {
        "args": ["/run/podman-init", "--", "true"],
        "env": ["PATH=/image/bin", "HOME=/root", "PYTHONPATH=/image/lib", "LANG=de", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {"bounding": ["CAP_CHOWN"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1_048_576, "soft": 1_048_576}],
        "user": {"uid": 7, "gid": 7, "additionalGids": [10]},
    },
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": []},
        {"destination": "/dev/shm", "type": "bind", "source": "/shm", "options": []},
    ],
    "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}},
}


def spec_of(**fields: object) -> AttemptSpec:
    defaults: dict[str, object] = {
        "attempt_id": "a1",
        "job_id": "j1",
        "command": ["python", "a b"],
        "isolation": "podman",
        "run_as_uid": 61_001,
        "env": {"SECRET": "a\nb", "PYTHONPATH": "/opt/nabla"},
        "image": Image(image="0123", engine=["/usr/bin/podman"]),
        "binds_ro": [Bind("/a:b,c", "/opt/nabla/nabla")],
    }
    return AttemptSpec(**defaults | fields)  # type: ignore[arg-type]


def test_a_container_gets_the_job_and_loses_its_rights(tmp_path: Path) -> None:
    config = job_config(CONFIG, spec_of(), AttemptFolder(tmp_path), bounded=True, handed="")
    process = config["process"]
    assert process["args"] == ["/run/podman-init", "--", "/bin/sh", "-c", 'exec "$@"', "sh", "python", "a b"]
    assert set(map(tuple, process["capabilities"].values())) == {()}
    assert process["noNewPrivileges"]
    assert process["user"] == {"uid": 7, "gid": 7, "additionalGids": []}
    assert process["rlimits"] == [{"type": "RLIMIT_CORE", "hard": 0, "soft": 0}]
    assert (process["cwd"], config["linux"]) == ("/workspace", {"seccomp": seccomp.oci_profile()})
    places = [mount["destination"] for mount in config["mounts"]]
    assert len(places) == len(set(places))
    assert {mount["destination"]: mount["type"] for mount in config["mounts"]}["/dev/shm"] == "tmpfs"
    sdk = next(mount for mount in config["mounts"] if mount["destination"] == "/opt/nabla/nabla")
    assert (sdk["source"], "ro" in sdk["options"], "nosuid" in sdk["options"]) == ("/a:b,c", True, True)


def test_the_image_s_environment_lies_between_defaults_and_the_user_s(tmp_path: Path) -> None:
    process = job_config(CONFIG, spec_of(), AttemptFolder(tmp_path), bounded=True, handed="")["process"]
    seen = dict(line.split("=", 1) for line in process["env"])
    assert (seen["PATH"], seen["LANG"], seen["HOME"], seen["SECRET"]) == ("/image/bin", "de", "/tmp/home", "a\nb")
    assert seen["PYTHONPATH"] == "/opt/nabla:/image/lib"


def test_without_a_control_group_processes_are_bounded_all_the_same(tmp_path: Path) -> None:
    limits = job_config(CONFIG, spec_of(), AttemptFolder(tmp_path), bounded=False, handed="")["process"]["rlimits"]
    assert [limit["type"] for limit in limits] == ["RLIMIT_CORE", "RLIMIT_NPROC"]


def test_an_image_without_a_shell_starts_the_words_themselves(tmp_path: Path) -> None:
    spec = spec_of(image=Image(image="0123", engine=["podman"], has_shell=False))
    args = job_config(CONFIG, spec, AttemptFolder(tmp_path), bounded=True, handed="")["process"]["args"]
    assert args[2:] == ["python", "a b"]


def test_no_value_of_a_job_is_on_a_command_line(tmp_path: Path) -> None:
    words = run_command(spec_of(), AttemptFolder(tmp_path), "ns:/proc/1/fd/9", ["/usr/bin/podman"])
    assert "--network=ns:/proc/1/fd/9" in words
    assert not any("a\nb" in word or "python" in word for word in words)


@pytest.mark.parametrize("fields", [{"image": None}, {"image": Image(image="-v")}, {"image": Image(image="")}])
def test_a_spec_without_a_true_image_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(MalformedSpec):
        spec_of(**fields)


def test_a_spec_with_an_image_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = spec_of(image=Image(image="0123", engine=["podman"], uid=0, gid=5, devices=["nvidia.com/gpu=1"]))
    assert AttemptFolder.create(tmp_path, spec).read_spec() == spec


def test_users_and_groups_of_an_image_are_found() -> None:
    users = accounts_in(["root:x:0:0::/root:/bin/sh", "app:x:1000:50::/:", "broken", "also:x:y:z"])
    groups = groups_in(["root:x:0:", "data:x:7:app", "broken"])
    asked = ["app", "app:data", "1000", "1000:9", "5", "root"]
    assert [user_of(each, users, groups) for each in asked] == [
        (1000, 50),
        (1000, 7),
        (1000, 50),
        (1000, 9),
        (5, 0),
        (0, 0),
    ]
    assert isinstance(user_of("nobody", users, groups), BadUser)
    assert isinstance(user_of("app:none", users, groups), BadUser)


def test_registries_are_told_from_names() -> None:
    names = ["python", "team/image", "r.example/image", "localhost/x", "host:5000/x", "localhost:5000/x"]
    assert [registry_of(name) for name in names] == ["", "", "r.example", "localhost", "host:5000", "localhost:5000"]
    assert folder_name("r.example/team/image:1@sha256:ab") == "r.example_team_image_1_sha256_ab"


def test_the_longest_unused_go_and_none_in_use() -> None:
    kept = [Kept("new", 5, 9), Kept("old", 5, 1), Kept("used", 5, 0), Kept("middle", 5, 5)]
    assert too_many(kept, 20, []) == []
    assert too_many(kept, 10, ["used"]) == ["old", "middle"]
    assert too_many(kept, 0, ["used", "new"]) == ["old", "middle"]


@pytest.mark.parametrize(
    ("said", "told", "passes"),
    [
        ("reading manifest 1 in r.example/x: manifest unknown", "there is no image r.example/x:1", False),
        ("requested access to the resource is denied", "an image that is not public needs --registry-username", False),
        ("short-name resolution enforced", "write the registry's host before it", False),
        ("dial tcp: connection refused", "r.example/x:1 cannot be fetched now: dial tcp: connection refused", True),
        ("received unexpected HTTP status: 503 Service Unavailable", "503 Service Unavailable", True),
        ("toomanyrequests: you have reached your pull rate limit", "cannot be fetched now", True),
        ("", "no reason given", False),
    ],
)
def test_why_an_image_cannot_be_had_is_told_in_words(said: str, told: str, passes: bool) -> None:
    problem, may_pass = pull_problem("r.example/x:1", said, has_credentials=False)
    assert told in problem
    assert may_pass == passes


def test_of_what_podman_says_the_reason_is_told() -> None:
    said = 'time="now" level=warning msg="noise"\nError: initializing source: not found\n'
    assert reason_in(said) == "initializing source: not found"
    assert (reason_in("a\nlast words\n"), reason_in("")) == ("last words", "")


def test_links_of_an_image_do_not_lead_out_of_it(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "usr" / "bin").mkdir(parents=True)
    outside.mkdir()
    (outside / "sh").write_text("outside")
    (outside / "sh").chmod(0o755)
    (root / "bin").symlink_to("usr/bin")
    (root / "usr" / "bin" / "sh").symlink_to("/usr/bin/dash")
    (root / "usr" / "bin" / "dash").write_text("inside")
    assert not image_root.has_program(root, "/bin/sh")
    (root / "usr" / "bin" / "dash").chmod(0o755)
    assert image_root.has_program(root, "/bin/sh")
    (root / "etc").symlink_to(outside)
    assert image_root.lines_of(root, "/etc/sh") == []
    (root / "up").symlink_to("../../../../outside/sh")
    assert image_root.find_inside(root, "/up") is None
    (root / "loop").symlink_to("loop")
    assert image_root.find_inside(root, "/loop") is None
    os.mkfifo(root / "pipe")
    assert image_root.lines_of(root, "/pipe") == []


@pytest.mark.parametrize(
    ("architecture", "machine", "refused"),
    [
        ("arm64", "x86_64", True),
        ("amd64", "x86_64", False),
        ("arm64", "aarch64", False),
        ("", "x86_64", False),
        ("arm64", "unheard-of", False),
    ],
)
def test_an_image_for_another_machine_is_told(architecture: str, machine: str, refused: bool) -> None:
    assert bool(other_machine(architecture, machine)) == refused
