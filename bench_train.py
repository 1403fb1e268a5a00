"""The benchmark of training: our step beside transformers' and a GPT-2-like model's."""
import json
import os
import time
from dataclasses import asdict
from functools import partial
from itertools import product

from configurator import ConfigError, code_version, read_json, write_text_atomically

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from checkpoint import to_hf_config
from model import HeadLoss, ModelConfig, Transformer, balance_loss, flops_per_token, run_experts
from parallel import compiled

SHAPES = {32: (96, 3, 2), 64: (176, 4, 4), 128: (352, 4, 4), 256: (704, 6, 8), 768: (2048, 12, 12)}
TOKENS, SEQUENCE, VOCABULARY = 2048, 128, 257  # tokens of a step and of a sequence; bytes and an end of text
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # FLOP/s, data sheets
EXPERT_BACKENDS = ("eager", "batched_mm", "grouped_mm")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    kinds = {"attn_implementation": "sdpa"} | ({"experts_implementation": backend} if backend else {})
    model = AutoModelForCausalLM.from_config(config, **kinds)
    forward = torch.compile(model, dynamic=False) if to_compile else model

    def loss(ids, targets):
        out = forward(ids, use_cache=False, **({"output_router_logits": True} if backend else {}))
        cross_entropy = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
        return cross_entropy + 0.01 * out.aux_loss if backend else cross_entropy

    return model, loss


class GPT2Like(nn.Module):
    """A GPT-2-like model of torch's own layers: LayerNorm, GELU, learned positions, biases."""

    def __init__(self, c):
        super().__init__()
        D, self.heads = c.hidden_size, c.num_attention_heads
        self.tokens = nn.Embedding(c.vocab_size, D)
        self.positions = nn.Embedding(c.max_position_embeddings, D)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "qkv": nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3 * D)), "out": nn.Linear(D, D),
            "mlp": nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))})
            for _ in range(c.num_hidden_layers))
        self.norm = nn.LayerNorm(D)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, ids, targets):
        B, T = ids.shape
        x = self.tokens(ids) + self.positions(torch.arange(T, device=ids.device))
        for block in self.blocks:
            qkv = block["qkv"](x).view(B, T, 3, self.heads, -1)
            y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
            x = x + block["out"](y.transpose(1, 2).reshape(x.shape))
            x = x + block["mlp"](x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def gpt2_like(c, to_compile):
    """The same for a GPT2Like."""
    model = GPT2Like(c)
    return model, torch.compile(model, dynamic=False) if to_compile else model


def contestants(family):
    """{name: function of (ModelConfig, to_compile) that makes (model, loss)}."""
    if family == "dense":
        return {"ours": ours, "Llama": hugging_face, "GPT-2-like": gpt2_like}
    mixtral = {f"Mixtral {name}": partial(hugging_face, backend=name) for name in EXPERT_BACKENDS}
    return {"ours": ours} | mixtral


def random_batch(c, tokens=TOKENS, length=SEQUENCE):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, c.vocab_size, (tokens // length, length + 1), generator=generator)
    return drawn[:, :-1].contiguous().to(DEVICE), drawn[:, 1:].contiguous().to(DEVICE)


def training_step(model, loss, batch, dtype):
    """A function that does one step as train.py does: forward and backward with products in `dtype`,
    clipping, AdamW."""
    model.to(DEVICE).train()
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(*batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def products_alone(c, dtype):
    """A function that does the matrix products of a step, both ways, but those inside attention."""
    D, width, L, E = c.hidden_size, c.intermediate_size, c.num_hidden_layers, max(c.num_local_experts, 1)
    rows = TOKENS * c.num_experts_per_tok // E if c.num_local_experts else TOKENS
    shapes = [(TOKENS, D, 3 * D, L), (TOKENS, D, D, L), (TOKENS, D, c.vocab_size, 1),
              (rows, D, 2 * width, L * E), (rows, width, D, L * E)]
    draw = partial(torch.randn, device=DEVICE, dtype=getattr(torch, dtype))
    ready = [(draw(m, k), draw(n, k), draw(m, n), times) for m, k, n, times in shapes]

    def work():
        for x, weight, grad, times in ready:
            for _ in range(times):
                x @ weight.T, grad @ weight, grad.T @ x

    return work


def alternate(works, repeats, clock):
    """{name: median seconds} of the functions `works`, one run of each in turn, after two runs to warm up."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    times = {name: [] for name in works}
    for i in range(repeats + 2):
        for name, work in works.items():
            start = now()
            work()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append(now() - start)
    return {name: float(np.median(t)) for name, t in times.items()}


def peak_bytes(step):
    """The largest sum of tensors that one step holds beyond what was there before it."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    changes = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(max(np.cumsum([0, *changes])))


def race(family, hidden, dtype, mode, options):
    """Rows of one race: each contestant's tokens/s, share of the speed of the products alone, and memory."""
    c = model_config(hidden, family)
    batch, steps = random_batch(c), {}
    for name, make in contestants(family).items():
        try:
            step = training_step(*make(c, mode == "compiled"), batch, dtype)
            step()
            steps[name] = step
        except Exception as error:  # a peer that does not run in this mode is named and left out
            if name == "ours":
                raise
            print(f"{name}, {mode}, {dtype}, left out: {str(error).strip().splitlines()[0][:90]}", flush=True)
    limit = {"products alone": products_alone(c, dtype)}
    took = alternate(steps | limit, options.repeats, options.clock)
    rows = [{"name": name, "tokens_per_s": TOKENS / t, "share_of_products": took["products alone"] / t,
             "peak_mb": peak_bytes(steps[name]) / 1e6 if name in steps else None,
             "flops_per_s": flops_per_token(c, SEQUENCE) * TOKENS / t if name == "ours" else None}
            for name, t in took.items()]
    return [{"family": family, "hidden": hidden, "dtype": dtype, "mode": mode} | row for row in rows]


def stages(family, hidden, options):
    """{stage: seconds} of our eager fp32 step: each stage alone, forward and backward, times its number."""
    c = model_config(hidden, family)
    batch = ids, targets = random_batch(c)
    model, loss = ours(c, False)
    step = training_step(model, loss, batch, "float32")
    layer, L = model.layers[0], c.num_hidden_layers
    draw = partial(torch.randn, device=DEVICE, requires_grad=True)
    x = draw(*ids.shape, c.hidden_size)
    q_k_v = [draw(len(ids), c.num_attention_heads, SEQUENCE, c.head_dim) for _ in "qkv"]
    attention, head, turns = layer.self_attn, model.lm_head.weight, model.turns[:SEQUENCE]
    parts = {"embedding": (1, lambda: model.embed_tokens(ids)), "norms": (2 * L + 1, lambda: model.norm(x)),
             "q k v and RoPE": (L, lambda: attention.turned_qkv(x, turns, model.pairs)),
             "attention": (L, lambda: F.scaled_dot_product_attention(*q_k_v, is_causal=True)),
             "output": (L, lambda: attention.o_proj(x)),
             "head and loss": (1, lambda: HeadLoss.apply(x.flatten(0, 1), head, targets.flatten()))}
    mlp, E = layer.mlp, c.num_local_experts
    if E:
        rows = draw(TOKENS * c.num_experts_per_tok, c.hidden_size)
        ends = (torch.arange(1, E + 1, device=DEVICE) * (len(rows) // E)).int()
        parts |= {"router": (L, lambda: mlp.route(x.flatten(0, 1))[0]), "whole MoE": (L, lambda: mlp(x)[0]),
                  "experts": (L, lambda: run_experts(rows, mlp.gate_up_proj, mlp.down_proj, ends))}
    else:
        parts["MLP"] = (L, lambda: mlp(x))

    def both_ways(forward):
        out = forward()
        grad = torch.ones_like(out)

        def work():
            forward().backward(grad)
            model.zero_grad()
        return work

    works = {name: both_ways(forward) for name, (_, forward) in parts.items()}
    took = alternate({"whole step": step} | works, options.repeats, options.clock)
    result = {name: took[name] * times for name, (times, _) in parts.items()}
    if E:
        result["dispatch"] = result.pop("whole MoE") - result["router"] - result["experts"]
    return result | {"optimizer and the rest": took["whole step"] - sum(result.values())}


def growth(options):
    """Rows of how a step of ours grows: tokens/s over experts at a fixed top-k, context and micro-batch."""
    variations = [  # (what, value, changes of the model, tokens of a step, tokens of a sequence)
        *(("experts", n, {"num_local_experts": n}, TOKENS, SEQUENCE) for n in (2, 4, 8, 16, 32)),
        *(("context", n, {"max_position_embeddings": n}, TOKENS, n) for n in (64, 128, 256, 512, 1024)),
        *(("sequences", n, {}, n * SEQUENCE, SEQUENCE) for n in (1, 2, 4, 8, 16, 32))]
    works = {}
    for what, value, changes, tokens, length in variations:
        c = model_config(64, "moe", **changes)
        batch = random_batch(c, tokens, length)
        works[what, value] = training_step(*ours(c, False), batch, "float32")
    took = alternate(works, options.repeats, options.clock)
    return [{"what": what, "value": value, "tokens": tokens, "tokens_per_s": tokens / took[what, value]}
            for what, value, _, tokens, _ in variations]


def draw_stages(breakdown, path):
    """The figure of where a step's time goes: one bar a model, in shares of its step."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(breakdown) + 2))
    left = np.zeros(len(breakdown))
    for i, stage in enumerate(dict.fromkeys(stage for parts in breakdown.values() for stage in parts)):
        shares = [max(0.0, parts.get(stage, 0.0)) / sum(parts.values()) for parts in breakdown.values()]
        axes.barh(list(breakdown), shares, left=left, color=pyplot.cm.tab20(i), label=stage)
        left += shares
    axes.set_xlabel("share of a training step, forward and backward")
    axes.legend(ncols=4, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def by_race(rows):
    """{(threads, family, dtype, mode, hidden): {contestant: its row}}."""
    races = {}
    for row in rows:
        race_key = tuple(row[name] for name in ("threads", "family", "dtype", "mode", "hidden"))
        races.setdefault(race_key, {})[row["name"]] = row
    return races


def ratios(rows, old_rows=(), peak=None):
    """{race: {name: ratio}} of rows: ours over the fastest peer, the products, the dense model, what it was
    in old_rows, and `peak`, a card's bf16 FLOP/s."""
    races, old, result = by_race(rows), by_race(old_rows), {}
    for race_key, by_name in races.items():
        row = by_name["ours"]
        found = result[race_key] = {"share of products": row["share_of_products"]}
        if peers := by_name.keys() - {"ours", "products alone"}:
            fastest = max(by_name[name]["tokens_per_s"] for name in peers)
            found["over the fastest peer"] = row["tokens_per_s"] / fastest
        threads, family, dtype, *rest = race_key
        if family == "moe" and (dense := races.get((threads, "dense", dtype, *rest))):
            found["FLOP/s over dense"] = row["flops_per_s"] / dense["ours"]["flops_per_s"]
        if race_key in old:
            found["over the older file"] = row["tokens_per_s"] / old[race_key]["ours"]["tokens_per_s"]
        if peak and dtype == "bfloat16":
            found["MFU"] = row["flops_per_s"] / peak
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
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    result = {"git": code_version(), "torch": torch.__version__, "transformers": transformers.__version__,
              "card": card, "options": asdict(options), "races": [], "stages": {}, "growth": []}
    for threads in options.threads if card is None else [1]:
        torch.set_num_threads(threads)
        for race_of in product(options.families, options.sizes, options.dtypes, options.modes):
            torch.compiler.reset()
            for row in race(*race_of, options):
                result["races"].append(row | {"threads": threads})
                print(threads, *race_of, row["name"], f"{row['tokens_per_s']:,.0f} tokens/s",
                      f"{row['share_of_products']:.2f} of the products", sep=", ", flush=True)
        if threads == options.threads[0]:
            for family, hidden in product(options.families, options.sizes):
                result["stages"][f"{family} {hidden}"] = stages(family, hidden, options)
            result["growth"] = growth(options)
    report_races(result, options, card)


def report_races(result, options, card):
    """Print the ratios, compare with an older file, and write the numbers and the figure."""
    old_rows = read_json(options.against)["races"] if options.against else []
    peak = next((flops for name, flops in PEAK_BF16.items() if card and name in card), None)
    for race_key, found in ratios(result["races"], old_rows, peak).items():
        print(*race_key, *(f"{name} {value:.2f}" for name, value in found.items()), sep=", ")
    os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)
    write_text_atomically(options.out, json.dumps(result, indent=1))
    draw_stages(result["stages"], os.path.splitext(options.out)[0] + ".png")
