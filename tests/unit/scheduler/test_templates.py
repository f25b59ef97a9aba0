from __future__ import annotations

import math

import pytest

from libs.common.contracts.messages import (
    Container,
    Environment,
    Gang,
    Input,
    JobTemplate,
    ModelOutput,
    Resources,
    Role,
    Source,
)
from libs.common.errors import Invalid, TooLarge
from libs.common.ids import new_id
from services.scheduler.domain.origins import exact
from services.scheduler.domain.templates import SERVICES, checked_template
from tests.unit.scheduler.cases import template

pytestmark = pytest.mark.unit
WORKSPACE = new_id("fileset")


def test_a_bare_template_gets_its_defaults():
    checked = checked_template(JobTemplate(command=("true",)))
    assert (checked.kind, checked.resources.cpu_count) == ("command", 1.0)
    assert checked_template(checked) == checked


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("command", {"command": ()}),
        ("command", {"command": (" ",)}),
        ("command", {"command": ("a\0b",)}),
        ("command", {"command": ("x" * 128 * 1024,)}),
        ("env", {"env": {"1A": ""}}),
        ("env", {"env": {"A B": ""}}),
        ("env", {"env": {"A": "\0"}}),
        ("env.A", {"env": {"A": "secret:"}}),
        ("env.A", {"env": {"A": "secret:no such name"}}),
        ("container.registry_password", {"container": Container(registry_password="plain text")}),
        ("source.password", {"source": Source(password="plain text")}),
        ("source.username", {"source": Source(username="secret:a/b")}),
        (
            "gang.roles.0.env.A",
            {"gang": Gang(type="torch", roles=(Role(name="worker", count=2, env={"A": "secret:.."}),))},
        ),
        ("resources.cpu_count", {"resources": Resources(cpu_count=-1)}),
        ("resources.cpu_count", {"resources": Resources(cpu_count=math.nan)}),
        ("resources.cpu_count", {"resources": Resources(cpu_count=math.inf)}),
        ("resources.cpu_count", {"resources": Resources(cpu_count=0.0004)}),
        ("resources.memory_bytes", {"resources": Resources(memory_bytes=-1)}),
        ("resources.memory_bytes", {"resources": Resources(memory_bytes=2**63)}),
        ("resources.gpu_count", {"resources": Resources(gpu_count=-1)}),
        ("resources.gpu_count", {"resources": Resources(gpu_count=1.5)}),
        ("environment.kind", {"environment": Environment(kind="docker")}),
        ("environment.path", {"environment": Environment(kind="workspace")}),
        ("environment.path", {"environment": Environment(kind="workspace", path="../r.txt")}),
        ("environment.path", {"environment": Environment(kind="recorded", path="../x")}),
        ("environment.python", {"environment": Environment(python="3.12\n")}),
        ("source.kind", {"source": Source(url="https://x/y")}),
        ("source.kind", {"source": Source(kind="svn", url="https://x/y")}),
        ("source.url", {"source": Source(kind="git", url="ext::sh -c id")}),
        ("source.url", {"source": Source(kind="git", url="file:///etc")}),
        ("source.url", {"source": Source(kind="git", url="https://me:word@host/x")}),
        ("source.url", {"source": Source(kind="s3", url="https://x/y")}),
        ("source.ref", {"source": Source(kind="git", url="https://x/y", ref="--upload-pack=id")}),
        ("source.password", {"source": Source(kind="git", url="https://x/y", password="a\nb")}),
        ("source", {"source": Source(kind="git", url="https://x/y"), "workspace_id": new_id("fileset")}),
        ("timeout_s", {"timeout_s": -1}),
        ("timeout_s", {"timeout_s": math.inf}),
        ("timeout_s", {"timeout_s": math.nan}),
        ("max_retries", {"max_retries": -1}),
        ("max_retries", {"max_retries": 101}),
        ("ports", {"ports": (0,)}),
        ("ports", {"ports": (65_536,)}),
        ("ports", {"ports": (80, 80)}),
        ("workspace_id", {"workspace_id": "../../etc"}),
        ("workspace_id", {"workspace_id": new_id("job")}),
        ("inputs", {"inputs": (Input(path="x"),)}),
        ("inputs", {"inputs": (Input(fileset_id="fs1", path="x"),)}),
        ("inputs", {"inputs": (Input(fileset_id=new_id("fileset"), path="../x"),)}),
        ("models", {"models": (ModelOutput(path="/etc"),)}),
        ("name", {"name": "x" * 201}),
        ("name", {"name": "a\nb"}),
        ("network", {"network": "intranet"}),
        ("kind", {"kind": "replica"}),
        ("container.image", {"container": Container(user="app")}),
        ("container.image", {"container": Container(image="dir:/etc")}),
        ("container.image", {"container": Container(image="docker-archive:file")}),
        ("container.image", {"container": Container(image="--privileged")}),
        ("container.image", {"container": Container(image="0123456789ab")}),
        ("container.image", {"container": Container(image="localhost/nabla-own-t0b:1")}),
        ("container.dockerfile", {"container": Container(dockerfile="Dockerfile")}),  # there is no workspace
        ("container.dockerfile", {"container": Container(image="a", dockerfile="b"), "workspace_id": WORKSPACE}),
        ("container.dockerfile", {"container": Container(dockerfile="../x"), "workspace_id": WORKSPACE}),
        ("container.dockerfile", {"container": Container(dockerfile="/etc/x"), "workspace_id": WORKSPACE}),
        ("container.dockerfile", {"container": Container(dockerfile="x", built="y"), "workspace_id": WORKSPACE}),
        (
            "container.dockerfile",
            {"container": Container(dockerfile="x", build_args={"--a": "b"}), "workspace_id": WORKSPACE},
        ),
        ("container.dockerfile", {"container": Container(image="a", build_args={"a": "b"})}),
        ("container.user", {"container": Container(image="python:3.12", user="a b")}),
        ("container.user", {"container": Container(image="python:3.12", user="--volume")}),
        ("container.registry_password", {"container": Container(image="python:3.12", registry_username="me")}),
        ("environment", {"container": Container(image="python:3.12"), "environment": Environment(kind="venv")}),
        (
            "gang.roles[0].container.image",
            {"gang": Gang(type="torch", roles=(Role(name="worker", count=1, container=Container(image="/")),))},
        ),
    ],
)
def test_a_wrong_field_is_named_with_a_remedy(field, fields):
    with pytest.raises(Invalid) as refusal:
        checked_template(template(**fields))
    assert refusal.value.facts == {"field": f"template.{field}"}
    assert refusal.value.remedy


def test_a_dockerfile_is_a_file_of_the_workspace():
    container = Container(dockerfile="docker/Dockerfile", user="app", build_args={"V": "1"}, built="0" * 64)
    given = template(workspace_id=WORKSPACE, container=container)
    assert checked_template(given) == given


def test_the_same_again_names_the_image_that_was_built():
    given = template(workspace_id=WORKSPACE, container=Container(dockerfile="Dockerfile"))
    assert exact(given, {"image": "0" * 64}).container == Container(dockerfile="Dockerfile", built="0" * 64)
    plain = template(container=Container(image="python:3.12"))
    assert exact(plain, {"image": "0" * 64}) == plain


def test_a_secret_is_named_where_a_credential_stands():
    given = template(
        env={"A": "secret:HF_TOKEN", "B": "secret::plain"},
        container=Container(image="a.example/mine", registry_username="me", registry_password="secret:REGISTRY"),
    )
    assert checked_template(given) == given


def test_a_password_that_is_refused_is_not_repeated():
    with pytest.raises(Invalid) as refusal:
        checked_template(template(source=Source(password="hunter2hunter2")))
    assert "hunter2" not in f"{refusal.value.detail} {refusal.value.remedy} {refusal.value.facts}"


@pytest.mark.parametrize(
    "image",
    ["python", "python:3.12", "a.example:5000/b/c_d/e-f:1.2-x", "localhost/mine", f"python@sha256:{'0' * 64}"],
)
def test_images_are_named_as_their_registries_do(image):
    asked = Container(image=image, user="1000:users", registry_username="me", registry_password="secret:registry")
    assert checked_template(template(container=asked)).container == asked


def test_file_sets_are_named_by_their_ids():
    inputs = (Input(fileset_id=new_id("fileset"), path="data"),)
    assert checked_template(template(workspace_id=new_id("fileset"), inputs=inputs)).inputs == inputs


def test_a_template_that_no_event_could_carry_is_too_large():
    with pytest.raises(TooLarge):
        checked_template(template(env={"A": "x" * 200_000}))


def test_services_order_their_own_kinds_only():
    assert checked_template(template(kind="build"), SERVICES).kind == "build"
    with pytest.raises(Invalid):
        checked_template(template(), SERVICES)


def test_what_a_node_found_makes_a_template_exact():
    asked = JobTemplate(
        command=("true",),
        source=Source(kind="git", url="https://x/y", ref="main", password="secret:P"),
        environment=Environment(kind="workspace", path="requirements.txt"),
    )
    found = exact(asked, {"commit": "a" * 40, "environment": "fs1"})
    assert found.source == asked.source.model_copy(update={"ref": "a" * 40})
    assert found.environment == Environment(kind="recorded", path="fs1")
    assert exact(asked, {}) == asked


def test_no_word_of_a_url_with_a_password_is_repeated():
    source = Source(kind="git", url="https://me:s3cr3t@host/x")
    with pytest.raises(Invalid) as refused:
        checked_template(JobTemplate(command=("true",), source=source))
    assert "s3cr3t" not in str(vars(refused.value))
