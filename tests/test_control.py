"""The control plane over real gloo, in real processes."""

from spawned import heard

from cfe_hpc.ranks.control import GlooGroup
from cfe_hpc.ranks.rendezvous import Meeting

SIZE = 3


def rank_main(rank: int, port: int, answers) -> None:
    group = GlooGroup(rank, SIZE, Meeting(address="127.0.0.1", master_port=port, control_port=port))
    said = [
        group.all_max([rank, -rank, 1 << 40 if rank == 1 else 0]),
        group.all_gather(bytes([rank]) * rank),
        group.broadcast(b"from one" if rank == 1 else b"", source=1),
        group.broadcast(b""),
        group.all_max([0]),
    ]
    group.barrier()
    answers.put((rank, said))


def test_every_rank_hears_the_same():
    expected = [[2, 0, 1 << 40], [b"", b"\1", b"\2\2"], b"from one", b"", [0]]
    assert heard(rank_main, SIZE) == {rank: expected for rank in range(SIZE)}
