"""A pilot in miniature: on a checkpoint of ours, and on one that transformers made."""
import contextlib
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import fit_laws
import mixture
import pilot
import plan
import uncertainty
from configurator import ConfigError, parse
from data.stream import load_tokens
from laws import short
from model import Transformer
from rows import FAMILIES, read_rows, run_key
from sweep import Study, check_unchanged, planned_rows, study_jobs
from test_families import build
from test_sweep import ROOT
from test_train import data, tiny  # noqa: F401  (fixtures)
from train import train

LAW = "upcycled.head_start"
STEP = 128  # tokens
BUDGET = 640 * STEP  # its shares 1/64 .. 1/4 are 10 .. 160 steps

MINI = """
D_moe = [10 * 128, 20 * 128, 40 * 128, 80 * 128]
D2 = [10 * 128, 20 * 128]
D_dense = [10 * 128, 20 * 128]
num_local_experts = 4
train = {"dataset": "none", "tokens_per_step": 128, "max_seq_len": 16, "warmup_steps": 3, "eval_tokens": 1024}
"""


@pytest.fixture
def mini(tmp_path):
    path = tmp_path / "mini.py"
    path.write_text(MINI)
    return path


@pytest.fixture
def ours(tiny):  # noqa: F811
    """A dense checkpoint of train.py after 20 steps."""
    train(dataclasses.replace(tiny, trunk="first", rows=None), report=lambda tokens: None)
    return os.path.join(tiny.out_dir, "checkpoint-20")


@pytest.fixture
def qwen3(tmp_path):
    """A Qwen3 of transformers whose heads are wider than hidden_size / heads."""
    build(tmp_path / "qwen3", "qwen3", vocab_size=300, head_dim=16)
    return str(tmp_path / "qwen3")


def flags(mini, dense, data, *more):  # noqa: F811
    return [str(mini), f"--out_dir={mini.parent / 'out'}", f"--dense={dense}", f"--dataset={data}",
            f"--budget={BUDGET}", *more]


def finished(mini, dense, data, *more):  # noqa: F811
    """({family: its rows in the order of their tokens}, the output) of the command."""
    words = [sys.executable, "sweep.py", *flags(mini, dense, data, *more), "--workers=1"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    path = mini.parent / "out" / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(read_rows([str(path)])[0]) == len(rows)
    rows.sort(key=lambda row: row.get("D2", row.get("D")))
    return {f: [row for row in rows if row["family"] == f] for f in FAMILIES}, result.stdout


def check_rows(found, D1):
    assert [row["D"] for row in found["dense"]] == [D1 + 10 * STEP, D1 + 20 * STEP]
    assert [row["D"] for row in found["moe"]] == [10 * STEP, 20 * STEP, 40 * STEP, 80 * STEP]
    assert [(row["D1"], row["D2"]) for row in found["upcycled"]] == [(D1, 10 * STEP), (D1, 20 * STEP)]
    rows = sum(found.values(), [])
    assert len({row["N"] for row in rows}) == len({row["data_sha256"] for row in rows}) == 1
    assert [row["tokens_before_schedule"] for row in rows] == [D1] * 2 + [0] * 6
    assert {row["method"] for row in found["upcycled"]} == {"copy"}
    assert all(row["num_local_experts"] == 4 for row in found["moe"] + found["upcycled"])
    return rows


def test_a_checkpoint_of_ours_is_continued_upcycled_and_matched_from_scratch(mini, ours, data):  # noqa: F811
    found, said = finished(mini, ours, data)
    rows = check_rows(found, D1=20 * STEP)
    # By hand: D = 16, F = 32, L = 2, H = 2 of 8; 6 FLOPs for each weight of a product, 12·H·8·16 a layer.
    vocab, attention, mlp, router = 257, 2 * 4 * 16 * 16, 2 * 3 * 16 * 32, 2 * 4 * 16
    rest = 6 * (attention + vocab * 16) + 12 * 2 * 2 * 8 * 16
    dense, moe = rest + 6 * mlp, rest + 6 * (2 * mlp + router)
    for row in rows:
        tokens = row.get("D2", row.get("D"))
        assert row["flops"] == tokens * (dense if row["family"] == "dense" else moe)
        assert row["N"] == attention + mlp + 5 * 16
    assert {row["dense_trunk"] for row in found["upcycled"]} == {"first"}
    # In steps: branches of 10, 20, 40, 80 decay over 2, 4, 8, 16; a trunk ends where its last decay starts.
    flops = 128 * (dense * (16 + 6) + moe * (64 + 30) + moe * (16 + 6))
    assert f"costs {flops:.3g} FLOPs, {flops / (moe * BUDGET):.1%} of training the MoE on {BUDGET:,}" in said
    # The checkpoint's weights are used.
    assert max(found[f][0]["loss"] for f in ("dense", "upcycled")) < found["moe"][0]["loss"]
    meta = load_tokens(data, "val")[1]
    for row in rows:
        nats = row["loss"] * meta["tokens"]["val"]
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / meta["bytes"]["val"], rel=1e-12)
    best = min(row["loss"] for row in found["moe"])
    assert f"moe: lowest loss {best:.4f} nats a token (" in said
    assert all(job.done for job in study_jobs(parse(Study, flags(mini, ours, data))))
    check_answers(mini.parent / "out" / "rows.jsonl", found, ours, N=attention + mlp + 5 * 16, flops=moe)


def check_answers(path, found, checkpoint, N, flops):
    """The rows of the pilot are fitted, and the planner answers for its checkpoint, by the two commands."""
    laws, D1, tokens = path.parent / "laws", 20 * STEP, 80 * STEP
    fit_laws.main(fit_laws.Options(rows=[str(path)], out=str(laws), laws=[LAW], draws=20))

    def answer(tokens, **more):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            plan.main(plan.Options(laws=str(laws / "laws.json"), checkpoint=checkpoint, tokens=tokens,
                                   json=True, **more))
        return json.loads(said.getvalue())
    result = answer(tokens)
    assert (result["N"], result["D1"]) == (N, D1) and result["flops"] == tokens * flops
    assert result["verdict"] in ("clear", "mixed")
    for option in (plan.SCRATCH, plan.DENSE, plan.UPCYCLE):
        low, high = result["options"][option]["interval"]
        assert low < result["options"][option]["loss"] < high
    # Where there are rows, the answer is near them.
    near = result["options"][plan.SCRATCH]["loss"], answer(20 * STEP)["options"][plan.UPCYCLE]["loss"]
    assert near == pytest.approx([found[f][-1]["loss"] for f in ("moe", "upcycled")], rel=0.02)
    # A pilot says nothing of another checkpoint. A rounded N or D1 is no other one.
    assert answer(tokens, D1=0.96 * D1)["verdict"] != "void"
    other = answer(tokens, D1=0.93 * D1)
    assert other["verdict"] == "void" and other["options"] == {} and "D1 = 2.38k is 1.08" in other["says"]
    content, book = mixture.read_laws(str(laws / "laws.json"))
    question = plan.ask(plan.Options(checkpoint=checkpoint, tokens=tokens), content, book)
    for factor, void in ((1.04, False), (1.07, True), (0.93, True)):
        other = plan.answer_now(book, question | {"N": factor * N})
        assert (other["verdict"] == "void") == void == ("N = " in other["says"])


def test_what_was_planned_is_what_is_made_for_another_family(mini, qwen3, data):  # noqa: F811
    study = parse(Study, flags(mini, qwen3, data, "--D1=5000"))
    planned = planned_rows(study)
    rows = check_rows(finished(mini, qwen3, data, "--D1=5000")[0], D1=5000)
    assert {run_key(row) for row in rows} == {run_key(row) for row in planned}
    for job in study_jobs(study):
        check_unchanged(job)
    os.symlink(qwen3, mini.parent / "twin")  # the same checkpoint by another name, and then another one
    twin = [parse(Study, flags(mini, mini.parent / "twin", data, "--D1=5000")) for _ in range(2)]
    check_unchanged(study_jobs(twin[0])[0])
    os.remove(mini.parent / "twin")
    build(mini.parent / "twin", "qwen3", vocab_size=300, head_dim=16)
    with pytest.raises(ConfigError, match="began from .*qwen3, the study now says .*twin"):
        check_unchanged(study_jobs(twin[1])[0])
    # By hand: hidden 32, F 64, 2 layers, 4 heads and 2 of keys and values of 16, two norms of 16 a layer.
    attention, mlp = 2 * 32 * 16 * 2 * (4 + 2), 2 * 3 * 32 * 64
    assert {row["N"] for row in rows} == {attention + mlp + 2 * (2 * 32 + 2 * 16) + 32}
    moe = 6 * (attention + 2 * mlp + 2 * 4 * 32 + 300 * 32) + 12 * 2 * 4 * 16 * 16
    for row in rows:
        if row["family"] != "dense":
            assert row["flops"] == moe * row.get("D2", row.get("D"))
            last = checkpoint.checkpoints(os.path.dirname(row["config"]))[-1][1]
            assert json.load(open(os.path.join(last, "config.json")))["model_type"] == "qwen3_moe"
    # What starts from scratch has no weight of the checkpoint, but its shapes.
    start = Path(study.out_dir) / next(row["trunk"] for row in rows if row["family"] == "moe") / "start"
    fresh, dense = checkpoint.load_model(start), checkpoint.load_model(qwen3)
    expected = Transformer(fresh.config).init_weights(0)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), expected.parameters()))
    assert fresh.layers[0].self_attn.qkv_proj.weight.shape == dense.layers[0].self_attn.qkv_proj.weight.shape
    changed = parse(Study, flags(mini, qwen3, data, "--D1=6000"))
    with pytest.raises(ConfigError, match="D was 6280, the study now says 7280"):
        check_unchanged(next(job for job in study_jobs(changed) if not job.is_trunk))


def test_levels_are_shares_of_the_budget(mini, ours, data):  # noqa: F811
    mini.write_text(MINI[MINI.index("num_local"):])
    for budget in (BUDGET, BUDGET - 40):  # a share that is no whole step is rounded up
        rows = planned_rows(parse(Study, flags(mini, ours, data) + [f"--budget={budget}"]))
        assert [row["D"] / STEP for row in rows if row["family"] == "moe"] == [10, 20, 40, 80, 160]
        assert [row["D2"] / STEP for row in rows if row["family"] == "upcycled"] == [40, 80]
        assert [row["D"] / STEP for row in rows if row["family"] == "dense"] == [20 + 40, 20 + 80]


def test_what_no_pilot_can_start_from_is_refused_by_name(mini, ours, qwen3, data, tmp_path):  # noqa: F811
    def fails(words, dense, *more, budget=True):
        with pytest.raises(ConfigError, match=words) as error:
            given = [f for f in flags(mini, dense, data, *more) if budget or "budget" not in f]
            study_jobs(parse(Study, given))
        assert "\n" not in str(error.value)
    fails("give --D1=TOKENS", qwen3)
    fails("has seen 2,560 tokens, so leave D1 out", ours, "--D1=5000")
    fails("give --D1=TOKENS", qwen3, "--D1=5000,6000")
    fails("--budget is missing", ours, budget=False)
    fails("no such checkpoint", str(tmp_path / "none"))
    fails("levels .* exceed", ours, "--D2=128,1280")
    fails("hidden_size is 16 there, 32 is asked for", ours, "--train={'hidden_size': 32}")
    fails("init_from is set by the study", ours, "--train={'init_from': 'x'}")
    fails("num_experts_per_tok 2", ours, "--num_local_experts=1")
    # A mixture is no dense checkpoint.
    jobs = study_jobs(parse(Study, flags(mini, ours, data)))
    fresh = next(job.upcycling for job in jobs if job.row["family"] == "moe" and job.upcycling)
    pilot.write_fresh(fresh)
    fails("is a mixture of experts already", fresh.destination)
    # The vocabulary of the data is larger than that of the model.
    build(tmp_path / "small", "qwen3")
    fails("vocab_size is 61, .* has 257", str(tmp_path / "small"), "--D1=5000")
    # The checkpoint has a tokenizer, and the data are of another one.
    state = Path(ours) / "trainer_state.json"
    said = json.loads(state.read_text())
    state.write_text(json.dumps(said | {"tokenizer": "gpt2"}))
    fails("its tokens are not those of", ours)
    (Path(qwen3) / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    fails("its tokens are not those of", qwen3, "--D1=5000")


def test_one_tokenizer_in_two_files_is_the_same_by_its_vocabulary(mini, qwen3, data, tmp_path, capsys):  # noqa: F811
    (tmp_path / "data").mkdir()
    for name in os.listdir(data):
        if name != "tokenizer.json":
            os.symlink(os.path.join(data, name), tmp_path / "data" / name)
    there, here = Path(qwen3) / "tokenizer.json", tmp_path / "data" / "tokenizer.json"
    there.write_text('{"model": {"vocab": {"a": 0}}, "padding": {}}')
    here.write_text('{"model": {"vocab": {"a": 0}}, "padding": null}')
    study = parse(Study, flags(mini, qwen3, tmp_path / "data", "--D1=5000"))
    assert len(study_jobs(study)) == 8 + 3
    there.rename(there.parent / "vocab.json")
    assert capsys.readouterr().err == ""
    assert len(study_jobs(study)) == 8 + 3
    assert f"note: {qwen3}: has no tokenizer.json, so nothing says whether" in capsys.readouterr().err
    (there.parent / "vocab.json").rename(there)
    here.write_text('{"model": {"vocab": {"b": 0}}}')
    with pytest.raises(ConfigError, match="its tokens are not those of"):
        study_jobs(study)


# ---------------------------------------------------------------------------------------------------------
# The answers of pilots against the truth, from rows of studies

def answered(rows, tokens):
    """What the planner says of a budget of MoE tokens by a pilot's rows."""
    (law, (system, chosen)), = fit_laws.plan_fits(rows, [LAW])[0].items()
    options = fit_laws.Options(rows=[], laws=[law], draws=100)
    ranges = {family: {name: [extreme(row[name] for row in members) for extreme in (min, max)]
                       for name in FAMILIES[family]}
              for family, members in fit_laws.families_of(rows).items()}
    content = {"version": 2, "laws": fit_laws.entries_of([law], system, chosen, options, lambda n: None)[0],
               "ranges": ranges, "models": fit_laws.models(rows)}
    book = mixture.make_book("laws.json", content)
    who = {name: rows[-1][name] for name in ("N", "D1")}
    return plan.answer_now(book, plan.ask(plan.Options(tokens=tokens, **who), content, book))


def pilots(rows, budget, D2, D):
    """The lines of a table: pilots on the dense checkpoints of `rows`, upcycled rows to D2 and a MoE from
    scratch to D, asked for `budget`, where both were measured."""
    for n, d1 in sorted({(row["N"], row["D1"]) for row in rows if "D1" in row}):
        here = [row for row in rows if row["N"] == n and row.get("D1", d1) == d1]
        here.sort(key=lambda row: row["family"])  # an upcycled row is last
        found = answered([row for row in here if row.get("D2", 0) <= D2 and row.get("D", 0) <= D], budget)
        scratch, upcycled = (row["loss"] for row in here if budget == row.get("D2", row.get("D")))
        cells = [short(n), short(d1)]
        for loss, option in ((upcycled, plan.UPCYCLE), (scratch, plan.SCRATCH)):
            said = found["options"][option]
            low, high = said["interval"]
            cells += [f"{100 * math.log(said['loss'] / loss):+.1f}", "yes" if low < loss < high else "no"]
        ahead = plan.UPCYCLE if upcycled < scratch else plan.SCRATCH
        sure = found["options"][found["best"]]["probability_best"]
        cells += [f"{100 * math.log(scratch / upcycled):+.1f}", f"{found['best']}, {sure:.2f}"]
        yield f"| {' | '.join(cells)} | {'right' if found['best'] == ahead else 'wrong'} |"


@pytest.mark.parametrize("study, page, least_D1, tokens, n", [
    ("study_quick.jsonl", "README.md", 0, (2**21, 2**19, 2**20), 12),
    ("study.jsonl", "results/README.md", 2**22, (2**24, 2**21, 2**21), 4)])  # runs of a quarter of the budget
def test_the_table_of_pilots_and_their_truth_is_that_of_the_rows(study, page, least_D1, tokens, n):
    rows = [row for row in read_rows([str(ROOT / "results" / study)])[0]
            if row["family"] != "dense" and row["seed"] == 0 and row["N"] < 1e5
            and row.get("method", "copy") == "copy" and row.get("D1", math.inf) >= least_D1]
    lines = list(pilots(rows, *tokens))
    text = "\n".join(lines)
    assert len(lines) == n and text in (ROOT / page).read_text(), text


def test_a_curve_from_scratch_to_a_quarter_of_the_budget_errs_by_what_the_readme_says():
    """The rows of the larger study: the seeds of a size, each on its own."""
    rows = [row for row in read_rows([str(ROOT / "results" / "study.jsonl")])[0] if row["family"] == "moe"]
    lines = []
    for n in sorted({row["N"] for row in rows if row["D"] == 2**25}):
        cells = [short(n)]
        for budget in (2**23, 2**24, 2**25):
            errors = []
            for seed in {row["seed"] for row in rows if row["N"] == n}:
                here = [row for row in rows if row["N"] == n and row["seed"] == seed]
                known = [row for row in here if row["D"] <= budget / 4]
                fitted = uncertainty.fit_with_noise(known, {"moe": "moe"})
                true = [row for row in here if row["D"] == budget]
                errors += list(fit_laws.errors(fitted, "moe", true))
            cells.append(f"{100 * fit_laws.rms(errors):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines)
    assert text in (ROOT / "README.md").read_text(), text
