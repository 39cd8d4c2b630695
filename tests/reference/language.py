"""The stages of the language model in plain PyTorch: encoder, adapter, and a Mixture-of-Experts transformer.

    loss = sum over trained tokens of the global batch of -log p(label) / |B|  +  mean over micro-batches of R
    R    = sum over layers of  aux * E / (K T^2) * sum_e n_e sum_t p_te  +  z * mean_t logsumexp(router logits)^2

with p the softmax over all E experts, n_e how many of the T tokens of the micro-batch chose expert e among their K, and
n_e without gradient (Switch: Fedus et al. 2021, section 2.2; z-loss: Zoph et al. 2022, section 3.2).  Padding is routed
like any token.  With `seq_aux_loss` the first term is a sum over samples i instead (DeepSeek-V3, equations 17 to 20),

    aux * E / (K T') * sum_i 1 / T_i * sum_e n_ie sum_(t in i) p_te        T': tokens of all samples, without padding

A bias b moves choices, to the K experts of largest p + b.  After a step b_e += rate * sign(mean n - n_e), where n is
what was chosen, without padding (Wang et al. 2024, arXiv:2408.15664).

Legend: T tokens of a micro-batch, D width, H heads, G groups of heads that share a key, K head width, V visual rows.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch

from tests.reference import encoder, optim
from tests.reference.encoder import Weights

LAYER = "llm.decoder.layers"


def rms_norm(w: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]


def swiglu(w: Weights, prefix: str, x: torch.Tensor) -> torch.Tensor:
    """fc2(silu(gate) * up), gate and up one after the other in fc1."""
    gate, up = (x @ w[f"{prefix}.linear_fc1.weight"].T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ w[f"{prefix}.linear_fc2.weight"].T


def attention(w: Weights, prefix: str, x_TD, positions_T, lengths: Sequence[int], llm) -> torch.Tensor:
    """Causal attention inside each sample; the projection has, group by group, its queries, its key and its value."""
    mixed_TGXK = (x_TD @ w[f"{prefix}.linear_qkv.weight"].T).view(len(x_TD), llm.kv_heads, -1, llm.head_width)
    q = mixed_TGXK[:, :, :-2].flatten(1, 2)
    k, v = mixed_TGXK[:, :, -2], mixed_TGXK[:, :, -1]
    angles = positions_T[:, None].to(x_TD.dtype) * encoder.frequencies(llm.head_width, llm.rope_base, x_TD)
    shared = llm.heads // llm.kv_heads
    q, k = encoder.rotate(q, angles), encoder.rotate(k, angles)
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    seen = encoder.attention_by_segments(q, k, v, lengths, causal=True)
    return seen.flatten(1) @ w[f"{prefix}.linear_proj.weight"].T


def feed_forward(w: Weights, prefix: str, x_TD: torch.Tensor, llm, row: Mapping, seen: dict) -> tuple:
    """(output [T, D], router losses): the K largest scores, softmax over their logits, beside a shared expert if there
    is one.

    A dense model has one MLP and nothing to route.  seen: gets, by prefix, choices of text and visual tokens [2, E]
    and both losses without coefficients, added up.
    """
    if not llm.num_experts:
        return swiglu(w, prefix, x_TD), x_TD.new_zeros(())
    logits_TE = x_TD @ w[f"{prefix}.router.weight"].T
    score_TE, visual_T = logits_TE.softmax(-1), visual_tokens(row)
    ranked_TE, bias_E = logits_TE, w.get(f"{prefix}.router.expert_bias")
    if bias_E is not None:
        bias_TE = torch.where(visual_T[:, None], w.get(f"{prefix}.router.expert_bias_visual", bias_E), bias_E)
        ranked_TE = score_TE.detach() + bias_TE
    chosen_TK = ranked_TE.topk(llm.top_k, dim=-1).indices
    weight_TE = torch.zeros_like(logits_TE).scatter(1, chosen_TK, logits_TE.gather(1, chosen_TK).softmax(-1))
    output = swiglu(w, f"{prefix}.shared_experts", x_TD) if llm.shared_expert_width else torch.zeros_like(x_TD)
    for expert in range(llm.num_experts):
        output = output + weight_TE[:, expert, None] * swiglu(w, f"{prefix}.experts.local_experts.{expert}", x_TD)
    best_TE = torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(llm.top_k, dim=-1).indices, 1.0)
    balance, z = balancing(score_TE, best_TE, row, llm), logits_TE.logsumexp(-1).square().mean()
    map_TE, filled_T = torch.zeros_like(logits_TE).scatter(1, chosen_TK, 1.0), filled_tokens(row)
    count_2E = torch.stack([map_TE[filled_T & (visual_T == visual)].double().sum(0) for visual in (False, True)])
    before = seen.get(prefix, (0, 0, 0))
    seen[prefix] = tuple(a + b.detach() for a, b in zip(before, (count_2E, balance, z), strict=True))
    return output, llm.aux_loss * balance + llm.z_loss * z


def balancing(score_TE: torch.Tensor, best_TE: torch.Tensor, row: Mapping, llm) -> torch.Tensor:
    """The balancing loss without its coefficient."""
    factor = llm.num_experts / llm.top_k
    if llm.balance.aux_loss_type == "aux_loss":
        return factor * (best_TE.sum(0) * score_TE.sum(0)).sum() / len(score_TE) ** 2
    total, whole, begin = 0.0, int(filled_tokens(row).sum()), 0
    for length in row["lengths"]:
        here = slice(begin, begin + length)
        begin += length
        if filled_tokens(row)[here].any():
            total = total + (best_TE[here].sum(0) * score_TE[here].sum(0)).sum() / length / whole
    return factor * total


def filled_tokens(row: Mapping) -> torch.Tensor:
    """Which tokens belong to a sample, bool [T]."""
    return row.get("domain", torch.zeros(len(row["tokens"]))) >= 0


def visual_tokens(row: Mapping) -> torch.Tensor:
    """Which tokens come from the encoder, bool [T]."""
    return torch.zeros(len(row["tokens"]), dtype=torch.bool).index_fill(0, row.get("at_V", torch.arange(0)), True)


def hidden_states(w: Weights, row: Mapping, rows_VD: torch.Tensor | None, llm, seen: dict | None = None) -> tuple:
    """(last hidden states [T, D], router losses of all layers) of one micro-batch.

    row: tokens [T], positions [T] in the sample, lengths of the samples; visual rows go to places at_V; domain [T], -1
    on padding.  seen: see `feed_forward`.
    """
    seen = {} if seen is None else seen
    x = w["llm.embedding.word_embeddings.weight"][row["tokens"]]
    if rows_VD is not None:
        x = x.index_copy(0, row["at_V"], rows_VD)
    router = x.new_zeros(())
    for layer in range(llm.layers):
        place = f"{LAYER}.{layer}"
        normed = rms_norm(w, f"{place}.input_layernorm", x, llm.norm_eps)
        x = x + attention(w, f"{place}.self_attention", normed, row["positions"], row["lengths"], llm)
        normed = rms_norm(w, f"{place}.pre_mlp_layernorm", x, llm.norm_eps)
        out, losses = feed_forward(w, f"{place}.mlp", normed, llm, row, seen)
        x, router = x + out, router + losses
    return rms_norm(w, "llm.decoder.final_layernorm", x, llm.norm_eps), router


def visual_rows(w: Weights, images: Mapping, vit: Mapping, merge: int) -> torch.Tensor:
    """Rows [V, D] of all images of a step, in their order."""
    features = encoder.vit(
        w, "encoder.", images["patches"], images["positions"], images["lengths"], vit, images.get("keep_LI")
    )
    return encoder.adapter(w, "adapter.", encoder.pool(features, merge), vit["norm_eps"])


class Trainer:
    """Follows a run step by step.

    weights: by name; settings: encoder, llm, optim as plain namespaces, trainable parts, steps.
    """

    def __init__(self, weights: optim.Tensors, settings: SimpleNamespace):
        self.settings, optimizer = settings, settings.optim
        self.weights = dict(weights)
        trained = {
            name: w
            for name, w in self.weights.items()
            if name.split(".")[0] in settings.trainable and ".expert_bias" not in name
        }
        self.adam = optim.AdamW(
            trained,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            lr_scale=lambda name: (
                optim.layer_factor(name, settings.encoder["depth"], optimizer.layer_decay)
                * optim.part_factor(name, optimizer.lr_scale)
            ),
        )

    def step(self, step: int, batch: Mapping) -> dict:
        """One training step; losses, norms and learning rate as metrics.jsonl names them."""
        settings, optimizer = self.settings, self.settings.optim
        trained = {name: w.detach().clone().requires_grad_() for name, w in self.adam.weights.items()}
        w = {**self.weights, **trained}
        rows_VD = visual_rows(w, batch["images"], settings.encoder, settings.merge) if batch["images"] else None
        total, router, by_domain, counts, seen = 0.0, 0.0, {}, {}, {}
        for row in batch["rows"]:
            mine = rows_VD[row["rows_V"]] if rows_VD is not None else None
            hidden, losses = hidden_states(w, row, mine, settings.llm, seen)
            logits = hidden @ w["llm.output_layer.weight"].T
            token_T = logits.logsumexp(-1) - logits.gather(1, row["labels"][:, None])[:, 0]
            total, router = total + (token_T * row["mask"]).sum(), router + losses
            for domain in row["domain"][row["mask"]].unique().tolist():
                here = row["mask"] & (row["domain"] == domain)
                by_domain[domain] = by_domain.get(domain, 0.0) + token_T[here].sum().item()
                counts[domain] = counts.get(domain, 0) + int(here.sum())
        loss = total / sum(counts.values())
        names = list(trained)
        whole = loss + router / len(batch["rows"])
        made = torch.autograd.grad(whole, list(trained.values()), allow_unused=True)
        gradients = {n: torch.zeros_like(trained[n]) if g is None else g for n, g in zip(names, made, strict=True)}
        lr = optim.learning_rate(
            step,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            warmup_steps=optimizer.warmup_steps,
            steps=settings.steps,
            schedule=optimizer.schedule,
        )
        self.adam.step(optim.clipped(gradients, optimizer.clip_norm), lr)
        self.weights.update(self.adam.weights)
        self.move_biases(seen)
        parts = {f"grad_norm_{part}": optim.norm(gradients, f"{part}.") for part in ("encoder", "adapter", "llm")}
        return {
            "loss": loss.item(),
            "loss_by_domain": {domain: by_domain[domain] / counts[domain] for domain in by_domain},
            "lr": lr,
            "grad_norm": optim.norm(gradients),
            **parts,
            **experts(seen, len(batch["rows"])),
        }

    def move_biases(self, seen: Mapping) -> None:
        """By the choices of a step."""
        rate = self.settings.llm.balance.bias_update
        for prefix, (count_2E, *_) in seen.items() if rate else ():
            text, visual = f"{prefix}.router.expert_bias", f"{prefix}.router.expert_bias_visual"
            moved = (
                dict(zip((text, visual), count_2E, strict=True)) if visual in self.weights else {text: count_2E.sum(0)}
            )
            for name, count_E in moved.items():
                self.weights[name] = self.weights[name] + rate * torch.sign(count_E.mean() - count_E).float()


def experts(seen: Mapping, micro_batches: int) -> dict:
    """How the tokens of a step were spread, as metrics.jsonl names it."""
    by_layer = [seen[name] for name in sorted(seen, key=lambda name: int(name.split(".")[3]))]
    groups = {"all": lambda c: c.sum(0), "text": lambda c: c[0], "visual": lambda c: c[1]}
    loads = {group: [(of(c).max() / of(c).mean()).item() for c, *_ in by_layer] for group, of in groups.items()}
    dead = {group: [(of(c) == 0).double().mean().item() for c, *_ in by_layer] for group, of in groups.items()}
    aux, z = (sum(layer[i].item() for layer in by_layer) / len(by_layer) / micro_batches for i in (1, 2))
    return {"expert_load_max_over_mean": loads, "dead_experts": dead, "aux_loss": aux, "z_loss": z}
