"""The loop: exact resume, branches, ranks, schedule, stops and bad input, on real runs of a tiny model."""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import train as train_module
from configurator import ConfigError, from_dict, parse, read_config, write_config
from model import flops_per_token
from data.stream import batches, bits_per_byte, load_tokens, sequences, shuffled
from rows import ROUTING, SETTINGS, run_key
from checkpoint import tokens_seen
from train import Stopped, Train, learning_rate, pays_to_compile, train, validate
from upcycle import Options, upcycle

ROOT = Path(__file__).resolve().parent.parent
STEP = 128  # tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small data set of this repository's own text, as data/prepare.py writes it."""
    from data.prepare import Options as Prepare, prepare
    folder, out = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("data") / "tokens"
    # prepare splits by document
    for name in ("train.py", "model.py", "checkpoint.py", "upcycle.py", "sweep.py"):
        for i, part in enumerate((ROOT / name).read_text().split("\n\n")):
            (folder / f"{name}{i}.txt").write_text(part)
    prepare(Prepare(source=str(folder), out_dir=str(out), val_fraction=0.1))
    return str(out)


@pytest.fixture
def tiny(data, tmp_path):
    return Train(dataset=data, out_dir=str(tmp_path / "run"), rows=str(tmp_path / "rows.jsonl"),
                 hidden_size=16, intermediate_size=32,
                 num_hidden_layers=2, num_attention_heads=2, max_seq_len=16, tokens_per_step=STEP,
                 max_tokens=20 * STEP, warmup_steps=3,
                 decay_steps=6, eval_tokens=1024, save_every_seconds=0)


def moe(c, **changes):
    return dataclasses.replace(c, num_local_experts=4, **changes)


def quiet(tokens):
    pass


def log(c):
    return [json.loads(line) for line in open(os.path.join(c.out_dir, "log.jsonl"))]


def digests(directory):
    return {p.relative_to(directory): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in Path(directory).rglob("*") if p.is_file()}


def same_state(a, b, but=("trunk",)):
    """Two checkpoint directories hold the same bits: weights, moments, and state but for its keys `but`."""
    assert (Path(a) / "model.safetensors").read_bytes() == (Path(b) / "model.safetensors").read_bytes()
    assert (Path(a) / "optimizer.moments").read_bytes() == (Path(b) / "optimizer.moments").read_bytes()
    states = [{key: value for key, value in checkpoint.read_state(d).items() if key not in but}
              for d in (a, b)]
    assert states[0] == states[1]


# ---------------------------------------------------------------------------------------------------------
# Pure functions

def test_wsd_values():
    c = Train(learning_rate=1.0, warmup_steps=4, decay_start=10, decay_steps=5, min_lr_ratio=0.0)
    expected = [0.25, 0.5, 0.75] + [1.0] * 8 + [0.8, 0.6, 0.4, 0.2] + [0.0]
    assert [learning_rate(s, c, 15) for s in range(16)] == pytest.approx(expected)
    assert learning_rate(12, dataclasses.replace(c, min_lr_ratio=0.5), 15) == pytest.approx(0.8)
    never = dataclasses.replace(c, decay_steps=0)
    assert {learning_rate(s, never, 15) for s in range(3, 1000)} == {1.0}
    # no horizon in it
    assert [learning_rate(s, c, 15) for s in range(16)] == [learning_rate(s, c, 10**9) for s in range(16)]


def test_cosine_values():
    c = Train(learning_rate=1.0, warmup_steps=4, schedule="cosine", min_lr_ratio=0.1)
    assert learning_rate(4, c, 24) == pytest.approx(1.0)
    assert learning_rate(14, c, 24) == pytest.approx(0.55)
    assert learning_rate(24, c, 24) == pytest.approx(0.1)
    assert learning_rate(9, c, 24) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 4097])
def test_stream_order_is_a_fresh_permutation_each_pass(n):
    first, second, other = (shuffled(np.arange(turn * n, turn * n + n), n, seed)
                            for turn, seed in ((0, 7), (1, 7), (0, 8)))
    for order in (first, second, other):
        assert sorted(order.tolist()) == list(range(n))
    if n >= 64:
        assert (first != second).any() and (first != other).any() and (first != np.arange(n)).mean() > 0.9
        # 4 standard errors of no correlation
        assert abs(np.corrcoef(np.arange(n), first)[0, 1]) < 4 / math.sqrt(n)


def test_stream_order_is_a_pure_function_of_the_index():
    whole = shuffled(np.arange(300), 100, 3)
    assert [int(shuffled(i, 100, 3)) for i in range(300)] == whole.tolist()
    np.random.seed(0), torch.manual_seed(0)
    assert (shuffled(np.arange(300), 100, 3) == whole).all()
    # five ranks' slices of one step
    places = np.concatenate([shuffled(10 + r * 4 + np.arange(4), 100, 3) for r in range(5)])
    assert (places == shuffled(np.arange(10, 30), 100, 3)).all()


def test_sequences_are_shifted_by_one_token():
    tokens = np.arange(100, dtype=np.uint16)
    ids, targets = sequences(tokens, [2, 0], 8, torch.device("cpu"))
    assert ids.tolist() == [list(range(16, 24)), list(range(0, 8))]
    assert targets.tolist() == [list(range(17, 25)), list(range(1, 9))]


@pytest.mark.parametrize("world", [1, 2])
def test_batches_read_ahead_are_the_stream_in_order(world):
    """Each rank's batches, side by side, are the shuffled stream from `first` on, step after step."""
    tokens, step = np.random.default_rng(0).integers(0, 999, 8 * 30 + 1).astype(np.uint16), 6
    streams = [batches(tokens, 4 + rank * step // world, step // world, step, 8, 3, torch.device("cpu"))
               for rank in range(world)]
    for i in range(12):  # two passes and more over the 30 sequences
        found = [torch.cat(parts) for parts in zip(*(next(stream) for stream in streams))]
        expected = sequences(tokens, shuffled(np.arange(4 + i * step, 4 + (i + 1) * step), 30, 3), 8,
                             torch.device("cpu"))
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


# ---------------------------------------------------------------------------------------------------------
# Runs

def test_a_run_learns_and_writes_its_row(tiny):
    row = train(dataclasses.replace(tiny, max_tokens=150 * STEP, learning_rate=1e-2, decay_steps=30),
                report=quiet)
    lines = log(tiny)
    assert [line["step"] for line in lines] == list(range(1, 151))
    assert np.mean([line["loss"] for line in lines[-10:]]) < lines[0]["loss"] - 1.5
    assert json.loads(open(tiny.rows).read()) == row
    assert json.load(open(os.path.join(tiny.out_dir, "row.json"))) == row
    assert row["family"] == "dense"
    assert row["D"] == 150 * STEP
    assert row["N"] == row["N_active"] == row["N_total"]
    model = checkpoint.load_model(os.path.join(tiny.out_dir, "checkpoint-150"))
    assert row["flops"] == 150 * STEP * flops_per_token(model.config, 16)
    tokens = np.load(os.path.join(tiny.dataset, "val.npy")).astype(np.int64)
    each = []  # the row's loss once more, by hand
    for i in range(1024 // 16):
        piece = torch.from_numpy(tokens[16 * i:16 * i + 17])
        logp = model(piece[None, :-1])[0].log_softmax(-1)
        each.append(-logp[torch.arange(16), piece[1:]].mean().item())
    assert row["loss"] == pytest.approx(np.mean(each), rel=1e-5)
    assert row["loss_se"] == pytest.approx(np.std(each, ddof=1) / 8, rel=1e-4)
    assert read_config(os.path.join(tiny.out_dir, "config.py"))["max_tokens"] == 150 * STEP


@pytest.mark.parametrize("argv, number", [([], 0.17), (["--initializer_range=auto"], 0.17),
                                          (["--initializer_range=0.03"], 0.03)])
def test_the_standard_deviation_of_fresh_weights_fits_the_width(tiny, tmp_path, argv, number):
    """0.68 / sqrt(16) unless it is given: in the row, in config.json and in the weights."""
    c = dataclasses.replace(parse(Train, argv),
                            **{f.name: getattr(tiny, f.name) for f in dataclasses.fields(Train)
                                                   if f.name != "initializer_range"})
    # A step without learning rate leaves the weights as they were drawn.
    row = train(dataclasses.replace(c, learning_rate=0.0, max_tokens=STEP, warmup_steps=0, decay_steps=0),
                report=quiet)
    path = os.path.join(c.out_dir, "checkpoint-1")
    assert row["initializer_range"] == json.load(open(os.path.join(path, "config.json")))["initializer_range"]
    assert row["initializer_range"] == number
    weights = checkpoint.load_model(path).embed_tokens.weight
    # 4 standard errors
    assert weights.std().item() == pytest.approx(number, rel=4 / math.sqrt(2 * weights.numel()))
    # Whoever starts from it has its value, asked for "auto" or not.
    other = dataclasses.replace(c, out_dir=str(tmp_path / "other"), init_from=path)
    assert train(other, report=quiet)["initializer_range"] == number


@pytest.mark.parametrize("kind", ["dense", "moe", "moe with bias"])
def test_resume_is_bit_for_bit(tiny, tmp_path, kind):
    c = tiny if kind == "dense" else moe(tiny, router_bias_update_rate=0.01 if "bias" in kind else 0.0)
    c = dataclasses.replace(c, decay_start=14)
    whole = dataclasses.replace(c, out_dir=str(tmp_path / "whole"))
    train(whole, report=quiet)
    train(dataclasses.replace(c, max_tokens=10 * STEP, rows=None), report=quiet)
    train(dataclasses.replace(c, resume=True), report=quiet)
    same_state(tmp_path / "whole" / "checkpoint-20", tmp_path / "run" / "checkpoint-20")
    drop = ("tokens_per_s", "flops_per_s")
    assert [{k: v for k, v in line.items() if k not in drop} for line in log(whole)] == \
        [{k: v for k, v in line.items() if k not in drop} for line in log(c)]
    if "bias" in kind:
        buffers = checkpoint.load_model(tmp_path / "run" / "checkpoint-20").named_buffers()
        assert any(b.any() for n, b in buffers if n.endswith("mlp.bias"))


def test_accumulation_and_eval_leave_training_alone(tiny, tmp_path):
    """Validation in between changes no bit; micro-batches change only the order of sums (fp32, 20 steps)."""
    train(tiny, report=quiet)
    train(dataclasses.replace(tiny, out_dir=str(tmp_path / "b"), eval_every_steps=1), report=quiet)
    same_state(tmp_path / "run" / "checkpoint-20", tmp_path / "b" / "checkpoint-20")
    train(dataclasses.replace(tiny, out_dir=str(tmp_path / "c"), micro_batch_size=2), report=quiet)
    a, b = (np.array([line["loss"] for line in log(dataclasses.replace(tiny, out_dir=str(tmp_path / d)))])
            for d in ("run", "c"))
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_branch_reads_its_trunk_and_never_changes_it(tiny, tmp_path):
    trunk = dataclasses.replace(tiny, rows=None, decay_steps=0, save_at_tokens=[8 * STEP, 14 * STEP])
    assert train(trunk, report=quiet) is None and not os.path.exists(tiny.rows)
    assert [s for s, _ in checkpoint.checkpoints(tiny.out_dir)] == [8, 14, 20]
    before = digests(tiny.out_dir)
    branch = dataclasses.replace(tiny, out_dir=str(tmp_path / "branch"),
                                 init_from=str(tmp_path / "run" / "checkpoint-14"), branch=True,
                                 decay_start=14, decay_steps=6)
    row = train(branch, report=quiet)
    assert digests(tiny.out_dir) == before
    assert row["D"] == 20 * STEP and row["trunk"] == "run"
    straight = dataclasses.replace(tiny, out_dir=str(tmp_path / "straight"), decay_start=14, decay_steps=6)
    train(straight, report=quiet)  # one run with the same schedule
    same_state(tmp_path / "branch" / "checkpoint-20", tmp_path / "straight" / "checkpoint-20",
               ("trunk", "history"))
    assert [line["step"] for line in log(branch)] == list(range(15, 21))


@pytest.mark.parametrize("optimizer", ["reset", "copy"])
def test_an_upcycled_run_goes_on_where_its_dense_trunk_stopped(tiny, tmp_path, optimizer):
    train(dataclasses.replace(tiny, rows=None, decay_steps=0), report=quiet)
    start = str(tmp_path / "start")
    upcycle(Options(source=str(tmp_path / "run" / "checkpoint-20"), destination=start, num_local_experts=4,
                    optimizer=optimizer, check=False))
    run = dataclasses.replace(tiny, out_dir=str(tmp_path / "moe"), init_from=start,
                              branch=optimizer == "copy", max_tokens=12 * STEP, decay_steps=4)
    row = train(run, report=quiet)
    assert (row["family"], row["D1"], row["D2"], row["method"]) == ("upcycled", 20 * STEP, 12 * STEP, "copy")
    # one more active expert and the router, a layer
    assert row["N"] == row["N_active"] - 2 * 3 * 16 * 32 - 2 * 4 * 16 < row["N_total"]
    state = checkpoint.read_state(tmp_path / "moe" / "checkpoint-12")
    assert state["sequence"] == 32 * STEP // 16 and state["tokens"] == 12 * STEP
    dense = log(tiny)[-1]["loss"]
    # the function was preserved: it starts where the dense model was, not at ln 257
    assert abs(log(run)[0]["loss"] - dense) < 0.5
    longer = dataclasses.replace(tiny, out_dir=str(tmp_path / "longer"),
                                 init_from=str(tmp_path / "run" / "checkpoint-20"))
    assert train(longer, report=quiet)["D"] == 40 * STEP  # a new schedule on the same weights
    record = upcycle(Options(source=str(tmp_path / "longer" / "checkpoint-20"), destination=start + "2",
                             num_local_experts=4, check=False))
    assert record["D1"] == 40 * STEP
    again = dataclasses.replace(run, out_dir=str(tmp_path / "again"), repeat_data=True)
    train(again, report=quiet)
    assert checkpoint.read_state(tmp_path / "again" / "checkpoint-12")["sequence"] == 12 * STEP // 16
    assert log(again)[0]["loss"] != log(run)[0]["loss"]


@pytest.mark.parametrize("key, value", [("seed", -1), ("micro_batch_size", 0), ("beta1", 2.0),
                                        ("decay_steps", -5), ("eval_tokens", 0), ("save_at_tokens", [0]),
                                        ("grad_clip", -1.0), ("min_lr_ratio", 1.5),
                                        ("num_key_value_heads", -2), ("initializer_range", -0.1)])
def test_impossible_numbers_are_refused_by_name(key, value):
    with pytest.raises(ConfigError,
                       match=f"{key}.*{'in' if key in ('beta1', 'min_lr_ratio') else 'at least'}"):
        from_dict(Train, {key: value})


def torchrun(c, processes, tmp_path):
    path = tmp_path / f"config{processes}.py"
    write_config(c, path)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                    "--master_port=0", "--standalone", "train.py", str(path)],
                   cwd=ROOT, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
                   capture_output=True)


@pytest.mark.parametrize("kind", ["moe", "dense, accumulating"])
def test_two_processes_equal_one(tiny, tmp_path, kind):
    """Same tokens, MoE with balance loss: only the order of sums differs; rounding grows over 20 steps."""
    c = dataclasses.replace(tiny, learning_rate=1e-3, eval_every_steps=5)
    c = moe(c, router_aux_loss_coef=0.1) if kind == "moe" else dataclasses.replace(c, micro_batch_size=2)
    one = train(c, report=quiet)
    two = dataclasses.replace(c, out_dir=str(tmp_path / "two"), rows=str(tmp_path / "rows2.jsonl"))
    torchrun(two, 2, tmp_path)
    for key in ("loss", "grad_norm") + (("balance_loss", "z_loss") if kind == "moe" else ()):
        a, b = ([line[key] for line in log(x)] for x in (c, two))
        np.testing.assert_allclose(a, b, rtol=2e-4, err_msg=key)
    assert json.loads(open(two.rows).read())["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert log(two)[0].get("router_load") == log(c)[0].get("router_load")


def test_a_pooled_balance_loss_is_that_of_the_mean_load(tiny, tmp_path):
    """The first step of two runs that differ in it alone has the same routing and other gradients."""
    each = moe(tiny, max_tokens=STEP, rows=None, warmup_steps=1, router_aux_loss_coef=1.0)
    pooled = dataclasses.replace(each, router_aux_loss_pooled=True, out_dir=str(tmp_path / "pooled"))
    for c in (each, pooled):
        train(c, report=quiet)
    (a,), (b,) = log(each), log(pooled)
    assert (a["loss"], a["router_load"]) == (b["loss"], b["router_load"])
    assert abs(b["balance_loss"] - 1) < abs(a["balance_loss"] - 1)  # layers make up for each other
    assert a["grad_norm"] != b["grad_norm"]


def test_validation_is_shared_fixed_and_carries_its_error(tiny):
    train(dataclasses.replace(tiny, rows=None), report=quiet)
    model = checkpoint.load_model(os.path.join(tiny.out_dir, "checkpoint-20"))
    tokens = np.load(os.path.join(tiny.dataset, "val.npy"))
    run = SimpleNamespace(c=tiny, model=model, val_tokens=tokens, device=torch.device("cpu"),
                          autocast=contextlib.nullcontext(), micro=64)
    a, run.micro = validate(run), 5
    assert validate(run) == pytest.approx(a, rel=1e-6)


def test_a_row_has_every_setting_that_moves_the_loss(tiny):
    """A new setting of train.py is in the row, or is one of these, which move no loss."""
    without = {"config", "out_dir", "rows", "trunk", "init_from", "branch", "resume", "dataset", "D1",
               "loggers",
               "max_tokens", "micro_batch_size", "eval_every_steps",
               "save_at_tokens", "save_every_seconds", "skip_nonfinite", "device", "compile", "parallel",
               "cpu_offload", "activation_checkpointing", "shard_size", "timeout_seconds"}
    named = {"seed", "num_local_experts", "num_experts_per_tok"}
    derived = {"sequences_per_pass", "tokens_before_schedule"}
    assert {f.name for f in dataclasses.fields(Train)} == (set(SETTINGS) - derived) | named | without
    dense = train(tiny, report=quiet)
    sparse = train(moe(tiny, out_dir=tiny.out_dir + "2", micro_batch_size=4), report=quiet)
    assert set(SETTINGS) <= set(sparse) and set(SETTINGS) - set(dense) == {*ROUTING, "sequences_per_pass"}
    c = from_dict(Train, read_config(os.path.join(tiny.out_dir, "config.py")))
    assert all(dense[key] == getattr(c, key)
               for key in set(SETTINGS) & set(dense) - derived - {"num_key_value_heads"})
    assert (dense["num_key_value_heads"], dense["decay_start"], sparse["sequences_per_pass"]) == (2, 14, 4)


def test_automatic_settings_follow_the_device_and_the_length_of_the_run(tiny, monkeypatch):
    import start
    assert train(tiny, report=quiet)["dtype"] == "float32" and not pays_to_compile(1e12, "cpu")
    assert pays_to_compile(1e13, "cpu") and pays_to_compile(1e13, "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pays_to_compile(1e13, "cpu") and pays_to_compile(1e17, "cuda")
    assert not pays_to_compile(1e13, "auto")
    meta = {"vocab_size": 257, "tokenizer": "bytes"}
    assert start.resolve_architecture(Train(), None, meta)[0].dtype == "bfloat16"
    assert start.resolve_architecture(Train(device="cpu"), None, meta)[0].dtype == "float32"
    monkeypatch.setenv("CXX", "no_such_compiler")
    assert not pays_to_compile(1e17, "cpu")


def test_history_counts_each_run_once_and_branches_share_their_trunk(tiny, tmp_path):
    def run(name, **changes):
        train(dataclasses.replace(tiny, out_dir=str(tmp_path / name), rows=None, **changes), report=quiet)
        return checkpoint.read_state(checkpoint.checkpoints(str(tmp_path / name))[-1][1])
    trunk = run("run", decay_steps=0, save_at_tokens=[8 * STEP, 14 * STEP])
    (trunk_id, tokens), = trunk["history"]
    assert tokens == 20 * STEP and trunk["trunk"] == "run"
    branch = {"branch": True, "decay_steps": 4}
    at_14 = run("a", init_from=str(tmp_path / "run" / "checkpoint-14"), max_tokens=18 * STEP, **branch)
    at_8 = run("b", init_from=str(tmp_path / "run" / "checkpoint-8"), max_tokens=12 * STEP, **branch)
    assert [n for _, n in at_14["history"]] == [14 * STEP, 4 * STEP]
    assert [n for _, n in at_8["history"]] == [8 * STEP, 4 * STEP]
    assert at_14["history"][0][0] == at_8["history"][0][0] == trunk_id
    assert at_14["trunk"] == at_8["trunk"] == "run"
    # a new schedule on its weights
    again = run("c", init_from=str(tmp_path / "a" / "checkpoint-18"), max_tokens=5 * STEP)
    assert again["history"][:2] == at_14["history"]
    assert again["tokens"] == 5 * STEP
    assert tokens_seen(again) == 23 * STEP
    ids = [state["history"][-1][0] for state in (trunk, at_14, at_8, again)]
    ids += [run(name, **changes)["history"][-1][0] for name, changes in {
        "seed": {"seed": 1}, "lr": {"learning_rate": 1e-3}, "twin": {"eval_every_steps": 5},
        "longer": {"max_tokens": 21 * STEP, "decay_start": 14}}.items()]
    # how often it is validated and where it ends makes no other run
    assert len(set(ids)) == 7 and ids[6] == ids[7]


def test_a_resumed_run_with_other_settings_is_a_run_of_its_own_in_the_history(tiny):
    c = dataclasses.replace(tiny, rows=None, decay_start=14)
    train(dataclasses.replace(c, max_tokens=6 * STEP), report=quiet)
    train(dataclasses.replace(c, max_tokens=10 * STEP, resume=True), report=quiet)
    train(dataclasses.replace(c, learning_rate=1e-3, resume=True), report=quiet)
    history = checkpoint.read_state(os.path.join(c.out_dir, "checkpoint-20"))["history"]
    assert [tokens for _, tokens in history] == [10 * STEP, 10 * STEP]
    assert len({run for run, _ in history}) == 2


def test_an_upcycled_row_names_both_trunks_and_all_knobs(tiny, tmp_path):
    train(dataclasses.replace(tiny, rows=None, decay_steps=0, trunk="the dense one"), report=quiet)
    rows = []
    for i, knobs in enumerate(({}, {"optimizer": "copy"}, {"router_std": 0.1})):
        start = str(tmp_path / f"start{i}")
        upcycle(Options(source=str(tmp_path / "run" / "checkpoint-20"), destination=start,
                        num_local_experts=4, check=False, **knobs))
        rows.append(train(dataclasses.replace(tiny, out_dir=str(tmp_path / f"moe{i}"), init_from=start,
                                              branch=bool(knobs.get("optimizer")), trunk="the moe"),
                          report=quiet))
    assert {(row["dense_trunk"], row["trunk"]) for row in rows} == {("the dense one", "the moe")}
    found = [(row["optimizer"], row["router_std"]) for row in rows]
    assert found == [("reset", 0.02), ("copy", 0.02), ("reset", 0.1)]
    assert len(set(map(run_key, rows))) == 3
    # since the upcycling
    assert checkpoint.read_state(tmp_path / "moe0" / "checkpoint-20")["history"][0][1] == 20 * STEP


def test_time_spent_on_validation_does_not_count_as_training(tiny, monkeypatch):
    """On a clock that only a validation moves on, no step takes any of its time."""
    now, true = [0.0], train_module.validate

    def clock():
        now[0] += 1e-3
        return now[0]

    def slow(*arguments, **options):
        now[0] += 3600
        return true(*arguments, **options)
    monkeypatch.setattr(train_module.time, "perf_counter", clock)
    monkeypatch.setattr(train_module, "validate", slow)
    train(dataclasses.replace(tiny, eval_every_steps=1), report=quiet)
    assert all(line["tokens_per_s"] > STEP for line in log(tiny))


@pytest.mark.parametrize("sizes", [{"intermediate_size": 20}, {"hidden_size": 12, "num_attention_heads": 2}])
def test_bfloat16_experts_of_any_width_train(tiny, sizes):
    """Rows that are no multiple of 16 bytes, which grouped_mm refuses."""
    assert np.isfinite(losses(moe(tiny, **sizes), dtype="bfloat16")).all()


def losses(c, **changes):
    c = dataclasses.replace(c, max_tokens=6 * STEP, decay_steps=2, rows=None, **changes)
    train(c, report=quiet)
    return np.array([line["loss"] for line in log(c)])


def test_bfloat16_runs_near_float32(tiny, tmp_path):
    np.testing.assert_allclose(losses(moe(tiny), dtype="bfloat16"),
                               losses(moe(tiny), out_dir=str(tmp_path / "plain")), rtol=0.02)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_compiled_equals_eager(tiny, tmp_path, kind):
    c = dataclasses.replace(moe(tiny) if kind == "moe" else tiny, num_hidden_layers=1)
    np.testing.assert_allclose(losses(c, compile=True), losses(c, out_dir=str(tmp_path / "plain")), rtol=1e-4)
    # Products in fp32, the router's among them, stay fp32 on a GPU too.
    assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_compiled_run_resumes_bit_for_bit(tiny, tmp_path, kind):
    c = dataclasses.replace(moe(tiny) if kind == "moe" else tiny, num_hidden_layers=1, compile=True,
                            rows=None, max_tokens=6 * STEP, decay_start=4, decay_steps=2)
    train(dataclasses.replace(c, out_dir=str(tmp_path / "whole")), report=quiet)
    train(dataclasses.replace(c, max_tokens=3 * STEP), report=quiet)
    torch.compiler.reset()  # as in a process of its own
    train(dataclasses.replace(c, resume=True), report=quiet)
    same_state(tmp_path / "whole" / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    straight, resumed = ([line["loss"] for line in log(dataclasses.replace(c, out_dir=str(tmp_path / name)))]
                         for name in ("whole", "run"))
    assert straight == resumed


# ---------------------------------------------------------------------------------------------------------
# Stops

def test_a_loss_that_is_not_finite_stops_before_the_update(tiny):
    c = dataclasses.replace(tiny, save_at_tokens=[4 * STEP])
    train(dataclasses.replace(c, max_tokens=4 * STEP, rows=None), report=quiet)
    path = os.path.join(tiny.out_dir, "checkpoint-4")
    before = digests(path)
    with pytest.raises(ConfigError, match=r"at step \d+, token \d+.*checkpoint-4.*learning_rate"):
        train(dataclasses.replace(c, resume=True, learning_rate=1e30), report=quiet)
    assert digests(path) == before and len(checkpoint.checkpoints(tiny.out_dir)) == 1
    assert not os.path.exists(tiny.rows)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_at_any_moment_then_resumed_equals_uninterrupted(tiny, tmp_path, number):
    c = dataclasses.replace(tiny, max_tokens=300 * STEP, decay_steps=100,
                            save_at_tokens=[k * 50 * STEP for k in range(1, 6)])
    whole = dataclasses.replace(c, out_dir=str(tmp_path / "whole"))
    train(whole, report=quiet)
    write_config(c, tmp_path / "c.py")
    process = subprocess.Popen([sys.executable, "train.py", str(tmp_path / "c.py")], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (os.path.exists(os.path.join(c.out_dir, "checkpoint-50")) or process.poll() is not None):
        time.sleep(0.005)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number and "--resume goes on" in out
        stopped_at = checkpoint.checkpoints(c.out_dir)[-1][0]
        assert stopped_at == log(c)[-1]["step"]  # the step under way was finished and saved
    train(dataclasses.replace(c, resume=True), report=quiet)
    same_state(tmp_path / "whole" / "checkpoint-300", tmp_path / "run" / "checkpoint-300")
    assert [line["step"] for line in log(c)] == list(range(1, 301))
    assert [s for s, _ in checkpoint.checkpoints(c.out_dir)] == [50, 100, 150, 200, 250, 300]


def test_a_signal_in_process_is_raised_as_stopped(tiny):
    steps = []

    def report(tokens):
        steps.append(tokens)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        train(tiny, report=report)
    # it came between two steps: the next one is finished
    assert [s for s, _ in checkpoint.checkpoints(tiny.out_dir)] == [6]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_passing_checkpoints_go_when_a_newer_one_is_complete(tiny):
    c = dataclasses.replace(tiny, save_every_seconds=1, save_at_tokens=[2 * STEP])
    train(c, report=lambda tokens: time.sleep(0.2))
    assert [s for s, _ in checkpoint.checkpoints(c.out_dir)] == [2, 20]


def test_checkpoints_asked_for_are_kept_and_added_levels_are_trained_again(tiny, tmp_path):
    train(dataclasses.replace(tiny, rows=None, max_tokens=10 * STEP, decay_steps=0,
                              save_at_tokens=[4 * STEP, 8 * STEP]), report=quiet)
    before = digests(tiny.out_dir)
    train(dataclasses.replace(tiny, rows=None, resume=True, decay_steps=0,
                              save_at_tokens=[4 * STEP, 6 * STEP, 12 * STEP]), report=quiet)
    assert [s for s, _ in checkpoint.checkpoints(tiny.out_dir)] == [4, 6, 8, 10, 12, 20]
    after = digests(tiny.out_dir)
    assert all(after[p] == d for p, d in before.items() if p.parts[0].startswith("checkpoint"))
    assert [line["step"] for line in log(tiny)] == list(range(1, 21))


def test_a_branch_with_another_batch_size_is_resumed_where_it_stopped(tiny, tmp_path):
    train(dataclasses.replace(tiny, rows=None, max_tokens=14 * STEP, decay_steps=0), report=quiet)
    branch = dataclasses.replace(tiny, out_dir=str(tmp_path / "branch"), rows=None, branch=True,
                                 decay_steps=0, init_from=str(tmp_path / "run" / "checkpoint-14"),
                                 tokens_per_step=2 * STEP, save_at_tokens=[40 * STEP])
    train(dataclasses.replace(branch, max_tokens=50 * STEP), report=quiet)
    assert [s for s, _ in checkpoint.checkpoints(branch.out_dir)] == [14 + 13, 14 + 18]
    steps = []
    train(dataclasses.replace(branch, max_tokens=60 * STEP, resume=True), report=steps.append)
    assert steps == 5 * [2 * STEP]  # nothing is trained again


def test_a_damaged_log_does_not_stop_a_resume(tiny):
    train(dataclasses.replace(tiny, rows=None, max_tokens=10 * STEP), report=quiet)
    path = os.path.join(tiny.out_dir, "log.jsonl")
    with open(path, "a") as f:
        f.write("\0\0\0\n")
    train(dataclasses.replace(tiny, rows=None, resume=True), report=quiet)
    assert [line["step"] for line in log(tiny)] == list(range(1, 21))


def test_a_finished_run_is_not_run_again_and_its_row_comes_once(tiny):
    row = train(tiny, report=quiet)
    before = digests(tiny.out_dir)
    assert train(dataclasses.replace(tiny, resume=True), report=quiet) == row
    assert digests(tiny.out_dir) == before
    train_module.append_row(tiny.rows, row)
    assert len(open(tiny.rows).readlines()) == 1


@pytest.mark.parametrize("key, value", [("learning_rate", 1e-3), ("warmup_steps", 4), ("decay_steps", 5),
                                        ("max_tokens", 21 * STEP), ("eval_tokens", 512),
                                        ("weight_decay", 0.2), ("seed", 1), ("tokens_per_step", 2 * STEP)])
def test_a_finished_run_does_not_pass_for_one_of_other_settings(tiny, key, value):
    train(tiny, report=quiet)
    with pytest.raises(ConfigError, match="row.json.*in this finished run.*is asked for"):
        train(dataclasses.replace(tiny, resume=True, **{key: value}), report=quiet)


# ---------------------------------------------------------------------------------------------------------
# Bad input

def test_bad_settings_are_said_in_one_line(tiny, tmp_path):
    def fails(message, **changes):
        with pytest.raises(ConfigError, match=message) as error:
            train(dataclasses.replace(tiny, **changes), report=quiet)
        assert "\n" not in str(error.value)
    fails("prepare.py", dataset=str(tmp_path / "nothing"))
    fails("multiple of max_seq_len", tokens_per_step=100)
    fails("hidden_size", num_attention_heads=3)
    fails("num_experts_per_tok", num_local_experts=1)
    fails("no such checkpoint", init_from=str(tmp_path / "nothing"))
    fails("eval_tokens = 5 is less than one sequence", eval_tokens=5)
    fails("--branch needs a checkpoint", branch=True)
    fails("cannot be written", rows="/proc/nothing/rows.jsonl")
    (tmp_path / "file").write_text("")
    fails("cannot be written", out_dir=str(tmp_path / "file"))
    fails("no GPU", device="cuda") if not torch.cuda.is_available() else None
    fails("too few tokens", max_seq_len=10**6, tokens_per_step=10**6)
    train(tiny, report=quiet)
    fails("holds a run already; --resume")
    last = os.path.join(tiny.out_dir, "checkpoint-20")
    other = {"out_dir": str(tmp_path / "other")}
    fails("num_hidden_layers is 2 there, 5 is asked", init_from=last, num_hidden_layers=5, **other)
    fails("was trained with max_seq_len = 16", init_from=last, max_seq_len=8, **other)
    fails("takes at most 16 tokens a sequence", init_from=last, max_seq_len=32, **other)
    fails("leaves nothing to train", init_from=last, branch=True, max_tokens=20 * STEP, **other)
    os.remove(os.path.join(last, "optimizer.moments"))
    fails("no optimizer.moments", init_from=last, branch=True, **other)
    os.remove(os.path.join(last, "trainer_state.json"))  # a model from elsewhere
    fails("how many tokens .* is not recorded.*--rows=none", init_from=last, **other)
    assert train(dataclasses.replace(tiny, init_from=last, rows=None, **other), report=quiet) is None
    # What starts from there does not know it either, and no upcycling takes its own tokens for D1.
    next_ = os.path.join(other["out_dir"], "checkpoint-20")
    fails("how many tokens .* is not recorded", init_from=next_, out_dir=str(tmp_path / "third"))
    options = Options(next_, str(tmp_path / "moe"), num_local_experts=4, num_experts_per_tok=2, check=False)
    assert upcycle(options)["D1"] is None
    fails("--resume wants no --init_from", init_from=next_, resume=True, rows=None, **other)


def test_a_model_of_another_tool_has_a_row_with_its_D1(tiny, tmp_path, capsys):
    """D counts the tokens that --D1 says, also in a branch, and flops are those of all D tokens."""
    train(dataclasses.replace(tiny, rows=None), report=quiet)
    last = os.path.join(tiny.out_dir, "checkpoint-20")
    os.remove(os.path.join(last, "trainer_state.json"))
    c = dataclasses.replace(tiny, init_from=last, D1=1000, out_dir=str(tmp_path / "other"))
    row = train(c, report=quiet)
    assert row["D"] == 1000 + 20 * STEP and row["tokens_before_schedule"] == 1000
    stopped = dataclasses.replace(c, out_dir=str(tmp_path / "stopped"), max_tokens=30 * STEP, rows=None,
                                  decay_start=16, decay_steps=4)
    train(dataclasses.replace(stopped, max_tokens=10 * STEP), report=quiet)
    train(dataclasses.replace(stopped, resume=True), report=quiet)
    history = checkpoint.read_state(f"{stopped.out_dir}/checkpoint-30")["history"]
    assert [tokens for _, tokens in history] == [1000, 30 * STEP]  # the run went on under its name
    assert row["flops"] == row["D"] * flops_per_token(checkpoint.read_config(last), 16)
    c = dataclasses.replace(c, init_from=str(tmp_path / "other" / "checkpoint-20"), branch=True,
                            max_tokens=22 * STEP, out_dir=str(tmp_path / "branch"))
    assert train(c)["D"] == 1000 + 22 * STEP
    assert "the branch starts at step 20, its decay was to start at 16" in capsys.readouterr().out


def test_bits_a_byte_are_those_of_the_validation_text(tiny, capsys):
    """Bits of the whole text, from the loss a token, over its bytes; none where meta.json has no bytes."""
    c = dataclasses.replace(tiny, eval_every_steps=10)
    train(c, report=None)
    row, meta = json.load(open(os.path.join(c.out_dir, "row.json"))), load_tokens(c.dataset, "val")[1]
    assert meta["tokens"]["val"] > meta["bytes"]["val"]  # each document has an end-of-text
    bits = row["loss"] * meta["tokens"]["val"] / math.log(2) / meta["bytes"]["val"]
    assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    assert f"{row['loss']:.4f} nats a token ({bits:.4f} bits a byte)" in capsys.readouterr().out
    line = log(c)[-1]
    assert line["val_loss"] == row["loss"] and line["val_bits_per_byte"] == row["bits_per_byte"]
    assert bits_per_byte(1.0, {"tokens": {"val": 7}}) is None


def test_a_checkpoint_has_the_card_the_tokenizer_and_the_ids_of_what_it_started_from(tiny, tmp_path):
    """Files come from init_from first. The card tells of the run, once, also where it was resumed."""
    train(dataclasses.replace(tiny, save_at_tokens=[]), report=quiet)
    dense, start = Path(tiny.out_dir) / "checkpoint-20", tmp_path / "start"
    config = json.loads((dense / "config.json").read_text())
    ids = {"bos_token_id": 5, "eos_token_id": [256, 7], "pad_token_id": 6}
    (dense / "config.json").write_text(json.dumps(config | ids))
    files = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}", "generation_config.json": b"[\xff]"}
    for name, content in files.items():
        (dense / name).write_bytes(content)
    upcycle(Options(str(dense), str(start), num_local_experts=4))
    data = tmp_path / "data"
    shutil.copytree(tiny.dataset, data)
    (data / "tokenizer.json").write_text("[]")
    (data / "tokenizer_config.json").write_text("{}")
    (data / "README.md").write_text("of the data")
    c = dataclasses.replace(tiny, dataset=str(data), init_from=str(start), out_dir=str(tmp_path / "moe"),
                            save_at_tokens=[8 * STEP, 12 * STEP], learning_rate=1e-3)
    row, card = train(c, report=quiet), (start / "README.md").read_text()
    said = (f"\nOn data of sha256 `{load_tokens(data, 'val')[1]['data_sha256']}` the model was trained up to "
            "{:,} tokens in all.{}\n")
    last = card + said.format(20 * STEP, f" Its validation loss is {row['loss']:.4f} nats a token "
                                         f"({row['bits_per_byte']:.4f} bits a byte).")

    def check(step, text):
        path = Path(c.out_dir) / f"checkpoint-{step}"
        assert (path / "README.md").read_text() == text
        assert {name: (path / name).read_bytes() for name in files} == files
        assert (path / "tokenizer_config.json").read_text() == "{}"
        assert ids.items() <= json.loads((path / "config.json").read_text()).items()
    check(8, card + said.format(8 * STEP, ""))
    check(20, last)
    for step in (12, 20):
        shutil.rmtree(Path(c.out_dir) / f"checkpoint-{step}")
    os.remove(Path(c.out_dir) / "row.json")
    shutil.rmtree(start)  # a resumed run needs it no more
    train(dataclasses.replace(c, resume=True), report=quiet)
    check(12, card + said.format(12 * STEP, ""))
    check(20, last)
    branch = dataclasses.replace(c, init_from=str(Path(c.out_dir) / "checkpoint-12"), branch=True, rows=None,
                                 out_dir=str(tmp_path / "branch"), save_at_tokens=[])
    train(branch, report=quiet)  # a run of a run on the same data has its own number in this line
    text = (Path(branch.out_dir) / "checkpoint-20" / "README.md").read_text()
    assert text == card + said.format(20 * STEP, "")


def test_what_is_given_is_checked_against_the_checkpoint_even_if_it_is_the_default(tiny, tmp_path):
    train(dataclasses.replace(tiny, rows=None), report=quiet)
    argv = ["--init_from=" + os.path.join(tiny.out_dir, "checkpoint-20"), f"--dataset={tiny.dataset}",
            f"--out_dir={tmp_path / 'other'}", "--rows=none",
            "--max_seq_len=16", f"--tokens_per_step={STEP}", f"--max_tokens={2 * STEP}", "--eval_tokens=64"]
    for key, asked, there in (("hidden_size", 64, 16), ("num_hidden_layers", 4, 2),
                              ("num_local_experts", 4, 0)):
        with pytest.raises(ConfigError, match=f"{key} is {there} there, {asked} is asked for"):
            train(parse(Train, [*argv, f"--{key}={asked}"]), report=quiet)
    with open(tmp_path / "c.py", "w") as f:
        f.write("intermediate_size = 176\n")
    with pytest.raises(ConfigError, match="intermediate_size is 32 there, 176 is asked for"):
        train(parse(Train, [str(tmp_path / "c.py"), *argv]), report=quiet)
    assert train(parse(Train, [*argv, "--hidden_size=16", "--num_key_value_heads=none"]),
                 report=quiet) is None


def test_the_balance_coefficient_is_the_given_one_or_that_of_the_checkpoint(tiny, tmp_path):
    train(moe(tiny, rows=None, router_aux_loss_coef=0.1, decay_steps=0), report=quiet)
    branch = moe(tiny, out_dir=str(tmp_path / "a"), init_from=os.path.join(tiny.out_dir, "checkpoint-20"),
                 branch=True, max_tokens=24 * STEP)
    assert train(branch, report=quiet)["router_aux_loss_coef"] == 0.1
    assert train(dataclasses.replace(branch, out_dir=str(tmp_path / "b"), router_aux_loss_coef=0.2),
                 report=quiet)["router_aux_loss_coef"] == 0.2
    assert checkpoint.read_config(str(tmp_path / "b" / "checkpoint-24")).router_aux_loss_coef == 0.2


def test_other_data_under_the_same_name_is_noticed_on_resume(tiny, tmp_path):
    import shutil
    copy = str(tmp_path / "tokens")
    shutil.copytree(tiny.dataset, copy)
    c = dataclasses.replace(tiny, dataset=copy, max_tokens=4 * STEP, rows=None)
    train(c, report=quiet)
    meta = json.load(open(os.path.join(copy, "meta.json")))
    json.dump(meta | {"data_sha256": "0" * 64}, open(os.path.join(copy, "meta.json"), "w"))
    with pytest.raises(ConfigError, match="other data"):
        train(dataclasses.replace(c, resume=True, max_tokens=8 * STEP), report=quiet)


def test_two_trainers_never_share_a_directory(tiny):
    import fcntl
    os.makedirs(tiny.out_dir)
    with open(os.path.join(tiny.out_dir, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            train(tiny, report=quiet)
    train(dataclasses.replace(tiny, max_tokens=STEP, warmup_steps=0), report=quiet)


def test_command_line_says_errors_in_one_line():
    result = subprocess.run([sys.executable, "train.py", "--hiden_size=3"], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "did you mean 'hidden_size'" in result.stderr


def test_sample_prints_text_of_the_model(tiny, capsys):
    import sample
    train(dataclasses.replace(tiny, max_tokens=4 * STEP, rows=None), report=quiet)
    options = sample.Sample(checkpoint=tiny.out_dir, prompt="def ", max_new_tokens=30, temperature=0)
    sample.main(options)
    first = capsys.readouterr().out
    assert first.startswith("def ") and len(first) > 4
    model = checkpoint.load_model(os.path.join(tiny.out_dir, "checkpoint-4"))
    ids = list(b"def ")
    for token in sample.generate(model, ids, options, None):
        assert token == model(torch.tensor([ids[-16:]]))[0, -1].argmax().item()  # greedy, over the window
        ids.append(token)
