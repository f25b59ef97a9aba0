"""Where packages come from: what the node's own settings say, and nothing that a job says.

pip is asked for its settings, as it merges them from many files; an installer in its sandbox is told them by
variables, shown the files that they name, and let through to the hosts that they name. The installer's own default
index is part of them unless they name another. Whoever writes a password into an index's address shows it to every
build; an index that needs none, or a mirror, does not.
"""

from __future__ import annotations

import ast
import asyncio
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from services.executor.adapters.networks.reach import Place

ASK_S = 60.0
_PASSED_ON = (
    *("index-url", "extra-index-url", "find-links", "constraint", "trusted-host", "no-index", "cert"),
    *("timeout", "default-timeout", "retries", "only-binary", "no-binary", "prefer-binary", "pre"),
)
_WITH_PLACES = ("index-url", "extra-index-url", "find-links", "constraint", "cert")
_FOR_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
}
_OF_UV = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
# The second line: the default index's host and the one of its files, which pip itself knows.
_ASK = """
import sys
from pip._internal.cli.main import main
code = main(["config", "list"])
try:
    from pip._internal.models.index import PyPI
    print(".default-hosts=" + repr(PyPI.netloc + " " + PyPI.file_storage_domain))
except ImportError:
    pass
sys.exit(code)
"""


@dataclass(frozen=True, slots=True)
class PackageIndex:
    """Variables, readable files and places that an installer needs."""

    env: Mapping[str, str]
    files: tuple[Path, ...]
    places: tuple[Place, ...]


async def find_index(python: str, hosts: tuple[str, ...] = ()) -> PackageIndex:
    """Asks the pip of a Python.

    Args:
        hosts: `host` or `host:port` of the settings that belong to the index too, such as the one of its files.
    """
    process = await asyncio.create_subprocess_exec(
        *(python, "-I", "-c", _ASK),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(ASK_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return index_of(parse_settings(output.decode("utf-8", "replace")), os.environ, hosts)


def parse_settings(text: str) -> dict[str, str]:
    """From `pip config list`, whose lines come with the strongest last: global.index-url='...'"""
    settings = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in ("global", "install", ":env:", ""):
            try:
                settings[option] = str(ast.literal_eval(value))
            except (ValueError, SyntaxError):
                continue
    return settings


def index_of(settings: Mapping[str, str], environ: Mapping[str, str], hosts: tuple[str, ...] = ()) -> PackageIndex:
    env = {"PIP_CONFIG_FILE": "/dev/null", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    env |= {f"PIP_{name.upper().replace('-', '_')}": settings[name] for name in _PASSED_ON if name in settings}
    env |= {_FOR_UV[name]: settings[name] for name in _FOR_UV if name in settings}
    if "extra-index-url" in settings:
        env["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # what pip means by several indexes
    env |= {name: environ[name] for name in _OF_UV if name in environ}
    named = [word for name in _WITH_PLACES for word in settings.get(name, "").split()]
    named += [word.rpartition("=")[2] for name in _OF_UV for word in environ.get(name, "").split()]
    places = {Place.of_url(word, trusted=True) for word in named if word.startswith(("http://", "https://"))}
    if "index-url" not in settings and "no-index" not in settings:
        places |= {Place(host, 443, trusted=True) for host in settings.get("default-hosts", "").split()}
    places |= {Place.of_url(f"https://{host}", trusted=True) for host in hosts}
    return PackageIndex(env, tuple(sorted({*_files(named)})), tuple(sorted(places, key=lambda p: (p.host, p.port))))


def _files(named: list[str]) -> Iterator[Path]:
    """An index in a folder refers to files beside it, so the folder above is shown."""
    for word in named:
        if word.startswith("file://"):
            yield Path(unquote(urlsplit(word).path)).parent
        elif word.startswith("/") and os.path.exists(word):
            yield Path(word)
