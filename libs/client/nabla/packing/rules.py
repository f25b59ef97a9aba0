"""What of a folder goes along.

Three kinds of rule, strongest first: never (secrets and what only makes sense on this machine), .nablaignore,
.gitignore. The first cannot be overruled: a key that leaks into a shared object store cannot be called back.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

SECRETS = (
    ".ssh", ".aws", ".gnupg", ".azure", ".kube", ".env*", ".netrc", "_netrc", ".pypirc", ".pgpass",
    ".git-credentials", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
)  # fmt: skip
SLASH = "ps_d"
MACHINE_FOLDERS = frozenset(
    {".venv", "venv", "node_modules", "__pycache__", ".git", ".hg", ".svn", ".nabla"}
    | {".mypy_cache", ".ruff_cache", ".pytest_cache", ".tox", ".nox", ".ipynb_checkpoints"}
)


@lru_cache(maxsize=4096)
def is_secret(name: str) -> bool:
    """By name alone, in any case: Windows and macOS do not tell `.ENV` from `.env`."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in SECRETS)


def is_machine_folder(folder: Path) -> bool:
    """Environments, caches and version control: remade in the job, or of no use there."""
    # os.path, as pathlib raises where a folder is closed to us, which its reader tells better.
    return folder.name in MACHINE_FOLDERS or os.path.isfile(folder / "pyvenv.cfg")


@dataclass(frozen=True)
class Layer:
    """The patterns of one ignore file, which hold for paths that start with `base`."""

    spec: GitIgnoreSpec
    base: str


@dataclass(frozen=True)
class IgnoreFiles:
    """The ignore files in force in one folder: its own and those of the folders above, up to the repository's.

    Paths are relative to the repository's root, or to the packed folder where there is no repository.
    """

    git: tuple[Layer, ...] = ()
    nabla: tuple[Layer, ...] = ()

    def below(self, folder: Path, base: str) -> IgnoreFiles:
        git, nabla = _layer(folder / ".gitignore", base), _layer(folder / ".nablaignore", base)
        return IgnoreFiles(self.git + git, self.nabla + nabla) if git or nabla else self

    def leave_out(self, path: str) -> bool:
        """Whether a path (folders end with a slash) is ignored; .nablaignore may take back what .gitignore says."""
        verdict = _verdict(self.nabla, path)
        return bool(_verdict(self.git, path)) if verdict is None else verdict


def for_folder(root: Path) -> tuple[IgnoreFiles, str]:
    """The ignore files of the folders above `root` within its repository, and root's own path in there."""
    repository = next((parent for parent in (root, *root.parents) if (parent / ".git").exists()), root)
    ignores = IgnoreFiles()
    for parent in reversed(root.parents):
        if parent == repository or repository in parent.parents:
            ignores = ignores.below(parent, _as_base(parent, repository))
    return ignores, _as_base(root, repository)


def _as_base(folder: Path, repository: Path) -> str:
    relative = folder.relative_to(repository).as_posix()
    return "" if relative == "." else f"{relative}/"


def _layer(path: Path, base: str) -> tuple[Layer, ...]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    from pathspec import GitIgnoreSpec

    return (Layer(GitIgnoreSpec.from_lines(lines), base),)


def _verdict(layers: tuple[Layer, ...], path: str) -> bool | None:
    """The innermost file that says anything decides, as in git."""
    for layer in reversed(layers):
        include = _said_of(layer.spec, path[len(layer.base) :])
        if include is not None:
            return include
    return None


def _said_of(spec: GitIgnoreSpec, path: str) -> bool | None:
    """The last pattern that means the path itself decides.

    pathspec's own verdict also weighs patterns that mean a folder above; whoever walks folder by folder has asked
    about those before, and a folder is then no longer taken for what is in it.
    """
    for pattern in reversed(list(spec.patterns)):
        if pattern.include is not None and pattern.regex is not None and _means(pattern.regex, path):
            return pattern.include
    return None


def _means(pattern: re.Pattern[str], path: str) -> bool:
    """Whether it is the path itself: in pathspec's expressions the group is the slash behind what a pattern means."""
    bare = path.rstrip("/")
    found = pattern.search(bare)
    if found and not found.groupdict().get(SLASH):
        return True
    if bare == path:
        return False
    last = len(path) - 1
    tries = (pattern.search(path), pattern.search(path, last))
    return any(found.start(SLASH) == last for found in tries if found and found.groupdict().get(SLASH))
