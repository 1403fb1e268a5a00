"""Train a model: dense, mixture of experts from scratch, upcycled, resumed or branched; one loop for all.

    python train.py config/dense_tiny.py --seed=1                         on one CPU or GPU
    torchrun --nproc_per_node=8 train.py config/dense_tiny.py             on 8 GPUs (nccl) or CPU processes (gloo)

A run writes to out_dir: config.py (resolved settings), log.jsonl (a line a step), checkpoint-STEP directories, and, when it is
done, row.json: its point for fit_laws.py, which is also appended to the file `rows`.
"""
import contextlib
import dataclasses
import fcntl
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
from data.stream import load_tokens, locate, sequences, shuffled
from model import ModelConfig, Transformer, balance_loss, effective_experts, flops_per_token, parameter_counts
from rows import KNOBS, append_row


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
    """SIGTERM or Ctrl-C: the step under way is finished and saved. args[0]: the signal."""


# ---------------------------------------------------------------------------------------------------------
# Pure functions of the step and of the index

def learning_rate(step, c, max_steps):
    """Learning rate of 0-based `step`: linear warm-up, stable, linear decay over [decay_start, decay_start + decay_steps), or cosine."""
    scale = min(1.0, (step + 1) / max(c.warmup_steps, 1))
    if c.schedule == "cosine":
        done = (step - c.warmup_steps) / max(max_steps - c.warmup_steps, 1)
        decay = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    else:
        done = (step - c.decay_start) / c.decay_steps if c.decay_steps else 0.0
        decay = 1.0 - min(max(done, 0.0), 1.0)
    return c.learning_rate * scale * (c.min_lr_ratio + (1 - c.min_lr_ratio) * decay)


@torch.no_grad()
def validate(model, tokens, eval_tokens, seq_len, batch_size, device, autocast=contextlib.nullcontext()):
    """(mean cross-entropy in nats, its standard error over sequences) of the first eval_tokens of `tokens`, shared over ranks."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    n = min(eval_tokens, len(tokens) - 1) // seq_len
    losses = torch.zeros(n, dtype=torch.float64, device=device)
    mine = range(rank, n, world)
    for start in range(0, len(mine), batch_size):
        places = mine[start:start + batch_size]
        ids, targets = sequences(tokens, places, seq_len, device)
        with autocast:
            logits = model(ids)
        ce = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")  # (B, T)
        losses[places.start:places.stop:world] = ce.double().mean(1)
    if world > 1:
        dist.all_reduce(losses)
    return losses.mean().item(), (losses.std() / math.sqrt(n)).item() if n > 1 else float("nan")


# ---------------------------------------------------------------------------------------------------------
# What a run starts from

def resolve(c, meta):
    """(settings with nothing left open, ModelConfig, state, checkpoint to load or None). Raises ConfigError."""
    own = newest(c) if c.resume else None
    source = own or c.init_from
    state = checkpoint.read_state(source) if source else {}
    if source:
        m = checkpoint.read_config(source)
        for key in MODEL_KEYS:  # the checkpoint decides; a setting that asks for something else is a mistake
            asked, default, there = getattr(c, key), Train.__dataclass_fields__[key].default, getattr(m, key)
            if asked not in (default, there) and not key.startswith("router_"):
                raise ConfigError(f"{source}: {key} is {there!r} there, {asked!r} is asked for; leave {key} out")
        if c.max_seq_len > m.max_position_embeddings:
            raise ConfigError(f"{source}: max_position_embeddings is {m.max_position_embeddings}, max_seq_len = {c.max_seq_len} is too long")
        if meta["vocab_size"] > m.vocab_size:
            raise ConfigError(f"{source}: vocab_size is {m.vocab_size}, dataset {c.dataset} has {meta['vocab_size']}")
        c = dataclasses.replace(c, **{key: getattr(m, key) for key in MODEL_KEYS if not key.startswith("router_")})
        m = dataclasses.replace(m, router_aux_loss_coef=c.router_aux_loss_coef, router_bias=m.router_bias or c.router_bias_update_rate > 0)
    else:
        try:
            m = ModelConfig(vocab_size=meta["vocab_size"], max_position_embeddings=c.max_seq_len, eos_token_id=meta.get("eos_token_id"),
                            router_bias=c.router_bias_update_rate > 0, **{key: getattr(c, key) for key in MODEL_KEYS})
        except ValueError as error:
            raise ConfigError(str(error)) from None
    whole = own or c.branch
    needed = ("step", "sequence", "data_seed", "max_seq_len") if "data_sha256" in state else ("step",) if state or own else ()
    if any(key not in state for key in needed):
        raise ConfigError(f"{source}: trainer_state.json is not complete")
    if whole and source and not os.path.exists(os.path.join(source, "optimizer.pt")):
        raise ConfigError(f"{source}: has no optimizer.pt to branch from; leave --branch out to start from its weights")
    lineage = state.get("lineage") or {"family": "moe" if m.num_local_experts else "dense", "N": parameter_counts(m)["N"]}
    if source and c.rows and (not state or lineage.get("D1", 0) is None):
        raise ConfigError(f"{source}: how many tokens its dense model has seen is not recorded, so its row would be wrong: give --D1 to upcycle.py, "
                          "or --rows=none")
    if state and not whole and state["tokens"]:  # a new schedule on weights that have seen tokens
        lineage = lineage | {"tokens_before": lineage.get("tokens_before", 0) + state["tokens"]}
    goes_on = state.get("data_sha256") == meta["data_sha256"] and (own or not c.repeat_data)
    if goes_on and state["max_seq_len"] != c.max_seq_len:
        raise ConfigError(f"{source}: was trained with max_seq_len = {state['max_seq_len']}; with {c.max_seq_len} its data would come "
                          "again unseen by the order: keep it, or allow that with --repeat_data")
    if own and not goes_on:
        raise ConfigError(f"{source}: was trained on other data than {c.dataset} holds now; choose another out_dir")
    state = {"step": state["step"] if whole else 0, "tokens": state["tokens"] if whole else 0,
             "sequence": state["sequence"] if goes_on else 0, "data_seed": state["data_seed"] if goes_on else c.seed,
             "dataset": c.dataset, "data_sha256": meta["data_sha256"], "tokenizer": meta["tokenizer"], "max_seq_len": c.max_seq_len,
             "lineage": lineage}
    max_steps = state["step"] + -(-(c.max_tokens - state["tokens"]) // c.tokens_per_step)
    if max_steps < state["step"] or max_steps == state["step"] and not own:
        raise ConfigError(f"{source}: has seen {state['tokens']:,} tokens already, max_tokens = {c.max_tokens:,} leaves nothing to train")
    if c.decay_steps is None:
        c = dataclasses.replace(c, decay_steps=max_steps // 5 if c.decay_start is None else max(0, max_steps - c.decay_start))
    if c.decay_start is None:
        c = dataclasses.replace(c, decay_start=max_steps - c.decay_steps)
    start = os.path.split(os.path.abspath(c.init_from or ""))
    trunk = c.trunk or os.path.basename(start[0] if c.branch and start[1].startswith("checkpoint-") else os.path.abspath(c.out_dir))
    return dataclasses.replace(c, trunk=trunk), m, state, source, max_steps


def newest(c):
    """The checkpoint of its own that a resumed run goes on from: the newest, or, where a level was added to save_at_tokens since,
    the newest before the first that is missing; None where there is none."""
    saved = dict(checkpoint.checkpoints(c.out_dir))
    first = checkpoint.read_state(c.init_from).get("step", 0) if c.branch else 0
    missing = [step for step in (-(-t // c.tokens_per_step) for t in c.save_at_tokens) if step not in saved and step > first]
    return saved.get(max((step for step in saved if not missing or step < min(missing)), default=None))


def truncate_log(path, step):
    """Drop what log.jsonl says of steps after `step`: they are about to be run again."""
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


def write_atomically(path, text):
    with open(path + ".tmp", "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


# ---------------------------------------------------------------------------------------------------------
# The run

def train(c, report=None):
    """Run the settings `c` to their end and return the row (or None where c.rows is none); its flops are those of D or D2.

    report(tokens): called after each step in place of the progress line. Raises ConfigError for settings or files that do not
    fit and for a loss that is not finite, Stopped after SIGTERM or Ctrl-C.
    """
    ddp = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    cuda = c.device == "cuda" or (c.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ConfigError("--device=cuda: torch sees no GPU here")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    started_group = ddp and not dist.is_initialized()
    if started_group:
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if ddp else (0, 1)
    signals = []
    handlers = {s: signal.signal(s, lambda number, frame: signals.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.ExitStack() as stack:
            problem = [claim(c, stack) if rank == 0 else None]
            if ddp:
                dist.broadcast_object_list(problem)
            if problem[0]:
                raise ConfigError(problem[0])
            return _train(c, report, rank, world, device, ddp, signals)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        if started_group:
            dist.destroy_process_group()


def claim(c, stack):
    """Make out_dir and lock it while `stack` lasts, and see that the rows can be written. Returns what is wrong, or None."""
    try:
        os.makedirs(c.out_dir, exist_ok=True)
        lock = stack.enter_context(open(os.path.join(c.out_dir, ".lock"), "w"))
        if c.rows:
            os.makedirs(os.path.dirname(c.rows) or ".", exist_ok=True)
            if os.path.isdir(c.rows) or not os.access(c.rows if os.path.exists(c.rows) else os.path.dirname(c.rows) or ".", os.W_OK):
                return f"{c.rows}: rows cannot be written there"
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"{c.out_dir}: another process is training there"
    except OSError as error:
        return f"{error.filename}: cannot be written: {error.strerror}"


def _train(c, report, rank, world, device, ddp, signals):
    done = os.path.join(c.out_dir, "row.json")
    if c.resume and os.path.exists(done):
        row = checkpoint.read_json(done)
        if rank == 0 and report is None:
            print(f"{done}: finished already, loss {row['loss']:.4f}; another out_dir starts anew")
        return row
    if not c.resume and checkpoint.checkpoints(c.out_dir):
        raise ConfigError(f"{c.out_dir}: holds a run already; --resume goes on with it, or choose another out_dir")
    tokens, meta = load_tokens(c.dataset, "train")
    val_tokens, _ = load_tokens(c.dataset, "val")
    c, model_config, state, source, max_steps = resolve(c, meta)
    T, available = c.max_seq_len, (len(tokens) - 1) // c.max_seq_len
    if available < 1 or len(val_tokens) <= T:
        raise ConfigError(f"{c.dataset}: too few tokens for one sequence of max_seq_len = {T}")
    if c.eval_tokens < T:
        raise ConfigError(f"eval_tokens = {c.eval_tokens} is less than one sequence, max_seq_len = {T}")
    per_rank, odd = divmod(c.tokens_per_step, T * world)
    micro = min(c.micro_batch_size, per_rank)
    if odd or not per_rank or per_rank % micro:
        raise ConfigError(f"tokens_per_step = {c.tokens_per_step} is not a multiple of max_seq_len {T} x {world} ranks x micro_batch_size {micro}")
    accumulate = per_rank // micro

    model = checkpoint.load_model(source, router_bias=model_config.router_bias) if source else Transformer(model_config).init_weights(c.seed)
    model.config = model_config
    model.to(device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}],
                                  lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)
    if source and (c.branch or source != c.init_from):
        checkpoint.load_moments(source, model, optimizer)
    step, lineage = state["step"], state["lineage"]
    family, n, flops = lineage["family"], parameter_counts(model_config), flops_per_token(model_config, T)
    forward = torch.compile(model, dynamic=False) if c.compile else model
    if ddp:
        forward = torch.nn.parallel.DistributedDataParallel(forward, device_ids=[device.index] if device.type == "cuda" else None,
                                                            broadcast_buffers=False)  # every rank computes the same ones
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16")
    main = rank == 0
    log_path = os.path.join(c.out_dir, "log.jsonl")
    if main:
        write_config(c, os.path.join(c.out_dir, "config.py"))
        truncate_log(log_path, step if source != c.init_from else -1)
    keep_at = {step + -(-(t - state["tokens"]) // c.tokens_per_step) for t in c.save_at_tokens}  # those behind included
    if main and report is None:
        print(f"{c.out_dir}: {family}, {n['N']:,} backbone parameters ({n['N_active']:,} active, {n['N_total']:,} total), "
              f"step {step} of {max_steps}, {world} x {device.type}, {accumulate} x {micro} sequences of {T}")
        if state["sequence"] + (max_steps - step) * c.tokens_per_step // T > available:
            print(f"{c.dataset}: {available * T:,} training tokens are fewer than this run needs; some come again")
        if c.schedule == "wsd" and c.decay_steps and c.decay_start + c.decay_steps != max_steps:
            print(f"note: the decay ends at step {c.decay_start + c.decay_steps}, the run at {max_steps}")
    bar = progress(max_steps * c.tokens_per_step, family, "tok", initial=step * c.tokens_per_step) if main and report is None else None

    def save():
        if main:
            path = os.path.join(c.out_dir, f"checkpoint-{step}")
            if not os.path.exists(path):
                passing = {} if step in keep_at or step == max_steps else {"passing": True}
                checkpoint.save(path, model, state | {"step": step} | passing, optimizer, locate(c.dataset))
            for old, directory in checkpoint.checkpoints(c.out_dir):  # a newer one is complete: those to resume from can go
                if old < step and checkpoint.read_state(directory).get("passing"):
                    shutil.rmtree(directory)

    model.train()
    clock = saved_at = time.perf_counter()
    log = open(log_path, "a", buffering=1) if main else contextlib.nullcontext()
    with log:
        while step < max_steps:
            lr = learning_rate(step, c, max_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            places = shuffled(state["sequence"] + rank * per_rank + np.arange(per_rank), available, state["data_seed"])
            sums, counts = torch.zeros(5, device=device), 0  # loss, balance, z, stop, save
            for i in range(accumulate):
                ids, targets = sequences(tokens, places[i * micro:(i + 1) * micro], T, device)
                sync = contextlib.nullcontext() if not ddp or i == accumulate - 1 else forward.no_sync()
                with sync:
                    with autocast:
                        loss, router = forward(ids, targets)
                    sums[0] += loss.detach()
                    if router:
                        balance = balance_loss(router["counts"], router["probs"])
                        sums[1:3] += torch.stack((balance, router["z_loss"])).detach()
                        counts = counts + router["counts"]
                        loss = loss + c.router_aux_loss_coef * balance + c.router_z_loss_coef * router["z_loss"]
                    (loss / accumulate).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
            sums[:3] /= accumulate * world
            sums[3] = bool(signals)
            sums[4] = bool(main and c.save_every_seconds and time.perf_counter() - saved_at > c.save_every_seconds)
            if ddp:
                dist.all_reduce(sums)
                if router:
                    dist.all_reduce(counts)
            loss, balance, z_loss, stop, save_now = sums.tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                last = checkpoint.checkpoints(c.out_dir)
                raise ConfigError(f"{c.out_dir}: loss {loss:g}, gradient norm {float(norm):g} at step {step}, token {state['tokens']}; stopped "
                                  f"before the update. Last good checkpoint: {last[-1][1] if last else 'none'}; try a lower learning_rate "
                                  f"than {c.learning_rate:g}")
            optimizer.step()
            optimizer.zero_grad()
            if router and c.router_bias_update_rate:
                for layer, count in zip(model.layers, counts):
                    layer.mlp.bias += c.router_bias_update_rate * torch.sign(count.mean() - count)
            step += 1
            state["tokens"] += c.tokens_per_step
            state["sequence"] += c.tokens_per_step // T

            now = time.perf_counter()
            speed, clock = c.tokens_per_step / (now - clock), now
            if main:
                line = {"step": step, "tokens": state["tokens"], "loss": loss, "lr": lr, "grad_norm": float(norm),
                        "tokens_per_s": round(speed), "flops_per_s": round(speed * flops)}
                if router:
                    load = counts / counts.sum(-1, keepdim=True)  # (L, E)
                    line |= {"balance_loss": balance, "z_loss": z_loss,
                             "effective_experts": [round(e, 3) for e in effective_experts(counts).tolist()],
                             "router_load": [[round(share, 4) for share in layer] for layer in load.tolist()]}
            if c.eval_every_steps and step % c.eval_every_steps == 0:
                val, _ = validate(model, val_tokens, c.eval_tokens, T, micro, device, autocast)
                if main:
                    line["val_loss"] = val
            if main:
                log.write(json.dumps(line) + "\n")
            if step in keep_at or step == max_steps or save_now or stop:
                save()
                clock = saved_at = time.perf_counter()
            if bar is not None:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update(c.tokens_per_step)
            elif report:
                report(c.tokens_per_step)
            if stop and step < max_steps:
                raise Stopped(signals[0] if signals else signal.SIGTERM)
    if bar is not None:
        bar.close()
    if c.rows is None:
        return None

    loss, se = validate(model, val_tokens, c.eval_tokens, T, micro, device, autocast)
    seen = state["tokens"] + lineage.get("tokens_before", 0)
    method = lineage.get("method")
    row = {"family": family, "N": lineage["N"], "N_active": n["N_active"], "N_total": n["N_total"],
           **({"D1": lineage["D1"], "D2": seen} if family == "upcycled" else {"D": seen}), "loss": loss, "loss_se": se,
           "num_local_experts": c.num_local_experts, "num_experts_per_tok": c.num_experts_per_tok if c.num_local_experts else 0,
           "method": method, **{key: lineage[key] for key in KNOBS if key in lineage}, "seed": c.seed, "flops": seen * flops,
           "trunk": c.trunk, "config": os.path.join(c.out_dir, "config.py"), "data_sha256": meta["data_sha256"],
           "git": code_version(), "torch": torch.__version__}
    if main:
        append_row(c.rows, row)
        write_atomically(os.path.join(c.out_dir, "row.json"), json.dumps(row, indent=1) + "\n")
        if report is None:
            print(f"{family}: validation loss {loss:.4f} ± {se:.4f} (standard error) nats a token after {seen:,} tokens; row in {c.rows}")
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
