"""Who is reached under which name: the meaning of Traefik's configuration, read as Traefik reads it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from libs.common.errors import Invalid
from services.gateway.domain.origins import origins_of
from services.serving.domain.front import NOWHERE, Backend, Base, Endpoint, NodeDoor, Nodes, Pass, front_config, stamped
from services.serving.domain.names import checked_name

pytestmark = pytest.mark.unit

BASE = Base("http://127.0.0.1:8080", "apps.localhost", "http://127.0.0.1:7000", "http://127.0.0.1:8333", "nabla")
DIGITS = Endpoint("digits", "127.0.0.1:23456")


def matches(rule: str, host: str, path: str) -> bool:
    """Evaluates the few matchers that we use."""
    expression = re.sub(r"Host\(`([^`]*)`\)", lambda m: str(m[1] == host), rule)
    expression = re.sub(r"PathPrefix\(`([^`]*)`\)", lambda m: str(path.startswith(m[1])), expression)
    expression = re.sub(r"Path\(`([^`]*)`\)", lambda m: str(m[1] == path), expression)
    translated = expression.replace("&&", " and ").replace("||", " or ").replace("!", " not ")
    return bool(eval(translated, {"__builtins__": {}}))


def routed(config: dict[str, Any], host: str, path: str) -> str | None:
    """The service that a request goes to."""
    found = [r for r in config["http"]["routers"].values() if matches(r["rule"], host, path)]
    return max(found, key=lambda router: router["priority"])["service"] if found else None


@pytest.mark.parametrize(
    ("host", "path", "service"),
    [
        ("localhost", "/", "gateway"),
        ("localhost", "/runs/js1", "gateway"),
        ("localhost", "/api/v1/jobs", "gateway"),
        ("127.0.0.1", "/api/v1/jobs", "gateway"),
        ("127.0.0.1", "/runs/js1", None),
        ("127.0.0.1", "/nabla/fs1/a", "objects"),
        ("localhost", "/nabla/fs1/a", "gateway"),
        ("127.0.0.1", "/d/digits/predict", "d-digits"),
        ("127.0.0.1", "/d/digits", "d-digits"),
        ("127.0.0.1", "/d/digits2/predict", None),
        ("localhost", "/d/digits/predict", "gateway"),
        ("digits.apps.localhost", "/predict", "d-digits"),
        ("digits.apps.localhost", "/api/v1/jobs", "d-digits"),
        ("other.apps.localhost", "/predict", None),
        ("evil.example", "/api/v1/jobs", None),
    ],
)
def test_a_host_and_path_reach_one_service(host: str, path: str, service: str | None) -> None:
    assert routed(front_config(BASE, [DIGITS]), host, path) == service


def test_a_domain_of_its_own_puts_the_ui_on_the_parent_of_the_applications_domain() -> None:
    base = Base("https://nabla.example.com", "apps.nabla.example.com", "http://g:1", "http://s:1", "nabla")
    config = front_config(base, [DIGITS])
    assert routed(config, "nabla.example.com", "/") == "gateway"
    assert routed(config, "nabla.example.com", "/d/digits/predict") == "gateway"
    assert routed(config, "digits.apps.nabla.example.com", "/predict") == "d-digits"


def test_files_are_linked_to_a_host_that_reaches_the_object_store() -> None:
    """The gateway signs for this host; here is where it is heard."""
    domain = "apps.nabla.example.com"
    host = origins_of("nabla.example.com", (), "", domain).content_address("nabla.example.com")
    config = front_config(Base("https://nabla.example.com", domain, "http://g:1", "http://s:1", "nabla"), [DIGITS])
    assert routed(config, host, "/nabla/fs1/file") == "objects"
    assert routed(config, host, "/predict") is None


def test_tenants_content_never_shares_a_name_with_the_ui() -> None:
    config = front_config(BASE, [DIGITS])
    for path in ("/", "/d/digits/predict", "/d/digits", "/nabla/x", "/api/v1", "/predict"):
        assert routed(config, "localhost", path) == "gateway"


def test_the_programs_address_sends_a_browser_to_the_ui() -> None:
    http = front_config(BASE, [])["http"]
    assert http["routers"]["home"]["middlewares"] == ["to-ui"]
    assert http["middlewares"]["to-ui"]["redirectRegex"]["replacement"] == "http://localhost:8080/"


def test_no_cookie_reaches_a_replica_or_comes_from_one() -> None:
    config = front_config(BASE, [DIGITS])["http"]
    for form in ("host", "path"):
        assert "no-cookies" in config["routers"][f"d-digits-{form}"]["middlewares"]
    headers = config["middlewares"]["no-cookies"]["headers"]
    assert headers == {"customRequestHeaders": {"Cookie": ""}, "customResponseHeaders": {"Set-Cookie": ""}}


def test_pages_of_the_ui_may_call_endpoints_and_others_may_not() -> None:
    cors = front_config(BASE, [DIGITS])["http"]["middlewares"]["endpoint-cors"]["headers"]
    assert set(cors["accessControlAllowOriginList"]) == {"http://localhost:8080", "http://127.0.0.1:8080"}


def test_an_endpoint_between_two_replicas_has_a_route_without_a_server() -> None:
    config = front_config(BASE, [Endpoint("digits", "")])
    assert config["http"]["services"]["d-digits"]["loadBalancer"]["servers"] == []


def test_everything_but_the_gateway_is_routed_while_it_is_not_up() -> None:
    base = Base(BASE.front_door, BASE.apps_domain, "", BASE.objects, BASE.bucket)
    config = front_config(base, [DIGITS])
    assert routed(config, "127.0.0.1", "/d/digits/predict") == "d-digits"
    assert routed(config, "localhost", "/") is None


def test_the_stamp_is_in_the_file_and_changes_with_any_content() -> None:
    text, stamp = stamped(front_config(BASE, [DIGITS]))
    assert stamp in json.loads(text)["http"]["middlewares"]
    assert stamped(front_config(BASE, [DIGITS]))[1] == stamp
    assert stamped(front_config(BASE, [Endpoint("digits", "127.0.0.1:1")]))[1] != stamp


@pytest.mark.parametrize("name", ["a", "digits", "digits-2", "0", "a" * 63])
def test_a_dns_label_is_a_name(name: str) -> None:
    assert checked_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "Digits", "-a", "a-", "a_b", "a.b", "a" * 64, "a`b", "ü", "a\n", "de" + "0" * 26, "s3"]
)
def test_other_names_are_refused_with_a_proposal(name: str) -> None:
    with pytest.raises(Invalid):
        checked_name(name)


NAME = "8000-at1.ab12.nodes.nabla"
FAR = NodeDoor("Ab12", "10.0.0.2:4000")
PASS = Pass("certificate", "key", "authority")


@pytest.mark.parametrize(
    ("address", "nodes", "backend"),
    [
        ("127.0.0.1:9000", Nodes(), Backend("http://127.0.0.1:9000")),
        (
            "8000-at1.ab12.nodes.nabla",
            Nodes((FAR,), PASS),
            Backend("https://10.0.0.2:4000", "8000-at1.ab12.nodes.nabla"),
        ),
        ("8000-at1.ab12.nodes.nabla", Nodes((FAR,)), NOWHERE),
        ("8000-at1.cd34.nodes.nabla", Nodes((FAR,), PASS), NOWHERE),
        (NAME, Nodes((NodeDoor("Ab12", "127.0.0.1:4000"),), PASS), NOWHERE),
        ("", Nodes((FAR,), PASS), NOWHERE),
    ],
)
def test_a_jobs_address_is_a_port_here_or_a_name_at_its_node(address: str, nodes: Nodes, backend: Backend) -> None:
    assert nodes.backend_of(address) == backend


def test_another_machine_is_spoken_to_by_tls_alone() -> None:
    here = NodeDoor("here", "127.0.0.1:4000")
    http = front_config(BASE, [Endpoint("digits", NAME)], Nodes((FAR, here), PASS))["http"]
    shown = [{"certFile": "certificate", "keyFile": "key"}]
    names = {"d-digits": NAME, "n-Ab12": "door.ab12.nodes.nabla"}
    assert http["serversTransports"] == {
        name: {"serverName": asked, "rootCAs": ["authority"], "certificates": shown} for name, asked in names.items()
    }
    for name in names:
        balancer = http["services"][name]["loadBalancer"]
        assert (balancer["servers"], balancer["serversTransport"]) == ([{"url": "https://10.0.0.2:4000"}], name)
    assert http["services"]["n-here"]["loadBalancer"]["servers"] == [{"url": "http://127.0.0.1:4000"}]
