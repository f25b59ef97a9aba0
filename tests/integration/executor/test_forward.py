"""The ways through the wall: the front door outwards, exposed ports inwards, and nothing else."""

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from services.executor.adapters.attempts import processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, FrontDoor
from tests.integration.executor.attempts import (
    Node,
    eventually,
    running_node,
    said,
    started,
    why_no_bwrap,
)

pytestmark = pytest.mark.integration

MIB = 1024 * 1024

SERVE_INSIDE = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    received = b"".join(iter(lambda: connection.recv(65536), b""))
    connection.sendall(b"inside got %d" % len(received))
    connection.close()
"""
ASK_OUTSIDE = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(b"question")
connection.shutdown(socket.SHUT_WR)
print(b"".join(iter(lambda: connection.recv(65536), b"")).decode())
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    if why_no_bwrap():
        pytest.skip(why_no_bwrap())
    with running_node() as node:
        yield node


class Server:
    """Serves each connection of a free port of the host's loopback in a thread."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            self._serve(connection)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def receive_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def answer_after_the_end(connection: socket.socket) -> None:
    question = receive_all(connection)
    connection.sendall(b"answer to " + question)


def test_front_door_answers_and_keeps_half_closed_connections(node: Node) -> None:
    with Server(answer_after_the_end) as server:
        door = FrontDoor(listen_port=8080, target_host="127.0.0.1", target_port=server.port)
        ended = node.run(["python3", "-c", ASK_OUTSIDE, "8080"], front_door=[door])
    assert ended.lines("o") == ["answer to question"], ended.text


def test_front_door_listens_before_the_command_starts(node: Node) -> None:
    script = "import socket; socket.create_connection(('127.0.0.1', 80)); print('connected')"
    with Server(receive_all_and_forget) as server:
        door = FrontDoor(80, "127.0.0.1", server.port)
        for _ in range(5):
            assert node.run(["python3", "-c", script], front_door=[door]).lines() == ["connected"]


def receive_all_and_forget(connection: socket.socket) -> None:
    receive_all(connection)


def test_each_door_leads_to_its_own_target(node: Node) -> None:
    servers = [Server(partial(say, b"server %d" % n)) for n in range(3)]
    doors = [FrontDoor(7000 + n, "127.0.0.1", server.port) for n, server in enumerate(servers)]
    script = "".join(
        f"c = __import__('socket').create_connection(('127.0.0.1', {door.listen_port})); print(c.recv(99).decode())\n"
        for door in doors
    )
    ended = node.run(["python3", "-c", script], front_door=doors)
    for server in servers:
        server.__exit__()
    assert ended.lines("o") == ["server 0", "server 1", "server 2"], ended.text


def say(what: bytes, connection: socket.socket) -> None:
    connection.sendall(what)


def test_only_the_front_door_is_reachable(node: Node) -> None:
    with Server(receive_all_and_forget) as door_server, Server(receive_all_and_forget) as other:
        script = (
            f"import socket\nsocket.create_connection(('127.0.0.1', 8080)); print('door')\n"
            f"try: socket.create_connection(('127.0.0.1', {other.port})); print('open')\n"
            f"except ConnectionRefusedError: print('refused')\n"
        )
        door = FrontDoor(8080, "127.0.0.1", door_server.port)
        ended = node.run(["python3", "-c", script], front_door=[door])
    assert ended.lines() == ["door", "refused"]


def test_front_door_whose_target_is_away_closes_the_connection(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    script = (
        "import socket\nc = socket.create_connection(('127.0.0.1', 8080)); c.settimeout(20)\n"
        "try: print('got', c.recv(10))\nexcept ConnectionResetError: print(\"got b''\")\n"
    )
    ended = node.run(["python3", "-c", script], front_door=[FrontDoor(8080, "127.0.0.1", port)])
    assert ended.lines() == ["got b''"]


def test_much_data_arrives_whole_in_both_directions(node: Node) -> None:
    content = os.urandom(MIB) * 48

    def exchange(connection: socket.socket) -> None:
        sender = threading.Thread(target=connection.sendall, args=(content,))
        sender.start()
        digest = hashlib.sha256(receive_all(connection)).hexdigest()
        sender.join()
        connection.sendall(digest.encode())

    script = (
        "import socket, threading, hashlib\n"
        "c = socket.create_connection(('127.0.0.1', 8080))\n"
        f"data = c.recv({len(content)}, socket.MSG_WAITALL)\n"
        "print(hashlib.sha256(data).hexdigest())\n"
        "c.sendall(data); c.shutdown(socket.SHUT_WR)\n"
        "print(b''.join(iter(lambda: c.recv(65536), b'')).decode())\n"
    )
    with Server(exchange) as server:
        ended = node.run(["python3", "-c", script], front_door=[FrontDoor(8080, "127.0.0.1", server.port)])
    digest = hashlib.sha256(content).hexdigest()
    assert ended.lines() == [digest, digest]


def test_exposed_port_is_reached_from_the_host(node: Node) -> None:
    folder = node.start(["python3", "-c", SERVE_INSIDE, "9000"], expose_ports=[9000, 9001])
    ports = started(folder).ports
    assert sorted(ports) == [9000, 9001]
    eventually(lambda: said(folder, "listening"), "the server inside")
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", ports[9000]), 20) as connection:
            connection.sendall(b"x" * 100_000)
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b"inside got 100000"
    with socket.create_connection(("127.0.0.1", ports[9001]), 20) as connection:
        assert hears_nothing(connection)
    folder.request_stop(0, "over")
    node.end_of(folder)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[9000]), 20)


def hears_nothing(connection: socket.socket) -> bool:
    try:
        return connection.recv(10) == b""
    except ConnectionResetError:
        return True


def test_two_attempts_may_use_the_same_port(node: Node) -> None:
    folders = [node.start(["python3", "-c", SERVE_INSIDE, "9000"], expose_ports=[9000]) for _ in range(2)]
    ports = [started(folder).ports[9000] for folder in folders]
    assert ports[0] != ports[1]
    for folder, port in zip(folders, ports, strict=True):
        eventually(partial(said, folder, "listening"), "the server inside")
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert receive_all(connection) == b"inside got 0"
        folder.request_stop(0, "over")
        node.end_of(folder)


def test_without_walls_ports_are_what_they_are(node: Node) -> None:
    folder = node.start("sleep 1000", isolation="process", expose_ports=[9000])
    assert started(folder).ports == {9000: 9000}
    folder.request_stop(0, "over")
    node.end_of(folder)


def test_kill_of_the_shim_ends_its_relays(node: Node) -> None:
    with Server(receive_all_and_forget) as server:
        door = FrontDoor(8080, "127.0.0.1", server.port)
        folder = node.start("echo ready; sleep 1000", front_door=[door], expose_ports=[9000])
        eventually(lambda: said(folder, "ready"), "the job's first line")
        record = folder.read_shim()
        assert record is not None
        tree = processes.descendants(record.pid)
        assert len(tree) >= 5  # two relays, bwrap, the sandbox's first process, sleep
        os.kill(record.pid, 9)
        eventually(lambda: all(processes.start_ticks(pid) is None for pid in tree), "the end of the relays")


def test_a_relay_that_dies_is_replaced_in_both_directions(node: Node) -> None:
    ask = ASK_OUTSIDE.replace("print(", "print(number, ").replace("import socket, sys", "import socket, sys, os, time")
    ask = ask.replace("\n", "\n    ").rstrip()
    script = (
        f"for number in range(3):{ask}\n"
        "    open(f'asked{number}', 'w').close()\n"
        "    while not os.path.exists(f'go{number}'): time.sleep(0.02)\n"
    )
    with Server(answer_after_the_end) as server:
        door = FrontDoor(8080, "127.0.0.1", server.port)
        serve = node.start(["python3", "-c", SERVE_INSIDE, "9000"], expose_ports=[9000])
        asking = node.start(["python3", "-c", script, "8080"], front_door=[door])
        port = started(serve).ports[9000]
        eventually(lambda: said(serve, "listening"), "the server inside")
        for number in range(3):
            eventually((asking.workspace / f"asked{number}").exists, "the answer through the front door")
            with socket.create_connection(("127.0.0.1", port), 20) as connection:
                connection.settimeout(20)
                connection.shutdown(socket.SHUT_WR)
                assert receive_all(connection) == b"inside got 0"
            for folder in (asking, serve):
                kill_relay(folder)
            (asking.workspace / f"go{number}").touch()
        ended = node.end_of(asking)
        serve.request_stop(0, "over")
        node.end_of(serve)
    assert ended.lines("o") == [f"{number} answer to question" for number in range(3)], ended.text
    assert (asking.path / "shim.log").read_text().count("another one is started") >= 2


def kill_relay(folder: AttemptFolder) -> None:
    """The shim's one child that is not the job's: it leads a session and is called as the shim is."""
    record, begun = folder.read_shim(), folder.read_started()
    assert record is not None
    assert begun is not None

    def relays() -> list[int]:
        below = [pid for pid in processes.descendants(record.pid) if Path(f"/proc/{pid}/comm").exists()]
        return [pid for pid in below if Path(f"/proc/{pid}/comm").read_text() == "nabla-shim\n"]

    (relay,) = eventually(relays, "the relay")
    os.kill(relay, 9)
    eventually(lambda: processes.start_ticks(relay) is None, "the end of the relay")


def test_relays_are_started_only_when_asked_for(node: Node) -> None:
    folder = node.start("echo ready; exec sleep 1000")
    eventually(lambda: said(folder, "ready"), "the job's first line")
    record = folder.read_shim()
    assert record is not None
    assert len(processes.descendants(record.pid)) == 3  # bwrap, the sandbox's first process, sleep
    folder.request_stop(0, "over")
    node.end_of(folder)
