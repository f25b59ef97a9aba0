"""Which worker runs which tests: a file stays in one, and so do the files of a folder that share one platform."""

from __future__ import annotations

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling

ONE_PLATFORM = frozenset({"tests/e2e", "tests/chaos"})


class PlatformScheduling(LoadScopeScheduling):
    """Sends each group to one worker, in the order of collection: what takes longest is to be collected first.

    Not by xdist's own marks for groups: pytest 9.2 drops them without a word, and every worker then starts the
    platform for itself.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    """The folder whose platform the test shares, else its file."""
    file = nodeid.split("::", 1)[0]
    folder = str(PurePosixPath(file).parent)
    return folder if folder in ONE_PLATFORM else file
