"""What ranks find in their environment, for each type of gang."""

from __future__ import annotations

import base64
import json

import pytest

from libs.common.contracts.gangs import ranks_of
from libs.common.contracts.messages import Gang, JobTemplate, Resources, Role
from services.executor.domain.gang import FIRST_PORT, GangFacts, first_free_port, gang_order
from services.executor.domain.gang_environment import (
    gang_command,
    gang_variables,
    generated_files,
    peer_addresses,
)
from services.executor.ports import GangOrder

pytestmark = pytest.mark.unit
GRPC = (Role(name="master", count=1), Role(name="worker", count=1), Role(name="ps", count=1))


def order(kind: str, roles: tuple[Role, ...], rank: int, nodes: tuple[str, ...]) -> GangOrder:
    ranks = ranks_of(JobTemplate(gang=Gang(type=kind, roles=roles)))
    addresses = {"a": "10.0.0.1", "b": "10.0.0.2"}
    return gang_order(kind, GangFacts(nodes, FIRST_PORT, "secret"), ranks, rank, addresses)


def test_every_type_says_who_a_rank_is_and_where_its_peers_are() -> None:
    told = order("grpc", GRPC, 2, ("a", "b", "b"))
    found = gang_variables(told, "at1")
    assert (found["NABLA_RANK"], found["NABLA_WORLD_SIZE"]) == ("2", "3")
    assert (found["NABLA_LOCAL_RANK"], found["NABLA_ROLE"], found["NABLA_ROLE_INDEX"]) == ("1", "ps", "0")
    peers = json.loads(found["NABLA_PEERS"])
    assert [(each["host"], each["address"], each["port"]) for each in peers] == [
        ("at1r0", "10.0.0.1", FIRST_PORT + 1),
        ("at1r1", "10.0.0.2", FIRST_PORT + 2),
        ("at1r2", "10.0.0.2", FIRST_PORT + 3),
    ]
    assert (peer_addresses(told), first_free_port(told)) == (["10.0.0.1"], FIRST_PORT + 4)


def test_torch_takes_each_rank_for_a_node_of_one_process() -> None:
    found = gang_variables(order("torch", (Role(name="worker", count=2),), 1, ("a", "a")), "at1")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", str(FIRST_PORT))
    assert (found["RANK"], found["WORLD_SIZE"]) == ("1", "2")
    # Its GPUs are numbered from 0, whoever else is on the node.
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"], found["NABLA_LOCAL_RANK"]) == ("0", "1", "1")
    assert found["NODE_RANK"] == found["GROUP_RANK"] == found["PET_NODE_RANK"] == "1"
    assert (found["PET_NNODES"], found["PET_NPROC_PER_NODE"]) == ("2", "1")
    assert found["PET_MASTER_ADDR"] == found["MASTER_ADDR"]


def test_tensorflow_finds_the_cluster_as_gradient_gave_it() -> None:
    found = gang_variables(order("grpc", GRPC, 1, ("a", "b", "b")), "at1")
    config = json.loads(found["TF_CONFIG"])
    assert config == {
        "cluster": {
            "master": [f"10.0.0.1:{FIRST_PORT + 1}"],
            "worker": [f"10.0.0.2:{FIRST_PORT + 2}"],
            "ps": [f"10.0.0.2:{FIRST_PORT + 3}"],
        },
        "task": {"type": "worker", "index": 0},
        "environment": "cloud",
    }
    assert json.loads(base64.urlsafe_b64decode(found["PS_CONFIG"])) == config
    assert (found["TYPE"], found["INDEX"]) == ("worker", "0")
    assert (found["WORKER_HOSTS"], found["PS_HOSTS"]) == (f"10.0.0.2:{FIRST_PORT + 2}", f"10.0.0.2:{FIRST_PORT + 3}")


MPI = (Role(name="master", count=1), Role(name="worker", count=1))
RAY = (Role(name="head", count=1), Role(name="worker", count=1))
HELPER = ["python3", "-m", "nabla.job.gang"]


def test_mpi_finds_its_hosts_and_a_shell_to_them() -> None:
    told = order("mpi", MPI, 0, ("a", "b"))
    found, files = gang_variables(told, "at1", "/gen"), generated_files(told, "at1")
    assert files["hostfile"] == "at1r0 slots=1\nat1r1 slots=1\n"
    assert found["OMPI_MCA_plm_rsh_agent"] == found["HYDRA_LAUNCHER_EXEC"] == "/gen/nabla-rsh"
    assert found["OMPI_MCA_orte_default_hostfile"] == "/gen/hostfile"
    assert generated_files(order("torch", (Role(name="worker", count=1),), 0, ("a",)), "at1") == {}


@pytest.mark.parametrize(
    ("kind", "roles", "rank", "command", "runs"),
    [
        ("torch", (Role(name="worker", count=2),), 1, ("python x.py",), "python x.py"),
        ("torch", (Role(name="worker", count=2),), 1, ("python", "x.py"), ["python", "x.py"]),
        ("mpi", MPI, 0, ("mpirun x",), [*HELPER, "lead", "--", "/bin/sh", "-c", "mpirun x"]),
        ("mpi", MPI, 1, (), [*HELPER, "serve"]),
        ("mpi", MPI, 1, ("sleep infinity",), "sleep infinity"),
        ("ray", RAY, 0, ("x", "y"), [*HELPER, "ray-head", "--num-cpus=2", "--num-gpus=1", "--", "x", "y"]),
        ("ray", RAY, 1, (), [*HELPER, "ray-worker", "--num-cpus=2", "--num-gpus=1"]),
    ],
)
def test_a_rank_runs_its_command_with_what_its_type_needs_around_it(
    kind: str, roles: tuple[Role, ...], rank: int, command: tuple[str, ...], runs: object
) -> None:
    template = JobTemplate(command=command, resources=Resources(cpu_count=2, gpu_count=1))
    assert gang_command(order(kind, roles, rank, ("a", "b")), template) == runs


def test_ray_finds_its_own_head() -> None:
    assert gang_variables(order("ray", RAY, 1, ("a", "b")), "at1")["RAY_ADDRESS"] == f"10.0.0.1:{FIRST_PORT}"
