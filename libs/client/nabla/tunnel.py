"""A plain stream to a running job, through the front door: what is behind `nabla ssh` and `nabla jobs open`."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import select
import socket
import ssl
import threading
from typing import Callable, TypeVar

PIECE_BYTES = 1 << 16
T = TypeVar("T")


class Tunnel:
    """A connection that was an HTTP request once. One thread may read while another one writes.

    Over TLS both directions share one state, so they take turns at it, and neither waits for the network in its turn.
    """

    def __init__(self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse) -> None:
        self._socket: socket.socket = connection.sock
        self._turn = threading.Lock()
        self._encrypted = isinstance(self._socket, ssl.SSLSocket)
        self._socket.settimeout(0.0)
        self._early = _buffered(answer.fp)
        if not self._encrypted:
            self._socket.settimeout(None)

    def read(self) -> bytes:
        """Some bytes as soon as there are any; none at the end."""
        early, self._early = self._early, b""
        return early or self._patiently(lambda: self._socket.recv(PIECE_BYTES))

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            piece = rest[:PIECE_BYTES]
            rest = rest[self._patiently(lambda piece=piece: self._socket.send(piece)) :]  # type: ignore[misc]

    def close(self) -> None:
        """Ends the other thread's waiting, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def finish_writing(self) -> None:
        """Nothing more will be written; what is still to come can be read. Over TLS the stream ends with its reader."""
        if not self._encrypted:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def _patiently(self, call: Callable[[], T]) -> T:
        if not self._encrypted:
            return call()
        while True:
            try:
                with self._turn:
                    return call()
            except ssl.SSLWantReadError:
                select.select([self._socket], [], [], 1.0)
            except ssl.SSLWantWriteError:
                select.select([], [self._socket], [], 1.0)


def carry(tunnel: Tunnel, source: int, target: int) -> None:
    """From a descriptor into the tunnel and from the tunnel into a descriptor, until the tunnel ends."""
    threading.Thread(target=_send, args=(tunnel, source), daemon=True).start()
    while data := tunnel.read():
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(target, rest) :]


def _send(tunnel: Tunnel, source: int) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(source, PIECE_BYTES):
            tunnel.write(data)
        tunnel.finish_writing()


def _buffered(file: io.BufferedReader) -> bytes:
    """What came right behind the answer and was read with it."""
    with contextlib.suppress(OSError, ValueError):
        return file.read1(PIECE_BYTES) if file.peek(1) else b""
    return b""
