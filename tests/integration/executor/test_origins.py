"""A job from a repository, in an environment that its files ask for, and the same once more from what was recorded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from libs.common.contracts.messages import Environment, JobTemplate, Source
from services.executor.ports import AgentConfig
from services.scheduler.domain.origins import exact
from tests.integration.executor.test_node_agent import config, ended, order, running, texts
from tests.integration.executor.tools import GIT_BACKEND, git_host, make_wheel, package_index, why_no_walls
from tests.integration.executor.world import Neighbours

__all__ = ["config"]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(why_no_walls()), reason=why_no_walls() or "walls"),
    pytest.mark.skipif(not GIT_BACKEND.exists(), reason="git is not installed here: apt-get install git"),
]


async def test_a_job_runs_again_exactly_as_it_ran(
    config: AgentConfig, neighbours: Neighbours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    make_wheel(packages, "alpha", "1.0", {"alpha.py": "version = 1"})
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    template = JobTemplate(
        command=("python -c 'import alpha, code_here; print(alpha.version, code_here.version)'",),
        source=Source(kind="git", ref="main"),
        environment=Environment(kind="workspace", path="requirements.txt"),
    )
    with git_host(tmp_path / "host") as host, package_index(packages) as (port, _):
        (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = http://127.0.0.1:{port}/simple\n")
        commit = host.commit({"code_here.py": "version = 1", "requirements.txt": "alpha\n"})
        template = template.model_copy(update={"source": template.source.model_copy(update={"url": host.url})})
        async with running(replace(config, source_hosts=(host.place,), installer="pip")) as agent:
            first = replace(order(), template=template)
            await agent.start(first)
            end = await ended(agent, first.attempt_id)
            log = [line.text for line in await neighbours.log(first.job_id) if line.stream == "nabla"]
            assert (end.reason, end.exit_code) == ("exited", 0), log
            assert end.origin["commit"] == commit
            assert f"workspace: {host.url} at {commit}" in log
            assert any(line.startswith("environment: 1 requirements (Python 3.") for line in log)
            assert await texts(neighbours, first) == ["1 1"]

            host.commit({"code_here.py": "version = 2"})
            make_wheel(packages, "alpha", "2.0", {"alpha.py": "version = 2"})
            later = replace(order(), template=exact(template, end.origin))
            await agent.start(later)
            assert (await ended(agent, later.attempt_id)).exit_code == 0
            assert await texts(neighbours, later) == ["1 1"]

            newest = replace(order(), template=template)
            await agent.start(newest)
            assert (await ended(agent, newest.attempt_id)).origin["environment"] == end.origin["environment"]
            assert await texts(neighbours, newest) == ["1 2"]
    assert list((Path(config.node_dir) / "tools" / "attempts").iterdir()) == []
