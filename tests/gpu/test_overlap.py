"""On CUDA: dispatch and ZeRO's reductions beside other work change no number, and the host waits for neither.

pytest --confcutdir=tests/gpu tests/gpu/test_overlap.py
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tandem.parallel.comm.exchange import DispatchPlan, Exchange
from tandem.parallel.comm.transfer import pinned, to_device
from tandem.parallel.engines import encoder_engine
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.state import AdamSettings
from tandem.parallel.layout import Layout
from tandem.parallel.plan.routes import VisualPlan, assign_encoding_ranks, build_routes

CUDA = torch.device("cuda", 0)
WIDTH, ROWS, CHUNKS = 2048, 4096, 4
ADAM = AdamSettings(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def dispatch_plan_of_a_step() -> tuple[DispatchPlan, list[int], np.ndarray]:
    """(dispatch_plan, rows of each chunk, row of the step in each leaf row) of images in one process."""
    tokens_I = np.random.default_rng(0).integers(16, 256, 40)
    plan = VisualPlan(
        unit_I=np.arange(40),
        cost_I=tokens_I,
        patches_I=4 * tokens_I,
        tokens_I=tokens_I,
        replica_I=np.zeros(40, np.int64),
        micro_batch_I=np.arange(40) % 3,
        start_I=np.zeros(40, np.int64),
        row_tokens=256,
    )
    layout = Layout(world=1)
    routes = build_routes(plan, assign_encoding_ranks(plan, layout, True), layout, 0, 3, 4096)
    first_I = np.cumsum(tokens_I) - tokens_I
    order_I = np.argsort(plan.micro_batch_I, kind="stable")
    row_U = np.concatenate([np.arange(first_I[i], first_I[i] + tokens_I[i]) for i in order_I])
    return DispatchPlan.of(routes), [int(tokens_I[ids].sum()) for ids in routes.chunks], row_U


def test_rows_arrive_and_gradients_come_home_while_products_run(request):
    """Products of one chunk keep the current stream busy while the rows of the other travel."""
    dispatch_plan, rows_C, row_U = dispatch_plan_of_a_step()
    assert len(rows_C) > 2
    on_device = to_device(pinned(dispatch_plan), CUDA)
    rows_VD = torch.randn(sum(rows_C), WIDTH, device=CUDA)
    weight_DD = torch.randn(WIDTH, WIDTH, device=CUDA) / WIDTH**0.5
    expected_UD = (rows_VD @ weight_DD)[torch.from_numpy(row_U).to(CUDA)]
    exchange = Exchange(dist.group.WORLD)
    dist.barrier()  # NCCL has its communicator
    torch.cuda.synchronize()
    request.getfixturevalue("no_waiting")
    dispatch = exchange.dispatch(on_device)
    for rows in rows_VD.split(rows_C):
        dispatch.send(rows @ weight_DD)
    leaf_UD = dispatch.leaves()
    home = []
    for rows, (place_V, gradient_VD) in zip(rows_C, exchange.combine(leaf_UD, on_device), strict=True):
        home.append(gradient_VD.new_empty(rows, WIDTH).index_copy_(0, place_V, gradient_VD))
        home[-1] @ weight_DD
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(leaf_UD, expected_UD)  # products of other heights
    assert torch.equal(torch.cat(home)[torch.from_numpy(row_U).to(CUDA)], leaf_UD)


def squares_of_a_step(stage: int, waits: bool) -> torch.Tensor:
    """Squared norms of three steps of several chunks; waits: the host waits after every call, so nothing overlaps."""
    torch.manual_seed(0)
    tower = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(8)]).cuda()
    engine = EncoderEngine(tower, {"all": tower}, zero_stage=stage, precision="bf16", adam=ADAM)
    inputs = [torch.randn(ROWS, WIDTH, device=CUDA, dtype=torch.bfloat16) for _ in range(CHUNKS)]
    squares = []
    for _ in range(3):
        kept = [engine.encode(x_NP) for x_NP in inputs]
        for output in kept:
            engine.backward(output, output.detach())
            if waits:
                torch.cuda.synchronize()
        squares.append(engine.squared_grad_norms())
        engine.step(1e-3)
    return torch.cat(squares)


@pytest.mark.parametrize("stage", [2, 3])
def test_reductions_beside_the_backward_change_no_gradient(stage):
    assert torch.equal(squares_of_a_step(stage, waits=False), squares_of_a_step(stage, waits=True))


def trained_twice(stage: int) -> tuple[EncoderEngine, torch.Tensor]:
    """An engine that has done two steps, and its input."""
    torch.manual_seed(0)
    tower = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(2)]).cuda()
    engine = EncoderEngine(tower, {"all": tower}, zero_stage=stage, precision="bf16", adam=ADAM)
    x_NP = torch.randn(ROWS, WIDTH, device=CUDA, dtype=torch.bfloat16)
    for _ in range(2):
        engine.backward(output := engine.encode(x_NP), output.detach())
        engine.squared_grad_norms()
        engine.step(1.0)
    return engine, x_NP


@pytest.mark.parametrize("stage", [1, 2])
def test_the_host_does_not_wait_in_a_backward(stage, request):
    squares_of_a_step(stage, waits=False)  # what is made once is made
    engine, x_NP = trained_twice(stage)
    busy = torch.randn(16384, 16384, device=CUDA)
    torch.cuda.synchronize()
    request.getfixturevalue("no_waiting")
    for _ in range(20):
        busy @ busy  # 176 TFLOP in fp32 are ahead of what follows
    engine.backward(output := engine.encode(x_NP), output.detach())
    engine.squared_grad_norms()
    engine.step(1.0)
    issued = torch.cuda.Event()
    issued.record()
    assert not issued.query(), "the device is through: the host has waited for it"


def test_gathers_of_weights_wait_for_the_update(monkeypatch):
    """On the device, at stage 3, and with no weights that stay whole, whose gather in the update could do it."""
    monkeypatch.setattr(encoder_engine, "PERSISTENT_NUMEL", 0)
    engine, x_NP = trained_twice(stage=3)
    busy = torch.randn(16384, 16384, device=CUDA)
    engine.backward(output := engine.encode(x_NP), output.detach())
    engine.squared_grad_norms()
    torch.cuda.synchronize()
    for _ in range(20):
        busy @ busy  # 176 TFLOP in fp32 are ahead of the update
    engine.step(1.0)
    gathers = engine._zero.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    assert not gathers.record_event().query(), "a gather would read weights before they are updated"
