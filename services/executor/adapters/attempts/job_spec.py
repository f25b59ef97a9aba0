"""From an order to what the shim is told: command, environment, mounts, limits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from libs.common import secret_refs
from services.executor.adapters.agent.gpus import Gpus
from services.executor.adapters.attempts.attempt_folder import AttemptSpec, Bind, FrontDoor, Isolation
from services.executor.adapters.runtimes.cdi import LIBRARIES_INSIDE, PROGRAMS_INSIDE
from services.executor.adapters.runtimes.images import Walls
from services.executor.adapters.runtimes.isolation import closed_to
from services.executor.adapters.runtimes.job_view import SYSTEM_PATH
from services.executor.domain.gang import first_free_port
from services.executor.domain.gang_environment import (
    GENERATED,
    gang_command,
    gang_variables,
    generated_files,
    peer_addresses,
)
from services.executor.domain.network import HOST, NONE, Gang, MalformedNetwork, Network, checked_policy, refusal
from services.executor.ports import GangOrder, StartOrder

# Where the in-job `nabla` package is inside a sandbox.
SDK_INSIDE = "/opt/nabla"
STOP_GRACE_S = 15.0
# For the ranks of a gang on one node, in their own network: no machine and no sandbox has it.
ALONE = "100.127.255.254"
ALONE_IN_THE_WORLD = {"NABLA_RANK": "0", "NABLA_WORLD_SIZE": "1", "NABLA_LOCAL_RANK": "0"}


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What an attempt has to know of its node."""

    node_id: str
    hostname: str
    node_dir: Path
    storage_root: Path
    client_folder: Path
    front_door: str
    isolation: Isolation
    isolation_detail: str
    bwrap_path: str
    contact_file: Path
    fence_s: float
    log_limit_bytes: int
    disk_reserve_bytes: int
    network: Network  # of a job that asks for none
    gpus: Gpus = field(default_factory=Gpus)


def spec_for(
    order: StartOrder, environment_prefix: str | None, node: NodeFacts, walls: Walls | None = None
) -> AttemptSpec:
    """Makes the team's storage folder on the way, and nothing else outside of the attempt's own.

    Args:
        environment_prefix: None for an image, which brings its own.
        walls: what the job runs in, when that is an image.

    Raises:
        MalformedNetwork: the job's network cannot be kept here; the text says why, for the user to read.
    """
    isolation: Isolation = walls.isolation if walls else node.isolation
    walled = isolation != "process"
    template = order.template
    uid = job_uid(order.team_uid, environment_prefix, node)
    host, port = door_of(node.front_door)
    env, secret_env = secret_refs.variables(job_variables(order, node, walled=walled))
    driver = list(walls.driver) if walls else []
    env |= _driver_variables(env) if driver else {}
    network = network_of(order, node)
    sdk = Bind(str(node.client_folder / "nabla"), f"{SDK_INSIDE}/nabla")
    return AttemptSpec(
        attempt_id=order.execution_id,
        job_id=order.job_id,
        command=command_of(order),
        env=env,
        secret_env=secret_env,
        cpu_count=template.resources.cpu_count or 1.0,
        memory_bytes=template.resources.memory_bytes or None,
        gpu_indices=sorted(order.gpu_indices),
        gpu_devices=node.gpus.devices_of(order.gpu_indices),
        isolation=isolation,
        image=walls.image if walls else None,
        run_as_uid=uid,
        timeout_s=template.timeout_s or None,
        stop_grace_s=STOP_GRACE_S,
        binds_ro=[sdk, *_generated(order, node), *driver] if walled else [],
        binds_rw=[Bind(str(storage_of(order.team_id, node.storage_root, uid)), "/storage")],
        environment_prefix=environment_prefix,
        front_door=[FrontDoor(port, host, port)] if walled and network.policy != NONE else [],
        expose_ports=list(template.ports),
        log_limit_bytes=node.log_limit_bytes,
        disk_reserve_bytes=node.disk_reserve_bytes,
        node_contact_file=str(node.contact_file),
        node_fence_s=node.fence_s,
        bwrap_path=node.bwrap_path,
        network=network,
    )


def _driver_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The user's own paths come first; the driver's programs last, as an image may bring what they are called."""
    libraries = ":".join(filter(None, (env.get("LD_LIBRARY_PATH"), LIBRARIES_INSIDE)))
    return {"LD_LIBRARY_PATH": libraries, "PATH": f"{env.get('PATH', SYSTEM_PATH)}:{PROGRAMS_INSIDE}"}


def command_of(order: StartOrder) -> list[str] | str:
    """What to run; one word alone is a line for the shell."""
    if order.gang:
        return gang_command(order.gang, order.template)
    words = list(order.template.command)
    return words[0] if len(words) == 1 else words


def generate_files(order: StartOrder, node: NodeFacts) -> None:
    """Writes what the platform makes for the job, where `_generated` shows it from."""
    if order.gang is None:
        return
    folder = generated_folder(order, node)
    for name, content in generated_files(order.gang, order.attempt_id).items():
        folder.mkdir(mode=0o755, exist_ok=True)
        path = folder / name
        path.write_text(content)
        path.chmod(0o755)


def _generated(order: StartOrder, node: NodeFacts) -> list[Bind]:
    folder = generated_folder(order, node)
    return [Bind(str(folder), GENERATED)] if folder.exists() else []


def generated_folder(order: StartOrder, node: NodeFacts) -> Path:
    return node.node_dir / "attempts" / order.execution_id / "generated"


def network_of(order: StartOrder, node: NodeFacts) -> Network:
    """The node's, with the policy that the job asks for, and what the ranks of a gang share.

    Raises:
        MalformedNetwork: the text says why it cannot be, for the user to read.
    """
    wanted, gang = order.template.network, order.gang
    nodes = {peer.node_rank for peer in gang.peers} if gang else ()
    why_not = refusal(wanted, node.network.reach, max(1, len(nodes)))
    if why_not:
        raise MalformedNetwork(why_not)
    network = replace(node.network, policy=checked_policy(wanted)) if wanted else node.network
    return replace(network, gang=_shared(order.attempt_id, gang)) if gang else network


def _shared(attempt_id: str, gang: GangOrder) -> Gang:
    """What the gang's ranks on this node share. On one node alone they need an address that is no machine's."""
    alone = ip_address(gang.me.address).is_loopback
    return Gang(
        name=attempt_id,
        node_address=ALONE if alone else gang.me.address,
        peer_addresses=peer_addresses(gang),
        first_port=gang.first_port,
        last_port=gang.last_port,
        first_free_port=first_free_port(gang),
    )


def told_network(network: Network) -> str:
    """How far the job reaches, for its log."""
    if network.reach == HOST:
        return "this machine's own"
    return f"{network.policy}, by a proxy (HTTP alone)" if network.needs_proxy else network.policy


def job_uid(team_uid: int, environment_prefix: str | None, node: NodeFacts) -> int | None:
    """As whom the job runs: the team's user where the platform is root, else whoever the platform is (None).

    Without walls there is no way around a closed folder. What the team's user cannot reach, root then runs itself:
    the class is for one person's own machine, who is root there.
    """
    if os.geteuid() != 0:
        return None
    if environment_prefix is None:
        return team_uid
    needed = (node.node_dir / "attempts", node.storage_root, node.client_folder, Path(environment_prefix, "bin/python"))
    return 0 if node.isolation == "process" and closed_to(team_uid, needed) else team_uid


def told_isolation(uid: int | None, node: NodeFacts) -> str:
    """The class, for the job's log; when it is the weaker one, with why and how to get the stronger."""
    if node.isolation == "bwrap":
        return "bwrap"
    user = ", as root: some folder on the way is closed to other users" if uid == 0 else ""
    return f"process ({node.isolation_detail}){user}"


def job_variables(order: StartOrder, node: NodeFacts, *, walled: bool) -> dict[str, str]:
    """The user's variables beneath the platform's, secrets by their names; the shim adds what it alone knows."""
    given = dict(order.template.env)
    path = given.get("PYTHONPATH", "")
    sdk = SDK_INSIDE if walled else str(node.client_folder)
    url = urlsplit(node.front_door)
    inside = f"{url.scheme}://127.0.0.1:{door_of(node.front_door)[1]}" if walled else node.front_door
    generated = GENERATED if walled else str(generated_folder(order, node))
    gang = gang_variables(order.gang, order.attempt_id, generated) if order.gang else ALONE_IN_THE_WORLD
    return (
        given
        | gang
        | {
            "PYTHONPATH": ":".join(filter(None, ["" if secret_refs.name_in(path) is not None else path, sdk])),
            "NABLA_API_URL": inside,
            "NABLA_TOKEN": order.token,
            "NABLA_EXPERIMENT_ID": order.experiment_id,
            "NABLA_PROJECT_ID": order.project_id,
            "NABLA_TEAM_ID": order.team_id,
            "NABLA_ATTEMPT": str(order.number),
            "NABLA_NODE_ID": node.node_id,
            # What the job asks of the API belongs to the trace that began with its submission.
            "TRACEPARENT": order.traceparent,
        }
    )


def door_of(front_door: str) -> tuple[str, int]:
    """Host and port of the front door."""
    url = urlsplit(front_door)
    return url.hostname or "127.0.0.1", url.port or (443 if url.scheme == "https" else 80)


def storage_of(team_id: str, root: Path, uid: int | None) -> Path:
    """The team's persistent folder on this node, made when it is first needed."""
    root.mkdir(mode=0o711, parents=True, exist_ok=True)
    folder = root / team_id
    if not folder.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        if uid is not None:
            os.chown(folder, uid, uid)
    return folder
