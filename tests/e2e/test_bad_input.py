"""Wrong wishes, as a person has them: the job ends within seconds, and says what was wrong and what to do, on the
terminal, in `jobs get`, in its history and as JSON."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nabla import Client
from nabla.objects import Job
from tests.integration.executor.tools import GIT_BACKEND, GitHost, git_host
from tests.support.platform import Platform

pytestmark = pytest.mark.e2e

# The attempt's own: the machine may be busy with other tests meanwhile.
SOON_S = 30.0
git_only = pytest.mark.skipif(not GIT_BACKEND.exists(), reason="git is not installed here: apt-get install git")


@dataclass(frozen=True)
class Wrong:
    """What is said on the command line, and what must come back.

    Args:
        said: each of these, in the reason.
        cause: as the history names it.
        hint: what the terminal says to do.
    """

    options: tuple[str, ...]
    said: tuple[str, ...]
    cause: str = "refused"
    code: int = 1
    command: tuple[str, ...] = ("true",)
    hint: str = ""


WRONG = {
    "image": Wrong(("--no-workspace", "--container", "localhost/nowhere:1"), ("localhost/nowhere:1",)),
    "python": Wrong(("--no-workspace", "--python", "3.99"), ("no Python 3.99", "it has 3.")),
    "environment": Wrong(("--env", "broken.txt"), ("cannot be installed", "no-such-package")),
    "command": Wrong((), ("command not found: no-such-one",), "failure", 127, ("no-such-one", "-x"), "spelling"),
    "shebang": Wrong((), ("./shebang.sh is there", "/no/such/sh"), "failure", 127, ("./shebang.sh",), "first line"),
    "not executable": Wrong((), ("not executable: ./plain.sh",), "failure", 126, ("./plain.sh",), "chmod +x"),
    "gpu model": Wrong(
        ("--no-workspace", "--gpu-model", "Nonsense9000"), ("Nonsense9000", "no node has such"), "no_such_machine",
        hint="nabla machines",
    ),
    "memory": Wrong(
        ("--no-workspace", "--memory", "900T", "--max-wait", "1s"), ("waited as long", "the largest node has"),
        "waited_too_long", hint="nabla machines",
    ),
    "time": Wrong(
        ("--no-workspace", "--timeout", "1s"), ("limit of 1 s",), "timed_out", 143, ("sleep", "60"), "--timeout"
    ),
    "private address": Wrong(("--workspace", "git+https://10.0.0.1/x.git"), ("10.0.0.1", "private address")),
}  # fmt: skip


@pytest.fixture
def workspace(folder: Path) -> Path:
    (folder / "broken.txt").write_text("no-such-package-of-nabla==99\n")
    (folder / "shebang.sh").write_text("#!/no/such/sh\ntrue\n")
    (folder / "shebang.sh").chmod(0o755)
    (folder / "plain.sh").write_text("true\n")
    return folder


def ends(platform: Platform, wrong: Wrong, folder: Path) -> None:
    """Runs it and looks at everything that a person would."""
    began_s = time.monotonic()
    done = platform.command("run", *wrong.options, "--", *wrong.command, cwd=folder)
    shown = done.stderr
    assert done.returncode == wrong.code, shown
    assert "Traceback" not in shown
    found = re.search(r"Job (js\w+)", shown)
    assert found, shown
    job_id = found[1]
    for text in filter(None, (*wrong.said, wrong.hint)):
        assert text in shown
    told = platform.command("jobs", "get", job_id)
    whole = " ".join((told.stdout + told.stderr).split())
    assert all(text in whole for text in wrong.said), whole
    detail = json.loads(platform.command("jobs", "get", job_id, "--json").stdout)
    assert all(text in " ".join(detail["job"]["detail"].split()) for text in wrong.said), detail["job"]
    assert detail["timeline"][-1]["cause"] == wrong.cause
    assert wrong.said[0] in " ".join(platform.command("jobs", "explain", job_id).stdout.split())
    assert wrong.cause in platform.command("jobs", "timeline", job_id).stdout
    for attempt in detail["attempts"]:
        assert attempt["reason"] == ("exited" if wrong.cause == "failure" else wrong.cause)
    assert time.monotonic() - began_s < 2 * SOON_S


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_wish_ends_soon_with_what_was_wrong_everywhere(name: str, platform: Platform, workspace: Path) -> None:
    ends(platform, WRONG[name], workspace)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[GitHost]:
    with git_host(tmp_path / "host") as found:
        found.commit({"train.py": "print(1)"})
        yield found


@git_only
def test_a_ref_that_does_not_exist_is_named(platform: Platform, host: GitHost, folder: Path) -> None:
    options = ("--workspace", f"git+{host.url}", "--ref", "no-such-branch")
    ends(platform, Wrong(options, ("there is no no-such-branch in",)), folder)


def until_ended(client: Client, job_id: str) -> Job:
    deadline = time.monotonic() + 2 * SOON_S
    while not (job := client.jobs.get(job_id).job).ended:
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    return job


@git_only
def test_another_try_is_of_the_first_ones_commit(platform: Platform, host: GitHost, folder: Path) -> None:
    """The branch moves between the tries; the job's own retry, and `jobs retry`, stay where the first was."""
    script = "cat train.py; exit 3"
    options = ("--workspace", f"git+{host.url}", "--ref", "main", "--retries", "1", "--retry-delay", "5s")
    done = platform.command("run", "--detach", *options, "--", script, cwd=folder)
    job_id, first = done.stdout.strip(), host.git("rev-parse", "HEAD")
    with platform.client() as client:
        deadline = time.monotonic() + SOON_S
        while len(client.jobs.get(job_id).attempts) < 1 or not client.jobs.get(job_id).attempts[0].ended_at:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        host.commit({"train.py": "print(2)"})
        assert until_ended(client, job_id).state == "failed"
        attempts = client.jobs.get(job_id).attempts
        assert [attempt.origin["commit"] for attempt in attempts] == [first, first]
        again = client.jobs.retry(job_id)
        until_ended(client, again.id)
        assert client.jobs.get(again.id).attempts[0].origin["commit"] == first


def test_an_archive_that_is_missing_or_not_given_out_is_told_apart(platform: Platform, folder: Path) -> None:
    endpoint = f"http://127.0.0.1:{platform.installation.ports['s3']}"
    common = ("--workspace", "s3://no-such-bucket/x.tar.gz", "--endpoint", endpoint)
    keys = ("--workspace-username", "nobody", "--workspace-password", "secret:WRONG_KEY")
    (folder / "key").write_text("nothing")
    made = platform.command("secrets", "set", "WRONG_KEY", "--from-file", str(folder / "key"))
    assert made.returncode == 0, made.stderr
    ends(platform, Wrong((*common, *keys), ("not given out", "password")), folder)


REFUSED = {
    "machine type": (("--no-workspace", "--machine-type", "moon-1"), ("no machine type 'moon-1'", "nabla machines")),
    "secret": (("--no-workspace", "--env", "KEY=secret:NOPE"), ("no secret NOPE", "nabla secrets set NOPE")),
    "workspace over the limit": ((), ("47.7 MiB is the most for a workspace", ".nablaignore")),
    "requirements file": (("--env", "nowhere.txt"), ("nowhere.txt",)),
    "priority": (("--no-workspace", "--priority", "101"), ("101", "0<=x<=100")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_known_to_be_wrong_is_refused_before_there_is_a_job(
    name: str, platform: Platform, workspace: Path
) -> None:
    options, said = REFUSED[name]
    (workspace / "zeros").write_bytes(bytes(60_000_000 if "over the limit" in name else 1))
    done = platform.command("run", *options, "--", "true", cwd=workspace)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "Job js" not in done.stderr
    assert all(text in done.stderr for text in said), done.stderr
