"""The benchmark of training: our step beside transformers' and a GPT-2-like model's."""
import json
import os
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import product

from configurator import ConfigError, code_version, one_line, read_json, write_text_atomically

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from checkpoint import to_hf_config
from model import (HeadLoss, ModelConfig, Transformer, balance_loss, flops_per_token, narrow,
                   parameter_counts, run_experts)
from parallel import compiled
from train import Train, make_optimizer

# {hidden size: (intermediate size, layers, heads)}
SHAPES = {32: (96, 3, 2), 64: (176, 4, 4), 128: (352, 4, 4), 256: (704, 6, 8), 768: (2048, 12, 12)}
TOKENS, SEQUENCE, VOCABULARY = 2048, 128, 257  # tokens of a step and of a sequence; bytes and an end of text
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # FLOP/s, data sheets
BACKENDS = ("eager", "batched_mm", "grouped_mm")  # of the experts of transformers' Mixtral
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AUTOCAST = partial(torch.autocast, DEVICE.type, torch.bfloat16)


def model_config(hidden, family):
    return ModelConfig(VOCABULARY, hidden, *SHAPES[hidden], max_position_embeddings=SEQUENCE,
                       tie_word_embeddings=True, num_local_experts=8 if family == "moe" else 0)


def ours(c):
    """(our model, its training loss as a function of the model as it is called, ids and targets)."""
    def loss(forward, ids, targets):
        cross_entropy, router = forward(ids, targets)
        if router is None:
            return cross_entropy
        balance = balance_loss(router["counts"], router["probs"])
        return cross_entropy + 0.01 * balance + 0.001 * router["z_loss"]

    return Transformer(c).init_weights(0), loss


def hugging_face(c, backend=None):
    """The same for transformers' Llama, or its Mixtral with the expert backend `backend`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = to_hf_config(c)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    kinds = {"attn_implementation": "sdpa"} | ({"experts_implementation": backend} if backend else {})

    def loss(forward, ids, targets):
        out = forward(ids, use_cache=False, **({"output_router_logits": True} if backend else {}))
        cross_entropy = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
        return cross_entropy + 0.01 * out.aux_loss if backend else cross_entropy

    return AutoModelForCausalLM.from_config(config, **kinds), loss


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


def contestants(family, backends=BACKENDS):
    """{name: function of a ModelConfig that makes (model, loss)}."""
    if family == "dense":
        return {"ours": ours, "Llama": hugging_face,
                "GPT-2-like": lambda c: (GPT2Like(c), lambda forward, *batch: forward(*batch))}
    mixtral = {f"Mixtral {name}": partial(hugging_face, backend=name) for name in backends}
    return {"ours": ours} | mixtral


def random_batch(c, tokens=TOKENS, length=SEQUENCE):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, c.vocab_size, (tokens // length, length + 1), generator=generator)
    return drawn[:, :-1].contiguous().to(DEVICE), drawn[:, 1:].contiguous().to(DEVICE)


def weight_update(model):
    """A function that clips the gradients of `model` and takes AdamW's step, as train.py does."""
    optimizer = make_optimizer(model.to(DEVICE).train(), Train())

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
    return update


def training_step(model, dtype, loss, batch):
    """A function that does one step as train.py does: forward and backward with products in `dtype`, and
    weight_update."""
    update = weight_update(model)

    def step():
        with AUTOCAST(enabled=dtype == "bfloat16"):
            value = loss(*batch)
        value.backward()
        update()
        model.zero_grad()
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
    for name, make in contestants(family, options.backends).items():
        try:
            model, loss = make(c)
            fast = compiled if name == "ours" else partial(torch.compile, dynamic=False)
            forward = fast(model) if mode == "compiled" else model
            step = training_step(model, dtype, loss, (forward, *batch))
            step()
            steps[name] = step
        except Exception as error:  # a peer that does not run in this mode is named and left out
            if name == "ours":
                raise
            print(f"{name}, {mode}, {dtype}, left out: {one_line(error)[:90]}", flush=True)
    steps["products alone"] = products_alone(c, dtype)
    took = alternate(steps, options.repeats, options.clock)
    return [{"family": family, "hidden": hidden, "dtype": dtype, "mode": mode, "name": name,
             "tokens_per_s": TOKENS / t, "share_of_products": took["products alone"] / t,
             "peak_mb": peak_bytes(steps[name]) / 1e6,
             "flops_per_s": flops_per_token(c, SEQUENCE) * TOKENS / t if name == "ours" else None}
            for name, t in took.items()]


def stages(family, hidden, dtype, options):
    """{"STAGE, forward", "STAGE, backward", "optimizer" or "whole step": seconds} of our eager step: each
    stage alone, times its number. Dispatch is what a MoE layer takes beyond its router and its experts."""
    c, low = model_config(hidden, family), getattr(torch, dtype)
    ids, targets = random_batch(c)
    model, L, E = ours(c)[0].to(DEVICE), c.num_hidden_layers, c.num_local_experts
    layer, head, turns = model.layers[0], model.lm_head.weight, model.turns[:SEQUENCE]
    draw = partial(torch.randn, device=DEVICE, requires_grad=True)
    x, rows = draw(*ids.shape, c.hidden_size), draw(TOKENS * c.num_experts_per_tok, c.hidden_size, dtype=low)
    q_k_v = [draw(len(ids), c.num_attention_heads, SEQUENCE, c.head_dim,
                  dtype=low if DEVICE.type == "cuda" else None) for _ in "qkv"]
    attend = partial(F.scaled_dot_product_attention, *q_k_v, is_causal=True)
    attention, mlp, flat = layer.self_attn, layer.mlp, x.flatten(0, 1)
    parts = {"embedding": (1, lambda: model.embed_tokens(ids)), "norms": (2 * L + 1, lambda: model.norm(x)),
             "q k v and RoPE": (L, lambda: attention.turned_qkv(x, turns, model.pairs)),
             "attention": (L, AUTOCAST(enabled=False)(attend)), "output": (L, lambda: attention.o_proj(x))}
    if E:
        ends = (torch.arange(1, E + 1, device=DEVICE) * (len(rows) // E)).int()
        parts |= {"router": (L, lambda: mlp.route(flat)[0]), "dispatch": (L, lambda: mlp(x)[0]),
                  "experts": (L, lambda: run_experts(rows, narrow(mlp.gate_up_proj), narrow(mlp.down_proj),
                                                     ends))}
    else:
        parts["MLP"] = (L, lambda: mlp(x))
    parts["head and loss"] = (1, lambda: HeadLoss.apply(flat, head, targets.flatten()))
    (updated, _), (whole, loss) = ours(c), ours(c)
    works = {"optimizer": weight_update(updated),
             "whole step": training_step(whole, dtype, loss, (whole, ids, targets))}
    for p in updated.parameters():
        p.grad = torch.ones_like(p)
    for name, (_, part) in parts.items():
        forward = works[f"{name}, forward"] = AUTOCAST(enabled=dtype == "bfloat16")(part)
        out = forward()
        works[f"{name}, backward"] = partial(
            torch.autograd.grad, out, [x, rows, *q_k_v, *model.parameters()], torch.ones_like(out),
            retain_graph=True, allow_unused=True)
    took = alternate(works, options.repeats, options.clock)
    result = {name: t * parts.get(name.split(",")[0], (1,))[0] for name, t in took.items()}
    for way in ("forward", "backward") if E else ():
        result[f"dispatch, {way}"] -= result[f"router, {way}"] + result[f"experts, {way}"]
    return result


def growth(options, hidden=64):
    """Rows of how a step of our MoE grows: tokens/s over N and, at one `hidden` size, over experts at a fixed
    top-k, context and sequences of a pass."""
    moe, works, rows = model_config(hidden, "moe"), {}, []
    variations = [  # (what, value, ModelConfig, tokens of a step, tokens of a sequence)
        *(("hidden size", n, model_config(n, "moe"), TOKENS, SEQUENCE) for n in options.sizes),
        *(("experts", n, replace(moe, num_local_experts=n), TOKENS, SEQUENCE) for n in (2, 4, 8, 16, 32)),
        *(("context", n, replace(moe, max_position_embeddings=n), TOKENS, n)
          for n in (64, 128, 256, 512, 1024)),
        *(("sequences", n, moe, n * SEQUENCE, SEQUENCE) for n in (1, 2, 4, 8, 16, 32))]
    for what, value, c, tokens, length in variations:
        model, loss = ours(c)
        batch = model, *random_batch(c, tokens, length)
        works[what, value] = training_step(model, "float32", loss, batch)
        rows.append({"what": what, "value": value, "N": parameter_counts(c)["N"], "tokens": tokens})
    took = alternate(works, options.repeats, options.clock)
    return [row | {"tokens_per_s": row["tokens"] / t} for row, t in zip(rows, took.values())]


def draw_stages(breakdown, path):
    """The figure of where a step's time goes: a bar a model, in shares of its step, backward hatched."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {name for parts in breakdown.values() for name in parts} - {"whole step"}
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(breakdown) + 2))
    bars = [f"{model}: {1000 * parts['whole step']:,.0f} ms" for model, parts in breakdown.items()]
    left, colors = np.zeros(len(bars)), {}
    for name in sorted(names, key=lambda name: (", " not in name, name.endswith("backward"), name)):
        stage, _, way = name.partition(", ")
        color = colors.setdefault(stage, pyplot.cm.tab20(len(colors)))
        shares = [max(0.0, parts.get(name, 0.0)) / parts["whole step"] for parts in breakdown.values()]
        axes.barh(bars, shares, left=left, color=color, edgecolor="white",
                  hatch="///" if way == "backward" else "", label="_" * (way == "backward") + stage)
        left += shares
    axes.set_xlabel("share of a training step; each stage alone, backward hatched")
    axes.legend(ncols=4, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def ratios(rows, old_rows=(), peak=None):
    """{race: {name: ratio}} of rows: ours over the fastest peer, the products, the dense model, what it was
    in old_rows, and `peak`, a card's bf16 FLOP/s."""
    def race_of(row):
        return tuple(row[name] for name in ("threads", "family", "dtype", "mode", "hidden"))
    races, old = ({race_of(row): row for row in some if row["name"] == "ours"} for some in (rows, old_rows))
    result = {}
    for key, row in races.items():
        found = result[key] = {"share of products": row["share_of_products"]}
        if peers := [other["tokens_per_s"] for other in rows
                     if race_of(other) == key and other["name"] not in ("ours", "products alone")]:
            found["over the fastest peer"] = row["tokens_per_s"] / max(peers)
        if row["family"] == "moe" and (dense := races.get(race_of(row | {"family": "dense"}))):
            found["FLOP/s over dense"] = row["flops_per_s"] / dense["flops_per_s"]
        if key in old:
            found["over the older file"] = row["tokens_per_s"] / old[key]["tokens_per_s"]
        if peak and row["dtype"] == "bfloat16":
            found["MFU"] = row["flops_per_s"] / peak
    return result


def train(options):
    """A training step beside transformers' and a GPT-2-like model's, and where its time goes."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("transformers is missing: pip install -r requirements-test.txt") from None
    transformers.logging.set_verbosity_error()
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else None
    result = {"git": code_version(), "torch": torch.__version__, "transformers": transformers.__version__,
              "card": card, "options": asdict(options), "races": [], "stages": {}, "growth": []}
    for i, threads in enumerate(options.threads if card is None else [1]):
        torch.set_num_threads(threads)
        for race_of in product(options.families, options.sizes, options.dtypes, options.modes):
            torch.compiler.reset()
            for row in race(*race_of, options):
                result["races"].append(row | {"threads": threads})
                print(threads, *race_of, row["name"], f"{row['tokens_per_s']:,.0f} tokens/s",
                      f"{row['share_of_products']:.2f} of the products", f"{row['peak_mb']:,.0f} MB",
                      sep=", ", flush=True)
        if i == 0:
            for model in product(options.families, options.sizes, options.dtypes):
                result["stages"][" ".join(map(str, model))] = stages(*model, options)
            result["growth"] = growth(options)
            for row in result["growth"]:
                print(row["what"], row["value"], f"{row['tokens_per_s']:,.0f} tokens/s", sep=", ", flush=True)
    report_races(result, options, card)


def report_races(result, options, card):
    """Print the ratios, compare with an older file, and write the numbers and the figure."""
    old_rows = read_json(options.against)["races"] if options.against else []
    peak = next((flops for name, flops in PEAK_BF16.items() if card and name in card), None)
    for race_key, found in ratios(result["races"], old_rows, peak).items():
        print(*race_key, *(f"{name} {value:.2f}" for name, value in found.items()), sep=", ")
    write_text_atomically(options.out, json.dumps(result, indent=1))
    draw_stages(result["stages"], os.path.splitext(options.out)[0] + ".png")
