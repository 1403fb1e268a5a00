"""A checkpoint is a Hugging Face model directory, with training state beside it.

    config.json          names the architecture and its sizes, as transformers reads them
    model.safetensors    (or shards with model.safetensors.index.json) has Hugging Face's tensor names
    trainer_state.json   step, tokens, position in the token stream, lineage, history (see tokens_seen)
    optimizer.pt         AdamW's moments under the same tensor names; loads with weights_only=True

In memory q k v, gate and up, and the experts are stacked. On disk they are separate. FORMATS says what
an architecture calls its keys and tensors, and hf_views cuts a parameter into its tensors, both ways. A
directory is written under a temporary name, synced and renamed: under its final name it is complete.
"""
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pickle
import re
import shutil
import sys
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import ConfigError
from model import ModelConfig, Transformer

DTYPES = {  # by safetensors' names
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json")


# ---------------------------------------------------------------------------------------------------------
# Architectures. FORMATS has an entry for each model_type of config.json:
#   architecture  the class of transformers that opens what we write
#   keys          {field of ModelConfig: key of config.json}
#   constants     {key: value} written beside those
#   assumed       {key: value} that transformers takes for a missing key, where ModelConfig takes another
#   only          {key: values that this model can express}; any other value is refused
#   sets          {field of ModelConfig: value} that the model_type alone says
#   tensors       {parameter or buffer: names of its tensors} of layer i; with {e}: of each expert e

KEYS = {key: key for key in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "tie_word_embeddings", "initializer_range", "eos_token_id")}
MOE_KEYS = {key: key for key in ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")}
LAYER, MOE = "model.layers.{i}.", "model.layers.{i}.block_sparse_moe."
TENSORS = {name: ["model." + name] for name in (
    "embed_tokens.weight", "norm.weight", "layers.{i}.input_layernorm.weight",
    "layers.{i}.post_attention_layernorm.weight", "layers.{i}.self_attn.o_proj.weight")} | {
    "lm_head.weight": ["lm_head.weight"],
    "layers.{i}.self_attn.qkv_proj.weight": [LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"]}

LLAMA = {
    "architecture": "LlamaForCausalLM",
    "keys": KEYS,
    "constants": {"hidden_act": "silu", "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False},
    "assumed": {"rms_norm_eps": 1e-6, "eos_token_id": 2},
    "only": {"hidden_act": ("silu", "swish"), "attention_bias": (False, None), "mlp_bias": (False, None),
             "use_qk_norm": (False, None), "sliding_window": (None,), "pretraining_tp": (1, None),
             "attention_dropout": (0, None)},
    "sets": {},
    "tensors": TENSORS | {
        "layers.{i}.mlp.gate_up_proj.weight": [LAYER + f"mlp.{part}_proj.weight" for part in ("gate", "up")],
        "layers.{i}.mlp.down_proj.weight": [LAYER + "mlp.down_proj.weight"]}}
MIXTRAL = LLAMA | {
    "architecture": "MixtralForCausalLM",
    "keys": KEYS | MOE_KEYS,
    "constants": {"hidden_act": "silu", "attention_dropout": 0.0, "sliding_window": None,
                  "output_router_logits": True},  # if false, transformers trains without the balance loss
    "assumed": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 1e6,
                "eos_token_id": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.001},
    "tensors": TENSORS | {
        "layers.{i}.mlp.gate.weight": [MOE + "gate.weight"],
        "layers.{i}.mlp.gate_up_proj": [MOE + f"experts.{{e}}.{part}.weight" for part in ("w1", "w3")],
        "layers.{i}.mlp.down_proj": [MOE + "experts.{e}.w2.weight"]}}
FORMATS = {
    "llama": LLAMA,
    "mistral": LLAMA | {  # for reading only: what was read from it is written as a Llama
        "assumed": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                    "sliding_window": 4096, "eos_token_id": 2}},
    "mixtral": MIXTRAL,
    # Mixtral has no slot for a selection bias on the experts. A model with one names an architecture of ours,
    # so that no other tool opens it and computes something else.
    "mixtral_with_router_bias": MIXTRAL | {
        "architecture": "MixtralWithRouterBiasForCausalLM",
        "sets": {"router_bias": True},
        "tensors": MIXTRAL["tensors"] | {"layers.{i}.mlp.bias": [MOE + "gate.bias"]}}}


def written_as(c):
    """The model_type under which a ModelConfig is written."""
    moe = "mixtral_with_router_bias" if c.router_bias else "mixtral"
    return moe if c.num_local_experts else "llama"


def to_hf_config(c, dtype="float32"):
    """ModelConfig -> config.json's dict.

    transformers counts each of a token's k experts in full. Its balanced loss is k where ours is 1, so the
    coefficient is written as ours / k. It also pools the layers: the losses are equal for one layer only.
    """
    entry = FORMATS[written_as(c)]
    d = {"architectures": [entry["architecture"]], "model_type": written_as(c), "torch_dtype": dtype,
         "use_cache": True, "bos_token_id": None, **entry["constants"],
         **{key: getattr(c, field) for field, key in entry["keys"].items()}}
    if c.num_local_experts:
        d[entry["keys"]["router_aux_loss_coef"]] /= c.num_experts_per_tok
    return d


def from_hf_config(d, where="config.json"):
    """config.json's dict -> ModelConfig. Raises ConfigError, naming the key, for what that cannot express."""
    model_type = d.get("model_type")
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
        c = ModelConfig(**fields)
        if "num_local_experts" in entry["keys"] and not c.num_local_experts:
            raise ValueError(f"{entry['keys']['num_local_experts']} is missing")
        if c.num_local_experts:  # 15 digits undo the rounding of the division by k
            c.router_aux_loss_coef = float(f"{c.router_aux_loss_coef * c.num_experts_per_tok:.15g}")
        return c
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {error}") from None


def read_json(path):
    """A JSON file's object. Raises ConfigError naming the file."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds no JSON object")
    return value


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
    left_out = ("lm_head.weight",) * c.tie_word_embeddings + ("mlp.bias",) * (not c.router_bias)
    return {name: hf_views(name, t, c, model_type) for name, t in model.state_dict().items()
            if not name.endswith(left_out)}


def open_tensors(directory):
    """{tensor name: open safetensors file that holds it} of a directory; nothing of the weights is read yet.

    Raises ConfigError for a missing, truncated or lying file, for an index that points outside the directory
    or at tensors that are not there, and for pickled weights, which are never loaded.
    """
    index = os.path.join(directory, "model.safetensors.index.json")
    single = os.path.join(directory, "model.safetensors")
    if os.path.exists(single):
        files, weight_map = ["model.safetensors"], None
    elif os.path.exists(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ConfigError(f"{index}: has no weight_map of tensor names to files")
        files = sorted(set(weight_map.values()))
        for file in files:
            if os.path.basename(file) != file or not file.endswith(".safetensors"):
                raise ConfigError(f"{index}: points at '{file}', not a safetensors file of its own folder")
    else:
        pickled = [file for file in sorted(os.listdir(directory))
                   if file.endswith((".bin", ".pt", ".pth")) and file != "optimizer.pt"]
        advice = f"; {pickled[0]} is pickled and never loaded: convert it" if pickled else ""
        raise ConfigError(f"{directory}: has no model.safetensors" + advice)
    tensors = {}
    for file in files:
        path = os.path.join(directory, file)
        try:
            handle = safe_open(path, "pt")
            tensors |= {name: handle for name in handle.keys()
                        if weight_map is None or weight_map.get(name) == file}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not a complete safetensors file: {error}") from None
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing:
        raise ConfigError(f"{index}: {weight_map[missing[0]]} does not hold {missing[0]}")
    return tensors


def check_tensors(directory, files, shapes, c):
    """Compare open_tensors' files with shapes {name: shape}. Returns the tensors that can be ignored:
    position tables and the copy of a tied head. Raises ConfigError naming the tensor that does not fit."""
    for name, shape in shapes.items():
        if name not in files:
            raise ConfigError(f"{directory}: tensor {name} is missing")
        found = files[name].get_slice(name)
        if tuple(found.get_shape()) != shape:
            actual = tuple(found.get_shape())
            raise ConfigError(f"{directory}: {name} is {actual}, config.json wants {shape}")
        if found.get_dtype() not in DTYPES:
            raise ConfigError(f"{directory}: {name} is {found.get_dtype()}, none of {', '.join(DTYPES)}")
    others = sorted(set(files) - set(shapes))
    for name in others:
        tied_head = c.tie_word_embeddings and name == "lm_head.weight"
        if not tied_head and not name.endswith("rotary_emb.inv_freq"):
            raise ConfigError(f"{directory}: tensor {name} is none of this architecture's")
    return others


def load_model(directory, dtype=torch.float32, router_bias=False):
    """The Transformer in a checkpoint directory, on the CPU. With router_bias its routers get a selection
    bias where they have none. Raises ConfigError naming file and tensor when they do not fit."""
    c, path = read_config(directory), os.path.join(directory, "config.json")
    try:
        model = Transformer(dataclasses.replace(c, router_bias=c.router_bias or router_bias)).to(dtype)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    views = dict(itertools.chain(*stored_views(model, c, read_json(path)["model_type"]).values()))
    files = open_tensors(directory)
    check_tensors(directory, files, {name: tuple(view.shape) for name, view in views.items()}, c)
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(files[name].get_tensor(name))
    return model


# ---------------------------------------------------------------------------------------------------------
# Writing and reading back

def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_directory(path, needed=0):
    """Yields a temporary sibling of `path` to fill, which is synced and renamed to `path` at the end.
    Whatever goes wrong and whenever the process dies, `path` is absent or complete. Raises ConfigError when
    `path` exists, when the disk has no room for `needed` bytes, or when it cannot be written."""
    path = os.path.normpath(path)
    if os.path.exists(path):
        raise ConfigError(f"{path}: already exists; remove it or choose another name")
    parent = os.path.dirname(path) or "."
    temporary = os.path.join(parent, f".{os.path.basename(path)}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed writer of this directory
    try:
        os.makedirs(temporary)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
        yield temporary
        for name in os.listdir(temporary):
            sync(os.path.join(temporary, name))
        sync(temporary)
        os.rename(temporary, path)
        sync(parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise ConfigError(f"{path}: not written, the disk is full ({error})") from None
        if isinstance(error, RuntimeError):
            raise
        raise ConfigError(f"{path}: not written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # of a failed write; a finished one has its final name


def write_json(directory, name, value):
    with open(os.path.join(directory, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)


def save(directory, model, state, optimizer=None, tokenizer_from=None):
    """Write `model` (unwrapped), the dict `state` and an AdamW's moments as a checkpoint directory. Raises
    ConfigError."""
    biased = any(bool(bias.any()) for name, bias in model.named_buffers() if name.endswith("mlp.bias"))
    c = dataclasses.replace(model.config, router_bias=biased)  # routers whose bias is zero are Mixtral's
    views = itertools.chain(*stored_views(model, c).values())
    tensors = {name: view.detach().cpu().clone() for name, view in views}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with atomic_directory(directory) as temporary:
        write_json(temporary, "config.json", to_hf_config(c, dtype))
        save_file(tensors, os.path.join(temporary, "model.safetensors"), metadata={"format": "pt"})
        if optimizer is not None:
            torch.save(moments(model, optimizer), os.path.join(temporary, "optimizer.pt"))
        write_json(temporary, "trainer_state.json", state)
        for name in TOKENIZER_FILES:
            if tokenizer_from and os.path.exists(os.path.join(tokenizer_from, name)):
                shutil.copy(os.path.join(tokenizer_from, name), temporary)


def moments(model, optimizer):
    """{"step": optimizer steps, "exp_avg": {name: tensor}, "exp_avg_sq": …} under Hugging Face's names."""
    result = {"step": 0, "exp_avg": {}, "exp_avg_sq": {}}
    for name, p in model.named_parameters():
        s = optimizer.state.get(p)
        if s:
            result["step"] = int(s["step"])
            for key in ("exp_avg", "exp_avg_sq"):
                views = hf_views(name, s[key], model.config)
                result[key] |= {hf_name: view.detach().cpu().clone() for hf_name, view in views}
    return result


def load_moments(directory, model, optimizer):
    """Fill an AdamW's state from a checkpoint's optimizer.pt. Raises ConfigError naming the file."""
    path = os.path.join(directory, "optimizer.pt")
    try:
        stored = torch.load(path, weights_only=True, mmap=True)
        for name, p in model.named_parameters():
            s = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            for key, t in s.items():
                for hf_name, view in hf_views(name, t, model.config):
                    view.copy_(stored[key][hf_name])
            # fused AdamW wants its count as an fp32 tensor beside the parameter
            optimizer.state[p] = {"step": torch.tensor(float(stored["step"]), device=p.device), **s}
    except (OSError, KeyError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read as this model's optimizer state: {reason}") from None


# ---------------------------------------------------------------------------------------------------------
# Writing tensors one at a time

class Span(NamedTuple):
    """The bytes of a tensor in an open file."""
    file: BinaryIO
    start: int
    nbytes: int


def parse_size(text):
    """Bytes of 5GB, 500MB, 64KB or a number, in powers of 1000 as Hugging Face counts. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([KMGT]?)B?", text.strip().upper())
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise ConfigError(f"shard_size = '{text}' is no size such as 500MB or 5GB")
    return size


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


def copy_bytes(f, span):
    """Append a Span to f, on Linux inside the kernel: a third of the CPU time of writing out a memory map."""
    f.flush()
    position, end = span.start, span.start + span.nbytes
    while position < end:
        if sys.platform == "linux":
            sent = os.sendfile(f.fileno(), span.file.fileno(), position, end - position)
        else:
            sent = os.write(f.fileno(), os.pread(span.file.fileno(), min(end - position, 1 << 24), position))
        if not sent:
            raise OSError(f"{span.file.name} ended early")
        position += sent
    f.seek(0, os.SEEK_END)


def write_shard(path, pieces, make_tensor, bar):
    """A safetensors file of pieces, which have a name, shape, dtype and bytes: the header, then each tensor
    as make_tensor(piece) gives it, itself or as a Span. Memory holds one tensor at a time. bar: a tqdm."""
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
            assert t.nbytes == p.bytes, p.name
            if isinstance(t, Span):
                copy_bytes(f, t)
            else:
                assert t.shape == p.shape and t.dtype == p.dtype, p.name
                f.write(t.contiguous().view(-1).view(torch.uint8).numpy())
            bar.update(p.bytes)


def write_weights(directory, pieces, shard_size, make_tensor, bar):
    """model.safetensors, or shards of at most shard_size bytes and their index. See write_shard."""
    runs = shards(pieces, shard_size)
    names = [f"model-{i + 1:05d}-of-{len(runs):05d}.safetensors" for i in range(len(runs))]
    names = names if len(runs) > 1 else ["model.safetensors"]
    for name, shard in zip(names, runs):
        write_shard(os.path.join(directory, name), shard, make_tensor, bar)
    if len(runs) > 1:
        weight_map = {p.name: name for name, shard in zip(names, runs) for p in shard}
        write_json(directory, "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(p.bytes for p in pieces)}, "weight_map": weight_map})


# ---------------------------------------------------------------------------------------------------------
# Training state

def read_state(directory):
    """trainer_state.json, or {} for a model from elsewhere, which has none or another tool's."""
    path = os.path.join(directory, "trainer_state.json")
    state = read_json(path) if os.path.exists(path) else {}
    ours = isinstance(state.get("tokens"), int) and isinstance(state.get("lineage"), dict)
    return state if ours else {}


def tokens_seen(*states):
    """Tokens that the weights of these trainer states saw since the random start or the upcycling.

    A state's history lists [run, tokens] of each run that led to it. States that branched from one run share
    its tokens, so each run counts once, with the most tokens that any of the states saw of it.
    """
    runs = {}
    for i, state in enumerate(states):
        # A state written before there was a history counts as a run of its own.
        history = state.get("history", [(i, state["tokens"] + state["lineage"].get("tokens_before", 0))])
        for run, tokens in history:
            runs[run] = max(tokens, runs.get(run, 0))
    return sum(runs.values())


def checkpoints(out_dir):
    """[(step, directory)] of the complete checkpoints in a run's directory, oldest first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else ()
    found = [(re.fullmatch(r"checkpoint-(\d+)", name), os.path.join(out_dir, name)) for name in names]
    return sorted((int(match[1]), path) for match, path in found if match)
