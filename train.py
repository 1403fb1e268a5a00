"""Train a model: dense, mixture of experts from scratch, upcycled, resumed or branched; one loop for all.

    python train.py config/dense_tiny.py --seed=1                         on one CPU or GPU
    torchrun --nproc_per_node=8 train.py config/dense_tiny.py             on 8 GPUs (nccl) or CPU processes (gloo)

A run writes to out_dir: config.py (resolved settings), log.jsonl (a line a step), checkpoint-STEP directories, and, when it is
done, row.json: its point for fit_laws.py, which is also appended to the file `rows`.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import checkpoint
from configurator import ConfigError, code_version, progress, run, setting, write_config
from data.stream import batches, load_tokens, locate, sequences
from model import ModelConfig, Transformer, balance_loss, effective_experts, flops_per_token, parameter_counts
from rows import ARCHITECTURE, KNOBS, ROUTING, TRAINING, append_row, differences, run_key


@dataclass
class Train:
    """Train a dense or mixture-of-experts model on one device, or on many under torchrun."""
    config: str | None = setting(None, "config file: plain assignments of the settings below", positional=True)
    out_dir: str = setting("out/run", "directory of the run's log and checkpoints")
    rows: str | None = setting("out/rows.jsonl", "file to which the finished run appends its row; none: write no row (a trunk)")
    trunk: str | None = setting(None, "name of the training trunk this run belongs to; none: the run branched from, or out_dir")
    dataset: str = setting("data/pysource", "directory that data/prepare.py wrote, or its name under data/")
    seed: int = setting(0, "of the weights and of the order of the data", least=0)
    init_from: str | None = setting(None, "checkpoint directory to start from: its weights, in a new schedule")
    branch: bool = setting(False, "take the whole state of init_from (step, tokens, optimizer), not its weights alone")
    resume: bool = setting(False, "go on from the newest complete checkpoint in out_dir; nothing there: start")
    repeat_data: bool = setting(False, "start the token stream anew instead of where init_from stopped")

    hidden_size: int = setting(64, "width of the residual stream", least=1)
    intermediate_size: int = setting(176, "width of the MLP, or of each expert", least=1)
    num_hidden_layers: int = setting(4, "layers", least=1)
    num_attention_heads: int = setting(4, "attention heads", least=1)
    num_key_value_heads: int | None = setting(None, "key-value heads; none: as many as attention heads", least=1)
    tie_word_embeddings: bool = setting(True, "use the token embedding as the output head")
    rope_theta: float = setting(10000.0, "base of the rotary embedding", least=1)
    initializer_range: float = setting(0.02, "standard deviation of fresh weights", least=0)
    num_local_experts: int = setting(0, "experts a layer; 0: dense", least=0)
    num_experts_per_tok: int = setting(2, "experts a token uses", least=1)

    max_tokens: int = setting(2_000_000, "tokens to train on, those of a branched checkpoint included", least=1)
    tokens_per_step: int = setting(2048, "tokens of one optimizer step, over all ranks", least=1)
    micro_batch_size: int = setting(64, "sequences of one forward pass on one rank, at most; the rest accumulates, "
                                    "and the balance loss is taken over one pass of all ranks", least=1)
    max_seq_len: int = setting(128, "tokens in a sequence", least=1)
    learning_rate: float = setting(3e-3, "peak learning rate", least=0)
    schedule: Literal["wsd", "cosine"] = setting("wsd", "warmup-stable-decay, or cosine over the whole run")
    warmup_steps: int = setting(50, "steps of linear warm-up", least=0)
    decay_start: int | None = setting(None, "step at which the linear decay starts (wsd); none: so that it ends with the run", least=0)
    decay_steps: int | None = setting(None, "steps of decay (wsd); 0: none; none: from decay_start to the end, else a fifth of the run", least=0)
    min_lr_ratio: float = setting(0.0, "where the decay ends, as a share of learning_rate", least=0, most=1)
    weight_decay: float = setting(0.1, "AdamW's, on matrices only", least=0)
    beta1: float = setting(0.9, "AdamW's", least=0, most=0.9999)
    beta2: float = setting(0.95, "AdamW's", least=0, most=0.99999)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", least=0)
    router_aux_loss_coef: float = setting(0.01, "coefficient of the balance loss (1 = balanced)", least=0)
    router_z_loss_coef: float = setting(0.001, "coefficient of the router's z-loss", least=0)
    router_bias_update_rate: float = setting(0.0, "loss-free balancing: step of the routers' selection bias (arXiv 2408.15664); 0: no bias", least=0)

    eval_tokens: int = setting(262_144, "validation tokens, always the same ones", least=1)
    eval_every_steps: int = setting(0, "steps between validations; 0: only at the end", least=0)
    save_at_tokens: list[int] = setting([], "token counts at which to keep a checkpoint (rounded up to a step)", least=1)
    save_every_seconds: int = setting(600, "seconds between checkpoints to resume from, the newest kept; 0: none", least=0)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of matrix products; weights and their sums stay float32")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    compile: bool = setting(False, "torch.compile the model (pays on long runs)")


MODEL_KEYS = [f.name for f in dataclasses.fields(ModelConfig) if f.name in Train.__dataclass_fields__]


class Stopped(Exception):
    """A run was stopped by SIGTERM or Ctrl-C after the step under way was finished and saved. args[0]: the signal."""


@dataclass
class Run:
    """A resolved run: what the steps, the log, the checkpoints and the row are made from."""
    c: Train  # with nothing left open
    model_config: ModelConfig
    state: dict  # what trainer_state.json says, as of now
    source: str | None  # the checkpoint directory that the weights come from
    moments: bool  # the optimizer's moments come from there too
    max_steps: int
    micro: int  # sequences in one pass of this rank
    accumulate: int  # passes in one step
    tokens: np.ndarray
    val_tokens: np.ndarray
    row: dict  # all of the row but what only the end of the run tells
    device: torch.device
    model: Transformer = None  # as it is saved
    forward: torch.nn.Module = None  # the same, compiled and sharded
    no_sync: object = contextlib.nullcontext  # makes a context in which gradients are not summed over ranks
    optimizer: torch.optim.Optimizer = None

    @property
    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.c.dtype == "bfloat16")


def ranks():
    """(this process's rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ---------------------------------------------------------------------------------------------------------
# Pure functions of the settings

def learning_rate(step, c, max_steps):
    """Learning rate of 0-based `step`: linear warm-up, stable, and a decay that is linear (wsd) or a cosine.

    The linear decay goes over the steps [decay_start, decay_start + decay_steps).
    """
    scale = min(1.0, (step + 1) / max(c.warmup_steps, 1))
    if c.schedule == "cosine":
        done = (step - c.warmup_steps) / max(max_steps - c.warmup_steps, 1)
        decay = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    else:
        done = (step - c.decay_start) / c.decay_steps if c.decay_steps else 0.0
        decay = 1.0 - min(max(done, 0.0), 1.0)
    return c.learning_rate * scale * (c.min_lr_ratio + (1 - c.min_lr_ratio) * decay)


def passes(c, world):
    """(sequences in one pass of a rank, passes in one step). Raises ConfigError where the ranks' shares differ."""
    per_rank, odd = divmod(c.tokens_per_step, c.max_seq_len * world)
    micro = min(c.micro_batch_size, per_rank)
    if odd or not per_rank or per_rank % micro:
        raise ConfigError(f"tokens_per_step = {c.tokens_per_step} is not a multiple of max_seq_len {c.max_seq_len} x "
                          f"{world} ranks x micro_batch_size {micro}")
    return micro, per_rank // micro


def planned_row(c, m, lineage, tokens, data_sha256, tokens_before_schedule=0, world=1):
    """The row of a run before it is run: all columns but loss, loss_se, git and torch.

    c: its resolved Train settings. m: its ModelConfig. lineage: family, N, and of an upcycled model D1, method and knobs.
    tokens: those that the weights will have seen since the random start or the upcycling.
    """
    n, upcycled = parameter_counts(m), lineage["family"] == "upcycled"
    settings = {key: getattr(m, key) for key in ARCHITECTURE} | {key: getattr(c, key) for key in TRAINING}
    if m.num_local_experts:
        settings |= {key: getattr(c, key) for key in ROUTING} | {"sequences_per_pass": passes(c, world)[0] * world}
    return {"family": lineage["family"], "N": lineage["N"], "N_active": n["N_active"], "N_total": n["N_total"],
            **({"D1": lineage["D1"], "D2": tokens} if upcycled else {"D": tokens}),
            "num_local_experts": m.num_local_experts,
            "num_experts_per_tok": m.num_experts_per_tok if m.num_local_experts else 0,
            "method": lineage.get("method"), **{key: lineage[key] for key in KNOBS if key in lineage},
            "seed": c.seed, "flops": tokens * flops_per_token(m, c.max_seq_len), "trunk": c.trunk,
            **({"dense_trunk": lineage.get("dense_trunk")} if upcycled else {}), **settings,
            "tokens_before_schedule": tokens_before_schedule, "config": os.path.join(c.out_dir, "config.py"),
            "data_sha256": data_sha256}


def tokens_seen(state):
    """Tokens that a state's weights have seen since the random start or the upcycling."""
    return sum(tokens for _, tokens in state["history"])


def add_to_history(history, row, lineage, source, resumed):
    """Append [run_id, 0] to `history` for the run of `row`, unless a resumed run goes on with its last entry.

    run_id is a hash of what makes the run's weights: its settings and data, the runs before it, the upcycling (lineage),
    and `source`, another tool's checkpoint. Runs that differ only in where they end or how they are validated share it.
    """
    ends = () if row["schedule"] == "cosine" else ("D", "D2")
    made_by = run_key(row, (*ends, "eval_tokens", "trunk", "dense_trunk"))
    upcycling = {key: value for key, value in lineage.items() if key != "source"}

    def run_id(before):
        return hashlib.sha256(json.dumps([made_by, before, upcycling, source]).encode()).hexdigest()[:16]
    if not (resumed and history and history[-1][0] == run_id(history[:-1])):
        history.append([run_id(history), 0])


# ---------------------------------------------------------------------------------------------------------
# What a run starts from

def resolve(c, device):
    """The Run of settings `c`, without a model yet. Raises ConfigError where settings and files do not fit."""
    if c.branch and not c.init_from:
        raise ConfigError("--branch needs the checkpoint to branch from: --init_from=...")
    tokens, meta = load_tokens(c.dataset, "train")
    val_tokens, _ = load_tokens(c.dataset, "val")
    own = newest(c) if c.resume else None
    source, whole = own or c.init_from, bool(own or c.branch)
    c, m = resolve_architecture(c, source, meta)
    before = checkpoint.read_state(source) if source else {}
    state = starting_state(c, m, meta, before, source, own)
    c, max_steps = resolve_schedule(c, state, source, own)
    if min(len(tokens), len(val_tokens)) <= c.max_seq_len:
        raise ConfigError(f"{c.dataset}: too few tokens for one sequence of max_seq_len = {c.max_seq_len}")
    if c.eval_tokens < c.max_seq_len:
        raise ConfigError(f"eval_tokens = {c.eval_tokens} is less than one sequence, max_seq_len = {c.max_seq_len}")
    micro, accumulate = passes(c, ranks()[1])
    trunk = c.trunk or whole and before.get("trunk") or os.path.basename(os.path.abspath(c.out_dir))
    c = dataclasses.replace(c, trunk=trunk)
    seen = tokens_seen(state)
    row = planned_row(c, m, state["lineage"], seen + (max_steps - state["step"]) * c.tokens_per_step,
                      meta["data_sha256"], seen - state["tokens"], ranks()[1])
    add_to_history(state["history"], row, state["lineage"], None if before else source, bool(own))
    state |= {"trunk": trunk, "sequences_per_pass": row.get("sequences_per_pass")}
    return Run(c, m, state, source, whole, max_steps, micro, accumulate, tokens, val_tokens, row, device)


def resolve_architecture(c, source, meta):
    """(settings, ModelConfig): a checkpoint decides its architecture. Raises ConfigError where a setting contradicts it."""
    if not source:
        try:
            return c, ModelConfig(
                vocab_size=meta["vocab_size"], max_position_embeddings=c.max_seq_len, eos_token_id=meta.get("eos_token_id"),
                router_bias=c.router_bias_update_rate > 0, **{key: getattr(c, key) for key in MODEL_KEYS})
        except ValueError as error:
            raise ConfigError(str(error)) from None
    m, found = checkpoint.read_config(source), {}
    for key in MODEL_KEYS:
        asked, found[key] = getattr(c, key) if key in given_settings(c) else None, getattr(m, key)
        if key == "router_aux_loss_coef" and asked is not None:  # a setting of the training, which the config carries
            found[key] = asked
        elif asked not in (None, found[key]):
            raise ConfigError(f"{source}: {key} is {found[key]!r} there, {asked!r} is asked for; leave {key} out")
    if c.max_seq_len > m.max_position_embeddings:
        raise ConfigError(f"{source}: max_position_embeddings is {m.max_position_embeddings}, "
                          f"max_seq_len = {c.max_seq_len} is too long")
    if meta["vocab_size"] > m.vocab_size:
        raise ConfigError(f"{source}: vocab_size is {m.vocab_size}, dataset {c.dataset} has {meta['vocab_size']}")
    m = dataclasses.replace(m, router_aux_loss_coef=found["router_aux_loss_coef"],
                            router_bias=m.router_bias or c.router_bias_update_rate > 0)
    return dataclasses.replace(c, **found), m


def given_settings(c):
    """The settings that were given: on the command line and in the config file, or else those that differ from the default."""
    return getattr(c, "given", {f.name for f in dataclasses.fields(c) if getattr(c, f.name) != f.default})


def starting_state(c, m, meta, before, source, own):
    """What trainer_state.json says as the run starts. before: what it says in `source`, {} if another tool wrote it.

    Raises ConfigError where the run cannot go on from there.
    """
    whole = own or c.branch
    needed = ("step", "sequence", "data_seed", "max_seq_len") if "data_sha256" in before else ("step",)
    if (before or own) and any(key not in before for key in needed):
        raise ConfigError(f"{source}: trainer_state.json is not complete")
    if whole and not os.path.exists(os.path.join(source, "optimizer.pt")):
        raise ConfigError(f"{source}: has no optimizer.pt to branch from; leave --branch out to start from its weights")
    lineage = before.get("lineage") or {"family": "moe" if m.num_local_experts else "dense",
                                        "N": parameter_counts(m)["N"]}
    if source and c.rows and (not before or lineage.get("D1", 0) is None):
        raise ConfigError(f"{source}: how many tokens its dense model has seen is not recorded, so its row would be "
                          "wrong: give --D1 to upcycle.py, or --rows=none")
    goes_on = before.get("data_sha256") == meta["data_sha256"] and (own or not c.repeat_data)
    if goes_on and before["max_seq_len"] != c.max_seq_len:
        raise ConfigError(f"{source}: was trained with max_seq_len = {before['max_seq_len']}. With {c.max_seq_len} it "
                          "would read the same data again: keep it, or allow that with --repeat_data")
    if own and not goes_on:
        raise ConfigError(f"{source}: was trained on other data than {c.dataset} holds now; choose another out_dir")
    return {"step": before["step"] if whole else 0, "tokens": before["tokens"] if whole else 0,
            "sequence": before["sequence"] if goes_on else 0, "data_seed": before["data_seed"] if goes_on else c.seed,
            "dataset": c.dataset, "data_sha256": meta["data_sha256"], "tokenizer": meta["tokenizer"],
            "max_seq_len": c.max_seq_len, "lineage": lineage, "history": before.get("history", [])}


def resolve_schedule(c, state, source, own):
    """(settings, number of the last step). Raises ConfigError where max_tokens leaves nothing to train."""
    max_steps = state["step"] + -(-(c.max_tokens - state["tokens"]) // c.tokens_per_step)
    if max_steps < state["step"] or max_steps == state["step"] and not own:
        raise ConfigError(f"{source}: has seen {state['tokens']:,} tokens already, max_tokens = {c.max_tokens:,} leaves "
                          "nothing to train")
    if c.decay_steps is None:
        fifth = max_steps // 5
        c = dataclasses.replace(c, decay_steps=fifth if c.decay_start is None else max(0, max_steps - c.decay_start))
    if c.decay_start is None:
        c = dataclasses.replace(c, decay_start=max_steps - c.decay_steps)
    return c, max_steps


def newest(c):
    """The checkpoint in out_dir that a resumed run goes on from, or None: the newest one.

    Where a level in save_at_tokens has no checkpoint, because the level was added since, it is the newest one before
    that level.
    """
    saved = {checkpoint.read_state(path).get("tokens", 0): path for _, path in checkpoint.checkpoints(c.out_dir)}
    first = checkpoint.read_state(c.init_from).get("tokens", 0) if c.branch else 0
    missing = [level for level in c.save_at_tokens if level > first
               and not any(level <= tokens < level + c.tokens_per_step for tokens in saved)]
    return saved.get(max((tokens for tokens in saved if tokens < min(missing, default=math.inf)), default=None))


# ---------------------------------------------------------------------------------------------------------
# Set-up: the model, the optimizer, the ranks

def make_optimizer(model, c):
    """AdamW that decays matrices and leaves norms alone."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


def wrap(model, c, device):
    """(the model as the loop calls it: compiled and spread over ranks; a maker of contexts without gradient sums)."""
    forward = torch.compile(model, dynamic=False) if c.compile else model
    if not dist.is_initialized():
        return forward, contextlib.nullcontext
    forward = torch.nn.parallel.DistributedDataParallel(
        forward, device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False)  # every rank computes the same ones
    return forward, forward.no_sync


def build(run):
    """Give the run its model and its optimizer. Raises ConfigError for a checkpoint that cannot be read."""
    c, m = run.c, run.model_config
    if run.source:
        run.model = checkpoint.load_model(run.source, router_bias=m.router_bias)
    else:
        run.model = Transformer(m).init_weights(c.seed)
    run.model.config = m
    run.model.to(run.device)
    run.optimizer = make_optimizer(run.model, c)
    if run.source and run.moments:
        checkpoint.load_moments(run.source, run.model, run.optimizer)
    run.forward, run.no_sync = wrap(run.model, c, run.device)


@contextlib.contextmanager
def process_group(name):
    """Yields this process's torch.device for the setting `device`; under torchrun, within a process group."""
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ConfigError("--device=cuda: torch sees no GPU here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    start = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if start:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        if start:
            dist.destroy_process_group()


@contextlib.contextmanager
def caught_signals():
    """Yields a list to which SIGTERM and SIGINT are appended in place of what they do."""
    caught = []
    handlers = {s: signal.signal(s, lambda number, frame: caught.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def claim(c, stack):
    """Make out_dir and lock it while `stack` lasts, and see that rows can be written. Returns what is wrong, or None."""
    try:
        os.makedirs(c.out_dir, exist_ok=True)
        lock = stack.enter_context(open(os.path.join(c.out_dir, ".lock"), "w"))
        if c.rows:
            folder = os.path.dirname(c.rows) or "."
            os.makedirs(folder, exist_ok=True)
            if os.path.isdir(c.rows) or not os.access(c.rows if os.path.exists(c.rows) else folder, os.W_OK):
                return f"{c.rows}: rows cannot be written there"
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"{c.out_dir}: another process is training there"
    except OSError as error:
        return f"{error.filename}: cannot be written: {error.strerror}"


# ---------------------------------------------------------------------------------------------------------
# The step

def train_step(run, ids, targets, lr, stop, save_now):
    """One optimizer step on this rank's sequences, ids and targets (B, T) each. It waits for the device once.

    Returns what all ranks measured: {"loss", "balance_loss", "z_loss", "grad_norm": floats, "counts": (L, E) assignments
    or None, "stop", "save": whether a rank asks for it}. Raises ConfigError, before the update, where the loss or the
    gradient is not finite.
    """
    c, micro, router = run.c, run.micro, None
    sums, counts = torch.zeros(5, device=run.device), 0  # loss, balance, z, stop, save
    for i in range(run.accumulate):
        with contextlib.nullcontext() if i == run.accumulate - 1 else run.no_sync():
            with run.autocast:
                loss, router = run.forward(ids[i * micro:(i + 1) * micro], targets[i * micro:(i + 1) * micro])
            sums[0] += loss.detach()
            if router:
                balance = balance_loss(router["counts"], router["probs"])
                sums[1:3] += torch.stack((balance, router["z_loss"])).detach()
                counts = counts + router["counts"]
                loss = loss + c.router_aux_loss_coef * balance + c.router_z_loss_coef * router["z_loss"]
            (loss / run.accumulate).backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), c.grad_clip or math.inf)
    sums[:3] /= run.accumulate * ranks()[1]
    sums[3], sums[4] = stop, save_now
    shared = torch.cat((sums, counts.flatten())) if router else sums
    if dist.is_initialized():
        dist.all_reduce(shared)
    values = torch.cat((norm.reshape(1), shared)).tolist()
    measured = dict(zip(("grad_norm", "loss", "balance_loss", "z_loss", "stop", "save"), values), counts=None)
    check_finite(run, measured)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    if router:
        measured["counts"] = torch.tensor(values[6:]).view(counts.shape)
        if c.router_bias_update_rate:
            for layer, count in zip(run.model.layers, shared[5:].view(counts.shape)):
                layer.mlp.bias += c.router_bias_update_rate * torch.sign(count.mean() - count)
    return measured


def check_finite(run, measured):
    """Raises ConfigError where the loss or the gradient norm is not finite."""
    if not (math.isfinite(measured["loss"]) and math.isfinite(measured["grad_norm"])):
        last = checkpoint.checkpoints(run.c.out_dir)
        raise ConfigError(
            f"{run.c.out_dir}: loss {measured['loss']:g}, gradient norm {measured['grad_norm']:g} at step "
            f"{run.state['step']}, token {run.state['tokens']}; stopped before the update. Last good checkpoint: "
            f"{last[-1][1] if last else 'none'}; try a lower learning_rate than {run.c.learning_rate:g}")


def read_batches(run):
    """The iterator over this rank's share of each step's sequences: (inputs, targets), (B, T) int64 each."""
    c, share = run.c, run.micro * run.accumulate
    first = run.state["sequence"] + ranks()[0] * share
    return batches(run.tokens, first, share, c.tokens_per_step // c.max_seq_len, c.max_seq_len,
                   run.state["data_seed"], run.device)


@torch.no_grad()
def validate(model, tokens, eval_tokens, seq_len, batch_size, device, autocast=contextlib.nullcontext()):
    """(mean cross-entropy in nats, its standard error over sequences) of the first eval_tokens of `tokens`, over all ranks."""
    rank, world = ranks()
    n = min(eval_tokens, len(tokens) - 1) // seq_len
    losses = torch.zeros(n, dtype=torch.float64, device=device)
    share = range(rank, n, world)
    for start in range(0, len(share), batch_size):
        places = share[start:start + batch_size]
        ids, targets = sequences(tokens, places, seq_len, device)
        with autocast:
            logits = model(ids)
        ce = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")  # (B, T)
        losses[places.start:places.stop:world] = ce.double().mean(1)
    if world > 1:
        dist.all_reduce(losses)
    return losses.mean().item(), (losses.std() / math.sqrt(n)).item() if n > 1 else float("nan")


# ---------------------------------------------------------------------------------------------------------
# What is written

def open_log(path, step):
    """log.jsonl opened to append to, without what it says of steps after `step`: they are about to be run again."""
    if os.path.exists(path):
        kept = []
        with open(path) as f:
            for line in f:
                try:
                    if not line.endswith("\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, TypeError, KeyError):  # cut by a crash of the machine
                    break
                kept.append(line)
        write_atomically(path, "".join(kept))
    return open(path, "a", buffering=1)


def log_line(run, measured, lr, seconds):
    """The line of log.jsonl for the step just made, a dict. Loss in nats a token, without the auxiliary losses."""
    speed = run.c.tokens_per_step / seconds
    line = {"step": run.state["step"], "tokens": run.state["tokens"], "loss": measured["loss"], "lr": lr,
            "grad_norm": measured["grad_norm"], "tokens_per_s": round(speed),
            "flops_per_s": round(speed * flops_per_token(run.model_config, run.c.max_seq_len))}
    counts = measured["counts"]
    if counts is not None:
        load = counts / counts.sum(-1, keepdim=True)
        line |= {"balance_loss": measured["balance_loss"], "z_loss": measured["z_loss"],
                 "effective_experts": [round(e, 3) for e in effective_experts(counts).tolist()],
                 "router_load": [[round(share, 4) for share in layer] for layer in load.tolist()]}
    return line


def save(run, kept):
    """Write the checkpoint of the step just made; a later one replaces it unless it is `kept`."""
    step, out_dir = run.state["step"], run.c.out_dir
    path = os.path.join(out_dir, f"checkpoint-{step}")
    if not os.path.exists(path):
        passing = {} if kept else {"passing": True}
        checkpoint.save(path, run.model, run.state | passing, run.optimizer, locate(run.c.dataset))
    for old, directory in checkpoint.checkpoints(out_dir):
        if old < step and checkpoint.read_state(directory).get("passing"):
            shutil.rmtree(directory)


def write_atomically(path, text):
    with open(path + ".tmp", "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def announce(run, stack):
    """Print what is about to be trained and what may surprise about it. Returns report(tokens) of a progress line."""
    c, state, row, world = run.c, run.state, run.row, ranks()[1]
    print(f"{c.out_dir}: {row['family']}, {row['N']:,} backbone parameters ({row['N_active']:,} active, "
          f"{row['N_total']:,} total), step {state['step']} of {run.max_steps}, {world} x {run.device.type}, "
          f"{run.accumulate} x {run.micro} sequences of {c.max_seq_len}")
    available = (len(run.tokens) - 1) // c.max_seq_len
    if state["sequence"] + (run.max_steps - state["step"]) * c.tokens_per_step // c.max_seq_len > available:
        print(f"{c.dataset}: {available * c.max_seq_len:,} training tokens are fewer than this run needs; some come again")
    if c.schedule == "wsd" and c.decay_steps and c.decay_start + c.decay_steps != run.max_steps:
        print(f"note: the decay ends at step {c.decay_start + c.decay_steps}, the run at {run.max_steps}")
    done = state["step"] * c.tokens_per_step
    return stack.enter_context(progress(run.max_steps * c.tokens_per_step, row["family"], "tok", initial=done)).update


# ---------------------------------------------------------------------------------------------------------
# The run

def train(c, report=None):
    """Run the settings `c` to their end and return the row (or None where c.rows is none); its flops are those of D or D2.

    report(tokens): called after each step in place of the progress line. Raises ConfigError for settings or files that do not
    fit and for a loss that is not finite, Stopped after SIGTERM or Ctrl-C.
    """
    with process_group(c.device) as device, caught_signals() as signals, contextlib.ExitStack() as stack:
        problem = [claim(c, stack) if ranks()[0] == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(problem)
        if problem[0]:
            raise ConfigError(problem[0])
        if not c.resume and checkpoint.checkpoints(c.out_dir):
            raise ConfigError(f"{c.out_dir}: holds a run already; --resume goes on with it, or choose another out_dir")
        run = resolve(c, device)
        if c.resume and os.path.exists(os.path.join(c.out_dir, "row.json")):
            return finished(run, report)
        build(run)
        loop(run, signals, report)
        return finish(run, report) if c.rows else None


def finished(run, report):
    """The row of a run that was finished before. Raises ConfigError where it was a run of other settings."""
    path = os.path.join(run.c.out_dir, "row.json")
    row = checkpoint.read_json(path)
    for key, there, asked in differences(row, run.row):
        raise ConfigError(f"{path}: {key} is {there!r} in this finished run, {asked!r} is asked for; choose another out_dir")
    if ranks()[0] == 0 and report is None:
        print(f"{path}: finished already, loss {row['loss']:.4f}; another out_dir starts anew")
    return row


def loop(run, signals, report):
    """Train from run.state to run.max_steps; log and save on the way. Raises Stopped when a signal was caught."""
    c, state, main = run.c, run.state, ranks()[0] == 0
    kept_steps = {state["step"] + -(-(level - state["tokens"]) // c.tokens_per_step) for level in c.save_at_tokens}
    kept_steps.add(run.max_steps)
    with contextlib.ExitStack() as stack:
        if main:
            write_config(c, os.path.join(c.out_dir, "config.py"))
            begins = state["step"] if run.source != c.init_from else -1
            log = stack.enter_context(open_log(os.path.join(c.out_dir, "log.jsonl"), begins))
        if main and report is None:
            report = announce(run, stack)
        batches = stack.enter_context(contextlib.closing(read_batches(run)))
        run.model.train()
        clock = saved_at = time.perf_counter()
        while state["step"] < run.max_steps:
            lr = learning_rate(state["step"], c, run.max_steps)
            due = main and c.save_every_seconds and time.perf_counter() - saved_at > c.save_every_seconds
            measured = train_step(run, *next(batches), lr, bool(signals), bool(due))
            state["step"] += 1
            state["tokens"] += c.tokens_per_step
            state["sequence"] += c.tokens_per_step // c.max_seq_len
            state["history"][-1][1] += c.tokens_per_step
            line = log_line(run, measured, lr, time.perf_counter() - clock)
            clock = time.perf_counter()
            if c.eval_every_steps and state["step"] % c.eval_every_steps == 0:
                line["val_loss"] = validation(run)[0]
                clock = time.perf_counter()  # tokens_per_s is the training's alone
            if main:
                log.write(json.dumps(line) + "\n")
            if state["step"] in kept_steps or measured["save"] or measured["stop"]:
                if main:
                    save(run, state["step"] in kept_steps)
                clock = saved_at = time.perf_counter()
            if main and report:
                report(c.tokens_per_step)
            if measured["stop"] and state["step"] < run.max_steps:
                raise Stopped(signals[0] if signals else signal.SIGTERM)


def validation(run):
    """(mean cross-entropy in nats a token, its standard error) of the run's model on its validation tokens."""
    c = run.c
    return validate(run.model, run.val_tokens, c.eval_tokens, c.max_seq_len, run.micro, run.device, run.autocast)


def finish(run, report):
    """Validate the finished run; write its row to c.rows and to row.json, and return it."""
    loss, se = validation(run)
    row = run.row | {"loss": loss, "loss_se": se, "git": code_version(), "torch": torch.__version__}
    if ranks()[0] == 0:
        append_row(run.c.rows, row)
        write_atomically(os.path.join(run.c.out_dir, "row.json"), json.dumps(row, indent=1) + "\n")
        if report is None:
            print(f"{row['family']}: validation loss {loss:.4f} ± {se:.4f} (standard error) nats a token after "
                  f"{tokens_seen(run.state):,} tokens; row in {run.c.rows}")
    return row


def main(c):
    try:
        train(c)
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{c.out_dir}: stopped by {signal.Signals(stopped.args[0]).name}, saved; --resume goes on")
        raise SystemExit(128 + stopped.args[0])


if __name__ == "__main__":
    run(main, Train)
