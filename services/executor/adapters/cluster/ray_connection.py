"""The connection to a Ray head: one driver, made when there is a head and left when it goes.

Ray blocks, may come up later than the executor, and dials a dead head for minutes. So every call runs in a thread
with a limit, nothing is called before a quick look at the head's port, and a connection whose head went away is
shut down and made again, once no call is under way: a shutdown beneath a call is a segmentation fault (measured).
A call that was under way when the head died hangs until there is one again, and after a minute Ray ends this
process; its supervisor starts it again from its database.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from services.executor.adapters.cluster.loopback import keep_loopback
from services.executor.domain.execution import short_reason
from services.executor.ports import ClusterAway

PORT_ANSWERS_S = 1.0
CONNECT_LIMIT_S = 30.0
# Longer than calls to agents take; those to a dead head may hang for a minute, and are not waited for.
CALLS_END_S = 9.0
STARTING = "the Ray cluster is still starting"
STOPPING = "the executor is stopping"

log = logging.getLogger(__name__)


class RayConnection:
    """This process's driver.

    Args:
        find_address: `host:port` of the head's GCS now, or an empty string when there is none yet.
        namespace: Ray's, in which our agents and reservations have their names.
    """

    def __init__(self, find_address: Callable[[], str], namespace: str) -> None:
        self._find_address = find_address
        self._namespace = namespace
        self._on_leave: list[Callable[[], None]] = []
        self._connecting: Future[None] | None = None
        self._guard = threading.Lock()
        self._calls = 0
        self._call_ended = threading.Condition(self._guard)
        self._leaving = ""
        self._closed = False
        self._address = ""
        self._seen_once = False

    def on_leave(self, forget: Callable[[], None]) -> None:
        """Called whenever a head is left: what was learned of it is void."""
        self._on_leave.append(forget)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A connection to the present head that stays until the block is left. Ray's own errors become ours."""
        with self._guard:
            self._connect()
            self._calls += 1
        try:
            with _told_as_away():
                yield
        finally:
            with self._guard:
                self._calls -= 1
                self._call_ended.notify_all()

    def join(self) -> None:
        """Makes the connection, unless there is one. Raises ClusterAway."""
        with self._guard:
            self._connect()

    def leave(self) -> None:
        """The last call: none is let in after it."""
        self._closed = True
        with self._guard:
            self._disconnect(STOPPING)

    def _connect(self) -> None:
        """Makes sure there is a connection to the present head; under the guard. Raises ClusterAway."""
        import ray

        if self._closed or self._leaving:
            raise ClusterAway(self._leaving or STOPPING)
        address = self._find_address()
        if not address:
            raise ClusterAway(STARTING)
        if not _answers(address):
            yet = "" if self._seen_once else " yet"
            silent = f"the Ray head at {address} does not answer{yet}"
            self._disconnect(silent)
            raise ClusterAway(silent)
        if self._address == address and ray.is_initialized():
            return
        if self._connecting is None:
            self._disconnect(f"the Ray head at {address} is new")
            self._connecting = _in_own_thread(functools.partial(_init, address, self._namespace))
        try:
            self._connecting.result(CONNECT_LIMIT_S - 5)
        except TimeoutError:
            # The thread cannot be ended; it is waited for again instead of starting a second one beside it.
            raise ClusterAway(f"the Ray head at {address} accepts no driver yet") from None
        except Exception as error:
            self._connecting = None
            reason = short_reason(str(error), 200)
            raise ClusterAway(f"the Ray head at {address} refuses us (wrong token?): {reason}") from error
        self._connecting = None
        self._address, self._seen_once = address, True
        log.info("connected to Ray", extra={"address": address})

    def _disconnect(self, why: str) -> None:
        """Shuts Ray down when the calls under way have ended; under the guard, and new ones are refused meanwhile."""
        import ray

        self._address, self._leaving = "", why
        try:
            if not self._call_ended.wait_for(lambda: self._calls == 0, CALLS_END_S):
                log.warning("leaving the Ray head while calls hang", extra={"calls": self._calls})
            for forget in self._on_leave:
                forget()
            if ray.is_initialized():
                log.warning("leaving the Ray head", extra={"reason": why})
                ray.shutdown()
        finally:
            self._leaving = ""


def _init(address: str, namespace: str) -> None:
    import ray

    keep_loopback()
    ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PORT_ANSWERS_S).close()
    except (OSError, ValueError):
        return False
    return True


def _in_own_thread(work: Callable[[], None]) -> Future[None]:
    """Not in the pool: it may hang for minutes, and must not take a place there."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="ray-connect", daemon=True).start()
    return future


@contextlib.contextmanager
def _told_as_away() -> Iterator[None]:
    """Ray's own errors become ours; whether a call took effect is not known then.

    ValueError is how Ray says that a name is not there: somebody removed it a moment ago.
    """
    import ray

    try:
        yield
    except (ray.exceptions.RayError, ConnectionError, TimeoutError, ValueError) as error:
        raise ClusterAway(f"Ray: {short_reason(str(error), 300) or type(error).__name__}") from error
