"""Fetches a git repository at one commit and packs it, in a sandbox: git reads what a stranger's server sends.

One commit, no history, and of the repository itself nothing: the workspace has the files of the commit and no `.git`,
so no credential can be left in one. Submodules and files of git LFS are not fetched; the log says so where there are
any. User and password reach git through a helper that reads private files; they are in no command line, no URL, no
record and no configuration.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from libs.common.contracts.messages import Source
from services.executor.adapters.environments.building import size_of
from services.executor.adapters.environments.toolbox import Tell, Tool, Toolbox, ToolFailed, ToolStopped
from services.executor.adapters.networks.reach import Place
from services.executor.adapters.workspaces.transfer import remove_tree
from services.executor.domain.beginnings import sounds_passing
from services.executor.domain.sources import BadSource, checked_ref, checked_repository, commit_of, is_commit

LIST_LIMIT_S = 60.0
FETCH_LIMIT_S = 1800.0
PACKED = "workspace.tar.gz"
NAMED = 5
_SUBMODULE, _LFS = "nabla-submodule ", "nabla-lfs "
_ASKPASS = """#!/bin/sh
case "$1" in
Username*) exec cat "$TOOL_FILES/user" ;;
*) exec cat "$TOOL_FILES/password" ;;
esac
"""
# Attributes in info/ are stronger than those of the tree: what the tree says of export would leave files out.
_FETCH = r"""
cd "$1"
git init -q --bare --template= repository
cd repository
mkdir -p info
echo '* -export-ignore -export-subst -ident -filter' > info/attributes
git fetch --progress --depth 1 --no-tags --no-recurse-submodules --no-auto-gc -- "$2" "$3"
git cat-file -e "$3^{commit}"
git ls-tree -r --full-tree "$3" | sed -n 's/^160000 commit [0-9a-f]*\t/nabla-submodule /p'
git grep -l 'filter=lfs' "$3" -- '.gitattributes' '*/.gitattributes' | sed 's/^[^:]*:/nabla-lfs /' || true
git -c tar.tar.gz.command='gzip -1cn' archive --format=tar.gz -o "../$4" "$3"
"""
_NOT_THERE = ("not our ref", "couldn't find remote ref", "no such remote ref", "bad object", "Not a valid object")
_NOT_ALLOWED = ("Authentication failed", "could not read Username", "HTTP Basic: Access denied", "error: 401")


class GitSource:
    """Fetches for a node.

    Args:
        hosts: of the settings, `host` or `host:port`: may have a private address, and http is enough.
        limit_bytes: the most that a fetch may take on the disk.
    """

    def __init__(self, toolbox: Toolbox, folder: Path, hosts: Collection[str], limit_bytes: int) -> None:
        self._toolbox = toolbox
        self._folder = folder
        self._hosts = hosts
        self._limit_bytes = limit_bytes

    async def find_commit(self, source: Source) -> str:
        """The commit that the ref means now; a whole commit is taken at its word.

        Raises:
            BadSource.
        """
        url, ref = checked_repository(source.url, self._hosts), checked_ref(source.ref)
        if is_commit(ref):
            return ref
        names = [ref] if ref.startswith("refs/") else [f"refs/tags/{ref}", f"refs/heads/{ref}"]
        peeled = [name for each in names for name in (each, f"{each}^{{}}")]
        command = ["git", "ls-remote", "--quiet", "--", url, *(peeled if ref else ["HEAD"])]
        listing: list[str] = []
        try:
            await self._toolbox.run(self._tool(source, url, command, limit_s=LIST_LIMIT_S), listing.append)
        except (ToolFailed, ToolStopped) as error:
            raise _told(url, ref, str(error)) from error
        commit = commit_of("\n".join(listing), ref)
        if not commit:
            raise BadSource(f"there is no {ref or 'commit'} in {url}")
        return commit

    async def fetch(self, source: Source, commit: str, target: Path, tell: Tell) -> None:
        """Packs the commit's files into `target`. Raises BadSource, OSError."""
        url = checked_repository(source.url, self._hosts)
        folder = await asyncio.to_thread(self._make_folder)
        command = ["/bin/sh", "-ec", _FETCH, "sh", str(folder), url, commit, PACKED]
        said: list[str] = []

        def hear(line: str) -> None:
            if line.startswith((_SUBMODULE, _LFS)):
                said.append(line)
            else:
                tell(line)

        try:
            check = self._over_limit(folder)
            tool = self._tool(source, url, command, limit_s=FETCH_LIMIT_S, writable=(folder,), check=check)
            await self._toolbox.run(tool, hear)
            if reason := await asyncio.to_thread(check):
                raise BadSource(reason)
            await asyncio.to_thread(_take, folder / PACKED, target)
        except (ToolFailed, ToolStopped) as error:
            raise _told(url, commit, str(error)) from error
        finally:
            await asyncio.to_thread(remove_tree, folder)
        for line in _left_out(said):
            tell(line)

    def _tool(
        self,
        source: Source,
        url: str,
        command: Sequence[str],
        *,
        limit_s: float,
        writable: tuple[Path, ...] = (),
        check: Callable[[], str] = lambda: "",
    ) -> Tool:
        place = Place.of_url(url)
        trusted = place.host in self._hosts or f"{place.host}:{place.port}" in self._hosts
        files = {"askpass.sh": _ASKPASS, "user": source.username or "git", "password": source.password}
        known = source.username or source.password
        env = {
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ALLOW_PROTOCOL": "https:http" if trusted else "https",
            "GIT_HTTP_LOW_SPEED_LIMIT": "1000",
            "GIT_HTTP_LOW_SPEED_TIME": "60",
            "GIT_LFS_SKIP_SMUDGE": "1",
        }
        authorities = os.environ.get("SSL_CERT_FILE", "")
        if authorities:
            env["GIT_SSL_CAINFO"] = authorities
        # A shell finds the helper: where a tool's files are is known only in there.
        start = ["/bin/sh", "-ec", 'GIT_ASKPASS="$TOOL_FILES/askpass.sh" exec "$@"', "sh"] if known else []
        return Tool(
            command=[*start, *command],
            env=env,
            files=files if known else {},
            writable=writable,
            readable=(Path(authorities),) if authorities else (),
            places=(Place(place.host, place.port, trusted),),
            limit_s=limit_s,
            check=check,
        )

    def _make_folder(self) -> Path:
        self._folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="git-", dir=self._folder))

    def _over_limit(self, folder: Path) -> Callable[[], str]:
        def check() -> str:
            taken = size_of(folder)
            limit = self._limit_bytes
            return f"the repository takes more than {limit} bytes, the most for a workspace" if taken > limit else ""

        return check


def _take(packed: Path, target: Path) -> None:
    """What the tool made, if it is a file; a link would be one to a file of the node."""
    descriptor = os.open(packed, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as source, target.open("xb") as out:
        while chunk := source.read(1 << 20):
            out.write(chunk)


def _left_out(said: Sequence[str]) -> list[str]:
    lines = []
    for mark, what in ((_SUBMODULE, "submodules are not fetched"), (_LFS, "files of git LFS stay pointers; see")):
        names = [line.removeprefix(mark) for line in said if line.startswith(mark)]
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"{what}: {', '.join(names[:NAMED])}{more}")
    return lines


def _told(url: str, ref: str, said: str) -> BadSource:
    if any(text in said for text in _NOT_THERE):
        return BadSource(f"there is no {ref} in {url}, or its server does not give it away by its number")
    if any(text in said for text in _NOT_ALLOWED):
        return BadSource(f"{url} wants a user and password (or token), or refuses those that it was given")
    return BadSource(f"{url} cannot be fetched: {said}", may_pass=sounds_passing(said))
