"""A study on many machines: shares, runs under torchrun, what it costs, and the examples for SLURM."""
import ast
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

import checkpoint
import cost
import sweep
from configurator import ConfigError, lock, parse, write_config
from model import ModelConfig, Transformer
from sweep import planned_rows, share_of, study_jobs
from start import Stopped
from test_sweep import mini, one_size, study  # noqa: F401  (mini is a fixture)
from test_train import data  # noqa: F401  (a fixture)
from train import Train, train
from upcycle import upcycle
from workers import launch

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"


def shares(s, count):
    """The shares of a study on `count` machines, as lists of the directories of their runs."""
    jobs = study_jobs(s)
    found = [share_of(dataclasses.replace(s, shard=f"{i + 1}/{count}"), jobs) for i in range(count)]
    names = sorted(job.settings.out_dir for part in found for job in part)
    assert names == sorted(job.settings.out_dir for job in jobs)  # each run is in one share
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_balanced_and_need_nothing_of_each_other(mini, count):  # noqa: F811
    mini.write_text(mini.read_text() + "seeds = [0, 1, 2]\n")
    found, flops = shares(study(mini), count), []
    for part in found:
        folders = {os.path.dirname(job.needs) for job in part if job.needs}
        assert folders <= {job.settings.out_dir for job in part}
        flops.append(sum(job.flops for job in part))
    # What descends from one dense trunk stays together, so no sharing has a smaller largest share than the
    # larger of the mean and of the largest such group. Taking the largest first is at most 4/3 of the best
    # (Graham 1969).
    largest = max(sum(job.flops for job in study_jobs(study(mini)) if f"-N{n}-s0" in job.settings.out_dir
                      and job.row["family"] != "moe") for n in {job.row["N"] for job in found[0]})
    assert max(flops) <= 4 / 3 * max(sum(flops) / count, largest)


def test_what_is_upcycled_from_one_dense_trunk_splits_once_the_trunk_is_made(mini):  # noqa: F811
    found = shares(study(mini, "--families=['upcycled']"), 6)
    trunks = [{job.row["trunk"] for job in part if job.row["family"] == "upcycled"} for part in found]
    assert all(len(names) == 1 for names in trunks) and len(set.union(*trunks)) == 6


@pytest.mark.parametrize("flags, message", [
    (["--shard=0/2"], "'0/2' is not i/n"), (["--shard=3/2"], "'3/2' is not i/n"), (["--shard=2"], "not i/n"),
    (["--launcher=torchrun --nproc_per_node=gpu"], "nproc_per_node and nnodes are to be numbers"),
    (["--launcher=none_such --nproc_per_node=1"], "there is no command 'none_such'")])
def test_bad_shares_and_launchers_are_refused_by_name(mini, flags, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        sweep.main(study(mini, *flags))


def test_two_sweeps_of_one_share_are_refused_and_of_two_are_not(mini):  # noqa: F811
    s = study(mini, "--shard=1/2")
    os.makedirs(s.out_dir)
    with open(os.path.join(s.out_dir, ".lock-1-of-2"), "w") as file:
        lock(file, "unused")
        with pytest.raises(ConfigError, match="another sweep of shard 1/2 is running there"):
            sweep.sweep(s, [])
        assert sweep.sweep(dataclasses.replace(s, shard="2/2"), []) == []


# ---------------------------------------------------------------------------------------------------------
# Runs under a launcher

@pytest.mark.parametrize("launcher, ranks", [("torchrun --standalone --nproc_per_node=4", 4),
                                             ("srun torchrun --nnodes 2 --nproc-per-node=2 --x=y", 4),
                                             ("python", 1)])
def test_rows_are_planned_for_the_ranks_of_the_launcher(mini, launcher, ranks):  # noqa: F811
    """128 tokens in sequences of 16 are 2 a rank on 4 ranks, all of which share one balance loss."""
    mini.write_text(mini.read_text().replace("_step, \"max", "_step, 'micro_batch_size': 1, \"max"))
    rows = planned_rows(study(mini, f"--launcher={launcher}"))
    assert {row.get("sequences_per_pass") for row in rows} == {None, ranks}


def test_a_run_under_torchrun_stops_goes_on_and_equals_one_process(mini, tmp_path):  # noqa: F811
    mini.write_text(one_size(mini))
    trunk = study_jobs(study(mini, f"--launcher={TORCHRUN}"))[0]
    log, told = Path(trunk.settings.out_dir) / "log.jsonl", []

    def job(steps):
        c = dataclasses.replace(trunk.settings, max_tokens=128 * steps, rows=str(tmp_path / "rows.jsonl"))
        return dataclasses.replace(trunk, settings=c, tokens=128 * steps)

    def stop_once(tokens):
        told.append(tokens)
        if log.exists() and log.read_text().count("\n") > 1 and "sent" not in told:
            told.append("sent")
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        launch(job(10**6), stop_once)
    stopped, path = checkpoint.checkpoints(trunk.settings.out_dir)[-1]
    told.remove("sent")
    assert 0 < stopped < 10**6 and sum(told) == 128 * stopped

    longer = job(stopped + 20)
    row = launch(dataclasses.replace(longer, launcher=sys.executable), told.append)
    assert sum(told) == longer.tokens
    alone = train(dataclasses.replace(longer.settings, out_dir=str(tmp_path / "alone")), report=told.append)
    two, one = ([json.loads(line)["loss"] for line in open(Path(folder) / "log.jsonl")]
                for folder in (longer.settings.out_dir, tmp_path / "alone"))
    np.testing.assert_allclose(two[:20], one[:20], rtol=2e-4)  # two ranks sum in another order,
    np.testing.assert_allclose(two, one, rtol=5e-3)  # and rounding grows
    assert row["loss"] == pytest.approx(alone["loss"], rel=5e-3)
    assert row == json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])


def test_a_study_under_a_launcher_makes_the_rows_that_workers_make(mini, tmp_path):  # noqa: F811
    """A dense trunk, a MoE from scratch and an upcycled one, on two ranks each and by one process."""
    mini.write_text(one_size(mini).replace("D1 = [10 * _step, 40 * _step]", "D1 = [10 * _step]"))
    found = []
    for flags in ([f"--launcher={TORCHRUN}"], ["--workers=1", f"--out_dir={tmp_path / 'alone'}"]):
        s = study(mini, "--families=['moe', 'upcycled']", *flags)
        sweep.main(s)
        rows = [json.loads(line) for line in open(Path(s.out_dir) / "rows.jsonl")]
        found.append({row["family"]: row for row in rows})
        planned = {row["family"]: row for row in planned_rows(s)}
        assert len(rows) == 2 and found[-1].keys() == planned.keys() == {"moe", "upcycled"}
        assert all(found[-1][family] | planned[family] == found[-1][family] for family in planned)
    for family in planned:
        assert found[0][family]["loss"] == pytest.approx(found[1][family]["loss"], rel=5e-3)


@pytest.mark.parametrize("gpus, flags, count", [(3, [], 3), (0, [], len(os.sched_getaffinity(0))),
                                                (3, ["--workers=2"], 2), (3, [f"--launcher={TORCHRUN}"], 1)])
def test_workers_are_as_many_as_devices(mini, monkeypatch, gpus, flags, count):  # noqa: F811
    seen, s = [], study(mini, *flags)
    jobs = study_jobs(s)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(sweep, "run_jobs", lambda todo, count, caught, bar: seen.append(count) or [])
    assert sweep.sweep(s, jobs) == [] and seen == [min(count, len(jobs))]


def test_a_launched_run_that_fails_says_what_train_printed(mini):  # noqa: F811
    mini.write_text(one_size(mini))
    branch = study_jobs(study(mini, f"--launcher={sys.executable}"))[1]
    with pytest.raises(ConfigError, match=f"^{re.escape(branch.needs)}: no such checkpoint"):
        launch(branch, print)
    (mini.parent / "fails").write_text("echo train.py: rank 3 failed; false")  # which names no cause
    for launcher in ("false", f"sh {mini.parent / 'fails'}"):
        with pytest.raises(ConfigError, match="output.txt: .* ended with status 1"):
            launch(dataclasses.replace(branch, launcher=launcher), print)


# ---------------------------------------------------------------------------------------------------------
# What a study costs

SHAPES = {"dense": {}, "moe": {"num_local_experts": 8}, "grouped": {"num_key_value_heads": 2}}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_saves(kind, dtype):
    c = ModelConfig(257, 64, 176, 2, 4, tie_word_embeddings=True, **SHAPES[kind])
    model, tokens, saved = Transformer(c).init_weights(0), 64 * 128, {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    ids = torch.randint(0, 257, (64, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        out = model(ids, ids)
    measured = sum(n for place, n in saved.items() if place not in own)
    assert out[0].isfinite()
    expected = cost.activation_bytes(c, tokens, 4 if dtype == "float32" else 2)
    if dtype == "bfloat16":  # a CPU's attention is in fp32: q, k, v take twice as much, the output thrice
        q, kv = 4 * 16, (c.num_key_value_heads or 4) * 16
        expected += 2 * tokens * (2 * (q + 2 * kv) + 4 * q)
    assert measured == pytest.approx(expected, rel=0.02)  # weights are saved in bf16 too


@pytest.fixture
def jobs(data, tmp_path):  # noqa: F811
    """Jobs so large that the headers of files and the process itself weigh little."""
    path = tmp_path / "study.py"
    path.write_text(f"""
sizes = [{{"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 2}}]
D1 = [16384, 32768]
D2 = [16384]
D_dense = [16384]
D_moe = [16384]
methods = [{{"optimizer": "copy"}}]
train = {{"dataset": {data!r}, "tokens_per_step": 8192, "warmup_steps": 1, "eval_tokens": 1024}}
""")
    return study_jobs(parse(sweep.Study, [str(path), f"--out_dir={tmp_path / 'out'}"]))


def test_disk_is_what_the_checkpoints_take(jobs):
    made = [jobs[0], jobs[1], *[job for job in jobs if job.row.get("D1") == 16384]]
    assert [job.is_trunk for job in made] == [True, False, True, False]
    for job in made:
        if job.upcycling:
            upcycle(job.upcycling)
        train(job.settings, report=str)
        folder = Path(job.settings.out_dir)
        size = sum(path.stat().st_size for path in [*folder.glob("checkpoint-*/*"), *folder.glob("start/*")])
        assert size == pytest.approx(cost.disk_bytes(job), rel=0.04)


def test_memory_is_what_a_run_takes_beyond_its_imports(jobs):
    """Within a factor of 1.5: the allocator, the head and what the kernels need come on top."""
    job = next(job for job in jobs if job.row["family"] == "moe")
    code = ("import re, sys, train; from configurator import parse\n"
            "def kb(key): return int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
            "before = kb('VmRSS')\n"
            "train.train(parse(train.Train, sys.argv[1:]), report=str)\n"
            "print(1024 * (kb('VmHWM') - before))\n")
    config = Path(job.settings.out_dir).with_suffix(".py")
    config.parent.mkdir()
    write_config(job.settings, config)
    result = subprocess.run([sys.executable, "-c", code, str(config)], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    expected, measured = cost.device_bytes(job), int(result.stdout)
    assert expected / 1.5 < measured < 1.5 * expected, (expected / 1e6, measured / 1e6)


def test_the_grid_of_the_paper_is_counted_without_its_data(capsys):
    """By hand for the largest: 26 layers of 4·1792² + 3·1792·4864 and two norms; 8 experts and a router."""
    s = parse(sweep.Study, [str(ROOT / "config" / "paper" / "study.py"), "--dry_run", "--mfu=0.5"])
    plan, D, F = study_jobs(s), 1792, 4864
    n = 26 * (4 * D * D + 3 * D * F + 2 * D) + D
    assert max(job.row["N"] for job in plan) == n
    assert max(job.row["N_total"] for job in plan) == n + 26 * (7 * 3 * D * F + 8 * D)
    assert {job.row["num_experts_per_tok"] for job in plan if job.row["family"] != "dense"} == {2}
    sweep.main(s)
    said = capsys.readouterr()
    assert "vocabulary of 50,257 tokens is assumed" in said.err
    hours = sum(job.flops for job in plan) / (0.5 * 989e12 * 3600)
    assert f"time: {hours:,.3g} hours of one device" in said.out
    largest = max(plan, key=cost.device_bytes)
    assert largest.row["N"] == n and largest.row["family"] == "moe"
    assert f"memory: {cost.device_bytes(largest) / 1e9:.3g} GB a device in the largest run" in said.out
    disk = sum(cost.disk_bytes(job) for job in plan) / 1e12
    words = ast.get_docstring(ast.parse((ROOT / "config" / "paper" / "study.py").read_text()))
    told = re.search(r"says ([\d,]+) GPU-hours on H100s, (\S+) GB a GPU and (\S+) TB", words).groups()
    assert [float(number.replace(",", "")) for number in told] == pytest.approx(
        [hours * 0.5 / 0.4, cost.device_bytes(largest) / 1e9, disk], rel=0.005)
    parts = [(job.row["flops"], job.row.get("D2", job.row.get("D"))) for job in plan if job.row["N"] == n]
    per_token = {flops // tokens for flops, tokens in parts}
    dense = 6 * (n - (2 * 26 + 1) * D + 50257 * D) + 12 * 26 * D * 2048
    assert per_token == {dense, dense + 6 * 26 * (3 * D * F + 8 * D)}
    with pytest.raises(ConfigError, match="slimpajama.*no such file; make it with: python data/prepare.py"):
        study_jobs(dataclasses.replace(s, dry_run=False))


def bytes_study(monkeypatch, name, *flags):
    """(a study of config/ with data of bytes, which are not at hand in tests, its jobs)."""
    monkeypatch.setattr(sweep, "load_tokens", lambda directory, split: (None, {"vocab_size": 257}))
    s = parse(sweep.Study, [str(ROOT / "config" / f"{name}.py"), *flags])
    return s, study_jobs(s)


def test_the_hours_of_a_dry_run_are_those_that_make_study_took(monkeypatch):
    """The log has how long its sweep took, and the speed of its steps."""
    text = " ".join((ROOT / "dev" / "LOG.md").read_text().split())
    told = re.search(r"The sweep of `make study` \((\S+)M tokens, (\S+) FLOPs, 2 workers\) took (\d+) min "
                     r"(\d+) s.*?All its steps together ran at (\S+) FLOP/s a worker", text).groups()
    tokens, flops, minutes, seconds, speed = map(float, told)
    s, plan = bytes_study(monkeypatch, "study_quick", f"--flops_per_gpu={speed}", "--mfu=1")
    assert tokens == pytest.approx(sum(job.tokens for job in plan) / 1e6, rel=1e-3)
    assert flops == pytest.approx(sum(job.flops for job in plan), rel=2e-3)
    hours = float(re.search(r"time: (\S+) hours of one device", cost.describe(s, plan))[1])
    assert hours * 3600 / 2 == pytest.approx(60 * minutes + seconds, rel=0.1)


def test_the_study_of_a_gpu_has_the_share_and_the_disk_that_it_says(monkeypatch):
    s, plan = bytes_study(monkeypatch, "study_gpu")
    words = " ".join(ast.get_docstring(ast.parse((ROOT / "config" / "study_gpu.py").read_text())).split())
    minutes, percent, disk = map(float, re.search(
        r"takes (\d+) minutes of an H100 at (\S+) % of its peak in bf16.* keeps (\S+) GB", words).groups())
    assert percent / 100 == pytest.approx(sum(job.flops for job in plan) / (minutes * 60 * 989e12), rel=0.01)
    assert disk == pytest.approx(sum(cost.disk_bytes(job) for job in plan) / 1e9, rel=0.001)


@pytest.mark.parametrize("name, experts, offload", [("7B dense", 0, False), ("its mixture of 8", 8, False),
                                                    ("the mixture with `--cpu_offload`", 8, True)])
def test_the_table_of_large_models_is_what_is_counted(name, experts, offload):
    """By hand: 32 layers of width 4096 and 14336, 8 key-value heads of 128, 32,000 tokens, not tied."""
    D, F, L = 4096, 14336, 32
    matrices = L * (2 * D * (D + 8 * 128) + max(experts, 1) * 3 * D * F)
    others = 2 * 32000 * D + L * (2 * D + experts * D) + D
    m = ModelConfig(32000, D, F, L, 32, 8, max_position_embeddings=D, num_local_experts=experts)
    c = Train(max_seq_len=D, tokens_per_step=32 * D, micro_batch_size=1, dtype="bfloat16", parallel="fsdp",
              activation_checkpointing=True, cpu_offload=offload)
    line, = (line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {name}"))
    for n, cell in zip((8, 16, 32), line.split(" | ")[1:]):
        shares = 16 * (matrices + others) / n
        held = 8 * others + 10 * matrices / L + cost.activation_bytes(m, D, 2, recompute=True)
        counted = [held, shares] if offload else [held + shares]
        assert [f"{size / 1e9:.0f}" for size in counted] == re.findall(r"\d+", cell)
        assert cost.device_bytes(SimpleNamespace(settings=c, model=m, ranks=n)) == pytest.approx(counted[0])


# ---------------------------------------------------------------------------------------------------------
# The examples for SLURM

def commands_of(script):
    """The commands of a shell script that srun starts, as lists of words."""
    text = script.read_text().replace("\\\n", " ")
    text = text.replace("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "1/8")
    return [shlex.split(line.rstrip("& "))[1:] for line in text.splitlines() if line.startswith("srun ")]


@pytest.mark.parametrize("name", ["run.sh", "study.sh"])
def test_examples_for_slurm_are_valid_and_their_options_exist(name):
    script = ROOT / "config" / "cluster" / name
    for path in (script, script.with_name("requeue.sh")):
        assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    (words, ), kinds = commands_of(script), {"train.py": Train, "sweep.py": sweep.Study}
    words = [word for word in words if word != "$@" and not word.startswith("--kill-on-bad-exit")]
    place = next(i for i, word in enumerate(words) if word in kinds)
    settings = parse(kinds[words[place]], [str(ROOT / word) if word.startswith("config/") else word
                                           for word in words[place + 1:]])
    assert settings.config
    if words[0] == "torchrun":
        launcher = get_args_parser().parse_args(words[1:])
        assert launcher.training_script == "train.py" and settings.resume
        assert "SIGUSR1" in launcher.signals_to_handle
    else:
        share_of(settings, [])  # a valid shard
    for directive in re.findall(r"^#SBATCH (.*)", script.read_text(), re.MULTILINE):
        assert re.fullmatch(r"--[a-z-]+(=\S+)?", directive), directive
