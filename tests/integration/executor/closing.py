"""Closes a Ray cluster again and again while calls to it are under way: a program, as Ray may end its process."""

from __future__ import annotations

import asyncio
import json
import sys

from services.executor.adapters.cluster.ray_cluster import RayCluster, connect
from services.executor.ports import AgentConfig, ClusterAway

TURNS = 8
AT_ONCE = 8
LOOKING_S = 0.3


async def close_while_looking(address: str, config: AgentConfig) -> None:
    cluster = connect(lambda: address, config, "nabla")
    await cluster.look({})
    looking = [asyncio.create_task(_look_on(cluster)) for _ in range(AT_ONCE)]
    await asyncio.sleep(LOOKING_S)
    for task in looking:
        task.cancel()
    await cluster.close()


async def _look_on(cluster: RayCluster) -> None:
    while True:
        try:
            await cluster.look({})
        except ClusterAway:
            return


async def main() -> None:
    address, config = sys.argv[1:]
    for _ in range(TURNS):
        await close_while_looking(address, AgentConfig(**json.loads(config)))


if __name__ == "__main__":
    asyncio.run(main())
