"""What a run starts from: settings with nothing left open, the training state, and the row it will have.

Also what stops it: signals, and another process in its directory.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import time
import types

import checkpoint
from configurator import ConfigError, locked, note, writing
from files import MEMORY, check_model
from model import ModelConfig, flops_per_token, parameter_counts
from parallel import on_cuda
from rows import ARCHITECTURE, EXPERTS, KNOBS, ROUTING, TRAINING, automatic_range, run_key

# The settings of train.py that config.json carries.
MODEL_KEYS = (*ARCHITECTURE, *EXPERTS, "router_aux_loss_coef")


def resolve(c, meta, world):
    """(settings, ModelConfig, state, checkpoint directory or None, steps at the end, row): how a run starts.

    c: Train settings as given. meta: the data set's meta.json. world: number of ranks. state: what
    trainer_state.json says. row: see planned_row. Raises ConfigError where settings and files do not fit.
    """
    if c.branch and not c.init_from:
        raise ConfigError("--branch needs a checkpoint to branch from: --init_from=...")
    resumed_from = newest(c) if c.resume else None
    source = resumed_from or c.init_from
    if source and resumed_from == c.init_from:
        raise ConfigError(f"{source}: is of the run in out_dir; --resume wants no --init_from of it")
    before = checkpoint.read_state(source) if source else {}
    c, m = resolve_architecture(c, source, meta)
    state = starting_state(c, m, meta, source, before, resumed_from)
    c, max_steps = resolve_schedule(c, state, source, resumed_from)
    trunk = c.trunk or (resumed_from or c.branch) and before.get("trunk")
    c = dataclasses.replace(c, trunk=trunk or os.path.basename(os.path.abspath(c.out_dir)))
    if not on_cuda(c.device) and (size := 16 * parameter_counts(m)["total"]) > MEMORY:
        raise ConfigError(f"weights, gradients and moments take {size / 1e9:,.0f} of {MEMORY / 1e9:,.0f} GB")
    seen = checkpoint.tokens_seen(state)
    row = planned_row(c, m, state["lineage"], seen + (max_steps - state["step"]) * c.tokens_per_step,
                      meta["data_sha256"], seen - state["tokens"], world)
    add_to_history(state["history"], row, state["lineage"], bool(resumed_from))
    now, then = row.get("sequences_per_pass"), before.get("sequences_per_pass")
    if resumed_from and then not in (None, now):
        note(f"{c.out_dir}: the balance loss is taken over {now} sequences, up to here it was over {then}")
    return c, m, state | {"trunk": c.trunk, "sequences_per_pass": now}, source, max_steps, row


def resolve_architecture(c, source, meta):
    """(settings with architecture and dtype resolved, ModelConfig): a checkpoint decides its architecture.
    Raises ConfigError for another one."""
    has_bias = c.router_bias_update_rate > 0
    # Of settings made in code, those are given that are not the default.
    given = getattr(c, "given", {f.name for f in dataclasses.fields(c) if getattr(c, f.name) != f.default})
    if c.dtype == "auto":
        c = dataclasses.replace(c, dtype="bfloat16" if on_cuda(c.device) else "float32")
    if not source:
        if c.initializer_range == "auto":  # a fixed one starts small widths with a plateau
            c = dataclasses.replace(c, initializer_range=automatic_range(c.hidden_size))
        try:
            return c, check_model(ModelConfig(
                vocab_size=meta["vocab_size"], max_position_embeddings=c.max_seq_len, router_bias=has_bias,
                eos_token_id=meta.get("eos_token_id"), **{key: getattr(c, key) for key in MODEL_KEYS}))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    m = checkpoint.read_config(source)
    there = {key: getattr(m, key) for key in MODEL_KEYS}
    if "router_aux_loss_coef" in given:  # config.json carries it, but it is a setting of the training
        there["router_aux_loss_coef"] = c.router_aux_loss_coef
    for key, value in there.items():
        if key in given and getattr(c, key) not in (None, "auto", value):
            raise ConfigError(f"{source}: {key} is {value!r} there, {getattr(c, key)!r} is asked for; "
                              f"leave {key} out")
    if c.max_seq_len > m.longest:
        raise ConfigError(f"{source}: takes at most {m.longest} tokens a sequence, "
                          f"max_seq_len = {c.max_seq_len} is too long")
    if meta["vocab_size"] > m.vocab_size:
        raise ConfigError(f"{source}: vocab_size is {m.vocab_size}, {c.dataset} has {meta['vocab_size']}")
    c = dataclasses.replace(c, **there)
    return c, dataclasses.replace(m, router_bias=m.router_bias or has_bias,
                                  router_aux_loss_coef=c.router_aux_loss_coef)


def starting_state(c, m, meta, source, before, resumed_from):
    """trainer_state.json as the run starts. before: the one in `source`, or {} if that has none.

    Raises ConfigError where the run cannot go on from there.
    """
    goes_on_with_state = resumed_from or c.branch
    needed = ("step", "sequence", "data_seed", "max_seq_len") if "data_sha256" in before else ("step",)
    if (before or resumed_from) and any(key not in before for key in needed):
        raise ConfigError(f"{source}: trainer_state.json is not complete")
    if goes_on_with_state and not any(file.startswith(checkpoint.MOMENTS) for file in os.listdir(source)):
        raise ConfigError(f"{source}: has no {checkpoint.MOMENTS} to branch from; --init_from needs none")
    lineage = before.get("lineage") or {"family": "moe" if m.num_local_experts else "dense",
                                        "N": parameter_counts(m)["N"]}
    if source and not before and c.D1 is None:  # unknown, and so for all that starts from this run
        lineage["D1"] = None
    for key in ("family", "N") + ("D1",) * (lineage.get("family") == "upcycled"):
        if key not in lineage:
            raise ConfigError(f"{source}: trainer_state.json: lineage: {key} is missing")
    if source and c.rows and lineage.get("D1", 0) is None:
        raise ConfigError(f"{source}: how many tokens its dense model has seen is not recorded, so its row "
                          "would be wrong: give --D1 where that is first read, or --rows=none")
    goes_on = before.get("data_sha256") == meta["data_sha256"] and (resumed_from or not c.repeat_data)
    if goes_on and before["max_seq_len"] != c.max_seq_len:
        raise ConfigError(f"{source}: was trained with max_seq_len = {before['max_seq_len']}; with "
                          f"{c.max_seq_len} it would read some data again: keep it, or give --repeat_data")
    if resumed_from and not goes_on:
        raise ConfigError(f"{source}: was trained on other data than {c.dataset}; choose another out_dir")
    step, tokens = (before["step"], before["tokens"]) if goes_on_with_state else (0, 0)
    sequence, data_seed = (before["sequence"], before["data_seed"]) if goes_on else (0, c.seed)
    return {"step": step, "tokens": tokens, "sequence": sequence, "data_seed": data_seed,
            "dataset": c.dataset, "data_sha256": meta["data_sha256"], "tokenizer": meta["tokenizer"],
            "max_seq_len": c.max_seq_len, "lineage": lineage,
            "history": before.get("history", [[source, c.D1 or 0]] if source and not before else []),
            "skipped": before.get("skipped", 0) if resumed_from else 0}


def resolve_schedule(c, state, source, resumed_from):
    """(settings, number of steps at the end). Raises ConfigError where max_tokens leaves nothing to train."""
    max_steps = state["step"] + -(-(c.max_tokens - state["tokens"]) // c.tokens_per_step)
    if max_steps < state["step"] or max_steps == state["step"] and not resumed_from:
        raise ConfigError(f"{source}: has seen {state['tokens']:,} tokens already, max_tokens = "
                          f"{c.max_tokens:,} leaves nothing to train")
    steps, start = c.decay_steps, c.decay_start
    if steps is None:
        steps = max_steps // 5 if start is None else max(0, max_steps - start)
    start = max_steps - steps if start is None else start
    return dataclasses.replace(c, decay_steps=steps, decay_start=start), max_steps


def newest(c):
    """The checkpoint in out_dir that a resumed run goes on from, or None: the newest, or the newest before
    the first level of save_at_tokens that has no checkpoint, because it was added since."""
    paths = [path for _, path in checkpoint.checkpoints(c.out_dir)]
    saved = {checkpoint.read_state(path).get("tokens", 0): path for path in paths}
    begin = checkpoint.read_state(c.init_from).get("tokens", 0) if c.branch else 0
    missing = [level for level in c.save_at_tokens
               if level > begin and not any(level <= tokens < level + c.tokens_per_step for tokens in saved)]
    end = min(missing, default=math.inf)
    return saved.get(max((tokens for tokens in saved if tokens < end), default=None))


# ---------------------------------------------------------------------------------------------------------
# Which run it is

def passes(c, world):
    """(sequences in one pass of a rank, passes in one step). Raises ConfigError for unequal shares."""
    per_rank, odd = divmod(c.tokens_per_step, c.max_seq_len * world)
    micro = min(c.micro_batch_size, per_rank)
    if odd or not per_rank or per_rank % micro:
        raise ConfigError(f"tokens_per_step = {c.tokens_per_step} is not a multiple of max_seq_len "
                          f"{c.max_seq_len} x {world} ranks x micro_batch_size {micro}")
    return micro, per_rank // micro


def planned_row(c, m, lineage, tokens, data_sha256, tokens_before_schedule=0, world=1):
    """The row of a run before it is run: all columns but loss, loss_se, git and torch.

    c: resolved Train settings. m: ModelConfig. lineage: family, N; if upcycled, D1, method and knobs too.
    tokens: what the weights will have seen since the random start or the upcycling.
    """
    n, upcycled = parameter_counts(m), lineage["family"] == "upcycled"
    row = {"family": lineage["family"], "N": lineage["N"], "N_active": n["N_active"], "N_total": n["N_total"],
           **({"D1": lineage["D1"], "D2": tokens} if upcycled else {"D": tokens}),
           "num_local_experts": m.num_local_experts,
           "num_experts_per_tok": m.num_experts_per_tok if m.num_local_experts else 0,
           "method": lineage.get("method"), **{key: lineage[key] for key in KNOBS if key in lineage},
           "seed": c.seed, "flops": tokens * flops_per_token(m, c.max_seq_len), "trunk": c.trunk,
           **({"dense_trunk": lineage.get("dense_trunk")} if upcycled else {}),
           **{key: getattr(m, key) for key in ARCHITECTURE}, **{key: getattr(c, key) for key in TRAINING},
           "tokens_before_schedule": tokens_before_schedule}
    if m.num_local_experts:
        row |= {key: getattr(c, key) for key in ROUTING} | {"sequences_per_pass": passes(c, world)[0] * world}
    return row | {"config": os.path.join(c.out_dir, "config.py"), "data_sha256": data_sha256}


def add_to_history(history, row, lineage, resumed):
    """Append [run_id, 0] to `history` for the run of `row`, unless a resumed run goes on with its last entry.

    run_id is a hash of what makes the run's weights: settings and data, the runs before it (a checkpoint of
    another tool is one), the upcycling, and a null, as it always was. Branches of one trunk share its run_id.
    """
    ends = () if row["schedule"] == "cosine" else ("D", "D2")
    made_by = run_key(row, (*ends, "eval_tokens", "trunk", "dense_trunk"))
    upcycling = {key: value for key, value in lineage.items() if key not in ("source", "dense_trunk")}

    def run_id(before):
        return hashlib.sha256(json.dumps([made_by, before, upcycling, None]).encode()).hexdigest()[:16]
    if not (resumed and history and history[-1][0] == run_id(history[:-1])):
        history.append([run_id(history), 0])


# ---------------------------------------------------------------------------------------------------------
# Signals, and the claim on a directory

STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # SLURM sends the last one
ONE_SENDING = 2.0  # seconds in which a batch system and a launcher send what counts as one signal


class Stopped(KeyboardInterrupt):
    """A signal of STOP has stopped the work; what was made is saved. args[0]: the signal."""


@contextlib.contextmanager
def caught_signals():
    """Yields an object with `caught`, a list that grows by each signal of STOP, and `at_once`.

    While at_once is true, the first signal raises Stopped wherever the process stands. A signal that comes
    again after two seconds ends the process. (Batch systems and torchrun send several, and one of each kind
    leaves time to save.) What the process was told to ignore, as by nohup, it ignores.
    """
    signals, began = types.SimpleNamespace(caught=[], at_once=True), {}

    def handle(number, frame):
        if time.monotonic() > began.setdefault(number, time.monotonic()) + ONE_SENDING:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        signals.caught.append(number)
        if signals.at_once and len(signals.caught) == 1:
            raise Stopped(number)
    before = {number: signal.signal(number, handle) for number in STOP
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield signals
    except Exception:  # libraries in C can make another error of the one that the handler raises
        if signals.at_once and signals.caught:
            raise Stopped(signals.caught[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def claim(c, stack):
    """Make and lock out_dir while `stack` lasts, and remove what a killed run left unfinished there. Raises
    ConfigError where that or the rows cannot be written, or where another process has the lock."""
    if c.rows == "":
        raise ConfigError("--rows= is empty: give a file, or none")
    stack.enter_context(locked(c.out_dir, ".lock", f"{c.out_dir}: another process is training there"))
    checkpoint.tidy(c.out_dir)
    if c.rows:
        folder = os.path.dirname(c.rows) or "."
        with writing(c.rows):
            os.makedirs(folder, exist_ok=True)
        exists = os.path.exists(c.rows)
        if exists and not os.path.isfile(c.rows) or not os.access(c.rows if exists else folder, os.W_OK):
            raise ConfigError(f"{c.rows}: rows cannot be written there")
