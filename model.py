"""The transformer: dense (Llama) and mixture of experts (Mixtral), one forward pass for both.

RMSNorm, SwiGLU, RoPE, grouped-query attention. A config with num_local_experts = 0 is dense; otherwise every
MLP is num_local_experts experts of which each token uses num_experts_per_tok. Qwen and OLMo-2 differ by
qk_norm, attention_bias and norm_after. The other keys of a config are Hugging Face's. Under autocast the
matrix products are bf16; weights, router, norms and loss stay fp32.

Shapes in comments: B sequences, T positions, D hidden_size, F intermediate_size, H heads, K key-value heads,
W = (H + 2K)·head_dim, V vocabulary, L layers, E experts, k experts per token, S = B·T tokens, R = S·k rows
that the experts compute.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from parallel import fill


@dataclass
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Hugging Face's: rope_type linear or llama3 and its factors
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
    pad_token_id: int | None = None
    num_local_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01  # of the balance loss, carried for whoever trains on
    router_bias: bool = False  # a selection-only bias on the experts (loss-free balancing)
    sliding_window: int | None = None  # tokens that a token sees; longer sequences are refused
    qk_norm: str | None = None  # norms of q and k before RoPE: "head" by head, or one over the "vector"
    attention_bias: bool = False  # biases on q, k and v
    norm_after: bool = False  # norms follow attention and MLP, where Llama's precede them

    def __post_init__(self):
        """Raises ValueError, naming the key, for sizes no model can have."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int or f.name == "sliding_window" and value is not None:
                if not isinstance(value, int) or value < (0 if f.name == "num_local_experts" else 1):
                    raise ValueError(f"{f.name} is {value!r}, must be a positive integer")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                             f"{self.num_attention_heads}")
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not divisible by "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE turns pairs")
        if self.num_local_experts and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is not in 1..num_local_experts "
                             f"({self.num_local_experts})")

    @property
    def longest(self):
        """Tokens of the longest sequence, for which a sliding window hides nothing."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

# ---------------------------------------------------------------------------------------------------------
# Counts

def parameter_counts(c):
    """Parameters of a ModelConfig by group, and the sums the laws use. Biases count as norms.

    N: non-embedding parameters of the dense model with this backbone: one expert as its MLP, no router. (The
    lineage of a model that was upcycled to slices of its MLP records a larger N, that of its dense model.)
    N_active, N_total: non-embedding parameters of this model that a token uses, and all of them; N if dense.
    """
    L, D, E = c.num_hidden_layers, c.hidden_size, c.num_local_experts
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = L * D * 2 * (q + kv)
    mlp = L * 3 * D * c.intermediate_size  # one expert
    norms_of_layer = 2 * D + {None: 0, "head": 2 * c.head_dim, "vector": q + kv}[c.qk_norm]
    norms = D + L * (norms_of_layer + (q + 2 * kv) * c.attention_bias)
    idle = mlp * (E - c.num_experts_per_tok) if E else 0
    groups = {"attention": attention, "mlp": mlp * max(E, 1), "router": L * E * D, "norms": norms}
    N_total = sum(groups.values())
    groups |= {"embedding": c.vocab_size * D, "lm_head": 0 if c.tie_word_embeddings else c.vocab_size * D}
    return groups | {"total": sum(groups.values()), "N": attention + mlp + norms,
                     "N_active": N_total - idle, "N_total": N_total}


def flops_per_token(c, seq_len):
    """Training FLOPs a token, forward and backward (PaLM, arXiv 2204.02311, appendix B): 6 for each weight
    in a matrix product that it meets (active experts, router, head; not the embedding look-up), and
    12·H·head_dim·seq_len a layer for attention, from which the causal half is not deducted."""
    n = parameter_counts(c)
    matrices = n["N_active"] - n["norms"] + c.vocab_size * c.hidden_size
    return 6 * matrices + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len


# ---------------------------------------------------------------------------------------------------------
# Pieces

def wide(t):
    """t as fp32; fp64 stays fp64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def narrow(t):
    """t in the type of matrix products: autocast's where autocast is on, else as it is."""
    kind = t.device.type
    return t.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else t


def rope_frequencies(c):
    """Angular frequency of each pair, (head_dim / 2,) fp64. Linear and llama3 scaling are as in transformers.
    Raises ValueError for any other scaling."""
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    scaling = c.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        freq = freq / scaling["factor"]
    elif kind == "llama3":  # long waves are stretched, short ones kept, those between blended
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    elif kind != "default":
        raise ValueError(f"rope_scaling type '{kind}' is not supported (default, linear, llama3 are)")
    return freq


def rope_tables(c):
    """RoPE as complex products on q k v (…, W): returns (turns, pairs).

    turns (max_position_embeddings, W / 2, 2) fp32: cosine and sine by which a position turns a pair of
    columns; pairs of v do not turn. pairs (W,): Llama pairs column i of a head with column i + head_dim / 2,
    a complex number wants neighbours, so the rows of the q k v weight are taken in this order.
    """
    angles = torch.outer(torch.arange(c.max_position_embeddings, dtype=torch.float64), rope_frequencies(c))
    turned, kept = c.num_attention_heads + c.num_key_value_heads, c.num_key_value_heads
    angles = torch.cat((angles.repeat(1, turned), torch.zeros(len(angles), kept * c.head_dim // 2)), dim=1)
    pairs = torch.arange((turned + kept) * c.head_dim)
    q_k = pairs[:turned * c.head_dim]
    q_k.copy_(q_k.view(turned, 2, -1).transpose(1, 2).flatten())
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float(), pairs


class NormFunction(torch.autograd.Function):
    """x / sqrt(mean x² + eps) · weight, by few operations where F.rms_norm takes many on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / len(weight)
        scale = (mean_square + eps).rsqrt()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, scale, weight = ctx.saved_tensors
        # With a mean of 0 it is LayerNorm's gradient, but for the part that comes of LayerNorm's own mean.
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, (True, True, False))
        grad_x += (grad @ weight).unsqueeze(-1) * scale / len(weight)
        return grad_x, grad_weight, None


class RMSNorm(nn.Module):
    def __init__(self, c, size=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size or c.hidden_size))
        self.eps = c.rms_norm_eps

    def forward(self, x, order=None):
        """x (…, size); with order (at least size,) its column j has the weight order[j]."""
        weight = self.weight if order is None else self.weight.to(x.dtype)[order[:len(self.weight)]]
        if x.is_cuda or torch.compiler.is_compiling():
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)
        return NormFunction.apply(x, weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        W = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(c.hidden_size, W, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if c.qk_norm:
            heads_in_a_norm = (1, 1) if c.qk_norm == "head" else (self.heads, self.kv_heads)
            self.q_norm, self.k_norm = (RMSNorm(c, n * self.head_dim) for n in heads_in_a_norm)

    def normed(self, qkv, order=None):
        """q k v (…, W) with norms, if any, on q and k. order (W,) of the columns is the same in each head."""
        if self.q_norm is None:
            return qkv
        q, k, v = qkv.split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q, k = (norm(t.unflatten(-1, (-1, len(norm.weight))), order).flatten(-2)
                for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        return torch.cat((q, k, v), dim=-1)

    def turned_qkv(self, x, turns, pairs):
        """q k v (B, T, W) of x (B, T, D) in at least fp32, normed, then turned by RoPE with the tables turns
        (T, W / 2, 2) and pairs. The columns of a head lie in pairs, or in halves where it is compiled."""
        if torch.compiler.is_compiling():  # the compiler knows no complex numbers
            qkv = self.normed(wide(self.qkv_proj(x)))
            a, b = qkv.unflatten(-1, (-1, 2, self.head_dim // 2)).unbind(-2)
            cos, sin = turns.to(a.dtype).unflatten(1, (-1, self.head_dim // 2)).unbind(-1)
            return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-2).flatten(-3)
        weight, bias = self.qkv_proj.weight.index_select(0, pairs), self.qkv_proj.bias
        qkv = wide(F.linear(x, weight, None if bias is None else bias[pairs]))
        qkv = self.normed(qkv, pairs).unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(qkv) * torch.view_as_complex(turns.to(qkv.dtype))
        return torch.view_as_real(turned).flatten(-2)

    def forward(self, x, turns, pairs):
        B, T, _ = x.shape
        qkv = self.turned_qkv(x, turns, pairs).view(B, T, -1, self.head_dim)
        if x.is_cuda:  # a CPU stays in fp32: its bf16 attention takes four times as long backward
            qkv = narrow(qkv.to(x.dtype))
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = qkv.transpose(1, 2).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            grouped = self.heads != self.kv_heads
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1).to(x.dtype))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), gate and up stacked."""

    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        x = narrow(x)
        # Two products, since the halves of one are not contiguous, which makes element-wise work slow.
        gate, up = (F.linear(x, w) for w in self.gate_up_proj.weight.chunk(2))
        return self.down_proj(F.silu(gate) * up)


# ---------------------------------------------------------------------------------------------------------
# Experts

@torch.library.custom_op("nanoupcycle::grouped_mm", mutates_args=())
def grouped_op(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """F.grouped_mm with a shape rule that takes fp32 too; torch's own does not, so it cannot be compiled."""
    return F.grouped_mm(x, w, offs=ends)


@grouped_op.register_fake
def _(x, w, ends):
    return x.new_empty((len(ends), x.shape[0], w.shape[1]) if w.dim() == 2 else (x.shape[0], w.shape[2]))


def grouped_backward(ctx, grad):
    x, w, ends = ctx.saved_tensors  # w is a weight transposed, so that its gradient is one too
    return grouped_op(grad, w.transpose(1, 2), ends), grouped_op(grad.T, x, ends).transpose(1, 2), None


grouped_op.register_autograd(
    grouped_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@torch.compiler.disable
def loop_mm(x, w, ends):
    """grouped_mm, an expert at a time: for types and widths that it refuses."""
    starts = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ w[e] for e, (a, b) in enumerate(zip(starts, starts[1:]))])


def grouped_mm(x, w, ends):
    """x (R, M) in order of experts, w (E, M, N), ends (E,) int32 where an expert's rows end -> (R, N)."""
    dtypes = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float32)
    if x.dtype not in dtypes or any(n * x.element_size() % 16 for n in w.shape[1:]):  # rows of whole 16 bytes
        return loop_mm(x, w, ends)
    return grouped_op(x, w, ends) if torch.compiler.is_compiling() else F.grouped_mm(x, w, offs=ends)


def run_experts(x, gate_up, down, ends):
    """SwiGLU experts: x (R, D) in their order, gate_up (E, 2F, D), down (E, D, F), ends (E,) -> (R, D)."""
    gate, up = (grouped_mm(x, w.transpose(1, 2), ends) for w in gate_up.chunk(2, dim=1))
    return grouped_mm(F.silu(gate) * up, down.transpose(1, 2), ends)


class MoE(nn.Module):
    """Mixtral's sparse MLP: fp32 softmax over experts, top-k, weights renormalised, no capacity."""

    def __init__(self, c):
        super().__init__()
        E, D, F_ = c.num_local_experts, c.hidden_size, c.intermediate_size
        self.k = c.num_experts_per_tok
        self.gate = nn.Linear(D, E, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        if c.router_bias:
            self.register_buffer("bias", torch.zeros(E))

    def route(self, x):
        """x (S, D) -> weights (S, k), chosen experts (S, k), mean softmax (E,), z-loss ()."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(wide(x), wide(self.gate.weight))  # (S, E)
            probs = logits.softmax(-1)
            if hasattr(self, "bias"):  # moves the choice, not the weights
                chosen = (probs + self.bias).topk(self.k, dim=-1).indices
                weights = probs.gather(-1, chosen)
            else:
                weights, chosen = probs.topk(self.k, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
            return weights, chosen, probs.mean(0), logits.logsumexp(-1).square().mean()

    def forward(self, x):
        """x (B, T, D) -> (B, T, D), and the router's statistics over these tokens: assignments (E,), mean
        softmax (E,), z-loss ()."""
        shape, x = x.shape, x.view(-1, x.shape[-1])  # (S, D)
        weights, chosen, probs, z_loss = self.route(x)
        # Sort the S·k assignments by expert, run each expert on its run of rows, add them to their tokens.
        chosen, weights, rows = chosen.view(-1), weights.view(-1), narrow(x)
        experts = torch.arange(len(probs), device=x.device)
        counts = torch.zeros_like(experts).scatter_add(0, chosen, torch.ones_like(chosen))
        if rows.dtype == torch.bfloat16 and not x.is_cuda:
            # A CPU makes a kernel for each number of rows, which takes longer than its use, so that rows of
            # weight 0 fill up an expert's to a multiple of 32. The last expert takes what is over.
            lacks = torch.arange(32) < (-counts % 32).unsqueeze(1)  # (E, 32)
            chosen = torch.cat((chosen, torch.where(lacks, experts.unsqueeze(1), experts[-1]).flatten()))
            weights = F.pad(weights, (0, lacks.numel()))
        chosen, order = chosen.sort(stable=True)  # (R,)
        ends = torch.searchsorted(chosen, experts, right=True, out_int32=True)
        token = (order // self.k).clamp(max=len(x) - 1)
        rows = rows.index_select(0, token)
        rows = run_experts(rows, narrow(self.gate_up_proj), narrow(self.down_proj), ends)
        rows = rows * weights.index_select(0, order).unsqueeze(1)  # (R, D) in the router's type
        out = torch.zeros_like(x, dtype=rows.dtype).index_add(0, token, rows).to(x.dtype)
        return out.view(shape), (counts.float(), probs, z_loss)


class Layer(nn.Module):
    recompute = False  # activations in the backward pass, which saves their memory

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c)
        self.mlp = MoE(c) if c.num_local_experts else MLP(c)
        self.norm_after = c.norm_after

    def forward(self, x, turns, pairs):
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self.output, x, turns, pairs, use_reentrant=False, preserve_rng_state=False)
        return self.output(x, turns, pairs)

    def output(self, x, turns, pairs):
        """x (B, T, D) and RoPE's tables -> (B, T, D), and the router's statistics or None."""
        first, second = self.input_layernorm, self.post_attention_layernorm
        y = self.self_attn(x if self.norm_after else first(x), turns, pairs)
        x = x + (first(y.to(x.dtype)) if self.norm_after else y)
        y = self.mlp(x if self.norm_after else second(x))
        y, router = y if isinstance(y, tuple) else (y, None)
        return x + (second(y.to(x.dtype)) if self.norm_after else y), router


# ---------------------------------------------------------------------------------------------------------
# Head and loss

def chunk_rows(x, weight):
    """How many tokens' logits are held at a time: 1 MB of them on a CPU, for its cache, else 256 MB."""
    return max(256, (2 ** 26 if x.is_cuda else 2 ** 18) // len(weight))


def token_losses(x, weight, targets):
    """Cross-entropy in nats of each token (S,) for x (S, D), weight (V, D), targets (S,), in chunks."""
    rows = chunk_rows(x, weight)
    return torch.cat([F.cross_entropy(wide(F.linear(part, weight)), target, reduction="none")
                      for part, target in zip(x.split(rows), targets.split(rows))])


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy in nats for x (S, D), weight (V, D), targets (S,). It never holds all logits: the
    forward pass takes a chunk's gradients while its logits are there."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        ctx.dtypes = x.dtype, weight.dtype
        x, weight = narrow(x), narrow(weight)
        grad_x, grad_weight, losses = torch.empty_like(x), wide(torch.zeros_like(weight)), []
        rows = chunk_rows(x, weight)
        chunks = zip(x.split(rows), targets.unsqueeze(1).split(rows), grad_x.split(rows))
        for part, target, grad_part in chunks:
            log_probs = wide(part @ weight.T).log_softmax(-1)  # (rows, V)
            losses.append(log_probs.gather(1, target).sum())
            grad = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=log_probs.dtype))
            grad = grad.div_(len(x)).to(x.dtype)
            torch.mm(grad, weight, out=grad_part)
            grad_weight += grad.T @ part
        ctx.save_for_backward(grad_x, grad_weight)
        return -torch.stack(losses).sum() / len(x)

    @staticmethod
    def backward(ctx, grad):
        return (*((t * grad).to(dtype) for t, dtype in zip(ctx.saved_tensors, ctx.dtypes)), None)


class Transformer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        turns, pairs = rope_tables(c)
        self.register_buffer("turns", turns, persistent=False)
        self.register_buffer("pairs", pairs, persistent=False)
        assert sum(p.numel() for p in self.parameters()) == parameter_counts(c)["total"]

    def materialise(self, weights_on, device):
        """Give a model that was built on `meta` its memory: weights, which are undefined, and buffers."""
        self.to_empty(device=weights_on)
        if self.config.tie_word_embeddings:  # they have become two
            self.lm_head.weight = self.embed_tokens.weight
        tables = dict(zip(("turns", "pairs"), rope_tables(self.config)))
        for module in self.modules():
            for name, t in module.named_buffers(recurse=False):
                setattr(module, name, tables.get(name, torch.zeros(t.shape)).to(device, t.dtype))
        return self

    @torch.no_grad()
    def init_weights(self, seed):
        """Fresh weights, a function of (config, seed) alone: N(0, initializer_range²), but for o and down,
        which write to the residual, N(0, initializer_range² / 2L). Norms are 1 and biases 0."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = self.config.initializer_range
            if "o_proj" in name or "down_proj" in name:
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            # Drawn on the CPU in fp32, so that they are the same on any device.
            fill(p, lambda t: t.copy_(torch.empty(t.shape).normal_(0, std, generator=generator)))
        return self

    def forward(self, ids, targets=None, reduction="mean"):
        """ids (B, T) -> logits (B, T, V); with targets (B, T): (cross-entropy in nats, router).

        reduction "mean": the mean over tokens; "none": each token's (B, T), meant for use without gradients.
        router is None for a dense model, else {"counts": (L, E) assignments, "probs": (L, E) mean softmax,
        "z_loss": ()}. Raises ValueError when T exceeds max_position_embeddings or a sliding window.
        """
        T = ids.shape[1]
        if T > self.config.longest:
            raise ValueError(f"{T} tokens exceed max_position_embeddings or the window {self.config.longest}")
        x = self.embed_tokens(ids)  # (B, T, D)
        turns, routers = self.turns[:T], []
        for layer in self.layers:
            x, router = layer(x, turns, self.pairs)
            routers.append(router)
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x)
        head = x.flatten(0, 1), self.lm_head.weight, targets.flatten()
        loss = HeadLoss.apply(*head) if reduction == "mean" else token_losses(*head).view_as(targets)
        if not self.config.num_local_experts:
            return loss, None
        counts, probs, z_loss = (torch.stack(s) for s in zip(*routers))
        return loss, {"counts": counts, "probs": probs, "z_loss": z_loss.mean()}


def balance_loss(counts, probs, pooled=False):
    """Mean over layers of E·Σ f_i·P_i (Switch, arXiv 2101.03961, eq. 4, with Σ f = 1); 1 is balanced. Pooled,
    f_i and P_i are means over layers, as in transformers. counts (L, E): this rank's assignments, summed over
    ranks here; probs (L, E): this rank's mean router softmax, whose gradient the ranks average."""
    if pooled:
        counts, probs = counts.sum(0), probs.mean(0)
    if dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts.shape[-1] * (counts / counts.sum(-1, keepdim=True) * probs).sum(-1).mean()


def effective_experts(counts):
    """exp(entropy) of a layer's shares, from counts (L, E) to (L,): E when balanced, 1 when collapsed."""
    share = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()
