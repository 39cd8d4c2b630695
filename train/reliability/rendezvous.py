"""The store at which the ranks of one start meet, cleared of those of the starts before.

torchrun keeps one store for all its restarts, and torch writes the ranks' addresses into it under the same names every
time: a restarted rank may find the address of one that is dead, and fails to connect (seen with torch 2.13).  Nothing
that torchrun tells a rank is equal on all nodes and new in every round, so the ranks agree on a name that is:

    rank r   hello/r = its own nonce       waits for round/<its nonce>, acknowledges it, waits for go
    rank 0   reads all hellos, again and again, answers each nonce it has not seen; when all acknowledged, go

A hello of a dead rank is answered too, in vain: only when its successor has said hello and acknowledged is the round
complete.  Old ranks never meet new ones, because every torchrun stops its ranks before it joins the next round.
"""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(minutes=30)  # between the first rank that starts and the last
POLL_S = 0.05


def agent_store() -> dist.Store | None:
    """A store for this start alone, out of the one that torchrun keeps; None where torchrun keeps none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=PATIENCE)
    name = agree_on_name(store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return dist.PrefixStore(name, store)


def agree_on_name(store: dist.Store, rank: int, world: int) -> str:
    """A name that is equal on all ranks of this start and was never used before."""
    nonce = uuid.uuid4().hex
    store.set(f"tandem/hello/{rank}", nonce)
    if rank == 0:
        _gather(store, world, nonce)
        return f"tandem/{nonce}"
    name = store.get(f"tandem/round/{nonce}").decode()
    store.set(f"tandem/{name}/ack/{rank}", nonce)
    store.wait([f"tandem/{name}/go"])
    return f"tandem/{name}"


def _gather(store: dist.Store, world: int, name: str) -> None:
    hellos = [f"tandem/hello/{rank}" for rank in range(1, world)]
    acknowledged = [f"tandem/{name}/ack/{rank}" for rank in range(1, world)]
    answered: set[str] = set()
    while hellos:
        for nonce in {found.decode() for found in store.multi_get(hellos)} - answered:
            store.set(f"tandem/round/{nonce}", name)
            answered.add(nonce)
        if store.check(acknowledged):
            break
        time.sleep(POLL_S)
    store.set(f"tandem/{name}/go", "")
