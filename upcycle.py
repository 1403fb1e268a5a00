"""Dense checkpoint -> mixture of experts: streamed, seeded, and with its proof of what was preserved.

    python upcycle.py DENSE MOE --num_local_experts=8 --num_experts_per_tok=2

DENSE is any Llama (or Mistral without sliding window) in Hugging Face's format, MOE becomes a Mixtral. Attention, norms and
embeddings are copied, every MLP becomes num_local_experts experts, the router is drawn from N(0, router_std²):

| method          | expert e                                                                       | function preserved     |
|-----------------|--------------------------------------------------------------------------------|------------------------|
| copy            | the MLP                                                                        | yes, for any router    |
| noise           | + noise_std · std(W) · N(0, 1) on noise_fraction of the entries of each matrix | no                     |
| drop            | drop_ratio of the channels, the same in gate, up and down, drawn again         | 1 - r of the channels  |
| drop_per_matrix | the same with a set of channels drawn for each matrix                          | (1 - r)³ of them       |
| virtual_groups  | slice e mod G of the channels, G times its down_proj                           | yes, for whole groups  |
| merge           | the MLP of checkpoint e mod n; the rest averaged, or the first one's           | no                     |

Renormalised top-k weights sum to 1, hence copy. A virtual group (arXiv 2410.07524) is G experts that together are the MLP and
share a router row, so that top-k, a multiple of G, picks it whole with weight 1/G for each slice: hence G times down_proj, the
one linear matrix. Drop draws from N(mean, std) of the block it replaces (arXiv 2502.19261). Merge is branch-train-mix (arXiv
2403.07816). Every draw has its own seed, made of `seed` and the tensor's name: shards and order change nothing.

Groups are whole while no two tie. Here router logits are fp32, and of 20,000 random tokens none did; transformers run in bf16
rounds them to bf16, where 5 to 40 tokens in 10,000 tie two groups (of 4 and 8) and top-k splits one.
"""
import dataclasses
import hashlib
import json
import math
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from checkpoint import (DTYPES, TOKENIZER_FILES, atomic_directory, hf_views, load_model, open_tensors, read_config,
                        read_json, read_state, to_hf_config)
from configurator import REQUIRED, ConfigError, progress, run, setting
from data.stream import load_tokens
from model import Transformer, effective_experts, parameter_counts

KNOBS = {"noise": ("noise_std", "noise_fraction"), "drop": ("drop_ratio",), "drop_per_matrix": ("drop_ratio",),
         "virtual_groups": ("granularity",), "merge": ("merge_shared",)}  # what tells two uses of a method apart


@dataclass
class Options:
    """Turn a dense checkpoint into a mixture of experts."""
    source: str = setting(REQUIRED, "the dense checkpoint, a Hugging Face model directory", positional=True)
    destination: str = setting(REQUIRED, "the directory to write", positional=True)
    merge_with: list[str] = setting([], "method merge: further dense checkpoints of the same shape", positional=True)
    method: Literal["copy", "noise", "drop", "drop_per_matrix", "virtual_groups", "merge"] = setting(
        "copy", "how experts are made of the MLP: see the head of upcycle.py")
    num_local_experts: int = setting(8, "experts in each layer of the result, as its config.json will say")
    num_experts_per_tok: int = setting(2, "experts a token uses, likewise")
    granularity: int = setting(1, "virtual_groups: slices G the MLP is split into; num_local_experts and num_experts_per_tok are multiples of it")
    router_std: float = setting(0.02, "standard deviation of the router's weights")
    noise_std: float = setting(0.01, "noise: standard deviation, in units of the matrix's own")
    noise_fraction: float = setting(1.0, "noise: share of the entries that get it")
    drop_ratio: float = setting(0.5, "drop: share r of each expert's intermediate channels that is drawn again")
    merge_shared: Literal["average", "first"] = setting("average", "merge: attention, norms and embeddings of all checkpoints or of the first")
    seed: int = setting(0, "of everything that is drawn")
    optimizer: Literal["reset", "copy"] = setting("reset", "copy: AdamW's moments come along, for each expert; zero where weights are drawn")
    shard_size: str = setting("5GB", "largest size of a weight file, as 500MB or 5GB")
    D1: int | None = setting(None, "tokens the source has seen; None: as its trainer_state.json says")
    check: bool | None = setting(None, "run both models and compare; None: if they fit half the memory at 4 bytes a parameter")
    check_tokens: int = setting(4096, "tokens of the comparison")
    dataset: str | None = setting(None, "directory whose validation tokens are used; None: the one the source was trained on, else random tokens")
    force: bool = setting(False, "write even what does not preserve what its method promises")


# ---------------------------------------------------------------------------------------------------------
# What is read, and what is refused

class Source:
    """A dense checkpoint, opened: nothing of its weights is read yet. Raises ConfigError for what Mixtral cannot express."""

    def __init__(self, path):
        self.path, self.config, self.state = path, read_config(path), read_state(path)
        self.json = read_json(os.path.join(path, "config.json"))
        if self.json.get("quantization_config"):
            raise ConfigError(f"{path}: config.json has a quantization_config; upcycle the weights it was made of")
        if self.config.num_local_experts:
            raise ConfigError(f"{path}: is a mixture of experts already; a dense checkpoint is needed")
        self.tensors = open_tensors(path)
        if self.config.num_hidden_layers > len(self.tensors):
            raise ConfigError(f"{path}: config.json says {self.config.num_hidden_layers} layers, the weights have {len(self.tensors)} tensors")
        expected = {name: shape for views in layout(self.config, path).values() for name, shape in views}
        for name, shape in expected.items():
            if name not in self.tensors:
                raise ConfigError(f"{path}: tensor {name} is missing")
            found = self.tensors[name].get_slice(name)
            if tuple(found.get_shape()) != shape:
                raise ConfigError(f"{path}: {name} is {tuple(found.get_shape())}, config.json wants {shape}")
            if self.tensors[name].get_tensor(name).dtype not in DTYPES.values():
                raise ConfigError(f"{path}: {name} is of type {found.get_dtype()}; only {', '.join(DTYPES)} can be upcycled")
        self.unused = sorted(set(self.tensors) - set(expected))
        for name in self.unused:  # position tables, and the copy of tied embeddings that some tools write
            if not (name.endswith("rotary_emb.inv_freq") or self.config.tie_word_embeddings and name == "lm_head.weight"):
                raise ConfigError(f"{path}: tensor {name} has no place in Mixtral")
        index = os.path.join(path, "model.safetensors.index.json")
        single = os.path.exists(os.path.join(path, "model.safetensors"))
        weight_map = {} if single else read_json(index)["weight_map"]
        self.files, self.at = sorted(set(weight_map.values())) or ["model.safetensors"], {}
        for file in self.files:
            f = open(os.path.join(path, file), "rb")
            n = int.from_bytes(f.read(8), "little")
            for name, entry in json.loads(f.read(n)).items():
                if name in self.tensors and weight_map.get(name, file) == file:
                    self.at[name] = f, 8 + n + entry["data_offsets"][0]

    def read(self, name):
        """The tensor, memory-mapped; `at` says where in which file."""
        t = self.tensors[name].get_tensor(name)
        t.at = self.at[name]
        return t


def layout(c, where=""):
    """{parameter: [(Hugging Face's name, shape), …]} of a ModelConfig, in the order of the model. Raises ConfigError."""
    try:
        with torch.device("meta"):
            model = Transformer(dataclasses.replace(c, rope_scaling=None, max_position_embeddings=1))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"{where}: config.json describes no possible model: {error}") from None
    return {name: [(hf_name, tuple(view.shape)) for hf_name, view in hf_views(name, t, c)] for name, t in model.state_dict().items()
            if not (c.tie_word_embeddings and name == "lm_head.weight")}


def refuse(o, dense):
    """Raises ConfigError for settings without meaning, and, unless forced, for those that break what the method promises."""
    E, k, G, F_ = o.num_local_experts, o.num_experts_per_tok, o.granularity, dense.intermediate_size
    for key, low, high in (("num_local_experts", 1, None), ("num_experts_per_tok", 1, E), ("granularity", 1, F_), ("router_std", 0, None),
                           ("noise_std", 0, None), ("noise_fraction", 0, 1), ("drop_ratio", 0, 1), ("check_tokens", 2, None)):
        if getattr(o, key) < low or high is not None and getattr(o, key) > high:
            raise ConfigError(f"{key} = {getattr(o, key)} is not in {low}..{'' if high is None else high}")
    if G > 1 and o.method != "virtual_groups":
        raise ConfigError(f"granularity = {G} goes with --method=virtual_groups")
    if F_ % G:
        raise ConfigError(f"granularity = {G} does not divide intermediate_size {F_}: the slices would differ in size")
    if bool(o.merge_with) != (o.method == "merge"):
        raise ConfigError("--method=merge and further checkpoints after the destination go together")
    if o.method == "merge" and o.optimizer == "copy":
        raise ConfigError("--optimizer=copy: merged checkpoints have a set of moments each, and no right one")
    n = 1 + len(o.merge_with)
    for broken, why in (
            (k % G, f"num_experts_per_tok = {k} is not a multiple of granularity = {G}: a token would get part of a group, and "
                    f"{k % G} of its {k} experts would not add up to an MLP"),
            (E % G, f"num_local_experts = {E} is not a multiple of granularity = {G}: the last group would lack {G - E % G} of its slices"),
            (E % n, f"num_local_experts = {E} is not a multiple of the {n} checkpoints: some would have more experts than others"),
            (o.router_std == 0 and k < E, "router_std = 0 makes all experts tie: every token would choose the same ones")):
        if broken and not o.force:
            raise ConfigError(f"{why} (--force to do it all the same)")


def knobs(o):
    """{knob: value} of the settings that tell two ways of upcycling apart: the method's own, and those of all methods."""
    return {key: getattr(o, key) for key in (*KNOBS.get(o.method, ()), "router_std", "optimizer")}


def parse_size(text):
    """Bytes of 5GB, 500MB, 64KB or a plain number; powers of 1000 as Hugging Face counts. Raises ConfigError."""
    units = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    number = text.strip().upper().rstrip("BKMGT")
    try:
        size = int(float(number) * units[text.strip().upper()[len(number):]])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ConfigError(f"shard_size = '{text}' is no size such as 500MB or 5GB")
    return size


# ---------------------------------------------------------------------------------------------------------
# What is to be written

class Piece(NamedTuple):
    """A tensor of the result and what it is made of."""
    name: str
    shape: tuple
    dtype: torch.dtype
    old: str | None  # the dense tensor; None: the router, drawn
    layer: int = 0
    e: int | None = None  # expert; None: not an expert's
    part: int = 0  # gate 0, up 1, down 2

    @property
    def bytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def channels(self):
        """The dimension of the intermediate channels: gate and up are (F, D), down is (D, F)."""
        return 1 if self.part == 2 else 0


def plan(source, moe):
    """[Piece] of the whole result, in the order it is written."""
    before, pieces = layout(source.config), []
    for parameter, views in layout(moe).items():
        if parameter.endswith("mlp.gate.weight"):
            down = before[parameter.replace("gate.weight", "down_proj.weight")][0][0]
            pieces += [Piece(name, shape, source.read(down).dtype, None) for name, shape in views]
        elif ".mlp." in parameter:
            olds = [old for old, _ in before[parameter + ".weight"]]  # gate and up, or down
            for i, (name, shape) in enumerate(views):
                e, part = divmod(i, len(olds))
                old = olds[part]
                pieces.append(Piece(name, shape, source.read(old).dtype, old, int(parameter.split(".")[1]), e, part if len(olds) == 2 else 2))
        else:
            pieces += [Piece(name, shape, source.read(name).dtype, name) for name, shape in views]
    return pieces


# ---------------------------------------------------------------------------------------------------------
# Methods

def generator(*key):
    """A random generator that is a function of `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def wide(dtype):
    """The type to compute in."""
    return torch.promote_types(dtype, torch.float32)


def normal(t, *key):
    """N(0, 1) of t's shape, fp32, or fp64 for an fp64 t."""
    return torch.empty(t.shape, dtype=wide(t.dtype)).normal_(generator=generator(*key))


def dropped(o, channels, p):
    """The channels an expert draws again: one set, or one for each matrix."""
    key = (o.seed, "channels", p.layer, p.e) + ((p.part,) if o.method == "drop_per_matrix" else ())
    return torch.randperm(channels, generator=generator(*key))[:round(o.drop_ratio * channels)]


def make_expert(o, w, p):
    """An expert's matrix out of the dense one: gate and up (F, D), down (D, F)."""
    if o.method == "noise":
        delta = normal(w, o.seed, p.name).mul_(o.noise_std * w.to(wide(w.dtype)).std())
        if o.noise_fraction < 1:
            delta *= torch.empty(w.shape).uniform_(generator=generator(o.seed, "entries", p.name)) < o.noise_fraction
        return delta.add_(w).to(w.dtype)
    if o.method in ("drop", "drop_per_matrix"):
        channels = dropped(o, w.shape[p.channels], p)
        if not len(channels):
            return w
        block = w.index_select(p.channels, channels).to(wide(w.dtype))
        fresh = normal(block, o.seed, p.name).mul_(block.std()).add_(block.mean())
        return w.index_copy(p.channels, channels, fresh.to(w.dtype))
    if o.method == "virtual_groups":
        size = w.shape[p.channels] // o.granularity
        slice_ = w.narrow(p.channels, p.e % o.granularity * size, size)
        return slice_ * o.granularity if p.part == 2 else slice_
    return w  # copy and merge


def make_moment(o, m, p, power):
    """Adam's moment (power 1 or 2 of the gradient) of the same matrix: a weight G times as large has a gradient G times smaller."""
    if o.method in ("drop", "drop_per_matrix"):
        return m.index_fill(p.channels, dropped(o, m.shape[p.channels], p), 0)
    if o.method == "virtual_groups":
        size = m.shape[p.channels] // o.granularity
        slice_ = m.narrow(p.channels, p.e % o.granularity * size, size)
        return slice_ / o.granularity ** power if p.part == 2 else slice_
    return m


def make_router(o, p):
    """(E, D) from N(0, router_std²), a row for each group."""
    groups = math.ceil(o.num_local_experts / o.granularity)
    rows = normal(torch.empty(groups, p.shape[1], dtype=p.dtype), o.seed, p.name) * o.router_std
    return rows.repeat_interleave(o.granularity, dim=0)[:o.num_local_experts]


def make(o, sources, p):
    """The tensor of a Piece; a copy is the very tensor that Source.read gave."""
    if p.old is None:
        t = make_router(o, p)
    elif p.e is not None:
        t = make_expert(o, sources[p.e % len(sources)].read(p.old), p)
    elif len(sources) > 1 and o.merge_shared == "average":
        t = sum(s.read(p.old).to(wide(p.dtype)) for s in sources) / len(sources)
    else:
        t = sources[0].read(p.old)
    t = t.to(p.dtype)
    if p.dtype == torch.float16 and o.method != "copy" and not t.isfinite().all():
        raise ConfigError(f"{p.name}: overflows float16; convert the source to bfloat16 or float32 first")
    return t


# ---------------------------------------------------------------------------------------------------------
# Writing

SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def shards(pieces, shard_size):
    """`pieces` cut into runs of at most shard_size bytes (a larger tensor alone)."""
    result, size = [[]], 0
    for p in pieces:
        if result[-1] and size + p.bytes > shard_size:
            result.append([])
            size = 0
        result[-1].append(p)
        size += p.bytes
    return result


def copy_bytes(f, source, position, count):
    """Append `count` bytes of an open file to f, inside the kernel: a third of the CPU time of writing out a memory map."""
    f.flush()
    while count:
        sent = os.sendfile(f.fileno(), source.fileno(), position, count)
        if not sent:
            raise OSError(f"{source.name} ended early")
        position, count = position + sent, count - sent
    f.seek(0, os.SEEK_END)


def write_shard(path, pieces, make_tensor, bar):
    """A safetensors file, header first, then each tensor as it is made: memory for one at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for p in pieces:
        start, end = end, end + p.bytes
        header[p.name] = {"dtype": SAFETENSORS_NAMES[p.dtype], "shape": p.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for p in pieces:
            t = make_tensor(p)
            assert t.shape == p.shape and t.dtype == p.dtype, p.name
            if sys.platform == "linux" and hasattr(t, "at"):
                copy_bytes(f, *t.at, t.nbytes)
            else:
                f.write(t.view(-1).view(torch.uint8).numpy())
            bar.update(t.nbytes)


def write_weights(directory, pieces, shard_size, make_tensor, bar):
    """model.safetensors, or shards and their index."""
    runs = shards(pieces, shard_size)
    names = ["model.safetensors"] if len(runs) == 1 else [f"model-{i + 1:05d}-of-{len(runs):05d}.safetensors" for i in range(len(runs))]
    for name, run_ in zip(names, runs):
        write_shard(os.path.join(directory, name), run_, make_tensor, bar)
    if len(runs) > 1:
        total = sum(p.bytes for p in pieces)
        write_json(directory, "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": {p.name: name for name, run_ in zip(names, runs) for p in run_}})


def write_json(directory, name, value):
    with open(os.path.join(directory, name), "w") as f:
        json.dump(value, f, indent=2)


def mixtral_config(source, moe, dtype):
    """config.json of the result; what it does not change is as the source had it, RoPE in whichever form."""
    kept = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "rope_scaling", "rope_parameters")
    return to_hf_config(moe, str(dtype).removeprefix("torch.")) | {key: source[key] for key in kept if key in source}


def write_moments(o, source, pieces, directory):
    """optimizer.pt of the result: Adam's moments for every tensor, zero for the router and for channels drawn again."""
    path = os.path.join(source.path, "optimizer.pt")
    try:
        old = torch.load(path, weights_only=True, mmap=True)
        new = {"step": old["step"], "exp_avg": {}, "exp_avg_sq": {}}
        for power, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
            for p in pieces:
                m = torch.zeros(p.shape) if p.old is None else old[key][p.old]
                if p.old and m.shape != source.read(p.old).shape:
                    raise ValueError(f"{key} of {p.old} is {tuple(m.shape)}")
                new[key][p.name] = m if p.e is None else make_moment(o, m, p, power)
    except (OSError, KeyError, ValueError, AttributeError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path}: --optimizer=copy needs AdamW's moments there: {str(error).splitlines()[0]}") from None
    torch.save(new, os.path.join(directory, "optimizer.pt"))


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------
# Proof

def predict(o, source):
    """What theory says that `measure` will find; None where it says nothing."""
    E, k, G, F_ = o.num_local_experts, o.num_experts_per_tok, o.granularity, source.config.intermediate_size
    exact = o.method == "copy" or o.method == "virtual_groups" and k % G == 0 and E % G == 0
    r = round(o.drop_ratio * F_) / F_
    noise = o.noise_std * math.sqrt(o.noise_fraction)
    kept, change = {"noise": (float(noise == 0), noise), "drop": (1 - r, math.sqrt(2 * r)),
                    "drop_per_matrix": ((1 - r) ** 3, math.sqrt(2 * r))}.get(o.method, (1.0, 0.0))
    return {"relative_logit_difference": 0.0 if exact else None, "kl": 0.0 if exact else None, "channels_kept": kept, "weight_change": change}


@torch.no_grad()
def measure_weights(o, sources, directory, pieces):
    """{"channels_kept": share of the experts' channels that are the dense ones in gate, up and down,
    "weight_change": RMS of what changed over the standard deviation of what was there}, from the files as written."""
    written, kept, change, there = open_tensors(directory), {}, 0.0, 0.0
    for p in pieces:
        if p.e is None:
            continue
        new = written[p.name].get_tensor(p.name).double() / (o.granularity if p.part == 2 else 1)
        old = sources[p.e % len(sources)].read(p.old).chunk(o.granularity, p.channels)[p.e % o.granularity].double()
        same = (new - old).abs() <= 2 * torch.finfo(p.dtype).eps * old.abs()
        kept[p.layer, p.e] = kept.get((p.layer, p.e), True) & same.all(1 - p.channels)
        change += (new - old).square().sum().item()
        there += (old - old.mean()).square().sum().item()
    return {"channels_kept": torch.stack(list(kept.values())).double().mean().item(), "weight_change": math.sqrt(change / there) if there else 0.0}


def check_ids(o, source):
    """(ids (B, T + 1), where they are from) to compare the models on."""
    T = min(source.config.max_position_embeddings, 512, o.check_tokens)
    dataset = o.dataset or source.state.get("dataset")
    try:
        tokens, _ = load_tokens(dataset, "val") if dataset else (None, None)
    except ConfigError:
        if o.dataset:
            raise
        tokens = None  # trained elsewhere
    if tokens is None:
        g = generator(o.seed, "check")
        return torch.randint(source.config.vocab_size, (max(1, o.check_tokens // T), T + 1), generator=g), "random tokens"
    rows = min(o.check_tokens, len(tokens) - 1) // T
    if rows < 1:
        raise ConfigError(f"{dataset}: fewer than {T + 1} validation tokens")
    ids = torch.stack([torch.from_numpy(tokens[i * T:(i + 1) * T + 1].astype("int64")) for i in range(rows)])
    if ids.max() >= source.config.vocab_size:
        raise ConfigError(f"{dataset}: holds token {ids.max()}, the model has {source.config.vocab_size}; give its own with --dataset")
    return ids, f"validation tokens of {dataset}"


@torch.no_grad()
def measure(source, directory, dtype, ids):
    """Both models on ids (B, T + 1): losses and KL in nats, largest relative difference of the logits, effective experts (L,)."""
    dense, moe = load_model(source.path, dtype), load_model(directory, dtype)
    counts, sums, largest, difference = [0] * len(moe.layers), torch.zeros(3, dtype=torch.float64), [], []
    for i, layer in enumerate(moe.layers):
        layer.mlp.register_forward_hook(lambda module, args, out, i=i: counts.__setitem__(i, counts[i] + out[1][0]))
    with progress(len(ids), "check", "sequence", delay=2) as bar:
        for row in ids.split(1):
            a, b = dense(row[:, :-1])[0], moe(row[:, :-1])[0]  # (T, V)
            largest.append(a.abs().max())
            difference.append((a - b).abs().max())
            p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
            sums += torch.stack([F.nll_loss(p, row[0, 1:]), F.nll_loss(q, row[0, 1:]), (p.exp() * (p - q)).sum(-1).mean()])
            bar.update()
    before, after, kl = (sums / len(ids)).tolist()
    return {"loss_before": before, "loss_after": after, "kl": kl,
            "relative_logit_difference": (torch.stack(difference).max() / torch.stack(largest).max()).item(),
            "effective_experts": effective_experts(torch.stack(counts)).tolist()}


def proof(o, sources, directory, pieces, ids):
    """What was kept in the files, and what both models make of ids (B, T + 1), or why they could not run. Raises ConfigError
    where theory says exact and they differ by more than rounding."""
    dtype, eps = wide(pieces[0].dtype), torch.finfo(pieces[0].dtype).eps
    result = measure_weights(o, sources, directory, pieces)
    try:
        result |= measure(sources[0], directory, dtype, ids)
    except (ConfigError, RuntimeError) as error:  # RoPE or sizes that other tools can run
        return result | {"not_run": str(error).splitlines()[0]}
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    if o.granularity & (o.granularity - 1):  # then G · down_proj rounds
        tolerance = max(tolerance, 8 * eps)
    if predict(o, sources[0])["kl"] == 0 and not result["relative_logit_difference"] <= tolerance and not o.force:  # nan included
        raise ConfigError(f"{o.destination}: not kept: logits differ by {result['relative_logit_difference']:.1e} of the largest, where "
                          f"--method={o.method} preserves the function (--force to keep it)")
    return result


def report(record):
    """The record as a few lines for a person."""
    o, found, said = record["settings"], record.get("measured"), record["predicted"]
    lines = [f"{o['destination']}: {o['num_local_experts']} experts, top-{o['num_experts_per_tok']}, by {o['method']}; "
             f"N {record['N']:,}, D1 {'unknown (give it with --D1)' if record['D1'] is None else format(record['D1'], ',')}"]
    for s in record["sources"]:
        lines += [f"not used: {name} of {s['path']}" for name in s["unused"]]
    if found is None:
        return "\n".join(lines + ["not compared: --check needs about {:.0f} GB".format(record["check_bytes"] / 1e9)] if o["check"] is None else lines)
    if "not_run" in found:
        lines.append(f"models not run: {found['not_run']}")
    else:
        lines.append(f"on {found['tokens']} {found['on']}:")
    show = lambda x: "-" if x is None else f"{x:.3g}" if x == 0 or abs(x) >= 1e-3 else f"{x:.1e}"  # noqa: E731
    lines.append(f"{'':38}{'theory':>10}{'measured':>12}")
    if "kl" in found:
        lines.append(f"{'loss of the dense model, nats a token':38}{'':10}{found['loss_before']:12.5f}")
        lines.append(f"{'loss of the result':38}{'the same' if said['kl'] == 0 else '-':>10}{found['loss_after']:12.5f}")
    for key, name in (("relative_logit_difference", "logits, largest difference / largest"), ("kl", "KL(dense, result), nats a token"),
                      ("channels_kept", "channels kept"), ("weight_change", "experts' change, RMS / std")):
        if key in found:
            lines.append(f"{name:38}{show(said[key]):>10}{show(found[key]):>12}")
    if "kl" in found:
        lines.append(f"effective experts by layer, at most {o['num_local_experts']}: " + " ".join(f"{x:.2f}" for x in found["effective_experts"]))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# The whole

def upcycle(o):
    """Write the directory o.destination as Options `o` say; returns what its upcycle.json records. Raises ConfigError."""
    sources = [Source(path) for path in (o.source, *o.merge_with)]
    first, dense = sources[0], sources[0].config
    for s in sources[1:]:
        for key, value in asdict(dense).items():
            if getattr(s.config, key) != value and key not in ("max_position_embeddings", "initializer_range", "eos_token_id"):
                raise ConfigError(f"{s.path}: {key} = {getattr(s.config, key)}, but {value} in {o.source}; merging needs one shape")
    refuse(o, dense)
    moe = dataclasses.replace(dense, num_local_experts=o.num_local_experts, num_experts_per_tok=o.num_experts_per_tok,
                              intermediate_size=dense.intermediate_size // o.granularity)
    shard_size, pieces = parse_size(o.shard_size), plan(first, moe)
    seen = [sum(tokens for _, tokens in s.state.get("history", [["", s.state["tokens"]]])) if s.state else None for s in sources]
    check_bytes = 4 * (parameter_counts(dense)["total"] + parameter_counts(moe)["total"])
    record = {"method": o.method, "seed": o.seed, "N": parameter_counts(dense)["N"],
              "D1": o.D1 if o.D1 is not None else None if None in seen else sum(seen),
              "settings": asdict(o), "predicted": predict(o, first), "check_bytes": check_bytes}
    size = sum(p.bytes for p in pieces)
    check = o.check or o.check is None and check_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    ids, origin = check_ids(o, first) if check else (None, None)
    with atomic_directory(o.destination, size) as directory, ThreadPoolExecutor(1) as pool:
        hashes = [{f: pool.submit(sha256, os.path.join(s.path, f)) for f in s.files} for s in sources]  # beside the writing
        with progress(size, "upcycle", "B", delay=2) as bar:
            write_weights(directory, pieces, shard_size, lambda p: make(o, sources, p), bar)
        write_json(directory, "config.json", mixtral_config(first.json, moe, pieces[0].dtype))
        if o.optimizer == "copy":
            write_moments(o, first, pieces, directory)
        for name in TOKENIZER_FILES:
            if os.path.exists(os.path.join(o.source, name)):
                shutil.copy(os.path.join(o.source, name), directory)
        record["sources"] = [{"path": s.path, "tokens": t, "sha256": {f: h.result() for f, h in hs.items()},
                              "tensors": len(s.tensors), "unused": s.unused} for s, t, hs in zip(sources, seen, hashes)]
        record["tensors"] = len(pieces)
        lineage = {"family": "upcycled", "N": record["N"], "D1": record["D1"], "source": o.source,
                   "source_sha256": record["sources"][0]["sha256"], "method": o.method, "seed": o.seed,
                   **knobs(o), "dense_trunk": first.state.get("trunk"), "parent": first.state.get("lineage")}
        state = {key: value for key, value in first.state.items() if key != "trunk"}
        write_json(directory, "trainer_state.json", state | {"step": 0, "tokens": 0, "history": [], "lineage": lineage})
        written = open_tensors(directory)
        if {(name, tuple(f.get_slice(name).get_shape())) for name, f in written.items()} != {(p.name, p.shape) for p in pieces}:
            raise ConfigError(f"{o.destination}: what was written cannot be read back in full")
        if check:
            record["measured"] = {"tokens": ids[:, 1:].numel(), "on": origin} | proof(o, sources, directory, pieces, ids)
        write_json(directory, "upcycle.json", record)
    return record


def main(o):
    print(report(upcycle(o)))


if __name__ == "__main__":
    run(main, Options)
