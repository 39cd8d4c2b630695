"""The LLM under Megatron-core: schedule, ZeRO-1 data parallelism, optimizer, and its state by global names.

Every quirk of Megatron-core's schedules and optimizer stays here.  The gradient convention: the caller's loss of a
micro-batch is a sum over its trained tokens; `forward_backward` makes the gradients those of
(sum over the global batch) * scale, undoing Megatron-core's division by micro-batches and by data-parallel ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from tandem.parallel.engines import optimizers
from tandem.parallel.engines.balance import ExpertBalance
from tandem.parallel.engines.llm_shards import Shard, shards_of
from tandem.parallel.engines.state import KINDS, AdamSettings, StateChunk
from tandem.parallel.grid import Grid


@dataclass(frozen=True)
class Leaf:
    """Visual rows of one micro-batch on a first-stage rank, [U, D], detached, and their local places, [U]."""

    rows_UD: torch.Tensor
    at_U: torch.Tensor


class LLMEngine:
    """Model chunks of this rank with their gradients and optimizer; frozen ones have neither.

    build(vp_stage, first, last) returns an initialised chunk; forward(chunk, micro_batch, leaf) its output, the
    per-token losses on the last stage; loss(losses, micro_batch) the pair (sum over trained tokens, report).
    lr_scale: factor of the learning rate by a parameter's name in a chunk (None: 1), and so of the weight decay, which
    is learning rate times decay.  bias_update: rate at which the biases of routers that have one are moved.
    """

    def __init__(
        self,
        config: TransformerConfig,
        grid: Grid,
        *,
        build: Callable,
        forward: Callable,
        loss: Callable,
        trainable: bool,
        adam: AdamSettings,
        lr_scale: Callable[[str], float] | None = None,
        bias_update: float = 0.0,
    ):
        self.config, self.grid = config, grid
        self._forward, self._loss = forward, loss
        stages = range(grid.layout.vpp)
        self.chunks = [self._chunk(build, stage if grid.layout.vpp > 1 else None) for stage in stages]
        for chunk in self.chunks:
            chunk.requires_grad_(trainable)
        self._models = [Float16Module(config, chunk) if config.bf16 else chunk for chunk in self.chunks]
        self._shards = [shard for chunk in self.chunks for shard in shards_of(chunk)]
        self.balance = None
        if config.num_moe_experts:
            self.balance = ExpertBalance(config, self.chunks, bias_update, grid.device)
        self._optimizer: Any = None  # Megatron-core's, where something is trained
        if trainable:
            self._wrap(adam, lr_scale)

    def _chunk(self, build, vp_stage):
        virtual = vp_stage is not None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=not virtual, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=not virtual, vp_stage=vp_stage)
        return build(vp_stage, first, last).to(self.grid.device)

    def _wrap(self, adam: AdamSettings, lr_scale: Callable[[str], float] | None):
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self._models = [
            DistributedDataParallel(self.config, ddp, model, disable_bucketing=place > 0)
            for place, model in enumerate(self._models)
        ]
        settings = OptimizerConfig(
            optimizer="adam",
            lr=adam.lr,
            weight_decay=adam.weight_decay,
            adam_beta1=adam.betas[0],
            adam_beta2=adam.betas[1],
            adam_eps=adam.eps,
            clip_grad=0.0,
            use_distributed_optimizer=True,
            bf16=self.config.bf16,
            params_dtype=self.config.params_dtype,
        )
        overrides = get_standard_config_overrides(settings) | self._lr_overrides(lr_scale)
        self._optimizer = get_megatron_optimizer(settings, self._models, overrides, use_gloo_process_groups=False)
        self._weight_decay = adam.weight_decay
        self.config.finalize_model_grads_func = finalize_model_grads
        for part in self._parts():  # of Transformer Engine or Apex where Megatron-core finds one, else of torch
            optimizers.fuse(part.optimizer)
            optimizers.create_state(part.optimizer)
        self.set_lr(adam.lr)
        self.discard()

    def _lr_overrides(self, lr_scale: Callable[[str], float] | None) -> dict[ParamKey, dict[str, float]]:
        """Parameter groups of Megatron-core for the parameters whose rate has a factor."""
        if lr_scale is None:
            return {}
        factors = {lr_scale(name) for model in self._models for name, _ in model.named_parameters()}

        def having(factor: float) -> ParamKey:
            return ParamKey(
                with_name_predicate=ParamWithNamePredicate(f"lr x {factor}", lambda _, name: lr_scale(name) == factor)
            )

        return {having(factor): {"lr_mult": factor} for factor in factors - {1.0}}

    @property
    def trainable(self) -> bool:
        return self._optimizer is not None

    # ---- one step ----------------------------------------------------------------------------------------------------

    def forward_backward(
        self, micro_batches: list, leaves: list[Leaf | None], scale: float, forward_only=False
    ) -> list:
        """Runs the pipeline schedule; returns the reports of the micro-batches, on last-stage ranks only.

        leaves: rows of each micro-batch on first-stage ranks (None elsewhere); after the call `leaf_gradient` has the
        gradients.  scale: multiplies the summed loss, usually 1 / (trained tokens of the global batch).
        """
        count = len(micro_batches)
        weight = scale * count * self.grid.layout.dp

        def forward_step(iterator, model):
            place = next(iterator)
            micro_batch = micro_batches[place]
            output = self._forward(model, micro_batch, leaves[place])

            def loss(losses):
                total, report = self._loss(losses, micro_batch)
                return total * weight, report

            return output, loss

        virtual = len(self._models) > 1
        iterators = [iter(range(count)) for _ in self._models]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if virtual else iterators[0],
            model=self._models if virtual else self._models[0],
            num_microbatches=count,
            seq_length=micro_batches[0].row_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def leaf_gradient(self, leaves: list[Leaf | None], like_UD: torch.Tensor) -> torch.Tensor:
        """Gradients of all leaf rows in order, [U, D]; zeros for leaves that the loss does not reach.

        The schedule multiplies a loss by cp, and leaves get no data-parallel average: undo both.
        """
        gradient_UD = torch.zeros_like(like_UD)
        place = 0
        for leaf in leaves:
            if leaf is None:
                continue
            rows = leaf.rows_UD.shape[0]
            if leaf.rows_UD.grad is not None:
                gradient_UD[place : place + rows] = leaf.rows_UD.grad
                leaf.rows_UD.grad = None
            place += rows
        return gradient_UD.div_(self.grid.layout.dp * self.grid.layout.cp)

    def squared_grad_norm(self) -> torch.Tensor:
        """This rank's share of the squared gradient norm, a 0-d fp64 tensor; the world's sum is the whole."""
        if self.trainable:
            self._optimizer.prepare_grads()
        gradients = [gradient for part in self._parts() for gradient in part.get_main_grads_for_grad_norm()]
        if not gradients:
            return torch.zeros((), dtype=torch.float64, device=self.grid.device)
        return torch.stack(torch._foreach_norm(gradients, dtype=torch.float64)).square().sum()

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Multiplies the gradients that `squared_grad_norm` prepared by `scale`, updates, clears."""
        if not self.trainable:
            return
        gradients = [parameter.grad for part in self._parts() for parameter in part.get_parameters()]
        if gradients:  # a rank may own nothing
            torch._foreach_mul_(gradients, scale)
        self._optimizer.step_with_ready_grads()
        if self.balance is not None:
            self.balance.update()
        self.discard()

    def discard(self) -> None:
        """Clears the gradients without an update."""
        if self.trainable:
            for model in self._models:
                model.zero_grad_buffer()
            self._optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step, where its factor is 1; biases and norms stay exempt from weight decay."""
        for group in self._groups():
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self._weight_decay * group.get("wd_mult", 1.0)

    # ---- state by global names ---------------------------------------------------------------------------------------

    @property
    def optimizer_name(self) -> str | None:
        """Which implementation updates this rank's weights; None where it updates none."""
        return next((optimizers.name_of(part.optimizer) for part in self._parts()), None)

    @property
    def optimizer_steps(self) -> int:
        """Adam's step count, for its bias correction; 0 on a rank that owns no optimizer state."""
        return max((optimizers.steps_of(part.optimizer) for part in self._parts()), default=0)

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for part in self._parts():
            optimizers.set_steps(part.optimizer, steps)

    def state(self) -> Iterator[StateChunk]:
        """Weights (fp32) and Adam moments that this rank saves, by global name: views of live memory where they can be.

        Over the ranks every entry comes once.  No collective: this is on the way of the training loop.
        """
        for shard in self._shards:
            group, once = self._holder(shard)
            if self.trainable and shard.trained:
                begin, owned = self._owned(shard)
            else:
                begin, owned = 0, {"param": shard.local} if dist.get_rank(group) == 0 else {}
            for kind, tensor in owned.items() if once else ():
                yield StateChunk(
                    name=shard.name,
                    kind=kind,
                    shape=shard.shape,
                    local_shape=tuple(shard.local.shape),
                    pieces=shard.pieces,
                    begin=begin,
                    tensor_N=tensor.float().reshape(-1),
                )

    @torch.no_grad()
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole model's tensors of which this rank holds a part."""
        return {shard.name: shard.shape for shard in self._shards}

    def load(self, read: Callable, optimizer: bool, has: Callable[[str], bool] = lambda name: True) -> None:
        """Takes weights, and with `optimizer` the moments, from read(name, kind, start, shape) -> CPU tensor.

        has: whether `read` knows a tensor, by its name; a router's bias that it does not know begins at zero, that of
        visual tokens at the other.
        """
        for shard in self._shards:
            if not shard.trained and not has(shard.name):
                shard = replace(shard, name=shard.name.removesuffix("_visual"))
                if not has(shard.name):
                    shard.local.zero_()
                    continue
            for kind in KINDS if optimizer and self.trainable and shard.trained else KINDS[:1]:
                whole = (torch.zeros if shard.padded else torch.empty)(shard.local.shape, dtype=torch.float32)
                for piece in shard.pieces:
                    part = piece.of_local(whole)
                    part.copy_(read(shard.name, kind, piece.corner(part.dim()), tuple(part.shape)))
                self._put(shard, kind, whole)

    def _holder(self, shard: Shard):
        """Data-parallel group that shares this parameter, and whether it, not another copy's group, saves it."""
        shared = getattr(shard.parameter, "shared", False)  # a tied embedding, which the first stage saves
        cut = any(piece.length != shard.shape[piece.dim] for piece in shard.pieces)
        if getattr(shard.parameter, "allreduce", True) and "local_experts" not in shard.name:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        else:
            group = parallel_state.get_expert_data_parallel_group()
            tensor_rank = parallel_state.get_expert_tensor_parallel_rank()
        return group, (cut or tensor_rank == 0) and not shared

    def _owned(self, shard: Shard) -> tuple[int, dict[str, torch.Tensor]]:
        """What this rank's optimizer owns of a shard, {kind: [N]}, and at which of the shard's entries that begins."""
        for optimizer in self._parts():
            if shard.parameter in optimizer.model_param_group_index_map:
                group, order = optimizer.model_param_group_index_map[shard.parameter]
                main = optimizer.optimizer.param_groups[group]["params"][order]
                run = optimizer._get_model_param_range_map(shard.parameter)["param"]
                low, high = max(run.start, shard.begin), min(run.end, shard.begin + shard.local.numel())
                if low < high:
                    tensors = {**optimizer.optimizer.state[main], "param": main.detach()}
                    part = slice(low - run.start, high - run.start)
                    return low - shard.begin, {kind: tensors[kind].view(-1)[part] for kind in KINDS}
        return 0, {}

    def _put(self, shard: Shard, kind: str, whole: torch.Tensor) -> None:
        if kind == "param":
            shard.local.copy_(whole)
        begin, owned = self._owned(shard)
        if owned:
            owned[kind].copy_(whole.view(-1)[begin : begin + owned[kind].numel()])

    def _parts(self):
        if not self.trainable:
            return []
        parts = getattr(self._optimizer, "chained_optimizers", [self._optimizer])
        return [part for part in parts if not part.is_stub_optimizer]

    def _groups(self):
        return [group for part in self._parts() for group in part.optimizer.param_groups]
