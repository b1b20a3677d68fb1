"""A process knows which of several it is from what launchers say, and is alone where they say nothing."""

import pytest

from isotone.errors import UsageError
from isotone.launch import World, world_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-009,12],other1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_torchrun_and_accelerate_are_understood() -> None:
    assert world_of(TORCHRUN) == World(3, 4, 1, "node7", 29500)


def test_tasks_of_srun_find_each_other_without_further_settings() -> None:
    worlds = [world_of({**STEP, "SLURM_PROCID": str(rank)}) for rank in range(8)]
    assert [world.rank for world in worlds] == list(range(8))
    assert {(world.size, world.address, world.port) for world in worlds} == {(8, "gpu007", worlds[0].port)}
    assert world_of({**STEP, "SLURM_STEP_ID": "3"}).port != worlds[0].port


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a[1-3]", "a1"), ("a1,b2", "a1"), ("r[01-02]n[3,5]-ib", "r01n3-ib"), ("a-[9],b", "a-9")],
)
def test_the_first_host_is_where_process_0_listens(nodes: str, first: str) -> None:
    assert world_of({**STEP, "SLURM_STEP_NODELIST": nodes}).address == first


def test_a_step_on_one_node_stays_on_it() -> None:
    assert world_of({**STEP, "SLURM_STEP_NUM_NODES": "1"}).address == "127.0.0.1"


def test_given_addresses_go_first() -> None:
    world = world_of({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1999"})
    assert (world.address, world.port) == ("10.0.0.1", 1999)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {
            "SLURM_JOB_ID": "1",
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
        },  # a batch script without srun
    ],
)
def test_one_process_is_alone(environment: dict[str, str]) -> None:
    assert world_of(environment) == World()


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        world_of({**TORCHRUN, "MASTER_ADDR": ""})
    with pytest.raises(UsageError, match=r"LOCAL_RANK is 'x'"):
        world_of({**TORCHRUN, "LOCAL_RANK": "x"})
