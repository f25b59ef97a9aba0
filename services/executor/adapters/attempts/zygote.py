"""A small process that has imported all that a shim needs, and forks shims in milliseconds.

Secrets of an attempt come with the request, as a descriptor of memory: they pass through this process unread.

Started by the node agent as `python -I zygote.py SOCKET [PARENT]` (see `start_zygote`). Python and its
imports would cost each attempt a tenth of a second and ten megabytes. A request is one line of JSON,
{"start": FOLDER}, and so is its answer: {"pid": N} or {"error": TEXT}. {"warm": NETWORK, "ports": [N, ...]} has it
keep networks ready for the shims (network_pool.py); {} is the answer.

A shim is forked twice, into a session of its own, because Ray ends the direct children of what it stops. So
it survives the death of the zygote, of the agent and of Ray. Asking twice for one attempt, of one zygote or
two, is harmless: the shim holds a lock in the folder while it lives, and its record stays when it is gone.

The zygote leaves when its agent does: another agent starts another one.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # run by its path under -I: Python does not look for our packages beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from services.executor.adapters.attempts import kernel, shim
from services.executor.adapters.attempts.attempt_folder import AttemptFolder
from services.executor.adapters.attempts.forward import keep_only
from services.executor.adapters.networks.network import ReadyNetwork
from services.executor.adapters.networks.network_pool import NetworkPool
from services.executor.domain.network import Network

_ANSWER_LIMIT_S = 10.0
_LOOK_FOR_PARENT_S = 1.0
_LINE_BYTES = 64 * 1024


class ZygoteUnavailable(Exception):
    """No zygote answers at this socket: start one and ask again; asking twice does no harm."""


class StartFailed(Exception):
    """The zygote answered that it could not start the shim; the text says why. No shim runs."""


def start_zygote(socket_path: str | os.PathLike[str]) -> subprocess.Popen[bytes]:
    """Start one that listens at this path, with an empty environment: its children's could be read.

    It may need some milliseconds until it listens; `start_attempt` waits for that.
    """
    command = [sys.executable, "-I", str(Path(__file__).resolve()), os.fspath(socket_path), str(os.getpid())]
    return subprocess.Popen(command, env={}, stdin=subprocess.DEVNULL, start_new_session=True)


def start_attempt(
    socket_path: str | os.PathLike[str],
    attempt_dir: str | os.PathLike[str],
    timeout_s: float = 10.0,
    secrets: bytes = b"",
) -> int:
    """Have the attempt's shim started; its pid. Raises ZygoteUnavailable, StartFailed.

    Args:
        secrets: a JSON object of values by name, for the shim alone.
    """
    answer = _ask(socket_path, {"start": os.fspath(attempt_dir)}, timeout_s, secrets)
    if "pid" not in answer:
        raise StartFailed(answer.get("error", "no reason given"))
    return int(answer["pid"])


def keep_warm(
    socket_path: str | os.PathLike[str], network: Network, door_ports: Sequence[int], timeout_s: float = 10.0
) -> None:
    """Have networks such as this one kept ready, with listeners for the front door. Raises ZygoteUnavailable."""
    _ask(socket_path, {"warm": asdict(network), "ports": list(door_ports)}, timeout_s)


def _ask(
    socket_path: str | os.PathLike[str], request: Mapping[str, Any], timeout_s: float, secrets: bytes = b""
) -> dict[str, Any]:
    with (
        _connect(os.fspath(socket_path), time.monotonic() + timeout_s) as connection,
        _in_memory(secrets) as descriptors,
    ):
        try:
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], descriptors)
            answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
        except (OSError, ValueError) as error:
            raise ZygoteUnavailable(str(error)) from error
    return answer


def serve(socket_path: str, parent: int) -> None:
    """Answer requests until the parent is gone, or was before this process could look."""
    listener = _listen(socket_path)
    gc.freeze()  # a collection in a fork would copy every page it touches
    events = select.poll()
    events.register(listener, select.POLLIN)
    with contextlib.suppress(OSError):  # gone already, or a kernel before 5.3: then the look once a second says so
        events.register(os.pidfd_open(parent), select.POLLIN)
    pool = NetworkPool(events)
    while os.getppid() == parent:
        events.poll(min(_LOOK_FOR_PARENT_S, pool.patience_s) * 1000)
        with contextlib.suppress(BlockingIOError), listener.accept()[0] as connection:
            connection.settimeout(_ANSWER_LIMIT_S)
            _answer(connection, pool)
        pool.look()


def start_shim(attempt_dir: Path, secrets: Sequence[int], pool: NetworkPool) -> int:
    """The pid of this attempt's shim, forked now if there was none ever."""
    folder = AttemptFolder(attempt_dir)
    deadline = time.monotonic() + _ANSWER_LIMIT_S
    while time.monotonic() < deadline:
        with folder.try_lock() as lock:
            record = folder.read_shim()
            if record is not None:
                return record.pid
            if lock is not None:
                ready = pool.take(_network_of(folder))
                try:
                    return _fork_twice(folder, lock, secrets, ready)
                finally:
                    if ready is not None:
                        ready.close()
        time.sleep(0.002)  # another zygote forks it just now
    raise TimeoutError("another process holds the lock of this attempt, and names no shim")


def _network_of(folder: AttemptFolder) -> object:
    """As the spec has it; the shim says what is wrong with a spec that cannot be read."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((folder.path / "spec.json").read_bytes()).get("network")
    return None


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[list[int]]:
    """A descriptor of memory with this content, or none when it is empty."""
    if not content:
        yield []
        return
    descriptor = os.memfd_create("nabla-secrets", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        yield [descriptor]
    finally:
        os.close(descriptor)


def _connect(socket_path: str, deadline: float) -> socket.socket:
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            connection.connect(socket_path)
        except OSError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise ZygoteUnavailable(f"{socket_path}: {error}") from error
            time.sleep(0.01)
        else:
            return connection


def _listen(socket_path: str) -> socket.socket:
    """Take the path over from a zygote that died. 0600 from its first moment on."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket_path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.umask(0o177)
    listener.bind(socket_path)
    os.umask(0o077)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _answer(connection: socket.socket, pool: NetworkPool) -> None:
    """The one request of a connection; a broken one ends the connection and nothing else."""
    descriptors: list[int] = []
    try:
        with contextlib.suppress(OSError):
            line = b""
            while not line.endswith(b"\n") and len(line) < _LINE_BYTES:
                piece, handed = kernel.receive(connection, _LINE_BYTES, 1)
                descriptors += handed
                if not piece:
                    return
                line += piece
            connection.sendall(json.dumps(_answer_to(line, descriptors, pool)).encode() + b"\n")
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _answer_to(line: bytes, secrets: Sequence[int], pool: NetworkPool) -> dict[str, object]:
    try:
        request = json.loads(line)
        if "warm" in request:
            pool.keep(request["warm"], request["ports"])
            return {}
        return {"pid": start_shim(Path(request["start"]), secrets, pool)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _fork_twice(folder: AttemptFolder, lock: int, secrets: Sequence[int], ready: ReadyNetwork | None) -> int:
    """Fork the shim by way of a child that leaves at once, so that it is no child of this process."""
    report, report_write = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            if os.fork() == 0:
                _run_shim(folder, lock, report_write, secrets, ready)
        finally:  # also where no process more is allowed: this one must not go on as a second zygote
            os._exit(0)
    os.close(report_write)
    os.waitpid(middle, 0)
    with os.fdopen(report, "rb") as file:
        answer = file.read()
    if not answer.isdigit():
        raise OSError(answer.decode() or "the shim died before it could say who it is")
    return int(answer)


def _run_shim(
    folder: AttemptFolder, lock: int, report: int, secrets: Sequence[int], ready: ReadyNetwork | None
) -> NoReturn:
    try:
        keep_only([lock, report, *secrets, *(ready.descriptors if ready else ())])
        values = _read_secrets(secrets)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            record = shim.become_shim(folder.path)
        except OSError as error:
            os.write(report, str(error).encode())
            raise
        with contextlib.suppress(BrokenPipeError):  # the zygote was ended: the record says who this is
            os.write(report, b"%d" % record.pid)
        os.close(report)
        shim.see_through(folder.path, values, ready)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _read_secrets(descriptors: Sequence[int]) -> dict[str, str]:
    """Reads and closes them: no descriptor of the shim leads to a value then."""
    values: dict[str, str] = {}
    for descriptor in descriptors:
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            values |= json.load(file)
    return values


if __name__ == "__main__":
    kernel.set_name("nabla-zygote")
    serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else os.getppid())
