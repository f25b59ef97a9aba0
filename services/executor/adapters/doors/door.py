"""The door of a node: how people get into its running jobs, each connection served by a process of its own.

The node agent starts it with a listening socket (see `start_door`); the front door leads here. A connection begins
with one HTTP request that carries a ticket (`Upgrade: nabla-tunnel`), and is a plain stream from the answer 101 on:
to a port inside the sandbox, or to an SSH server that runs there for this connection alone.

What a stranger sends is read in a fork that is thrown away afterwards; the door itself only accepts and counts.
Sessions outlive the door and its agent: they end with their client, or with their job.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run by its path under -I: Python does not look for our packages beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

import h11

from services.executor.adapters.attempts import forward, kernel
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.doors import entry
from services.executor.adapters.doors.door_tickets import HOLDS_S, FernetTickets, TicketRefused
from services.executor.domain.doors import DoorTicket

PROTOCOL = "nabla-tunnel"
MOST_AT_ONCE = 256
_HEAD_LIMIT_S = 10.0
_CONNECT_LIMIT_S = 5.0
_LOOK_S = 1.0
_READ_BYTES = 64 * 1024


class Refused(Exception):
    """The connection ends with this status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Config:
    """What the agent tells its door, through a pipe: the key is in no argument and no environment."""

    key: bytes
    attempts: Path
    used: Path

    def to_json(self) -> str:
        return json.dumps({"key": self.key.hex(), "attempts": str(self.attempts), "used": str(self.used)})

    @classmethod
    def from_json(cls, text: str) -> Config:
        said = json.loads(text)
        return cls(bytes.fromhex(said["key"]), Path(said["attempts"]), Path(said["used"]))


def start_door(listener: socket.socket, config: Config) -> subprocess.Popen[bytes]:
    """Start one on this listener, which the caller keeps: connections wait in it while there is none."""
    reading, writing = os.pipe()
    numbers = (listener.fileno(), reading)
    command = [sys.executable, "-I", str(Path(__file__).resolve()), str(numbers[0]), str(os.getpid()), str(reading)]
    try:
        process = subprocess.Popen(command, env={}, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=numbers)
        with os.fdopen(writing, "w") as file:
            file.write(config.to_json())
    finally:
        os.close(reading)
    return process


def serve(listener: socket.socket, parent: int, config: Config) -> None:
    """Accept until the parent is gone."""
    from services.executor.adapters.doors import ssh_session  # the agent, which starts this process, needs none of it

    config.used.mkdir(mode=0o700, parents=True, exist_ok=True)
    ssh_session.warm_up()
    gc.freeze()
    listener.setblocking(False)
    events = select.poll()
    events.register(listener, select.POLLIN)
    children: set[int] = set()
    while os.getppid() == parent:
        room = len(children) < MOST_AT_ONCE
        if events.poll(_LOOK_S * 1000) and room:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                children.add(_fork(connection, config))
        elif not room:
            time.sleep(0.05)
        children = {pid for pid in children if not _has_ended(pid)}
        _forget_used(config.used)


def _has_ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def _fork(connection: socket.socket, config: Config) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        forward.keep_only([connection.fileno()])
        _answer(connection, config)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _answer(connection: socket.socket, config: Config) -> None:
    connection.setblocking(True)
    connection.settimeout(_HEAD_LIMIT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    http = h11.Connection(h11.SERVER, max_incomplete_event_size=_READ_BYTES)
    try:
        ticket = _admit(http, connection, config)
        folder = AttemptFolder(config.attempts / ticket.attempt_id)
        inside = _inside(folder)
        if ticket.kind == "tcp":
            _join(http, connection, _connect(inside, ticket.port))
        else:
            _serve_ssh(http, connection, inside, ticket, FernetTickets(config.key))
    except Refused as refusal:
        _refuse(http, connection, refusal)


def _admit(http: h11.Connection, connection: socket.socket, config: Config) -> DoorTicket:
    """The ticket of a proper request, used up by this. Raises Refused."""
    request = _read_request(http, connection)
    headers = {name.decode(): value.decode("latin-1") for name, value in request.headers}
    kind, _, text = headers.get("authorization", "").partition(" ")
    if headers.get("upgrade", "").lower() != PROTOCOL:
        raise Refused(426, f"This address speaks {PROTOCOL}; `nabla ssh` and `nabla jobs open` use it.")
    if kind.lower() != "ticket":
        raise Refused(401, "This needs a ticket, which `nabla ssh` and `nabla jobs open` ask for.")
    try:
        ticket = FernetTickets(config.key).read(text.strip())
    except TicketRefused as error:
        raise Refused(403, f"The ticket is refused: {error}.") from None
    if not ticket.nonce.isalnum() or "/" in ticket.attempt_id or ticket.attempt_id.startswith("."):
        raise Refused(403, "The ticket is refused: it is malformed.")
    try:
        os.close(os.open(config.used / ticket.nonce, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise Refused(403, "The ticket is refused: it was used before.") from None
    return ticket


def _read_request(http: h11.Connection, connection: socket.socket) -> h11.Request:
    try:
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(connection.recv(_READ_BYTES))
    except (h11.RemoteProtocolError, TimeoutError) as error:
        raise Refused(400, f"The request is not HTTP: {error}.") from None
    if not isinstance(event, h11.Request):
        raise Refused(400, "The request is not HTTP.")
    return event


def _inside(folder: AttemptFolder) -> entry.Inside:
    try:
        return entry.inside_of(folder)
    except (entry.NotRunning, ValueError) as error:
        raise Refused(409, f"Nobody can enter: {error}.") from None


def _refuse(http: h11.Connection, connection: socket.socket, refusal: Refused) -> None:
    body = f"{refusal}\n".encode()
    headers = [
        ("content-type", "text/plain; charset=utf-8"),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    response = h11.Response(status_code=refusal.status, headers=headers)
    with contextlib.suppress(OSError, h11.LocalProtocolError):
        connection.sendall(b"".join(filter(None, map(http.send, (response, h11.Data(data=body), h11.EndOfMessage())))))


def _open_up(http: h11.Connection, connection: socket.socket) -> None:
    """Answer 101: from here on the connection is a plain stream. Raises Refused."""
    headers = [("upgrade", PROTOCOL), ("connection", "upgrade")]
    answer = http.send(h11.InformationalResponse(status_code=101, headers=headers)) or b""
    if http.trailing_data[0]:
        raise Refused(400, "The client spoke before it was answered.")
    connection.sendall(answer)
    connection.settimeout(None)


def _connect(inside: entry.Inside, port: int) -> socket.socket:
    """A connection to a port of the sandbox. Raises Refused."""
    try:
        entry.enter_network(inside)
        return socket.create_connection(("127.0.0.1", port), _CONNECT_LIMIT_S)
    except OSError as error:
        raise Refused(502, f"Nothing answers on port {port} in the job: {error.strerror or error}.") from None


def _join(http: h11.Connection, connection: socket.socket, target: socket.socket) -> None:
    _open_up(http, connection)
    forward.join(connection, target)


def _serve_ssh(
    http: h11.Connection, connection: socket.socket, inside: entry.Inside, ticket: DoorTicket, tickets: FernetTickets
) -> None:
    from services.executor.adapters.doors import ssh_session

    job = os.pidfd_open(inside.root)
    session = ssh_session.Session(
        host_key=tickets.host_key_text(ticket.attempt_id),
        public_key=ticket.public_key,
        environment=inside.environment,
        job=job,
    )
    try:
        entry.enter(inside)
    except OSError as error:
        raise Refused(500, f"The sandbox cannot be entered: {error}.") from None
    pid = os.fork()
    if pid == 0:
        try:
            entry.shut_behind(inside)
            kernel.set_name("nabla-ssh")
            _open_up(http, connection)
            ssh_session.serve(connection, session)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    connection.close()
    os.waitpid(pid, 0)


def _forget_used(folder: Path) -> None:
    """Tickets that are too old to be used again anyway."""
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 2 * HOLDS_S:
                path.unlink()


def main() -> None:
    kernel.set_name("nabla-door")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    number, parent, config = (int(word) for word in sys.argv[1:4])
    with os.fdopen(config) as file:
        told = Config.from_json(file.read())
    serve(socket.socket(fileno=number), parent, told)


if __name__ == "__main__":
    main()
