"""The transformer: dense (Llama) and mixture of experts (Mixtral), one forward pass for both.

RMSNorm, SwiGLU, half-split RoPE, grouped-query attention, no biases. A config with num_local_experts = 0 is dense;
otherwise every MLP is num_local_experts experts of which each token uses num_experts_per_tok. Config keys are Hugging Face's.

Shape suffixes in comments: B sequences, T positions, D hidden_size, F intermediate_size, H heads, K key-value heads,
V vocabulary, L layers, E experts, k experts per token, S = B·T tokens.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


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
    eos_token_id: int | list | None = None
    num_local_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01  # of the balance loss, carried for whoever trains on
    router_bias: bool = False  # a selection-only bias on the experts (loss-free balancing)

    def __post_init__(self):
        """Raises ValueError, naming the key, for sizes no model can have."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int:
                if not isinstance(value, int) or value < (0 if f.name == "num_local_experts" else 1):
                    raise ValueError(f"{f.name} is {value!r}, must be a positive integer")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE turns pairs")
        if self.num_local_experts and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is not in 1..num_local_experts ({self.num_local_experts})")

# ---------------------------------------------------------------------------------------------------------
# Counts

def parameter_counts(c):
    """Parameters of a ModelConfig by group, and the sums the laws use.

    N: non-embedding parameters of the dense model with this backbone: one expert as its MLP, no router. (What was upcycled to
    slices of its MLP has a larger N, that of its dense model, which its lineage records.)
    N_active, N_total: non-embedding parameters of this model that a token uses, and all of them (equal to N if dense).
    """
    L, D, E = c.num_hidden_layers, c.hidden_size, c.num_local_experts
    attention = L * D * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    mlp = L * 3 * D * c.intermediate_size  # one expert
    norms = (2 * L + 1) * D
    router = L * E * D
    groups = {"embedding": c.vocab_size * D, "lm_head": 0 if c.tie_word_embeddings else c.vocab_size * D,
              "attention": attention, "mlp": mlp * max(E, 1), "router": router, "norms": norms}
    return groups | {"total": sum(groups.values()), "N": attention + mlp + norms,
                     "N_active": attention + mlp * (c.num_experts_per_tok if E else 1) + router + norms,
                     "N_total": attention + mlp * max(E, 1) + router + norms}


def flops_per_token(c, seq_len):
    """Training FLOPs a token, forward and backward: 6 a weight in a matrix product it meets (active experts, router and
    head; not the embedding look-up), and 12·H·head_dim·seq_len a layer for attention, causal half not deducted (the count
    of PaLM, arXiv 2204.02311, appendix B)."""
    n = parameter_counts(c)
    matrices = n["N_active"] - n["norms"] + c.vocab_size * c.hidden_size
    return 6 * matrices + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len


# ---------------------------------------------------------------------------------------------------------
# Pieces

def rope_frequencies(c):
    """Angular frequency of each of head_dim / 2 pairs, (head_dim / 2,) fp64. Linear and llama3 scaling as transformers defines them."""
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


def rotate(x, cos, sin):
    """RoPE on x (B, T, heads, head_dim) by cos, sin (T, 1, head_dim / 2): Llama's half-split pairing."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c.hidden_size))
        self.eps = c.rms_norm_eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.qkv_proj = nn.Linear(c.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=2)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                             enable_gqa=self.heads != self.kv_heads)  # (B, H, T, head_dim)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), gate and up stacked."""

    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def experts_grouped(x, gate_up, down, ends):
    """SwiGLU experts on rows sorted by expert: x (R, D), gate_up (E, 2F, D), down (E, D, F), ends (E,) int32 where each
    expert's rows end. Returns (R, D)."""
    gate, up = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)


@torch.compiler.disable  # compiling grouped_mm works in bf16 alone (torch 2.13)
def experts_eager(x, gate_up, down, ends):
    """experts_grouped where grouped_mm takes the type and the sizes (rows of whole 16 bytes; on CUDA bf16), else experts_loop."""
    dtypes = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float32)
    fits = x.dtype in dtypes and all(t.shape[-1] * t.element_size() % 16 == 0 for t in (gate_up, down))
    return (experts_grouped if fits else experts_loop)(x, gate_up, down, ends)


def experts_loop(x, gate_up, down, ends):
    """The same, an expert at a time."""
    out, start = [], 0
    for e, end in enumerate(ends.tolist()):
        gate, up = (x[start:end] @ gate_up[e].T).chunk(2, dim=-1)
        out.append((F.silu(gate) * up) @ down[e].T)
        start = end
    return torch.cat(out)


class MoE(nn.Module):
    """Mixtral's sparse MLP: fp32 softmax over experts, top-k, weights renormalised to sum to 1; no capacity, no drops."""

    def __init__(self, c):
        super().__init__()
        E, D, F_ = c.num_local_experts, c.hidden_size, c.intermediate_size
        self.k = c.num_experts_per_tok
        self.gate = nn.Linear(D, E, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        if c.router_bias:
            self.register_buffer("bias", torch.zeros(E))

    def forward(self, x):
        """x (B, T, D) -> (B, T, D), and the router's statistics over these tokens: assignments (E,), mean softmax (E,), z-loss ()."""
        shape, x = x.shape, x.view(-1, x.shape[-1])  # (S, D)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), self.gate.weight.to(wide))  # (S, E)
            probs = logits.softmax(-1)
            if hasattr(self, "bias"):  # moves the choice, not the weights
                chosen = (probs + self.bias).topk(self.k, dim=-1).indices
                weights = probs.gather(-1, chosen)
            else:
                weights, chosen = probs.topk(self.k, dim=-1)  # (S, k)
            weights = weights / weights.sum(-1, keepdim=True)
            z_loss = logits.logsumexp(-1).square().mean()
        # Sort the S·k assignments by expert, run each expert on its run of rows, and put the rows back.
        order = chosen.view(-1).argsort(stable=True)  # (S·k,)
        counts = torch.zeros(logits.shape[-1], dtype=torch.int64, device=x.device).scatter_add_(
            0, chosen.view(-1), torch.ones_like(order))
        ends = counts.cumsum(0).to(torch.int32)
        gate_up, down = self.gate_up_proj, self.down_proj
        rows = x[order // self.k]
        if torch.is_autocast_enabled(x.device.type):
            rows, gate_up, down = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (rows, gate_up, down))
        aligned = shape[-1] % 8 == 0 and down.shape[-1] % 8 == 0  # grouped_mm wants rows of whole 16 bytes
        experts = experts_grouped if rows.dtype == torch.bfloat16 and aligned else experts_eager
        rows = experts(rows, gate_up, down, ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        rows = rows[back].view(-1, self.k, shape[-1])  # (S, k, D)
        out = (rows * weights.unsqueeze(-1).to(rows.dtype)).sum(1)
        return out.view(shape), (counts.float(), probs.mean(0), z_loss)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c)
        self.mlp = MoE(c) if c.num_local_experts else MLP(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y = self.mlp(self.post_attention_layernorm(x))
        y, router = y if isinstance(y, tuple) else (y, None)
        return x + y, router


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
        angles = torch.outer(torch.arange(c.max_position_embeddings, dtype=torch.float64), rope_frequencies(c)).unsqueeze(1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # (max_position_embeddings, 1, head_dim / 2)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        assert sum(p.numel() for p in self.parameters()) == parameter_counts(c)["total"]

    @torch.no_grad()
    def init_weights(self, seed):
        """Fresh weights, a function of (config, seed) alone.

        | tensor                                    | distribution                     |
        |-------------------------------------------|----------------------------------|
        | embedding, head, router, q k v, gate, up  | N(0, initializer_range²)         |
        | o, down (they write to the residual)      | N(0, initializer_range² / 2L)    |
        | norms                                     | 1                                |
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            std = self.config.initializer_range
            if "o_proj" in name or "down_proj" in name:
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            p.copy_(torch.empty(p.shape).normal_(0, std, generator=generator))  # drawn on the CPU in fp32: the same on any device
        return self

    def forward(self, ids, targets=None):
        """ids (B, T) -> logits (B, T, V); with targets (B, T): (mean cross-entropy in nats, router).

        router is None for a dense model, else {"counts": (L, E) assignments, "probs": (L, E) mean softmax, "z_loss": ()}.
        Raises ValueError when T exceeds max_position_embeddings.
        """
        T = ids.shape[1]
        if T > self.config.max_position_embeddings:
            raise ValueError(f"sequence of {T} tokens exceeds max_position_embeddings {self.config.max_position_embeddings}")
        x = self.embed_tokens(ids)  # (B, T, D)
        cos, sin = self.cos[:T].to(x.dtype), self.sin[:T].to(x.dtype)
        routers = []
        for layer in self.layers:
            x, router = layer(x, cos, sin)
            routers.append(router)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))
        if not self.config.num_local_experts:
            return loss, None
        counts, probs, z_loss = (torch.stack(s) for s in zip(*routers))
        return loss, {"counts": counts, "probs": probs, "z_loss": z_loss.mean()}


def balance_loss(counts, probs):
    """Mean over layers of E·Σ f_i·P_i; 1 is balanced whatever E, k and depth (Switch, arXiv 2101.03961, eq. 4, f summing to 1).

    counts (L, E): this rank's assignments, summed over ranks here; probs (L, E): this rank's mean router softmax, whose
    gradient the ranks average.
    """
    if dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
    share = counts / counts.sum(-1, keepdim=True)
    return (counts.shape[-1] * (share * probs).sum(-1)).mean()


def effective_experts(counts):
    """exp(entropy) of the share of assignments, a layer: E when balanced, 1 when collapsed. counts (L, E) -> (L,)."""
    share = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()
