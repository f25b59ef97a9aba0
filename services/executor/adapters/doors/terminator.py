"""Where a node's door and its jobs' opened ports are reached from another machine: by TLS, by the front door alone.

The node agent starts it with a listening socket (see `start_terminator`). Both ends show a certificate of the
installation's authority, and the name that the front door asks for says where the connection leads: to the door, or
to a port that a running job opened. Nothing else on the node can be named. What comes then is copied, whatever it is.

A connection is a thread. Those that are open outlive the agent: they end with their client, or with the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run by its path under -I: Python does not look for our packages beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from services.executor.adapters.attempts import kernel
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.domain.doors import DOOR, name_below, name_of_port, port_named

MOST_AT_ONCE = 1024
_HANDSHAKE_S = 10.0
_CONNECT_S = 5.0
_LOOK_S = 1.0
_PIECE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Config:
    """What the agent tells, through a pipe: the node's key is in no argument and no environment.

    Args:
        certificate: the node's, and its key, and its authority's certificate, all in PEM.
        door_port: where the node's door listens, on loopback.
    """

    node_id: str
    certificate: str
    key: str
    authority: str
    attempts: str
    door_port: int


def start_terminator(listener: socket.socket, config: Config) -> subprocess.Popen[bytes]:
    """Start one on this listener, which the caller keeps: connections wait in it while there is none."""
    reading, writing = os.pipe()
    numbers = (listener.fileno(), reading)
    command = [sys.executable, "-I", str(Path(__file__).resolve()), str(numbers[0]), str(os.getpid()), str(reading)]
    try:
        process = subprocess.Popen(command, env={}, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=numbers)
        with os.fdopen(writing, "w") as file:
            file.write(json.dumps(asdict(config)))
    finally:
        os.close(reading)
    return process


class Terminator:
    """Serves one listener."""

    def __init__(self, listener: socket.socket, config: Config) -> None:
        self._listener = listener
        self._config = config
        self._asked = threading.local()
        self._context = _context(config, self._note_name)
        self._room = threading.BoundedSemaphore(MOST_AT_ONCE)

    def serve(self, parent: int) -> None:
        """Accept until the parent is gone. The connections that are open by then go on."""
        self._listener.setblocking(False)
        events = select.poll()
        events.register(self._listener, select.POLLIN)
        while os.getppid() == parent:
            if events.poll(_LOOK_S * 1000) and self._room.acquire(timeout=_LOOK_S):
                try:
                    connection = self._listener.accept()[0]
                except OSError:
                    self._room.release()
                else:
                    threading.Thread(target=self._see_through, args=(connection,)).start()
        self._listener.close()

    def _see_through(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):  # ssl's errors are OSErrors: strangers, and ends that are gone
            try:
                self._answer(connection)
            finally:
                self._room.release()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(_HANDSHAKE_S)
            self._note_name("")
            near = self._context.wrap_socket(connection, server_side=True)
        with near, socket.create_connection(self._target(self._asked.name), _CONNECT_S) as far:
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            carry(near, far)

    def _note_name(self, name: str) -> None:
        """For this thread: the handshake calls it within itself."""
        self._asked.name = name

    def _target(self, name: str) -> tuple[str, int]:
        """Raises ConnectionRefusedError: no job here has such a port open now."""
        config = self._config
        if name == name_below(config.node_id, DOOR):
            return "127.0.0.1", config.door_port
        wanted = port_named(name)
        if wanted and name == name_of_port(config.node_id, *wanted):
            folder = AttemptFolder(Path(config.attempts, wanted[0]))
            started = folder.read_started()
            if started and wanted[1] in started.ports and folder.read_exit() is None and folder.shim_is_alive():
                return "127.0.0.1", started.ports[wanted[1]]
        raise ConnectionRefusedError(f"nothing here is called {name}")


def carry(near: ssl.SSLSocket, far: socket.socket) -> None:
    """Copy in both directions until both ends have said all, or one is gone. Raises OSError."""
    for end in (near, far):
        end.setblocking(False)
    ways = (_Way(near, far), _Way(far, near))
    while not all(way.is_over for way in ways):
        # What TLS has decrypted already no poll tells of.
        if not (ways[0].wants_more and near.pending()):
            _wait({near: ways, far: ways[::-1]})
        for way in ways:
            way.step()


def _wait(ways: Mapping[socket.socket, tuple[_Way, _Way]]) -> None:
    """Until one of the ends has something to say, or takes something. Raises ConnectionResetError when one is gone.

    Args:
        ways: of each end, first the one that it is read for, then the one that it is written for.
    """
    events, left = select.poll(), set()
    for end, (reading, writing) in ways.items():
        interest = (select.POLLIN if reading.wants_more else 0) | (select.POLLOUT if writing.waiting else 0)
        if interest or reading.has_ended:
            events.register(end, interest)
        if reading.has_ended:
            left.add(end.fileno())
    for number, happened in events.poll():
        if number in left and happened & (select.POLLHUP | select.POLLERR):
            raise ConnectionResetError


class _Way:
    """One direction. `waiting` is what could not be sent yet; until it is, no more is read."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self._source, self._target = source, target
        self.has_ended = False
        self.waiting = b""

    @property
    def wants_more(self) -> bool:
        return not (self.has_ended or self.waiting)

    @property
    def is_over(self) -> bool:
        return self.has_ended and not self.waiting

    def step(self) -> None:
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if self.wants_more:
                self.waiting = self._source.recv(_PIECE_BYTES)
                if not self.waiting:
                    self.has_ended = True
                    _say_end(self._target)
            if self.waiting:
                self.waiting = self.waiting[self._target.send(self.waiting) :]


def _say_end(target: socket.socket) -> None:
    if isinstance(target, ssl.SSLSocket):
        with contextlib.suppress(ssl.SSLWantReadError):  # it waits for the other's end, and we go on reading
            target.unwrap()
    else:
        target.shutdown(socket.SHUT_WR)


def _context(config: Config, note_name: Callable[[str], None]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=config.authority)
    descriptor = os.memfd_create("node")  # Python reads keys from files alone, and no disk needs to have this one
    with os.fdopen(descriptor, "w") as file:
        file.write(config.key + config.certificate)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    context.sni_callback = lambda _socket, name, _context: note_name(name or "")
    return context


def main() -> None:
    kernel.set_name("nabla-tls")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    number, parent, config = (int(word) for word in sys.argv[1:4])
    with os.fdopen(config) as file:
        told = Config(**json.loads(file.read()))
    Terminator(socket.socket(fileno=number), told).serve(parent)


if __name__ == "__main__":
    main()
