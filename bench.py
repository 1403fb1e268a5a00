"""Measure speed.

    python bench.py train     a training step beside transformers' and a GPT-2-like model's
    python bench.py laws      fitting scaling laws, on one core
    python bench.py upcycle   a 0.65B Llama to 8 experts beside cp and sync; 16 GB in the temporary directory

`train` wants an idle machine. On a busy one, `taskset -c 1 python bench.py train --threads=1 --clock=cpu` counts
the processor time of one thread.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Literal

import numpy as np

from configurator import REQUIRED, ConfigError, code_version, run, setting


HERE = os.path.dirname(os.path.abspath(__file__))


def seconds(work, repeats=5):
    """Median CPU time of `work()`, which does not count what else the machine does."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return float(np.median(times))


# ---------------------------------------------------------------------------------------------------------
# Training

SHAPES = {32: (96, 3, 2), 64: (176, 4, 4), 128: (352, 4, 4), 256: (704, 6, 8), 768: (2048, 12, 12)}
TOKENS, SEQUENCE, VOCABULARY = 2048, 128, 257  # tokens of a step and of a sequence; bytes and an end of text
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # FLOP/s by the makers' data sheets
EXPERT_BACKENDS = ("eager", "batched_mm", "grouped_mm")


def model_config(hidden, family, **changes):
    from model import ModelConfig

    intermediate, layers, heads = SHAPES[hidden]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": intermediate,
             "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": SEQUENCE,
             "tie_word_embeddings": True, "num_local_experts": 8 if family == "moe" else 0}
    return ModelConfig(**sizes | changes)


def ours(c, compiled):
    """(model, its training loss as a function of ids and targets): this repository's."""
    from model import Transformer, balance_loss, compile_layers

    model = Transformer(c).init_weights(0)
    if compiled:
        compile_layers(model)

    def loss(ids, targets):
        cross_entropy, router = model(ids, targets)
        if router is None:
            return cross_entropy
        balance = balance_loss(router["counts"], router["probs"])
        return cross_entropy + 0.01 * balance + 0.001 * router["z_loss"]

    return model, loss


def hugging_face(c, compiled, backend=None):
    """The same for transformers' Llama, or its Mixtral with the expert backend `backend`."""
    import torch.nn.functional as F
    from transformers import AutoConfig, AutoModelForCausalLM

    from checkpoint import to_hf_config

    values = to_hf_config(c)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa",
                                             **({"experts_implementation": backend} if backend else {}))
    forward = compile_whole(model) if compiled else model

    def loss(ids, targets):
        out = forward(ids, use_cache=False, **({"output_router_logits": True} if backend else {}))
        cross_entropy = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
        return cross_entropy + 0.01 * out.aux_loss if backend else cross_entropy

    return model, loss


def gpt2_like(c, compiled):
    """The same for a GPT-2-like model of torch's own layers: LayerNorm, GELU, learned positions, biases."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

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
    return model, compile_whole(model) if compiled else model


def compile_whole(model):
    import torch

    return torch.compile(model, dynamic=False)


def contestants(family):
    """{name: function of (ModelConfig, compiled) that makes (model, loss)}."""
    if family == "dense":
        return {"ours": ours, "Llama": hugging_face, "GPT-2-like": gpt2_like}
    return {"ours": ours} | {f"Mixtral {name}": partial(hugging_face, backend=name) for name in EXPERT_BACKENDS}


def random_batch(c, device, tokens=TOKENS, length=SEQUENCE):
    import torch

    drawn = torch.randint(0, c.vocab_size, (tokens // length, length + 1), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1].contiguous().to(device), drawn[:, 1:].contiguous().to(device)


def training_step(model, loss, batch, dtype, device):
    """A function that does one step as train.py does: forward and backward with products in `dtype`, clipping, AdamW."""
    import torch

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
    """A function that does the matrix products of one step, forward and backward, but for those inside attention."""
    import torch

    D, F, L, E = c.hidden_size, c.intermediate_size, c.num_hidden_layers, max(c.num_local_experts, 1)
    rows = TOKENS * c.num_experts_per_tok // E if c.num_local_experts else TOKENS  # of one expert, when balanced
    heads, kv_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = [(TOKENS, D, heads + 2 * kv_heads, L), (TOKENS, heads, D, L), (TOKENS, D, c.vocab_size, 1),
              (rows, D, 2 * F, L * E), (rows, F, D, L * E)]
    draw = partial(torch.randn, device=device, dtype=getattr(torch, dtype))
    ready = [(draw(m, k), draw(n, k), draw(m, n), times) for m, k, n, times in shapes]

    def work():
        for x, weight, grad, times in ready:
            for _ in range(times):
                x @ weight.T, grad @ weight, grad.T @ x

    return work


def alternate(works, repeats, clock, device):
    """{name: median seconds} of the functions `works`, one run of each in turn, after two runs to warm up."""
    import torch

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
    import torch
    from torch.profiler import ProfilerActivity, profile

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
    """Rows of one race: each contestant's tokens/s, its share of the speed of the products alone, and its memory."""
    from model import flops_per_token

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
    """{stage: seconds} of our eager fp32 step: each stage alone, forward and backward, times how often it comes."""
    import torch

    from model import HeadLoss, rotate, run_experts

    c = model_config(hidden, family)
    model, loss = ours(c, False)
    step = training_step(model, loss, random_batch(c, device), "float32", device)
    ids, targets = random_batch(c, device)
    layer, L, H, K = model.layers[0], c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads
    draw = partial(torch.randn, device=device, requires_grad=True)
    x, qkv = draw(*ids.shape, c.hidden_size), draw(*ids.shape, (H + 2 * K) * c.head_dim)
    q, k, v = (draw(ids.shape[0], n, ids.shape[1], c.head_dim) for n in (H, K, K))
    attention = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=H != K)
    qkv_weight, o_weight = layer.self_attn.qkv_proj.weight, layer.self_attn.o_proj.weight
    parts = {"embedding": (1, lambda: model.embed_tokens(ids)), "norms": (2 * L + 1, lambda: model.norm(x)),
             "q k v and output": (L, lambda: (x @ qkv_weight.T) @ qkv_weight[:, :1] + x @ o_weight.T),
             "RoPE": (L, lambda: rotate(qkv, model.turns[:SEQUENCE])), "attention": (L, lambda: attention(q, k, v)),
             "head and loss": (1, lambda: HeadLoss.apply(x.flatten(0, 1), model.lm_head.weight, targets.flatten()))}
    if c.num_local_experts:
        S, E = TOKENS, c.num_local_experts
        rows = draw(S * c.num_experts_per_tok, c.hidden_size)
        ends = (torch.arange(1, E + 1, device=device) * (len(rows) // E)).int()
        mlp = layer.mlp
        parts |= {"router": (L, lambda: mlp.route(x.view(S, -1))[0]), "router, dispatch, experts": (L, lambda: mlp(x)[0]),
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
        result["dispatch"] = result.pop("router, dispatch, experts") - result["router"] - result["experts"]
    return result | {"optimizer and the rest": took["whole step"] - sum(result.values())}


def growth(options, device):
    """Rows of how a step of ours grows: tokens/s over experts at a fixed top-k, context and micro-batch."""
    rows = []
    variations = [("experts", n) for n in (2, 4, 8, 16, 32)] + [("context", n) for n in (64, 128, 256, 512, 1024)]
    works = {}
    for what, n in variations + [("sequences", n) for n in (1, 2, 4, 8, 16, 32)]:
        length = n if what == "context" else SEQUENCE
        tokens = n * SEQUENCE if what == "sequences" else TOKENS
        c = model_config(64, "moe", max_position_embeddings=length, **({"num_local_experts": n} if what == "experts" else {}))
        batch = random_batch(c, device, tokens, length)
        works[what, n] = training_step(*ours(c, False), batch, "float32", device)
        rows.append({"what": what, "value": n, "tokens": tokens})
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
            axes.barh(i, share, left=left, color=pyplot.cm.tab20(j), label=name if i == 0 or name == "MLP" else None)
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
    """{race: ratios} of the rows of many races: ours over the fastest peer, and the share of the products alone."""
    best = {}
    for row in rows:
        if row["name"] not in ("ours", "products alone"):
            best[key(row)] = max(best.get(key(row), 0.0), row["tokens_per_s"])
    ours_of = {key(row): row for row in rows if row["name"] == "ours"}
    result = {}
    for race_key, row in ours_of.items():
        result[race_key] = {"over the fastest peer": row["tokens_per_s"] / best[race_key] if race_key in best else None,
                            "share of products": row["share_of_products"]}
        dense = ours_of.get((race_key[0], "dense", *race_key[2:]))
        if row["family"] == "moe" and dense:
            result[race_key]["FLOP/s over dense"] = row["flops_per_s"] / dense["flops_per_s"]
    return result


def train(options):
    """A training step beside transformers' and a GPT-2-like model's, and where its time goes."""
    import torch

    if missing := set(options.sizes) - set(SHAPES):
        raise ConfigError(f"--sizes: {min(missing)} is none of {', '.join(map(str, SHAPES))}")
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers is missing: pip install -r requirements-test.txt") from None
    transformers.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name() if device.type == "cuda" else None
    result = {"git": code_version(), "torch": torch.__version__, "transformers": transformers.__version__, "card": card,
              "options": asdict(options), "races": [], "stages": {}, "growth": []}
    for threads in options.threads if card is None else [1]:
        torch.set_num_threads(threads)
        for race_of in product(options.families, options.sizes, options.dtypes, options.modes):
            torch.compiler.reset()
            for row in race(*race_of, options, device):
                result["races"].append(row | {"threads": threads})
                print(f"{threads} threads, {row['family']} {row['hidden']} {row['dtype']} {row['mode']}, {row['name']}: "
                      f"{row['tokens_per_s']:,.0f} tokens/s, {row['share_of_products']:.2f} of the products", flush=True)
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


# ---------------------------------------------------------------------------------------------------------
# Laws

def planted(laws, N, D, D1, D2, noise=0.005):
    """Rows from laws {family: params} with noise in ln loss, one trunk a (N, D1)."""
    from laws import predict

    random, rows = np.random.default_rng(0), []
    for n in N:
        scratch = [{"D": d} for d in D]
        upcycled = [{"D1": a, "D2": b} for a in D1 for b in D2]
        for family, points in (("dense", scratch), ("moe", scratch), ("upcycled", upcycled)):
            for point in points if family in laws else ():
                loss = predict(family, laws[family], N=n, **point) * np.exp(noise * random.standard_normal())
                trunk = f"{n}-{point.get('D1', '')}"
                rows.append({"family": family, "N": n, "loss": float(loss), "trunk": trunk, **point})
    return rows


def customary_grid(rows, part):
    """Seconds that the customary fit of the dense law would take: Huber loss (delta 1e-3), L-BFGS-B with finite
    differences from 4,500 starts (arXiv 2203.15556, appendix D.3), scaled from `part` of them drawn at random.
    Returns (seconds, best objective)."""
    from scipy.optimize import minimize
    from scipy.special import huber, logsumexp

    log_n, log_d, log_loss = (np.log([row[key] for row in rows]) for key in ("N", "D", "loss"))

    def objective(t):
        predicted = logsumexp([t[0] - t[3] * log_d, t[1] - t[4] * log_n, np.full_like(log_d, t[2])], axis=0)
        return huber(1e-3, log_loss - predicted).sum()

    logs, exponents = range(0, 30, 5), np.arange(0, 2.5, 0.5)
    starts = list(product(logs, logs, np.arange(-1, 1.5, 0.5), exponents, exponents))
    chosen = np.random.default_rng(0).choice(len(starts), part, replace=False)
    begin = time.process_time()
    best = min(minimize(objective, starts[i], method="L-BFGS-B").fun for i in chosen)
    return (time.process_time() - begin) * len(starts) / part, best


def laws(options):
    """Fits on simulated rows of published size: time, and the customary grid of starts beside it."""
    from engine import fit
    from uncertainty import bootstrap, fit_with_noise

    with open(os.path.join(HERE, "laws", "liew2025.json"), encoding="utf-8") as f:
        params = {law: entry["params"] for law, entry in json.load(f)["laws"].items()}
    levels = np.geomspace(1e9, 1e11, 5)
    dense = planted({"dense": params["dense"]}, np.geomspace(1.5e7, 1e9, 12), np.geomspace(1e9, 4e11, 20), (), ())
    three = planted(params, np.geomspace(1.5e7, 1e9, 5), levels, levels, levels)
    system = {family: family for family in params}
    ours = seconds(lambda: fit(dense, {"dense": "dense"}))
    narrow = seconds(lambda: fit(dense, {"dense": "dense"}, delta=1e-3))
    print(f"dense law, {len(dense)} rows: {1000 * ours:.1f} ms ({1000 * narrow:.1f} ms at Huber's delta 1e-3)")
    print(f"three families, shared E, {len(three)} rows: {1000 * seconds(lambda: fit(three, system)):.1f} ms")
    three_fit = fit_with_noise(three, system)
    refits = seconds(lambda: bootstrap(three_fit, 1000), repeats=1)
    print(f"1,000 bootstrap refits of it, with an effect a trunk: {refits:.1f} s")
    part = 45
    grid, best = customary_grid(dense, part)
    lowest = fit(dense, {"dense": "dense"}, delta=1e-3).cost
    print(f"customary grid of 4,500 L-BFGS-B starts, finite differences, on the dense rows: {grid:.0f} s (scaled from "
          f"{part} starts), {grid / narrow:,.0f} times ours at the same delta; its lowest objective {best:.6g}, "
          f"ours {lowest:.6g}")


UPCYCLINGS = {  # arguments of upcycle.py beyond source and destination
    "copy": [], "noise": ["--method=noise"], "drop": ["--method=drop"],
    "virtual groups": ["--method=virtual_groups", "--granularity=2", "--num_local_experts=16", "--num_experts_per_tok=4"]}


def upcycle(options):
    """Upcycling a synthetic 0.65B Llama in bf16 to 8 experts by each method, beside cp and sync of the same bytes."""
    import shutil
    import subprocess
    import sys
    import tempfile
    import torch
    from checkpoint import to_hf_config
    from configurator import progress
    from model import ModelConfig, parameter_counts
    from upcycle import Piece, layout, write_weights

    c = ModelConfig(vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=22,
                    num_attention_heads=24, num_key_value_heads=8)
    root = tempfile.mkdtemp(prefix="bench_upcycle_")
    source, moe, copied = (os.path.join(root, name) for name in ("dense", "moe", "copied"))
    try:
        if shutil.disk_usage(root).free < 18e9:
            raise ConfigError(f"{root}: 18 GB are needed there, {shutil.disk_usage(root).free / 1e9:.1f} GB are free")
        os.mkdir(source)
        pieces = [Piece(name, shape, torch.bfloat16, None) for views in layout(c).values() for name, shape in views]
        with progress(sum(p.bytes for p in pieces), "synthetic Llama", "B") as bar:
            write_weights(source, pieces, 10 ** 12, lambda p: torch.empty(p.shape).normal_(0, 0.02).bfloat16(), bar)
        with open(os.path.join(source, "config.json"), "w", encoding="utf-8") as f:
            json.dump(to_hf_config(c, "bfloat16"), f)
        for method, arguments in UPCYCLINGS.items():
            times, copies, peak = [], [], 0
            for _ in range(options.repeats):
                for directory in (moe, copied):
                    shutil.rmtree(directory, ignore_errors=True)
                os.sync()
                command = [sys.executable, os.path.join(HERE, "upcycle.py"), source, moe, "--check=false", *arguments]
                took, resident = watched(command)
                times.append(took)
                peak = max(peak, resident)
                os.sync()
                begin = time.perf_counter()
                subprocess.run(["cp", "-r", moe, copied], check=True)
                os.sync()
                copies.append(time.perf_counter() - begin)
            size = sum(os.path.getsize(os.path.join(moe, name)) for name in os.listdir(moe))
            print(f"{method}: {size / 1e9:.1f} GB in {np.median(times):.1f} s, {np.median(times) / np.median(copies):.2f} "
                  f"times cp and sync (medians of {options.repeats}); {peak / 1e9:.2f} GB resident", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def watched(command):
    """Run a command; (seconds, most bytes resident beyond mapped files). Raises ConfigError where it fails."""
    import subprocess

    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as f:
                peak = max(peak, *(1024 * int(line.split()[1]) for line in f if line.startswith("RssAnon")), 0)
        except OSError:
            pass
        time.sleep(0.01)
    if process.returncode:
        raise ConfigError(f"{os.path.basename(command[1])} failed: {' '.join(command)}")
    return time.perf_counter() - begin, peak


BENCHMARKS = {"train": train, "laws": laws, "upcycle": upcycle}


@dataclass
class Options:
    """Run a benchmark and print what it measured."""
    what: Literal[tuple(BENCHMARKS)] = setting(
        REQUIRED, "; ".join(f"{name}: {f.__doc__.splitlines()[0]}" for name, f in BENCHMARKS.items()), positional=True)
    families: list[str] = setting(["dense", "moe"], "train: of the models")
    sizes: list[int] = setting([64, 128, 256], f"train: hidden sizes, of {', '.join(map(str, SHAPES))}")
    dtypes: list[str] = setting(["float32", "bfloat16"], "train: of matrix products")
    modes: list[str] = setting(["eager", "compiled"], "train: ours by layer, the others whole")
    threads: list[int] = setting([1, os.cpu_count()], "train: processor threads", least=1)
    repeats: int = setting(15, "train: steps of which the median counts; upcycle: runs", least=1)
    clock: Literal["wall", "cpu"] = setting("wall", "train: cpu counts the time of the processors")
    out: str = setting("out/bench_train.json", "train: where the numbers go; the figure goes beside it, as .png")
    against: str | None = setting(None, "train: an older file of numbers to compare with")


if __name__ == "__main__":
    run(lambda options: BENCHMARKS[options.what](options), Options)
