"""The planner: numbers of the published table, hand-computed budgets, closed forms, simulation, and its refusals."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import laws
import plan as P
from configurator import from_dict
from rows import FAMILIES

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLE2 = os.path.join(ROOT, "laws", "liew2025.json")
LAWS, CONTENT = P.read_laws(TABLE2)


def with_head_start(c=2000.0, gamma=0.6):
    """Table 2 and an effective-data law that shares A, alpha, B, beta, E with its from-scratch MoE, draws of 1 % in c."""
    shared = LAWS["moe"]["params"] | {"c": c, "gamma": gamma}
    draws = {name: np.full(1000, value) for name, value in shared.items()} | {"c": c * np.exp(0.01 * np.random.default_rng(0).standard_normal(1000))}
    return LAWS | {"upcycled.effective_data_shared": {"params": shared, "draws": draws}}


# The published table (D2* at N = 1B as the digits of the table give it)

@pytest.mark.parametrize("D1, star", [(1e10, 7.1e9), (1e11, 51e9)])
def test_overtaking_of_table2(D1, star):
    found = P.overtaking(LAWS, "upcycled", 1e9, D1)
    assert found["D2_star"] == pytest.approx(star, rel=0.02)
    x = found["D2_star"]  # it is a root of the formulas written out
    moe = 32.0 * x ** -0.161 + 7.05 * 1e9 ** -0.080
    upcycled = 16.3 * D1 ** -0.043 * x ** (-0.085 + 7.98e-4 * math.log(D1)) + 8.53 * 1e9 ** -0.112
    assert moe == pytest.approx(upcycled, abs=2e-5)
    assert found["regained"] > 1e3 * x  # the second root, far out, is told apart


def test_no_overtaking_of_table2_after_a_trillion_tokens():
    found = P.overtaking(LAWS, "upcycled", 1e9, 1e12)
    assert found["D2_star"] is None and found["never"] > 0.5 and found["interval"][1] is None


def test_rounding_alone_leaves_the_overtaking_wide_open():
    low, high = P.overtaking(LAWS, "upcycled", 1e9, 1e11)["interval"]
    assert low < 30e9 and high > 120e9


def test_small_D2_where_the_law_is_worse_than_its_dense_start():
    floor = P.worse_than_start(LAWS, "upcycled", 1e9, 1e11)
    assert floor == pytest.approx(11e9, rel=0.03)
    few, many = (P.plan_now(LAWS, CONTENT, "upcycled", 1e9, 1e11, 6e9 * tokens, 1.0)["warnings"] for tokens in (floor / 2, floor * 2))
    assert any("dense start" in w for w in few) and not any("dense start" in w for w in many)


def test_rounding_draws_stay_within_half_a_digit_and_share_E():
    for law, entry in json.load(open(TABLE2))["laws"].items():
        for name, half in entry["rounding"].items():
            error = np.abs(LAWS[law]["draws"][name] - entry["params"][name])
            assert 0.9 * half < error.max() <= half * (1 + 1e-9)
    assert (LAWS["dense"]["draws"]["E"] == LAWS["moe"]["draws"]["E"]).all() and (LAWS["moe"]["draws"]["E"] == LAWS["upcycled"]["draws"]["E"]).all()


# Equal FLOPs

def test_equal_flop_accounting_by_hand():
    # 6 N = 6e9 FLOPs a dense token, 1e10 an active MoE token: 1e20 FLOPs are 1.667e10 dense or 1e10 MoE tokens
    options = P.losses_now(LAWS, "upcycled", 1e9, 1e11, 1e20, 5 / 3)
    assert options[P.DENSE]["tokens"] == pytest.approx(1e20 / 6e9) and options[P.UPCYCLE]["tokens"] == options[P.SCRATCH]["tokens"] == pytest.approx(1e10)
    assert options[P.DENSE]["loss"] == pytest.approx(8.83 * (1e11 + 1e20 / 6e9) ** -0.088 + 12.3 * 1e9 ** -0.116 + 0.165)
    assert options[P.SCRATCH]["loss"] == pytest.approx(32.0 * 1e10 ** -0.161 + 7.05 * 1e9 ** -0.080 + 0.165)
    assert options[P.UPCYCLE]["loss"] == pytest.approx(16.3 * 1e11 ** -0.043 * 1e10 ** (-0.085 + 7.98e-4 * math.log(1e11)) + 8.53 * 1e9 ** -0.112 + 0.165)


def test_budgets_in_tokens_flops_and_gpu_hours_agree():
    flops = 10 * 3600 * 1e15 * 0.4
    assert P.budget(P.Options(gpu_hours=10, flops_per_gpu=1e15), 1e9, 2.0) == pytest.approx(flops)
    assert P.budget(P.Options(flops=flops), 1e9, 2.0) == flops
    assert P.budget(P.Options(tokens=flops / 12e9), 1e9, 2.0) == pytest.approx(flops)


def test_probabilities_sum_to_one_and_follow_the_draws():
    for D1, flops in ((1e10, 1e19), (1e11, 5e20), (1e12, 1e22)):
        options = P.losses_now(LAWS, "upcycled", 1e9, D1, flops, 5 / 3)
        assert sum(o["probability_best"] for o in options.values()) == pytest.approx(1.0)
        assert all(o["interval"][0] <= o["loss"] <= o["interval"][1] for o in options.values())
    draws = [np.array([1.0, 3.0, 3.0, 3.0]), np.array([2.0, 2.0, 2.0, 4.0])]
    summary = P.summarise({"a": ({}, (2.0, draws[0])), "b": ({}, (2.0, draws[1]))})
    assert summary["a"]["probability_best"] == 0.5 == summary["b"]["probability_best"]


def test_head_start_is_worth_its_tokens_and_never_overtaken():
    laws, D1 = with_head_start(), 1e11
    result = P.plan_now(laws, CONTENT, "upcycled.effective_data_shared", 1e9, D1, 1e20, 5 / 3)
    worth = result["worth"]["upcycled.effective_data_shared"]
    assert worth["tokens"] == pytest.approx(2000 * 1e11 ** 0.6) and worth["interval"][0] == pytest.approx(worth["tokens"] * math.exp(-0.01645), rel=2e-3)
    # upcycled for D2 is as good as from scratch for D2 and its worth
    assert result["options"][P.UPCYCLE]["loss"] == pytest.approx(32.0 * (1e10 + worth["tokens"]) ** -0.161 + 7.05 * 1e9 ** -0.080 + 0.165)
    assert result["laws"]["upcycled.effective_data_shared"]["overtaking"]["never"] == 1.0
    assert set(result["laws"]) == {"upcycled", "upcycled.effective_data_shared"}


def test_law_is_chosen_by_held_out_error_and_by_name():
    laws = with_head_start()
    laws["upcycled"] = laws["upcycled"] | {"extrapolation": {"D2": 0.02}}
    laws["upcycled.effective_data_shared"] |= {"extrapolation": {"D2": 0.01}}
    assert P.choose_law(laws)[0] == "upcycled.effective_data_shared"
    assert P.choose_law(laws, "upcycled")[0] == "upcycled" == P.choose_law(LAWS)[0]
    with pytest.raises(P.ConfigError, match="upcycled.additive"):
        P.choose_law(laws, "upcycled.additive")


def test_distance_outside_the_fitted_range_is_said():
    ranges = {"upcycled": {"N": [1e7, 1e9], "D2": [1e9, 1e11]}}
    assert P.outside(ranges, "upcycled", N=1e8, D2=1e10) == []
    (above,), (below,) = P.outside(ranges, "upcycled", N=4e9), P.outside(ranges, "upcycled", D2=2.5e8)
    assert "4 times above" in above and "4 times below" in below
    assert "not known" in P.outside(ranges, "upcycled", D1=1e9)[0]


def constant(**params):
    return {"params": params, "draws": {name: np.full(1000, value) for name, value in params.items()}}


def test_from_scratch_that_leads_from_the_start_is_not_said_to_come_never():
    laws = LAWS | {"upcycled": constant(A=32.0, alpha1=0.0, alpha2=0.161, alpha3=0.0, B=9.0, beta=0.080, E=0.165)}  # the MoE law and more
    found = P.overtaking(laws, "upcycled", 1e9, 1e10)
    assert found["D2_star"] == 0.0 == found["interval"][1] and found["from_start"] == 1.0 and found["never"] == 0.0 and found["regained"] is None
    assert P.say_star(found).startswith("from the start")


def test_second_root_is_an_artefact_only_above_the_fitted_range():
    star = P.overtaking(LAWS, "upcycled", 1e9, 1e11)
    assert star["regained_far"] and "artefact" in P.say_star(star)
    inside = P.overtaking(LAWS, "upcycled", 1e9, 1e11, span=[1e9, 1e15])
    assert inside["regained"] == pytest.approx(star["regained"], rel=1e-3) and not inside["regained_far"]
    assert "artefact" not in P.say_star(inside) and "second root" in P.say_star(inside)


def test_each_law_is_compared_with_those_of_its_own_fit():
    rival = LAWS["upcycled"] | {"beside": {"moe": constant(A=32.0, alpha=0.161, B=7.05, beta=0.080, E=9.0), "dense": constant(A=8.83, alpha=0.088, B=12.3, beta=0.116, E=8.0)}}
    laws = LAWS | {"upcycled": rival}
    options = P.losses_now(laws, "upcycled", 1e9, 1e11, 1e20, 5 / 3)
    assert options[P.SCRATCH]["loss"] == pytest.approx(32.0 * 1e10 ** -0.161 + 7.05 * 1e9 ** -0.080 + 9.0)
    assert options[P.DENSE]["loss"] == pytest.approx(8.83 * (1e11 + 1e20 / 6e9) ** -0.088 + 12.3 * 1e9 ** -0.116 + 8.0)
    assert P.overtaking(laws, "upcycled", 1e9, 1e11)["never"] == 1.0 and P.worse_than_start(laws, "upcycled", 1e9, 1e11) is None
    assert P.plan_fresh(laws, CONTENT, "upcycled", 1e9, 1e21, 5 / 3)["options"]["dense"]["loss"] > 8


def test_N_is_checked_against_every_family():
    ranges = {family: {name: [1e8, 1e13] for name in FAMILIES[family]} for family in FAMILIES} | {"dense": {"N": [1e7, 1e8], "D": [1e8, 1e13]}}
    assert P.plan_now(LAWS, {"ranges": ranges}, "upcycled", 1e9, 1e11, 1e21, 5 / 3)["warnings"] == ["N = 1e+09 is 10 times above the largest fitted (dense: 1e+08)"]


# From nothing

def test_fresh_refuses_an_optimum_at_the_end_of_the_search():
    falling = constant(**LAWS["upcycled"]["params"] | {"alpha1": -0.1})  # dense training does harm
    result = P.plan_fresh(LAWS | {"upcycled": falling}, CONTENT, "upcycled", 1e9, 1e21, 5 / 3)
    assert P.BOTH not in result["options"] and "no interior optimum" in result["refused"][P.BOTH] and result["best"] == P.SCRATCH
    assert "no plan" in "".join(P.say_fresh(result))
    small = constant(A=8.83, alpha=0.088, B=1e-9, beta=0.1, E=0.165)  # the smallest model is best
    result = P.plan_fresh(LAWS | {"dense": small}, CONTENT, "upcycled", 0.0, 1e21, 5 / 3)
    assert "the search in N" in result["refused"][P.ONLY_DENSE] and set(result["options"]) == {P.SCRATCH, P.BOTH}


def test_fresh_says_when_the_plan_is_far_outside_the_fitted_range():
    for top, far in ((1e11, False), (1e9, True)):
        ranges = {family: {name: [1e8, top] for name in names} for family, names in FAMILIES.items()}
        result = P.plan_fresh(LAWS, {"ranges": ranges}, "upcycled", 1e9, 1e21, 5 / 3)
        assert bool(result["options"][result["best"]]["far"]) == far == ("do not rely on it" in "".join(P.say_fresh(result)))


def test_fresh_split_is_the_closed_form_without_interaction():
    params = LAWS["upcycled"]["params"] | {"alpha3": 0.0}
    for ratio in (1.0, 5 / 3):
        share, loss = P.best_split("upcycled", params, 1e21, 1e9, ratio)
        assert share == pytest.approx(0.043 / (0.043 + 0.085), rel=1e-4)  # A x^-a1 y^-a2 with x + y fixed
    draws = {name: np.full(3, value) for name, value in params.items()}
    assert P.best_split("upcycled", draws, 1e21, 1e9, 1.0)[0] == pytest.approx(np.full(3, share), abs=0.02)


def test_fresh_split_beats_its_neighbours_and_spends_the_budget():
    result = P.plan_fresh(LAWS, CONTENT, "upcycled", 1e9, 1e21, 5 / 3)
    plan, loss = result["options"][P.BOTH]["plan"], result["options"][P.BOTH]["loss"]
    assert 6e9 * (plan["D1"] + 5 / 3 * plan["D2"]) == pytest.approx(1e21)
    for factor in (0.9, 1.1):
        D1 = plan["D1"] * factor
        assert laws.predict("upcycled", LAWS["upcycled"]["params"], N=1e9, D1=D1, D2=(1e21 / 6e9 - D1) / (5 / 3)) > loss
    assert sum(o["probability_best"] for o in result["options"].values()) == pytest.approx(1.0)


def test_fresh_N_is_the_closed_form_of_the_dense_law():
    result = P.plan_fresh(LAWS, CONTENT, "upcycled", 0.0, 1e21, 5 / 3)
    p = LAWS["dense"]["params"]  # A D^-a + B N^-b with 6 N D = C: arXiv 2203.15556, equation 4
    best = (p["beta"] * p["B"] / (p["alpha"] * p["A"])) ** (1 / (p["alpha"] + p["beta"])) * (1e21 / 6) ** (p["alpha"] / (p["alpha"] + p["beta"]))
    assert result["options"]["dense"]["plan"]["N"] == pytest.approx(best, rel=1e-3)
    free, held = result["options"][P.BOTH], P.plan_fresh(LAWS, CONTENT, "upcycled", 1e9, 1e21, 5 / 3)["options"][P.BOTH]
    assert free["loss"] <= held["loss"]


# Design

def study_rows(D1=(1e9, 1e10, 1e11), D2=(1e9, 1e10, 1e11), N=(1e7, 1e8, 1e9)):
    rows = [{"family": family, "N": n, "D": d, "trunk": f"{family}{n}"} for family in ("dense", "moe") for n in N for d in (1e9, 1e10, 1e11)]
    return rows + [{"family": "upcycled", "N": n, "D1": a, "D2": b, "trunk": f"{n}-{a}"} for n in N for a in D1 for b in D2]


def test_expected_errors_are_those_of_simulated_studies():
    rows, noise, trunk_noise = study_rows(), 0.001, 0.0005
    expected = P.expected(LAWS, rows, noise, trunk_noise, 1e9, 1e11)
    random, alpha3, star = np.random.default_rng(0), [], []
    system = {family: family for family in FAMILIES}
    for _ in range(120):
        effects = {}
        for row in rows:
            effect = effects.setdefault(row["trunk"], trunk_noise * random.standard_normal())
            law = row["family"]
            row["loss"] = float(laws.predict(law, LAWS[law]["params"], **{v: row[v] for v in FAMILIES[law]}) * np.exp(effect + noise * random.standard_normal()))
        fit = laws.fit(rows, system, delta=0.1)
        alpha3.append(fit.params("upcycled")["alpha3"])
    assert expected["alpha3"] == pytest.approx(7.98e-4, rel=1e-4)
    assert expected["se_alpha3"] == pytest.approx(np.std(alpha3), rel=4 / math.sqrt(2 * 120))
    rejected = np.mean(np.abs(np.array(alpha3)) / expected["se_alpha3"] > 1.96)
    assert expected["power"] == pytest.approx(rejected, abs=0.15)
    assert expected["D2_star"] == pytest.approx(51e9, rel=0.02) and expected["se_ln_D2_star"] > 0


def test_one_more_level_tightens_alpha3():
    base = P.expected(LAWS, study_rows(), 0.005, 0.003, 1e9, 1e11)
    for longer in (study_rows(D1=(1e9, 1e10, 1e11, 1e12)), study_rows(D2=(1e9, 1e10, 1e11, 1e12)), study_rows(N=(1e7, 1e8, 1e9, 1e10))):
        more = P.expected(LAWS, longer, 0.005, 0.003, 1e9, 1e11)
        assert more["se_alpha3"] < base["se_alpha3"] and more["power"] > base["power"] and more["rows"] > base["rows"]


# The command

def command(*words):
    return subprocess.run([sys.executable, os.path.join(ROOT, "plan.py"), *words], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(capsys, **options):
    P.main(P.Options(**{"laws": TABLE2} | options))
    return capsys.readouterr().out


def test_command_recommends_and_draws(tmp_path, capsys):
    figure = str(tmp_path / "sub" / "plan.png")
    out = run(capsys, N=1e9, D1=1e11, tokens=5e10, figure=figure)
    assert "A close call: upcycle" in out and "rounding" in out and "5.06e+10 tokens" in out and "artefact" in out and "N_active = 1.667 N (assumed" in out
    assert os.path.getsize(figure) > 5000 and os.path.getsize(figure[:-3] + "pdf") > 5000
    data = json.loads(run(capsys, N=1e9, D1=1e11, tokens=5e10, figure="", json=True))
    assert data["best"] == "upcycle" and data["flops"] == pytest.approx(5e10 * 6e9 * 5 / 3)
    fresh = json.loads(run(capsys, fresh=True, N=1e9, flops=1e21, figure="", json=True))
    assert set(fresh["options"]) == {"dense", P.SCRATCH, P.BOTH}
    assert "go to dense training" in run(capsys, fresh=True, flops=1e21, figure="")


def test_experts_are_not_silently_ignored_where_the_rows_tell_the_ratio(tmp_path, capsys):
    path = tmp_path / "laws.json"
    path.write_text(json.dumps(CONTENT | {"active_ratio": 1.7}))
    options = dict(laws=str(path), N=1e9, D1=1e11, tokens=5e10, figure="")
    assert "N_active = 1.700 N (mean of the laws file's rows)" in run(capsys, **options)
    assert "N_active = 3.000 N (given)" in (out := run(capsys, **options, active_ratio=3.0)) and "but the laws were fitted on a MoE with 1.700 N" in out
    with pytest.raises(P.ConfigError, match="--num_experts_per_tok has no effect"):
        run(capsys, **options, num_experts_per_tok=4)


def test_design_holds_the_question_still_while_the_study_grows(monkeypatch):
    import sweep
    monkeypatch.setattr(sweep, "load_tokens", lambda directory, split: (None, {"vocab_size": 257}))  # its data is not at hand in tests
    found = P.plan_design(LAWS, P.Options(design=os.path.join(ROOT, "config", "study_quick.py")))
    assert len(found) == 4 and len({(e["N"], e["D1"]) for e in found.values()}) == 1 and len({f"{e['D2_star']:.4g}" for e in found.values()}) == 1
    first = found["as it is"]
    assert f"D2* (N {first['N']:.3g}, D1 {first['D1']:.3g})" in "".join(P.say_design(found))


def test_checkpoint_gives_N_and_D1(tmp_path, capsys):
    # attention 4 h², MLP 3 h f, two norms a layer and one at the end
    h, f, layers = 64, 192, 3
    config = {"model_type": "llama", "hidden_size": h, "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4,
              "vocab_size": 257}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(P.ConfigError, match="--D1="):
        P.inputs(P.Options(checkpoint=str(tmp_path)))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"tokens": 4194304, "lineage": {}}))
    N, D1, ratio, source = P.inputs(P.Options(checkpoint=str(tmp_path)), 1.4)
    assert source == "the checkpoint with 8 experts, top-2"
    for state in ({"tokens": 1_000_000, "lineage": {"tokens_before": 2_000_000}}, {"tokens": 1_000_000, "lineage": {}, "history": [["a", 2_000_000], ["b", 1_000_000]]}):
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))  # the tokens of earlier runs count too
        assert P.inputs(P.Options(checkpoint=str(tmp_path)))[1] == 3_000_000
    (tmp_path / "trainer_state.json").write_text(json.dumps({"tokens": 4194304, "lineage": {}}))
    dense = layers * (4 * h * h + 3 * h * f + 2 * h) + h
    assert (N, D1) == (dense, 4194304) and ratio == pytest.approx((dense + layers * (3 * h * f + 8 * h)) / dense)  # one more MLP, a router
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}))
    with pytest.raises(P.ConfigError, match="mixture of experts already"):
        P.inputs(P.Options(checkpoint=str(tmp_path)))


@pytest.mark.parametrize("options, said", [
    (dict(N=1, D1=1e11, tokens=5e10), "--N=1 is a raw count here, not billions; did you mean --N=1e9"), (dict(N=1e9, D1=100, tokens=5e10), "did you mean --D1=100e9"),
    (dict(N=1e9, D1=1e11, tokens=50), "did you mean --tokens=50e9"), (dict(N=1e9, D1=1e11, flops=500), "raw count of operations"), (dict(N=1e9, D1=1e11), "give one budget"),
    (dict(N=1e9, D1=1e11, tokens=1e9, flops=1e20), "got tokens, flops"), (dict(N=1e9, tokens=1e9), "--D1= is missing"), (dict(D1=1e9, tokens=1e9), "--N= is missing"),
    (dict(N=1e9, D1=1e11, gpu_hours=5), "--flops_per_gpu"), (dict(N=1e9, D1=1e11, gpu_hours=5, flops_per_gpu=1e15, mfu=40), "mfu: 40.0 is not in"), (dict(N=-1e9, D1=1e11, tokens=1e9), "N: -1000000000.0 is not at least 0"),
    (dict(N=1e9, D1=1e11, gpu_hours=5, flops_per_gpu=989), "did you mean 989e12"), (dict(N=5000, D1=1e11, tokens=1e9), "not millions; did you mean --N=5e+09"),
    (dict(N=1e9, D1=1e5, tokens=5e10), "did you mean --D1=1e+11"), (dict(N=1e9, D1=1e11, flops=1e12), "100 tokens at N = 1e+09, too few"),
    (dict(fresh=True, flops=1e7), "too few to plan N"), (dict(design="x", noise=0.0), "noise: 0.0"), (dict(N=1e9, D1=1e11, tokens=1e10, figure="plan.bmp"), "--figure=plan.bmp"),
    (dict(N=1e9, D1=1e11, tokens=1e10, active_ratio=1.5, num_experts_per_tok=2), "--num_experts_per_tok has no effect here: N_active = 1.5 N (given)"),
    (dict(fresh=True, tokens=1e10), "--tokens as a budget needs --N="), (dict(N=1e9, D1=1e11, tokens=1e9, law="nonsense"), "nonsense"),
    (dict(N=1e9, D1=1e11, tokens=1e9, num_experts_per_tok=9), "num_experts_per_tok"), (dict(checkpoint="/nowhere"), "/nowhere")])
def test_bad_input_is_refused_with_the_fix(options, said):
    with pytest.raises(P.ConfigError) as error:
        P.main(from_dict(P.Options, {"laws": TABLE2, "figure": ""} | options))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2, "laws": {}}', '{"version": 1, "laws": {}}', '{"version": 1, "laws": {"dense": {"params": {"A": 1}}}}',
                                     '{"version": 1, "laws": {"cubic": {"params": {}}}}', '{"version": 1, "laws": 3}'])
def test_bad_laws_files_are_refused(tmp_path, content):
    path = tmp_path / "laws.json"
    path.write_text(content)
    with pytest.raises(P.ConfigError, match="laws.json"):
        P.read_laws(str(path))


def test_command_line_error_is_one_line():
    done = command("--N=1", "--D1=1e11", "--tokens=5e10")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean --N=1e9" in done.stderr and "Traceback" not in done.stderr
