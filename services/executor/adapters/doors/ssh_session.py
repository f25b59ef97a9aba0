"""An SSH server for one connection, on a socket that is connected already, as a process of the job.

It is begun by a process that has imported everything before: inside, the platform's files are out of sight.
OpenSSH's own clients work with it: shell, command, scp, sftp, rsync, and connections to ports of the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import encodings.idna  # noqa: F401  (loaded when a name is resolved, too late in there)
import fcntl
import os
import signal
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import asyncssh
from asyncssh.forward import SSHForwarder

USER = "nabla"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LOGIN_S = 20.0
_HANG_UP_S = 2.0
_PIECE_BYTES = 1 << 16

Process = asyncssh.SSHServerProcess[bytes]


@dataclass(frozen=True, slots=True)
class Session:
    """What the server of one connection needs to know.

    Args:
        host_key: the private key, in OpenSSH's form.
        public_key: the only one that may sign in, as authorized_keys has it.
        environment: of every command.
        job: a pidfd of the job's root process: the session ends with it.
    """

    host_key: bytes
    public_key: str
    environment: Mapping[str, str]
    job: int
    commands: set[asyncio.subprocess.Process] = field(default_factory=set, hash=False, compare=False)


def warm_up() -> None:
    """Has one whole session with itself, so that nothing is left to be imported later."""
    asyncio.run(_talk_to_itself())


async def _talk_to_itself() -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    exported = key.export_private_key(), key.export_public_key().decode()
    session = Session(exported[0], exported[1], {"PATH": os.defpath}, os.pidfd_open(os.getpid()))
    with socket.create_server(("127.0.0.1", 0)) as listener:  # asyncssh wants peers that have an address
        ours = socket.create_connection(listener.getsockname())
        theirs = listener.accept()[0]
    serving = asyncio.create_task(_serve(theirs, session))
    client = asyncssh.connect(
        sock=ours, username=USER, client_keys=[key], known_hosts=None, config=None, agent_path=None, encoding=None
    )
    async with client as connection:
        await connection.run("exit 3", term_type="xterm")
        async with connection.start_sftp_client() as files:
            await files.listdir("/")
    await serving
    os.close(session.job)


def serve(connection: socket.socket, session: Session) -> None:
    """Serve until the client has left or the job is over, and end what was started for it."""
    asyncio.run(_serve(connection, session))


async def _serve(connection: socket.socket, session: Session) -> None:
    connection.setblocking(False)
    server = await asyncssh.run_server(
        connection,
        server_factory=lambda: _Server(session),
        server_host_keys=[asyncssh.import_private_key(session.host_key)],
        process_factory=lambda process: _run(process, session),
        sftp_factory=_Files,
        allow_scp=True,
        encoding=None,
        line_editor=False,
        agent_forwarding=False,
        x11_forwarding=False,
        gss_host=None,
        login_timeout=_LOGIN_S,
        keepalive_interval=30,
        server_version="Nabla",
        config=None,
    )
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(session.job, over.set)
    left = asyncio.create_task(server.wait_closed())
    ended = asyncio.create_task(over.wait())
    await asyncio.wait({left, ended}, return_when=asyncio.FIRST_COMPLETED)
    asyncio.get_running_loop().remove_reader(session.job)
    await _end_commands(session)
    if not left.done():
        server.abort()
        await left
    ended.cancel()


async def _end_commands(session: Session) -> None:
    """Hang up, as a terminal that is closed does, and then insist."""
    for number in (signal.SIGHUP, signal.SIGKILL):
        for command in session.commands:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command.pid, number)
        if session.commands and number == signal.SIGHUP:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HANG_UP_S):
                    await asyncio.gather(*(command.wait() for command in session.commands))


class _Server(asyncssh.SSHServer):
    def __init__(self, session: Session) -> None:
        self._session = session
        self._key = asyncssh.import_public_key(session.public_key)

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return key.public_data == self._key.public_data

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> Awaitable[asyncssh.SSHTCPSession[bytes]] | Literal[False]:
        if dest_host not in _LOOPBACK:
            return False
        connect = partial(asyncio.get_running_loop().create_connection, _End, dest_host, dest_port)
        return cast(Awaitable[asyncssh.SSHTCPSession[bytes]], _reach(connect))

    def unix_connection_requested(self, dest_path: str) -> Awaitable[asyncssh.SSHUNIXSession[bytes]]:
        connect = partial(asyncio.get_running_loop().create_unix_connection, _End, dest_path)
        return cast(Awaitable[asyncssh.SSHUNIXSession[bytes]], _reach(connect))


class _End(SSHForwarder):
    """One end of a connection to a port inside.

    asyncssh's own leaves both ends open where the one inside says its last word first: a client that waits for the
    end of the connection, as `ssh -W` does, then waits for ever.
    """

    def eof_received(self) -> bool:
        goes_on = super().eof_received()
        if not goes_on:
            self.close()  # what is still to be sent is sent first
        return goes_on


async def _reach(connect: Callable[[], Awaitable[tuple[asyncio.BaseTransport, _End]]]) -> _End:
    try:
        _, inside = await connect()
    except OSError as error:
        raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, str(error)) from None
    return _End(inside)


class _Files(asyncssh.SFTPServer):
    """As asyncssh has it, but for the exit code, without which scp takes every copy for a failed one."""

    def __init__(self, channel: asyncssh.SSHServerChannel[bytes]) -> None:
        super().__init__(channel)
        self._channel = channel

    def exit(self) -> None:
        self._channel.exit(0)


async def _run(process: Process, session: Session) -> None:
    """One command or shell of the client's."""
    environment = {**session.environment, **_wished(process)}
    words = ["/bin/sh", "-c", process.command] if process.command else [_shell()]
    if process.get_terminal_type():
        await _run_on_terminal(process, session, words, environment)
    else:
        await _run_on_pipes(process, session, words, environment)


def _wished(process: Process) -> dict[str, str]:
    wished = {name: value for name, value in process.env.items() if name.startswith("LC_") or name == "LANG"}
    terminal = process.get_terminal_type()
    return wished | ({"TERM": terminal} if terminal else {})


def _shell() -> str:
    return next((shell for shell in ("/bin/bash", "/usr/bin/bash") if os.access(shell, os.X_OK)), "/bin/sh")


async def _run_on_pipes(process: Process, session: Session, words: list[str], environment: Mapping[str, str]) -> None:
    (stdin, ours_in), (ours_out, stdout), (ours_err, stderr) = os.pipe(), os.pipe(), os.pipe()
    try:
        command = await asyncio.create_subprocess_exec(
            *words, stdin=stdin, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
        )
    finally:
        for descriptor in (stdin, stdout, stderr):
            os.close(descriptor)
    await _see_through(process, session, command, ours_in, ((ours_out, process.stdout), (ours_err, process.stderr)))


async def _run_on_terminal(
    process: Process, session: Session, words: list[str], environment: Mapping[str, str]
) -> None:
    ours, theirs = os.openpty()
    _resize(ours, *process.get_terminal_size())
    try:
        command = await asyncio.create_subprocess_exec(
            *words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=_lead_terminal
        )
    finally:
        os.close(theirs)
    await _see_through(process, session, command, os.dup(ours), ((ours, process.stdout),))


def _lead_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _resize(terminal: int, width: int, height: int, pixels_wide: int, pixels_high: int) -> None:
    """The kernel tells who runs in it."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(
            terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height or 24, width or 80, pixels_wide, pixels_high)
        )


async def _see_through(
    process: Process,
    session: Session,
    command: asyncio.subprocess.Process,
    stdin: int,
    outputs: Sequence[tuple[int, asyncssh.SSHWriter[bytes]]],
) -> None:
    """Carries what is said in both directions, itself: asyncssh's own way drops the end of it to a slow client."""
    session.commands.add(command)
    feeding = asyncio.create_task(_feed(process, command, stdin))
    try:
        await asyncio.gather(*(_pass_on(*output) for output in outputs))
        code = await command.wait()
    finally:
        session.commands.discard(command)
        feeding.cancel()
    if code < 0:
        process.exit_with_signal(signal.Signals(-code).name.removeprefix("SIG"))
    else:
        process.exit(code)


async def _pass_on(source: int, target: asyncssh.SSHWriter[bytes]) -> None:
    """Until its end, which a terminal tells as an error, or until the client is gone."""
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(source, "rb", buffering=0)
    )
    with contextlib.suppress(OSError, asyncssh.Error), contextlib.closing(transport):
        while data := await reader.read(_PIECE_BYTES):
            target.write(data)
            await target.drain()


async def _feed(process: Process, command: asyncio.subprocess.Process, target: int) -> None:
    """What the client types, and what comes between: a new size of its terminal, a signal."""
    loop, file = asyncio.get_running_loop(), os.fdopen(target, "wb", buffering=0)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, file)
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    with contextlib.suppress(OSError, ProcessLookupError), contextlib.closing(writer):
        while True:
            try:
                data = await process.stdin.read(_PIECE_BYTES)
            except asyncssh.TerminalSizeChanged as change:
                _resize(target, *change.term_size)
            except (asyncssh.SignalReceived, asyncssh.BreakReceived) as wish:
                os.killpg(command.pid, _number_of(getattr(wish, "signal", "INT")))
            else:
                if not data:
                    return
                writer.write(data)
                await writer.drain()


def _number_of(name: str) -> signal.Signals:
    return signal.Signals.__members__.get(f"SIG{name}", signal.SIGINT)
