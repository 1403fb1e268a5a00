"""Run a study: a grid over N x D1 x D2 of upcycled runs, with the dense and from-scratch MoE runs beside it.

    python sweep.py config/study_quick.py [--dry_run]

A trunk is trained once, at a stable learning rate; each point of the laws is a branch of it that decays. Points of one dense
trunk are also where upcycling starts. What is finished is skipped; a stop (Ctrl-C, SIGTERM) or, on Linux, a kill of this process
loses at most the step under way, a kill of a worker what came after its last checkpoint (save_every_seconds). Rows go to out_dir/rows.jsonl.
"""
import contextlib
import ctypes
import dataclasses
import fcntl
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait

import checkpoint
from configurator import REQUIRED, ConfigError, from_dict, progress, read_config, run, setting
from data.stream import load_tokens
from model import ModelConfig, flops_per_token, parameter_counts
from rows import append_row
from train import MODEL_KEYS, Stopped, Train, train
from upcycle import Options as UpcycleOptions, upcycle


@dataclass
class Study:
    """Train a grid of dense, upcycled and from-scratch MoE runs that share their trunks."""
    config: str = setting(REQUIRED, "study file (config/study_quick.py): plain assignments of the settings below", positional=True)
    out_dir: str = setting("out/study", "where runs and rows.jsonl go")
    sizes: list[dict] = setting([], "models: one {setting of train.py: value} each, as hidden_size and num_hidden_layers")
    D1: list[int] = setting([], "tokens of the dense model before upcycling")
    D2: list[int] = setting([], "tokens after upcycling")
    D_dense: list[int] = setting([], "tokens of dense runs; empty: D1")
    D_moe: list[int] = setting([], "tokens of from-scratch MoE runs; empty: D1 and D2")
    seeds: list[int] = setting([0], "every run is made once a seed", least=0)
    methods: list[dict] = setting([{"method": "copy"}], "upcycling methods: {setting of upcycle.py: value} each")
    num_local_experts: int = setting(8, "experts of upcycled and MoE runs")
    num_experts_per_tok: int = setting(2, "experts a token uses")
    decay_fraction: float = setting(0.2, "share of a point's tokens over which its learning rate decays")
    train: dict = setting({}, "settings of train.py for all runs, as learning_rate and tokens_per_step")
    workers: int = setting(os.cpu_count() or 1, "runs trained side by side, one thread each (on GPUs: worker i on GPU i, modulo their number)",
                           least=1)
    dry_run: bool = setting(False, "print the plan, train nothing")

OURS = {"config", "out_dir", "rows", "trunk", "seed", "init_from", "branch", "resume", "repeat_data", "num_local_experts", "num_experts_per_tok",
        "max_tokens", "schedule", "decay_start", "decay_steps", "save_at_tokens"}  # what a study sets itself in a run
MAY_CHANGE = {"config", "out_dir", "init_from", "rows", "trunk", "max_tokens", "save_at_tokens", "save_every_seconds", "device",
              *MODEL_KEYS}  # in a run's later parts


@dataclass
class Job:
    """One run: its training settings, what must exist before it can start, and the tokens it adds."""
    settings: Train
    needs: str | None
    tokens: int
    flops: int
    row: dict | None  # what is known of its row beforehand; None for a trunk
    upcycling: UpcycleOptions | None = None

    @property
    def done(self):
        c = self.settings
        return all(map(os.path.exists, [os.path.join(c.out_dir, "row.json")] if self.row else [at(c.out_dir, t, c) for t in c.save_at_tokens]))


def at(run_dir, tokens, c):
    return os.path.join(run_dir, f"checkpoint-{tokens // c.tokens_per_step}")


# ---------------------------------------------------------------------------------------------------------
# The plan

def plan(study):
    """[Job] in an order in which each one's needs come before it. Raises ConfigError."""
    for key in ("sizes", "D1", "D2"):
        if not getattr(study, key):
            raise ConfigError(f"{study.config}: {key} is empty")
    if not 0 < study.decay_fraction < 1:
        raise ConfigError(f"{study.config}: decay_fraction = {study.decay_fraction} is not between 0 and 1")
    if not study.seeds:
        raise ConfigError(f"{study.config}: seeds is empty")
    for values in (study.train, *study.sizes):
        for key in values:
            if key in OURS:
                raise ConfigError(f"{study.config}: {key} is set by the study, leave it out of train and sizes")
    jobs, seen = [], set()
    for seed in study.seeds:
        for size in study.sizes:
            base = from_dict(Train, study.train | size | {"seed": seed, "rows": None}, f"{study.config}: ")
            if base.tokens_per_step % base.max_seq_len:
                raise ConfigError(f"{study.config}: tokens_per_step = {base.tokens_per_step} is not a multiple of max_seq_len = {base.max_seq_len}")
            n = parameter_counts(model_of(base))["N"]
            if (n, seed) in seen:
                raise ConfigError(f"{study.config}: two of sizes have N = {n:,}, or two seeds are equal")
            seen.add((n, seed))
            experts = {"num_local_experts": study.num_local_experts, "num_experts_per_tok": study.num_experts_per_tok}
            moe = dataclasses.replace(base, **experts)
            dense = f"dense-N{n}-s{seed}"
            jobs += family(study, base, dense, {"family": "dense", "N": n}, study.D_dense or study.D1, keep=study.D1)
            jobs += family(study, moe, f"moe-N{n}-s{seed}", {"family": "moe", "N": n}, study.D_moe or sorted({*study.D1, *study.D2}))
            for d1 in levels(study, base, study.D1):
                for method in study.methods:
                    source = at(os.path.join(study.out_dir, dense), d1, base)
                    label = "-".join([method.get("method", "copy"), *(f"{key}_{value}" for key, value in method.items() if key != "method")])
                    name = f"upcycled-N{n}-s{seed}-D1_{d1}-{label}"
                    options = from_dict(UpcycleOptions, {"source": source, "destination": os.path.join(study.out_dir, name, "start"),
                                                          "check": False, "seed": seed} | experts | method, f"{study.config}: methods: ")
                    target = dataclasses.replace(moe, num_local_experts=options.num_local_experts, num_experts_per_tok=options.num_experts_per_tok,
                                                 intermediate_size=base.intermediate_size // options.granularity)
                    known = {"family": "upcycled", "N": n, "D1": d1, "method": options.method}
                    jobs += family(study, target, name, known, study.D2, upcycled=options)
    names = [job.settings.out_dir for job in jobs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{study.config}: {twice[0]} would be two runs; are two of methods equal?")
    return jobs


def model_of(c):
    try:
        return ModelConfig(vocab_size=load_tokens(c.dataset, "train")[1]["vocab_size"], **{key: getattr(c, key) for key in MODEL_KEYS})
    except ValueError as error:
        raise ConfigError(str(error)) from None


def levels(study, c, tokens):
    """Token counts rounded to whole steps. Raises ConfigError when two become one or none is left."""
    rounded = [round(t / c.tokens_per_step) * c.tokens_per_step for t in tokens]
    if len(set(rounded)) < len(rounded) or min(rounded) <= c.warmup_steps * c.tokens_per_step:
        raise ConfigError(f"{study.config}: levels {sorted(tokens)} must differ by a step of {c.tokens_per_step} tokens and exceed "
                          f"{c.warmup_steps} warm-up steps")
    return rounded


def family(study, c, name, known, tokens, keep=(), upcycled=None):
    """The trunk `name` that serves the token counts `tokens` (and keeps checkpoints at `keep`), and its branches."""
    step, model = c.tokens_per_step, model_of(c)
    counts, per_token = parameter_counts(model), flops_per_token(model, c.max_seq_len)
    out = os.path.join(study.out_dir, name)
    points = [(d, d - max(1, round(d * study.decay_fraction / step)) * step) for d in sorted(levels(study, c, tokens))]  # (end, start of decay)
    stops = sorted({start for _, start in points} | set(levels(study, c, keep) if keep else ()))
    first = {"init_from": upcycled.destination, "branch": upcycled.optimizer == "copy"} if upcycled else {}
    trunk = dataclasses.replace(c, out_dir=out, max_tokens=stops[-1], decay_steps=0, decay_start=0, save_at_tokens=stops, resume=True, **first)
    plain = {key: Train.__dataclass_fields__[key].default for key in MODEL_KEYS}  # a checkpoint knows its architecture
    if upcycled:
        trunk = dataclasses.replace(trunk, **plain)
    jobs = [Job(trunk, upcycled.source if upcycled else None, stops[-1], stops[-1] * per_token, None, upcycled)]
    for end, start in points:
        branch = dataclasses.replace(trunk, out_dir=f"{out}-D{end}", init_from=at(out, start, c), branch=True, max_tokens=end,
                                     save_at_tokens=[], decay_start=start // step, decay_steps=(end - start) // step,
                                     rows=os.path.join(study.out_dir, "rows.jsonl"), **plain)
        row = known | {"N_active": counts["N_active"], "N_total": counts["N_total"], ("D2" if upcycled else "D"): end,
                       "trunk": name, "seed": c.seed, "flops": end * per_token}
        jobs.append(Job(branch, branch.init_from, end - start, (end - start) * per_token, row))
    return jobs


def planned_rows(study):
    """The study's rows before it is run: all but loss, loss_se and versions. Raises ConfigError."""
    return [job.row for job in plan(study) if job.row]


def study_totals(study):
    """{"tokens", "flops"}: what the whole study trains, shared trunks counted once."""
    jobs = plan(study)
    return {"tokens": sum(j.tokens for j in jobs), "flops": sum(j.flops for j in jobs)}


def describe(study, jobs):
    """The plan as text: rows, tokens and FLOPs by family, and what sharing trunks saves against training each row alone."""
    dense_flops = {(j.row["N"], j.row["seed"]): j.row["flops"] // j.row["D"] for j in jobs if j.row and j.row["family"] == "dense"}
    lines = [f"{'family':10}{'trunks':>8}{'rows':>6}{'tokens':>12}{'FLOPs':>10}{'  each row alone: tokens':>26}{'FLOPs':>10}"]
    totals = [0] * 6
    for kind in ("dense", "moe", "upcycled"):
        mine = [j for j in jobs if (j.row or {"family": os.path.basename(j.settings.out_dir).split("-")[0]})["family"] == kind]
        rows = [j.row for j in mine if j.row]
        alone = sum(r.get("D", 0) + r.get("D1", 0) + r.get("D2", 0) for r in rows)
        alone_flops = sum(r["flops"] + r.get("D1", 0) * dense_flops[r["N"], r["seed"]] for r in rows)
        values = [len(mine) - len(rows), len(rows), sum(j.tokens for j in mine), sum(j.flops for j in mine), alone, alone_flops]
        totals = [a + b for a, b in zip(totals, values)]
        lines.append("{:10}{:8}{:6}{:12.4g}{:10.3g}{:26.4g}{:10.3g}".format(kind, *values))
    lines.append("{:10}{:8}{:6}{:12.4g}{:10.3g}{:26.4g}{:10.3g}".format("all", *totals))
    lines.append(f"shared trunks save {1 - totals[2] / totals[4]:.0%} of the tokens and {1 - totals[3] / totals[5]:.0%} of the FLOPs; "
                 f"{sum(j.done for j in jobs)} of {len(jobs)} runs are finished")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Running it

def worker(connection, number):
    """Run jobs from `connection` until it closes; answers (kind, value): tokens | done | failed | stopped."""
    import torch
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: stop, and save, when the parent is killed
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())  # where train() looks

    def tell(kind, value=None):
        try:
            connection.send((kind, value))
        except OSError:
            pass  # the parent is gone; what is under way is still to be saved

    while True:
        try:
            job = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if job.upcycling and not os.path.isdir(job.upcycling.destination):
                upcycle(job.upcycling)
            train(job.settings, report=lambda tokens: tell("tokens", tokens))
            tell("done")
        except (Stopped, KeyboardInterrupt):
            tell("stopped")
            return
        except ConfigError as error:
            tell("failed", str(error))
        except Exception as error:  # the other runs go on
            tell("failed", f"{job.settings.out_dir}: {type(error).__name__}: {error}")
            traceback.print_exc()


def check_unchanged(job):
    """Raises ConfigError when the run was begun with other settings: its row would not be of this study."""
    path = os.path.join(job.settings.out_dir, "config.py")
    if os.path.exists(path):
        before, now = read_config(path), dataclasses.asdict(job.settings)
        sizes = set() if job.settings.init_from else set(MODEL_KEYS)  # resolved from the checkpoint otherwise
        for key in now.keys() - (MAY_CHANGE - sizes):
            if now[key] is not None and before.get(key) != now[key]:  # None is resolved by the run
                raise ConfigError(f"{path}: {key} was {before.get(key)!r}, the study now says {now[key]!r}; take another --out_dir, "
                                  "or delete that run")


def tokens_done(job):
    if job.done:
        return job.tokens
    saved = checkpoint.checkpoints(job.settings.out_dir)
    return (saved[-1][0] * job.settings.tokens_per_step - (job.settings.max_tokens - job.tokens)) if saved else 0


def ahead(jobs):
    """FLOPs of the longest chain of jobs that starts with each one, so that long chains start first."""
    below = {}
    for job in reversed(jobs):
        mine = os.path.normpath(job.settings.out_dir) + os.sep
        below[id(job)] = job.flops + max((below[id(j)] for j in jobs if id(j) in below and (j.needs or "").startswith(mine)), default=0)
    return below


def sweep(study, jobs):
    """Run `jobs` on worker processes. Returns what failed, a line each. Raises Stopped on SIGTERM or Ctrl-C."""
    os.makedirs(study.out_dir, exist_ok=True)
    with open(os.path.join(study.out_dir, ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{study.out_dir}: another sweep is running there") from None
        return _sweep(study, jobs)


def _sweep(study, jobs):
    for job in jobs:
        check_unchanged(job)
    for job in jobs:  # a finished run whose row was lost to a kill between its two files
        if job.row and job.done:
            append_row(job.settings.rows, checkpoint.read_json(os.path.join(job.settings.out_dir, "row.json")))
    todo, failed, asked = [j for j in jobs if not j.done], [], []
    if not todo:
        return failed
    order = ahead(jobs)
    todo.sort(key=lambda j: -order[id(j)])
    context = multiprocessing.get_context("spawn")
    workers, busy = {}, {}
    handlers = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    bar = progress(sum(j.tokens for j in jobs), "study", "tok", initial=sum(map(tokens_done, jobs)))
    try:
        for number in range(min(study.workers, len(todo))):
            mine, theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, number), daemon=True)
            process.start()
            theirs.close()
            workers[mine] = process
        while (todo or busy) and not asked:
            for connection in workers:
                if connection not in busy:
                    job = next((j for j in todo if j.needs is None or os.path.isdir(j.needs)), None)
                    if job:
                        todo.remove(job)
                        busy[connection] = job
                        connection.send(job)
            if not busy:
                failed += [f"{j.settings.out_dir}: not run, {j.needs or 'its start'} was not made" for j in todo]
                break
            for connection in wait(list(busy), timeout=0.5):
                try:
                    kind, value = connection.recv()
                except EOFError:  # the process died
                    failed.append(f"{busy.pop(connection).settings.out_dir}: its process died")
                    del workers[connection]
                    continue
                if kind == "tokens":
                    bar.update(value)
                else:
                    job = busy.pop(connection)
                    bar.set_postfix_str(os.path.basename(job.settings.out_dir), refresh=False)
                    if kind == "failed":
                        failed.append(value)
                    elif kind == "stopped":
                        asked.append(signal.SIGTERM)
    finally:
        if asked:
            for process in workers.values():
                process.terminate()  # those under way save and answer
        for connection in busy:
            with contextlib.suppress(EOFError, OSError):
                while connection.recv()[0] == "tokens":
                    pass
        for connection, process in workers.items():
            connection.close()  # the others end
            process.join()
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    if asked:
        raise Stopped(asked[0])
    return failed


def main(study):
    jobs = plan(study)
    print(describe(study, jobs))
    if study.dry_run:
        return
    try:
        failed = sweep(study, jobs)
    except Stopped as stopped:
        print(f"{study.out_dir}: stopped, saved; the same command goes on")
        raise SystemExit(128 + stopped.args[0])
    if failed:
        raise ConfigError(f"{len(failed)} of {len(jobs)} runs failed:\n  " + "\n  ".join(failed))
    print(f"{sum(job.row is not None for job in jobs)} rows in {os.path.join(study.out_dir, 'rows.jsonl')}")


if __name__ == "__main__":
    run(main, Study)
