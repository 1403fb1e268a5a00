"""A checkpoint is a Hugging Face model directory, with training state beside it.

    config.json          names the architecture and its sizes, as transformers reads them
    model.safetensors    (or shards with model.safetensors.index.json) has Hugging Face's tensor names
    trainer_state.json   step, tokens, position in the token stream, lineage, history (see tokens_seen)
    optimizer.moments    (or shards likewise) AdamW's step and moments, exp_avg.NAME and exp_avg_sq.NAME; a
                         safetensors file too, under a name that no tool takes for weights

In memory q k v, gate and up, and the experts are stacked. On disk most architectures have them apart. FORMATS
in formats.py says what each calls its keys and tensors. hf_views cuts a parameter into them, both ways. A
directory is written under a temporary name, synced and renamed: under its final name it is complete.
"""
import dataclasses
import functools
import itertools
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from configurator import ConfigError, check_file, convert, naming, one_line, read_json, writing
from files import LIMITS, atomic_directory, check_model, check_state
from formats import FORMATS, NO_MIXTURE, idle_tensors, written_as
from model import ModelConfig, Transformer
from parallel import fill, gather, ranks
from tensors import Stored, check_tensors, is_finite, open_tensors, write_json, write_weights

MOMENTS, KEYS, CARD = "optimizer.moments", ("exp_avg", "exp_avg_sq"), "README.md"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json")


# ---------------------------------------------------------------------------------------------------------
# config.json

def to_hf_config(c, dtype=torch.float32):
    """ModelConfig -> config.json's dict, for weights of a dtype.

    transformers counts each of a token's k experts in full. Its balanced loss is k where ours is 1, so the
    coefficient is written as ours / k. It also pools the layers: the losses are equal for one layer only.
    """
    model_type = written_as(c)
    entry = FORMATS[model_type]
    d = {"architectures": [entry["architecture"]], "model_type": model_type,
         "torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True,
         **entry["constants"], **{key: getattr(c, field) for field, key in entry["keys"].items()}}
    if c.num_local_experts:
        d[entry["keys"]["router_aux_loss_coef"]] /= c.num_experts_per_tok
    return d


def from_hf_config(d, where="config.json"):
    """config.json's dict -> ModelConfig. Raises ConfigError, naming the key, for what that cannot express."""
    model_type = d.get("model_type")
    if isinstance(model_type, str) and model_type in NO_MIXTURE:
        raise ConfigError(f"{where}: no mixture that computes the same as a {model_type} is known: "
                          f"{NO_MIXTURE[model_type]}")
    if not isinstance(model_type, str) or model_type not in FORMATS:
        raise ConfigError(f"{where}: model_type '{model_type}' is not supported ({', '.join(FORMATS)} are)")
    entry = FORMATS[model_type]
    d = entry["assumed"] | d
    for key, values in entry["only"].items():
        if d.get(key, values[0]) not in values:
            raise ConfigError(f"{where}: {key} = {d[key]!r} cannot be expressed here (only {values[0]!r})")
    fields = {field: d[key] for field, key in entry["keys"].items() if d.get(key) is not None} | entry["sets"]
    try:
        if rope := d.get("rope_parameters"):  # where transformers 5 keeps theta and scaling
            fields["rope_theta"] = rope.get("rope_theta", d.get("rope_theta", 10000.0))
            if rope.get("rope_type", "default") != "default":
                fields["rope_scaling"] = rope
        for field in fields.keys() & LIMITS.keys():
            fields[field] = convert(f"{where}: {entry['keys'][field]}", fields[field], *LIMITS[field])
        refuse_other_attention(d, entry)
        c = ModelConfig(**fields)
        if "num_local_experts" in entry["keys"] and not c.num_local_experts:
            raise ValueError(f"{entry['keys']['num_local_experts']} is 0")
        if c.num_local_experts:  # 15 digits undo the rounding of the division by k
            c.router_aux_loss_coef = float(f"{c.router_aux_loss_coef * c.num_experts_per_tok:.15g}")
        return c
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {one_line(error)}") from None


def refuse_other_attention(d, entry):
    """Raises ValueError where config.json's dict says that RoPE turns a part of a head, has a rope_type that
    this entry of FORMATS does not take, or that layers differ in their attention."""
    rope = d.get("rope_parameters") or d.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor = {rope['partial_rotary_factor']} cannot be expressed here")
    if kind not in entry.get("rope_types", (kind,)):
        raise ValueError(f"rope_type '{kind}' is none of {', '.join(entry['rope_types'])}")
    if {*(d.get("layer_types") or ()), "full_attention"} != {"full_attention"}:
        raise ValueError("layer_types differ from full_attention, which cannot be expressed here")


def read_config(directory):
    """The ModelConfig of a checkpoint directory. Raises ConfigError."""
    if not os.path.isdir(directory):
        raise ConfigError(f"{directory}: no such checkpoint directory")
    path = os.path.join(directory, "config.json")
    return from_hf_config(read_json(path), path)


# ---------------------------------------------------------------------------------------------------------
# Tensors

def hf_views(name, t, c, model_type=None):
    """[(Hugging Face's name, the slice of t it is)] for the parameter or buffer `name` of a ModelConfig c.

    The slices are views, so one list serves to write a file and to fill a model. Three tensors share the rows
    of a matrix as q, k and v do; two share them equally. model_type: the format of the file; None: the one in
    which c is written. Raises ConfigError for a parameter that the format does not know.
    """
    model_type = model_type or written_as(c)
    layer = re.match(r"layers\.(\d+)\.", name)
    names = FORMATS[model_type]["tensors"].get(re.sub(r"^layers\.\d+\.", "layers.{i}.", name))
    if names is None:
        raise ConfigError(f"parameter {name} has no tensor in FORMATS['{model_type}'] of checkpoint.py")
    q, kv = (heads * c.head_dim for heads in (c.num_attention_heads, c.num_key_value_heads))
    views = []
    for expert, matrix in enumerate(t) if "{e}" in names[0] else [(None, t)]:
        parts = matrix.split((q, kv, kv)) if len(names) == 3 else matrix.chunk(len(names))
        views += [(n.format(i=layer and layer[1], e=expert), part) for n, part in zip(names, parts)]
    return views


def stored_tensors(model, c):
    """{name: parameter or buffer} of all that a file of ModelConfig c holds of `model`. It holds no tied
    head, and no router bias unless c has one. Raises ConfigError for a model beyond the limits."""
    check_model(c)
    left_out = ("lm_head.weight",) * c.tie_word_embeddings + ("mlp.bias",) * (not c.router_bias)
    return {name: t for name, t in model.state_dict().items() if not name.endswith(left_out)}


def stored_shapes(model, c, model_type=None):
    """{parameter or buffer: [(Hugging Face's name, shape)]} of stored_tensors. Raises ConfigError as hf_views
    does."""
    wholes = {name: torch.empty(t.shape, device="meta") for name, t in stored_tensors(model, c).items()}
    return {name: [(hf_name, tuple(view.shape)) for hf_name, view in hf_views(name, whole, c, model_type)]
            for name, whole in wholes.items()}


def load_model(directory, dtype=torch.float32, router_bias=False, place=None, positions=None):
    """The Transformer in a checkpoint directory. With router_bias its routers get a selection bias where they
    have none. place(model) gives a model on `meta` its memory; None: on the CPU. positions: how many its
    RoPE is for; None: as in config.json. Raises ConfigError naming file and tensor when they do not fit."""
    c, path = read_config(directory), os.path.join(directory, "config.json")
    c = dataclasses.replace(c, max_position_embeddings=positions or c.max_position_embeddings)
    tensors, model_type = open_tensors(directory), read_json(path)["model_type"]
    check_size(c, tensors, path)
    try:
        with torch.device("meta"):  # the weights must fit before the model takes memory
            model = Transformer(dataclasses.replace(c, router_bias=c.router_bias or router_bias)).to(dtype)
        shapes = dict(itertools.chain(*stored_shapes(model, c, model_type).values()))
        idle = idle_tensors(c, model_type)
        check_tensors(directory, tensors, shapes | idle)
        model = place(model) if place else model.materialise("cpu", "cpu")
    except (ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {one_line(error)}") from None
    for name in idle:
        if tensors[name].read().any():
            raise ConfigError(f"{directory}: {name} is not zero: a shared expert cannot be expressed here")

    def read(name, t):
        for hf_name, view in hf_views(name, t, c, model_type):
            view.copy_(tensors[hf_name].read())
    with torch.no_grad():
        for name, t in stored_tensors(model, c).items():
            fill(t, functools.partial(read, name))
    return model


def check_size(c, tensors, where):
    """Raises ConfigError where a ModelConfig is too large for the tensors of its checkpoint."""
    if c.num_hidden_layers > len(tensors):
        raise ConfigError(f"{where}: {c.num_hidden_layers} layers, but there are {len(tensors)} tensors")
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    table = 4 * c.max_position_embeddings * heads * c.head_dim
    weights = sum(span.nbytes for span in tensors.values())
    if table > max(weights, 2**29):
        raise ConfigError(f"{where}: max_position_embeddings = {c.max_position_embeddings} wants a table of "
                          f"{table / 1e9:.1f} GB beside {weights / 1e9:.1f} GB of weights; lower it")


# ---------------------------------------------------------------------------------------------------------
# Writing and reading back

def tidy(out_dir):
    """Remove what killed writers left in a run's directory, and the checkpoints that a newer one replaces.
    Raises ConfigError."""
    with writing(out_dir):
        for name in os.listdir(out_dir):
            if re.fullmatch(r"\.checkpoint-\d+\.tmp", name):
                shutil.rmtree(os.path.join(out_dir, name))
        for _, directory in checkpoints(out_dir)[:-1]:
            if read_state(directory).get("passing"):  # a kill leaves a directory of a temporary name
                temporary = os.path.join(out_dir, f".{os.path.basename(directory)}.tmp")
                os.rename(directory, temporary)
                shutil.rmtree(temporary)


def companions(tokenizer, source=None):
    """{file: bytes} of what goes with weights: TOKENIZER_FILES and model card of the checkpoint `source`, and
    the TOKENIZER_FILES that it lacks from the folder `tokenizer`. Raises ConfigError."""
    found = {}
    for folder, names in ((tokenizer, TOKENIZER_FILES), (source, (*TOKENIZER_FILES, CARD))):
        for path in filter(Path.exists, [Path(folder, name) for name in names if folder]):
            check_file(path)
            with naming(path):
                found[path.name] = path.read_bytes()
    return found


def with_training(files, state, said=""):
    """Companions whose model card, if there is one, ends with what a training state has seen of its data."""
    head = f"\nOn data of sha256 `{state['data_sha256']}` the model was trained up to ".encode()
    line = head + f"{tokens_seen(state):,} tokens in all.{said}\n".encode()
    return files | {name: files[name].split(head)[0] + line for name in files.keys() & {CARD}}


class Part(NamedTuple):
    """What this rank holds of a parameter, buffer or moment."""
    name: str  # of the parameter
    prefix: str  # that the file has before its names
    local: torch.Tensor
    shape: tuple  # of the whole
    dim: int | None  # along which the ranks hold parts; None: each holds the whole

    def pieces(self, c):
        """[Stored] of the whole, without memory."""
        views = hf_views(self.name, torch.empty(self.shape, device="meta"), c)
        return [Stored(self.prefix + name, view.shape, self.local.dtype) for name, view in views]

    def views(self, c, group):
        """[Hugging Face's slice of the whole] on rank 0. All ranks call it in the same order."""
        t = self.local if self.dim is None else gather(self.local, self.shape, self.dim, group)
        return () if t is None else [view for _, view in hf_views(self.name, t, c)]


class Contents(NamedTuple):
    """What a checkpoint holds, as of the moment when it was taken."""
    config: ModelConfig
    weights: list  # of Part
    moments: list  # of Part; empty without an optimizer
    step: int  # of AdamW


def contents(model, optimizer=None, copy=False):
    """The Contents of `model` (unwrapped) and its AdamW. With `copy` they are in host memory and stay as they
    are while training goes on."""
    def part(name, t, prefix=""):
        sharded = isinstance(t, DTensor)
        local = (t.to_local() if sharded else t).detach()
        return Part(name, prefix, local.to("cpu", copy=True) if copy else local, t.shape,
                    t.placements[0].dim if sharded else None)
    biased = any(bool(bias.any()) for name, bias in model.named_buffers() if name.endswith("mlp.bias"))
    c = dataclasses.replace(model.config, router_bias=biased)  # no router bias: Mixtral's, Qwen's
    weights = [part(name, t) for name, t in stored_tensors(model, c).items()]
    state = {name: optimizer.state[p] or {"step": 0} | {key: torch.zeros_like(p) for key in KEYS}
             for name, p in model.named_parameters()} if optimizer else {}  # none before the first update
    moments = [part(name, s[key], f"{key}.") for key in KEYS for name, s in state.items()]
    return Contents(c, weights, moments, int(next(iter(state.values()))["step"]) if state else 0)


def save(directory, model, state, optimizer=None, beside=None):
    """Write `model` (unwrapped), the dict `state` and AdamW's moments as a directory. Raises ConfigError,
    also where a weight or moment is not finite."""
    write(directory, contents(model, optimizer), state, beside)


def write(directory, saved, state, beside=None, shard_size=5_000_000_000, group=None):
    """Write Contents and the dict `state` as a directory, a parameter at a time. Where ranks hold parts all
    of them call it, rank 0 gathers the parts over `group` and writes. Raises ConfigError, also where a weight
    or moment is not finite; then too all parts are gathered, since the other ranks wait for that."""
    wholes = (part.views(saved.config, group) for part in (*saved.weights, *saved.moments))
    try:
        if ranks()[0] == 0:
            write_directory(directory, saved, wholes, state, beside, shard_size)
    finally:
        for _ in wholes:
            pass


def write_directory(directory, saved, wholes, state, beside, shard_size):
    """`write` on the rank that has the directory. wholes: an iterator over the views of the parts."""
    c, dtype = saved.config, saved.weights[0].local.dtype
    idle = [Stored(name, shape, dtype) for name, shape in idle_tensors(c).items()]
    weights, moments = ([part.pieces(c) for part in parts] for parts in (saved.weights, saved.moments))

    def tensors(pieces_of_parts):
        for pieces in pieces_of_parts:
            for piece, t in zip(pieces, next(wholes)):
                if not is_finite(t):
                    raise ConfigError(f"{directory}: not written: {piece.name} is not finite")
                yield t.cpu()
    zeros = (torch.zeros(p.shape, dtype=dtype) for p in idle)
    made = itertools.chain(tensors(weights), zeros, tensors(moments))
    weights, moments = [*itertools.chain(*weights), *idle], [*itertools.chain(*moments)]
    with atomic_directory(directory, sum(p.bytes for p in weights + moments)) as temporary:
        write_json(temporary, "config.json", to_hf_config(c, dtype))
        write_weights(temporary, weights, made, shard_size)
        if moments:
            write_moments(temporary, saved.step, moments, made, shard_size)
        write_json(temporary, "trainer_state.json", state)
        for name, content in (beside or {}).items():
            Path(temporary, name).write_bytes(content)


def write_moments(directory, step, pieces, tensors, shard_size):
    """Write AdamW's step and moments as write_weights does. Raises OSError."""
    pieces, step = [Stored("step", (), torch.float64), *pieces], torch.tensor(step, dtype=torch.float64)
    write_weights(directory, pieces, itertools.chain([step], tensors), shard_size, MOMENTS)


def open_moments(directory, shapes):
    """(AdamW's step, {name: Span}) of the moments of a checkpoint. Raises ConfigError unless they are those
    of the tensors of shapes {Hugging Face's name: shape}."""
    tensors, path = open_tensors(directory, MOMENTS), os.path.join(directory, MOMENTS)
    shapes = {f"{key}.{name}": shape for key in KEYS for name, shape in shapes.items()}
    check_tensors(directory, tensors, shapes | {"step": ()})
    step = tensors["step"].read().item()
    if not 0 <= step <= 2**53 or step != int(step):
        raise ConfigError(f"{path}: step = {step} is no number of steps")
    return int(step), tensors


def load_moments(directory, model, optimizer):
    """Fill an AdamW's state from a checkpoint's moments, a parameter at a time. Raises ConfigError naming the
    tensor."""
    c, shapes, named = model.config, stored_shapes(model, model.config), dict(model.named_parameters())
    step, tensors = open_moments(directory, dict(itertools.chain(*(shapes[name] for name in named))))

    def read(name, key, t):
        for hf_name, view in hf_views(name, t, c):
            view.copy_(tensors[f"{key}.{hf_name}"].read_finite())
    for name, p in named.items():  # fused AdamW wants its count as an fp32 tensor beside the parameter
        state = {key: torch.zeros_like(p, requires_grad=False) for key in KEYS}
        for key, t in state.items():
            fill(t, functools.partial(read, name, key))
        optimizer.state[p] = {"step": torch.tensor(step, dtype=torch.float32, device=p.device)} | state


# ---------------------------------------------------------------------------------------------------------
# Training state

def read_state(directory):
    """trainer_state.json, or {} for a model from elsewhere, which has none or another tool's. Raises
    ConfigError for a value of another type than ours."""
    path = os.path.join(directory, "trainer_state.json")
    state = read_json(path) if os.path.exists(path) else {}
    if not {"tokens", "lineage", "history"} <= state.keys():
        return {}
    check_state(path, state)
    return state


def tokens_seen(*states):
    """Tokens that the weights of these trainer states saw since the random start or the upcycling.

    A state's history lists [run, tokens] of each run that led to it. States that branched from one run share
    its tokens, so each run counts once, with the most tokens that any of the states saw of it.
    """
    runs = {}
    for state in states:
        for run, tokens in state["history"]:
            runs[run] = max(tokens, runs.get(run, 0))
    return sum(runs.values())


def tokens_known(*states):
    """tokens_seen, or None where they started from a model that nothing is known of."""
    known = all(state and state["lineage"].get("D1", 0) is not None for state in states)
    return tokens_seen(*states) if known else None


def checkpoints(out_dir):
    """[(step, directory)] of the complete checkpoints in a run's directory, oldest first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else ()
    found = [(re.fullmatch(r"checkpoint-(\d+)", name), os.path.join(out_dir, name)) for name in names]
    return sorted((int(match[1]), path) for match, path in found if match)
