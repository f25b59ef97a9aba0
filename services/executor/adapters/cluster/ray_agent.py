"""The node agent as a Ray actor: a thin wrapper with an event loop of its own.

The agent must take its node's attempts up again whenever Ray starts it anew, also while nobody calls it: so it
runs in a thread of its own, and the actor's methods only pass calls on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from libs.common.telemetry import set_up_traces
from services.executor.adapters.agent.node_agent import NodeAgent
from services.executor.ports import AgentConfig, AgentView, StartOrder

RETRY_S = 1.0
HEAD_ANSWERS_S = 5.0
NODE_VARIABLES = {
    "NABLA_NODE_DIR": "node_dir",
    "NABLA_NODE_ENVIRONMENT": "default_environment",
    "NABLA_NODE_CLIENT": "client_folder",
    "NABLA_NODE_STORAGE": "storage_root",
}

log = logging.getLogger(__name__)
T = TypeVar("T")


def fingerprint(config: AgentConfig) -> str:
    """Differs when an agent with this configuration would differ."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()


def node_own(config: AgentConfig, environment: Mapping[str, str], node_id: str) -> AgentConfig:
    """The configuration with the paths that this node has of its own, by the variables it was started with.

    Nodes of one installation may share a machine, or have nothing where the executor's machine has it. `{node_id}` in
    a path stands for the node's own id: for nodes that are started from one template and never come back.
    """
    given = {name: environment.get(variable, "") for variable, name in NODE_VARIABLES.items()}
    own: dict[str, Any] = {name: path.replace("{node_id}", node_id[-16:]) for name, path in given.items() if path}
    return replace(config, **own)


class RayNodeAgent:
    """One per node, named, detached, restarted by Ray for ever."""

    def __init__(self, node_id: str, config: AgentConfig) -> None:
        self._fingerprint = fingerprint(config)
        config = node_own(config, os.environ, node_id)
        if config.traces:
            set_up_traces("agent", Path(config.node_dir) / "traces")
        self._agent = NodeAgent(node_id, config, HeadQuestion(_ask_head).answered)
        self._opened = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="node-agent", daemon=True).start()

    async def start(self, order: StartOrder) -> None:
        await self._pass_on(self._agent.start(order))

    async def stop(self, execution_id: str, grace_s: float, reason: str) -> bool:
        return await self._pass_on(self._agent.stop(execution_id, grace_s, reason))

    async def drop(self, execution_id: str) -> None:
        await self._pass_on(self._agent.drop(execution_id))

    async def held_order(self, execution_id: str) -> StartOrder | None:
        return await self._pass_on(self._agent.held_order(execution_id))

    async def look(self, believed: Mapping[str, str]) -> tuple[str, AgentView]:
        """The fingerprint of its configuration, and what it has to say."""
        return self._fingerprint, await self._pass_on(self._agent.look(believed))

    async def leave(self) -> None:
        """Closes before the actor is replaced, so that the next agent finds the folder free."""
        await self._pass_on(self._agent.close())

    async def _pass_on(self, call: Coroutine[Any, Any, T]) -> T:
        if not self._opened.is_set():
            await asyncio.to_thread(self._opened.wait)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._loop))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.create_task(self._open())
        self._loop.run_forever()

    async def _open(self) -> None:
        while not self._opened.is_set():
            try:
                await self._agent.open()
                self._opened.set()
            except Exception:
                log.exception("the node folder cannot be taken over; trying again")
                await asyncio.sleep(RETRY_S)


class HeadQuestion:
    """Whether the cluster's head answers this node. One thread asks: while its call hangs, none is begun beside it.

    Args:
        ask: blocks, for as long as the head likes.
        within_s: an answer that takes longer is none.
    """

    def __init__(self, ask: Callable[[], object], within_s: float = HEAD_ANSWERS_S) -> None:
        self._ask = ask
        self._within_s = within_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="head-question")
        self._call: Future[object] | None = None

    async def answered(self) -> bool:
        if self._call is None or self._call.done():
            self._call = self._thread.submit(self._ask)
        try:
            async with asyncio.timeout(self._within_s):
                return bool(await asyncio.wrap_future(self._call))
        except Exception:
            return False


def _ask_head() -> object:
    import ray

    untyped: Any = ray
    return untyped.nodes()
