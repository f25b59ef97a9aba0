"""What is read of a Dockerfile and of a .dockerignore before a build."""

from __future__ import annotations

import pytest

from services.executor.domain.dockerfiles import BadDockerfile, Ignored, credentials_problem, images_in, local_name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("FROM scratch\nCOPY . /", ()),
        ("# a comment\nfrom python:3.12\n", ("python:3.12",)),
        ("FROM --platform=linux/amd64 a.example/b AS Base\nFROM base\nCOPY --from=base /x /x", ("a.example/b",)),
        ("ARG V=3.12\nFROM python:${V}\nARG W\nRUN echo $W", ("python:3.12",)),
        ("ARG V\nFROM python:${V:-3.11}", ("python:3.11",)),
        ("FROM a\nCOPY --from=b --chown=1 /x \\\n  /y\nCOPY --from=0 /x /x", ("a", "b")),
        ("FROM a\nRUN --mount=type=bind,from=c,source=/,target=/c \\\n ls", ("a", "c")),
        ("FROM a\nFROM a\n", ("a",)),
    ],
)
def test_the_images_that_it_needs_are_named_once(text: str, found: tuple[str, ...]) -> None:
    assert images_in(text, {}) == found


def test_a_build_argument_goes_over_the_default() -> None:
    assert images_in("ARG V=1\nFROM python:$V", {"V": "2"}) == ("python:2",)


@pytest.mark.parametrize("text", ["", "RUN true", "FROM", "ARG V\nFROM $V"])
def test_what_cannot_be_built_is_said(text: str) -> None:
    with pytest.raises(BadDockerfile):
        images_in(text, {})


def test_an_image_pinned_by_its_digest_has_a_name_that_can_be_given() -> None:
    assert local_name("a.example:5000/b@sha256:ab") == "a.example:5000/b:sha256-ab"
    assert local_name("b:1@sha256:ab") == "b:1-sha256-ab"
    assert local_name("b:1") == "b:1"


def test_credentials_go_to_one_registry_alone() -> None:
    assert not credentials_problem(["a.example/b", "a.example/c", "python:3.12", "localhost/mine"])
    assert "a.example, b.example" in credentials_problem(["a.example/b", "b.example/c"])
    assert "no image with" in credentials_problem(["python:3.12"])


@pytest.mark.parametrize(
    ("text", "ignored", "kept"),
    [
        ("data\n", ["data", "data/x/y"], ["data2", "x/data"]),
        ("/data/\n# no\n\n", ["data/x"], ["no"]),
        ("*.pt", ["a.pt"], ["x/a.pt", "a.pth"]),
        ("**/*.pt", ["a.pt", "x/y/a.pt"], ["a.py"]),
        ("*\n!src\n!a.py", ["x", "y/z"], ["src", "src/x", "a.py"]),
        ("a?[0-9]", ["ab1", "ab1/x"], ["abc"]),
    ],
)
def test_an_ignore_file_leaves_out_what_docker_leaves_out(text: str, ignored: list[str], kept: list[str]) -> None:
    rules = Ignored.of(text)
    assert [path for path in (*ignored, *kept) if rules.holds(path)] == ignored
