"""Ways through the wall of a sandbox's network, without root and without a network device.

A socket belongs to the network namespace in which it was made, whoever holds it afterwards. So the way out
(the front door) is a listening socket made inside and served outside, and the way in (an exposed port) is one
made outside and served by a process that lives inside. Serving is the same loop on both sides: accept,
connect, copy. Each side is one process, forked only when asked for, run as the job's uid, ended with the
shim. The shim keeps the listeners and what is needed to serve them: a relay that dies is replaced, and
connections made meanwhile wait.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, NoReturn

from services.executor.adapters.attempts import kernel
from services.executor.adapters.attempts.attempt_folder import FrontDoor

_BUFFER_BYTES = 256 * 1024
_IP_FREEBIND = 15  # binds 127.0.0.1 before bwrap has brought the loopback up
_WAIT_S = 10.0

# Of a loopback: the kind of socket, and its number.
Port = tuple[int, int]
Listeners = Mapping[Port, socket.socket]
NOTHING_READY: Listeners = {}


class Route(NamedTuple):
    """Connections to the listener go to this address, a resolved one.

    Args:
        peers: the addresses from which they may come; None for any.
    """

    listener: socket.socket
    family: socket.AddressFamily
    address: tuple[str, int]
    peers: frozenset[str] | None = None


class Way:
    """One way through the wall, and the process that serves it, a child of this one.

    Args:
        work: what the process does; when it returns, the way is served anew.
        kept: the descriptors that it needs for it.
        network: the namespace that it works in; None for this process's own. Kept open.
    """

    def __init__(
        self, work: Callable[[], object], kept: Sequence[int], network: int | None = None, uid: int | None = None
    ) -> None:
        self._work, self._kept, self._network, self._uid = work, tuple(kept), network, uid
        self.pid = 0

    def serve(self) -> None:
        """Start the process, the first one or another one; raises OSError."""
        shim = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(shim)

    def _run(self, shim: int) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)  # of a shim that is at work already
            os.setsid()
            _enter(self._network, self._uid)
            kernel.end_with_parent(signal.SIGKILL, shim)
            keep_only(self._kept)
            self._work()
        except BaseException:
            traceback.print_exc()  # stderr is the shim's log
        finally:
            os._exit(1)


def open_front_door(network: int, doors: Sequence[FrontDoor], uid: int | None, ready: Listeners = NOTHING_READY) -> Way:
    """Listen inside the network namespace and serve from out here. Raises OSError.

    Connections wait in the listeners from now on, so the command can be let go.

    Args:
        ready: what listens there already.
    """
    targets = [_resolve(door.target_host, door.target_port) for door in doors]
    listeners = listen_inside(network, [(socket.SOCK_STREAM, door.listen_port) for door in doors], uid, ready)
    way = _way([Route(s, *target) for s, target in zip(listeners, targets, strict=True)], None, uid)
    way.serve()
    return way


def expose(network: int, ports: Sequence[int], uid: int | None) -> tuple[Way, dict[int, int]]:
    """Serve free ports of the host's loopback from inside the namespace: (the way, inside -> host)."""
    routes = [Route(listen("127.0.0.1", 0), socket.AF_INET, ("127.0.0.1", port)) for port in ports]
    host_ports = {route.address[1]: int(route.listener.getsockname()[1]) for route in routes}
    way = _way(routes, network, uid)
    way.serve()
    return way, host_ports


def _way(routes: Sequence[Route], network: int | None, uid: int | None) -> Way:
    return Way(partial(relay, routes), [route.listener.fileno() for route in routes], network, uid)


def relay(routes: Sequence[Route]) -> NoReturn:
    """Accept, connect and copy in both directions until the process is killed."""
    _Relay(routes).run()


def join(client: socket.socket, target: socket.socket) -> None:
    """Copy in both directions between two connected sockets until both have said all, or one is gone."""
    for end in (client, target):
        end.setblocking(False)
    _Relay([]).see_through(client, target)


def listen(host: str, port: int, kind: int = socket.SOCK_STREAM, shared: bool = False) -> socket.socket:
    listener = socket.socket(socket.AF_INET, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
    listener.bind((host, port))
    if kind == socket.SOCK_STREAM:
        listener.listen(1024)
    listener.setblocking(False)
    return listener


def listen_inside(
    network: int, ports: Sequence[Port], uid: int | None, ready: Listeners = NOTHING_READY
) -> list[socket.socket]:
    """Have a forked helper enter the namespace, make the sockets there and pass them back. Raises OSError.

    The ranks of a gang share a namespace, and each has its own relays: the kernel spreads what comes over them.

    Args:
        ready: what listens there already.
    """
    if all(port in ready for port in ports):
        return [ready[port] for port in ports]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        helper = os.fork()
        if helper == 0:
            _run_helper(theirs, network, ports, uid)
        theirs.close()
        ours.settimeout(_WAIT_S)
        try:
            message, descriptors = kernel.receive(ours, 4096, len(ports))
        finally:
            os.waitpid(helper, 0)
    if len(descriptors) != len(ports):
        raise OSError(f"the sandbox's own ports cannot be opened: {message.decode() or 'its helper died'}")
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]


def _run_helper(channel: socket.socket, network: int, ports: Sequence[Port], uid: int | None) -> NoReturn:
    try:
        signal.alarm(int(_WAIT_S))
        _enter(network, uid)
        listeners = [listen("127.0.0.1", port, kind, shared=True) for kind, port in ports]
        socket.send_fds(channel, [b"ok"], [listener.fileno() for listener in listeners])
    except OSError as error:
        channel.send(str(error).encode())
    finally:
        os._exit(0)


def _enter(network: int | None, uid: int | None) -> None:
    if network is not None:
        kernel.enter_network(network, uid)
    elif uid is not None:
        kernel.become(uid)


def keep_only(descriptors: Sequence[int]) -> None:
    """Close all that a forked process inherited but these and its standard streams."""
    kept = {0, 1, 2, *descriptors}
    for name in os.listdir("/proc/self/fd"):  # not all that are allowed: containers may allow a billion
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the listing's own is closed already
                os.close(int(name))


class _End:
    """One socket of a connection. `waiting` is what could not be sent on it yet; it bounds what is read."""

    __slots__ = ("connected", "finished", "interest", "other", "socket", "waiting")

    def __init__(self, end: socket.socket, connected: bool) -> None:
        self.socket = end
        self.connected = connected
        self.finished = False  # the peer has said all it will
        self.waiting: memoryview | None = None
        self.interest = 0
        self.other: _End = self


class _Relay:
    def __init__(self, routes: Sequence[Route]) -> None:
        self._epoll = select.epoll()
        self._routes = {route.listener.fileno(): route for route in routes}
        self._ends: dict[int, _End] = {}
        self._over: list[socket.socket] = []
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        for number in self._routes:
            self._epoll.register(number, select.EPOLLIN)

    def run(self) -> NoReturn:
        while True:
            self._step()

    def see_through(self, client: socket.socket, target: socket.socket) -> None:
        self._join(_End(client, connected=True), _End(target, connected=True))
        while self._ends:
            self._step()

    def _step(self) -> None:
        for number, events in self._epoll.poll():
            if number in self._routes:
                self._accept(number)
            elif (end := self._ends.get(number)) is not None:
                self._serve(end, events)
        while self._over:  # not earlier: a number used anew would get the old socket's events
            self._over.pop().close()

    def _accept(self, number: int) -> None:
        route = self._routes[number]
        try:
            client, peer = route.listener.accept()
            if route.peers is not None and peer[0] not in route.peers:
                client.close()
                return
            target = socket.socket(route.family, socket.SOCK_STREAM)
        except BlockingIOError:
            return
        except OSError:  # no descriptors left: those that are open may end
            time.sleep(0.01)
            return
        for end in (client, target):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        failure = target.connect_ex(route.address)
        self._join(_End(client, connected=True), _End(target, connected=failure == 0))

    def _join(self, client: _End, target: _End) -> None:
        client.other, target.other = target, client
        for end in (client, target):
            self._ends[end.socket.fileno()] = end
        self._listen_to(client, target)

    def _serve(self, end: _End, events: int) -> None:
        try:
            if not end.connected:
                _finish_connecting(end)
            if events & select.EPOLLOUT:
                self._send_waiting(end)
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and _may_read(end):
                self._copy(end)
        except BlockingIOError:
            pass
        except OSError:
            self._close(end)
            return
        if end.finished and end.other.finished and end.waiting is None and end.other.waiting is None:
            self._close(end)
        else:
            self._listen_to(end, end.other)

    def _copy(self, source: _End) -> None:
        count = source.socket.recv_into(self._buffer)
        target = source.other
        if count == 0:
            source.finished = True
            target.socket.shutdown(socket.SHUT_WR)
            return
        try:
            sent = target.socket.send(self._view[:count])
        except BlockingIOError:
            sent = 0
        if sent < count:
            target.waiting = memoryview(bytes(self._view[sent:count]))

    def _send_waiting(self, end: _End) -> None:
        if end.waiting is not None:
            rest = end.waiting[end.socket.send(end.waiting) :]
            end.waiting = rest if rest else None

    def _listen_to(self, *ends: _End) -> None:
        for end in ends:
            interest = select.EPOLLIN if _may_read(end) else 0
            if end.waiting is not None or not end.connected:
                interest |= select.EPOLLOUT
            self._set_interest(end, interest)

    def _set_interest(self, end: _End, interest: int) -> None:
        """No interest means out of the set: epoll reports a hang-up unasked, again and again."""
        if interest == end.interest:
            return
        number = end.socket.fileno()
        if not interest:
            self._epoll.unregister(number)
        elif not end.interest:
            self._epoll.register(number, interest)
        else:
            self._epoll.modify(number, interest)
        end.interest = interest

    def _close(self, end: _End) -> None:
        for each in (end, end.other):
            self._set_interest(each, 0)
            del self._ends[each.socket.fileno()]
            self._over.append(each.socket)


def _may_read(end: _End) -> bool:
    """Only what can be passed on is read: a slow receiver slows its sender, and memory stays bounded."""
    return end.connected and end.other.connected and not end.finished and end.other.waiting is None


def _finish_connecting(end: _End) -> None:
    failure = end.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if failure:
        raise OSError(failure, os.strerror(failure))
    end.connected = True


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Here and not in the relay, whose uid may read neither the resolver's modules nor its settings."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return family, (str(address[0]), int(address[1]))
