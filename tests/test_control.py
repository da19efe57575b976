"""The control plane over real gloo, in real processes."""

import multiprocessing
import socket

from cfe_hpc.ranks.control import GlooGroup
from cfe_hpc.ranks.rendezvous import Meeting

SIZE = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    context = multiprocessing.get_context("spawn")
    answers, port = context.Queue(), free_port()
    ranks = [context.Process(target=rank_main, args=(rank, port, answers)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    try:
        heard = dict(answers.get(timeout=120) for _ in ranks)
    finally:
        for process in ranks:
            process.join(30)
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * SIZE
    expected = [[2, 0, 1 << 40], [b"", b"\1", b"\2\2"], b"from one", b"", [0]]
    assert heard == {rank: expected for rank in range(SIZE)}
    answers.close()
