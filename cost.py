"""What a study costs, counted before it is run: hours of a device, memory of a device, disk.

The numbers of parameters, FLOPs and checkpoints are exact. Memory is counted from the tensors that a step
holds; what the allocator, the kernels and the process itself take beyond them is not in it.
"""
import os

from model import parameter_counts
from start import passes

VOCABULARY = 50_257  # of GPT-2's encoding, which is assumed for data that are not there yet


def activation_bytes(m, tokens, w, recompute=False):
    """Bytes that the backward pass of a ModelConfig needs of the forward pass of `tokens` tokens.

    w: bytes of a number in products, 4 for fp32, 2 for bf16. Counted from model.py: a layer keeps the
    residual stream before both of its norms in fp32, and in the type of products what goes into each product,
    q, k, v, the output of attention, gate, up, silu(gate) and their product. A mixture keeps the rows of the
    chosen experts too, and in fp32 the router's input. A layer that is not compiled keeps its q, k and v
    weights in another order. The head keeps its gradients. recompute: all layers but one keep their input.
    """
    D, E, F = m.hidden_size, m.num_local_experts, m.intermediate_size
    q, kv = m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
    layer = 4 * 2 * D + w * (2 * D + 2 * q + 2 * kv) + 4 * (m.num_attention_heads + 2)
    if E:
        layer += m.num_experts_per_tok * (w * (2 * D + 4 * F) + 4 * D) + 8 * E + 4 * D * (w < 4)
    else:
        layer += w * 4 * F
    kept, whole = (m.num_hidden_layers, 1) if recompute else (0, m.num_hidden_layers)
    layers = whole * (tokens * layer + w * D * (q + 2 * kv))
    return layers + tokens * (4 * kept + 4 + w) * D + 4 * m.vocab_size * D


def device_bytes(job):
    """Bytes that a sweep.Job needs on each device at the end of a forward pass: activations, and for each
    parameter weight, gradient and AdamW's two moments in fp32, and the weight in bf16 if products are.

    fsdp divides them among the ranks. Beyond its share a rank holds the gathered matrices of two layers at a
    time, the gradient of one with its copy in fp32, and weights and gradients of all that is no such matrix.
    """
    c, n, w = job.settings, parameter_counts(job.model), 2 if job.settings.dtype == "bfloat16" else 4
    matrices = n["attention"] + n["mlp"]
    if c.parallel == "fsdp" and job.ranks > 1:
        held = (0 if c.cpu_offload else 16 * n["total"] / job.ranks) + 8 * (n["total"] - matrices)
        held += matrices / job.model.num_hidden_layers * (3 * w + 4)
    else:
        held = n["total"] * (16 if w == 4 else 18)
    tokens = passes(c, job.ranks)[0] * c.max_seq_len
    return held + activation_bytes(job.model, tokens, w, c.activation_checkpointing)


def disk_bytes(job):
    """Bytes of the checkpoints of a sweep.Job that stay: weights in fp32 and AdamW's two moments, which those
    that an upcycling made have only where it keeps them."""
    kept = 3 * (len(job.settings.save_at_tokens) if job.is_trunk else 1)
    made = (3 if job.upcycling.optimizer == "copy" else 1) if job.upcycling else 0
    return 4 * parameter_counts(job.model)["total"] * (kept + made)


def flops_of(jobs):
    """FLOPs of [sweep.Job]."""
    return sum(job.flops for job in jobs)


def describe(study, jobs):
    """What [sweep.Job] cost, in words."""
    if not jobs:
        return "there is nothing to estimate"
    largest, hours = max(jobs, key=device_bytes), flops_of(jobs) / (study.flops_per_gpu * study.mfu * 3600)
    micro, n = passes(largest.settings, largest.ranks)[0], parameter_counts(largest.model)
    return "\n".join((
        f"time: {hours:,.3g} hours of one device, if training uses {study.mfu:.0%} of "
        f"{study.flops_per_gpu:.3g} FLOP/s (--mfu, --flops_per_gpu)",
        f"memory: {device_bytes(largest) / 1e9:,.3g} GB a device in the largest run, "
        f"{os.path.basename(largest.settings.out_dir)}: {n['total']:,} parameters on ranks: {largest.ranks}, "
        f"{micro} sequences of {largest.settings.max_seq_len} tokens in a pass",
        f"disk: {sum(map(disk_bytes, jobs)) / 1e9:,.3g} GB of checkpoints that stay; a run under way has up "
        f"to two more, of {12 * max(parameter_counts(j.model)['total'] for j in jobs) / 1e9:,.3g} GB"))
