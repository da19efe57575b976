import socket
import threading
from dataclasses import replace

import pytest

from cfe_hpc.errors import CfeError
from cfe_hpc.ranks.env import RankFacts
from cfe_hpc.ranks.rendezvous import candidate_ports, meet, reachable_address


def facts(rank: int, world_size: int = 3, job_id: str = "1", attempt: int = 0) -> RankFacts:
    return RankFacts(
        scheduler="local",
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        node_rank=0,
        num_nodes=1,
        hosts=("localhost",),
        job_id=job_id,
        attempt=attempt,
    )


def meet_all(places: list[RankFacts], token: str = "run") -> list:
    met: list = [None] * len(places)

    def one(index: int) -> None:
        met[index] = meet(places[index], token=token, timeout_s=20)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met


def test_all_ranks_learn_the_same_place():
    met = meet_all([facts(rank, job_id="same") for rank in range(3)])
    assert met[0] is not None
    assert met == [met[0]] * 3
    assert met[0].master_port != met[0].control_port


def test_taken_ports_are_walked_past():
    places = [facts(rank, job_id="taken") for rank in range(2)]
    strangers = []
    for purpose in ("meet", "master", "control"):
        first = next(iter(candidate_ports("taken", 0, purpose)))
        stranger = socket.socket()
        stranger.bind(("", first))
        stranger.listen()
        strangers.append(stranger)
    try:
        met = meet_all(places)
        taken = {stranger.getsockname()[1] for stranger in strangers}
        assert met[0] == met[1]
        assert not {met[0].master_port, met[0].control_port} & taken
    finally:
        for stranger in strangers:
            stranger.close()


def test_ports_are_kept_for_their_servers_from_then_on():
    """Two clusters may give one machine the same job id: who comes second walks on, however late the servers start."""
    ours = meet(facts(0, 1, job_id="twin"), token="one", control_ports=2)
    theirs = meet(facts(0, 1, job_id="twin"), token="two")
    mine = {ours.master_port, ours.control_port, ours.control_port + 1}
    assert not {theirs.master_port, theirs.control_port} & mine
    for port in mine:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", port))
            server.listen()


def test_two_runs_under_one_job_id_do_not_meet():
    """A stranger's rank 0 on the port answers nobody without the run's own token."""
    first, second = [facts(rank, 2, job_id="shared") for rank in range(2)], facts(1, 2, job_id="shared")
    impostor = threading.Thread(target=lambda: meet(first[0], token="one", timeout_s=3))
    impostor.start()
    with pytest.raises(CfeError, match="found no rank 0"):
        meet(second, token="other", timeout_s=1.5)
    impostor.join()
    assert meet(first[0], token="one", timeout_s=0.1).master_port


def test_another_attempt_meets_elsewhere():
    here = list(candidate_ports("8", 0, "meet"))
    there = list(candidate_ports("8", 1, "meet"))
    assert here != there
    assert all(20_000 <= port <= 32_767 for port in here + there)


def test_rank_zero_alone_needs_nobody():
    assert meet(replace(facts(0), world_size=1), token="x").address == "127.0.0.1"


SILENT_ONCE = """#!/bin/sh
if mkdir "$0.asked" 2>/dev/null; then
  echo 'slurm_load_node error: Socket timed out on send/recv operation' >&2
  exit 1
fi
echo NodeName=nowhere-1 NodeAddr=10.0.0.7 State=IDLE
"""
UNKNOWN = "#!/bin/sh\necho 'Node nowhere-1 not found' >&2; exit 1\n"


def scontrol(folder, monkeypatch, text):
    (folder / "scontrol").write_text(text)
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_a_controller_that_gives_no_answer_is_asked_again(tmp_path, monkeypatch):
    scontrol(tmp_path, monkeypatch, SILENT_ONCE)
    assert reachable_address("nowhere-1") == "10.0.0.7"


def test_a_node_that_nobody_knows_and_a_controller_that_stays_silent_are_errors(tmp_path, monkeypatch):
    scontrol(tmp_path, monkeypatch, UNKNOWN)
    with pytest.raises(CfeError, match="not found"):
        reachable_address("nowhere-1", patience_s=60.0)
    scontrol(tmp_path, monkeypatch, SILENT_ONCE)
    with pytest.raises(CfeError, match="Socket timed out"):
        reachable_address("nowhere-1", patience_s=0.0)
