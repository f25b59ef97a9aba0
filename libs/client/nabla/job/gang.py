"""What the platform runs in the ranks of a gang beside, or in place of, a command of the user's.

    python -m nabla.job.gang rsh HOST COMMAND...     as ssh would: MPI's launchers call it
    python -m nabla.job.gang serve                   a rank that waits for such calls
    python -m nabla.job.gang lead -- COMMAND...      the command, while this rank answers calls too
    python -m nabla.job.gang ray-head|ray-worker     a private Ray cluster of the gang

There is no sshd in a sandbox, and nobody's keys. The ranks of one attempt share a secret instead, in NABLA_GANG_KEY:
whoever asks signs the answerer's challenge together with what is to be run, so that nobody else is obeyed and nothing
that was overheard can be said again.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from typing import IO, Any, Dict, List, Optional, Sequence, Tuple, cast

# A buffered stream, whose classes have no name in common.
Readable = Any
# The ranks' environments may take different times to be built.
PATIENCE_S = 600.0
AGAIN_S = 0.2
PIECE_BYTES = 1 << 16
LONGEST_CALL_BYTES = 1 << 20
_HEAD = struct.Struct("!cI")
# Options of ssh that MPI's launchers may give and that take a value.
_WITH_VALUE = ("-l", "-p", "-o", "-i")
_UNKNOWN_HOST = 255


def main(words: Sequence[str]) -> int:
    action, rest = (words[0] if words else ""), list(words[1:])
    if rest[:1] == ["--"]:
        rest = rest[1:]
    if action == "rsh":
        return call(*parse_call(rest))
    if action == "serve":
        serve(my_port())
        return 0
    if action == "lead":
        threading.Thread(target=serve, args=(my_port(),), daemon=True).start()
        return run(rest)
    if action in ("ray-head", "ray-worker"):
        return run_ray(action, rest)
    sys.stderr.write(f"{__doc__}\n")
    return 2


def peers() -> List[Dict[str, Any]]:
    """All ranks of the gang: rank, role, index, host, address, port."""
    return cast("List[Dict[str, Any]]", json.loads(os.environ["NABLA_PEERS"]))


def my_port() -> int:
    return int(peers()[int(os.environ["NABLA_RANK"])]["port"])


def parse_call(words: Sequence[str]) -> Tuple[str, List[str]]:
    """Host and command, past the options that ssh would know."""
    rest = list(words)
    while rest and rest[0].startswith("-"):
        rest = rest[2 if rest[0] in _WITH_VALUE else 1 :]
    return (rest[0].rpartition("@")[2], rest[1:]) if rest else ("", [])


def sign(nonce: str, words: Sequence[str]) -> str:
    key = os.environ["NABLA_GANG_KEY"].encode()
    return hmac.new(key, json.dumps([nonce, list(words)]).encode(), hashlib.sha256).hexdigest()


def call(host: str, words: Sequence[str]) -> int:
    """Runs a command on a rank, with our standard streams; the exit code is the command's."""
    peer = next((each for each in peers() if host in (each["host"], each["address"])), None)
    if peer is None:
        sys.stderr.write(f"nabla-rsh: {host} is no rank of this gang\n")
        return _UNKNOWN_HOST
    try:
        connection = connect(peer["address"], int(peer["port"]))
    except OSError as error:
        sys.stderr.write("nabla-rsh: rank {} does not answer: {}\n".format(peer["rank"], error))
        return _UNKNOWN_HOST
    stream = connection.makefile("rwb")
    nonce = stream.readline().decode().strip()
    stream.write(json.dumps({"mac": sign(nonce, words), "words": list(words)}).encode() + b"\n")
    stream.flush()
    threading.Thread(target=_send_input, args=(connection,), daemon=True).start()
    code = _take_output(stream)
    if code is None:
        sys.stderr.write("nabla-rsh: rank {} went away, or refused\n".format(peer["rank"]))
    return _UNKNOWN_HOST if code is None else code


def connect(address: str, port: int, patience_s: float = PATIENCE_S) -> socket.socket:
    """Waits for a rank that is not there yet."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            connection = socket.create_connection((address, port), 5.0)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(AGAIN_S)
        else:
            connection.settimeout(None)
            return connection


def _send_input(connection: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):
        while True:
            piece = os.read(0, PIECE_BYTES)
            connection.sendall(_HEAD.pack(b"i", len(piece)) + piece)
            if not piece:
                return


def _take_output(stream: Readable) -> Optional[int]:
    outputs = {b"o": sys.stdout.buffer, b"e": sys.stderr.buffer}
    while True:
        kind, piece = _read_frame(stream)
        if kind == b"x":
            return int(piece)
        if kind not in outputs:
            return None
        outputs[kind].write(piece)
        outputs[kind].flush()


def _read_frame(stream: Readable) -> Tuple[bytes, bytes]:
    """Its kind and content; an empty kind at the end."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return b"", b""
    kind, length = _HEAD.unpack(head)
    return kind, stream.read(length)


class _Answer(socketserver.StreamRequestHandler):
    """One call: challenge, check, run, relay."""

    def handle(self) -> None:
        nonce = secrets.token_hex(32)
        self.wfile.write(nonce.encode() + b"\n")
        try:
            asked = json.loads(self.rfile.readline(LONGEST_CALL_BYTES))
            words, mac = [str(word) for word in asked["words"]], str(asked["mac"])
        except (ValueError, KeyError, TypeError):
            return
        if not hmac.compare_digest(mac, sign(nonce, words)):
            return
        # As a remote shell does: the words are one line for sh.
        process = subprocess.Popen(
            ["/bin/sh", "-c", " ".join(words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._relay(process)

    def _relay(self, process: subprocess.Popen[bytes]) -> None:
        guard = threading.Lock()
        outputs = [
            threading.Thread(target=self._send, args=(kind, pipe, guard), daemon=True)
            for kind, pipe in ((b"o", process.stdout), (b"e", process.stderr))
        ]
        for thread in outputs:
            thread.start()
        threading.Thread(target=self._feed, args=(process,), daemon=True).start()
        code = process.wait()
        for thread in outputs:
            thread.join()
        text = str(code if code >= 0 else 128 - code).encode()
        with guard, contextlib.suppress(OSError):
            self.wfile.write(_HEAD.pack(b"x", len(text)) + text)

    def _send(self, kind: bytes, pipe: IO[bytes], guard: threading.Lock) -> None:
        for piece in iter(lambda: os.read(pipe.fileno(), PIECE_BYTES), b""):
            with guard, contextlib.suppress(OSError):
                self.wfile.write(_HEAD.pack(kind, len(piece)) + piece)

    def _feed(self, process: subprocess.Popen[bytes]) -> None:
        """Passes input on; who called and is gone leaves nothing running."""
        assert process.stdin
        while True:
            kind, piece = b"", b""
            with contextlib.suppress(OSError, ValueError):  # closed beneath it, when the command has ended meanwhile
                kind, piece = _read_frame(self.rfile)
            with contextlib.suppress(OSError):
                if piece:
                    process.stdin.write(piece)
                    process.stdin.flush()
                elif not process.stdin.closed:
                    process.stdin.close()
            if not kind:
                # One that has ended has given up its number, too.
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                return


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def serve(port: int) -> None:
    """Answers the calls of other ranks, for ever."""
    with _Server(("", port), _Answer) as server:
        server.serve_forever()


def run(words: Sequence[str]) -> int:
    """The command, with what it is told passed on; its exit code as a shell gives it."""
    process = subprocess.Popen(list(words))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: process.send_signal(caught))
    code = process.wait()
    return code if code >= 0 else 128 - code


def run_ray(action: str, words: Sequence[str]) -> int:
    """Starts Ray on this rank: the head runs the command with it, a worker serves until it is stopped.

    Every port that is not named is one that the system gives out, and in a gang's network those are the gang's own.
    """
    split = list(words).index("--") if "--" in words else len(words)
    amounts, command = list(words[:split]), list(words[split + 1 :])
    head, me = peers()[0], peers()[int(os.environ["NABLA_RANK"])]
    address = os.environ["RAY_ADDRESS"]
    port = int(address.rpartition(":")[2])
    arguments = ["ray", "start", "--block", "--node-ip-address={}".format(me["address"]), *amounts]
    arguments += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
    if action == "ray-worker":
        connect(head["address"], port).close()
        return run([*arguments, f"--address={address}"])
    arguments += ["--head", f"--port={port}", "--include-dashboard=false"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(arguments, env=environment, stdout=sys.stderr) as ray:
        connect(head["address"], port).close()
        try:
            return run(command)
        finally:
            ray.terminate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
