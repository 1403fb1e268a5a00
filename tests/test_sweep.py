"""A study in miniature: planned, run, killed, resumed, and the README's two commands."""
import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint
from configurator import ConfigError, parse
from cost import device_bytes, disk_bytes
from rows import method_label, run_key
from sweep import Study, check_unchanged, describe, main, planned_rows, study_jobs, study_totals
from test_train import data, digests  # noqa: F401  (data is a fixture)

ROOT = Path(__file__).resolve().parent.parent

MINI = """
'''The smallest study that has every part.'''
_step = 128
sizes = [{"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
         {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}]
D1 = [10 * _step, 20 * _step, 40 * _step]
D2 = [10 * _step, 20 * _step, 40 * _step]
D_dense = [10 * _step, 20 * _step, 40 * _step]
num_local_experts = 4
train = {"dataset": "DATA", "tokens_per_step": _step, "max_seq_len": 16, "warmup_steps": 3,
         "eval_tokens": 1024}
"""

MINI_ONE = """
_step = 128
sizes = [{"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}]
D1 = [10 * _step, 40 * _step]
D2 = [10 * _step]
D_dense = [10 * _step]
D_moe = [10 * _step]
num_local_experts = 4
train = {"dataset": "DATA", "tokens_per_step": _step, "max_seq_len": 16, "warmup_steps": 3,
         "eval_tokens": 1024}
"""


@pytest.fixture
def mini(data, tmp_path):  # noqa: F811
    path = tmp_path / "mini.py"
    path.write_text(MINI.replace("DATA", data))
    return path


def study(mini, *flags):
    return parse(Study, [str(mini), f"--out_dir={mini.parent / 'out'}", *flags])


def test_plan_shares_trunks_and_counts_what_it_trains(mini):
    s = study(mini)
    jobs, rows = study_jobs(s), planned_rows(s)
    assert len(rows) == 2 * (3 + 3 + 3 * 3)
    assert len({(r["family"], r["N"], r.get("D"), r.get("D1"), r.get("D2")) for r in rows}) == len(rows)
    assert [r["family"] for r in rows].count("upcycled") == 18
    assert len(jobs) - len(rows) == 2 * (1 + 1 + 3)  # trunks
    # By hand, in steps, for one size: the dense trunk goes to 40, its branches decay over 2, 4 and 8; the MoE
    # trunk and each of three upcycled ones go to 32, with the same decays.
    assert study_totals(s)["tokens"] == 2 * 128 * ((40 + 14) + (32 + 14) + 3 * (32 + 14))
    for job in jobs:
        runs = [os.path.normpath(j.settings.out_dir) + os.sep for j in jobs]
        assert job.needs is None or any(os.path.normpath(job.needs).startswith(run) for run in runs)
    for r in rows:
        assert r["N_total"] > r["N_active"] > r["N"] if r["family"] != "dense" else r["N_total"] == r["N"]
    text = describe(s, jobs)
    alone = 2 * 128 * ((10 + 20 + 40) + (10 + 20 + 40) + (3 * 70 + 3 * 70))
    saved = 1 - study_totals(s)["tokens"] / alone
    assert f"save {saved:.0%} of the tokens" in text and "0 of" in text


def test_withheld_rows_and_what_only_they_need_wait_until_they_are_asked_for(mini):
    """The upcycled runs of one size and the longest runs of the other are withheld, by column and value."""
    every, large = study_jobs(study(mini)), max(r["N"] for r in planned_rows(study(mini)))
    mini.write_text(mini.read_text() + f"withheld = [{{'family': 'upcycled', 'N': {large}}},"
                                       f" {{'D': 5120, 'N': {large}}}, {{'D2': [2560, 5120]}}]\n")

    now = study_jobs(study(mini))
    held = [r for r in planned_rows(study(mini, "--train_withheld"))
            if r.get("N") == large and (r["family"] == "upcycled" or r["D"] == 5120) or r.get("D2", 0) > 1280]
    assert len(held) == 9 + 2 + 6 and len(now) < len(every)
    rows = [job.row for job in now if not job.is_trunk]
    assert [r for r in planned_rows(study(mini, "--train_withheld")) if r not in held] == rows
    reach = {job.row["trunk"]: job.settings.max_tokens // 128 for job in now if job.is_trunk}
    small = min(r["N"] for r in rows)
    assert reach.pop(f"dense-N{large}-s0") == reach.pop(f"moe-N{large}-s0") == 16  # 20 steps, a fifth decays
    assert reach.pop(f"dense-N{small}-s0") == 40 and reach.pop(f"moe-N{small}-s0") == 32
    assert set(reach.values()) == {8} and len(reach) == 3 and all("upcycled" in name for name in reach)
    assert sum(job.tokens for job in now) == 128 * ((16 + 2 + 4) * 2 + (40 + 14) + (32 + 14) + 3 * (8 + 2))
    # A family at a time: the dense trunk keeps the checkpoints that upcycling will want.
    scratch = study_jobs(study(mini, "--families=['dense', 'moe']"))
    assert [job for job in now if job.row["family"] != "upcycled"] == scratch
    assert {job.row["family"] for job in study_jobs(study(mini, "--families=['moe']"))} == {"moe"}
    upcycled = study_jobs(study(mini, "--families=['upcycled']"))
    assert [j.row["family"] for j in upcycled].count("dense") == 1 and upcycled[0].is_trunk


def test_a_trunk_is_compiled_alike_in_every_call(mini, monkeypatch):
    """By hand: the large MoE has 6 (2048 + 2·3072 + 128 + 257·16) + 6144 = 80,736 FLOPs a token. Its runs
    from scratch, of 30M tokens, have 2.4e12. With the upcycled runs, which have its shape, they have 4.8e12,
    more than the 4e12 that earn a compilation. No other shape has more than 2.3e12."""
    monkeypatch.setenv("CXX", sys.executable)
    levels = "\n".join(f"{key} = [{30 * 10 ** 6}]" for key in ("D1", "D2", "D_dense", "D_moe"))
    mini.write_text(mini.read_text().replace('"eval_tokens"', '"device": "cpu", "eval_tokens"') + levels)
    assert len({job.row["N"] for job in study_jobs(study(mini))}) == 2
    whole = {job.settings.out_dir: job for job in study_jobs(study(mini))}
    large = max(job.row["N"] for job in whole.values())
    for job in whole.values():
        assert job.settings.compile == (job.row["N"] == large and job.row["family"] != "dense")
    mini.write_text(mini.read_text() + "\nwithheld = [{'family': 'upcycled'}]\n")
    for flags in ([], ["--train_withheld"], ["--families=moe"], ["--families=dense,moe"],
                  ["--train_withheld", "--families=upcycled"]):
        called = study_jobs(study(mini, *flags))
        assert called and all(job.settings.compile == whole[job.settings.out_dir].settings.compile
                              for job in called), flags
    mini.write_text(mini.read_text().replace('"device"', '"compile": False, "device"'))
    assert not any(job.settings.compile for job in study_jobs(study(mini)))


def test_virtual_groups_keep_the_dense_N(mini):
    s = study(mini)
    s.methods = [{"method": "copy"}, {"method": "virtual_groups", "granularity": 2, "num_local_experts": 8,
                                      "num_experts_per_tok": 4}]
    rows = [r for r in planned_rows(s) if r["family"] == "upcycled"]
    assert len(rows) == 36
    assert {r["method"] for r in rows} == {"copy", "virtual_groups"}
    assert len({r["N"] for r in rows}) == 2


@pytest.mark.parametrize("line, message", [("D1 = []", "D1 is empty"), ("D2 = [10, 20]", "warm-up"),
                                           ("decay_fraction = 0.8", "1280 tokens decays before its 3"),
                                           ("decay_fraction = 0.99", "decays before"),
                                           ("withheld = [{}]", "nothing to train"),
                                           ("D1 = [1280, 1281]", "must differ"),
                                           ("sizes = [{'hidden_size': 16, 'hiden': 3}]", "hiden"),
                                           ("decay_fraction = 1.5", "decay_fraction"),
                                           ("methods = [{'method': 'magic'}]", "magic"),
                                           ("seeds = [0, 0]", "two seeds"), ("seeds = []", "seeds is empty"),
                                           ("seeds = [-1]", "at least 0"),
                                           ("workers = 0", "workers"),
                                           ("train = {'schedule': 'cosine'}", "schedule is set by the study"),
                                           ("methods = [{'method': 'copy'}, {'method': 'copy'}]",
                                            "2 runs would be .*-copy: .* two methods are equal"),
                                           ("methods = [{'method': 'copy'}, {'router_std': 0.02}]",
                                            "2 runs would be .*-copy: .* two methods are equal"),
                                           ("families = ['dens']", "'dens' is none of"),
                                           ("withheld = [{'Dl': 1}]", "Dl is no column"),
                                           ("train = {'tokens_per_step': 100}", "multiple of max_seq_len"),
                                           ("trian = {}", "did you mean 'train'")])
def test_bad_studies_are_refused_by_name(mini, line, message):
    mini.write_text(mini.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=message):
        main(study(mini, "--dry_run"))


def command(mini, *flags):
    return [sys.executable, "sweep.py", str(mini), f"--out_dir={mini.parent / 'out'}", *flags]


def test_interrupted_and_killed_sweeps_go_on_to_the_same_rows(mini, tmp_path):
    out, rows = tmp_path / "out", tmp_path / "out" / "rows.jsonl"
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command(mini), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)
        before = len(rows.read_text().splitlines()) if rows.exists() else 0
        while process.poll() is None:
            if rows.exists() and len(rows.read_text().splitlines()) > before + 1:
                break
            time.sleep(0.01)
        process.send_signal(number)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), text
    result = subprocess.run(command(mini), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    key = lambda r: (r["family"], r["N"], r.get("D"), r.get("D1"), r.get("D2"))  # noqa: E731
    expected = {key(r): r for r in planned_rows(study(mini))}
    assert sorted(map(str, map(key, found))) == sorted(map(str, expected))  # each once
    for r in found:
        plan_of = expected[key(r)]
        assert all(r[k] == v for k, v in plan_of.items()), (r, plan_of)
        assert 3 < r["loss"] < 6
    # what was killed is what an uninterrupted sweep gives
    straight = subprocess.run(command(mini, f"--out_dir={tmp_path / 'straight'}", "--workers=1"), cwd=ROOT,
                              capture_output=True, text=True, timeout=300)
    assert straight.returncode == 0, straight.stderr
    losses = {key(r): r["loss"]
              for r in map(json.loads, (tmp_path / "straight" / "rows.jsonl").read_text().splitlines())}
    assert losses == {key(r): r["loss"] for r in found}
    before = digests(out)
    again = subprocess.run(command(mini), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and digests(out) == before  # nothing is done twice


def test_a_failing_run_is_reported_and_the_others_are_made(mini, tmp_path):
    """A trunk whose checkpoint is damaged fails, with its branches; the rest of the study is there."""
    s = study(mini)
    trunk = next(j for j in study_jobs(s) if j.is_trunk).settings.out_dir
    assert subprocess.run(command(mini), cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    os.remove(tmp_path / "out" / "rows.jsonl")
    broken = checkpoint.checkpoints(trunk)[0][1]
    branch = next(j for j in study_jobs(s) if not j.is_trunk and j.needs == broken).settings.out_dir
    import shutil
    shutil.rmtree(branch)
    path = os.path.join(broken, "model.safetensors")
    os.truncate(path, os.path.getsize(path) // 2)
    result = subprocess.run(command(mini), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "not a complete safetensors file" in result.stderr
    assert "Traceback" not in result.stderr
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == len(planned_rows(s)) - 1


def test_a_study_grows_by_a_level_and_refuses_other_settings(mini):
    small = MINI_ONE.replace("DATA", re.search('"dataset": "([^"]*)"', mini.read_text())[1])
    mini.write_text(small)
    assert subprocess.run(command(mini), cwd=ROOT, capture_output=True, timeout=300).returncode == 0
    before = {json.dumps(r, sort_keys=True)
              for r in map(json.loads, open(mini.parent / "out" / "rows.jsonl"))}
    mini.write_text(small.replace("D1 = [10 * _step, 40 * _step]",
                                  "D1 = [10 * _step, 20 * _step, 40 * _step]"))
    result = subprocess.run(command(mini), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = [json.dumps(r, sort_keys=True) for r in map(json.loads, open(mini.parent / "out" / "rows.jsonl"))]
    assert before < set(rows) and len(rows) == len(planned_rows(study(mini)))
    mini.write_text(small.replace('"warmup_steps": 3', '"warmup_steps": 4'))
    result = subprocess.run(command(mini), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "warmup_steps was 3, the study now says 4" in result.stderr


def run_sweep(mini, text):
    """The rows of a study given as text, made by the command."""
    mini.write_text(text)
    result = subprocess.run(command(mini), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in open(mini.parent / "out" / "rows.jsonl")]


def one_size(mini):
    return MINI_ONE.replace("DATA", re.search('"dataset": "([^"]*)"', mini.read_text())[1])


def test_methods_that_differ_in_one_knob_are_runs_of_their_own(mini):
    methods = [{"method": "copy"}, {"method": "copy", "optimizer": "copy"},
               {"method": "copy", "router_std": 0.1}, {"method": "copy", "router_init": "clusters"}]
    rows = run_sweep(mini, one_size(mini) + f"methods = {methods}\n")
    up = [row for row in rows if row["family"] == "upcycled"]
    assert len(up) == 8
    assert {method_label(row) for row in up} == {"copy", "copy optimizer copy", "copy router 0.1",
                                                 "copy router from clusters"}
    assert len({row["trunk"] for row in up}) == 8 and len({row["loss"] for row in up}) == 8
    assert len({run_key(row, ("trunk",)) for row in up}) == 8
    assert {row["dense_trunk"] for row in up} == {row["trunk"] for row in rows if row["family"] == "dense"}
    expected = {run_key(row): row for row in planned_rows(study(mini))}  # what was planned is what was made
    assert {run_key(row) for row in rows} == set(expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_two_runs_of_a_study_on_one_machine_give_identical_rows(mini, compiled):
    """Losses to the last bit, with two workers, or with two shards at once that share a directory."""
    found, text = [], one_size(mini).replace('"eval_tokens"', f'"compile": {compiled}, "eval_tokens"')
    shards = [["--workers=1", f"--shard={i}/2"] for i in (1, 2)]
    ways = [["--workers=2"]], shards
    if compiled:  # all shapes would take long
        ways = ([["--workers=1", "--families=['moe']"]],) * 2
    for name, sweeps in zip("ab", ways):
        mini.write_text(text)
        out = mini.parent / name
        processes = [subprocess.Popen(command(mini, f"--out_dir={out}", *flags), cwd=ROOT, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for flags in sweeps]
        said = [process.communicate(timeout=300) for process in processes]
        assert not any(process.returncode for process in processes), said
        assert all(" rows in " in text and " 0 rows" not in text for text, _ in said)  # none was idle
        rows = map(json.loads, (out / "rows.jsonl").read_text().splitlines())
        found.append(sorted(json.dumps(row | {"config": None}) for row in rows))
    assert found[0] == found[1] and len(found[0]) == (1 if compiled else 4)


@pytest.mark.parametrize("key", ["source", "destination", "merge_with"])
def test_methods_do_not_name_what_the_study_sets(mini, key):
    mini.write_text(one_size(mini) + f"methods = [{{'method': 'copy', {key!r}: 'x'}}]\n")
    with pytest.raises(ConfigError, match=f"{key} is set by the study"):
        study_jobs(study(mini))


def test_the_settings_of_a_study_reach_all_its_runs(mini):
    with_setting = '"warmup_steps": 3, "router_aux_loss_coef": 0.1'
    rows = run_sweep(mini, one_size(mini).replace('"warmup_steps": 3', with_setting))
    found = {row["family"]: row.get("router_aux_loss_coef") for row in rows}
    assert found == {"dense": None, "moe": 0.1, "upcycled": 0.1}
    for trunk in (job for job in study_jobs(study(mini)) if job.is_trunk and job.row["num_local_experts"]):
        path = checkpoint.checkpoints(trunk.settings.out_dir)[-1][1]
        assert checkpoint.read_config(path).router_aux_loss_coef == 0.1


def test_a_study_never_takes_runs_of_other_settings_for_its_own(mini):
    """Neither a finished run, by its row.json, nor one that was begun, by its config.py."""
    text = one_size(mini)
    run_sweep(mini, text)
    settings = ast.literal_eval(re.search("(?s)train = (.*)", re.sub(r"\b_step", "128", text))[1])

    def jobs(**changes):
        mini.write_text(text + f"train = {settings | changes}\n")
        return study_jobs(study(mini))

    def refuses(where):
        for key, value in (("learning_rate", 1e-3), ("warmup_steps", 4), ("max_seq_len", 32),
                           ("eval_tokens", 512),
                           ("weight_decay", 0.2), ("beta2", 0.99), ("rope_theta", 500.0), ("grad_clip", 0.5)):
            for job in jobs(**{key: value}):
                if where == "config.py" or not job.is_trunk:
                    with pytest.raises(ConfigError,
                                       match=f"{where}: {key} was .*, the study now says {value}; take"):
                        check_unchanged(job)
    for job in jobs():
        check_unchanged(job)
    refuses("row.json")
    for job in jobs():
        if not job.is_trunk:
            os.remove(os.path.join(job.settings.out_dir, "row.json"))
        check_unchanged(job)
    refuses("config.py")


def test_dry_run_trains_nothing(mini, tmp_path):
    result = subprocess.run(command(mini, "--dry_run"), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    said = re.search(r"shared trunks save [^\0]*\ntime: \S+ hours of one device, [^\n]*\n"
                     r"memory: (\S+) GB a device in the largest run, [^\n]*\ndisk: (\S+) GB", result.stdout)
    jobs = study_jobs(study(mini))
    assert float(said[1]) == pytest.approx(max(map(device_bytes, jobs)) / 1e9, rel=0.01)
    assert float(said[2]) == pytest.approx(sum(map(disk_bytes, jobs)) / 1e9, rel=0.01)
    assert not (tmp_path / "out").exists()


def test_the_quick_study_is_what_the_readme_says(monkeypatch):
    import sweep
    # its data is not at hand in tests
    monkeypatch.setattr(sweep, "load_tokens", lambda directory, split: (None, {"vocab_size": 257}))
    rows = planned_rows(parse(Study, [str(ROOT / "config" / "study_quick.py")]))
    upcycled = [r for r in rows if r["family"] == "upcycled"]
    for axis in ("D1", "D2"):
        found = {r[axis] for r in upcycled}
        assert len(found) >= 4 and max(found) >= 8 * min(found)
    assert len({r["N"] for r in rows}) >= 2 and len(rows) >= 40
    assert re.search(rf"\b{len(rows)} (rows|runs)\b", (ROOT / "README.md").read_text())


def test_make_study_end_to_end(mini, tmp_path):
    """The README's command, on a small text and study: data, runs, laws, figures; then nothing more."""
    text = tmp_path / "text"
    text.mkdir()
    for i, part in enumerate((ROOT / "model.py").read_text().split("\n\n") * 2):
        (text / f"{i}.txt").write_text(part + str(i))
    # rows enough for each law
    more = "D_dense = [10 * _step, 20 * _step, 30 * _step, 40 * _step]\nD_moe = D_dense\n"
    mini.write_text(re.sub(r'"dataset": "[^"]*"', f'"dataset": "{tmp_path / "tokens"}"', mini.read_text())
                    + more)
    make = ["make", "-o", ".venv/runtime", f"PY={sys.executable}",
            f"DATA={text} --out_dir={tmp_path / 'tokens'} --val_fraction=0.1", f"STUDY={mini}",
            f"OUT={tmp_path / 'out'}", "study"]
    result = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    laws = json.load(open(tmp_path / "out" / "laws" / "laws.json"))
    assert {"dense", "moe", "upcycled", "upcycled.no_interaction"} <= set(laws["laws"])
    assert laws["laws"]["upcycled"]["n"] == 18
    assert list((tmp_path / "out" / "laws").glob("*.png"))
    rows = (tmp_path / "out" / "rows.jsonl").stat().st_mtime_ns
    assert subprocess.run(make, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    assert (tmp_path / "out" / "rows.jsonl").stat().st_mtime_ns == rows


def test_ci_and_readme_name_commands_that_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in ("study", "pilot", "test", "gpu"):
        assert f"make {target}" in readme and re.search(rf"^{target}:", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    for script in re.findall(r"python (\w+(?:/\w+)?\.py)", readme):
        assert (ROOT / script).exists(), script
    for config in re.findall(r"config/\w+\.py", readme):
        assert (ROOT / config).exists(), config
