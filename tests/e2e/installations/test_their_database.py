"""A PostgreSQL that others run and that cannot be used: said before any service starts, with what to do."""

from __future__ import annotations

import subprocess

import pytest

from infra.local.databases import DATABASES, meet_all
from infra.local.installation import InstallationError
from tests.support.databases import postgres_binaries
from tests.support.ports import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.postgres]


async def test_a_server_that_does_not_answer_is_named_without_its_password() -> None:
    url = f"postgresql://nabla:hidden@127.0.0.1:{free_port()}/{{service}}"
    with pytest.raises(InstallationError, match="cannot be used") as refused:
        await meet_all(url, patience_s=0)
    assert "hidden" not in str(refused.value)
    assert "Start it" in str(refused.value)


async def test_a_missing_database_is_named_with_the_command_that_makes_it(postgres_url: str) -> None:
    binaries = postgres_binaries()
    assert binaries
    port = postgres_url.rsplit(":", 1)[1]
    for name in DATABASES[1:]:
        create = [str(binaries / "createdb"), "-h", "127.0.0.1", "-p", port, "-U", "nabla", f"some_{name}"]
        subprocess.run(create, check=True, timeout=60)
    with pytest.raises(InstallationError, match="`createdb some_registry`"):
        await meet_all(postgres_url + "/some_{service}")
    subprocess.run([*create[:-1], f"some_{DATABASES[0]}"], check=True, timeout=60)
    await meet_all(postgres_url + "/some_{service}")
