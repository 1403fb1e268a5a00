"""A pilot: short runs that say whether one dense checkpoint is to be upcycled. sweep.py runs them."""
import math
import os
from dataclasses import replace

import checkpoint
from configurator import ConfigError, from_dict, note, read_json
from cost import flops_of
from data.stream import load_tokens, locate
from files import check_model
from model import Transformer, flops_per_token, parameter_counts, rope_frequencies
from rows import EXPERTS
from start import MODEL_KEYS, resolve_architecture
from train import Train

# Branches as shares of the budget. A curve from scratch up to a quarter of it predicts the budget to 1-10 %.
SHARES = {"D2": (1 / 16, 1 / 8), "D_moe": (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4), "D_dense": (1 / 16, 1 / 8)}


def with_levels(study):
    """The sweep.Study with its empty D2, D_moe and D_dense as SHARES of the budget. Raises ConfigError."""
    if study.budget is None:
        raise ConfigError("--budget is missing: the tokens of MoE training that the pilot is to decide on")
    step = study.train.get("tokens_per_step", Train.tokens_per_step)  # rounded up, the shares are reached
    return replace(study, **{key: [math.ceil(share * study.budget / step) * step for share in shares]
                             for key, shares in SHARES.items() if not getattr(study, key)})


def open_dense(study, seed):
    """(Train settings with which study.dense is continued, its trunk among them, and its ModelConfig). Raises
    ConfigError for a mixture, for data of another tokenizer, and where D1 is not known."""
    path, state = study.dense, checkpoint.read_state(study.dense)
    given = study.train | {"seed": seed, "rows": None, "init_from": path, "trunk": state.get("trunk")}
    c = from_dict(Train, given, f"{study.config}: ")
    meta = load_tokens(c.dataset, "train")[1]
    c, m = resolve_architecture(c, path, meta)
    if m.num_local_experts:
        raise ConfigError(f"{path}: is a mixture of experts already; give a dense checkpoint with --dense")
    vocabulary = vocabulary_of(path, state.get("tokenizer"))
    if vocabulary is None:
        note(f"{path}: has no tokenizer.json, so nothing says whether the tokens of {c.dataset} are its own")
    elif vocabulary != vocabulary_of(locate(c.dataset), meta["tokenizer"]):
        raise ConfigError(f"{c.dataset}: its tokens are not those of {path}; prepare it with that tokenizer")
    seen = checkpoint.tokens_known(state) or 0
    if len(study.D1) != (0 if seen else 1):
        raise ConfigError(f"{path}: " + (f"has seen {seen:,} tokens, so leave D1 out" if seen else
                                         "does not say how many tokens it has seen; give --D1=TOKENS"))
    return replace(c, D1=seen or study.D1[0]), m


def vocabulary_of(folder, name):
    """The vocabulary in the tokenizer.json of a folder, or else the tokenizer's `name`."""
    path = os.path.join(folder, "tokenizer.json")
    model = read_json(path).get("model") if os.path.exists(path) else None
    return model.get("vocab") if isinstance(model, dict) else name


def model_config(c, base):
    """`base`, a ModelConfig, with all that Train settings `c` say of it. Raises ConfigError."""
    try:
        rope_frequencies(base)
        return check_model(replace(base, **{key: getattr(c, key) for key in MODEL_KEYS}))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def write_fresh(o):
    """Write the mixture of upcycle.Options o with fresh weights and no tokens seen. Raises ConfigError."""
    m = replace(checkpoint.read_config(o.source), **{key: getattr(o, key) for key in EXPERTS})
    beside = checkpoint.companions(o.source)
    lineage = {"family": "moe", "N": parameter_counts(m)["N"]}
    state = {"step": 0, "tokens": 0, "history": [], "lineage": lineage}
    checkpoint.save(o.destination, Transformer(m).init_weights(o.seed), state, beside=beside)


def cost(study, jobs):
    """The FLOPs of `jobs`, and their share of those of the study's budget, in words."""
    flops = flops_of(jobs)
    m = replace(jobs[0].model, **{key: getattr(study, key) for key in EXPERTS})
    share = flops / flops_per_token(m, jobs[0].settings.max_seq_len) / study.budget
    return (f"the pilot costs {flops:.3g} FLOPs, {share:.1%} of training the MoE on {study.budget:,} tokens; "
            "each of its trunks starts with a warm-up")
