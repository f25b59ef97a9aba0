"""One sentence of advice for a job that failed, from how it ended and its last lines.

A rule looks at an Ending and answers a hint or nothing; the first answer wins, so what the platform knows for
certain (memory, time) comes before what is guessed from the log.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

from nabla.objects import Job

LAST_LINES = 20


@dataclass(frozen=True)
class Ending:
    """How a job ended, as far as the API tells."""

    state: str
    detail: str = ""
    exit_code: int | None = None
    lines: Sequence[str] = ()
    peak_memory_bytes: int = 0
    memory_limit_bytes: int = 0
    timeout_s: float = 0.0
    environment: str = "default"
    isolation: str = ""
    reason: str = ""

    @classmethod
    def of(cls, job: Job, lines: Sequence[str]) -> Ending:
        attempt, template = job.attempt, job.template
        return cls(
            state=job.state,
            detail=" ".join(filter(None, (job.detail, attempt.detail if attempt else ""))),
            exit_code=job.exit_code,
            reason=attempt.reason if attempt else "",
            lines=lines[-LAST_LINES:],
            peak_memory_bytes=attempt.peak_memory_bytes if attempt else 0,
            memory_limit_bytes=template.resources.memory_bytes,
            timeout_s=template.timeout_s,
            environment=template.environment.kind,
            isolation=attempt.isolation if attempt else "",
        )


Rule = Callable[[Ending], "str | None"]


def hint(ending: Ending) -> str | None:
    """The first rule's advice, or None for a job that did not fail or fails in its own way."""
    if ending.state not in ("failed", "timed_out"):
        return None
    return next((advice for advice in (rule(ending) for rule in RULES) if advice), None)


def timed_out(ending: Ending) -> str | None:
    if ending.state != "timed_out":
        return None
    limit = f" of {ending.timeout_s:g} s" if ending.timeout_s else ""
    return f"The job ran into its time limit{limit}; give it more with --timeout, such as --timeout 2h."


def out_of_memory(ending: Ending) -> str | None:
    if not re.search(r"out of memory|memory limit|oom[- _]?kill", ending.detail, re.IGNORECASE):
        return None
    peak, limit = readable_size(ending.peak_memory_bytes), readable_size(ending.memory_limit_bytes)
    used = f"It used {peak}" if ending.peak_memory_bytes else "It used more memory than it may"
    allowed = f" of the {limit} it asked for" if ending.memory_limit_bytes else ""
    return f"The job ran out of memory. {used}{allowed}; ask for more with --memory, or use smaller batches."


def no_machine(ending: Ending) -> str | None:
    if not re.search(r"no node has|largest node has|waited as long as it may", ending.detail):
        return None
    return (
        "`nabla machines` shows what there is and what is free; ask for one of those or for less, "
        "or let the job wait longer with --max-wait."
    )


def start_failed(ending: Ending) -> str | None:
    if ending.reason != "start_failure":
        return None
    return "This may pass: `nabla jobs retry` runs it again, and --retries N has such a start tried again by itself."


def workspace_too_large(ending: Ending) -> str | None:
    if not re.search(r"unpacks to more than|the most for a workspace|bytes packed", ending.detail):
        return None
    return "Leave large files out by naming them in .nablaignore, and keep data in $NABLA_STORAGE."


def no_interpreter(ending: Ending) -> str | None:
    if "its first line names" not in ending.detail:
        return None
    return "Mend the script's first line, or name the interpreter in the command: nabla run -- bash SCRIPT."


def gpu_out_of_memory(ending: Ending) -> str | None:
    if _found(r"CUDA out of memory|OutOfMemoryError: CUDA|CUDNN_STATUS_ALLOC_FAILED", ending) is None:
        return None
    return "The GPU ran out of memory: use a smaller batch or model, or ask for another GPU with --gpus."


def python_out_of_memory(ending: Ending) -> str | None:
    if _found(r"^(?:numpy\.\S+)?_?(?:Array)?MemoryError\b", ending) is None:
        return None
    return "Python could not get the memory it asked for: give the job more with --memory, or load less at once."


def missing_module(ending: Ending) -> str | None:
    match = _found(r"(?:ModuleNotFoundError: |ImportError: |python[\d.]*: )No module named '?([\w.]+)", ending)
    if match is None:
        return None
    package = match.group(1).split(".")[0]
    package = PACKAGES.get(package, package)
    if ending.environment == "venv":
        return f"Your environment lacks the module: run `pip install {package}` in it, and run the job again."
    return (
        f"The job's environment lacks {package!r}: write it into requirements.txt and add --env requirements.txt, "
        "or activate an environment that has it and add --env active."
    )


def command_not_found(ending: Ending) -> str | None:
    match = _found(r": ([\w./+-]+): (?:command )?not found$", ending)
    if ending.exit_code != 127 and match is None:
        return None
    name = f" {match.group(1)!r}" if match else ""
    return (
        f"The command{name} does not exist in the job. Check its spelling; "
        "a script of your own needs its path (./train.sh) and must be in the folder you ran from."
    )


def permission_denied(ending: Ending) -> str | None:
    match = _found(r"(?:^|[:\s])['\"]?([\w./+-]+)['\"]?: Permission denied", ending)
    denied = _found(r"PermissionError: .*?'([^']+)'|Read-only file system: '([^']+)'", ending)
    if ending.exit_code == 126:
        name = match.group(1) if match else "FILE"
        return f"The file may not be run: `chmod +x {name}` here and run it again, or start it through python or sh."
    if denied is None:
        return None
    path = denied.group(1) or denied.group(2)
    return (
        f"The job may not write {path!r}. It can write below $NABLA_WORKSPACE (gone afterwards), $NABLA_ARTIFACTS "
        "(kept with the job) and $NABLA_STORAGE (kept for all jobs)."
    )


def disk_full(ending: Ending) -> str | None:
    if _found(r"No space left on device|Disk quota exceeded", ending) is None:
        return None
    return "A disk is full. `nabla doctor` shows how much room there is; keep fewer checkpoints, or free some space."


def no_internet(ending: Ending) -> str | None:
    """Behind walls a job has as much network as it asked for; without walls it has this machine's own."""
    if ending.isolation == "process" or _found(_NO_NETWORK, ending) is None:
        return None
    return (
        "A job reaches the platform, with --network internet public addresses too, and no internet or other machine "
        "besides: name packages in a file and add --env FILE (they are installed before the job starts), and bring "
        "data along in the folder you run from or in $NABLA_STORAGE."
    )


def missing_file(ending: Ending) -> str | None:
    match = _found(r"(?:FileNotFoundError: .*?|can't open file )'([^']+)'", ending)
    if match is None:
        return None
    return (
        f"There is no {match.group(1)!r} in the job. Only the folder you ran from goes along, without what "
        ".gitignore and .nablaignore name; add `!NAME` to .nablaignore to take a file along."
    )


def killed(ending: Ending) -> str | None:
    if ending.exit_code not in (137, -9):
        return None
    return "The job was killed (SIGKILL), mostly for want of memory: ask for more with --memory."


def crashed(ending: Ending) -> str | None:
    if ending.exit_code not in (139, -11, 134, -6):
        return None
    return "Native code crashed. Set --env PYTHONFAULTHANDLER=1 and run again to see where."


RULES: tuple[Rule, ...] = (
    timed_out,
    out_of_memory,
    no_machine,
    start_failed,
    workspace_too_large,
    no_interpreter,
    gpu_out_of_memory,
    python_out_of_memory,
    missing_module,
    disk_full,
    permission_denied,
    command_not_found,
    no_internet,
    missing_file,
    killed,
    crashed,
)

# As resolvers, sockets, pip, curl, wget and git say it; pip's "Could not find a version" comes behind it, and without
# it is a package that does not exist.
_NO_NETWORK = (
    r"Temporary failure in name resolution|Name or service not known|Failed to resolve '|Could not resolve host"
    r"|unable to resolve host|Network is unreachable"
)

# Modules whose package has another name.
PACKAGES = {
    "sklearn": "scikit-learn",
    "cv2": "opencv-python",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "bs4": "beautifulsoup4",
    "skimage": "scikit-image",
    "dotenv": "python-dotenv",
    "dateutil": "python-dateutil",
}


def _found(pattern: str, ending: Ending) -> re.Match[str] | None:
    """The pattern in the last line that has it: what was said last is mostly what ended the job."""
    compiled = re.compile(pattern)
    return next((match for match in map(compiled.search, reversed(ending.lines)) if match), None)


def readable_size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
