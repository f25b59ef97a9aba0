"""Takes an installation off a Ray cluster that others run: its node agents, and what its attempts had reserved.

`nabla down` runs it: `python -m services.executor.adapters.cluster.ray_departure HOST:PORT NAMESPACE`. An embedded Ray
needs none of it, as it ends with everything on it.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from libs.common.ids import is_id
from services.executor.adapters.cluster.loopback import keep_loopback
from services.executor.adapters.cluster.ray_nodes import AGENT_PREFIX

LEAVE_S = 5.0


def depart(address: str, namespace: str) -> tuple[int, int]:
    """How many agents and how many reservations were there, and are no more."""
    import ray

    keep_loopback()
    ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
    try:
        return _end_agents(), _release_all()
    finally:
        ray.shutdown()


def _end_agents() -> int:
    import ray

    names = [name for name in ray.util.list_named_actors() if name.startswith(AGENT_PREFIX)]
    for name in names:
        # A dead node's agent has no process to leave with.
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            agent: Any = ray.get_actor(name)
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(agent.leave.remote(), timeout=LEAVE_S)
            ray.kill(agent, no_restart=True)
    return len(names)


def _release_all() -> int:
    from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

    groups = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
    released = 0
    for name in groups:
        # Those of other installations are listed too, and have no name in our namespace.
        if is_id("attempt", name or ""):
            with contextlib.suppress(ValueError):
                remove_placement_group(get_placement_group(name))
                released += 1
    return released


def main() -> int:
    agents, reservations = depart(*sys.argv[1:3])
    print(f"{agents} agents and {reservations} reservations were taken off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
