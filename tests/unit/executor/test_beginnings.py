"""What keeps a job from starting: what may pass is told from what would be refused again."""

from __future__ import annotations

import errno

import pytest

from services.executor.adapters.agent.tries import GivenUp
from services.executor.adapters.attempts.attempt_folder import MalformedSpec
from services.executor.adapters.attempts.zygote import StartFailed
from services.executor.domain.beginnings import NotStarted, may_pass, sounds_passing

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "said",
    [
        "WARNING: Retrying after connection broken by 'NewConnectionError': Failed to establish a new connection\n"
        "ERROR: No matching distribution found for numpy",
        "error: Request failed after 3 retries\n  Caused by: HTTP status server error (503 Service Unavailable)",
        "error sending request for url (http://index.example/simple/numpy/)",
        "fatal: unable to access 'http://git.example/x.git/': The requested URL returned error: 502",
        "fatal: unable to access 'https://git.example/x.git/': Could not resolve host: git.example",
        "fatal: unable to access 'https://git.example/': Failed to connect to git.example port 443",
        "index.example:443 does not answer: [Errno 111] Connection refused",
        "SlowDown: Please reduce your request rate.",
        "dial tcp 10.0.0.1:443: i/o timeout",
        "Error: it was not there within 3600 s",
        "the process that watched over it was killed",
    ],
)
def test_who_does_not_answer_may_the_next_time(said: str) -> None:
    assert sounds_passing(said)


@pytest.mark.parametrize(
    "said",
    [
        "ERROR: No matching distribution found for nothing==1",
        "ERROR: Could not find a version that satisfies the requirement async-timeout==99 (from versions: 3.0, 5.0.1)",
        "Because there is no version of timeout-decorator==500 and you require it, your requirements cannot be met.",
        "Because a depends on b<2 and you require b==503, we can conclude that your requirements are unsatisfiable.",
        "fatal: repository 'https://git.example/x.git/' not found",
        "host.example:443 is not among the places that may be reached from here",
        "host.example has the private address 10.0.0.5, which this node does not connect to",
        "there is no feature/x in https://git.example/x.git",
        "manifest unknown",
    ],
)
def test_what_is_wrong_with_the_wish_stays_wrong(said: str) -> None:
    assert not sounds_passing(said)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (NotStarted("there is no such image"), False),
        (NotStarted("the registry does not answer", may_pass=True), True),
        (MalformedSpec("no command"), False),
        (OSError(errno.ENAMETOOLONG, "File name too long"), False),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (StartFailed("BlockingIOError: no more processes"), True),
        (GivenUp("the platform failed to start the job"), True),
    ],
)
def test_a_nodes_failure_may_pass_and_a_wrong_order_not(error: Exception, passes: bool) -> None:
    assert may_pass(error) == passes
