"""A checkpoint is a Hugging Face model directory, with training state beside it.

    config.json          names the architecture and its sizes, as transformers reads them
    model.safetensors    (or shards with model.safetensors.index.json) has Hugging Face's tensor names
    trainer_state.json   step, tokens, position in the token stream, lineage, history (see tokens_seen)
    optimizer.pt         AdamW's moments under the same tensor names; loads with weights_only=True

In memory q k v, gate and up, and the experts are stacked. On disk most architectures have them apart. FORMATS
in formats.py says what each calls its keys and tensors. hf_views cuts a parameter into them, both ways. A
directory is written under a temporary name, synced and renamed: under its final name it is complete.
"""
import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import sys
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from configurator import ConfigError, check_file, one_line, read_json, writing
from files import LIMITS, MOST_EXPERTS, atomic_directory, check_state, checked_value, remove_directory
from formats import FORMATS, NO_MIXTURE, idle_tensors, written_as
from model import ModelConfig, Transformer

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
MOST_HEADER = 2**25  # bytes of a safetensors header that is read
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
         "torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True, "bos_token_id": None,
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
            fields[field] = checked_value(f"{where}: {entry['keys'][field]}", fields[field], LIMITS[field])
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


def stored_views(model, c, model_type=None):
    """{parameter or buffer: its hf_views} of all that a file of ModelConfig c holds of `model`. It holds no
    tied head, and no router bias unless c has one. Raises ConfigError as hf_views does."""
    if c.num_hidden_layers * c.num_local_experts > MOST_EXPERTS:
        raise ConfigError(f"num_local_experts = {c.num_local_experts} in each of {c.num_hidden_layers} "
                          f"layers are more than {MOST_EXPERTS:,} together")
    left_out = ("lm_head.weight",) * c.tie_word_embeddings + ("mlp.bias",) * (not c.router_bias)
    return {name: hf_views(name, t, c, model_type) for name, t in model.state_dict().items()
            if not name.endswith(left_out)}


class Span(NamedTuple):
    """A tensor in an open safetensors file, and the place of its bytes."""
    name: str
    shape: tuple
    dtype: torch.dtype | str  # the file's word for it where DTYPES has none
    file: safe_open
    path: str
    start: int
    nbytes: int
    first_row: int | None = None  # of the tensor in the file, where this is a part of it

    def rows(self, start, shape):
        """The Span of a part of shape `shape` that begins at row `start`."""
        row_bytes = self.nbytes // self.shape[0]
        return self._replace(shape=shape, start=self.start + start * row_bytes, nbytes=shape[0] * row_bytes,
                             first_row=start)

    def read(self):  # a memory map
        t = self.file.get_tensor(self.name)
        return t if self.first_row is None else t[self.first_row:self.first_row + self.shape[0]]

    def copy_to(self, f):
        """Append the bytes to f inside the kernel: a third of the CPU time of writing out a memory map."""
        f.flush()
        position, end = self.start, self.start + self.nbytes
        with open(self.path, "rb") as source:
            while position < end:
                sent = os.sendfile(f.fileno(), source.fileno(), position, end - position)
                if not sent:
                    raise OSError(f"{self.path} ended early")
                position += sent


def open_tensors(directory):
    """{tensor name: Span} of a directory; no weights are read yet. Raises ConfigError for a missing,
    truncated or lying file, for a header beyond MOST_HEADER, for an index that points outside the directory
    or at a tensor that is not in its file, and for pickled weights, which are never loaded."""
    index = os.path.join(directory, "model.safetensors.index.json")
    files, weight_map = ["model.safetensors"], {}
    if not os.path.exists(os.path.join(directory, files[0])):
        if not os.path.exists(index):
            raise ConfigError(f"{directory}: has no model.safetensors; pickled weights are never loaded")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index}: has no weight_map of tensor names to files")
        files = sorted(set(map(str, weight_map.values())))
    tensors = {}
    for file in files:
        path = os.path.join(directory, file)
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{index}: points at '{file}', not a safetensors file of its own folder")
        check_file(path)
        try:
            with open(path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                if length > MOST_HEADER:
                    raise OSError(f"its header of {length:,} bytes is longer than {MOST_HEADER:,}")
                opened = safe_open(path, "pt")  # it compares the header with the file
                header = json.loads(f.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(f"{path}: not a complete safetensors file: {one_line(error)}") from None
        for name in opened.keys():
            if not weight_map or weight_map.get(name) == file:  # two files may have tensors of one name
                shape, dtype, (start, end) = (header[name][key] for key in ("shape", "dtype", "data_offsets"))
                tensors[name] = Span(name, tuple(shape), DTYPES.get(dtype, dtype), opened, path,
                                     8 + length + start, end - start)
    for name, file in weight_map.items():
        if name not in tensors:
            raise ConfigError(f"{index}: {file} does not hold {name}")
    return tensors


def check_tensors(directory, tensors, shapes):
    """Compare open_tensors' result with shapes {name: shape}. Position tables and the copy of a tied head are
    ignored. Raises ConfigError naming the tensor that does not fit."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise ConfigError(f"{directory}: tensor {name} is missing")
        span = tensors[name]
        if span.shape != shape:
            raise ConfigError(f"{directory}: {name} is {span.shape}, config.json wants {shape}")
        if span.dtype not in DTYPES.values():
            raise ConfigError(f"{directory}: {name} is {span.dtype}, none of {', '.join(DTYPES)}")
    for name in sorted(set(tensors) - set(shapes)):
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            raise ConfigError(f"{directory}: tensor {name} is none of this architecture's")


def load_model(directory, dtype=torch.float32, router_bias=False):
    """The Transformer in a checkpoint directory, on the CPU. With router_bias its routers get a selection
    bias where they have none. Raises ConfigError naming file and tensor when they do not fit."""
    c, path = read_config(directory), os.path.join(directory, "config.json")
    tensors, model_type = open_tensors(directory), read_json(path)["model_type"]
    check_size(c, tensors, path)
    try:
        for device in ("meta", "cpu"):  # the weights must fit before the model takes memory
            with torch.device(device):
                model = Transformer(dataclasses.replace(c, router_bias=c.router_bias or router_bias))
            views = dict(itertools.chain(*stored_views(model.to(dtype), c, model_type).values()))
            idle = idle_tensors(c, model_type)
            shapes = {name: tuple(view.shape) for name, view in views.items()}
            check_tensors(directory, tensors, shapes | idle)
    except (ValueError, KeyError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {one_line(error)}") from None
    for name in idle:
        if tensors[name].read().any():
            raise ConfigError(f"{directory}: {name} is not zero: a shared expert cannot be expressed here")
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(tensors[name].read())
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
            if read_state(directory).get("passing"):
                remove_directory(directory)


def write_json(directory, name, value):
    with open(os.path.join(directory, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)


def copy_tokenizer(source, directory):
    """Copy a folder's TOKENIZER_FILES, as far as it has them, to a checkpoint directory."""
    for name in TOKENIZER_FILES:
        path = os.path.join(source, name)
        if os.path.exists(path):
            check_file(path)
            shutil.copy(path, directory)


class Stored(NamedTuple):
    """A tensor under Hugging Face's name, as write_shard takes it."""
    name: str
    tensor: torch.Tensor

    shape = property(lambda self: self.tensor.shape)
    dtype = property(lambda self: self.tensor.dtype)
    bytes = property(lambda self: self.tensor.nbytes)


def save(directory, model, state, optimizer=None, tokenizer_from=None):
    """Write `model` (unwrapped), the dict `state` and AdamW's moments as a directory. Raises ConfigError,
    also where a weight or moment is not finite."""
    biased = any(bool(bias.any()) for name, bias in model.named_buffers() if name.endswith("mlp.bias"))
    c = dataclasses.replace(model.config, router_bias=biased)  # no router bias: Mixtral's, Qwen's
    dtype = model.norm.weight.dtype
    pieces = [Stored(*view) for view in itertools.chain(*stored_views(model, c).values())]
    pieces += [Stored(name, torch.zeros(shape, dtype=dtype)) for name, shape in idle_tensors(c).items()]
    stored = moments(model, optimizer) if optimizer else {"exp_avg": {}, "exp_avg_sq": {}}
    for name, t in itertools.chain(pieces, stored["exp_avg"].items(), stored["exp_avg_sq"].items()):
        if not t.isfinite().all():
            raise ConfigError(f"{directory}: not written: {name} is not finite")
    needed = sum(p.bytes for p in pieces) * (1 if optimizer is None else 3)
    with atomic_directory(directory, needed) as temporary:
        write_json(temporary, "config.json", to_hf_config(c, dtype))
        write_shard(os.path.join(temporary, "model.safetensors"), pieces, lambda p: p.tensor.detach().cpu())
        if optimizer is not None:
            write_moments(temporary, stored)
        write_json(temporary, "trainer_state.json", state)
        if tokenizer_from:
            copy_tokenizer(tokenizer_from, temporary)


def moments(model, optimizer):
    """AdamW's moments: {"step": steps, "exp_avg": {Hugging Face's name: view}, "exp_avg_sq": …}."""
    result = {"step": 0, "exp_avg": {}, "exp_avg_sq": {}}
    for name, p in model.named_parameters():
        if s := optimizer.state.get(p):
            result["step"] = int(s["step"])
            for key in ("exp_avg", "exp_avg_sq"):
                result[key] |= hf_views(name, s[key], model.config)
    return result


def write_moments(directory, stored):
    """Write what `moments` gives as optimizer.pt. Raises OSError."""
    with open(os.path.join(directory, "optimizer.pt"), "wb") as f:  # given a path, torch hides a full disk
        try:
            torch.save(stored, f)
        except RuntimeError as error:  # of torch, which tried to end the file after an OSError
            first = error.__context__
            raise first if isinstance(first, OSError) else OSError(errno.EIO, one_line(error)) from None


def read_moments(directory, shapes):
    """A checkpoint's optimizer.pt, memory-mapped, as `moments` gives it. Raises ConfigError unless it has the
    tensors of shapes {Hugging Face's name: shape}."""
    path = os.path.join(directory, "optimizer.pt")
    check_file(path)
    try:
        stored = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
        for key in ("exp_avg", "exp_avg_sq"):
            if {name: tuple(t.shape) for name, t in stored[key].items()} != shapes:
                raise ValueError(f"its {key} is another model's")
            for name, t in stored[key].items():
                if t.dtype not in DTYPES.values() or t.layout != torch.strided or not t.isfinite().all():
                    raise ValueError(f"its {key} of {name} is not of finite real numbers")
        return stored | {"step": checked_value("step", stored["step"], (int, 0, 2**53))}
    except Exception as error:  # a damaged file can raise any kind from the unpickler
        raise ConfigError(f"{path}: does not hold AdamW's moments of this model: {one_line(error)}") from None


def load_moments(directory, model, optimizer):
    """Fill an AdamW's state from a checkpoint's optimizer.pt. Raises ConfigError naming the file."""
    for p in model.parameters():  # fused AdamW wants its count as an fp32 tensor beside the parameter
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    views = moments(model, optimizer)
    stored = read_moments(directory, {name: tuple(view.shape) for name, view in views["exp_avg"].items()})
    for key in ("exp_avg", "exp_avg_sq"):
        for name, view in views[key].items():
            view.copy_(stored[key][name])
    for p in model.parameters():
        optimizer.state[p]["step"].fill_(stored["step"])


def write_weights(directory, pieces, shard_size, make_tensor, bar):
    """model.safetensors, or shards of at most shard_size bytes (a larger tensor alone) and their index, of
    pieces, which have a name, shape, dtype and bytes. make_tensor(piece) gives the tensor, or a Span that has
    the very bytes. bar: a tqdm."""
    shards, size = [[]], 0
    for p in pieces:
        size += p.bytes
        if shards[-1] and size > shard_size:
            shards.append([])
            size = p.bytes
        shards[-1].append(p)
    if len(shards) == 1:
        return write_shard(os.path.join(directory, "model.safetensors"), pieces, make_tensor, bar)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(os.path.join(directory, name), shard, make_tensor, bar)
        weight_map |= {p.name: name for p in shard}
    total = {"total_size": sum(p.bytes for p in pieces)}
    write_json(directory, "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})


def write_shard(path, pieces, make_tensor, bar=None):
    """A safetensors file: the header, then each tensor. Memory holds one tensor at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for p in pieces:
        start, end = end, end + p.bytes
        header[p.name] = {"dtype": names[p.dtype], "shape": p.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for p in pieces:
            t = make_tensor(p)
            assert t.shape == p.shape and t.dtype == p.dtype, p.name
            if isinstance(t, Span) and sys.platform == "linux":
                t.copy_to(f)
            else:
                t = t.read() if isinstance(t, Span) else t
                f.write(t.contiguous().view(-1).view(torch.uint8).numpy())
            del t  # before the next one is made
            if bar is not None:
                bar.update(p.bytes)


# ---------------------------------------------------------------------------------------------------------
# Training state

def read_state(directory):
    """trainer_state.json, or {} for a model from elsewhere, which has none or another tool's. Raises
    ConfigError for a value of another type than ours."""
    path = os.path.join(directory, "trainer_state.json")
    state = read_json(path) if os.path.exists(path) else {}
    if "tokens" not in state or "lineage" not in state:
        return {}
    check_state(path, state)
    return state


def tokens_seen(*states):
    """Tokens that the weights of these trainer states saw since the random start or the upcycling.

    A state's history lists [run, tokens] of each run that led to it. States that branched from one run share
    its tokens, so each run counts once, with the most tokens that any of the states saw of it.
    """
    runs = {}
    for i, state in enumerate(states):  # a state of an older version has no history: it is a run of its own
        older = [(i, state["tokens"] + state["lineage"].get("tokens_before", 0))]
        for run, tokens in state.get("history", older):
            runs[run] = max(tokens, runs.get(run, 0))
    return sum(runs.values())


def checkpoints(out_dir):
    """[(step, directory)] of the complete checkpoints in a run's directory, oldest first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else ()
    found = [(re.fullmatch(r"checkpoint-(\d+)", name), os.path.join(out_dir, name)) for name in names]
    return sorted((int(match[1]), path) for match, path in found if match)
