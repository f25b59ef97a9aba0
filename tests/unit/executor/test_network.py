"""Which addresses are public, which networks can be, and names and addresses that do not collide."""

import ipaddress
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from services.executor.adapters.attempts.attempt_folder import AttemptSpec, MalformedSpec
from services.executor.adapters.networks.network_names import name_servers, resolver_file
from services.executor.adapters.networks.network_rules import inner_wall, outer_wall
from services.executor.domain.network import (
    Gang,
    MalformedNetwork,
    Network,
    candidate_addresses,
    installation_tag,
    interface_name,
    is_public,
    refusal,
)

pytestmark = pytest.mark.unit
GANG = Gang(name="a1", node_address="10.1.1.1", peer_addresses=["10.1.1.2"], first_port=20000, last_port=20511)


@pytest.mark.parametrize("address", ["9.9.9.9", "1.1.1.1", "223.255.255.254", "2606:4700::1111", "::ffff:9.9.9.9"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)
    assert not is_public(address, own=[address.removeprefix("::ffff:")])


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.0.0.1", "100.96.1.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.31.255.255"),
        *("192.0.0.192", "192.168.1.1", "198.18.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1%eth0"),
        *("fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "2002:a00:1::"),
        *("64:ff9b::a00:1", "2001:db8::1", "2001::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_allowed_networks_count_as_public_but_never_the_node_itself() -> None:
    assert is_public("10.3.0.7", allowed=["10.3.0.0/16"])
    assert not is_public("10.3.0.7", allowed=["10.3.0.0/16"], own=["10.3.0.7"])


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "all"},
        {"reach": "far"},
        {"subnet": "100.96.0.1/16"},
        {"subnet": "fd00::/64"},
        {"allowed": ["mirror.example"]},
        {"installation": "x; drop"},
    ],
)
def test_networks_that_cannot_be(fields: dict[str, object]) -> None:
    with pytest.raises(MalformedNetwork):
        Network(**fields)  # type: ignore[arg-type]
    raw = asdict(AttemptSpec(attempt_id="a", job_id="j", command="true"))
    raw["network"] |= fields
    with pytest.raises(MalformedSpec):
        AttemptSpec.from_json(json.dumps(raw))


@pytest.mark.parametrize("ports", [(80, 90), (3000, 2000), (60000, 70000)])
def test_gangs_that_cannot_be(ports: tuple[int, int]) -> None:
    with pytest.raises(MalformedNetwork):
        Gang(name="a", node_address="10.1.1.1", first_port=ports[0], last_port=ports[1])
    with pytest.raises(MalformedNetwork):
        Gang(name="a", node_address="node; accept", first_port=2000, last_port=3000)


def test_a_network_survives_its_way_to_the_shim() -> None:
    network = Network(policy="internet", reach="full", allowed=["10.3.0.0/16"], gang=GANG)
    spec = AttemptSpec(attempt_id="a", job_id="j", command="true", network=network)
    assert AttemptSpec.from_json(json.dumps(asdict(spec))).network == network
    assert AttemptSpec.from_json('{"attempt_id": "a", "job_id": "j", "command": "true"}').network == Network()


@pytest.mark.parametrize(
    ("policy", "reach", "gang", "leads_out"),
    [
        ("none", "full", GANG, False),
        ("platform", "full", None, False),
        ("platform", "full", GANG, True),
        ("internet", "full", None, True),
        ("internet", "loopback", GANG, False),
        ("internet", "host", None, False),
    ],
)
def test_a_way_out_is_made_only_where_one_is_needed(
    policy: str, reach: str, gang: Gang | None, leads_out: bool
) -> None:
    assert Network(policy=policy, reach=reach, gang=gang).leads_out is leads_out  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "reach", "nodes", "says"),
    [
        ("", "host", 1, ""),
        ("internet", "host", 1, ""),
        ("none", "host", 1, "cannot be kept"),
        ("platform", "host", 1, "cannot be kept"),
        ("", "loopback", 1, ""),
        ("", "loopback", 2, "loopback only"),
        ("none", "full", 2, "without each other"),
        ("platform", "full", 2, ""),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(policy: str, reach: str, nodes: int, says: str) -> None:
    assert says in refusal(policy, reach, nodes)
    assert bool(refusal(policy, reach, nodes)) == bool(says)


def test_interfaces_of_two_installations_and_two_attempts_differ() -> None:
    names = {
        interface_name(Network(policy="internet", reach="full", installation=installation_tag(folder)), attempt)
        for folder in ("/home/a/.nabla/node", "/home/b/.nabla/node")
        for attempt in ("as1", "as2")
    }
    assert len(names) == 4
    assert {len(name) for name in names} == {15}  # what the kernel takes


def test_addresses_lie_in_the_subnet_and_begin_elsewhere_for_each() -> None:
    subnet = ipaddress.ip_network("100.96.0.0/24")
    found = list(candidate_addresses(str(subnet), "a"))
    assert len(set(found)) == len(found) == 64
    assert all(ipaddress.ip_address(address) in subnet for address in found)
    assert found[0] != next(candidate_addresses(str(subnet), "b"))
    assert "100.96.0.0" not in found
    assert "100.96.0.255" not in found


def test_walls_refuse_by_default() -> None:
    for policy in ("platform", "internet"):
        inner = inner_wall(Network(policy=policy, reach="full", gang=GANG), ["10.1.1.1"])  # type: ignore[arg-type]
        assert inner.count("policy drop") == 3
        assert ("ip daddr != @refused accept" in inner) == (policy == "internet")
    assert outer_wall("abcd", "100.96.0.0/16", []).count("drop\n  }") >= 3


def test_the_resolver_inside_keeps_all_but_the_servers(tmp_path: Path) -> None:
    file = f"{tmp_path}/resolv.conf"
    servers = "nameserver 127.0.0.53\nnameserver fe80::1%eth0\n"
    Path(file).write_text(f"# a comment\n{servers}search a.example b.example\noptions edns0\n")
    assert name_servers(file) == ["127.0.0.53", "fe80::1"]
    assert resolver_file(file) == "nameserver 127.0.0.1\nsearch a.example b.example\noptions edns0\n"
    assert name_servers(f"{tmp_path}/none") == ["127.0.0.1"]
