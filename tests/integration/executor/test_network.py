"""What a job reaches from inside a real sandbox, on machines played by network namespaces, and what stays behind."""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.executor.adapters.attempts import processes
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, FrontDoor
from services.executor.domain.network import Gang, Network, Policy
from tests.integration.executor.attempts import eventually, log_of, said
from tests.integration.executor.netspaces import (
    METADATA,
    PRIVATE,
    PUBLIC,
    ROUTER,
    Machine,
    NodeOn,
    World,
    ip,
    node_on,
    why_no_network,
)

pytestmark = pytest.mark.integration

ORDINARY_UID = 31_777
OWN_PUBLIC = "8.8.4.4"  # a public address that the node itself has
PATIENCE_S = 3

# Tries each address in argv: what it heard there, or the error's name.
REACH = f"""
import errno, json, socket, sys
found = {{}}
for place in sys.argv[1:]:
    host, port = place.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), {PATIENCE_S}) as connection:
            found[place] = connection.recv(99).decode() or "closed"
    except OSError as error:
        found[place] = errno.errorcode.get(error.errno, type(error).__name__)
print(json.dumps(found))
"""
SERVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
try:
    probe.connect(("9.9.9.9", 9))
    print("address", probe.getsockname()[0], flush=True)
except OSError:
    pass
print("listening", flush=True)
while True:
    connection, peer = server.accept()
    connection.sendall(f"{sys.argv[3]} sees {peer[0]}".encode())
    connection.close()
"""


@pytest.fixture(scope="module", params=["root", "user"])
def kind(request: pytest.FixtureRequest) -> str:
    """Who runs the platform on the node: root, by interfaces and filters, or an ordinary user, by pasta."""
    kind: str = request.param
    if why_no_network(kind == "root"):
        pytest.skip(why_no_network(kind == "root"))
    return kind


class Place:
    """A node in the world, and what listens on it that no job may reach."""

    def __init__(self, world: World, node: NodeOn, address: str) -> None:
        self.world, self.node, self.address = world, node, address
        machine = node.machine
        ip(f"address add {OWN_PUBLIC}/32 dev lo\n", machine.name)
        self.door = machine.listen("front door", "127.0.0.1")
        self.refused = {
            f"{address}:{machine.listen('NATS', '0.0.0.0', 4222).port}": "the node's address",
            f"{OWN_PUBLIC}:4222": "the node's public address",
            f"127.0.0.1:{machine.listen('loopback', '127.0.0.1', 6379).port}": "the node's loopback",
            f"{ROUTER}:80": "the router",
            f"{PRIVATE}:5432": "a private address",
            f"{METADATA}:80": "the cloud's metadata",
        }
        world.router.listen("router", ROUTER, 80)
        self.bare = left_of(self)

    def network(self, policy: Policy, **fields: object) -> Network:
        return Network(policy=policy, reach="full", installation=self.node.installation, **fields)  # type: ignore[arg-type]

    def reached(self, network: Network, *places: str, command: str = REACH) -> dict[str, str]:
        door = [FrontDoor(8080, "127.0.0.1", self.door.port)]
        ended = self.node.run(["python3", "-c", command, *places], network=network, front_door=door)
        assert ended.code == 0, f"{ended.record} {ended.text} {(ended.folder.path / 'shim.log').read_text()}"
        found: dict[str, str] = json.loads(ended.lines("o")[-1])
        return found


@pytest.fixture(scope="module")
def place(kind: str) -> Iterator[Place]:
    with World() as world:
        machine, address = world.neighbour()
        with node_on(machine, uid=None if kind == "root" else ORDINARY_UID) as node:
            yield Place(world, node, address)


def refused_all(found: dict[str, str], places: dict[str, str]) -> None:
    assert {places[place]: heard for place, heard in found.items() if "sees" in heard} == {}


def test_policy_internet_reaches_the_front_door_and_public_addresses_and_nothing_else(place: Place) -> None:
    found = place.reached(place.network("internet"), "127.0.0.1:8080", f"{PUBLIC}:443", *place.refused)
    assert found.pop("127.0.0.1:8080") == "front door sees 127.0.0.1"
    assert found.pop(f"{PUBLIC}:443") == f"public sees {place.address}"
    refused_all(found, place.refused)


@pytest.mark.parametrize("policy", ["platform", "none"])
def test_other_policies_reach_no_address(place: Place, policy: Policy) -> None:
    found = place.reached(place.network(policy), f"{PUBLIC}:443", *place.refused)
    refused_all(found, place.refused | {f"{PUBLIC}:443": "a public address"})


def test_an_interface_of_its_own_choice_leads_past_no_wall(place: Place) -> None:
    """Bound to a device, Linux takes addresses without a route for neighbours."""
    bound = REACH.replace(
        f"with socket.create_connection((host, int(port)), {PATIENCE_S}) as connection:",
        f"with socket.socket() as connection:\n            connection.settimeout({PATIENCE_S})\n"
        "            device = next(name for _, name in socket.if_nameindex() if name != 'lo')\n"
        "            connection.setsockopt(socket.SOL_SOCKET, 25, device.encode())\n"
        "            connection.connect((host, int(port)))",
    )
    assert bound != REACH
    found = place.reached(place.network("internet"), f"{PUBLIC}:443", *place.refused, command=bound)
    assert "sees" in found.pop(f"{PUBLIC}:443")
    refused_all(found, place.refused)


def test_allowed_networks_are_reached(place: Place) -> None:
    if place.node.uid is None:
        place.node.machine.python(
            "from services.executor.adapters.networks import network_host as host; "
            f"tag = {place.node.installation!r}; host.take_wall_down(tag)"
        )
        place.node.raise_wall((f"{PRIVATE}/32",))
    network = place.network("internet", allowed=[f"{PRIVATE}/32"])
    assert place.reached(network, f"{PRIVATE}:5432") == {f"{PRIVATE}:5432": f"private sees {place.address}"}
    other = place.reached(place.network("internet"), f"{PRIVATE}:5432")
    assert "sees" not in other[f"{PRIVATE}:5432"]


def test_sandboxes_do_not_reach_each_other_nor_does_the_node(place: Place) -> None:
    folder = place.node.start(["python3", "-c", SERVE, "0.0.0.0", "9000", "other"], network=place.network("internet"))
    eventually(lambda: said(folder, "listening"), "the server inside")
    address = next(line.text.split()[1] for line in log_of(folder) if line.text.startswith("address"))
    at = f"{address}:9000"
    found = place.reached(place.network("internet"), at)
    assert "sees" not in found[at]
    assert "sees" not in json.loads(place.node.machine.run("python3", "-c", REACH, at))[at]
    stop(place.node, folder)


def test_names_are_resolved_by_the_nodes_own_server_on_its_loopback(place: Place) -> None:
    server = place.node.machine.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    server.bind(("127.0.0.53", 53))
    threading.Thread(target=answer_names, args=(server,), daemon=True).start()
    script = "import socket, json; print(json.dumps({'found': socket.gethostbyname('public.example')}))"
    assert place.reached(place.network("internet"), command=script) == {"found": PUBLIC}
    server.close()


def answer_names(server: socket.socket) -> None:
    """Every name is the public server's."""
    with contextlib.suppress(OSError):
        while True:
            query, client = server.recvfrom(512)
            question = query[12 : query.index(b"\0", 12) + 5]
            is_a = question[-4:-2] == b"\0\1"
            answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(PUBLIC) if is_a else b""
            head = query[:2] + b"\x81\x80\0\1" + (b"\0\1" if is_a else b"\0\0") + b"\0\0\0\0"
            server.sendto(head + question + answer, client)


@pytest.mark.parametrize("how", ["end", "kill of the shim"])
def test_nothing_is_left(place: Place, how: str) -> None:
    eventually(lambda: left_of(place) == place.bare, "the end of the networks of other tests")
    folder = place.node.start("echo ready; sleep 1000", network=place.network("internet"))
    eventually(lambda: said(folder, "ready"), "the job's first line")
    assert left_of(place) != place.bare
    if how == "end":
        stop(place.node, folder)
    else:
        record = folder.read_shim()
        assert record is not None
        tree = processes.descendants(record.pid)
        os.kill(record.pid, 9)
        eventually(lambda: all(processes.start_ticks(pid) is None for pid in tree), "the end of all processes")
    eventually(lambda: left_of(place) == place.bare, "the end of the network")


def left_of(place: Place) -> tuple[object, ...]:
    machine = place.node.machine
    filters = set(machine.run("nft", "list", "tables").splitlines()) if place.node.uid is None else set[str]()
    return machine.interfaces(), machine.run("ip", "route"), filters, pastas(machine)


def pastas(machine: Machine) -> set[int]:
    namespace = os.stat(machine.path)
    found = set()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            if processes.name_of(pid).startswith(("passt", "pasta")) and os.path.samestat(
                os.stat(f"/proc/{pid}/ns/net"), namespace
            ):
                found.add(pid)
    return found


def stop(node: NodeOn, *folders: AttemptFolder) -> None:
    for folder in folders:
        folder.request_stop(0, "over")
    for folder in folders:
        node.end_of(folder)


class Gangs:
    """Two nodes that give one gang ports on both, and a third machine that is none of its peers."""

    def __init__(self, world: World, nodes: list[tuple[NodeOn, str]], third: Machine) -> None:
        self.nodes, self.third = nodes, third
        world.router.listen("router", ROUTER, 80)

    def network(self, of: int, name: str, ports: tuple[int, int], policy: Policy = "platform") -> Network:
        (node, own), (_, other) = self.nodes[of], self.nodes[1 - of]
        gang = Gang(name=name, node_address=own, peer_addresses=[other], first_port=ports[0], last_port=ports[1])
        return Network(policy=policy, reach="full", installation=node.installation, gang=gang)

    def serve(self, of: int, network: Network, port: int) -> AttemptFolder:
        node, address = self.nodes[of]
        command = ["python3", "-c", SERVE, address, str(port), f"rank {of}"]
        folder = node.start(command, network=network)
        eventually(lambda: said(folder, "listening") or folder.read_exit(), "the server inside")
        assert said(folder, "listening"), f"{folder.read_exit()} {(folder.path / 'shim.log').read_text()}"
        return folder


def ask(node: NodeOn, network: Network, *places: str) -> dict[str, str]:
    ended = node.run(["python3", "-c", REACH, *places], network=network)
    assert ended.code == 0, f"{ended.record} {(ended.folder.path / 'shim.log').read_text()}"
    found: dict[str, str] = json.loads(ended.lines("o")[-1])
    return found


@pytest.fixture(scope="module")
def gangs(kind: str) -> Iterator[Gangs]:
    uid = None if kind == "root" else ORDINARY_UID
    with World() as world, contextlib.ExitStack() as nodes:
        machines = [world.neighbour() for _ in range(3)]
        met = [(nodes.enter_context(node_on(machine, uid=uid)), address) for machine, address in machines[:2]]
        yield Gangs(world, met, machines[2][0])


def test_ranks_of_a_gang_talk_both_ways_between_nodes_and_nobody_else_gets_in(gangs: Gangs) -> None:
    ports, (nodes, addresses) = (21_000, 21_063), zip(*gangs.nodes, strict=True)
    networks = [gangs.network(of, "gang-a", ports) for of in (0, 1)]
    folders = [gangs.serve(of, networks[of], 21_005) for of in (0, 1)]
    for of in (0, 1):
        at = f"{addresses[1 - of]}:21005"
        seen = addresses[of] if nodes[of].uid is None else addresses[1 - of]  # a relay's connections are its own
        assert ask(nodes[of], networks[of], at) == {at: f"rank {1 - of} sees {seen}"}
    for address in addresses:  # a machine that is no peer
        heard = json.loads(gangs.third.run("python3", "-c", REACH, f"{address}:21005"))
        assert "sees" not in heard[f"{address}:21005"]
    stranger = gangs.network(0, "gang-b", (21_100, 21_163))  # another gang of the same nodes
    at = f"{addresses[1]}:21005"
    assert "sees" not in ask(nodes[0], stranger, at)[at]
    stop(nodes[0], folders[0])
    stop(nodes[1], folders[1])


def test_a_gang_reaches_nothing_of_its_peers_but_its_ports(gangs: Gangs) -> None:
    (node, _), (other, address) = gangs.nodes
    inside, outside = (other.machine.listen("platform", "0.0.0.0", port).port for port in (21_205, 4223))
    # Behind the gate of a gang that is there, even its ports lead to the gang alone.
    folder = gangs.serve(1, gangs.network(1, "gang-c", (21_200, 21_263)), 21_210)
    places = [f"{address}:{outside}", f"{ROUTER}:80", f"{PUBLIC}:443"]
    if other.uid is None:
        places.append(f"{address}:{inside}")
    found = ask(node, gangs.network(0, "gang-c", (21_200, 21_263)), *places)
    assert [heard for heard in found.values() if "sees" in heard] == []
    stop(other, folder)


def test_ranks_on_one_node_share_its_address_and_go_on_without_each_other(gangs: Gangs) -> None:
    (node, address), (other, _) = gangs.nodes
    network, theirs = (gangs.network(of, "gang-d", (21_300, 21_363)) for of in (0, 1))
    first = gangs.serve(0, network, 21_301)
    second = gangs.serve(0, network, 21_302)
    places = [f"{address}:21301", f"{address}:21302"]
    assert all("sees" in heard for heard in ask(node, network, *places).values())
    record = first.read_shim()
    assert record is not None
    os.kill(record.pid, 9)  # it made the network
    eventually(lambda: not first.shim_is_alive(), "the end of the first rank's shim")
    eventually(lambda: "sees" in ask(other, theirs, places[1])[places[1]], "the second rank, from the other node")
    stop(node, second)


def test_a_gang_asks_for_ports_of_its_own_and_gets_them(gangs: Gangs) -> None:
    script = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1])"
    node, _ = gangs.nodes[0]
    ended = node.run(["python3", "-c", script], network=gangs.network(0, "gang-e", (21_400, 21_463)))
    assert 21_400 <= int(ended.text) <= 21_463


def test_what_a_killed_gang_left_is_swept(gangs: Gangs) -> None:
    node, _ = gangs.nodes[0]
    if node.uid is not None:
        pytest.skip("an ordinary user leaves nothing on the host")
    folder = gangs.serve(0, gangs.network(0, "gang-f", (21_500, 21_563)), 21_501)
    record = folder.read_shim()
    assert record is not None
    os.kill(record.pid, 9)
    prefix = f"nb{node.installation}"
    eventually(lambda: not [n for n in node.machine.interfaces() if n.startswith(prefix)], "the end of the network")
    assert "nabla_" + node.installation + "_" in node.machine.run("nft", "list", "tables")
    node.machine.python(
        "from services.executor.adapters.networks import network_host as host; "
        f"host.close_dead_gates({node.installation!r})"
    )
    rules = node.machine.run("nft", "list", "ruleset")
    assert f"_{prefix}" not in rules
    assert f"nabla_{node.installation}" in rules
    network_files = Path(node.path, "networks")
    assert json.loads((network_files / "gang-f.json").read_text())


def test_a_machine_forwards_nothing_for_its_neighbours(gangs: Gangs) -> None:
    node, address = gangs.nodes[0]
    if node.uid is not None:
        pytest.skip("an ordinary user changes nothing of the host")
    ip(f"route add 8.8.8.8/32 via {address}\n", gangs.third.name)
    ip("address add 8.8.8.8/32 dev lo\n", gangs.nodes[1][0].machine.name)
    ip(f"route add 8.8.8.8/32 via {gangs.nodes[1][1]}\n", node.machine.name)
    gangs.nodes[1][0].machine.listen("elsewhere", "8.8.8.8", 80)
    heard = json.loads(gangs.third.run("python3", "-c", REACH, "8.8.8.8:80"))
    assert "sees" not in heard["8.8.8.8:80"]


# What a program does that knows of a proxy: each request in argv, and the status that came of it.
BY_PROXY = """
import json, os, sys, urllib.error, urllib.request
found = {}
for url in sys.argv[1:]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            found[url] = answer.read().decode()
    except urllib.error.HTTPError as error:
        found[url] = f"{error.code} {error.read().decode().strip()}"
    except OSError as error:
        found[url] = str(error)
print(json.dumps(found))
"""


class WebServer:
    """Answers each request with a text, or sends it elsewhere."""

    def __init__(self, machine: Machine, address: str, port: int, location: str = "") -> None:
        self._listener = machine.inside(lambda: socket.create_server((address, port)))
        self._location = location
        self.asked: list[str] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    self.asked.append(connection.recv(65536).decode())
                    moved = f"HTTP/1.1 302 Found\r\nLocation: {self._location}\r\n"
                    head = moved if self._location else "HTTP/1.1 200 OK\r\n"
                    connection.sendall(f"{head}Content-Length: 7\r\nConnection: close\r\n\r\nwelcome".encode())


@pytest.fixture(scope="module")
def by_proxy() -> Iterator[Place]:
    if why_no_network():
        pytest.skip(why_no_network())
    with World() as world:
        machine, address = world.neighbour()
        with node_on(machine, resolver="") as node:
            yield Place(world, node, address)


def test_with_loopback_alone_a_proxy_leads_to_public_addresses_and_no_others(by_proxy: Place) -> None:
    world = by_proxy.world
    welcoming = WebServer(world.router, PUBLIC, 80)
    WebServer(world.router, PUBLIC, 81, f"http://{PRIVATE}:5432/")
    network = Network(policy="internet", reach="loopback", installation=by_proxy.node.installation)
    public, moved = f"http://{PUBLIC}/a?b=c", f"http://{PUBLIC}:81/"
    # The second form of an address that is refused in its first; 2130706433 is 127.0.0.1.
    refused = [f"http://{place}/" for place in by_proxy.refused if not place.startswith("127.")]
    refused += ["http://2130706433:6379/", "http://[::ffff:10.99.0.5]:5432/", f"https://{PRIVATE}:5432/"]
    found = by_proxy.reached(network, public, moved, *refused, command=BY_PROXY)
    assert found.pop(public) == "welcome"
    assert welcoming.asked[0].startswith("GET /a?b=c HTTP/1.1\r\n")
    assert "proxy" not in welcoming.asked[0].lower()
    assert found.pop(moved).startswith("403 nabla: 10.99.0.5 is not a public address")
    assert [heard for heard in found.values() if "403" not in heard] == []


def test_the_proxy_carries_a_tunnel_whole(by_proxy: Place) -> None:
    script = (
        "import http.client, json\n"
        "c = http.client.HTTPConnection('127.0.0.1', 3128); "
        f"c.set_tunnel('{PUBLIC}', 443); c.connect()\n"
        "print(json.dumps({'heard': c.sock.recv(99).decode()}))"
    )
    network = Network(policy="internet", reach="loopback", installation=by_proxy.node.installation)
    assert by_proxy.reached(network, command=script) == {"heard": f"public sees {by_proxy.address}"}


def test_a_sandbox_goes_on_without_the_hosts_wall_and_still_reaches_nothing_of_the_host(by_proxy: Place) -> None:
    """Somebody flushed the host's filters: what is inside holds by itself."""
    by_proxy.node.machine.run("nft", "flush", "ruleset")
    found = by_proxy.reached(by_proxy.network("internet"), "127.0.0.1:8080", *by_proxy.refused)
    assert found.pop("127.0.0.1:8080") == "front door sees 127.0.0.1"
    refused_all(found, by_proxy.refused)
    by_proxy.node.raise_wall()
    assert by_proxy.reached(by_proxy.network("internet"), f"{PUBLIC}:443") == {
        f"{PUBLIC}:443": f"public sees {by_proxy.address}"
    }
