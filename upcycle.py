"""Turn a dense checkpoint into a mixture of experts: streamed, seeded, with a proof of what was preserved.

    python upcycle.py DENSE MOE --num_local_experts=8 --num_experts_per_tok=2

DENSE is a Llama, Mistral, Phi-3, Qwen2, Qwen3 or OLMo-2 in Hugging Face's format, and MOE the mixture that
belongs to it: see formats.py. Attention, norms and embeddings are copied, every MLP becomes num_local_experts
experts, and the router is drawn, or made of clusters: see router_init. A new method is a line of this table,
an entry of METHODS in methods.py and its functions.

| method          | expert e                                                        | function preserved    |
|-----------------|-----------------------------------------------------------------|-----------------------|
| copy            | is the MLP                                                      | yes, for any router   |
| noise           | has noise_std · std(W) · N(0, 1) on noise_fraction of matrix W  | no                    |
| drop            | has drop_ratio r of its channels drawn anew, in all matrices    | 1 - r of the channels |
| drop_per_matrix | has them drawn anew, but other channels in each matrix          | (1 - r)³ of them      |
| virtual_groups  | is slice e mod G of the channels, with G times its down_proj    | yes, for whole groups |
| merge           | is the MLP of checkpoint e mod n; the rest: mean, or the first  | no                    |

Renormalised top-k weights sum to 1, so equal experts give what one of them gives. A virtual group (arXiv
2410.07524) is G experts that together are the MLP and share a router row. Top-k, a multiple of G, thus picks
it whole with weight 1/G for each slice: hence G times down_proj, the one linear matrix. Drop draws from
N(mean, std) of the block it replaces (arXiv 2502.19261). Merge is branch-train-mix (arXiv 2403.07816). Every
draw has its own seed, made of `seed` and the tensor's name, so shards and order change nothing.
Groups are whole while no two tie. Router logits are fp32 here, and of 20,000 random tokens none did. In
bf16 transformers rounds them, 5 to 40 tokens in 10,000 tie two groups (of 4 and 8), and top-k splits one.
"""
import hashlib
import itertools
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from configurator import REQUIRED, ConfigError, checked, progress, read_json, run, setting

import torch
import torch.nn.functional as F

from checkpoint import (CARD, KEYS, companions, load_model, open_moments, read_config, read_state,
                        stored_shapes, to_hf_config, tokens_known, write_moments)
from data.stream import bits_per_byte, load_tokens, locate, sequences
from files import MEMORY, atomic_directory, check_model
from formats import FORMATS, idle_tensors, written_as
from methods import METHODS, Piece, add_normal, clusters, generator, slice_of
from model import Transformer, effective_experts, parameter_counts, wide
from tensors import Stored, check_tensors, is_finite, open_tensors, write_json, write_weights

MEASURED = {"loss_before": "loss of the dense model, nats a token", "loss_after": "loss of the result",
            "bits_per_byte_before": "dense model, bits a byte", "bits_per_byte_after": "result, bits a byte",
            "relative_logit_difference": "logits, largest difference / largest",
            "kl": "KL(dense, result), nats a token", "channels_kept": "channels kept",
            "weight_change": "experts' change, RMS / std"}
KNOBS_OF_ALL = ("router_init", "router_std", "optimizer")
CLUSTER_TOKENS = 4096  # whose clusters give the rows of a router


def knobs(o):
    """{knob: value} of the settings that tell two ways of upcycling apart. A router_init of "normal" is left
    out, as in rows that are older than this setting."""
    values = {key: getattr(o, key) for key in (*METHODS[o.method].knobs, *KNOBS_OF_ALL)}
    return {key: value for key, value in values.items() if value != "normal"}

THREADS = min(os.cpu_count() or 1, 4)  # that make tensors

@dataclass
class Options:
    """Turn a dense checkpoint into a mixture of experts."""
    source: str = setting(REQUIRED, "the dense checkpoint, a Hugging Face model directory", positional=True)
    destination: str = setting(REQUIRED, "the directory to write", positional=True)
    merge_with: list[str] = setting([], "merge: further dense checkpoints of the same shape", positional=True)
    method: Literal[tuple(METHODS)] = setting("copy", "how experts are made: see the head of upcycle.py")
    num_local_experts: int = setting(8, "experts in each layer of the result", least=1)
    num_experts_per_tok: int = setting(2, "experts that a token uses", least=1)
    granularity: int = setting(1, "virtual_groups: slices of the MLP; divides the numbers above", least=1)
    router_init: Literal["normal", "clusters"] = setting(
        "normal", "router's rows: drawn, or towards clusters of what the dense model's MLP gets of the data")
    router_std: float = setting(0.02, "standard deviation of the router's weights; 1e-5 hardly more than "
                                "breaks ties", least=0)
    noise_std: float = setting(0.01, "noise: standard deviation, in units of the matrix's own", least=0)
    noise_fraction: float = setting(1.0, "noise: share of the entries that get it", least=0, most=1)
    drop_ratio: float = setting(0.5, "drop: share r of an expert's channels to draw anew", least=0, most=1)
    merge_shared: Literal["average", "first"] = setting(
        "average", "merge: attention, norms and embeddings are the mean over checkpoints, or the first one's")
    seed: int = setting(0, "seed of everything that is drawn")
    optimizer: Literal["reset", "copy"] = setting(
        "reset", "copy: an expert gets AdamW's moments of the MLP, and zeros for what is drawn anew")
    shard_size: int = setting(5_000_000_000, "largest size of a weight file in bytes, as 5e9", least=1)
    D1: int | None = setting(None, "tokens the source saw; none: as its trainer_state.json says", least=0)
    check: bool | None = setting(None, "compare both models; none: if they fit into half the memory")
    check_tokens: int = setting(4096, "tokens of the comparison", least=2)
    dataset: str | None = setting(None, "data of the comparison and of clusters; none: the source's; a "
                                  "comparison takes random tokens where there are none")
    force: bool = setting(False, "write what breaks the method's promise, and say what it costs")


def costs_of(o, sources):
    """How the settings break what the method promises, [str]. Raises ConfigError for them unless o.force, and
    for settings without meaning."""
    checked(Options, asdict(o))
    method, E, k = METHODS[o.method], o.num_local_experts, o.num_experts_per_tok
    if k > E:
        raise ConfigError(f"num_experts_per_tok = {k} is more than num_local_experts = {E}")
    if o.granularity > 1 and "granularity" not in method.knobs:
        raise ConfigError(f"granularity = {o.granularity} goes with --method=virtual_groups")
    if o.merge_with and "merge_shared" not in method.knobs:
        raise ConfigError(f"{o.merge_with[0]}: further checkpoints go with --method=merge")
    costs = method.costs(o, sources)
    if o.router_std == 0 and k < E:
        costs.append("router_std = 0 makes all experts tie: every token chooses the same ones")
    if costs and not o.force:
        raise ConfigError(f"{costs[0]} (--force writes it all the same)")
    return costs


# ---------------------------------------------------------------------------------------------------------
# What is read, and what is to be written

class Source:
    """A dense checkpoint, opened but not read. Raises ConfigError for what cannot be upcycled."""

    def __init__(self, path):
        self.path, self.config, self.state = path, read_config(path), read_state(path)
        self.json = read_json(os.path.join(path, "config.json"))
        if self.json.get("quantization_config"):
            raise ConfigError(f"{path}: config.json has a quantization_config; upcycle what was quantized")
        if self.config.num_local_experts:
            raise ConfigError(f"{path}: is a mixture of experts already; a dense checkpoint is needed")
        stored, layers = open_tensors(path), self.config.num_hidden_layers
        if layers > len(stored):
            raise ConfigError(f"{path}: config.json says {layers} layers for {len(stored)} tensors")
        stored_layout = layout(self.config, self.json["model_type"])
        check_tensors(path, stored, dict(itertools.chain(*stored_layout.values())))
        self.layout, self.tensors = layout(self.config), {}
        for parameter, views in self.layout.items():
            spans = [stored[name] for name, _ in stored_layout[parameter]]
            if len(spans) < len(views):  # one tensor holds several, row after row
                starts = itertools.accumulate((shape[0] for _, shape in views), initial=0)
                spans = [spans[0].rows(start, shape) for start, (_, shape) in zip(starts, views)]
            self.tensors |= {name: span for (name, _), span in zip(views, spans)}
        self.shapes = dict(itertools.chain(*self.layout.values()))

    def sha256(self):
        """{weight file: digest}."""
        digests = {}
        for path in sorted({span.path for span in self.tensors.values()}):
            with open(path, "rb") as f:
                digests[os.path.basename(path)] = hashlib.file_digest(f, "sha256").hexdigest()
        return digests


def layout(c, model_type=None):
    """{parameter: [(Hugging Face's name, shape), …]} of a ModelConfig in a file of model_type, in the order
    of the model. Raises ConfigError."""
    check_model(c)  # before a model of that size is made
    with torch.device("meta"):
        model = Transformer(replace(c, rope_scaling=None, max_position_embeddings=1))
    return stored_shapes(model, c, model_type)


def pieces_of(source, moe):
    """[Piece] of the result, a ModelConfig, made of a Source, in the order in which they are written."""
    pieces = []
    for parameter, views in layout(moe).items():
        dense_views = source.layout.get(parameter) or source.layout.get(parameter + ".weight")
        if not dense_views:
            layer = int(parameter.split(".")[1])
            pieces += [Piece(name, shape, pieces[0].dtype, layer=layer, drawn=True) for name, shape in views]
            continue
        stds = [[] for _ in dense_views]
        for i, (name, shape) in enumerate(views):
            expert, part = divmod(i, len(dense_views))  # gate and up in turn, or down alone
            dense_name, _ = dense_views[part]
            piece = Piece(name, shape, source.tensors[dense_name].dtype, dense_name)
            if parameter not in source.layout:
                piece.layer, piece.expert, piece.std = int(parameter.split(".")[1]), expert, stds[part]
                piece.part = part if len(dense_views) == 2 else 2
            pieces.append(piece)
    return pieces + [Piece(name, shape, pieces[0].dtype) for name, shape in idle_tensors(moe).items()]


def make_piece(o, sources, routers, p):
    """The finite tensor of a Piece, or the Span that has its very bytes. Raises ConfigError. routers: of
    cluster_rows, or {}."""
    make = METHODS[o.method].weights
    if p.drawn:  # the router: a row for each group of `granularity` experts
        if (rows := routers.get(p.layer)) is None:
            rows = torch.zeros(math.ceil(p.shape[0] / o.granularity), p.shape[1])
            add_normal(rows, 1.0, generator(o.seed, p.name))
        t = (rows * o.router_std).repeat_interleave(o.granularity, dim=0)[:p.shape[0]]
    elif p.dense_name is None:
        return torch.zeros(p.shape, dtype=p.dtype)
    elif p.expert is None and len(sources) > 1 and o.merge_shared == "average":
        t = sum(wide(s.tensors[p.dense_name].read()) for s in sources) / len(sources)
    else:
        span = sources[(p.expert or 0) % len(sources)].tensors[p.dense_name]
        if p.expert is not None and make:
            t = make(o, slice_of(o, span.read(), p).clone(), p)
        elif span.dtype == p.dtype:
            if (p.expert or 0) < len(sources):  # once, for all equal experts
                span.read_finite()
            return span
        else:  # a merged checkpoint may be of another type than the first
            t = span.read()
    t = t.to(p.dtype)
    if not is_finite(t):
        raise ConfigError(f"{p.name}: a source is not finite, or this overflows {str(p.dtype)[6:]}; if it "
                          "overflows, convert the source to bfloat16 or float32 first")
    return t


def made_early(make, pieces, pool, bar):
    """Yields make(piece) of the pieces, and moves the tqdm `bar` on. The pool makes THREADS of them ahead,
    which bounds the memory."""
    waiting, rest = deque(), iter(pieces)
    for piece in pieces:
        waiting.extend(pool.submit(make, p) for p in itertools.islice(rest, 1 + THREADS - len(waiting)))
        bar.update(piece.bytes)
        yield waiting.popleft().result()


@torch.no_grad()
def cluster_rows(o, source):
    """{layer: (groups, D) rows of the router, of mean square 1} towards clusters of the inputs of the dense
    model's MLP on tokens spread over the training data. It holds the dense model in fp32 and these inputs of
    all layers. Raises ConfigError where there is no data."""
    ids, origin, _ = ids_of(o, source, "train", CLUSTER_TOKENS)
    if origin == "random tokens":
        raise ConfigError("--router_init=clusters needs the data of the source; give it with --dataset")
    model = load_model(source.path)
    inputs = [[] for _ in model.layers]  # of each layer's MLP: (T, D) for each sequence
    for layer, seen in zip(model.layers, inputs):
        layer.mlp.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0][0]))
    with progress(len(ids), "clusters", "sequence", delay=2) as bar:
        for row in ids.split(1):
            model(row[:, :-1])
            bar.update()
    groups, width = math.ceil(o.num_local_experts / o.granularity), math.sqrt(source.config.hidden_size)
    return {i: width * clusters(torch.cat(seen), groups, generator(o.seed, "clusters", i))
            for i, seen in enumerate(inputs)}


# ---------------------------------------------------------------------------------------------------------
# What is written beside the weights

def write_upcycled_moments(o, source, pieces, directory):
    """Write AdamW's moments for every tensor of the result, zero for the router. Raises ConfigError where the
    source's do not fit its weights."""
    (step, old), make = open_moments(source.path, source.shapes), METHODS[o.method].moments

    def moment(key, power, p):
        if p.dense_name is None:
            return torch.zeros(p.shape)
        m = old[f"{key}.{p.dense_name}"].read_finite()
        return make(o, slice_of(o, m, p).clone(), p, power) if p.expert is not None and make else m
    wanted = [(key, power, p) for power, key in enumerate(KEYS, 1) for p in pieces if p.dense_name or p.drawn]
    stored = [Stored(f"{key}.{p.name}", p.shape,
                     old[f"{key}.{p.dense_name}"].dtype if p.dense_name else torch.float32)
              for key, _, p in wanted]
    write_moments(directory, step, stored, itertools.starmap(moment, wanted), o.shard_size)


# Keys of config.json that stay as the source has them, RoPE in whichever form.
KEPT_KEYS = ("torch_dtype", "dtype", "use_cache", "rope_scaling", "rope_parameters",
             "original_max_position_embeddings")


def result_state(o, source, record):
    """trainer_state.json of the result: no token seen, the source's place in its data, and the lineage."""
    lineage = {"family": "upcycled", "N": record["N"], "D1": record["D1"], "source": o.source,
               "source_sha256": record["sources"][0]["sha256"], "method": o.method, "seed": o.seed,
               **knobs(o), "dense_trunk": source.state.get("trunk"), "parent": source.state.get("lineage")}
    kept = {key: value for key, value in source.state.items() if key not in ("trunk", "passing")}
    return kept | {"step": 0, "tokens": 0, "history": [], "lineage": lineage}


# ---------------------------------------------------------------------------------------------------------
# Proof

@torch.no_grad()
def measure_weights(o, sources, directory, pieces):
    """{"channels_kept": share of the experts' channels that are the dense ones in gate, up and down,
    "weight_change": RMS of the change over the standard deviation of the dense weights}, from the files."""
    written, kept, change, there = open_tensors(directory), {}, 0.0, 0.0
    for p in [p for p in pieces if p.expert is not None]:
        new = written[p.name].read().double() / (o.granularity if p.part == 2 else 1)
        old = slice_of(o, sources[p.expert % len(sources)].tensors[p.dense_name].read(), p).double()
        same = ((new - old).abs() <= 2 * torch.finfo(p.dtype).eps * old.abs()).all(1 - p.channels)
        kept[p.layer, p.expert] = kept.get((p.layer, p.expert), True) & same
        change += (new - old).square().sum().item()
        there += (old - old.mean()).square().sum().item()
    return {"channels_kept": torch.stack(list(kept.values())).double().mean().item(),
            "weight_change": math.sqrt(change / there) if there else 0.0}


def ids_of(o, source, split, count):
    """(ids (B, T + 1) of `count` tokens of a split, where they are from, bits a byte of a loss of one nat or
    None). Raises ConfigError."""
    T = min(source.config.longest, 512, count)
    dataset = o.dataset or source.state.get("dataset")
    if not o.dataset and not (dataset and locate(dataset).is_dir()):  # the source was trained elsewhere
        shape, g = (count // T, T + 1), generator(o.seed, "check")
        return torch.randint(source.config.vocab_size, shape, generator=g), "random tokens", None
    tokens, meta = load_tokens(dataset, split)
    there = (len(tokens) - 1) // T
    if there < 1:
        raise ConfigError(f"{dataset}: fewer than {T + 1} tokens in {split}.npy")
    places = range(0, there, max(1, there * T // count))[:count // T]
    inputs, targets = sequences(tokens, places, T, torch.device("cpu"))
    ids = torch.cat((inputs, targets[:, -1:]), 1)
    if ids.max() >= source.config.vocab_size:
        raise ConfigError(f"{dataset}: holds token {ids.max()}, the model has {source.config.vocab_size}; "
                          "give the data of the source with --dataset")
    return ids, f"{split} tokens of {dataset}", bits_per_byte(1.0, meta)


@torch.no_grad()
def measure(source, directory, dtype, ids):
    """Both models on ids (B, T + 1): losses and KL in nats, largest relative difference of the logits,
    effective experts (L,)."""
    dense, moe = load_model(source.path, dtype), load_model(directory, dtype)
    rows, counts = [], []  # counts: (E,) assignments of each layer in turn, for each sequence
    for layer in moe.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: counts.append(out[1][0]))
    with progress(len(ids), "check", "sequence", delay=2) as bar:
        for row in ids.split(1):
            x, y = row[:, :-1], row[:, 1:]
            a, b = dense(x)[0].double(), moe(x)[0].double()  # (T, V)
            kl = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="batchmean", log_target=True)
            rows.append(torch.stack([F.cross_entropy(a, y[0]), F.cross_entropy(b, y[0]), kl,
                                     (a - b).abs().max(), a.abs().max()]))
            bar.update()
    loss_before, loss_after, kl, *_ = torch.stack(rows).mean(0).tolist()
    *_, difference, largest = torch.stack(rows).amax(0)  # nan if one is
    return {"loss_before": loss_before, "loss_after": loss_after, "kl": kl,
            "relative_logit_difference": (difference / largest).item(),
            "effective_experts": effective_experts(sum(torch.stack(counts).chunk(len(ids)))).tolist()}


def proof(o, sources, directory, pieces, ids, ratio, record):
    """What was kept in the files, and what both models make of ids (B, T + 1), or why they could not run. The
    ratio is that of ids_of. Raises ConfigError, unless forced, where theory says exact and they differ by
    more than rounding."""
    dtype, eps = pieces[0].dtype, torch.finfo(pieces[0].dtype).eps
    result = measure_weights(o, sources, directory, pieces)
    try:
        result |= measure(sources[0], directory, torch.promote_types(dtype, torch.float32), ids)
    except (ConfigError, RuntimeError) as error:  # the files may have a RoPE that only other tools can run
        return result | {"not_run": f"models not run: {str(error).splitlines()[0]}"}
    if ratio:
        result |= {f"bits_per_byte_{end}": ratio * result[f"loss_{end}"] for end in ("before", "after")}
    # G · down_proj is exact where G is a power of 2
    tolerance = max(1e-4, 8 * eps) if o.granularity & (o.granularity - 1) else 1e-4
    difference = result["relative_logit_difference"]
    if record["predicted"]["kl"] == 0 and not difference <= tolerance:  # nan included
        cost = f"logits differ by {difference:.1e} of the largest, where {o.method} preserves the function"
        if not o.force:
            raise ConfigError(f"{o.destination}: not kept: {cost} (--force keeps it)")
        record["costs"].append(cost)
    return result


def hints_for(E, model_type):
    """What llama.cpp and vLLM make of E experts and of a model_type, [str], as their sources have it."""
    hints = []
    if E > 512:
        hints.append(f"llama.cpp takes 512 experts at most, not {E}, unless LLAMA_MAX_EXPERTS is raised")
    if E & (E - 1) and E % 64 or E > 576:
        hints.append(f"vLLM routes {E} experts with a slow kernel, powers of two with a fast one")
    if model_type == "qwen2_moe":
        hints.append("llama.cpp does not renormalise the weights of Qwen2-MoE's experts, as this model wants")
    return hints


def name_of(path):
    return os.path.basename(os.path.abspath(path))


def model_card(record, architecture):
    """README.md for a hub. It names no licence and no base_model, which depend on the source."""
    o = record["settings"]
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:",
             "- mixture-of-experts", "- upcycled", "---", f"# {name_of(o['destination'])}", "",
             f"A {architecture} that nanoUpcycle made of dense weights.", "",
             "| source | tokens seen | file | sha256 |", "|---|---|---|---|"]
    for source in record["sources"]:
        seen = "unknown" if source["tokens"] is None else f"{source['tokens']:,}"
        lines += [f"| {name_of(source['path'])} | {seen} | {file} | `{digest}` |"
                  for file, digest in source["sha256"].items()]
    lines += ["", f"Method `{o['method']}`, seed {o['seed']}, "
              + ", ".join(f"{key} {o[key]}" for key in knobs(Options(**o))) + "."]
    return "\n".join([*lines, "", "```", summary(record), "```", ""])


def summary(record):
    """The record as a few lines for a person."""
    o, found, said = record["settings"], record["measured"], record["predicted"]
    D1 = "unknown (give it with --D1)" if record["D1"] is None else f"{record['D1']:,}"
    lines = [f"{name_of(o['destination'])}: {o['num_local_experts']} experts, "
             f"top-{o['num_experts_per_tok']}, by {o['method']}; N {record['N']:,}, D1 {D1}"]
    lines += [f"forced: {cost}" for cost in record["costs"]] + [f"hint: {hint}" for hint in record["hints"]]
    if not found:
        return "\n".join(lines + ["not compared (--check=true does it)"])
    lines.append(found.get("not_run", f"on {found['tokens']} {found['on']}:"))
    lines.append(f"{'':38}{'theory':>10}{'measured':>12}")
    for key, name in MEASURED.items():
        if key in found:
            theory = "-" if said[key] is None else f"{said[key]:.3g}"
            lines.append(f"{name:38}{theory:>10}{found[key]:12.5g}")
    if "effective_experts" in found:
        lines.append(f"effective experts by layer, at most {o['num_local_experts']}: "
                     + " ".join(f"{x:.2f}" for x in found["effective_experts"]))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# All of it

def upcycle(o):
    """Write o.destination as Options o say; returns what its upcycle.json records. Raises ConfigError."""
    sources = [Source(path) for path in (o.source, *o.merge_with)]
    first, dense = sources[0], sources[0].config
    costs = costs_of(o, sources)
    theory = {} if costs else METHODS[o.method].theory(o, dense)
    moe = replace(dense, num_local_experts=o.num_local_experts, num_experts_per_tok=o.num_experts_per_tok,
                  intermediate_size=dense.intermediate_size // o.granularity)
    pieces = pieces_of(first, moe)
    seen = tokens_known(*(s.state for s in sources))
    fits = 4 * (parameter_counts(dense)["total"] + parameter_counts(moe)["total"]) < MEMORY / 2
    ids = None
    if fits if o.check is None else o.check:
        ids, origin, ratio = ids_of(o, first, "val", o.check_tokens)
    routers = cluster_rows(o, first) if o.router_init == "clusters" else {}
    record = {"N": parameter_counts(dense)["N"], "D1": seen if o.D1 is None else o.D1, "settings": asdict(o),
              "predicted": dict.fromkeys(MEASURED) | theory, "measured": {}, "costs": costs,
              "hints": hints_for(o.num_local_experts, written_as(moe))}
    size = sum(p.bytes for p in pieces)
    with atomic_directory(o.destination, size) as directory, ThreadPoolExecutor(THREADS) as pool:
        digests = pool.map(Source.sha256, sources)  # beside the writing
        with progress(size, "upcycle", "B", delay=2) as bar:
            made = made_early(lambda p: make_piece(o, sources, routers, p), pieces, pool, bar)
            write_weights(directory, pieces, made, o.shard_size)
        kept = {key: first.json[key] for key in KEPT_KEYS if key in first.json}
        write_json(directory, "config.json", to_hf_config(moe, pieces[0].dtype) | kept)
        if o.optimizer == "copy":
            write_upcycled_moments(o, first, pieces, directory)
        record["sources"] = [{"path": s.path, "tokens": tokens_known(s.state), "sha256": digest}
                             for s, digest in zip(sources, digests)]
        write_json(directory, "trainer_state.json", result_state(o, first, record))
        if ids is not None:
            measured = proof(o, sources, directory, pieces, ids, ratio, record)
            record["measured"] = {"tokens": ids[:, 1:].numel(), "on": origin} | measured
        write_json(directory, "upcycle.json", record)
        card = {CARD: model_card(record, FORMATS[written_as(moe)]["architecture"]).encode()}
        for name, content in (companions(o.source) | card).items():
            Path(directory, name).write_bytes(content)
    return record


def main(o):
    print(summary(upcycle(o)))


if __name__ == "__main__":
    run(main, Options)
