"""What to install, from the files in which people write it down, in one normal form.

requirements.txt, pyproject.toml, uv.lock and pylock.toml all become lines `name[extra]<versions> ; marker --hash=...`,
sorted, so that two spellings of the same wish are one environment. A line names a package of the platform's index
and nothing else: options, paths, URLs and variables would read the node's own files, or fetch code from places that
the platform did not choose. What lies in the workspace needs no installation: the job starts in it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from packaging.markers import InvalidMarker, Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from libs.common.errors import NablaError

MAX_TEXT_BYTES = 16 << 20
MAX_LINES = 20_000
MAX_INCLUDED = 20
_HASH = re.compile(r"\s+--hash[= ]([a-z0-9]+:[0-9a-fA-F]+)")
_INCLUDE = re.compile(r"(-r|--requirement|-c|--constraint)(?:\s+|=)(\S.*)")
_WITH_EXTRAS = re.compile(r"(.+?)\[([A-Za-z0-9._, -]+)\]")
# Of a package that a lock found in a folder beside it: the workspace has its code already.
_LOCAL = ("virtual", "editable", "directory")

Read = Callable[[str], str]


class BadRequirements(NablaError):
    """No environment can be made of this; the text says why, for the user to read."""


@dataclass(frozen=True, slots=True)
class Packages:
    """Normal lines, sorted; constraints hold for what is installed because of them."""

    lines: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()


def split_extras(path: str) -> tuple[str, tuple[str, ...]]:
    """`pyproject.toml[train,dev]` is the file and the names of its extras or groups."""
    found = _WITH_EXTRAS.fullmatch(path)
    if not found:
        return path, ()
    return found[1], tuple(sorted(canonicalize_name(name.strip()) for name in found[2].split(",") if name.strip()))


def python_wanted(path: str, text: str) -> str:
    """The versions of Python that the file says it is for, such as `>=3.10`; empty when it says nothing."""
    name = PurePosixPath(path).name
    if not name.endswith((".toml", ".lock")):
        return ""
    content = _toml(name, text)
    project = content.get("project")
    said = project.get("requires-python") if isinstance(project, dict) else content.get("requires-python")
    return said if isinstance(said, str) else ""


def packages_of(path: str, text: str, markers: Mapping[str, str], read: Read) -> Packages:
    """What the file asks for.

    Args:
        path: as the user wrote it, with extras in brackets; the file's name tells the format.
        markers: the environment that markers of a lock are decided for; see PEP 508.
        read: the text of another file of the workspace, by its path; for `-r` and `-c`.

    Raises:
        BadRequirements; what `read` raises.
    """
    path, extras = split_extras(path)
    name = PurePosixPath(path).name
    if name == "uv.lock":
        return Packages(_sorted(_of_uv_lock(_toml(name, text), extras, markers)))
    if name.startswith("pylock.") and name.endswith(".toml"):
        return Packages(_sorted(_of_pylock(_toml(name, text), extras, markers)))
    if name.endswith(".toml"):
        return Packages(_sorted(_of_pyproject(_toml(name, text), extras)))
    if extras:
        raise BadRequirements(f"{name} is a plain list and has no extras to choose from")
    return _of_list(path, text, read)


def _sorted(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(lines)))


def _toml(name: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadRequirements(f"{name} cannot be read: {error}") from error


# ---- a list


def _of_list(path: str, text: str, read: Read) -> Packages:
    found: dict[str, list[str]] = {"r": [], "c": []}
    waiting, seen = [(path, text, "r")], {path}
    while waiting:
        where, content, kind = waiting.pop()
        for line in _logical_lines(content):
            included = _INCLUDE.fullmatch(line)
            if not included:
                found[kind] += _line(line)
                continue
            other = str(PurePosixPath(where).parent / included[2].strip())
            if other not in seen:
                seen.add(other)
                if len(seen) > MAX_INCLUDED:
                    raise BadRequirements(f"more than {MAX_INCLUDED} files of requirements include each other")
                waiting.append((other, read(other), "c" if included[1].lstrip("-").startswith("c") else kind))
    if len(found["r"]) + len(found["c"]) > MAX_LINES:
        raise BadRequirements(f"there are more than {MAX_LINES} requirements")
    return Packages(_sorted(found["r"]), _sorted(found["c"]))


def _logical_lines(text: str) -> Iterator[str]:
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        content = re.sub(r"(^|\s)#.*", "", line).strip()
        if content:
            yield content


def _line(line: str) -> list[str]:
    if line == "--require-hashes":  # one line with a hash asks for it as well
        return []
    hashes = _HASH.findall(" " + line)
    wish = _HASH.sub("", " " + line).strip()
    # Installers replace ${NAME} by what their environment holds, and say so when they fail.
    if wish.startswith("-") or " --" in wish or "$" in wish:
        raise BadRequirements(f"the requirement {line[:80]!r} is not a package's name and version; {_CHOSEN}")
    return [_with_hashes(_normal(wish), hashes)]


_CHOSEN = "packages come from the index that the platform is set up with"


def _normal(wish: str) -> str:
    try:
        requirement = Requirement(wish)
    except InvalidRequirement:
        raise BadRequirements(f"the requirement {wish[:80]!r} is not a package's name and version; {_CHOSEN}") from None
    if requirement.url:
        raise BadRequirements(
            f"the requirement {wish[:80]!r} names a place of its own; {_CHOSEN}: name a version instead, "
            "or put the package's folder into the workspace"
        )
    requirement.name = canonicalize_name(requirement.name)
    return str(requirement)


def _with_hashes(line: str, hashes: Iterable[str]) -> str:
    return " ".join([line, *(f"--hash={value}" for value in sorted({value.lower() for value in hashes}))])


# ---- pyproject.toml


def _of_pyproject(content: Mapping[str, Any], extras: Sequence[str]) -> Iterator[str]:
    project = content.get("project")
    if not isinstance(project, dict):
        raise BadRequirements(
            "pyproject.toml has no [project] table; export what its own tool locks into a requirements.txt"
        )
    if "dependencies" in project.get("dynamic", ()):
        raise BadRequirements("the dependencies in pyproject.toml are dynamic; write them into a requirements.txt")
    own = canonicalize_name(str(project.get("name", "")))
    optional = {canonicalize_name(name): lines for name, lines in _table(project, "optional-dependencies").items()}
    groups = {canonicalize_name(name): lines for name, lines in _table(content, "dependency-groups").items()}
    waiting: list[Any] = [*project.get("dependencies", ()), *({"include-group": name} for name in extras)]
    seen: set[str] = set()
    while waiting:
        wish = waiting.pop()
        if isinstance(wish, dict):
            wish_name = canonicalize_name(str(wish.get("include-group", "")))
            _check_extras("pyproject.toml", [wish_name], {*optional, *groups})
            if wish_name not in seen:
                seen.add(wish_name)
                waiting += [*optional.get(wish_name, ()), *groups.get(wish_name, ())]
            continue
        line = _normal(str(wish))
        requirement = Requirement(line)
        if own and requirement.name == own:  # `project[all]` among its own extras
            waiting += [{"include-group": name} for name in requirement.extras]
        else:
            yield line


def _table(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


# ---- locks


def _of_uv_lock(content: Mapping[str, Any], extras: Sequence[str], markers: Mapping[str, str]) -> Iterator[str]:
    packages = [package for package in content.get("package", ()) if isinstance(package, dict)]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for package in packages:
        by_name.setdefault(str(package.get("name")), []).append(package)
    roots = [
        package for package in packages if _source(package).get("virtual", _source(package).get("editable")) == "."
    ]
    if not roots:
        raise BadRequirements("uv.lock locks no project in its own folder")
    known = {*_table(roots[0], "optional-dependencies"), *_table(roots[0], "dev-dependencies")}
    for name in extras:
        if name not in known:
            raise BadRequirements(
                f"uv.lock has no extra or group {name!r}; it has {', '.join(sorted(known)) or 'none'}"
            )
    waiting = [(roots[0], extra) for extra in ("", *extras)]
    seen: set[tuple[str, str, str]] = set()
    while waiting:
        package, extra = waiting.pop()
        place = (str(package.get("name")), str(package.get("version")), extra)
        if place in seen:
            continue
        seen.add(place)
        if not extra and not any(kind in _source(package) for kind in _LOCAL):
            yield _locked(package, "registry" in _source(package), _files_of_uv(package))
        for edge in _edges(package, extra):
            if _holds(edge.get("marker"), markers):
                target = _target(by_name, edge)
                waiting += [(target, name) for name in ("", *edge.get("extra", ()))]


def _edges(package: Mapping[str, Any], extra: str) -> list[dict[str, Any]]:
    if not extra:
        return list(package.get("dependencies", ()))
    return [
        *_table(package, "optional-dependencies").get(extra, ()),
        *_table(package, "dev-dependencies").get(extra, ()),
    ]


def _target(by_name: Mapping[str, list[dict[str, Any]]], edge: Mapping[str, Any]) -> dict[str, Any]:
    found = by_name.get(str(edge.get("name")), [])
    fitting = [one for one in found if edge.get("version") in (None, one.get("version"))]
    if not fitting:
        raise BadRequirements(f"uv.lock needs {edge.get('name')!r} and does not lock it")
    return fitting[0]


def _source(package: Mapping[str, Any]) -> dict[str, Any]:
    return _table(package, "source")


def _files_of_uv(package: Mapping[str, Any]) -> list[str]:
    files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
    return [str(file["hash"]) for file in files if "hash" in file]


def _of_pylock(content: Mapping[str, Any], extras: Sequence[str], markers: Mapping[str, str]) -> Iterator[str]:
    known = {*map(canonicalize_name, [*content.get("extras", ()), *content.get("dependency-groups", ())])}
    for name in extras:
        if name not in known:
            raise BadRequirements(
                f"the lock has no extra or group {name!r}; it has {', '.join(sorted(known)) or 'none'}"
            )
    groups = {*extras, *content.get("default-groups", ())}
    for package in content.get("packages", ()):
        if not _holds(package.get("marker"), {**markers, "extras": {*extras}, "dependency_groups": groups}):
            continue
        if "directory" in package:
            continue
        files = [*package.get("wheels", ()), *([package["sdist"]] if "sdist" in package else [])]
        hashes = [f"{name}:{value}" for file in files for name, value in _table(file, "hashes").items()]
        yield _locked(package, not {"vcs", "archive"} & {*package}, hashes)


def _locked(package: Mapping[str, Any], of_index: bool, hashes: Iterable[str]) -> str:
    name, version = str(package.get("name", "")), str(package.get("version", ""))
    if not of_index or not version:
        raise BadRequirements(f"the lock takes {name!r} from a place of its own; {_CHOSEN}")
    well_formed = [value for value in hashes if _HASH.fullmatch(f" --hash={value}")]
    return _with_hashes(_normal(f"{name}=={version}"), well_formed)


def _check_extras(what: str, extras: Iterable[str], known: Collection[str]) -> None:
    for name in extras:
        if name not in known:
            raise BadRequirements(f"{what} has no extra or group {name!r}; it has {', '.join(sorted(known)) or 'none'}")


def _holds(marker: object, environment: Mapping[str, Any]) -> bool:
    if not marker:
        return True
    try:
        return Marker(str(marker)).evaluate(dict(environment), context="lock_file")
    except (InvalidMarker, ValueError, KeyError) as error:
        raise BadRequirements(f"the marker {str(marker)[:80]!r} of the lock cannot be decided: {error}") from error
