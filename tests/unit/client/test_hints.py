from __future__ import annotations

import pytest

from nabla.hints import RULES, Ending, hint, readable_size
from nabla.objects import Attempt, Job, JobTemplate, Resources

pytestmark = pytest.mark.unit

GIB = 1 << 30

NO_INTERNET = ("no internet", "--env FILE", "$NABLA_STORAGE")
# As printed in a sandbox: by whom, with which exit code.
WITHOUT_INTERNET: list[tuple[str, int, tuple[str, ...]]] = [
    (
        "pip",
        1,
        (
            "WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection "
            "broken by 'NameResolutionError(\"HTTPSConnection(host='packages.example', port=443): Failed to resolve "
            "'packages.example' ([Errno -3] Temporary failure in name resolution)\")': /simple/humanize/",
            "ERROR: Could not find a version that satisfies the requirement humanize (from versions: none)",
            "ERROR: No matching distribution found for humanize",
        ),
    ),
    ("urllib", 1, ("urllib.error.URLError: <urlopen error [Errno -3] Temporary failure in name resolution>",)),
    ("an address", 1, ("OSError: [Errno 101] Network is unreachable",)),
    ("curl", 6, ("curl: (6) Could not resolve host: example.com",)),
    ("wget", 4, ("wget: unable to resolve host address 'example.com'",)),
    ("git", 128, ("fatal: unable to access 'http://example.com/x/': Could not resolve host: example.com",)),
]

# name, how it ended, what the hint must say
ENDINGS: list[tuple[str, Ending, tuple[str, ...]]] = [
    (
        "a wish that no node can meet",
        Ending("failed", "needs 1 GPU (B900), and no node has such a GPU"),
        ("nabla machines", "ask for"),
    ),
    ("a start that failed for now", Ending("failed", "x", reason="start_failure"), ("nabla jobs retry", "--retries")),
    (
        "a workspace over the limit",
        Ending("failed", "the workspace cannot be unpacked: it unpacks to more than 50 bytes", reason="refused"),
        (".nablaignore", "$NABLA_STORAGE"),
    ),
    (
        "a script whose interpreter is missing",
        Ending("failed", "a.sh is there, and not the interpreter that its first line names: /x", exit_code=127),
        ("first line", "nabla run -- bash"),
    ),
    (
        "a missing module in the default environment",
        Ending("failed", exit_code=1, lines=("ModuleNotFoundError: No module named 'sklearn.svm'",)),
        ("scikit-learn", "requirements.txt", "--env active"),
    ),
    (
        "a missing module in the user's environment",
        Ending("failed", exit_code=1, lines=("ModuleNotFoundError: No module named 'torch'",), environment="venv"),
        ("pip install torch",),
    ),
    (
        "a package that `python -m` does not find",
        Ending("failed", exit_code=1, lines=("/usr/bin/python3: No module named pytest",)),
        ("'pytest'", "requirements.txt"),
    ),
    (
        "a module that `python -m` does not find",
        Ending(
            "failed", exit_code=1, lines=("/usr/bin/python: No module named train", "ImportError: No module named x")
        ),
        ("'x'",),
    ),
    (
        "out of memory with peak and limit",
        Ending("failed", "killed: out of memory", 137, (), 3 * GIB, 2 * GIB),
        ("3.0 GiB", "2.0 GiB", "--memory"),
    ),
    (
        "out of memory with no numbers",
        Ending("failed", "over its memory limit", 137),
        ("more memory than it may", "--memory"),
    ),
    (
        "a GPU out of memory",
        Ending("failed", exit_code=1, lines=("torch.OutOfMemoryError: CUDA out of memory. Tried",)),
        ("GPU",),
    ),
    (
        "Python out of memory",
        Ending("failed", exit_code=1, lines=("MemoryError: Unable to allocate 8 GiB",)),
        ("--memory",),
    ),
    (
        "numpy out of memory",
        Ending("failed", exit_code=1, lines=("numpy._core._exceptions._ArrayMemoryError: Unable to allocate",)),
        ("--memory",),
    ),
    (
        "a command that does not exist (bash)",
        Ending("failed", exit_code=127, lines=("bash: line 1: trian: command not found",)),
        ("'trian'",),
    ),
    (
        "a command that does not exist (dash)",
        Ending("failed", exit_code=127, lines=("sh: 1: trian: not found",)),
        ("'trian'",),
    ),
    ("a command that does not exist (no words)", Ending("failed", exit_code=127), ("does not exist",)),
    ("a timeout", Ending("timed_out", timeout_s=30.0), ("30 s", "--timeout")),
    (
        "a script that may not be run",
        Ending("failed", exit_code=126, lines=("sh: 1: ./go.sh: Permission denied",)),
        ("chmod +x ./go.sh",),
    ),
    (
        "writing where it may not",
        Ending("failed", exit_code=1, lines=("PermissionError: [Errno 13] Permission denied: '/data/x'",)),
        ("'/data/x'", "$NABLA_ARTIFACTS"),
    ),
    (
        "a full disk",
        Ending("failed", exit_code=1, lines=("OSError: [Errno 28] No space left on device",)),
        ("nabla doctor",),
    ),
    (
        "a file that did not go along",
        Ending("failed", exit_code=1, lines=("FileNotFoundError: [Errno 2] No such file or directory: 'data/a.csv'",)),
        ("data/a.csv", ".nablaignore"),
    ),
    (
        "a script that is not there",
        Ending("failed", exit_code=2, lines=("python: can't open file '/workspace/trian.py': [Errno 2] No such file",)),
        ("trian.py",),
    ),
    *(
        (f"no internet ({name})", Ending("failed", exit_code=code, lines=lines, isolation="bwrap"), NO_INTERNET)
        for name, code, lines in WITHOUT_INTERNET
    ),
    ("killed", Ending("failed", exit_code=137), ("SIGKILL",)),
    ("crashed", Ending("failed", exit_code=139), ("PYTHONFAULTHANDLER",)),
]


@pytest.mark.parametrize(("ending", "words"), [row[1:] for row in ENDINGS], ids=[row[0] for row in ENDINGS])
def test_each_ending_gets_its_hint(ending: Ending, words: tuple[str, ...]) -> None:
    advice = hint(ending)
    assert advice is not None
    assert all(word in advice for word in words), advice


def test_every_rule_has_an_ending_in_the_table() -> None:
    used = {next(rule for rule in RULES if rule(ending)) for _, ending, _ in ENDINGS}
    assert used == set(RULES)


@pytest.mark.parametrize(
    "ending",
    [
        Ending("succeeded", exit_code=0, lines=("ModuleNotFoundError: No module named 'x'",)),
        Ending("cancelled", exit_code=137),
        Ending("failed", exit_code=3, lines=("accuracy too low", "page not found", "Error: not found")),
        Ending("failed", exit_code=1, lines=("ValueError: bad",)),
        Ending("failed", exit_code=1, lines=("OSError: [Errno 101] Network is unreachable",), isolation="process"),
        Ending("failed", exit_code=1, lines=("ERROR: Could not find a version that satisfies the requirement nunpy",)),
    ],
)
def test_others_get_none(ending: Ending) -> None:
    assert hint(ending) is None


def test_an_ending_is_read_off_a_job() -> None:
    job = Job(
        state="failed",
        detail="attempt 2 failed",
        exit_code=137,
        attempt=Attempt(detail="out of memory", peak_memory_bytes=GIB, isolation="bwrap"),
        template=JobTemplate(resources=Resources(memory_bytes=GIB // 2)),
    )
    assert "1.0 GiB of the 512.0 MiB" in str(hint(Ending.of(job, [])))
    assert Ending.of(job, []).isolation == "bwrap"


def test_sizes_are_readable() -> None:
    assert [readable_size(n) for n in (0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
