"""The benchmarks: contestants do the same work, the limit is what it says, ratios are what the rows give."""
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import bench_scale
import bench_train
from bench import laws, watched
from bench_train import (alternate, contestants, growth, model_config, products_alone, race, random_batch,
                         ratios, report_races, stages)
from configurator import ConfigError, parse
from data.prepare import Options as Prepare
from model import ModelConfig, flops_per_token, parameter_counts
from sweep import Study
from test_train import data  # noqa: F401  (a fixture)
from train import Train


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_contestants_have_models_of_one_size_and_losses_of_fresh_models(family):
    """A model that knows nothing gives ln V nats a token; Mixtral adds its balance loss, k when balanced."""
    c = model_config(32, family)
    counts, batch = parameter_counts(c), random_batch(c, tokens=256)
    for name, make in contestants(family).items():
        model, loss = make(c)
        own = sum(p.numel() for p in model.parameters())
        assert own == counts["total"] or name == "GPT-2-like" and abs(own / counts["total"] - 1) < 0.2, name
        with torch.no_grad():
            assert loss(model, *batch).item() == pytest.approx(5.549, abs=0.08), name


@pytest.mark.parametrize("family", ["dense", "moe"])
def test_the_products_alone_are_the_flops_of_a_step_without_attention(family):
    from torch.utils.flop_counter import FlopCounterMode
    c = model_config(32, family)
    with FlopCounterMode(display=False) as counter:
        products_alone(c, "float32")()
    router = 6 * c.num_hidden_layers * c.num_local_experts * c.hidden_size
    assert counter.get_total_flops() == bench_train.TOKENS * (flops_per_token(c, 0) - router)


def test_a_race_measures_each_contestant_and_the_stages_sum_to_the_step():
    options = SimpleNamespace(repeats=1, clock="cpu", backends=[])
    rows = race("dense", 32, "float32", "eager", options)
    assert [row["name"] for row in rows] == ["ours", "Llama", "GPT-2-like", "products alone"]
    assert all(row["tokens_per_s"] > 0 and row["peak_mb"] > 0 for row in rows) and rows[0]["peak_mb"] > 1
    assert rows[0]["flops_per_s"] == pytest.approx(
        rows[0]["tokens_per_s"] * flops_per_token(model_config(32, "dense"), bench_train.SEQUENCE))
    shared = ["embedding", "norms", "q k v and RoPE", "attention", "output", "head and loss"]
    for family, dtype, own in (("dense", "bfloat16", ["MLP"]),
                               ("moe", "float32", ["router", "dispatch", "experts"])):
        parts = stages(family, 32, dtype, SimpleNamespace(repeats=3, clock="cpu"))
        both = [f"{stage}, {way}" for stage in shared + own for way in ("forward", "backward")]
        assert sorted(parts) == sorted([*both, "optimizer", "whole step"])
        assert all(t > 0 for name, t in parts.items() if "dispatch" not in name)
        # Each is measured alone, so that they add up to the step is no identity.
        assert 0.3 < sum(t for name, t in parts.items() if name != "whole step") / parts["whole step"] < 2


def test_a_peer_that_does_not_run_is_named_and_left_out(monkeypatch, capsys):
    """In races of MoEs in bf16, at a size that compiles fast. To compile Mixtral would take a minute."""
    monkeypatch.setitem(bench_train.SHAPES, 16, (32, 1, 1))
    for mode, backends in (("compiled", ["no such"]), ("eager", ["no such", "grouped_mm"])):
        rows = race("moe", 16, "bfloat16", mode, SimpleNamespace(repeats=1, clock="cpu", backends=backends))
        assert [row["name"] for row in rows] == ["ours", *(f"Mixtral {name}" for name in backends[1:]),
                                                 "products alone"]
        assert all(row["tokens_per_s"] > 0 and row["peak_mb"] > 0 for row in rows)
        assert {(row["family"], row["hidden"], row["dtype"], row["mode"]) for row in rows} == {
            ("moe", 16, "bfloat16", mode)}
        left_out, = capsys.readouterr().out.splitlines()
        assert left_out.startswith(f"Mixtral no such, {mode}, bfloat16, left out: ") and len(left_out) > 60


def test_growth_varies_one_size_at_a_time(monkeypatch):
    """N by hand for D = 16, F = 32: a layer has 4 D² + 3 D F + 2 D, and there is a norm of D more."""
    monkeypatch.setitem(bench_train.SHAPES, 16, (32, 1, 1))
    rows = growth(SimpleNamespace(repeats=1, clock="cpu", sizes=[16, 32]), hidden=16)
    values = {what: [row["value"] for row in rows if row["what"] == what] for what in
              dict.fromkeys(row["what"] for row in rows)}
    assert values == {"hidden size": [16, 32], "experts": [2, 4, 8, 16, 32],
                      "context": [64, 128, 256, 512, 1024], "sequences": [1, 2, 4, 8, 16, 32]}
    small, large = 4 * 16 ** 2 + 3 * 16 * 32 + 3 * 16, 3 * (4 * 32 ** 2 + 3 * 32 * 96 + 2 * 32) + 32
    assert [row["N"] for row in rows] == [small, large] + [small] * 16
    assert [row["tokens"] for row in rows] == [2048] * 12 + [128 * n for n in (1, 2, 4, 8, 16, 32)]
    speeds = [row["tokens_per_s"] for row in rows]
    assert min(speeds) > 0 and speeds[0] > 1.5 * speeds[1]  # three layers of twice the width


@pytest.mark.parametrize("flag, allowed", [
    ("--backends=eager,fast", "eager', 'batched_mm', 'grouped_mm"), ("--sizes=100", "32, 64, 128, 256, 768"),
    ("--modes=lazy", "'eager', 'compiled'"), ("--dtypes=float16", "'float32', 'bfloat16'"),
    ("--families=upcycled", "'dense', 'moe'")])
def test_what_cannot_race_is_refused_in_one_line(flag, allowed):
    with pytest.raises(ConfigError, match=f"is none of '?{allowed}"):
        parse(bench.Options, ["train", flag])
    assert parse(bench.Options, ["train"]).backends == ["eager", "grouped_mm"]


def test_ratios_are_those_of_the_rows(tmp_path, capsys):
    def row(name, speed, family="dense", dtype="float32"):
        return {"threads": 1, "family": family, "dtype": dtype, "mode": "eager", "hidden": 64,
                "name": name, "tokens_per_s": speed, "share_of_products": speed / 400,
                "flops_per_s": speed * 10}
    rows = [row("ours", 110), row("Llama", 50), row("GPT-2-like", 100), row("products alone", 400),
            row("ours", 55, "moe"), row("Mixtral eager", 11, "moe")]
    found = ratios(rows)
    dense, moe = ((1, family, "float32", "eager", 64) for family in ("dense", "moe"))
    assert found[dense] == {"over the fastest peer": pytest.approx(1.1), "share of products": 0.275}
    assert found[moe]["FLOP/s over dense"] == 0.5 and found[moe]["over the fastest peer"] == 5
    # MFU is of bf16 alone: 200 tokens/s of 10 FLOPs on a card of 8,000 FLOP/s.
    rows_bf16 = [row("ours", 200, dtype="bfloat16"), row("products alone", 400, dtype="bfloat16")]
    found = ratios(rows + rows_bf16, peak=8000)
    assert found[1, "dense", "bfloat16", "eager", 64] == {"share of products": 0.5, "MFU": 0.25}
    assert sum("MFU" in ratio for ratio in found.values()) == 1
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"races": [row("ours", 100)]}))
    options = SimpleNamespace(against=str(old), out=str(tmp_path / "new.json"))
    report_races({"races": rows, "stages": {
        "dense 64": {"norms, forward": 1.0, "norms, backward": 3.0, "optimizer": 1.0, "whole step": 6.0}}},
        options, None)
    assert "over the older file 1.10" in capsys.readouterr().out
    assert json.loads((tmp_path / "new.json").read_text())["races"] == rows
    assert (tmp_path / "new.png").read_bytes()[:4] == b"\x89PNG"


def test_medians_are_of_alternating_runs():
    seen = []
    took = alternate({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3, "wall")
    assert seen == ["a", "b"] * 5 and set(took) == {"a", "b"} and min(took.values()) > 0


def test_fits_are_timed_and_failing_commands_are_named(capsys):
    laws(SimpleNamespace(repeats=1))
    times = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    assert times[0][0] == "dense law, 240 rows" and len(times) == 4
    assert all(took.endswith(" ms") and float(took[:-3].replace(",", "")) > 0 for _, took in times)
    with pytest.raises(ConfigError, match="false failed"):
        watched(["/usr/bin/env", "false"])


# ---------------------------------------------------------------------------------------------------------
# Many processes

def test_bytes_sent_are_those_of_rings():
    """By hand: D = 16, F = 32, 2 layers, 2 heads, 50 tokens, tied: matrices 2·(4·16² + 3·16·32)."""
    m = ModelConfig(50, 16, 32, 2, 2, tie_word_embeddings=True)
    matrices, others = 2 * (4 * 16 * 16 + 3 * 16 * 32), 50 * 16 + 5 * 16
    for n in (1, 2, 4, 8):
        share = (n - 1) / n
        assert bench_scale.traffic(m, "ddp", n, True, 3)[0] == 2 * share * 4 * (matrices + others)
        # Each of three passes gathers matrices twice and the rest once, and scatters gradients in fp32.
        assert bench_scale.traffic(m, "fsdp", n, False, 3)[0] == 3 * share * (12 * matrices + 8 * others)
        assert bench_scale.traffic(m, "fsdp", n, True, 3)[0] == 3 * share * (8 * matrices + 8 * others)
    assert [bench_scale.traffic(m, "ddp", n, False, 1)[1] for n in (1, 2, 8, 9)] == [0, 2, 6, 8]
    assert bench_scale.traffic(m, "fsdp", 8, False, 1)[1] == 3 * (3 * 2 + 2)


def test_the_two_constants_of_a_step_are_found():
    rows = [{"work": w, "communication": c, "seconds": 2.5 * w + 0.7 * c}
            for w, c in ((1, 0), (1, 2), (0.5, 3))]
    assert bench_scale.fit(rows) == pytest.approx((2.5, 0.7, 0), abs=1e-9)
    options = SimpleNamespace(model="config/dense_150m.py", gpus=[1, 8, 1000], flops_per_gpu=1e14,
                              bandwidth=1e10, latency=0.0)
    alone, eight, *fsdp = bench_scale.estimates(options, 2.0, 0.5)
    assert len(fsdp) == 2  # 512 sequences do not divide among 1000
    m = ModelConfig(50257, 768, 2048, 16, 12, tie_word_embeddings=True)
    work = 2 ** 19 * flops_per_token(m, 1024) / 1e14
    assert alone["seconds"] == pytest.approx(2 * work) and alone["communication"] == 0
    sent = 2 * 7 / 8 * 4 * parameter_counts(m)["total"]
    assert eight["seconds"] == pytest.approx(2 * work / 8 + 0.5 * sent / 1e10)


def test_two_processes_send_what_is_counted(data, tmp_path):  # noqa: F811
    """As the loopback device counts it; its other traffic and headers come on top."""
    hidden = 256
    intermediate, layers, heads = bench_train.SHAPES[hidden]
    c = Train(out_dir=str(tmp_path / "run"), rows=None, dataset=data, hidden_size=hidden,
              intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
              max_seq_len=16, tokens_per_step=32, max_tokens=32 * 20, warmup_steps=1, save_every_seconds=0,
              compile=False, dtype="float32")
    seconds, sent = bench_scale.measure(c, 2)
    counted = bench_scale.traffic(model_config(hidden, "dense"), "ddp", 2, False, 1, gloo=True)[0]
    assert seconds > 0 and 0.9 * counted < sent < 1.5 * counted


def test_one_process_is_measured_with_ddp_and_with_fsdp(data, tmp_path):  # noqa: F811
    (tmp_path / "data").symlink_to(data)
    options = SimpleNamespace(families=["dense"], sizes=[32], processes=[1], repeats=3)
    rows = bench_scale.races(options, str(tmp_path))
    assert [(row["parallel"], row["processes"]) for row in rows] == [("ddp", 1), ("fsdp", 1)]
    assert all(row["bytes_counted"] == row["communication"] == 0 < row["tokens_per_s"] for row in rows)


def test_the_benchmark_of_gpus_leaves_all_that_it_ran_in_one_file(tmp_path, monkeypatch):
    """On a card that is made up, with commands that only write their files. The tests fail there."""
    made, root = [], bench.HERE
    row = json.loads(open(f"{root}/results/study_quick.jsonl").readline())

    def ran(words, cwd, **options):
        if words[0] == "git":
            return true_run(words, cwd=cwd, **options)
        made.append(words[1:])
        given = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
        for path, content in ((given.get("out"), {"races": []}),
                              (given.get("out_dir") and f"{given['out_dir']}/rows.jsonl", row)):
            if path:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w") as f:
                    f.write(json.dumps(content) + "\n")
        return SimpleNamespace(returncode=int("pytest" in words), stdout="a" * 20_000, stderr="the end")
    true_run = bench.subprocess.run
    monkeypatch.chdir(root)
    monkeypatch.setattr(bench.subprocess, "run", ran)
    monkeypatch.setattr(bench, "HERE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made Up 9000")
    (tmp_path / "results").mkdir()
    bench.main(SimpleNamespace(what="gpu", out=""))
    found = json.loads((tmp_path / "results" / "gpu_Made_Up_9000.json").read_text())
    assert (found["card"], found["cards"], found["torch"]) == ("Made Up 9000", 2, torch.__version__)
    assert {name: found[name]["status"] for name in ("data", "tests", "train", "study")} == {
        "data": 0, "tests": 1, "train": 0, "study": 0}
    assert found["tests"]["output"] == ("a" * 20_000 + "the end")[-10_000:]
    assert found["train"]["numbers"] == {"races": []} and len(found["study"]["rows"]) == 1
    assert all(found["study"]["rows"][0][key] == row[key] for key in ("family", "N", "D", "loss", "trunk"))
    kinds = {"data/prepare.py": Prepare, "bench.py": bench.Options, "sweep.py": Study}
    for script, *words in made:  # commands that exist
        assert script == "-m" and os.path.exists(words[-1]) or parse(kinds[script], words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the benchmark would run")
def test_the_benchmark_of_gpus_says_where_there_is_none():
    with pytest.raises(ConfigError, match="torch sees no GPU here"):
        bench.main(SimpleNamespace(what="gpu", out=""))


def test_a_race_without_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install -r requirements-test.txt"):
        bench_train.train(parse(bench.Options, ["train"]))
