"""Train a model: dense, mixture of experts from scratch, upcycled, resumed or branched; one loop for all.

    python train.py config/dense_tiny.py --seed=1                         on one CPU or GPU
    torchrun --nproc_per_node=8 train.py config/dense_tiny.py             on 8 GPUs or CPU processes

A run writes to out_dir: config.py (resolved settings), log.jsonl (a line a step), checkpoint-STEP directories
and, when it is done, row.json: its point for fit_laws.py, which it also appends to the file `rows`.
"""
import contextlib
import copy
import json
import math
import os
import shutil
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from configurator import (ConfigError, code_version, progress, run, setting, write_config,
                          write_text_atomically, writing)

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
from data.stream import batches, bits_per_byte, check_ids, load_tokens, locate, sequences
from loggers import open_log, open_loggers
from model import ModelConfig, Transformer, balance_loss, effective_experts, flops_per_token
from parallel import any_rank, compiled, on_cuda, process_group, ranks, shard, whole
from rows import append_row, differences, loss_text, read_row
from start import Stopped, caught_signals, claim, passes, resolve
from tensors import is_finite


@dataclass
class Train:
    """Train a dense or mixture-of-experts model on one device, or on many under torchrun."""
    config: str | None = setting(None, "config file: assignments of the settings below", positional=True)
    out_dir: str = setting("out/run", "directory of the run's log and checkpoints")
    rows: str | None = setting("out/rows.jsonl", "file to which the finished run appends its row; none: none")
    D1: int | None = setting(None, "tokens that a model of another tool in init_from has seen", least=1)
    trunk: str | None = setting(None, "name of the trunk; none: that of the run branched from, or out_dir")
    dataset: str = setting("data/pysource", "directory that data/prepare.py wrote, or its name in data/")
    seed: int = setting(0, "of the weights and of the order of the data", least=0)
    init_from: str | None = setting(None, "checkpoint to start from: its weights, in a new schedule")
    branch: bool = setting(False, "take the whole state of init_from: step, tokens, optimizer too")
    resume: bool = setting(False, "go on from the newest checkpoint in out_dir, if there is one")
    repeat_data: bool = setting(False, "start the data anew, not where init_from stopped")

    hidden_size: int = setting(64, "width of the residual stream", least=1)
    intermediate_size: int = setting(176, "width of the MLP, or of each expert", least=1)
    num_hidden_layers: int = setting(4, "layers", least=1)
    num_attention_heads: int = setting(4, "attention heads", least=1)
    num_key_value_heads: int | None = setting(None, "key-value heads; none: all heads have them", least=1)
    tie_word_embeddings: bool = setting(True, "use the token embedding as the output head")
    rope_theta: float = setting(10000.0, "base of the rotary embedding", least=1)
    initializer_range: float | Literal["auto"] = setting("auto", "standard deviation of fresh weights; auto: "
                                                         "0.68 / sqrt(hidden_size)", least=0)
    num_local_experts: int = setting(0, "experts a layer; 0: dense", least=0)
    num_experts_per_tok: int = setting(2, "experts a token uses", least=1)

    max_tokens: int = setting(2_000_000, "tokens to train on, with those of a branched checkpoint", least=1)
    tokens_per_step: int = setting(2048, "tokens of one optimizer step, over all ranks", least=1)
    micro_batch_size: int = setting(64, "sequences in one pass of one rank, at most; passes accumulate, and "
                                    "the balance loss is taken over one pass of all ranks", least=1)
    max_seq_len: int = setting(128, "tokens in a sequence", least=1)
    learning_rate: float = setting(3e-3, "peak learning rate", least=0)
    schedule: Literal["wsd", "cosine"] = setting("wsd", "warmup-stable-decay, or cosine over the whole run")
    warmup_steps: int = setting(50, "steps of linear warm-up", least=0)
    decay_start: int | None = setting(None, "step where the wsd decay starts; none: to end last", least=0)
    decay_steps: int | None = setting(None, "steps of the wsd decay; none: a fifth of the run, or from "
                                      "decay_start to its end", least=0)
    min_lr_ratio: float = setting(0.0, "where the decay ends, as a share of learning_rate", least=0, most=1)
    weight_decay: float = setting(0.1, "AdamW's, on matrices only", least=0)
    beta1: float = setting(0.9, "AdamW's", least=0, most=0.9999)
    beta2: float = setting(0.95, "AdamW's", least=0, most=0.99999)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", least=0)
    router_aux_loss_coef: float = setting(0.01, "coefficient of the balance loss (1 = balanced)", least=0)
    router_aux_loss_pooled: bool = setting(False, "one balance loss of all layers, as in transformers")
    router_z_loss_coef: float = setting(0.001, "coefficient of the router's z-loss", least=0)
    router_bias_update_rate: float = setting(0.0, "step of the bias of loss-free balancing (arXiv "
                                             "2408.15664); 0: no bias", least=0)

    eval_tokens: int = setting(262_144, "validation tokens, always the same ones", least=1)
    loggers: list[Literal["tensorboard", "wandb"]] = setting([], "further places for the log's lines")
    eval_every_steps: int = setting(0, "steps between validations; 0: only at the end", least=0)
    save_at_tokens: list[int] = setting([], "tokens at which to keep a checkpoint, to the next step", least=1)
    skip_nonfinite: int = setting(0, "steps without finite loss or gradient to skip before it stops", least=0)
    save_every_seconds: int = setting(600, "seconds between checkpoints to resume from; 0: none", least=0)
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of matrix products, weights stay float32; auto: bfloat16 on GPUs, float32 on CPUs")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    compile: bool | Literal["auto"] = setting("auto", "compile the model; auto: where the run is long enough "
                                              "to earn the time that it takes")
    parallel: Literal["ddp", "fsdp"] = setting("ddp", "under torchrun, ddp: each rank holds the whole model; "
                                               "fsdp: a part of each parameter, gradient and moment")
    cpu_offload: bool = setting(False, "fsdp: keep those parts in the memory of the host")
    activation_checkpointing: bool = setting(False, "compute a layer's activations again for its gradient")
    shard_size: int = setting(5_000_000_000, "largest size of a weight file in bytes, as 5e9", least=1)
    timeout_seconds: int = setting(1800, "seconds that a rank waits for another one before it fails; more "
                                   "than a checkpoint takes", least=1)


@dataclass
class Run:
    """A run with nothing left open: what its steps, log, checkpoints and row are made from."""
    c: Train
    model_config: ModelConfig
    state: dict  # trainer_state.json as of now
    source: str | None  # the checkpoint directory that the weights come from
    max_steps: int
    row: dict  # all of the row but what only the end of the run tells
    finished: dict | None  # the row of out_dir, where the run was made before
    meta: dict  # meta.json of the data set
    tokens: np.ndarray
    val_tokens: np.ndarray
    micro: int  # sequences in one pass of this rank
    accumulate: int  # passes in one step
    device: torch.device
    autocast: torch.autocast
    model: Transformer = None  # as it is saved
    optimizer: torch.optim.Optimizer = None
    forward: torch.nn.Module = None  # the model as it is called: compiled, and wrapped for many ranks
    no_sync: object = contextlib.nullcontext  # makes a context in which ranks do not sum their gradients
    steps_there: frozenset = frozenset()  # steps whose checkpoints were there at the start
    beside: dict = None  # checkpoint.companions
    writers: dist.ProcessGroup = None  # over which rank 0 gathers the parts of a checkpoint; None: it has all
    pending: Future = None  # of the checkpoint that is being written


def learning_rate(step, c, max_steps):
    """Learning rate of 0-based `step`: linear warm-up, then stable, then linear decay over the steps
    [decay_start, decay_start + decay_steps); or a cosine over the whole run."""
    scale = min(1.0, (step + 1) / max(c.warmup_steps, 1))
    if c.schedule == "cosine":
        done = (step - c.warmup_steps) / max(max_steps - c.warmup_steps, 1)
        decay = 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
    else:
        done = (step - c.decay_start) / c.decay_steps if c.decay_steps else 0.0
        decay = 1.0 - min(max(done, 0.0), 1.0)
    return c.learning_rate * scale * (c.min_lr_ratio + (1 - c.min_lr_ratio) * decay)


# ---------------------------------------------------------------------------------------------------------
# Set-up

def make_optimizer(model, c):
    """AdamW with weight decay on matrices, none on vectors."""
    groups = [{"params": [p for p in model.parameters() if (p.dim() >= 2) == is_matrix],
               "weight_decay": c.weight_decay * is_matrix} for is_matrix in (True, False)]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), fused=True)


def pays_to_compile(flops, kind):
    """Whether so many FLOPs on the setting device=`kind` earn the time of compilation. No clock is asked, so
    a run that is resumed computes as before. dev/LOG.md has the measurements."""
    return flops > (1e16 if on_cuda(kind) else 4e12) and bool(shutil.which(os.environ.get("CXX", "g++")))


def plan_run(c, device, stack):
    """The Run of settings `c`, without its model. Rank 0 claims out_dir while `stack` lasts, looks at the
    files there and tells the others. Raises ConfigError where settings and files do not fit."""
    tokens, meta = load_tokens(c.dataset, "train")
    val_tokens, _ = load_tokens(c.dataset, "val")
    (rank, world), plan = ranks(), [None]
    if rank == 0:
        claim(c, stack)
        check_ids(c.dataset, meta, tokens, val_tokens)
        there = frozenset(step for step, _ in checkpoint.checkpoints(c.out_dir))
        if there and not c.resume:
            raise ConfigError(f"{c.out_dir}: holds a run already; --resume goes on with it")
        path = os.path.join(c.out_dir, "row.json")
        plan = [(*resolve(c, meta, world), read_row(path) if c.resume and os.path.exists(path) else None,
                 there)]
    if dist.is_initialized():
        dist.broadcast_object_list(plan)
    c, m, state, source, max_steps, row, finished, there = plan[0]
    if min(len(tokens), len(val_tokens)) <= c.max_seq_len:
        raise ConfigError(f"{c.dataset}: too few tokens for one sequence of max_seq_len = {c.max_seq_len}")
    if c.eval_tokens < c.max_seq_len:
        raise ConfigError(f"eval_tokens = {c.eval_tokens} is less than one sequence of {c.max_seq_len}")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=c.dtype == "bfloat16")
    return Run(c, m, state, source, max_steps, row, finished, meta, tokens, val_tokens, *passes(c, world),
               device, autocast, steps_there=there)


def build(run):
    """Give `run` its model and optimizer. Raises ConfigError for a checkpoint that cannot be read."""
    c, m, device = run.c, run.model_config, run.device
    sharded = c.parallel == "fsdp" and dist.is_initialized()
    if c.cpu_offload and not sharded:
        raise ConfigError("--cpu_offload goes with --parallel=fsdp, under torchrun")
    to_compile = pays_to_compile(run.row["flops"], c.device) if c.compile == "auto" else c.compile

    def place(model):
        for layer in model.layers:
            layer.recompute = c.activation_checkpointing
        if sharded:
            model = compiled(model, by_layer=True) if to_compile else model
            shard(model, device, torch.bfloat16 if c.dtype == "bfloat16" else None, c.cpu_offload)
        return model.materialise("cpu" if c.cpu_offload else device, device)
    if run.source:
        run.model = checkpoint.load_model(run.source, router_bias=m.router_bias, place=place,
                                          positions=c.max_seq_len)
    else:
        with torch.device("meta"):
            run.model = Transformer(m)
        place(run.model).init_weights(c.seed)
    run.model.config = m
    run.beside = checkpoint.companions(locate(c.dataset), run.source)
    run.optimizer = make_optimizer(run.model, c)
    if run.source and (c.branch or run.source != c.init_from):
        checkpoint.load_moments(run.source, run.model, run.optimizer)
    run.forward = compiled(run.model) if to_compile and not sharded else run.model
    if sharded:  # saving has its own group, since it goes on beside the steps
        run.writers = dist.new_group(backend="gloo", timeout=timedelta(seconds=c.timeout_seconds))
    elif dist.is_initialized():
        run.forward = torch.nn.parallel.DistributedDataParallel(
            run.forward, device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False, gradient_as_bucket_view=True)  # all ranks compute the same buffers
        run.no_sync = run.forward.no_sync
    if c.eval_every_steps:  # what is compiled for validation is compiled now: signals interrupt it
        validate(run, tokens=min(c.eval_tokens, run.micro * ranks()[1] * c.max_seq_len))


# ---------------------------------------------------------------------------------------------------------
# The step

def train_step(run, stream, lr, stop, save_now):
    """One optimizer step on the next passes of `stream`, (ids, targets) each. It waits for the device once.

    Returns {"loss", "balance_loss", "z_loss", "grad_norm": floats, "counts": (L, E) assignments or None,
    "stop", "save": whether a rank asks for it, "skipped": whether there was no update}, the same on all
    ranks. There is none where the loss or the gradient is not finite. Raises ConfigError as `skip` does.
    """
    c, router = run.c, None
    sums, counts = torch.zeros(5, device=run.device), 0  # loss, balance, z, stop, save
    for i in range(run.accumulate):
        with contextlib.nullcontext() if i == run.accumulate - 1 else run.no_sync():
            with run.autocast:
                loss, router = run.forward(*next(stream))
            sums[0] += loss.detach()
            if router:
                balance = balance_loss(router["counts"], router["probs"], c.router_aux_loss_pooled)
                sums[1:3] += torch.stack((balance, router["z_loss"])).detach()
                counts = counts + router["counts"]
                loss = loss + c.router_aux_loss_coef * balance + c.router_z_loss_coef * router["z_loss"]
            (loss / run.accumulate).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
    sums[:3] /= run.accumulate * ranks()[1]
    sums[3], sums[4] = stop, save_now
    shared = torch.cat((sums, counts.flatten())) if router else sums
    if dist.is_initialized():
        dist.all_reduce(shared)
    values = torch.cat((whole(norm).reshape(1).to(run.device), shared)).tolist()
    measured = dict(zip(("grad_norm", "loss", "balance_loss", "z_loss", "stop", "save"), values), counts=None)
    measured["skipped"] = not (math.isfinite(measured["loss"]) and math.isfinite(measured["grad_norm"]))
    if measured["skipped"]:
        skip(run, measured)
        return measured
    torch.nn.utils.clip_grads_with_norm_(run.model.parameters(), c.grad_clip or math.inf, norm)
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


def skip(run, measured):
    """Drop the gradient of a step that is not finite. Raises ConfigError beyond skip_nonfinite such steps."""
    c, state, last = run.c, run.state, checkpoint.checkpoints(run.c.out_dir)
    wrong = [name for name, p in run.model.named_parameters()
             if p.grad is not None and not is_finite(whole(p.grad))]
    state["skipped"] += 1
    if state["skipped"] > c.skip_nonfinite:
        raise ConfigError(
            f"{c.out_dir}: loss {measured['loss']:g}, gradient norm {measured['grad_norm']:g} at step "
            f"{state['step']}, token {state['tokens']}; the gradient is not finite up to "
            f"{wrong[-1] if wrong else 'no parameter'}; stopped before the update. Last good checkpoint: "
            f"{last[-1][1] if last else 'none'}; try a learning_rate below {c.learning_rate:g}")
    run.optimizer.zero_grad()


@torch.no_grad()
def validate(run, stop=(), tokens=None):
    """(mean cross-entropy in nats a token, its standard error over sequences) of so many validation tokens,
    eval_tokens if None; (-inf, nan) where a rank found something in the list `stop` and all left off. All
    ranks make the same passes, since fsdp has them gather weights in each."""
    (rank, world), seq_len = ranks(), run.c.max_seq_len
    n = min(tokens or run.c.eval_tokens, len(run.val_tokens) - 1) // seq_len
    losses, share = torch.zeros(n, dtype=torch.float64, device=run.device), range(rank, n, world)
    for start in range(0, -(-n // world), run.micro):
        if any_rank(stop, run.device):
            losses.fill_(-math.inf)
            break
        places = share[start:start + run.micro]
        ids, targets = sequences(run.val_tokens, places or [0], seq_len, run.device)
        with run.autocast:
            ce = run.model(ids, targets, reduction="none")[0]  # (B, T)
        losses[places.start:places.stop:world] = ce.double().mean(1)[:len(places)]
    if world > 1:
        dist.all_reduce(losses)
    return losses.mean().item(), (losses.std() / math.sqrt(n)).item() if n > 1 else float("nan")


# ---------------------------------------------------------------------------------------------------------
# What is written

def log_line(run, measured, lr, seconds):
    """The log's line of the step just made, which took `seconds`: a dict."""
    speed = run.c.tokens_per_step / seconds
    line = {"step": run.state["step"], "tokens": run.state["tokens"], "loss": measured["loss"], "lr": lr,
            "grad_norm": measured["grad_norm"], "tokens_per_s": round(speed),
            "flops_per_s": round(speed * flops_per_token(run.model_config, run.c.max_seq_len))}
    if measured["skipped"]:
        line["skipped"] = run.state["skipped"]
    if (counts := measured["counts"]) is not None:
        load = counts / counts.sum(-1, keepdim=True)
        line |= {"balance_loss": measured["balance_loss"], "z_loss": measured["z_loss"],
                 "effective_experts": [round(e, 3) for e in effective_experts(counts).tolist()],
                 "router_load": [[round(share, 4) for share in layer] for layer in load.tolist()]}
    return line


def save(run, pool, kept):
    """Let `pool` write the checkpoint of the step just made from a copy in host memory. The next one replaces
    it unless it is `kept`. Raises the ConfigError of the one before."""
    finish_saving(run)
    rank, sharded = ranks()[0], run.writers is not None
    if run.state["step"] not in run.steps_there and (rank == 0 or sharded):
        state = copy.deepcopy(run.state) | ({} if kept else {"passing": True})
        contents = checkpoint.contents(run.model, run.optimizer, copy=True)
        run.pending = pool.submit(write_checkpoint, run, contents, state)


def write_checkpoint(run, contents, state):
    out_dir = run.c.out_dir
    if ranks()[0] == 0 and not os.path.exists(os.path.join(out_dir, ".lock")):
        raise ConfigError(f"{out_dir}: was removed while it was written to")
    checkpoint.write(os.path.join(out_dir, f"checkpoint-{state['step']}"), contents, state,
                     checkpoint.with_training(run.beside, state), run.c.shard_size, run.writers)
    if ranks()[0] == 0:
        checkpoint.tidy(out_dir)


def finish_saving(run, wait=True):
    """Wait until the last checkpoint is complete; or, without `wait`, look. Raises its ConfigError."""
    if run.pending and (wait or run.pending.done()):
        pending, run.pending = run.pending, None
        pending.result()


def announce(run):
    """Print what is about to be trained and what may surprise about it. Returns the progress bar."""
    c, step, row, length = run.c, run.state["step"], run.row, run.c.max_seq_len
    print(f"{c.out_dir}: {row['family']}, {row['N']:,} backbone parameters ({row['N_active']:,} active, "
          f"{row['N_total']:,} total), step {step} of {run.max_steps}, {ranks()[1]} x {run.device.type}, "
          f"{run.accumulate} x {run.micro} sequences of {length}")
    available = (len(run.tokens) - 1) // length
    if run.state["sequence"] + (run.max_steps - step) * c.tokens_per_step // length > available:
        print(f"{c.dataset}: {available * length:,} training tokens, too few for this run; some come again")
    if c.schedule == "wsd" and c.decay_steps and c.decay_start + c.decay_steps != run.max_steps:
        print(f"note: the decay ends at step {c.decay_start + c.decay_steps}, the run at {run.max_steps}")
    if c.branch and run.source == c.init_from and c.schedule == "wsd" and step > c.decay_start:
        print(f"note: the branch starts at step {step}, its decay was to start at {c.decay_start}")
    return progress(run.max_steps * c.tokens_per_step, row["family"], "tok", initial=step * c.tokens_per_step)


# ---------------------------------------------------------------------------------------------------------
# The run

def train(c, report=None):
    """Run the settings `c` to their end. Returns its row, with the flops of D or D2, or None where c.rows is.

    report(tokens): called after each step, in place of the progress bar. Raises ConfigError for settings or
    files that do not fit and for a loss that is not finite, Stopped after a signal of STOP.
    """
    with (process_group(c.device, c.timeout_seconds) as device, caught_signals() as signals,
          contextlib.ExitStack() as stack):
        run = plan_run(c, device, stack)
        if row := run.finished:
            path = os.path.join(c.out_dir, "row.json")
            for key, there, asked in differences(row, run.row):
                raise ConfigError(f"{path}: {key} is {there!r} in this finished run, {asked!r} is asked for; "
                                  "choose another out_dir")
            if ranks()[0] == 0 and report is None:
                print(f"{path}: finished already, {loss_text(row)}; another out_dir starts anew")
            return row
        build(run)
        loop(run, signals, report)
        return finish(run, report) if c.rows else None


def loop(run, signals, report):
    """Train from run.state to run.max_steps, log and save. Raises Stopped after a signal: at once before the
    first step is done, when nothing is lost, and else on all ranks when the step is saved."""
    c, state, rank = run.c, run.state, ranks()[0]
    kept = {state["step"] - (state["tokens"] - level) // c.tokens_per_step for level in c.save_at_tokens}
    kept.add(run.max_steps)
    first, stride = state["sequence"] + rank * run.micro, ranks()[1] * run.micro
    stream = batches(run.tokens, first, run.micro, stride, c.max_seq_len, state["data_seed"], run.device)
    with contextlib.closing(stream), contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        if rank == 0:
            write_config(c, os.path.join(c.out_dir, "config.py"))
            last = state["step"] if run.source != c.init_from else -1
            log_path = os.path.join(c.out_dir, "log.jsonl")
            log = stack.enter_context(open_log(log_path, last))
            send = stack.enter_context(open_loggers(c, last))
            report = report or stack.enter_context(announce(run)).update
        run.model.train()
        clock = saved_at = time.perf_counter()
        while state["step"] < run.max_steps:
            lr = learning_rate(state["step"], c, run.max_steps)
            due = rank == 0 and 0 < c.save_every_seconds < time.perf_counter() - saved_at
            measured = train_step(run, stream, lr, bool(signals.caught), due)
            signals.at_once = False
            state["step"] += 1
            state["tokens"] += c.tokens_per_step
            state["sequence"] += c.tokens_per_step // c.max_seq_len
            state["history"][-1][1] += c.tokens_per_step
            line = log_line(run, measured, lr, time.perf_counter() - clock)
            clock = time.perf_counter()
            if c.eval_every_steps and state["step"] % c.eval_every_steps == 0:
                line["val_loss"] = validate(run, signals.caught)[0]
                clock = time.perf_counter()  # tokens_per_s is that of training
                if line["val_loss"] == -math.inf:  # a signal came
                    measured["stop"] = line.pop("val_loss")
                elif not math.isfinite(line["val_loss"]):
                    raise ConfigError(f"{c.out_dir}: the validation loss is {line['val_loss']:g} after step "
                                      f"{state['step']}; try a learning_rate below {c.learning_rate:g}")
                else:
                    line["val_bits_per_byte"] = bits_per_byte(line["val_loss"], run.meta)
            save_now = state["step"] in kept or measured["save"] or measured["stop"]
            if rank == 0:
                text = json.dumps(line).encode() + b"\n"
                with writing(log_path, len(text)):
                    log.write(text)
                send(line)
            if save_now:
                save(run, pool, state["step"] in kept)
                clock = saved_at = time.perf_counter()
            if rank == 0:
                report(c.tokens_per_step)
            if measured["stop"]:
                break
            finish_saving(run, wait=False)
        finish_saving(run)
        stop = any_rank(signals.caught, run.device)  # no rank ends while rank 0 writes: that may end it too
    signals.at_once = True
    if stop or signals.caught:
        raise Stopped(signals.caught[0] if signals.caught else signal.SIGTERM)


def finish(run, report):
    """Validate the finished run; append its row to c.rows, write it to row.json and return it."""
    loss, se = validate(run)
    if not math.isfinite(loss):
        raise ConfigError(f"{run.c.out_dir}: the validation loss is {loss:g}, so the run has no row")
    row = run.row | {"loss": loss, "loss_se": se, "bits_per_byte": bits_per_byte(loss, run.meta),
                     "git": code_version(), "torch": torch.__version__}
    if ranks()[0] == 0:
        said = f" Its validation loss is {loss_text(row)}."
        if card := checkpoint.with_training(run.beside, run.state, said).get(checkpoint.CARD):
            path = os.path.join(run.c.out_dir, f"checkpoint-{run.state['step']}", checkpoint.CARD)
            write_text_atomically(path, card)
        append_row(run.c.rows, row)
        write_text_atomically(os.path.join(run.c.out_dir, "row.json"), json.dumps(row, indent=1) + "\n")
        if report is None:
            print(f"{row['family']}: validation loss {loss_text(row)}, standard error {se:.4f}, "
                  f"after {checkpoint.tokens_seen(run.state):,} tokens; row in {run.c.rows}")
    return row


def main(c):
    try:
        train(c)
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{c.out_dir}: stopped by {signal.Signals(stopped.args[0]).name}; --resume goes on")
        raise SystemExit(128 + stopped.args[0])


if __name__ == "__main__":
    run(main, Train)
