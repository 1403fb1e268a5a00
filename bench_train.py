"""The benchmark of training: our step beside transformers' and a GPT-2-like model's."""
import json
import os
import time
from dataclasses import asdict
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from checkpoint import to_hf_config
from configurator import ConfigError, code_version
from model import (HeadLoss, ModelConfig, Transformer, balance_loss, compiled, flops_per_token,
                   run_experts, turned_qkv)

SHAPES = {32: (96, 3, 2), 64: (176, 4, 4), 128: (352, 4, 4), 256: (704, 6, 8), 768: (2048, 12, 12)}
TOKENS, SEQUENCE, VOCABULARY = 2048, 128, 257  # tokens of a step and of a sequence; bytes and an end of text
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # FLOP/s, data sheets
EXPERT_BACKENDS = ("eager", "batched_mm", "grouped_mm")


def model_config(hidden, family, **changes):
    intermediate, layers, heads = SHAPES[hidden]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": intermediate,
             "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": SEQUENCE,
             "tie_word_embeddings": True, "num_local_experts": 8 if family == "moe" else 0}
    return ModelConfig(**sizes | changes)


def ours(c, to_compile):
    """(model, its training loss as a function of ids and targets): this repository's."""
    model = Transformer(c).init_weights(0)
    forward = compiled(model) if to_compile else model

    def loss(ids, targets):
        cross_entropy, router = forward(ids, targets)
        if router is None:
            return cross_entropy
        balance = balance_loss(router["counts"], router["probs"])
        return cross_entropy + 0.01 * balance + 0.001 * router["z_loss"]

    return model, loss


def hugging_face(c, to_compile, backend=None):
    """The same for transformers' Llama, or its Mixtral with the expert backend `backend`."""
    from transformers import AutoConfig, AutoModelForCausalLM


    values = to_hf_config(c)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa",
                                             **({"experts_implementation": backend} if backend else {}))
    forward = compile_whole(model) if to_compile else model

    def loss(ids, targets):
        out = forward(ids, use_cache=False, **({"output_router_logits": True} if backend else {}))
        cross_entropy = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
        return cross_entropy + 0.01 * out.aux_loss if backend else cross_entropy

    return model, loss


def gpt2_like(c, to_compile):
    """The same for a GPT-2-like model of torch's own layers: LayerNorm, GELU, learned positions, biases."""
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            D = c.hidden_size
            self.attention_norm, self.mlp_norm = nn.LayerNorm(D), nn.LayerNorm(D)
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

        def forward(self, x):
            B, T, D = x.shape
            qkv = self.qkv(self.attention_norm(x)).view(B, T, 3, c.num_attention_heads, -1)
            y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
            return x + self.mlp(self.mlp_norm(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(c.vocab_size, c.hidden_size)
            self.positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
            self.blocks = nn.Sequential(*(Block() for _ in range(c.num_hidden_layers)))
            self.norm = nn.LayerNorm(c.hidden_size)
            for module in self.modules():
                if isinstance(module, (nn.Embedding, nn.Linear)):
                    nn.init.normal_(module.weight, 0, 0.02)

        def forward(self, ids, targets):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
            logits = F.linear(self.norm(self.blocks(x)), self.tokens.weight)
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    model = Model()
    return model, compile_whole(model) if to_compile else model


def compile_whole(model):
    return torch.compile(model, dynamic=False)


def contestants(family):
    """{name: function of (ModelConfig, to_compile) that makes (model, loss)}."""
    if family == "dense":
        return {"ours": ours, "Llama": hugging_face, "GPT-2-like": gpt2_like}
    mixtral = {f"Mixtral {name}": partial(hugging_face, backend=name) for name in EXPERT_BACKENDS}
    return {"ours": ours} | mixtral


def random_batch(c, device, tokens=TOKENS, length=SEQUENCE):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, c.vocab_size, (tokens // length, length + 1), generator=generator)
    return drawn[:, :-1].contiguous().to(device), drawn[:, 1:].contiguous().to(device)


def training_step(model, loss, batch, dtype, device):
    """A function that does one step as train.py does: forward and backward with products in `dtype`,
    clipping, AdamW."""
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(*batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def products_alone(c, dtype, device):
    """A function that does the matrix products of a step, both ways, but those inside attention."""
    D, width, L, E = c.hidden_size, c.intermediate_size, c.num_hidden_layers, max(c.num_local_experts, 1)
    rows = TOKENS * c.num_experts_per_tok // E if c.num_local_experts else TOKENS
    heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = [(TOKENS, D, heads + 2 * kv_heads, L), (TOKENS, heads, D, L), (TOKENS, D, c.vocab_size, 1),
              (rows, D, 2 * width, L * E), (rows, width, D, L * E)]
    draw = partial(torch.randn, device=device, dtype=getattr(torch, dtype))
    ready = [(draw(m, k), draw(n, k), draw(m, n), times) for m, k, n, times in shapes]

    def work():
        for x, weight, grad, times in ready:
            for _ in range(times):
                x @ weight.T, grad @ weight, grad.T @ x

    return work


def alternate(works, repeats, clock, device):
    """{name: median seconds} of the functions `works`, one run of each in turn, after two runs to warm up."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    times = {name: [] for name in works}
    for i in range(repeats + 2):
        for name, work in works.items():
            start = now()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append(now() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def peak_bytes(step, device):
    """The largest sum of tensors that one step holds beyond what was there before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    changes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(max(np.cumsum([0, *changes])))


def race(family, hidden, dtype, mode, options, device):
    """Rows of one race: each contestant's tokens/s, share of the speed of the products alone, and memory."""
    c = model_config(hidden, family)
    batch, steps = random_batch(c, device), {}
    for name, make in contestants(family).items():
        try:
            step = training_step(*make(c, mode == "compiled"), batch, dtype, device)
            step()
            steps[name] = step
        except Exception as error:  # a peer that does not run in this mode is named and left out
            if name == "ours":
                raise
            print(f"{name}, {mode}, {dtype}, left out: {str(error).strip().splitlines()[0][:90]}", flush=True)
    limit = {"products alone": products_alone(c, dtype, device)}
    took = alternate(steps | limit, options.repeats, options.clock, device)
    rows = [{"name": name, "tokens_per_s": TOKENS / t, "share_of_products": took["products alone"] / t,
             "peak_mb": peak_bytes(steps[name], device) / 1e6 if name in steps else None,
             "flops_per_s": flops_per_token(c, SEQUENCE) * TOKENS / t if name == "ours" else None}
            for name, t in took.items()]
    return [{"family": family, "hidden": hidden, "dtype": dtype, "mode": mode} | row for row in rows]


def stages(family, hidden, options, device):
    """{stage: seconds} of our eager fp32 step: each stage alone, forward and backward, times its number."""
    c = model_config(hidden, family)
    model, loss = ours(c, False)
    step = training_step(model, loss, random_batch(c, device), "float32", device)
    ids, targets = random_batch(c, device)
    layer, L, H, K = model.layers[0], c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads
    draw = partial(torch.randn, device=device, requires_grad=True)
    x = draw(*ids.shape, c.hidden_size)
    q, k, v = (draw(ids.shape[0], n, ids.shape[1], c.head_dim) for n in (H, K, K))
    attention = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=H != K)
    qkv_weight, o_weight = layer.self_attn.qkv_proj.weight, layer.self_attn.o_proj.weight
    head, turns = model.lm_head.weight, model.turns[:SEQUENCE]
    parts = {"embedding": (1, lambda: model.embed_tokens(ids)), "norms": (2 * L + 1, lambda: model.norm(x)),
             "q k v and RoPE": (L, lambda: turned_qkv(x, qkv_weight, turns, model.pairs, c.head_dim)),
             "attention": (L, lambda: attention(q, k, v)), "output": (L, lambda: x @ o_weight.T),
             "head and loss": (1, lambda: HeadLoss.apply(x.flatten(0, 1), head, targets.flatten()))}
    if c.num_local_experts:
        S, E = TOKENS, c.num_local_experts
        rows = draw(S * c.num_experts_per_tok, c.hidden_size)
        ends = (torch.arange(1, E + 1, device=device) * (len(rows) // E)).int()
        mlp = layer.mlp
        parts |= {"router": (L, lambda: mlp.route(x.view(S, -1))[0]), "whole MoE": (L, lambda: mlp(x)[0]),
                  "experts": (L, lambda: run_experts(rows, mlp.gate_up_proj, mlp.down_proj, ends))}
    else:
        parts["MLP"] = (L, lambda: layer.mlp(x))

    def both_ways(forward):
        out = forward()
        grad = torch.ones_like(out)

        def work():
            forward().backward(grad)
            model.zero_grad()
        return work

    works = {name: both_ways(forward) for name, (_, forward) in parts.items()}
    took = alternate({"whole step": step} | works, options.repeats, options.clock, device)
    result = {name: took[name] * times for name, (times, _) in parts.items()}
    if c.num_local_experts:
        result["dispatch"] = result.pop("whole MoE") - result["router"] - result["experts"]
    return result | {"optimizer and the rest": took["whole step"] - sum(result.values())}


def growth(options, device):
    """Rows of how a step of ours grows: tokens/s over experts at a fixed top-k, context and micro-batch."""
    rows, works = [], {}
    variations = {"experts": (2, 4, 8, 16, 32), "context": (64, 128, 256, 512, 1024),
                  "sequences": (1, 2, 4, 8, 16, 32)}
    for what, value in [(what, value) for what, values in variations.items() for value in values]:
        length = value if what == "context" else SEQUENCE
        tokens = value * SEQUENCE if what == "sequences" else TOKENS
        experts = {"num_local_experts": value} if what == "experts" else {}
        c = model_config(64, "moe", max_position_embeddings=length, **experts)
        batch = random_batch(c, device, tokens, length)
        works[what, value] = training_step(*ours(c, False), batch, "float32", device)
        rows.append({"what": what, "value": value, "tokens": tokens})
    took = alternate(works, options.repeats, options.clock, device)
    return [row | {"tokens_per_s": row["tokens"] / took[row["what"], row["value"]]} for row in rows]


def draw_stages(breakdown, path):
    """The figure of where a step's time goes: one bar a model, in shares of its step."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for parts in breakdown.values() for name in parts))
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(breakdown) + 2))
    for i, parts in enumerate(breakdown.values()):
        left = 0.0
        for j, name in enumerate(names):
            share = max(0.0, parts.get(name, 0.0)) / sum(parts.values())
            axes.barh(i, share, left=left, color=pyplot.cm.tab20(j))
            left += share
    axes.set_yticks(range(len(breakdown)), list(breakdown))
    axes.set_xlabel("share of a training step, forward and backward")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=pyplot.cm.tab20(j)) for j in range(len(names))]
    axes.legend(handles, names, ncols=4, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def key(row):
    return tuple(row[name] for name in ("threads", "family", "dtype", "mode", "hidden"))


def summary(rows):
    """{race: ratios} of the rows of many races: ours over the fastest peer, the share of the products."""
    best = {}
    for row in rows:
        if row["name"] not in ("ours", "products alone"):
            best[key(row)] = max(best.get(key(row), 0.0), row["tokens_per_s"])
    ours_of = {key(row): row for row in rows if row["name"] == "ours"}
    result = {}
    for race_key, row in ours_of.items():
        peer = best.get(race_key)
        result[race_key] = {"over the fastest peer": row["tokens_per_s"] / peer if peer else None,
                            "share of products": row["share_of_products"]}
        dense = ours_of.get((race_key[0], "dense", *race_key[2:]))
        if row["family"] == "moe" and dense:
            result[race_key]["FLOP/s over dense"] = row["flops_per_s"] / dense["flops_per_s"]
    return result


def train(options):
    """A training step beside transformers' and a GPT-2-like model's, and where its time goes."""
    if missing := set(options.sizes) - set(SHAPES):
        raise ConfigError(f"--sizes: {min(missing)} is none of {', '.join(map(str, SHAPES))}")
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers is missing: pip install -r requirements-test.txt") from None
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else None
    result = {"git": code_version(), "torch": torch.__version__, "transformers": transformers.__version__,
              "card": card, "options": asdict(options), "races": [], "stages": {}, "growth": []}
    for threads in options.threads if card is None else [1]:
        torch.set_num_threads(threads)
        for race_of in product(options.families, options.sizes, options.dtypes, options.modes):
            torch.compiler.reset()
            for row in race(*race_of, options, device):
                result["races"].append(row | {"threads": threads})
                print(threads, *race_of, row["name"], f"{row['tokens_per_s']:,.0f} tokens/s",
                      f"{row['share_of_products']:.2f} of the products", sep=", ", flush=True)
        if threads == options.threads[0]:
            for family, hidden in product(options.families, options.sizes):
                result["stages"][f"{family} {hidden}"] = stages(family, hidden, options, device)
            result["growth"] = growth(options, device)
    report_races(result, options, card)


def report_races(result, options, card):
    """Print the ratios, compare with an older file, and write the numbers and the figure."""
    old = {}
    if options.against:
        with open(options.against, encoding="utf-8") as f:
            old = {(*key(row), row["name"]): row["tokens_per_s"] for row in json.load(f)["races"]}
    ours_of = {key(row): row for row in result["races"] if row["name"] == "ours"}
    for race_key, ratios in summary(result["races"]).items():
        if was := old.get((*race_key, "ours")):
            ratios["over the older file"] = ours_of[race_key]["tokens_per_s"] / was
        peak = next((flops for name, flops in PEAK_BF16.items() if card and name in card), None)
        if peak and race_key[2] == "bfloat16":
            ratios["MFU"] = ours_of[race_key]["flops_per_s"] / peak
        print(*race_key, *(f"{name} {value:.2f}" for name, value in ratios.items() if value), sep=", ")
    os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)
    with open(options.out, "w", encoding="utf-8") as f:
        json.dump(result, f, indent=1)
    draw_stages(result["stages"], os.path.splitext(options.out)[0] + ".png")
