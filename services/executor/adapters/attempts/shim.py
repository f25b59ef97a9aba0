"""The process that runs one attempt and outlives everything above it: agent, zygote, Ray, the platform.

It starts the command (launch.py), keeps what it prints (spool.py), ends it when its time, its memory, its
node's contact or somebody's patience is over, and says in exit.json how it ended. It needs nothing but the
attempt's folder, and it leaves nothing behind: a shim that ends, or is killed, takes all of the job with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from services.executor.adapters.attempts import kernel, processes
from services.executor.adapters.attempts.attempt_folder import (
    WAKE,
    AttemptFolder,
    AttemptSpec,
    ExitReason,
    ExitRecord,
    MalformedSpec,
    ShimRecord,
    StartedRecord,
)
from services.executor.adapters.attempts.forward import Way
from services.executor.adapters.attempts.launch import clean_up, launch
from services.executor.adapters.attempts.masking import MaskedStream, Masker
from services.executor.adapters.attempts.spool import SpoolWriter, Stream
from services.executor.adapters.networks.network import ReadyNetwork
from services.executor.adapters.runtimes.cgroup import Cgroup, Limits
from services.executor.adapters.runtimes.runtime import Job, LaunchRefused, shell_code

NO_SECRETS: Mapping[str, str] = {}
_READ_BYTES = 256 * 1024
_SHOW_S, _SHOW_AGAIN_S = 0.1, 0.25  # a line that is not ended is shown so soon, and then so often
_CHECK_S = 1.0
_SAMPLE_S = 0.25
_SAMPLE_SHARE = 20  # memory is looked at for at most a twentieth of the time
_DRAIN_LIMIT_S = 5.0
_ENDING_S = 5.0  # what has not died by then is told
_UNDEAD_NAMED = 5
_MAX_FIRST_LINE_BYTES = 200
_ENDING_LIMIT_S = 60.0  # and by then left behind: it dies when the kernel lets it
_KILL_AGAIN_S = 1.0
_WRITE_AGAIN_S = 1.0
_CONTACT_BYTES = 128  # more than any record of a contact, so that each covers the one before
_ERROR_TAIL_BYTES = 2000


def become_shim(path: str | os.PathLike[str]) -> ShimRecord:
    """Detach this process from all above it, and record it in the attempt's folder, durably."""
    folder = AttemptFolder(path)
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    kernel.set_name("nabla-shim")
    kernel.adopt_orphans()
    os.umask(0o077)
    os.chdir("/")
    nothing = os.open(os.devnull, os.O_RDWR)
    log = os.open(folder.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, descriptor in enumerate((nothing, nothing, log)):
        os.dup2(descriptor, number)
    os.close(nothing)
    os.close(log)
    record = ShimRecord(os.getpid(), processes.start_ticks(os.getpid()) or 0, processes.boot_id())
    folder.write_shim(record)
    return record


def run_attempt(path: str | os.PathLike[str]) -> None:
    """Become the shim of this attempt and see it through. Always leaves exit.json."""
    become_shim(path)
    see_through(path)


def see_through(
    path: str | os.PathLike[str], secrets: Mapping[str, str] = NO_SECRETS, ready: ReadyNetwork | None = None
) -> None:
    """Run the attempt in this process, which is its shim already, and write its end.

    Args:
        secrets: the values of those that the spec names; they stay in this process and the job's.
        ready: a network such as the spec asks for, if one was made before.
    """
    folder = AttemptFolder(path)
    with contextlib.ExitStack() as afterwards:
        try:
            record = _run(folder, afterwards, secrets, ready)
        except Exception as error:
            _say(traceback.format_exc())
            started = folder.read_started()  # what it left is kept, although nobody knows how it ended
            reason: ExitReason = "refused" if started else "start_failure"
            record = _without_end(reason, f"the shim failed: {error!r}", started.at_us if started else None)
        undead = _end_all()
        clean_up(folder)
        if undead and undead not in record.detail:
            record = replace(record, detail="; ".join(filter(None, (record.detail, undead))))
        _write_end(folder, record)


def write_contact(path: str | os.PathLike[str]) -> None:
    """Say that this node is in contact now. The agent calls it; the shims of the node read it.

    In place, so that a full disk cannot refuse it and have every job of the node fenced; not synced, as it says
    nothing any more after a reboot.
    """
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    record = json.dumps({"boottime_s": now_s, "boot_id": processes.boot_id()}).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(descriptor, record.ljust(_CONTACT_BYTES), 0)
    finally:
        os.close(descriptor)


def _write_end(folder: AttemptFolder, record: ExitRecord) -> None:
    """However long the disk is full: an end that is not written down would be taken for a killed shim."""
    while True:
        try:
            folder.write_exit(record)
        except FileNotFoundError:  # the folder is gone, and with it whoever would have asked
            return
        except OSError as error:
            _say(f"the end cannot be written down yet: {error}")
            time.sleep(_WRITE_AGAIN_S)
        else:
            return


def _run(
    folder: AttemptFolder,
    afterwards: contextlib.ExitStack,
    secrets: Mapping[str, str],
    ready: ReadyNetwork | None,
) -> ExitRecord:
    masker = Masker(secrets.values())
    try:
        spec = _with_secrets(folder.read_spec(), secrets)
    except MalformedSpec as error:
        return _refused(str(error))
    stop = folder.read_stop()
    if stop is not None:
        return _without_end("stopped", stop.reason)
    cgroup = Cgroup.create(spec.attempt_id, Limits(spec.memory_bytes, spec.cpu_count, spec.pids_limit))
    if cgroup is not None:
        afterwards.callback(cgroup.remove)
    try:
        job = launch(spec, folder, cgroup, ready)
        afterwards.callback(job.leave_network)
        return _Attempt(folder, spec, cgroup, job, masker).run()
    except LaunchRefused as error:
        return _refused(masker.text(str(error)))


def _with_secrets(spec: AttemptSpec, secrets: Mapping[str, str]) -> AttemptSpec:
    """Raises MalformedSpec where one is missing: a job without its secret would fail later, and say less."""
    missing = sorted(set(spec.secret_env.values()) - set(secrets))
    if missing:
        raise MalformedSpec(f"the value of the secret {missing[0]} did not reach the job's watcher")
    return replace(spec, env=spec.env | {variable: secrets[name] for variable, name in spec.secret_env.items()})


class _Attempt:
    """One attempt from its release to its end: a loop over its two streams, its process and the clock."""

    def __init__(
        self, folder: AttemptFolder, spec: AttemptSpec, cgroup: Cgroup | None, job: Job, masker: Masker
    ) -> None:
        self._folder = folder
        self._spec = spec
        self._cgroup = cgroup
        self._job = job
        self._spool = SpoolWriter(folder.spool, int(spec.log_limit_bytes), int(spec.disk_reserve_bytes))
        self._selector = selectors.DefaultSelector()
        self._streams: set[int] = set()
        self._masked: dict[Stream, MaskedStream] = {"o": masker.stream(), "e": masker.stream()}
        self._unserved: list[Way] = []
        self._status: int | None = None
        self._error_tail = b""
        self._reason: ExitReason = "exited"
        self._detail = ""
        self._kill_at: float | None = None
        self._show_at: float | None = None
        self._shown: dict[str, str] = {}
        self._check_at = 0.0
        self._peak_bytes = 0
        self._begun_at = time.monotonic()
        self._begun_boottime_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._contact_s = self._begun_boottime_s

    def run(self) -> ExitRecord:
        self._watch()
        started_at_us = _now_us()
        self._job.release()
        ports = self._job.ports
        self._folder.write_started(StartedRecord(self._job.root, started_at_us, self._spec.isolation, ports))
        while self._status is None:
            self._step()
        undead = _end_all(self._tell)
        self._drain()
        self._spool.close(_now_us())
        return self._record(started_at_us, undead)

    def _tell(self, text: str) -> None:
        """A line of the platform's own in the job's log."""
        self._spool.write("e", f"[nabla: {text}]\n".encode(), _now_us())
        self._spool.flush(_now_us())

    def _watch(self) -> None:
        wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(WAKE, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        streams: list[tuple[int, Stream]] = [(self._job.stdout, "o"), (self._job.stderr, "e")]
        for descriptor, stream in streams:
            self._selector.register(descriptor, selectors.EVENT_READ, partial(self._read, descriptor, stream))
            self._streams.add(descriptor)
        process = os.pidfd_open(self._job.pid)
        self._selector.register(process, selectors.EVENT_READ, self._reap)
        self._selector.register(wake, selectors.EVENT_READ, partial(self._wake, wake))
        for way in self._job.ways:
            self._watch_relay(way)

    def _watch_relay(self, way: Way) -> None:
        relay = os.pidfd_open(way.pid)
        self._selector.register(relay, selectors.EVENT_READ, partial(self._reap_relay, way, relay))

    def _reap_relay(self, way: Way, relay: int) -> None:
        """The next check replaces it, and not this: one that dies at once must not keep the shim from its work."""
        self._selector.unregister(relay)
        os.close(relay)
        status = os.waitpid(way.pid, 0)[1]
        _say(f"a relay through the wall ended ({shell_code(status)}); another one is started")
        self._unserved.append(way)

    def _serve_ways(self) -> None:
        while self._unserved:
            try:
                self._unserved[-1].serve()
            except OSError as error:  # the node has no room for a process: the next check tries again
                _say(f"a relay cannot be started: {error}")
                return
            self._watch_relay(self._unserved.pop())

    def _step(self) -> None:
        for key, _ in self._selector.select(self._patience_s()):
            key.data()
        now = time.monotonic()
        if self._show_at is not None and now >= self._show_at:
            self._show(now)
        if now >= self._check_at:
            self._check(now)
        if self._kill_at is not None and now >= self._kill_at:
            self._job.kill()
            self._kill_at = now + _KILL_AGAIN_S

    def _patience_s(self) -> float:
        moments = [moment for moment in (self._check_at, self._show_at, self._kill_at) if moment is not None]
        return max(0.0, min(moments) - time.monotonic())

    def _read(self, descriptor: int, stream: Stream) -> None:
        try:
            data = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(descriptor)
            self._streams.discard(descriptor)
            return
        data = self._masked[stream].feed(data)
        self._spool.write(stream, data, _now_us())
        if stream == "e":
            self._error_tail = (self._error_tail + data[-_ERROR_TAIL_BYTES:])[-_ERROR_TAIL_BYTES:]
        if self._shown or self._spool.settle_at_us is not None:
            show_at = time.monotonic() + (_SHOW_AGAIN_S if self._shown else _SHOW_S)
            self._show_at = show_at if self._show_at is None else min(self._show_at, show_at)

    def _show(self, now: float) -> None:
        """Lets the agent see the lines that are not ended, and keeps those that have stood still."""
        now_us = _now_us()
        self._spool.settle(now_us)
        unfinished = self._spool.unfinished()
        if unfinished != self._shown:
            self._shown = unfinished
            self._folder.write_unfinished(unfinished)
        settle_at_us = self._spool.settle_at_us
        self._show_at = None if settle_at_us is None else now + max(_SHOW_AGAIN_S, (settle_at_us - now_us) / 1e6)

    def _reap(self) -> None:
        self._status = os.waitpid(self._job.pid, 0)[1]

    def _wake(self, descriptor: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(descriptor, 512)
        self._check_at = 0.0

    def _drain(self) -> None:
        """What is left in the pipes. All writers are dead, so their end is near; the limit is for
        surprises.
        """
        deadline = time.monotonic() + _DRAIN_LIMIT_S
        while self._streams and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.05):
                if key.fd in self._streams:
                    key.data()
        for stream, masked in self._masked.items():
            self._spool.write(stream, masked.end(), _now_us())

    def _check(self, now: float) -> None:
        self._check_at = now + _CHECK_S
        self._check_stop(now)
        self._check_time(now)
        self._check_fence(now)
        self._check_memory(now)
        self._serve_ways()

    def _check_stop(self, now: float) -> None:
        stop = self._folder.read_stop()
        if stop is not None:
            self._end("stopped", stop.reason, now, stop.grace_s)

    def _check_time(self, now: float) -> None:
        limit_s = self._spec.timeout_s
        if limit_s is None:
            return
        end = self._begun_at + limit_s
        if now >= end:
            self._end("timed_out", f"it ran longer than its limit of {limit_s:g} s", now, self._spec.stop_grace_s)
        else:
            self._check_at = min(self._check_at, end)

    def _check_fence(self, now: float) -> None:
        if self._spec.node_contact_file is None:
            return
        silence_s = time.clock_gettime(time.CLOCK_BOOTTIME) - self._last_contact_s()
        if silence_s > self._spec.node_fence_s:
            self._end("fenced", f"the node was out of contact for {silence_s:.0f} s", now, 0)

    def _last_contact_s(self) -> float:
        """No contact on record, or one from before a reboot, counts from when the job began; a record that cannot
        be read just now, from the last one that could.
        """
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(Path(str(self._spec.node_contact_file)).read_bytes())
            if record["boot_id"] == processes.boot_id():
                self._contact_s = max(float(record["boottime_s"]), self._begun_boottime_s)
        return self._contact_s

    def _check_memory(self, now: float) -> None:
        """With a control group the kernel enforces, and this ends what it left of the job: it may have killed one
        worker, for which its parent waits for ever. Without, this enforces.
        """
        if self._cgroup is not None:
            self._peak_bytes = max(self._peak_bytes, self._cgroup.resident_bytes())
            if self._status is None and self._cgroup.oom_kills():
                self._end("out_of_memory", self._killed_by_kernel(), now, 0)
        elif self._spec.memory_bytes is not None:
            self._sample(now, self._spec.memory_bytes)

    def _sample(self, now: float, limit_bytes: int) -> None:
        """Shared pages are counted once only when it matters: workers forked from a large parent are no
        crime.
        """
        pids = processes.descendants(self._job.root)
        used = processes.resident_bytes(pids)
        if used > limit_bytes:
            used = processes.proportional_bytes(pids)
        self._peak_bytes = max(self._peak_bytes, used)
        if used > limit_bytes:
            self._end("out_of_memory", _memory_detail(limit_bytes, f"it was seen to use {used}"), now, 0)
        cost_s = time.monotonic() - now
        self._check_at = min(self._check_at, now + max(_SAMPLE_S, cost_s * _SAMPLE_SHARE))

    def _end(self, reason: ExitReason, detail: str, now: float, grace_s: float) -> None:
        """Ask the job to end, and by when it must have. The first reason stays, the soonest moment counts."""
        kill_at = now + grace_s
        if self._kill_at is None:
            self._reason, self._detail, self._kill_at = reason, detail, kill_at
            if grace_s > 0:
                self._job.signal(signal.SIGTERM)
        self._kill_at = min(self._kill_at, kill_at)

    def _record(self, started_at_us: int, undead: str) -> ExitRecord:
        code = self._job.told_code(shell_code(self._status or 0), self._error_tail)
        if self._kill_at is None:
            self._explain(code)
        refused = self._reason == "refused"
        return ExitRecord(
            code=None if refused else code,
            signal=code - 128 if 128 < code <= 128 + signal.NSIG and not refused else None,
            reason=self._reason,
            detail="; ".join(filter(None, (self._detail, undead))),
            peak_rss_bytes=max(self._peak_bytes, self._largest_child_bytes()),
            started_at_us=None if refused else started_at_us,
            ended_at_us=_now_us(),
        )

    def _largest_child_bytes(self) -> int:
        """The largest single process, as the kernel saw it. That may be one that built the walls, larger than all of
        the job: then what the control group held at its most says so.
        """
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        held = self._cgroup.peak_bytes() if self._cgroup is not None else 0
        return min(largest, held) if held else largest

    def _explain(self, code: int) -> None:
        """Why a job that nobody ended has ended."""
        if self._job.setup_failed(code, self._error_tail):
            self._reason, self._detail = "refused", self._error_tail.decode("utf-8", "replace").strip()
        elif code != 0 and self._cgroup is not None and self._cgroup.oom_kills():
            self._reason, self._detail = "out_of_memory", self._killed_by_kernel()
        elif code == 127:
            word = _first_word(self._spec.command)
            missing = _missing_interpreter(self._folder.workspace, word)
            self._detail = missing or f"command not found: {word}"
        elif code == 126:
            self._detail = f"not executable: {_first_word(self._spec.command)}"
        elif 128 < code < 128 + signal.NSIG:
            self._detail = f"ended by {_signal_name(code - 128)}"

    def _killed_by_kernel(self) -> str:
        return _memory_detail(self._spec.memory_bytes, "the kernel killed a process for it")


def _end_all(tell: Callable[[str], None] | None = None) -> str:
    """Kill all that is left of the attempt, and say what would not die at once: "" in health.

    A process that waits in the kernel (for a network disk, for a GPU) takes the signal only when that lets it go.
    """
    if processes.end_descendants(_ENDING_S):
        return ""
    left = processes.descendants(os.getpid())
    names = ", ".join(f"{pid} ({processes.name_of(pid)})" for pid in left[:_UNDEAD_NAMED])
    undead = f"{len(left)} of its processes would not die: {names}{', ...' if len(left) > _UNDEAD_NAMED else ''}"
    for say in filter(None, (_say, tell)):
        say(undead)
    processes.end_descendants(_ENDING_LIMIT_S - _ENDING_S)
    return undead


def _without_end(reason: ExitReason, detail: str, started_at_us: int | None = None) -> ExitRecord:
    return ExitRecord(
        code=None,
        signal=None,
        reason=reason,
        detail=detail,
        peak_rss_bytes=0,
        started_at_us=started_at_us,
        ended_at_us=_now_us(),
    )


def _refused(detail: str) -> ExitRecord:
    return _without_end("refused", detail)


def _memory_detail(limit_bytes: int | None, what: str) -> str:
    return f"it needed more than its {limit_bytes} bytes of memory: {what}"


def _first_word(command: list[str] | str) -> str:
    words = command if isinstance(command, list) else command.split()
    return words[0] if words else ""


def _missing_interpreter(workspace: Path, word: str) -> str:
    """Of a script that is there, what to read its first line for: "not found" is said of that too."""
    try:
        script = (workspace / word).resolve()
        if "/" not in word or not script.is_relative_to(workspace.resolve()):
            return ""
        with script.open("rb") as file:
            first = file.readline(_MAX_FIRST_LINE_BYTES).decode("utf-8", "replace").strip()
    except (OSError, RuntimeError):
        return ""
    interpreter = first.removeprefix("#!").strip() if first.startswith("#!") else ""
    return f"{word} is there, and not the interpreter that its first line names: {interpreter}" if interpreter else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(text: str) -> None:
    """Into shim.log; a full disk must not end the shim for it."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _now_us() -> int:
    return time.time_ns() // 1000
