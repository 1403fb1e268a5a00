"""Run a study: a grid over N x D1 x D2 of upcycled runs, with the dense and from-scratch MoE runs beside it.

    python sweep.py config/study_quick.py [--dry_run]
    python sweep.py config/pilot.py --dense=DIR --dataset=DATA --budget=TOKENS    # of one checkpoint
    python sweep.py config/study.py --shard=1/4    # on the first of 4 machines that see out_dir

A trunk is trained once, at a stable learning rate; each point of the laws is a branch of it that decays.
Upcycling starts from checkpoints of the dense trunk. Rows go to out_dir/rows.jsonl; what is done is skipped.
Ctrl-C, SIGTERM and, on Linux, a kill of this process let each run save its step. A run that is killed itself
goes on from its last checkpoint (save_every_seconds).
"""
import dataclasses
import math
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from configurator import (REQUIRED, ConfigError, convert, from_dict, locked, note, progress, read_config,
                          run, setting)

import torch

import checkpoint
import cost
import pilot
from data.stream import load_tokens, locate
from model import ModelConfig, flops_per_token, parameter_counts
from rows import EXPERTS, FAMILIES, RUN, SIZES, append_row, loss_text, read_row, unusual_knobs
from start import Stopped, caught_signals, passes, planned_row, resolve_architecture
from train import Train, pays_to_compile
from upcycle import Options as UpcycleOptions, knobs
from workers import check_row, run_jobs


@dataclass
class Study:
    """Train a grid of dense, upcycled and from-scratch MoE runs that share their trunks."""
    config: str = setting(REQUIRED, "study file: assignments of the settings below, as config/study_quick.py",
                          positional=True)
    out_dir: str = setting("out/study", "where runs and rows.jsonl go")
    sizes: list[dict] = setting([], "models: one {setting of train.py: value} each, as hidden_size; `seeds` "
                                "replaces the study's, `scratch_seeds` adds dense and MoE runs")
    D1: list[int] = setting([], "tokens of the dense model before upcycling")
    D2: list[int] = setting([], "tokens after upcycling")
    D_dense: list[int] = setting([], "tokens of dense runs; empty: D1")
    D_moe: list[int] = setting([], "tokens of from-scratch MoE runs; empty: D1 and D2")
    seeds: list[int] = setting([0], "every run is made once a seed", least=0)
    methods: list[dict] = setting([{"method": "copy"}], "upcyclings: {setting of upcycle.py: value} each")
    num_local_experts: int = setting(8, "experts of upcycled and MoE runs")
    num_experts_per_tok: int = setting(2, "experts a token uses")
    decay_fraction: float = setting(0.2, "share of a point's tokens over which its learning rate decays")
    train: dict = setting({}, "settings of train.py for all runs, as learning_rate and tokens_per_step")
    workers: int | None = setting(None, "runs trained side by side, one thread each; on GPUs worker i trains "
                                  "on GPU i modulo their number; none: one a GPU, or one a core; with "
                                  "launcher, one", least=1)
    launcher: str | None = setting(None, "command that starts each run, for runs larger than a device, as "
                                   "'torchrun --standalone --nproc_per_node=8'; none: workers train them")
    shard: str = setting("1/1", "i/n: make the i-th of n shares of the study, balanced by FLOPs; n machines "
                         "that see out_dir make all of it")
    families: list[Literal[tuple(FAMILIES)]] = setting([], "families to train now; empty: all")
    withheld: list[dict] = setting([], "rows that no fit may see yet, so that they can test its predictions: "
                                   "{column: value, or list of values} each")
    train_withheld: bool = setting(False, "train the withheld rows too")
    dataset: str | None = setting(None, "data of all runs; none: as `train` says")
    dense: str | None = setting(None, "pilot: the checkpoint in place of sizes; D_dense is counted from it")
    budget: int | None = setting(None, "pilot: tokens of MoE training that it decides on; empty D2, D_moe, "
                                 "D_dense are shares of it", least=1)
    dry_run: bool = setting(False, "print the plan and what it costs, train nothing; data that is not there "
                            "is assumed to have the vocabulary of GPT-2")
    flops_per_gpu: float = setting(989e12, "dry run: peak FLOP/s of a device; an H100 in bf16 (data sheet)",
                                   least=1)
    mfu: float = setting(0.4, "dry run: share of the peak that training uses; 0.38 to 0.43 in arXiv "
                         "2407.21783, Table 4", least=0.001, most=1)


# What a study sets itself in its runs.
SET_BY_STUDY = {"config", "out_dir", "rows", "trunk", "seed", "init_from", "branch", "resume", "repeat_data",
                "num_local_experts", "num_experts_per_tok", "max_tokens", "schedule", "decay_start",
                "decay_steps", "save_at_tokens", "D1"}


@dataclass
class Job:
    """One run: a trunk, which writes no row, or a branch of a trunk, which does."""
    settings: Train
    needs: str | None  # the checkpoint that must exist before the run can start
    tokens: int  # that the run adds
    flops: int  # of those tokens
    row: dict  # the row of the run, or that a trunk would have: see train.planned_row
    upcycling: UpcycleOptions | None = None  # what makes the checkpoint that the run starts from
    model: ModelConfig | None = None
    launcher: str | None = None  # the command that starts the run; None: a worker trains it
    ranks: int = 1  # processes that the launcher starts

    @property
    def is_trunk(self):
        return self.settings.rows is None

    @property
    def done(self):
        c = self.settings
        made = [checkpoint_path(c.out_dir, tokens, c) for tokens in c.save_at_tokens]
        return all(map(os.path.exists, made if self.is_trunk else [os.path.join(c.out_dir, "row.json")]))

    @property
    def tokens_done(self):
        """Tokens of the job that are trained and saved."""
        if self.done:
            return self.tokens
        saved = checkpoint.checkpoints(self.settings.out_dir)
        before = self.settings.max_tokens - self.tokens
        return saved[-1][0] * self.settings.tokens_per_step - before if saved else 0


def checkpoint_path(run_dir, tokens, c):
    return os.path.join(run_dir, f"checkpoint-{tokens // c.tokens_per_step}")


# ---------------------------------------------------------------------------------------------------------
# The plan

def study_jobs(study):
    """[Job] in an order in which each one's needs come before it. Raises ConfigError."""
    if study.dataset:
        study = dataclasses.replace(study, train=study.train | {"dataset": study.dataset})
    for key in ("seeds",) if study.dense else ("sizes", "D1", "D2", "seeds"):
        if not getattr(study, key):
            raise ConfigError(f"{study.config}: {key} is empty")
    if math.prod(len(getattr(study, key)) or 1 for key in ("sizes", "D1", "D2", "seeds", "methods")) > 10**5:
        raise ConfigError(f"{study.config}: has more than 100,000 upcycled runs")
    if not 0 < study.decay_fraction < 1:
        raise ConfigError(f"{study.config}: decay_fraction = {study.decay_fraction} is not between 0 and 1")
    for key in (key for row in study.withheld for key in row if key not in RUN):
        raise ConfigError(f"{study.config}: withheld: {key} is no column that tells runs apart")
    for key in (key for values in (study.train, *study.sizes) for key in values if key in SET_BY_STUDY):
        raise ConfigError(f"{study.config}: {key} is set by the study, leave it out of train and sizes")
    for key in {"source", "destination", "merge_with"} & {key for method in study.methods for key in method}:
        raise ConfigError(f"{study.config}: {key} is set by the study, leave it out of methods")
    jobs = []
    if study.dense:
        levels = pilot.with_levels(study)
        for seed in study.seeds:
            jobs += jobs_of_size(levels, *pilot.open_dense(levels, seed), [])
    for size in () if study.dense else study.sizes:
        seeds = {key: convert(f"{study.config}: sizes: {key}", size.get(key, usual), list[int])
                 for key, usual in (("seeds", study.seeds), ("scratch_seeds", []))}
        size = {key: value for key, value in size.items() if key not in seeds}
        for seed in seeds["seeds"] + seeds["scratch_seeds"]:
            settings = study.train | size | {"seed": seed, "rows": None}
            dense = from_dict(Train, settings, f"{study.config}: ")
            try:
                passes(dense, ranks_of(study.launcher))
            except ConfigError as error:  # of steps that the ranks cannot share
                raise ConfigError(f"{study.config}: {error}") from None
            dense, m = resolve_architecture(dense, None, data_of(dense, study.dry_run))
            jobs += jobs_of_size(study, dense, m, study.D1 if seed in seeds["seeds"] else [])
    for folder, runs in Counter(job.settings.out_dir for job in jobs).most_common(1):
        if runs > 1:
            raise ConfigError(f"{study.config}: {runs} runs would be {folder}: two of sizes have one N, or "
                              "two seeds or two methods are equal")
    compile_where_it_pays(jobs)
    return due_jobs(study, jobs)


def ranks_of(launcher):
    """How many processes a launcher starts: nnodes x nproc_per_node, 1 where it does not say. Raises
    ConfigError."""
    found = [re.search(rf"--{name}(?:=|\s+)(\S+)", launcher or "")
             for name in ("nproc[-_]per[-_]node", "nnodes")]
    try:
        return math.prod(int(match[1]) for match in found if match)
    except ValueError:
        raise ConfigError(f"launcher: {launcher!r}: nproc_per_node and nnodes are to be numbers") from None


def compile_where_it_pays(jobs):
    """Set `compile` of the jobs that leave it open, by the FLOPs of all `jobs` of one shape, which a worker
    compiles once. The jobs are those of the whole study, so a trunk is compiled alike in every call."""
    def shape(job):
        return tuple(job.row[key] for key in (*SIZES, *EXPERTS))
    flops = Counter()
    for job in jobs:
        flops[shape(job)] += job.flops
    for job in jobs:
        if job.settings.compile == "auto":
            job.settings.compile = pays_to_compile(flops[shape(job)], job.settings.device)


def is_withheld(study, row):
    """Whether `row` has the columns of one entry of study.withheld."""
    return any(all(row.get(key) in (value if isinstance(value, list) else [value])
                   for key, value in columns.items()) for columns in study.withheld)


def due_jobs(study, jobs):
    """The jobs that the study trains now: branches of the families asked for that are not withheld, and the
    trunks on which they depend. A trunk goes as far as any row that is not withheld needs it."""
    due, needed, needed_now = [], set(), set()  # checkpoints needed by rows of any family, and by due jobs
    for job in reversed(jobs):
        c = job.settings
        if job.is_trunk:
            paths = {tokens: checkpoint_path(c.out_dir, tokens, c) for tokens in c.save_at_tokens}
            stops = [tokens for tokens, path in paths.items() if path in needed]
            is_open, is_due = bool(stops), not needed_now.isdisjoint(paths.values())
            if is_open:
                end = stops[-1]
                c = dataclasses.replace(c, save_at_tokens=stops, max_tokens=end)
                job = dataclasses.replace(job, settings=c, tokens=end, flops=job.flops * end // job.tokens)
        else:
            is_open = study.train_withheld or not is_withheld(study, job.row)
            is_due = is_open and (not study.families or job.row["family"] in study.families)
        if is_open:
            needed.add(job.needs)
        if is_due:
            needed_now.add(job.needs)
            due.append(job)
    return due[::-1]


def jobs_of_size(study, dense, base, upcycled_at):
    """[Job] of one size and seed: the dense, the MoE and the upcycled trunks, each with its branches.

    dense: Train settings of the dense trunk. base: its ModelConfig. upcycled_at: the levels of D1 from which
    this seed is upcycled. In a pilot `dense` goes on from the checkpoint study.dense, which is upcycled, and
    a MoE from scratch has its architecture.
    """
    experts, n = {key: getattr(study, key) for key in EXPERTS}, parameter_counts(base)["N"]
    dense_trunk, name = f"dense-N{n}-s{dense.seed}", f"moe-N{n}-s{dense.seed}"
    levels, fresh = rounded_levels(study, dense, upcycled_at), None
    jobs = trunk_and_branches(study, dense, base, dense_trunk, {"family": "dense", "N": n},
                              study.D_dense or study.D1, keep=levels)
    if study.dense:
        levels, dense_trunk = [dense.D1], dense.trunk
        dense = dataclasses.replace(dense, init_from=None, D1=None)
        fresh = UpcycleOptions(study.dense, os.path.join(study.out_dir, name, "start"), seed=dense.seed,
                               **experts)
    jobs += trunk_and_branches(study, dataclasses.replace(dense, **experts), base, name,
                               {"family": "moe", "N": n}, study.D_moe or sorted({*study.D1, *study.D2}),
                               upcycling=fresh)
    for d1 in levels:
        for method in study.methods:
            source = study.dense or checkpoint_path(os.path.join(study.out_dir, dense_trunk), d1, dense)
            given = {"source": source, "destination": "start", "check": False, "seed": dense.seed, "D1": d1}
            options = from_dict(UpcycleOptions, given | experts | method, f"{study.config}: methods: ")
            name = f"upcycled-N{n}-s{dense.seed}-D1_{d1}-{method_name(study, options)}"
            options.destination = os.path.join(study.out_dir, name, "start")
            upcycled = dataclasses.replace(dense, **{key: getattr(options, key) for key in EXPERTS},
                                           intermediate_size=dense.intermediate_size // options.granularity)
            lineage = {"family": "upcycled", "N": n, "D1": d1, "method": options.method,
                       "dense_trunk": dense_trunk, **knobs(options)}
            jobs += trunk_and_branches(study, upcycled, base, name, lineage, study.D2, upcycling=options)
    return jobs


def method_name(study, options):
    """What rows.method_label says in words, for the name of a directory, as drop-drop_ratio_0.5."""
    told = unusual_knobs(knobs(options))
    for key in EXPERTS:
        if getattr(options, key) != getattr(study, key):
            told[key] = getattr(options, key)
    return "-".join([options.method, *(f"{key}_{value}" for key, value in told.items())])


def data_of(c, dry_run=False):
    """meta.json of the data of Train settings. Raises ConfigError, but on a dry run not for data that is not
    there."""
    if dry_run and not locate(c.dataset).exists():
        note(f"{c.dataset} is not there; a vocabulary of {cost.VOCABULARY:,} tokens is assumed")
        return {"vocab_size": cost.VOCABULARY}
    return load_tokens(c.dataset, "train")[1]


def rounded_levels(study, c, tokens):
    """Token counts rounded to whole steps. Raises ConfigError when two become one or none is left."""
    rounded = [round(t / c.tokens_per_step) * c.tokens_per_step for t in tokens]
    if len(set(rounded)) < len(rounded) or any(t <= c.warmup_steps * c.tokens_per_step for t in rounded):
        raise ConfigError(f"{study.config}: levels {sorted(tokens)} must differ by a step of "
                          f"{c.tokens_per_step} tokens and exceed {c.warmup_steps} warm-up steps")
    return rounded


def trunk_and_branches(study, c, base, name, lineage, levels, keep=(), upcycling=None):
    """[Job] of the trunk `name` and of its branches, one for each of the token counts `levels`.

    The trunk keeps checkpoints at the token counts `keep` too. It starts from weights that `upcycling` makes,
    or from c.init_from, after c.D1 tokens. base: a ModelConfig that says what the Train settings c cannot.
    """
    step, seen = c.tokens_per_step, c.D1 or 0
    m, data_sha256 = pilot.model_config(c, base), data_of(c, study.dry_run).get("data_sha256")
    ranks, per_token = ranks_of(study.launcher), flops_per_token(m, c.max_seq_len)
    starts = {end: end - max(1, round(end * study.decay_fraction / step)) * step  # of the decay, in tokens
              for end in sorted(rounded_levels(study, c, levels))}
    for end in (end for end, start in starts.items() if start < max(1, c.warmup_steps) * step):
        raise ConfigError(f"{study.config}: a run of {end} tokens decays before its {c.warmup_steps} warm-up "
                          "steps are over; levels must be longer, or warmup_steps or decay_fraction smaller")
    stops = sorted({*starts.values(), *keep})
    trunk = dataclasses.replace(c, out_dir=os.path.join(study.out_dir, name), trunk=name, resume=True,
                                max_tokens=stops[-1], decay_steps=0, decay_start=0, save_at_tokens=stops)
    if upcycling:
        trunk.init_from, trunk.branch = upcycling.destination, upcycling.optimizer == "copy"

    def job(settings, needs, begin, end, made=None):
        row = planned_row(settings, m, lineage, seen + end, data_sha256, seen, ranks)
        tokens = end - begin
        return Job(settings, needs, tokens, tokens * per_token, row, made, m, study.launcher, ranks)
    jobs = [job(trunk, upcycling and upcycling.source, 0, stops[-1], upcycling)]
    for end, start in starts.items():
        first = checkpoint_path(trunk.out_dir, start, c)
        branch = dataclasses.replace(trunk, out_dir=f"{trunk.out_dir}-D{end}", init_from=first, branch=True,
                                     max_tokens=end, save_at_tokens=[], decay_start=start // step,
                                     decay_steps=(end - start) // step,
                                     rows=os.path.join(study.out_dir, "rows.jsonl"))
        jobs.append(job(branch, first, start, end))
    return jobs


def planned_rows(study):
    """The study's rows before it is run: all but loss, loss_se and versions. Raises ConfigError."""
    return [job.row for job in study_jobs(study) if not job.is_trunk]


def study_totals(study):
    """{"tokens", "flops"}: what the whole study trains, shared trunks counted once."""
    jobs = study_jobs(study)
    return {"tokens": sum(j.tokens for j in jobs), "flops": cost.flops_of(jobs)}


def describe(study, jobs):
    """The plan as text: rows, tokens and FLOPs by family, and how much it saves that rows share trunks."""
    lines = [f"{'family':10}{'trunks':>8}{'rows':>6}{'tokens':>12}{'FLOPs':>10}"]
    for family in ("dense", "moe", "upcycled", "all"):
        chosen = [job for job in jobs if family in (job.row["family"], "all")]
        trunks = sum(job.is_trunk for job in chosen)
        tokens, flops = sum(job.tokens for job in chosen), cost.flops_of(chosen)
        lines.append(f"{family:10}{trunks:8}{len(chosen) - trunks:6}{tokens:12.4g}{flops:10.3g}")
    branches = [job for job in jobs if not job.is_trunk]  # the D1 of a pilot is trained already
    alone = sum(job.settings.max_tokens + (0 if study.dense else job.row.get("D1", 0)) for job in branches)
    lines.append(f"shared trunks save {1 - tokens / alone:.0%} of the tokens of training each row alone; "
                 f"{sum(job.done for job in jobs)} of {len(jobs)} runs are finished")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Running it

def check_unchanged(job):
    """Raises ConfigError where the job's directory holds a run of other settings, begun or finished."""
    path, config = (os.path.join(job.settings.out_dir, name) for name in ("row.json", "config.py"))
    if not job.is_trunk and os.path.exists(path):
        check_row(job, read_row(path), path)
    elif os.path.exists(config):
        begun = from_dict(Train, read_config(config), f"{config}: ")
        then, now = (os.path.realpath(c.init_from or "") for c in (begun, job.settings))
        if job.is_trunk and not job.upcycling and then != now:  # a pilot's, of another checkpoint
            raise ConfigError(f"{config}: began from {then}, the study now says {now}; take another "
                              "--out_dir, or delete that run")
        m, data_sha256 = pilot.model_config(begun, job.model), data_of(begun).get("data_sha256")
        tokens = job.row.get("D2", job.row.get("D"))  # whatever max_tokens was: a trunk may grow
        before = job.row["tokens_before_schedule"]
        check_row(job, planned_row(begun, m, job.row, tokens, data_sha256, before, job.ranks), config)


def share_of(study, jobs):
    """The [Job] of `jobs` that study.shard says, in their order. A job is in the share of the one that makes
    its checkpoint, so shares wait for nothing, unless study.families leaves that one out, as it is done.
    Raises ConfigError for a shard that is none."""
    match = re.fullmatch(r"(\d+)/(\d+)", study.shard)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise ConfigError(f"shard: {study.shard!r} is not i/n with i in 1 .. n")
    groups, first, others = {}, {}, []  # {folder of a run: of the first of its chain}; trunks made before
    for job in jobs:
        if study.families and job.row["family"] not in study.families:
            others.append(job)
            continue
        folder = job.settings.out_dir
        first[folder] = first.get(os.path.dirname(job.needs or ""), folder)
        groups.setdefault(first[folder], []).append(job)
    shares = [[] for _ in range(count)]
    for group in sorted(groups.values(), key=cost.flops_of, reverse=True):  # large ones first
        min(shares, key=cost.flops_of).extend(group)
    shares[-1] += others
    return [job for job in jobs if any(job is chosen for chosen in shares[number - 1])]


def sweep(study, jobs):
    """Run `jobs` on worker processes. Returns what failed, a line each. Raises Stopped after a signal."""
    if study.launcher and not shutil.which(program := study.launcher.split()[0]):
        raise ConfigError(f"launcher: there is no command {program!r} here")
    with locked(study.out_dir, f".lock-{study.shard.replace('/', '-of-')}",
                f"{study.out_dir}: another sweep of shard {study.shard} is running there"):
        for job in jobs:
            check_unchanged(job)
        for c in (job.settings for job in jobs if job.done and not job.is_trunk):
            # A kill just before it was finished can have lost its row.
            append_row(c.rows, read_row(os.path.join(c.out_dir, "row.json")))
        chains = Counter()  # {folder of a run: FLOPs of the longest chain that starts there}, to start first
        for job in reversed(jobs):
            chains[job.settings.out_dir] += job.flops
            maker = os.path.dirname(job.needs or "")
            chains[maker] = max(chains[maker], chains[job.settings.out_dir])
        todo = sorted((j for j in jobs if not j.done), key=lambda j: -chains[j.settings.out_dir])
        if not todo:
            return []
        total, done = sum(j.tokens for j in jobs), sum(job.tokens_done for job in jobs)
        with caught_signals() as signals, progress(total, "study", "tok", initial=done) as bar:
            signals.at_once = False  # the workers save first
            devices = 1 if study.launcher else torch.cuda.device_count() or len(os.sched_getaffinity(0))
            failed = run_jobs(todo, min(study.workers or devices, len(todo)), signals.caught, bar)
        if signals.caught:
            raise Stopped(signals.caught[0])
        return failed


def main(study):
    plan = study_jobs(study)
    jobs = share_of(study, plan)
    if not plan:
        raise ConfigError(f"{study.config}: there is nothing to train; is all withheld (--train_withheld)?")
    print(describe(study, plan))
    if study.shard != Study.shard:
        part = cost.flops_of(jobs) / cost.flops_of(plan)
        print(f"shard {study.shard}: {len(jobs)} of {len(plan)} runs, {part:.0%} of the FLOPs")
    if study.dense:
        print(pilot.cost(study, plan))
    if study.dry_run:
        print(cost.describe(study, jobs))
        return
    try:
        failed = sweep(study, jobs)
    except Stopped as stopped:
        print(f"{study.out_dir}: stopped, saved; the same command goes on")
        raise SystemExit(128 + stopped.args[0])
    if failed:
        raise ConfigError(f"{len(failed)} of {len(jobs)} runs failed:\n  " + "\n  ".join(failed))
    rows = [read_row(os.path.join(job.settings.out_dir, "row.json")) for job in jobs if not job.is_trunk]
    for family, best in {row["family"]: row for row in sorted(rows, key=lambda row: -row["loss"])}.items():
        print(f"{family}: lowest loss {loss_text(best)}")
    print(f"{len(rows)} rows in {os.path.join(study.out_dir, 'rows.jsonl')}")


if __name__ == "__main__":
    run(main, Study)
