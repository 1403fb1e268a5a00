"""A checkpoint is a Hugging Face model directory, with training state beside it.

    config.json          LlamaForCausalLM or MixtralForCausalLM, as transformers reads them
    model.safetensors    (or shards with model.safetensors.index.json) with Hugging Face's tensor names
    trainer_state.json   step, tokens, position in the token stream, lineage
    optimizer.pt         AdamW's moments under the same tensor names; loads with weights_only=True

In memory q k v, gate and up, and the experts are stacked; on disk they are separate. `hf_views` is that mapping, both ways.
A directory is written under a temporary name beside its own, synced and renamed: under its final name it is complete.
"""
import contextlib
import errno
import json
import os
import pickle
import re
import shutil

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configurator import ConfigError
from model import ModelConfig, Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
                   "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json")


# ---------------------------------------------------------------------------------------------------------
# config.json

COMMON_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
               "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings",
               "initializer_range", "eos_token_id")
MOE_KEYS = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")
LEFT_OUT = {  # what transformers takes for a key that is missing, where that differs from ModelConfig
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 1e6}}


def to_hf_config(c, dtype="float32", biased=False):
    """ModelConfig -> config.json's dict. `biased`: the router holds a nonzero selection bias, for which Mixtral has no slot;
    the directory then names an architecture of ours, so that no other tool opens it and computes something else."""
    keys = COMMON_KEYS + (MOE_KEYS if c.num_local_experts else ())
    name = "MixtralForCausalLM" if c.num_local_experts else "LlamaForCausalLM"
    model_type = "mixtral" if c.num_local_experts else "llama"
    if biased:
        name, model_type = "MixtralWithRouterBiasForCausalLM", "mixtral_with_router_bias"
    return {"architectures": [name], "model_type": model_type, "hidden_act": "silu", "torch_dtype": dtype,
            "attention_dropout": 0.0, "use_cache": True, "bos_token_id": None,
            **({"sliding_window": None, "output_router_logits": False} if c.num_local_experts
               else {"attention_bias": False, "mlp_bias": False}),
            **{key: getattr(c, key) for key in keys}}


def from_hf_config(d, where="config.json"):
    """config.json's dict -> ModelConfig. Raises ConfigError, naming the key, for what this architecture cannot express."""
    kind = d.get("model_type")
    if kind not in ("llama", "mistral", "mixtral", "mixtral_with_router_bias"):
        raise ConfigError(f"{where}: model_type '{kind}' is not supported (llama, mistral without sliding window, mixtral are)")
    d = LEFT_OUT.get(kind, {}) | d
    for key, fine in (("hidden_act", ("silu", "swish")), ("attention_bias", (False, None)), ("mlp_bias", (False, None)),
                      ("use_qk_norm", (False, None)), ("sliding_window", (None,)), ("pretraining_tp", (1, None)),
                      ("attention_dropout", (0, 0.0, None))):
        if d.get(key, fine[0]) not in fine:
            raise ConfigError(f"{where}: {key} = {d[key]!r} cannot be expressed here (only {fine[0]!r})")
    keys = COMMON_KEYS + (MOE_KEYS if kind.startswith("mixtral") else ())
    values = {key: d[key] for key in keys if d.get(key) is not None}
    rope = d.get("rope_parameters")  # where transformers 5 keeps theta and scaling
    if rope:
        values["rope_theta"] = rope.get("rope_theta", d.get("rope_theta", 10000.0))
        if rope.get("rope_type", "default") != "default":
            values["rope_scaling"] = rope
    if kind == "mixtral_with_router_bias":
        values["router_bias"] = True
    if kind.startswith("mixtral") and not values.get("num_local_experts"):
        raise ConfigError(f"{where}: num_local_experts is missing")
    try:
        return ModelConfig(**values)
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

def hf_views(name, t, c):
    """[(Hugging Face's name, the slice of t it is)] for the parameter or buffer `name`; the slices are views, so the same
    list serves to write a file and to fill a model."""
    if name in ("embed_tokens.weight", "norm.weight") or name.endswith("layernorm.weight") or name.endswith("o_proj.weight"):
        return [(f"model.{name}", t)]
    if name == "lm_head.weight":
        return [(name, t)]
    layer = f"model.layers.{name.split('.')[1]}"
    if name.endswith("qkv_proj.weight"):
        kv = c.num_key_value_heads * c.head_dim
        q, k, v = t.split((c.num_attention_heads * c.head_dim, kv, kv))
        return [(f"{layer}.self_attn.{p}_proj.weight", w) for p, w in (("q", q), ("k", k), ("v", v))]
    if not c.num_local_experts:
        if name.endswith("gate_up_proj.weight"):
            return [(f"{layer}.mlp.{p}_proj.weight", w) for p, w in zip(("gate", "up"), t.chunk(2))]
        return [(f"{layer}.mlp.down_proj.weight", t)]
    moe = f"{layer}.block_sparse_moe"
    if name.endswith("mlp.gate.weight"):
        return [(f"{moe}.gate.weight", t)]
    if name.endswith("mlp.bias"):
        return [(f"{moe}.gate.bias", t)]
    if name.endswith("gate_up_proj"):
        return [(f"{moe}.experts.{e}.{p}.weight", w) for e in range(len(t)) for p, w in zip(("w1", "w3"), t[e].chunk(2))]
    return [(f"{moe}.experts.{e}.w2.weight", t[e]) for e in range(len(t))]


def open_tensors(directory):
    """{tensor name: open safetensors file that holds it} of a Hugging Face directory, memory-mapped, nothing read yet.

    Raises ConfigError for a missing, truncated or lying file, an index that points outside the directory or at tensors that
    are not there, and for pickled weights, which are never loaded.
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
                raise ConfigError(f"{index}: points at '{file}', which is not a safetensors file of its own directory")
    else:
        pickled = [f for f in sorted(os.listdir(directory)) if f.endswith((".bin", ".pt", ".pth")) and f != "optimizer.pt"]
        raise ConfigError(f"{directory}: has no model.safetensors" + (f"; {pickled[0]} is pickled and never loaded: convert it" if pickled else ""))
    tensors = {}
    for file in files:
        path = os.path.join(directory, file)
        try:
            handle = safe_open(path, "pt")
            tensors |= {name: handle for name in handle.keys() if weight_map is None or weight_map.get(name) == file}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not a complete safetensors file: {error}") from None
    missing = sorted(set(weight_map or ()) - set(tensors))
    if missing:
        raise ConfigError(f"{index}: {weight_map[missing[0]]} does not hold {missing[0]}")
    return tensors


def load_model(directory, dtype=torch.float32, router_bias=False):
    """The Transformer in a checkpoint directory, on the CPU; router_bias gives its routers a selection bias where they have
    none yet. Raises ConfigError naming file and tensor when they do not fit."""
    c = read_config(directory)
    stored_bias, c.router_bias = c.router_bias, c.router_bias or router_bias
    try:
        model = Transformer(c).to(dtype)
    except ValueError as error:
        raise ConfigError(f"{os.path.join(directory, 'config.json')}: {error}") from None
    files = open_tensors(directory)
    left = {n for n in files if not n.endswith("rotary_emb.inv_freq") and not (c.tie_word_embeddings and n == "lm_head.weight")}
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if (c.tie_word_embeddings and name == "lm_head.weight") or (name.endswith("mlp.bias") and not stored_bias):
                continue
            for hf_name, view in hf_views(name, t, c):
                if hf_name not in files:
                    raise ConfigError(f"{directory}: tensor {hf_name} is missing")
                source = files[hf_name].get_tensor(hf_name)
                if source.shape != view.shape:
                    raise ConfigError(f"{directory}: {hf_name} is {tuple(source.shape)}, config.json wants {tuple(view.shape)}")
                view.copy_(source)
                left.discard(hf_name)
    if left:
        raise ConfigError(f"{directory}: tensor {min(left)} is none of this architecture's")
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
    """Yields a temporary sibling of `path` to fill; synced and renamed to `path` at the end. Whatever goes wrong or whenever
    the process dies, `path` is either absent or complete. Raises ConfigError when `path` exists, when the disk has no room for
    `needed` bytes, or when it cannot be written."""
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
        shutil.rmtree(temporary, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise ConfigError(f"{path}: not written, the disk is full ({error})") from None
        if isinstance(error, RuntimeError):
            raise
        raise ConfigError(f"{path}: not written: {error}") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save(directory, model, state, optimizer=None, tokenizer_from=None):
    """Write `model` (unwrapped), the dict `state` and an AdamW's moments as a checkpoint directory. Raises ConfigError."""
    c = model.config
    biased = c.router_bias and any(bool(b.any()) for n, b in model.named_buffers() if n.endswith("mlp.bias"))
    tensors = {}
    for name, t in model.state_dict().items():
        if (c.tie_word_embeddings and name == "lm_head.weight") or (name.endswith("mlp.bias") and not biased):
            continue
        tensors |= {hf_name: view.detach().cpu().clone() for hf_name, view in hf_views(name, t, c)}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with atomic_directory(directory) as temporary:
        with open(os.path.join(temporary, "config.json"), "w") as f:
            json.dump(to_hf_config(c, dtype, biased), f, indent=2)
        save_file(tensors, os.path.join(temporary, "model.safetensors"), metadata={"format": "pt"})
        if optimizer is not None:
            torch.save(moments(model, optimizer), os.path.join(temporary, "optimizer.pt"))
        with open(os.path.join(temporary, "trainer_state.json"), "w") as f:
            json.dump(state, f, indent=2)
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
                result[key] |= {hf_name: view.detach().cpu().clone() for hf_name, view in hf_views(name, s[key], model.config)}
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
        raise ConfigError(f"{path}: cannot be read as this model's optimizer state: {str(error).splitlines()[0]}") from None


def read_state(directory):
    """trainer_state.json, or {} for a model from elsewhere, which has none or another tool's."""
    path = os.path.join(directory, "trainer_state.json")
    state = read_json(path) if os.path.exists(path) else {}
    ours = isinstance(state.get("tokens"), int) and isinstance(state.get("lineage"), dict)
    return state if ours else {}


def checkpoints(out_dir):
    """[(step, directory)] of the complete checkpoints in a run's directory, oldest first."""
    found = [(int(m[1]), os.path.join(out_dir, name)) for name in (os.listdir(out_dir) if os.path.isdir(out_dir) else ())
             if (m := re.fullmatch(r"checkpoint-(\d+)", name))]
    return sorted(found)
