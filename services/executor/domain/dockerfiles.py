"""What a Dockerfile builds upon, and which files of its folder it is given: as far as a node must know before it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.executor.domain.images import registry_of

DEFAULT_NAMES = ("Dockerfile", "Containerfile")
MAX_DOCKERFILE_BYTES = 1 << 20
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")
_FROM_OPTION = re.compile(r"--from=(\S+)")
_MOUNT_FROM = re.compile(r"--mount=\S*?\bfrom=([^,\s]+)")


class BadDockerfile(ValueError):
    """It cannot be built; the text says why, for the user to read."""


def images_in(text: str, build_args: Mapping[str, str]) -> tuple[str, ...]:
    """The images that it builds upon or copies from, each once, its own stages and `scratch` left out.

    Raises:
        BadDockerfile.
    """
    known, stages, found, has_from = dict[str, str](), set[str](), list[str](), False
    for word, rest in _instructions(text):
        if word == "ARG" and not has_from:
            name, equals, value = rest.partition("=")
            if name in build_args or equals:
                known[name.strip()] = build_args.get(name.strip(), _expanded(value.strip("\"'"), known))
        elif word == "FROM":
            has_from = True
            words = [each for each in rest.split() if not each.startswith("--")]
            if not words:
                raise BadDockerfile("a FROM names no image")
            found.append(_outside(_expanded(words[0].strip("\"'"), known), stages))
            if len(words) == 3 and words[1].upper() == "AS":
                stages.add(words[2].lower())
        elif word in ("COPY", "ADD", "RUN"):
            sources = (_MOUNT_FROM if word == "RUN" else _FROM_OPTION).findall(rest)
            found.extend(_outside(_expanded(source, known), stages) for source in sources)
    if not has_from:
        raise BadDockerfile("it has no FROM: `FROM scratch` begins with nothing")
    return tuple(dict.fromkeys(filter(None, found)))


def local_name(image: str) -> str:
    """The name under which a build finds this image: one that is pinned by its digest cannot be given as it is."""
    name, _, digest = image.partition("@sha256:")
    if not digest:
        return image
    tagged = ":" in name.rpartition("/")[2]
    return f"{name}{'-' if tagged else ':'}sha256-{digest}"


def credentials_problem(images: Iterable[str]) -> str:
    """Why it is not plain for which of the images credentials are meant, or ""."""
    hosts = sorted({host for image in images if (host := registry_of(image)) and host != "localhost"})
    if len(hosts) == 1:
        return ""
    where = f"images of {', '.join(hosts)}" if hosts else "no image with a registry's host in its name"
    return f"the credentials are for one registry, and the Dockerfile names {where}"


@dataclass(frozen=True, slots=True)
class Ignored:
    """The lines of a .dockerignore; the last that matches counts, and what is below a folder goes with it."""

    rules: tuple[tuple[re.Pattern[str], bool], ...] = ()

    @classmethod
    def of(cls, text: str) -> Ignored:
        lines = [line.strip() for line in text.splitlines()]
        return cls(tuple(_rule(line) for line in lines if line.strip("!/ ") and not line.startswith("#")))

    def holds(self, path: str) -> bool:
        """Is this path, relative and with "/" between its parts, left out?"""
        parts = path.split("/")
        outer = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        ignored = False
        for pattern, keeps in self.rules:
            if any(pattern.fullmatch(each) for each in outer):
                ignored = not keeps
        return ignored


def _rule(line: str) -> tuple[re.Pattern[str], bool]:
    keeps = line.startswith("!")
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", line.lstrip("!").strip().removeprefix("./").strip("/"))
    kinds = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = [piece if piece.startswith("[") else kinds.get(piece) or re.escape(piece) for piece in pieces]
    return re.compile("".join(words)), keeps


def _instructions(text: str) -> Iterable[tuple[str, str]]:
    """(word, what follows) of each instruction, its lines joined."""
    line = ""
    for raw in text.splitlines():
        if raw.lstrip().startswith("#"):
            continue
        line += raw.strip()
        if line.endswith("\\"):
            line = line[:-1] + " "
            continue
        word, _, rest = line.partition(" ")
        if word:
            yield word.upper(), rest.strip()
        line = ""
    if line.strip():
        word, _, rest = line.strip().partition(" ")
        yield word.upper(), rest.strip()


def _expanded(text: str, known: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        return known.get(found[1] or found[3]) or found[2] or ""

    return _VARIABLE.sub(value, text)


def _outside(image: str, stages: Iterable[str]) -> str:
    """The image, or "" when it is one of the Dockerfile's own."""
    if not image:
        raise BadDockerfile("the image of a FROM is an ARG without a value: give it with --build-arg")
    return "" if image == "scratch" or image.lower() in stages or image.isdigit() else image
