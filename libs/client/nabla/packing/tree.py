"""Walks a folder: what goes along, and what was left out and why. Only stats; no file is opened."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from nabla.errors import WorkspaceError
from nabla.packing.rules import IgnoreFiles, for_folder, is_machine_folder, is_secret

FILE, PROGRAM, LINK, FOLDER = "100644", "100755", "120000", "040000"


@dataclass(frozen=True)
class Entry:
    """One thing in the tree. `mode` is git's: the only differences that survive between systems."""

    path: str
    mode: str
    size_bytes: int = 0
    mtime_ns: int = 0
    inode: int = 0
    target: str = ""


@dataclass
class Tree:
    """The entries in no particular order, and what was left out, by reason (paths; folders end with a slash)."""

    root: Path
    entries: list[Entry] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)
    machine: list[str] = field(default_factory=list)
    links_outside: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)


def scan(root: Path) -> Tree:
    """Raises WorkspaceError where a folder cannot be read."""
    root = root.resolve()
    ignores, base = for_folder(root)
    tree = Tree(root)
    _walk(tree, root, "", ignores, base)
    return tree


def _walk(tree: Tree, folder: Path, prefix: str, ignores: IgnoreFiles, base: str) -> None:
    before = len(tree.entries)
    ignores = ignores.below(folder, base + prefix)
    for item in _listed(folder):
        path = prefix + item.name
        is_folder = item.is_dir(follow_symlinks=False)
        shown = f"{path}/" if is_folder else path
        if is_secret(item.name):
            tree.secrets.append(shown)
        elif is_folder and is_machine_folder(Path(item.path)):
            tree.machine.append(shown)
        elif ignores.leave_out(base + shown):
            continue
        elif is_folder:
            _walk(tree, Path(item.path), f"{path}/", ignores, base)
        else:
            _add(tree, item, path)
    if prefix and len(tree.entries) == before:
        tree.entries.append(Entry(prefix.rstrip("/"), FOLDER))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except OSError as error:
        raise WorkspaceError(
            f"Cannot read the folder {folder}: {error.strerror}.",
            "Make it readable, or name it in a .nablaignore file in the folder above it.",
        ) from error


def _add(tree: Tree, item: os.DirEntry[str], path: str) -> None:
    if item.is_symlink():
        target = _target_inside(tree.root, Path(item.path))
        if target is None:
            tree.links_outside.append(path)
        else:
            tree.entries.append(Entry(path, LINK, target=target))
        return
    info = item.stat(follow_symlinks=False)
    if not stat.S_ISREG(info.st_mode):
        tree.special.append(path)
        return
    mode = PROGRAM if os.name == "posix" and info.st_mode & 0o100 else FILE
    tree.entries.append(Entry(path, mode, info.st_size, info.st_mtime_ns, info.st_ino))


def _target_inside(root: Path, link: Path) -> str | None:
    """The link's target as written relative to the link, or None when it leads out of the tree.

    A target that is absolute, or goes through a folder above the tree, is rewritten: the tree lies elsewhere in the
    job.
    """
    try:
        target = Path(os.readlink(link))
        resolved = Path(os.path.realpath(link))
    except OSError:
        return None
    if resolved != root and root not in resolved.parents:
        return None
    written = os.path.normpath(os.path.join(os.path.relpath(link.parent, root), target))
    if target.is_absolute() or Path(written).parts[:1] == ("..",):
        target = Path(os.path.relpath(resolved, os.path.realpath(link.parent)))
    return target.as_posix()
