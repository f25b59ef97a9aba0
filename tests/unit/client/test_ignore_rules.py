"""What .gitignore files leave out here is what git itself leaves out."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nabla.packing.tree import scan

pytestmark = [pytest.mark.unit, pytest.mark.skipif(not shutil.which("git"), reason="git is not installed here")]

NAMES = ("a", "b", "ab", "a.txt", "b.log", "x y")
FOLDERS = ("", "a", "d", "d/e", "d/a")
PIECES = ("a", "b", "*", "?", "*.txt", "a*", "d", "e", "**", "[ab]", "x\\ y", "ab", "!a", "\\!a", "#c", "b.log")
rules = st.builds(
    lambda negated, anchored, pieces, only_folders: (
        ("!" if negated else "") + ("/" if anchored else "") + "/".join(pieces) + ("/" if only_folders else "")
    ),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=3),
    st.booleans(),
    # pathspec takes `a/**/` for `a/`, which means a itself too.
).filter(lambda rule: not rule.endswith("/**/"))
files = st.dictionaries(st.sampled_from(FOLDERS), st.lists(rules, max_size=4), max_size=3)
trees = st.sets(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES)), min_size=1, max_size=8)


def kept_by_git(root: Path) -> set[str]:
    command = ["git", "-c", "core.excludesFile=/dev/null", "ls-files", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    return {name for name in done.stdout.decode().split("\0") if name}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=trees, ignores=files)
def test_ignore_files_mean_what_git_takes_them_for(tree: set[tuple[str, str]], ignores: dict[str, list[str]]) -> None:
    with tempfile.TemporaryDirectory(prefix="nabla-ignore-") as folder:
        root = Path(folder).resolve()
        subprocess.run(["git", "init", "-q", "--template=", str(root)], check=True)
        for place, name in tree:
            path = root / place / name
            if path.is_dir() or any(parent.is_file() for parent in path.parents):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        for place, lines in ignores.items():
            if (root / place).is_dir():
                (root / place / ".gitignore").write_text("\n".join(lines) + "\n")
        ours = {entry.path for entry in scan(root).entries if entry.mode != "040000"}
        assert ours == kept_by_git(root)
