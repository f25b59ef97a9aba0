"""Metrics and parameters, sent in the background.

A training loop must neither wait for the network nor die of it: `log` only appends to a bounded buffer, a daemon
thread sends it every half second, and whatever goes wrong is a warning. Points that do not fit are dropped and
counted, since memory is the job's.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from collections import deque
from datetime import datetime, timezone
from typing import Callable, Deque, Dict, List, Mapping, Optional, Tuple
from uuid import uuid4

from nabla.errors import Unavailable, Unreachable
from nabla.job.http import post
from nabla.job.identity import JobIdentity
from nabla.job.warning import warn

FLUSH_EVERY_S = 0.5
BUFFER_POINTS = 50_000
BATCH_POINTS = 1_000
EXIT_PATIENCE_S = 10.0
# Then it is said that metrics wait, and tried again.
PATIENCE_S = 30.0

Point = Dict[str, object]
Body = Dict[str, object]
Send = Callable[[Body], object]


class Recorder:
    """The buffer between a training loop and the API. `send` gets one request body and may raise."""

    def __init__(self, send: Send, capacity: int = BUFFER_POINTS, interval_s: float = FLUSH_EVERY_S) -> None:
        self._send = send
        self._interval_s = interval_s
        self._capacity = capacity
        self.reset()

    def reset(self) -> None:
        """Empty, with no thread: at birth, and in a forked child, whose parent sends what the parent logged."""
        self._points: Deque[Point] = deque()
        self._params: Dict[str, str] = {}
        self._steps: Dict[str, int] = {}
        self._dropped = 0
        self._sending = False
        self._in_flight = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread: Optional[threading.Thread] = None

    def add(self, values: Mapping[str, object], step: Optional[int]) -> None:
        at = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
        for name, value in values.items():
            number = _number(name, value)
            if number is not None:
                self._append(str(name), number, step, at)
        self._wake()

    def add_params(self, params: Mapping[str, object]) -> None:
        with self._changed:
            self._params.update({str(name): str(value) for name, value in params.items()})
        self._wake()

    def flush(self, timeout_s: float) -> bool:
        """Waits until all of it is sent; False when that took too long."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.notify_all()
            while self._waiting() or self._sending:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or self._thread is None:
                    return False
                self._changed.wait(min(left_s, 0.05))
        return True

    def close(self, timeout_s: float = EXIT_PATIENCE_S) -> None:
        """At the end of the process: the last chance for what is buffered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self.flush(timeout_s):
            return
        unsent = len(self._points) + self._in_flight
        warn(f"{f'{unsent} points' if unsent else 'parameters'} could not be sent before the process ended.")

    def _append(self, name: str, number: float, step: Optional[int], at: str) -> None:
        with self._changed:
            step = self._steps.get(name, -1) + 1 if step is None else int(step)
            self._steps[name] = step
            if len(self._points) < self._capacity:
                self._points.append({"name": name, "value": number, "step": step, "at": at})
                return
            self._dropped += 1
            first = self._dropped == 1
        if first:
            warn(f"more than {self._capacity} points wait to be sent; new ones are dropped until there is room.")

    def _wake(self) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="nabla-metrics", daemon=True)
                self._thread.start()

    def _waiting(self) -> bool:
        return bool(self._points or self._params)

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._closed:
                    self._changed.wait(self._interval_s)
                points, params = self._take()
                if self._closed and not (points or params):
                    return
            if points or params:
                self._deliver({"points": points, "params": params})
            with self._changed:
                self._sending, self._in_flight = False, 0
                self._changed.notify_all()

    def _take(self) -> Tuple[List[Point], Dict[str, str]]:
        points = [self._points.popleft() for _ in range(min(len(self._points), BATCH_POINTS))]
        params, self._params = self._params, {}
        self._sending, self._in_flight = bool(points or params), len(points)
        if self._dropped and points:
            warn(f"{self._dropped} points were dropped while the buffer was full.")
            self._dropped = 0
        return points, params

    def _deliver(self, body: Body) -> None:
        """Tries until it is sent or refused; at the end of the process the last try ends with it."""
        while True:
            try:
                self._send(body)
                return
            except (Unreachable, Unavailable) as error:
                warn(f"metrics are waiting: {error}")
                time.sleep(self._interval_s)
            except Exception as error:  # the training goes on whatever happens to its metrics
                warn(f"metrics were refused: {error}")
                return


def _number(name: object, value: object) -> Optional[float]:
    """Anything with `__float__`: Python, numpy and torch scalars. NaN and infinity cannot be stored."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        warn(f"the metric {name!r} is skipped: {type(value).__name__} is not a number.")
        return None
    if not math.isfinite(number):
        warn(f"the metric {name!r} is skipped: it is {number}.")
        return None
    return number


_recorder: Optional[Recorder] = None
_starting = threading.Lock()


def log(metrics: Mapping[str, object], step: Optional[int] = None) -> None:
    """Records metrics of this job: `nabla.log({"loss": 0.1}, step=3)`.

    Returns at once. Without `step` each name counts its own calls from 0. Raises only outside a job.
    """
    recorder = _started()
    try:
        recorder.add(metrics, step)
    except Exception as error:
        warn(f"log() was given something else than a dict of numbers: {error}")


def log_params(params: Mapping[str, object]) -> None:
    """Records what this job was run with, as text; the last value of a name counts. Raises only outside a job."""
    recorder = _started()
    try:
        recorder.add_params(params)
    except Exception as error:
        warn(f"log_params() was given something else than a dict: {error}")


def flush(timeout_s: float = EXIT_PATIENCE_S) -> bool:
    """Waits until everything logged so far is sent; False when it is not, after `timeout_s` seconds."""
    return _started().flush(timeout_s)


class _Sender:
    """Sends a batch under one key, however often the recorder hands it over: no point is counted twice."""

    def __init__(self, identity: JobIdentity) -> None:
        self._identity = identity
        self._batch: Optional[Body] = None
        self._key = ""

    def __call__(self, body: Body) -> object:
        if body is not self._batch:
            self._batch, self._key = body, str(uuid4())
        path = f"/jobs/{self._identity.job_id}/metrics"
        return post(self._identity, path, body, patience_s=PATIENCE_S, key=self._key)


def _started() -> Recorder:
    global _recorder  # noqa: PLW0603  (one buffer a process is the point)
    with _starting:
        if _recorder is None:
            _recorder = _build(JobIdentity.from_environment())
        return _recorder


def _build(identity: JobIdentity) -> Recorder:
    recorder = Recorder(_Sender(identity))
    atexit.register(recorder.close)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=recorder.reset)
    return recorder
