"""What each rank of a gang finds in its environment, by the gang's type.

Ranks do not see each other's GPUs: each has devices 0, 1, ... of its own, also where two share a node. So to torch
every rank is a node of its own with one process, whose LOCAL_RANK is 0; where it truly lies is in NABLA_LOCAL_RANK.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

from libs.common.contracts.messages import JobTemplate
from services.executor.domain.execution import execution_id
from services.executor.domain.gang import meeting_port, port_of
from services.executor.ports import GangOrder

# Beneath it whatever the platform makes for the job is laid, in a sandbox.
GENERATED = "/generated"
HOSTFILE = "hostfile"
RSH = "nabla-rsh"
_PROGRAM = ("python3", "-m", "nabla.job.gang")


def gang_variables(order: GangOrder, attempt_id: str, generated: str = GENERATED) -> dict[str, str]:
    """The variables of one rank.

    Args:
        generated: where `generated_files` are, as the job sees it.
    """
    match order.type:
        case "torch":
            own = _torch(order)
        case "grpc":
            own = _grpc(order)
        case "mpi":
            own = _mpi(generated)
        case _:
            own = _ray(order)
    return _common(order, attempt_id) | own


def gang_command(order: GangOrder, template: JobTemplate) -> list[str] | str:
    """What the rank runs: its own command, with what the gang's type needs around it, or a helper of the platform."""
    words = list(template.command)
    plain: list[str] | str = words[0] if len(words) == 1 else words
    argv = ["/bin/sh", "-c", words[0]] if len(words) == 1 else words
    match order.type, order.me.role:
        case "mpi", "master":
            return [*_PROGRAM, "lead", "--", *argv]
        case "mpi", _:
            return plain if words else [*_PROGRAM, "serve"]
        case "ray", "head":
            return [*_PROGRAM, "ray-head", *_amounts(template), "--", *argv]
        case "ray", _:
            return plain if words else [*_PROGRAM, "ray-worker", *_amounts(template)]
    return plain


def _amounts(template: JobTemplate) -> list[str]:
    """Ray would count the whole machine as its own."""
    wish = template.resources
    cpus, gpus = max(1, int(wish.cpu_count)), int(wish.gpu_count)
    return [f"--num-cpus={cpus}", f"--num-gpus={gpus}", *([f"--memory={wish.memory_bytes}"] * bool(wish.memory_bytes))]


def generated_files(order: GangOrder, attempt_id: str) -> Mapping[str, str]:
    """Files that the rank finds below /generated; each can be executed."""
    if order.type != "mpi":
        return {}
    return {
        HOSTFILE: "".join(f"{host} slots=1\n" for host in hosts(order, attempt_id)),
        RSH: f'#!/bin/sh\nexec {" ".join(_PROGRAM)} rsh "$@"\n',
    }


def hosts(order: GangOrder, attempt_id: str) -> tuple[str, ...]:
    """The host names of all ranks, by rank."""
    return tuple(execution_id(attempt_id, peer.rank) for peer in order.peers)


def _common(order: GangOrder, attempt_id: str) -> dict[str, str]:
    me = order.me
    peers = [
        {
            "rank": peer.rank,
            "role": peer.role,
            "index": peer.index,
            "host": host,
            "address": peer.address,
            "port": port_of(order, peer.rank),
        }
        for peer, host in zip(order.peers, hosts(order, attempt_id), strict=True)
    ]
    return {
        "NABLA_RANK": str(order.rank),
        "NABLA_WORLD_SIZE": str(len(order.peers)),
        "NABLA_LOCAL_RANK": str(me.local_rank),
        "NABLA_ROLE": me.role,
        "NABLA_ROLE_INDEX": str(me.index),
        "NABLA_PEERS": json.dumps(peers, separators=(",", ":")),
        "NABLA_GANG_PORTS": f"{order.first_port}-{order.last_port}",
        "NABLA_GANG_KEY": order.key,
    }


def _torch(order: GangOrder) -> dict[str, str]:
    rank, size = str(order.rank), str(len(order.peers))
    address, port = order.peers[0].address, str(meeting_port(order))
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": rank,
        "NODE_RANK": rank,
        # What torchrun takes where its command line says nothing.
        "PET_NNODES": size,
        "PET_NODE_RANK": rank,
        "PET_NPROC_PER_NODE": "1",
        "PET_MASTER_ADDR": address,
        "PET_MASTER_PORT": port,
    }


def _grpc(order: GangOrder) -> dict[str, str]:
    cluster: dict[str, list[str]] = {}
    for peer in order.peers:
        cluster.setdefault(peer.role, []).append(f"{peer.address}:{port_of(order, peer.rank)}")
    task = {"type": order.me.role, "index": order.me.index}
    config = json.dumps({"cluster": cluster, "task": task, "environment": "cloud"})
    return {
        "TF_CONFIG": config,
        "PS_CONFIG": base64.urlsafe_b64encode(config.encode()).decode(),
        "TYPE": order.me.role,
        "INDEX": str(order.me.index),
        "WORKER_HOSTS": ",".join(cluster.get("worker", [])),
        "PS_HOSTS": ",".join(cluster.get("ps", [])),
    }


def _mpi(generated: str) -> dict[str, str]:
    """Open MPI's and Hydra's launchers start their daemons by `nabla-rsh`, as there is no sshd in a sandbox."""
    agent, hostfile = f"{generated}/{RSH}", f"{generated}/{HOSTFILE}"
    return {
        "OMPI_MCA_plm_rsh_agent": agent,
        "OMPI_MCA_orte_default_hostfile": hostfile,
        "PRTE_MCA_plm_ssh_agent": agent,
        "PRTE_MCA_prte_default_hostfile": hostfile,
        "HYDRA_LAUNCHER": "ssh",
        "HYDRA_LAUNCHER_EXEC": agent,
        "HYDRA_HOST_FILE": hostfile,
        # Whoever is root here is so in a sandbox or a container alone, or on a machine of their own.
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def _ray(order: GangOrder) -> dict[str, str]:
    head = order.peers[0]
    return {"RAY_ADDRESS": f"{head.address}:{meeting_port(order)}"}


def peer_addresses(order: GangOrder) -> list[str]:
    """Of the nodes of other ranks, each once."""
    return list(dict.fromkeys(peer.address for peer in order.peers if peer.address != order.me.address))
