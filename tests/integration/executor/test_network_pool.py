"""Networks made ahead: like those that are made when they are asked for, for one attempt each, and gone with whoever
keeps them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.executor.adapters.attempts import zygote
from services.executor.adapters.attempts.attempt_folder import AttemptFolder, FrontDoor
from services.executor.adapters.networks.network_pool import SIZE
from services.executor.domain.network import Network, installation_tag, interface_prefix
from tests.integration.executor.attempts import Ended, eventually, said
from tests.integration.executor.netspaces import NodeOn, World, ip, node_on, why_no_network
from tests.integration.executor.test_network import stop

pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(why_no_network()), reason=why_no_network())]

DOOR_PORT = 8123
# What a job sees of its network, and the descriptors that it was started with.
LOOK = """
import json, os, subprocess
def said(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
settings = ("ipv4/ip_unprivileged_port_start", "ipv6/conf/default/disable_ipv6", "ipv4/ip_local_port_range")
print(json.dumps({
    "descriptors": len(os.listdir("/proc/self/fd")),
    "links": said("ip", "-details", "-statistics", "address"),
    "neighbours": said("ip", "neighbor"),
    "routes": said("ip", "route", "show", "table", "all"),
    "settings": [open(f"/proc/sys/net/{name}").read() for name in settings],
    "sockets": [sorted(line.split()[1] for line in open(f"/proc/net/{kind}").readlines()[1:])
                for kind in ("tcp", "udp")],
}))
"""


@pytest.fixture
def node() -> Iterator[NodeOn]:
    with World() as world:
        machine, _ = world.neighbour()
        with node_on(machine) as node:
            yield node


def wanted(node: NodeOn) -> Network:
    return Network(policy="internet", reach="full", installation=node.installation)


def start(node: NodeOn, command: list[str] | str, network: Network | None = None) -> AttemptFolder:
    door = [FrontDoor(DOOR_PORT, "127.0.0.1", 9)]
    return node.start(command, network=network or wanted(node), front_door=door)


def run(node: NodeOn, command: list[str] | str, network: Network | None = None) -> Ended:
    return node.end_of(start(node, command, network))


def host_ends(node: NodeOn) -> set[str]:
    """The host's ends of the networks of this node."""
    prefix = interface_prefix(node.installation)
    return {name for name in node.machine.interfaces() if name.startswith(prefix)}


def filled(node: NodeOn, besides: frozenset[str] = frozenset()) -> set[str]:
    """The host's ends of those that are ready, once all are."""
    return eventually(
        lambda: found if len(found := host_ends(node) - besides) == SIZE else None, "the networks made ahead"
    )


def keep_warm(node: NodeOn) -> set[str]:
    zygote.keep_warm(node.socket, wanted(node), [DOOR_PORT])
    return filled(node)


def seen_by_a_job(node: NodeOn) -> dict[str, object]:
    """With what differs between any two sandboxes, addresses and numbers of interfaces, struck out."""
    ended = run(node, ["python3", "-c", LOOK])
    assert ended.code == 0, f"{ended.record} {ended.text}"
    line = re.sub(r"100\.96\.\d+\.\d+|(?<=eth0@if)\d+|(?<=link-netnsid )\d+", "N", ended.lines("o")[-1])
    found: dict[str, object] = json.loads(line)
    return found


def test_a_job_cannot_tell_a_network_made_ahead_from_one_made_for_it(node: NodeOn) -> None:
    fresh = seen_by_a_job(node)
    assert fresh["descriptors"] == 4, "standard streams, and what lists them"
    eventually(lambda: not host_ends(node), "the end of the job's network")
    ready = keep_warm(node)
    assert seen_by_a_job(node) == fresh
    eventually(lambda: not ready <= host_ends(node), "the end of the one of those that the job had")


def test_each_serves_one_attempt_and_never_comes_back(node: NodeOn) -> None:
    ready = keep_warm(node)
    folder = start(node, "echo on; sleep 1000")
    eventually(lambda: said(folder, "on"), "the job's first line")
    replaced = eventually(lambda: found if len(found := host_ends(node)) == SIZE + 1 else None, "the next one")
    assert ready <= replaced, "the job has one of those that were ready"
    stop(node, folder)
    eventually(lambda: len(host_ends(node)) == SIZE, "the end of the one that was used")
    assert len(host_ends(node) & ready) == SIZE - 1


def test_a_job_with_another_network_takes_none(node: NodeOn) -> None:
    ready = keep_warm(node)
    other = Network(policy="internet", reach="full", installation=node.installation, allowed=["10.99.0.5/32"])
    assert run(node, "true", other).code == 0
    assert run(node, "true", Network(policy="none", reach="full", installation=node.installation)).code == 0
    assert eventually(lambda: host_ends(node) == ready, "the end of the jobs' own networks")


def test_jobs_make_their_own_when_none_is_ready(node: NodeOn) -> None:
    keep_warm(node)
    folders = [start(node, "echo on; sleep 1000") for _ in range(SIZE + 2)]
    for folder in folders:
        eventually(lambda folder=folder: said(folder, "on"), "the job's first line")  # type: ignore[misc]
    assert len(host_ends(node)) >= SIZE + 2
    stop(node, *folders)
    filled(node)


def test_an_address_that_the_node_has_since_is_refused_too(node: NodeOn) -> None:
    ready = keep_warm(node)
    ip("address add 8.8.4.4/32 dev lo\n", node.machine.name)
    server = node.machine.listen("the node", "8.8.4.4", 4222)
    ended = run(node, ["python3", "-c", f"import socket; socket.create_connection(('8.8.4.4', {server.port}), 3)"])
    assert ended.code == 1, "the job has connected"
    assert "Error" in ended.text
    eventually(lambda: not ready & host_ends(node), "the end of those that did not know the address")
    filled(node)


def test_the_walls_of_killed_agents_are_found_by_their_folders(node: NodeOn, tmp_path: Path) -> None:
    folder = tmp_path / "some" / "node"
    folder.mkdir(parents=True)
    (folder / "agent.lock").touch()
    tag = installation_tag(str(folder))
    node.machine.python(
        "from pathlib import Path; from services.executor.adapters.networks import network_host as host; "
        f"host.raise_wall({tag!r}, '100.96.0.0/16', []); assert host.wall_stands({tag!r}); "
        f"from tests.support.leftovers import take_walls_down; take_walls_down(Path({str(tmp_path)!r})); "
        f"assert not host.wall_stands({tag!r})"
    )


def test_nothing_is_left_when_their_keeper_is_killed(node: NodeOn) -> None:
    keep_warm(node)
    folder = start(node, "echo on; sleep 1000")
    eventually(lambda: said(folder, "on"), "the job's first line")
    node.zygote.kill()
    node.zygote.wait()
    assert len(eventually(lambda: found if len(found := host_ends(node)) == 1 else None, "the job's alone")) == 1
    assert folder.shim_is_alive()
    node.start_zygote()
    stop(node, folder)
    eventually(lambda: not host_ends(node), "the end of the job's network")
