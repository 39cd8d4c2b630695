"""Ranks of one start agree on a name; what earlier starts left in the store does not matter."""

import threading

import torch.distributed as dist

from tandem.train.reliability.rendezvous import agree_on_name


def meet(port: int, ranks: list[int], world: int, timeout: float) -> dict[int, str]:
    """What each of these ranks got, within the time."""
    names: dict[int, str] = {}

    def join(rank):
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        names[rank] = agree_on_name(store, rank, world)

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    return names


def test_every_start_has_a_name_of_its_own():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    starts = [meet(server.port, [3, 1, 0, 2], 4, timeout=20) for _ in range(3)]
    assert [len(set(names.values())) for names in starts] == [1, 1, 1]
    assert [len(names) for names in starts] == [4, 4, 4]
    assert len({names[0] for names in starts}) == 3


def test_a_start_that_never_was_complete_does_not_disturb_the_next():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in (1, 3):
        server.set(f"tandem/hello/{rank}", f"of rank {rank}, which is dead")
    names = meet(server.port, [0, 1, 2, 3], 4, timeout=20)
    assert len(names) == 4
    assert len(set(names.values())) == 1
