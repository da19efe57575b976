import pytest

from cfe_hpc.errors import UsageError
from cfe_hpc.ranks.env import read_facts

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_JOB_ID": "812",
    "SLURM_RESTART_COUNT": "2",
}


def test_srun_tells_the_place():
    facts = read_facts(SRUN)
    assert (facts.scheduler, facts.rank, facts.local_rank, facts.world_size) == ("slurm", 5, 1, 7)
    assert (facts.local_world_size, facts.node_rank, facts.num_nodes) == (3, 1, 2)
    assert (facts.hosts, facts.job_id, facts.attempt) == (("n1", "n2"), "812", 2)


def test_a_successor_counts_attempts_on():
    assert read_facts({**SRUN, "CFE_ATTEMPT_BASE": "3"}).attempt == 5


def test_equal_nodes_are_compressed():
    facts = read_facts({**SRUN, "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"})
    assert facts.local_world_size == 4


def test_a_batch_shell_is_no_rank():
    batch = {**SRUN, "SLURM_STEP_ID": "4294967291"}
    assert read_facts(batch).scheduler == "none"


def test_the_supervisor_wins_over_an_allocation_around_it():
    local = {
        "CFE_RANK": "1",
        "CFE_LOCAL_RANK": "1",
        "CFE_WORLD_SIZE": "2",
        "CFE_LOCAL_WORLD_SIZE": "2",
        "CFE_ATTEMPT": "4",
        "CFE_JOB_ID": "local-77",
    }
    facts = read_facts({**SRUN, **local})
    assert (facts.scheduler, facts.rank, facts.world_size, facts.attempt, facts.job_id) == (
        "local",
        1,
        2,
        4,
        "local-77",
    )


def test_a_rank_that_a_launcher_started_knows_its_scheduler_hosts_and_restart():
    place = {"CFE_RANK": "5", "CFE_LOCAL_RANK": "1", "CFE_WORLD_SIZE": "8", "CFE_LOCAL_WORLD_SIZE": "4"}
    place |= {"CFE_NODE_RANK": "1", "CFE_NUM_NODES": "2", "CFE_ATTEMPT": "3", "CFE_JOB_ID": "812"}
    place |= {"CFE_SCHEDULER": "slurm", "CFE_HOSTS": "n1,n2", "CFE_RESTART": "1"}
    # SLURM_PROCID and the others are the agent's.
    facts = read_facts({**SRUN, **place})
    assert (facts.scheduler, facts.hosts, facts.restart) == ("slurm", ("n1", "n2"), 1)
    assert (facts.rank, facts.local_rank, facts.node_rank, facts.attempt, facts.job_id) == (5, 1, 1, 3, "812")


def test_torchrun_is_understood():
    facts = read_facts(
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    )
    assert (facts.rank, facts.node_rank, facts.num_nodes, facts.job_id) == (3, 1, 2, "alone-29500")


def test_alone_is_one_rank():
    facts = read_facts({})
    assert (facts.scheduler, facts.rank, facts.world_size, facts.attempt) == ("none", 0, 1, 0)


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(UsageError, match="SLURM_LOCALID"):
        read_facts({**SRUN, "SLURM_LOCALID": "x"})
