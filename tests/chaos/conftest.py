"""A platform of its own for what is killed on purpose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.holding import HeldNats, held_nats
from tests.support.platform import Platform, running_platform


@pytest.fixture(scope="session")
def nats(tmp_path_factory: pytest.TempPathFactory) -> HeldNats:
    return held_nats(tmp_path_factory.mktemp("nats"))


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory, nats: HeldNats) -> Iterator[Platform]:
    home = tmp_path_factory.mktemp("chaos") / "home"
    with running_platform(home, nats_server=str(nats.program)) as platform:
        yield platform
