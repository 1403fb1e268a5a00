"""The planner: the published table, hand-computed budgets, closed forms, simulated truths, a browser."""
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm

import fit_laws
import laws
import mixture as M
import plan as P
import plan_design
import plan_page
from configurator import ConfigError, from_dict, parse
from rows import FAMILIES

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TABLE2, QUICK = (os.path.join(ROOT, "laws", name) for name in ("liew2025.json", "pysource_quick.json"))
CONTENT = M.read_laws(TABLE2)[0]
LAWS = CONTENT["laws"]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NODE = shutil.which("node")


def book_of(content, moe_cost=5 / 3, **options):
    """The mixture of a laws file; a dense token costs 6 N FLOPs, a MoE token moe_cost times that."""
    M.check_laws("laws.json", content)
    return M.make_book("laws.json", content,
                       **options) | {"costs": {"dense": [(1.0, 1.0)], "moe": [(1.0, moe_cost)]}}


def question(N, D1=0.0, flops=0.0, **moe):
    return {"N": N, "D1": D1, "flops": flops} | M.MOE | moe


BOOK = book_of(CONTENT)

# ---------------------------------------------------------------------------------------------------------
# Laws files of version 2, made up

CURVE = {"alpha": 0.3, "B": 5.0, "beta": 0.2, "E": 0.5}
DENSE_PARAMS, MOE_PARAMS = {"A": 95.0, "alpha": 0.29, "B": 5.5, "beta": 0.2, "E": 0.5}, CURVE | {"A": 100.0}
UPCYCLED_PARAMS = {  # of every law that laws.py may know, near one another at N = 30k and 1M tokens
    "upcycled": {"A": 50.0, "alpha1": 0.15, "alpha2": 0.2, "alpha3": 0.003, "B": 5.0, "beta": 0.2, "E": 0.5},
    "upcycled.no_interaction": {"A": 30.0, "alpha1": 0.12, "alpha2": 0.15, "B": 5.0, "beta": 0.2, "E": 0.5},
    "upcycled.additive": {"A1": 20.0, "alpha1": 0.3, "A2": 40.0, "alpha2": 0.3, "B": 5.0, "beta": 0.2,
                          "E": 0.5},
    "upcycled.effective_data": CURVE | {"A": 110.0, "c": 60.0, "gamma": 0.7},
    "upcycled.effective_data_shared": MOE_PARAMS | {"c": 60.0, "gamma": 0.7},
    "upcycled.saturating": MOE_PARAMS | {"c": 60.0, "gamma": 0.75, "H_max": 5e6},
    "upcycled.handicap": MOE_PARAMS | {"c": 80.0, "gamma": 0.7, "kappa": 0.02},
    "upcycled.loss_matching_0": MOE_PARAMS | {f"dense_{k}": v for k, v in DENSE_PARAMS.items()},
}
UPCYCLED_PARAMS["upcycled.loss_matching"] = UPCYCLED_PARAMS["upcycled.loss_matching_0"] | {"delta": 0.01}
for name in ("upcycled.saturating", "upcycled.loss_matching"):
    UPCYCLED_PARAMS[f"{name}_handicap"] = UPCYCLED_PARAMS[name] | {"kappa": 0.02}
SHARED = [name for name in UPCYCLED_PARAMS
          if name.partition(".")[2] not in ("", "no_interaction", "additive", "effective_data")]
RANGES = {"dense": {"N": [1e4, 1e5], "D": [1e5, 1e7]}, "moe": {"N": [1e4, 1e5], "D": [1e5, 1e7]},
          "upcycled": {"N": [1e4, 1e5], "D1": [1e5, 1e7], "D2": [1e5, 1e7]}}


def entry(params, held_out=0.01, spread=0.003, misfit=0.003, draws=50, seed=0, **more):
    """An entry of version 2 whose coefficients have draws with a relative spread."""
    random = np.random.default_rng(seed)
    drawn = {name: [float(f"{x:.7g}")
                    for x in value * np.exp(spread * random.standard_normal(draws) * (name[-1] in "AEBc"))]
             for name, value in params.items()}
    tests = {name: {"rms": held_out, "rows": 6, "beyond": 2.0} for name in ("D1", "D2", "trunk")}
    return {"params": params, "draws": drawn, "held_out": tests,
            "misfit": dict.fromkeys(FAMILIES, misfit)} | more


def version2(names, held_out=None, methods=(), **more):
    """The content of a laws file with these upcycled laws, each with the dense and MoE law of its fit."""
    dense, moe = entry(DENSE_PARAMS), entry(MOE_PARAMS, seed=1)
    costs = [("dense", 1e4, 1.5), ("dense", 1e5, 1.2), ("moe", 1e4, 2.0), ("moe", 1e5, 1.8)]
    content = {"version": 2, "ranges": RANGES, "laws": {"dense": dense, "moe": moe},
               "models": [{"family": family, "N": n, "N_active": n * cost, "N_total": 5 * n,
                           "flops_per_token": 6 * n * cost} for family, n, cost in costs]}
    for i, name in enumerate(names):
        system = {"dense": "dense", "moe": name if name in SHARED else "moe", "upcycled": name}
        beside = {"dense": dense} | ({} if name in SHARED else {"moe": moe})
        content["laws"][name] = entry(UPCYCLED_PARAMS[name], (held_out or {}).get(name, 0.01), seed=i + 2,
                                      fitted_with=system, beside=beside)
        if methods:
            content["laws"][name]["methods"] = {method: entry(UPCYCLED_PARAMS[name] | changed, seed=i + 2)
                                                for method, changed in methods.items()}
    return content | more


KNOWN = [name for name in UPCYCLED_PARAMS if name in laws.RIVALS]
PILOT = {"version": 2, "laws": {"upcycled.head_start": entry(  # on one checkpoint, N = 30k and D1 = 1M
    {"A": 100.0, "alpha": 0.3, "H": 4e5, "B": 0.0, "beta": 0.0, "E": 1.3},
    fitted_with={"dense": "dense.local", "moe": "upcycled.head_start", "upcycled": "upcycled.head_start"},
    beside={"dense.local": entry({"A": 13.0, "alpha": 0.1})})},
    "ranges": {"dense": {"N": [3e4, 3e4], "D": [1e6, 1.2e6]}, "moe": {"N": [3e4, 3e4], "D": [1e5, 1e6]},
               "upcycled": {"N": [3e4, 3e4], "D1": [1e6, 1e6], "D2": [1e5, 4e5]}}}

# ---------------------------------------------------------------------------------------------------------
# The published table (D2* at N = 1B as its digits give it)


@pytest.mark.parametrize("D1, star", [(1e10, 7.1e9), (1e11, 51e9)])
def test_overtaking_of_table2(D1, star):
    found = P.answer_now(BOOK, question(1e9, D1, 6e9 * star * 2))["laws"]["upcycled"]["D2_star"]
    assert found == pytest.approx(star, rel=0.02)
    moe = 32.0 * found ** -0.161 + 7.05 * 1e9 ** -0.080  # it is a root of the formulas written out
    upcycled = 16.3 * D1 ** -0.043 * found ** (-0.085 + 7.98e-4 * math.log(D1)) + 8.53 * 1e9 ** -0.112
    assert moe == pytest.approx(upcycled, abs=1e-4)


def test_table2_has_no_overtaking_after_a_trillion_tokens():
    stars, found = P.overtaking_of(BOOK, question(1e9, 1e12), {"upcycled": {"weight": 1.0}}, "copy")
    assert stars == {"upcycled": None} and found["interval"][1] is None and found["never"] > 0.3


def test_a_law_that_puts_the_upcycled_model_above_its_own_start_gives_no_verdict():
    floor = 11.0e9  # N = 1B, D1 = 100B: 16.3 D1^-.043 D2^... = 8.83 D1^-.088 + 12.3 N^-.116 - 8.53 N^-.112
    few, many = (P.answer_now(BOOK, question(1e9, 1e11, 1e10 * tokens))
                 for tokens in (floor / 1.1, floor * 1.1))
    assert few["verdict"] == "void" and "above its own dense start" in few["says"]
    assert few["options"] == {} == few["laws"]
    assert many["verdict"] != "void" and set(many["options"]) == {P.UPCYCLE, P.DENSE, P.SCRATCH}


@pytest.mark.parametrize("N, D1, tokens", [(1.2e9, 9e12, 1e11), (7e9, 15e12, 1e11), (7e9, 15e12, 1e12)])
def test_questions_far_beyond_the_table_get_a_pilot_and_no_ranking(N, D1, tokens):
    found = P.answer_now(BOOK, question(N, D1, 1e1 * N * tokens))
    said = "\n".join(plan_page.say_answer(found))
    assert found["verdict"] == "void" and found["options"] == {} and found["best"] is None
    assert "Cannot say" in said and "D1 = " in said and "pilot" in said and "Clearly" not in said
    scratch = next(run for run in found["pilot"]["runs"] if run["family"] == P.SCRATCH)
    assert scratch["branches"][-1] == pytest.approx(tokens / 4) and 0 < found["pilot"]["share"] < 1
    assert not found["pilot"]["again"]


def test_a_pilot_has_no_branch_that_the_rows_reach_and_none_below_five_warm_ups():
    content = version2(["upcycled.effective_data"])  # D to 10M, D1 and D2 to 10M, N from 10k to 100k

    def branches(N, D1, tokens, **more):
        book = book_of(content | more, 2.0)
        found = P.pilot(book, question(N, D1, 6 * N * 2.0 * tokens), {"verdict": "void"})
        assert found["share"] == pytest.approx(found["flops"] / (12 * N * tokens))
        return found["again"], {run["family"]: run["branches"] for run in found["runs"]}

    again, found = branches(3e4, 1e6, 6.4e7)  # upcycled to 8M and dense to 1M + 16M, a MoE to 16M
    assert not again and found == {P.SCRATCH: [pytest.approx(1.6e7)], "dense": [pytest.approx(1.6e7)]}
    for place in ((3e5, 1e6, 6.4e7), (3e4, 1e6, 6.4e8)):  # another N, or far beyond
        again, found = branches(*place)
        assert not again and found["upcycled"] == [pytest.approx(place[2] / 16), pytest.approx(place[2] / 8)]
    assert len(branches(3e4, 5e7, 6.4e7)[1]["upcycled"]) == 2  # another D1
    for warm_up, kept in ((1.9e4, 4), (3e4, 3), (1e5, 1), (1e9, 1)):  # of 0.1M, 0.2M, 0.4M, 0.8M tokens
        again, found = branches(3e4, 1e6, 3.2e6, warm_up=warm_up)
        assert again and len(found[P.SCRATCH]) == kept
        assert warm_up == 1e9 or found[P.SCRATCH][0] >= 5 * warm_up
    assert found[P.SCRATCH] == [pytest.approx(3.2e6)]  # all are too short: the budget itself
    said = "\n".join(plan_page.say_answer({"says": "", "options": {}, "overtaking": None, "laws": {},
                                           "warnings": [], "pilot": P.pilot(
        book_of(content, 2.0), question(3e4, 1e6, 1e12), {"verdict": "void"})}))
    assert "reach all branches of a pilot already" in said and "second seed" in said


def test_a_pilot_is_not_answered_by_the_same_pilot():
    book = book_of(PILOT | {"ranges": PILOT["ranges"] | {
        "dense": {"N": [3e4, 3e4], "D": [1e6, 1e6 + 5e6 / 24]},
        "moe": {"N": [3e4, 3e4], "D": [3e4, 2.5e5]}, "upcycled": {"N": [3e4, 3e4], "D1": [1e6, 1e6],
                                                                 "D2": [6.25e4, 1.25e5]}}})
    found = P.pilot(book, question(3e4, 1e6, 6 * 3e4 * 5 / 3 * 1e6), {"verdict": "void"})
    assert found["again"]  # of a budget of 1M MoE tokens
    larger = P.pilot(book, question(3e4, 1e6, 6 * 3e4 * 5 / 3 * 4e6), {"verdict": "void"})
    assert not larger["again"] and larger["runs"][1]["branches"] == pytest.approx([5e5, 1e6])


def test_laws_of_tiny_models_say_nothing_of_large_ones():
    content = M.read_laws(QUICK)[0]
    found = P.answer_now(book_of(content), question(1.2e9, 1e12, 1e21))
    assert found["verdict"] == "void" and "N = 1.2B" in found["says"] and "tested to 8 times" in found["says"]


def test_published_laws_are_as_uncertain_as_is_assumed():
    found = P.answer_now(BOOK, question(1e9, 1e11, 1e10 * 2e11))["options"]
    for option, error in ((P.SCRATCH, 0.01), (P.UPCYCLE, 0.02)):  # inside the range: 90 % of a normal deviate
        low, high = np.log(found[option]["interval"]) - math.log(found[option]["loss"])
        assert -low == pytest.approx(1.645 * error, rel=0.05) and high == pytest.approx(1.645 * error,
                                                                                        rel=0.05)
    assert "assumed errors" in P.uncertainty(P.Options(), CONTENT, BOOK)

# ---------------------------------------------------------------------------------------------------------
# Equal FLOPs


def test_equal_flop_accounting_by_hand():
    # 6 N = 6e9 FLOPs a dense token, 1e10 a MoE token: 5e20 FLOPs are 8.333e10 dense or 5e10 MoE tokens
    options = P.answer_now(BOOK, question(1e9, 1e11, 5e20))["options"]
    assert options[P.DENSE]["tokens"] == pytest.approx(5e20 / 6e9)
    assert options[P.UPCYCLE]["tokens"] == options[P.SCRATCH]["tokens"] == pytest.approx(5e10)
    dense = 8.83 * (1e11 + 5e20 / 6e9) ** -0.088 + 12.3 * 1e9 ** -0.116 + 0.165
    assert options[P.DENSE]["loss"] == pytest.approx(dense)
    assert options[P.SCRATCH]["loss"] == pytest.approx(32.0 * 5e10 ** -0.161 + 7.05 * 1e9 ** -0.080 + 0.165)
    assert options[P.UPCYCLE]["loss"] == pytest.approx(
        16.3 * 1e11 ** -0.043 * 5e10 ** (-0.085 + 7.98e-4 * math.log(1e11)) + 8.53 * 1e9 ** -0.112 + 0.165)
    assert sum(found["probability_best"] for found in options.values()) == pytest.approx(1.0)


def ask(content, **options):
    return P.ask(from_dict(P.Options, options), content, M.make_book("laws.json", content))


def test_flops_are_those_of_the_models_that_the_laws_were_fitted_on():
    content = version2(["upcycled"])
    # between 1e4 (2.0 times 6 N) and 1e5 (1.8) the factor is linear in ln N
    asked = ask(content, N=10 ** 4.5, D1=1e6, tokens=1e6)
    assert asked["flops"] == pytest.approx(1e6 * 6 * 10 ** 4.5 * 1.9)
    assert "models that the laws" in asked["flops_from"]
    assert ask(content, N=1e6, D1=1e6,
               tokens=1e6)["flops"] == pytest.approx(1e6 * 6e6 * 1.8)  # beyond the models: the last factor
    more = ask(content, N=1e5, D1=1e6, tokens=1e6, num_experts_per_tok=4)["flops"]  # two MLPs of 2/3 N more
    assert more == pytest.approx(1e6 * 6e5 * (1.8 + 4 / 3))
    alone = {key: value for key, value in CONTENT.items() if not key.startswith("models")}
    assert "assumed" in ask(alone, N=1e9, D1=1e11, tokens=5e10)["flops_from"]


def test_flops_of_the_published_table_are_those_of_llama_shapes_with_attention_and_head():
    from model import ModelConfig, flops_per_token, parameter_counts
    with open(os.path.join(ROOT, "config", "paper", "study.py")) as file:
        study = {}
        exec(file.read(), study)
    listed = {(model["family"], model["N"]): model["flops_per_token"] for model in CONTENT["models"]}
    for size in study["sizes"]:
        shape = {key: size[key] for key in size if key not in ("learning_rate", "micro_batch_size")}
        shape |= {"vocab_size": 32_000, "num_key_value_heads": size["num_attention_heads"]}
        dense, moe = ModelConfig(**shape), ModelConfig(**shape, num_local_experts=8, num_experts_per_tok=2)
        N = parameter_counts(dense)["N"]
        assert listed.pop(("dense", N)) == flops_per_token(dense, 2048)
        assert listed.pop(("moe", N)) == flops_per_token(moe, 2048)
    assert listed == {}
    asked = ask(CONTENT, N=1013936896, D1=1e11, tokens=5e10)
    assert asked["flops"] == pytest.approx(5e10 * 11653619712) and "Llama shapes" in asked["flops_from"]


def test_checkpoint_gives_N_D1_and_FLOPs(tmp_path):
    # N: attention 4 h², MLP 3 h f, two norms a layer, one at the end. FLOPs: 6 a weight in a product.
    h, f, layers, vocabulary = 64, 192, 3, 257
    config = {"model_type": "llama", "hidden_size": h, "intermediate_size": f, "num_hidden_layers": layers,
              "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": vocabulary}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="--D1="):
        ask(CONTENT, checkpoint=str(tmp_path), tokens=1e6)
    for runs, D1 in (([["a", 4194304]], 4194304), ([["a", 2_000_000], ["b", 1_000_000]], 3_000_000)):
        state = {"tokens": runs[-1][1], "lineage": {}, "history": runs}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        asked = ask(CONTENT, checkpoint=str(tmp_path), tokens=1e6, max_seq_len=128)
        assert (asked["N"], asked["D1"]) == (layers * (4 * h * h + 3 * h * f + 2 * h) + h, D1)
    weights = layers * (4 * h * h + 2 * 3 * h * f + 8 * h) + vocabulary * h  # two experts, router, head
    assert asked["flops"] == pytest.approx(1e6 * (6 * weights + 12 * layers * h * 128))
    (tmp_path / "config.json").write_text(json.dumps(config
                                                     | {"model_type": "mixtral", "num_local_experts": 8,
                                                        "num_experts_per_tok": 2}))
    with pytest.raises(ConfigError, match="mixture of experts already"):
        ask(CONTENT, checkpoint=str(tmp_path), tokens=1e6)

# ---------------------------------------------------------------------------------------------------------
# The mixture


def test_weights_are_the_product_of_inverse_held_out_errors():
    content = version2(["upcycled", "upcycled.effective_data"], {"upcycled": 0.02,
                                                                 "upcycled.effective_data": 0.01})
    weights = {law["name"]: law["weight"] for law in book_of(content)["laws"]}
    assert weights == pytest.approx({"upcycled": 1 / 9,
                                     "upcycled.effective_data": 8 / 9})  # 2³ in three tests
    content["laws"]["upcycled"]["held_out"]["D1"] = None  # a test that one law lacks counts for none
    weights = {law["name"]: law["weight"] for law in book_of(content)["laws"]}
    assert weights == pytest.approx({"upcycled": 1 / 5, "upcycled.effective_data": 4 / 5})
    content["laws"]["upcycled"]["held_out"]["D2"]["rms"] = 1.0  # 1/200 of the other: left out
    assert [law["name"] for law in book_of(content)["laws"]] == ["upcycled.effective_data"]
    assert [law["name"] for law in book_of(content, wanted="upcycled")["laws"]] == ["upcycled"]


def test_probability_is_that_of_normal_errors():
    # one law without draws: two options that differ by gap, with errors of misfit each
    book = book_of(version2(["upcycled"]) | {"laws": {
        "dense": {"params": DENSE_PARAMS, "relative_error": 0.02},
                                                      "moe": {"params": MOE_PARAMS, "relative_error": 0.03}}})
    points = {"a": ("dense", {"N": 3e4, "D": 1e6}), "b": ("moe", {"N": 3e4, "D": 1e6})}
    options = P.compare(book, points)["options"]
    losses = [laws.predict(family, params, N=3e4, D=1e6) for family,
              params in (("dense", DENSE_PARAMS), ("moe", MOE_PARAMS))]
    assert [found["loss"] for found in options.values()] == pytest.approx(losses)
    sure = norm.cdf(math.log(losses[1] / losses[0]) / math.hypot(0.02, 0.03))
    assert options["a"]["probability_best"] == pytest.approx(sure, abs=4 * math.sqrt(0.25 / M.DRAWS))


def test_form_error_grows_with_the_distance_beyond_the_data():
    law = BOOK["laws"][0]
    for variables, form in (({"N": 1e9, "D": 3.68e11}, 0.0), ({"N": 8e9, "D": 3.68e11}, 0.01 * math.log(8)),
                            ({"N": 4e9, "D": 4 * 3.68e11}, 0.01 * 2 * math.log(4)), ({"N": 1e9, "D": 1e9 / 4},
                                                                                     0.01 * math.log(4))):
        draws = np.log(M.sample(BOOK, law, "moe", variables | M.MOE) / M.estimate(law, "moe", variables
                                                                                  | M.MOE))
        assert draws.std() == pytest.approx(math.hypot(0.01, form), rel=0.02)
    other = np.log(M.sample(BOOK, law,
                            "moe", {"N": 1e9, "D": 1e11, "num_local_experts": 32, "num_experts_per_tok": 2}))
    assert other.std() == pytest.approx(math.hypot(0.01, 0.03 * math.log(4)),
                                        rel=0.02)  # another MoE than the laws'


def test_quantiles_and_crossings():
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([0.2, 0.5, 0.3])
    assert [M.quantile(values, weights, q) for q in (0.05, 0.5, 0.51, 0.81)] == [1.0, 1.0, 2.0, 3.0]
    stars = [math.inf, 0.0, 7.0]  # never, from the start, at 7 tokens
    assert laws.overtaking(1.0, lambda x: math.log(7.0) - np.log(x)) == pytest.approx(7.0)
    assert laws.overtaking(1.0, lambda x: np.stack([0.0 * x + 1, 0.0 * x - 1, math.log(7.0) - np.log(x)])
                           ) == pytest.approx(stars)


def test_each_law_is_compared_with_those_of_its_own_fit():
    content = version2(["upcycled"])
    content["laws"]["upcycled"]["beside"] = {"dense": entry(DENSE_PARAMS | {"E": 0.9}),
                                             "moe": entry(MOE_PARAMS | {"E": 0.7})}
    book = book_of(content)
    options = P.answer_now(book, question(3e4, 1e6, 1e12))["options"]
    assert options[P.SCRATCH]["loss"] == pytest.approx(float(laws.predict("moe", MOE_PARAMS | {"E": 0.7},
                                                                          N=3e4, D=1e12 / 3e5)))
    assert options[P.DENSE]["loss"] == pytest.approx(float(laws.predict("dense", DENSE_PARAMS | {"E": 0.9},
                                                                        N=3e4, D=1e6 + 1e12 / 1.8e5)))
    del content["laws"]["upcycled"]["beside"]  # a fit without dense and MoE rows
    assert P.answer_now(book_of(content), question(3e4, 1e6, 1e12))["verdict"] == "void"


def test_a_verdict_is_clear_only_where_all_laws_with_weight_agree():
    asked = question(3e4, 3e6, 5e11)
    agree = P.answer_now(book_of(version2(["upcycled.effective_data_shared"])), asked)
    assert agree["verdict"] == "clear" and agree["best"] == P.UPCYCLE
    assert agree["pilot"] is None and agree["gap"] > 0.005
    worse = UPCYCLED_PARAMS["upcycled.no_interaction"] | {"A": 57.5}
    content = version2(["upcycled.effective_data_shared",
                        "upcycled.no_interaction"], {"upcycled.effective_data_shared": 0.004})
    content["laws"]["upcycled.no_interaction"] |= {"params": worse,
                                                   "draws": {name: [value] for name, value in worse.items()}}
    disagree = P.answer_now(book_of(content), asked)
    other = disagree["laws"]["upcycled.no_interaction"]
    assert 0.05 < other["weight"] < 0.1 and other["best"] != P.UPCYCLE
    assert disagree["verdict"] == "mixed" and "disagree" in disagree["says"]
    assert disagree["pilot"]["share"] < 1


def test_dense_against_MoE_where_there_is_no_upcycled_law():
    book = book_of({"version": 1, "laws": {name: LAWS[name] for name in ("dense", "moe")},
                    "ranges": CONTENT["ranges"]})
    now = P.answer_now(book, question(1e9, 1e11, 5e20))
    assert set(now["options"]) == {P.DENSE, P.SCRATCH} and now["best"] == P.SCRATCH
    fresh = P.answer_fresh(book, question(1e9, flops=1e21))
    assert set(fresh["options"]) == {P.ONLY_DENSE, P.SCRATCH} and fresh["best"] == P.SCRATCH
    assert "no upcycled law of the same fit, so an option is left out: upcycle." in P.uncertainty(
        P.Options(), {"laws": LAWS}, book)
    assert "Cannot say" not in "\n".join(plan_page.say_answer(now) + plan_page.say_answer(fresh))


def test_head_start_is_worth_tokens_and_the_method_depends_on_the_budget():
    # a head start of H tokens is L_moe(D2 + H): c D1^gamma
    content = version2(["upcycled.effective_data_shared"])
    found = P.answer_now(book_of(content), question(3e4, 1e6, 1e12))["laws"]["upcycled.effective_data_shared"]
    assert found["head_start"] == pytest.approx(60.0 * 1e6 ** 0.7)
    assert found["kappa"] == 0.0 and found["D2_star"] is None
    # copying starts ahead; a method with a smaller head start on a lower curve wins later
    content = version2(["upcycled.effective_data"], methods={"copy": {}, "drop_0.5": {"c": 20.0, "A": 105.0}})
    few, many = (P.answer_now(book_of(content), question(3e4, 1e6, 3e5 * tokens)) for tokens in (5e5, 2e7))
    assert few["method"] == "copy" and many["method"] == "drop_0.5"
    own = {method: laws.predict("upcycled.effective_data", UPCYCLED_PARAMS["upcycled.effective_data"]
                                | changed, N=3e4, D1=1e6, D2=2e7)
           for method, changed in (("copy", {}), ("drop_0.5", {"c": 20.0, "A": 105.0}))}
    assert {method: found["loss"] for method, found in many["methods"].items()} == pytest.approx(own)
    assert many["options"][P.UPCYCLE]["loss"] == pytest.approx(min(own.values()))
    content = version2(["upcycled.handicap", "upcycled.effective_data_shared"], {"upcycled.handicap": 0.005},
                       methods={"copy": {}, "drop_0.5": {"c": 20.0, "kappa": -0.01}})
    both = P.answer_now(book_of(content), question(3e4, 1e6, 3e5 * 1e6))
    for method, c, kappa in (("copy", 80.0, 0.02), ("drop_0.5", 20.0, -0.01)):
        assert both["methods"][method]["head_start"] == pytest.approx(c * 1e6 ** 0.7)
        assert both["methods"][method]["kappa"] == kappa
    said, law = "\n".join(plan_page.say_answer(both)), both["laws"]["upcycled.handicap"]
    assert both["method"] == "copy" and law["weight"] > 0.8
    assert (f"an H, handicap, the checkpoint is worth {laws.short(80 * 1e6 ** 0.7)} tokens of MoE training, "
            f"once, and upcycling costs 2.0 % of the loss, for ever. Its D2*: {laws.short(law['D2_star'])}."
            ) in said
    assert re.search(rf"drop_0.5  {laws.short(20 * 1e6 ** 0.7)}  -1.0 % ", said)
    said = "\n".join(plan_page.say_answer(many))
    assert "the way of upcycling with the lowest expected loss is drop_0.5. It is" in said


def test_a_page_with_many_laws_and_methods_stays_small(tmp_path):
    methods = {f"method_{i}": {} for i in range(8)}
    book = book_of(version2([name for name in KNOWN if "effective" in name or name in SHARED],
                            methods=methods))
    plan_page.write_page({"book": book}, str(tmp_path / "page.html"))
    assert os.path.getsize(tmp_path / "page.html") < 500_000 and len(book["methods"]) == 8
    assert len(book["laws"][0]["routes"]["upcycled"]["method_3"]["draws"]["c"]) == book["draws"] <= M.DRAWS


@pytest.mark.parametrize("name", [name for name in KNOWN if name in SHARED])
def test_head_start_is_the_tokens_that_the_shared_curve_saves(name):
    params = UPCYCLED_PARAMS[name]
    H, kappa = laws.head_start(name, params, 3e4, 1e6), params.get("kappa", 0.0)
    from_scratch = math.exp(kappa) * laws.predict("moe", {k: params[k] for k in MOE_PARAMS}, N=3e4, D=1e6 + H)
    assert laws.predict(name, params, N=3e4, D1=1e6, D2=1e6) == pytest.approx(from_scratch, rel=1e-9)


def test_a_pilot_answers_for_its_checkpoint_with_intervals_that_grow_with_the_distance(tmp_path):
    # H = 64 and f = 192 in one layer: a Llama of 4 h² + 3 h f + 3 h parameters without embedding and head
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1,
              "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 257}
    (tmp_path / "config.json").write_text(json.dumps(config))
    N = 4 * 64 ** 2 + 3 * 64 * 192 + 3 * 64
    content = json.loads(json.dumps(PILOT).replace("30000.0", f"{N}.0"))
    widths = {}
    for tokens in (4e5, 1.6e6, 3.1e6):
        options = P.Options(checkpoint=str(tmp_path), tokens=tokens)  # D1 is that of the pilot
        book = M.make_book("laws.json", content)
        found = P.answer_now(book, P.ask(options, content, book))
        assert (found["N"], found["D1"]) == (N, 1e6)
        assert set(found["options"]) == {P.UPCYCLE, P.DENSE, P.SCRATCH}
        upcycled = found["options"][P.UPCYCLE]
        assert upcycled["loss"] == pytest.approx(100.0 * (tokens + 4e5) ** -0.3 + 1.3)
        assert found["options"][P.SCRATCH]["loss"] == pytest.approx(100.0 * tokens ** -0.3 + 1.3)
        D = 1e6 + found["options"][P.DENSE]["tokens"]
        assert found["options"][P.DENSE]["loss"] == pytest.approx(13.0 * D ** -0.1)
        assert found["laws"]["upcycled.head_start"]["head_start"] == 4e5
        widths[tokens] = math.log(upcycled["interval"][1] / upcycled["interval"][0])
    for tokens in (1.6e6, 3.1e6):  # 1 % of the loss per factor e beyond D2 = 400k
        form = 0.01 * math.log(tokens / 4e5)
        inside = widths[4e5] / (2 * 1.645)
        assert widths[tokens] == pytest.approx(2 * 1.645 * math.hypot(inside, form), rel=0.1)
    far = P.answer_now(book, P.ask(P.Options(checkpoint=str(tmp_path), tokens=1e7), content, book))
    assert far["verdict"] == "void" and "D2 = 10M is 25 times above" in far["says"]

# ---------------------------------------------------------------------------------------------------------
# From nothing


def test_fresh_split_is_the_closed_form_without_interaction():
    params = LAWS["upcycled"]["params"] | {"alpha3": 0.0}
    content = CONTENT | {"laws": LAWS | {"upcycled": LAWS["upcycled"] | {"params": params}}}
    for cost in (1.0, 5 / 3):
        plan = P.answer_fresh(book_of(content, cost), question(1e9, flops=1e21))["options"][P.SPLIT]["plan"]
        assert 6e9 * plan["D1"] / 1e21 == pytest.approx(0.043 / (0.043 + 0.085),
                                                        rel=1e-4)  # A x^-a1 y^-a2 with x + y fixed
        assert 6e9 * (plan["D1"] + cost * plan["D2"]) == pytest.approx(1e21)


def test_fresh_split_beats_its_neighbours():
    found = P.answer_fresh(BOOK, question(1e9, flops=1e21))
    plan, loss = found["options"][P.SPLIT]["plan"], found["options"][P.SPLIT]["loss"]
    for factor in (0.9, 1.1):
        D1 = plan["D1"] * factor
        assert laws.predict("upcycled", LAWS["upcycled"]["params"], N=1e9, D1=D1,
                            D2=(1e21 / 6e9 - D1) / (5 / 3)) > loss
    assert sum(o["probability_best"] for o in found["options"].values()) == pytest.approx(1.0)


def test_fresh_N_is_the_closed_form_of_the_dense_law():
    p = LAWS["dense"]["params"]  # A D^-a + B N^-b with 6 N D = C: arXiv 2203.15556, equation 4
    flops, power = 1e19, 1 / (p["alpha"] + p["beta"])
    best = (p["beta"] * p["B"] / (p["alpha"] * p["A"])) ** power * (flops / 6) ** (p["alpha"] * power)
    points, refused = P.points_fresh(BOOK, question(0.0, flops=flops))
    assert points[P.ONLY_DENSE][1]["N"] == pytest.approx(best, rel=1e-3) and not refused


def test_fresh_refuses_an_optimum_at_the_end_of_the_search():
    falling = LAWS["upcycled"] | {"params": LAWS["upcycled"]["params"]
                                  | {"alpha1": -0.1}}  # dense training does harm
    book = book_of(CONTENT | {"laws": LAWS | {"upcycled": falling}})
    found = P.answer_fresh(book, question(1e9, flops=1e21))
    assert P.SPLIT not in found["options"] and "one end of the split" in found["refused"][P.SPLIT]
    assert found["best"] == P.SCRATCH
    found = P.answer_fresh(BOOK,
                           question(0.0, flops=1e22))  # dense models want more than eight times the largest N
    assert found["verdict"] == "void" and "best N is not in" in found["says"] and found["pilot"]["flops"] > 0

# ---------------------------------------------------------------------------------------------------------
# Simulated truths


def truth(kind, random):
    """{family: loss as a function of N and tokens} of a made-up world; "dip" is in no law's form."""
    a, beta, E = random.uniform(0.25, 0.5), random.uniform(0.15, 0.4), random.uniform(0.2, 0.8)
    A, B = 2.0 * 3e5 ** a * random.uniform(0.7, 1.3), 3e4 ** beta * random.uniform(0.5, 1.5)
    c, gamma, kappa = 10 ** random.uniform(-0.6, 0.0), random.uniform(0.5, 0.9), random.uniform(0.0, 0.025)

    def moe(N, D):
        return A * D ** -a + B * N ** -beta + E

    def dense(N, D):
        return 1.03 * A * D ** -a + 1.15 * B * N ** -beta + E

    def upcycled(N, D1, D2):
        head = c * 1e6 ** (1 - gamma) * D1 ** gamma
        if kind == "shared":
            return moe(N, D2 + head)
        if kind == "dip":  # a lasting cost, and at small D2 another that passes
            return moe(N, D2 + head) * np.exp(kappa + 0.03 * D1 / (D1 + 10 * D2))
        shift = np.exp(0.02 * np.log(D1 / 1e6) * np.log(D2 / 1e6))
        return 0.85 * A * (D1 * D2) ** (-a / 2) * shift + B * N ** -beta + E

    return {"dense": dense, "moe": moe, "upcycled": upcycled}


def simulated_rows(losses, random, noise=0.003):
    """Rows of a study with noise of trunks and of rows."""
    rows, millions = [], (0.25, 0.5, 1, 2, 4, 8)
    for N in (14e3, 28e3, 56e3):
        for family, D1s in (("dense", [None]), ("moe", [None]), ("upcycled", [0.5, 2, 8])):
            for D1 in D1s:
                luck = noise * random.standard_normal()
                for D in millions[:5] if D1 else millions:
                    counts = {"D1": D1 * 2**20, "D2": D * 2**20} if D1 else {"D": D * 2**20}
                    luck_of_row = noise * random.standard_normal()
                    loss = losses[family](N, *counts.values()) * math.exp(luck + luck_of_row)
                    rows.append({"family": family, "N": N, **counts, "loss": float(loss),
                                 "trunk": f"{family}-{N:g}-{D1}"})
    return rows


def test_of_the_clear_verdicts_95_percent_are_right(tmp_path, capsys):
    """Studies of made-up worlds are fitted, and questions in and around their ranges are answered."""
    asked, clear, right, inside, held = 0, 0, 0, [], []
    for seed, kind in enumerate(("shared", "dip", "interaction")):
        random = np.random.default_rng(seed)
        losses = truth(kind, random)
        path = tmp_path / f"{seed}.jsonl"
        path.write_text("\n".join(map(json.dumps, simulated_rows(losses, random))))
        out = tmp_path / str(seed)
        names = ["dense", "moe", *(law for law in laws.RIVALS if law != "upcycled.head_start")]
        fit_laws.main(from_dict(fit_laws.Options, {"rows": [str(path)], "out": str(out), "laws": names,
                                                   "draws": 40}))
        book = book_of(M.read_laws(str(out / "laws.json"))[0], 1.6)
        for _ in range(150):
            N, D1, tokens = np.exp(random.uniform(np.log([1e4, 2e5, 1e5]), np.log([2e5, 3e7, 3e7])))
            here = question(N, D1, 6 * N * 1.6 * tokens)
            found = P.compare(book, {option: (family, P.spent(book, here, family, N))
                                     for option, family in P.NOW.items()})
            true = {P.DENSE: losses["dense"](N, D1 + 1.6 * tokens), P.SCRATCH: losses["moe"](N, tokens),
                    P.UPCYCLE: losses["upcycled"](N, D1, tokens)}
            asked, clear = asked + 1, clear + (found["verdict"] == "clear")
            right += found["verdict"] == "clear" and found["best"] == min(true, key=true.get)
            inside += [found["verdict"] == "clear"] * (not found["warnings"])
            held += [one["interval"][0] <= true[option] <= one["interval"][1]
                     for option, one in found["options"].items()]
    capsys.readouterr()
    with capsys.disabled():
        print(f" [{clear} of {asked} verdicts are clear, {right} of them are right; inside the data "
              f"{sum(inside)} of {len(inside)} are clear; {np.mean(held):.1%} of {len(held)} intervals of "
              "90 % hold the truth]", end="")
    assert clear >= 0.05 * asked and right >= 0.95 * clear
    assert len(held) > 600 and np.mean(held) >= 0.85

# ---------------------------------------------------------------------------------------------------------
# What a planned study will find


def study_rows(D1=(1e9, 1e10, 1e11), D2=(1e9, 1e10, 1e11), N=(1e7, 1e8, 1e9)):
    rows = [{"family": family, "N": n, "D": d, "trunk": f"{family}{n}"} for family in ("dense", "moe")
            for n in N for d in (1e9, 1e10, 1e11)]
    return rows + [{"family": "upcycled", "N": n, "D1": a, "D2": b, "trunk": f"{n}-{a}"} for n in N
                   for a in D1 for b in D2]


def test_expected_errors_are_those_of_simulated_studies():
    rows, noise = study_rows(), SimpleNamespace(noise=0.001, trunk_noise=0.0005)
    expected = plan_design.expected(LAWS, study_rows(), noise, 1e9, 1e11)
    random, alpha3 = np.random.default_rng(0), []
    for _ in range(120):
        luck = {}
        for row in rows:
            trunk = luck.setdefault(row["trunk"], noise.trunk_noise * random.standard_normal())
            loss = laws.predict(row["family"], LAWS[row["family"]]["params"],
                                **{v: row[v] for v in FAMILIES[row["family"]]})
            row["loss"] = float(loss * np.exp(trunk + noise.noise * random.standard_normal()))
        alpha3.append(plan_design.fit(rows, {family: family for family in FAMILIES},
                                      delta=0.1).params("upcycled")["alpha3"])
    error = expected["s.e. of alpha3"]
    assert error == pytest.approx(np.std(alpha3), rel=4 / math.sqrt(2 * 120))
    assert expected["power"] == pytest.approx(np.mean(np.abs(np.array(alpha3)) / error > 1.96), abs=0.15)
    assert expected["D2*"] == pytest.approx(51e9, rel=0.02) and expected["s.e. of ln D2*"] > 0


def test_a_design_is_fitted_by_the_form_of_its_laws():
    params = {}
    for family, nu in (("dense", 0.1), ("moe", 0.2), ("upcycled", 0.15)):
        own = LAWS[family]["params"]
        params[family] = own | {"nu": nu, "A": own["A"] * 1e9 ** nu}
    found = plan_design.expected({family: LAWS[family] | {"params": own} for family, own in params.items()},
                                 study_rows(), SimpleNamespace(noise=0.001, trunk_noise=0.001), 1e8, 1e11)
    star = laws.overtaking(1e11, lambda tokens: laws.predict("moe", params["moe"], N=1e8, D=tokens)
                           - laws.predict("upcycled", params["upcycled"], N=1e8, D1=1e11, D2=tokens))
    assert found["D2*"] == pytest.approx(float(star), rel=0.01) and 1e9 < star < math.inf


def test_one_more_level_tightens_alpha3():
    noise = SimpleNamespace(noise=0.005, trunk_noise=0.003)
    base = plan_design.expected(LAWS, study_rows(), noise, 1e9, 1e11)
    for rows in (study_rows(D1=(1e9, 1e10, 1e11, 1e12)), study_rows(D2=(1e9, 1e10, 1e11, 1e12)),
                 study_rows(N=(1e7, 1e8, 1e9, 1e10))):
        more = plan_design.expected(LAWS, rows, noise, 1e9, 1e11)
        assert more["s.e. of alpha3"] < base["s.e. of alpha3"] and more["power"] > base["power"]


def test_design_says_what_a_study_finds_at_its_largest_N_and_D1(monkeypatch, capsys):
    import sweep
    monkeypatch.setattr(sweep, "load_tokens", lambda directory,
                        split: (None, {"vocab_size": 257}))  # no data in tests
    design = {"laws": QUICK, "design": os.path.join(ROOT, "config", "study_quick.py")}
    found = json.loads(run(capsys, json=True, **design))
    assert (found["N"], found["D1"], found["rows"]) == (55536, 2**22, 88)
    totals = sweep.study_totals(parse(sweep.Study, [design["design"], "--train_withheld"]))
    assert found["s.e. of alpha3"] > 0 and found | totals == found
    other = json.loads(run(capsys, json=True, N=1e5, D1=1e6, flops_per_gpu=1e12, mfu=0.5, **design))
    assert (other["N"], other["D1"]) == (1e5, 1e6) and other["s.e. of alpha3"] == found["s.e. of alpha3"]
    assert other["hours"] == pytest.approx(found["flops"] / 1.8e15)
    heading, names, values = run(capsys, **design).splitlines()
    assert heading.startswith(f"Were {QUICK} true") and f"{found['s.e. of alpha3']:.3g}" in values

# ---------------------------------------------------------------------------------------------------------
# The command and the page


def command(*words):
    return subprocess.run([sys.executable, os.path.join(ROOT, "plan.py"), *words], capture_output=True,
                          text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(capsys, **options):
    P.main(from_dict(P.Options, {"laws": TABLE2} | options))
    return capsys.readouterr().out


def test_command_answers(capsys):
    said = run(capsys, N=1e9, D1=1e11, tokens=5e10)
    assert "No option is clearly best" in said and "assumed" in said and "D2*, the tokens after which" in said
    found = json.loads(run(capsys, N=1e9, D1=1e11, tokens=5e10, json=True))
    factor = np.interp(math.log(1e9), np.log([396545280, 1013936896]), [2.0374369353, 1.9155728129])
    assert found["verdict"] == "mixed" and found["flops"] == pytest.approx(5e10 * 6e9 * factor)
    fresh = json.loads(run(capsys, fresh=True, N=1e9, flops=1e21, json=True))
    assert set(fresh["options"]) == {P.ONLY_DENSE, P.SCRATCH, P.SPLIT}
    assert "Cannot say" in run(capsys, N=8e9, D1=15e12, tokens=1e11)


def test_losses_are_also_in_bits_a_byte_where_the_laws_say_how_many_a_nat_is(tmp_path, capsys):
    path = tmp_path / "laws.json"
    asked = {"N": 3e4, "D1": 1e6, "tokens": 1e6, "laws": str(path)}
    texts, answers = [], []
    for content in (BY_METHOD, BY_METHOD | {"bits_per_nat": 0.3}):
        path.write_text(json.dumps(content))
        texts.append(run(capsys, **asked))
        answers.append(json.loads(run(capsys, json=True, **asked)))
    without, found = answers
    for part in ("options", "methods"):
        for name, one in found[part].items():
            assert one.pop("bits_per_byte") == pytest.approx(0.3 * one["loss"], rel=1e-12)
            assert f"{one['loss']:.4f} nats a token ({0.3 * one['loss']:.4f} bits a byte)" in texts[1]
    assert found == without and "bits a byte" not in texts[0]


# A page's scripts with elements that hold what is put into them and nothing else.
STUB = """{
const fs = require("fs"), vm = require("vm"), elements = {}, [page, hash] = process.argv.slice(1);
const element = () => ({ insertAdjacentHTML() {}, addEventListener() {} });
globalThis.document = { getElementById: id => elements[id] ||= element() };
globalThis.location = { hash };
for (const [, script] of fs.readFileSync(page, "utf8").matchAll(/<script>(.*?)<\\/script>/gs))
  vm.runInThisContext(script);
const { result, verdict, tables } = elements;
console.log(JSON.stringify([result.textContent, verdict.textContent, tables.innerHTML]));
}"""


def opened(path, fragment=""):
    """(the answer that the page shows as JSON, the verdict it shows, its HTML or that of its tables, its
    console's lines), in a browser, or by node where there is none."""
    if not CHROMIUM:
        done = subprocess.run([NODE, "-e", STUB, path, fragment], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        result, verdict, tables = json.loads(done.stdout)
        return json.loads(result), verdict, tables, done.stderr.splitlines()
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                           "--virtual-time-budget=9000",
                           "--dump-dom", f"file://{path}{fragment}"], capture_output=True, text=True,
                          timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    result = re.search(r'id="result">(.*?)</script>', done.stdout, re.S)
    verdict = re.search(r'<p id="verdict"[^>]*>(.*?)</p>', done.stdout, re.S)
    assert result and verdict, console
    return json.loads(html.unescape(result[1])), html.unescape(verdict[1]), done.stdout, console


def assert_same(page, ours, where=""):
    """Numbers agree to 1e-9 of their size, all else exactly."""
    assert type(page) is type(ours) or {type(page), type(ours)} == {int, float}, where
    if isinstance(ours, dict):
        assert set(page) == set(ours), where
        for key in ours:
            assert_same(page[key], ours[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(page) == len(ours), where
        for i, pair in enumerate(zip(page, ours)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(ours, float):
        assert page == pytest.approx(ours, rel=1e-9, abs=1e-12), where
    else:
        assert page == ours, where


DENSE_AND_MOE = {"version": 1, "laws": {name: LAWS[name] for name in ("dense", "moe")}}
BY_METHOD = version2(KNOWN[3:], methods={"copy": {}, "drop_0.5": {"c": 20.0}})


@pytest.mark.skipif(not (CHROMIUM or NODE), reason="neither a browser nor node is installed")
@pytest.mark.parametrize("content, options, moved", [
    (CONTENT, {"N": 1e9, "D1": 1e11, "tokens": 5e10}, {"D1": 9e12, "N": 1.2e9}),
    (M.read_laws(QUICK)[0], {"N": 3e4, "D1": 1e6, "tokens": 1e6}, {"flops": 2e12, "num_local_experts": 16}),
    (BY_METHOD | {"bits_per_nat": 0.3}, {"N": 3e4, "D1": 5e6, "tokens": 1e6}, {"N": 2e5}),
    (PILOT, {"N": 3e4, "D1": 1e6, "tokens": 1e6}, {"flops": 4e11}),
    (DENSE_AND_MOE, {"N": 1e9, "D1": 1e11, "tokens": 5e10}, {"flops": 1e22})])
def test_the_page_says_what_the_command_says(tmp_path, capsys, content, options, moved):
    path, page = tmp_path / "laws.json", str(tmp_path / "page.html")
    path.write_text(json.dumps(content))
    ours = json.loads(run(capsys, laws=str(path), html=page, json=True, **options))
    text = open(page).read()
    assert len(text) < 500_000 and not re.search(r"(src|href)=|https?://|@import|fetch\(",
                                                 text)  # nothing is loaded
    for given in ({}, moved):  # as the sliders would have it
        if given:
            given = {name: ours[name] for name in ("N", "D1", "flops", *M.MOE)} | given
            budget = {"tokens": 0.0, "flops": given.pop("flops")}
            ours = json.loads(run(capsys, laws=str(path), json=True, **options | budget | given))
        fragment = "#" + "&".join(f"{name}={ours[name]!r}"
                                  for name in ("N", "D1", "flops", "num_local_experts")) if given else ""
        found, verdict, tables, console = opened(page, fragment)
        assert console == [] and verdict == ours["says"]
        assert_same(found, ours)
        shown = html.unescape(re.sub(r"\s+", " ", tables))
        for line in plan_page.say_answer(ours)[1:]:  # every sentence of the command
            assert line.startswith("  ") or line.removeprefix("warning: ") in shown
        for method in ours["methods"].values() if len(ours["methods"]) > 1 else ():
            assert all(f"<td>{cell}</td>" in shown for cell in plan_page.say_head(method))


@pytest.mark.skipif(not (CHROMIUM or NODE), reason="neither a browser nor node is installed")
def test_the_page_of_a_plan_from_nothing_has_the_answers_around_its_budget(tmp_path, capsys):
    page = str(tmp_path / "page.html")
    ours = json.loads(run(capsys, html=page, json=True, fresh=True, N=1e9, flops=1e21))
    found, verdict, _, console = opened(page)
    assert console == [] and verdict == ours["says"]
    assert_same(found, ours)
    more = json.loads(run(capsys, json=True, fresh=True, N=1e9, flops=1e21 * 30 ** (2 / 15)))
    nearest = opened(page, "#flops=1.57e21")[0]  # of the budgets of which the page has an answer
    assert nearest["flops"] == pytest.approx(more["flops"])
    for option, expected in more["options"].items():
        assert nearest["options"][option]["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_help_into_a_closed_pipe_is_silent():
    done = subprocess.run(f"{sys.executable} {os.path.join(ROOT, 'plan.py')} --help | head -1", shell=True,
                          capture_output=True, text=True)
    assert done.stdout.startswith("usage") and done.stderr == ""


@pytest.mark.parametrize("options, said", [
    (dict(N=1, D1=1e11, tokens=5e10), "--N=1 is too small for a raw count; did you mean --N=1e9"),
    (dict(N=1e9, D1=100, tokens=5e10), "did you mean --D1=100e9"),
    (dict(N=1e9, D1=1e11, tokens=50), "did you mean --tokens=50e9"),
    (dict(N=1e9, D1=1e11, flops=500), "too small"), (dict(N=1e9, D1=1e11), "give one budget"),
    (dict(N=1e9, D1=1e11, tokens=1e9, flops=1e20), "got tokens, flops"),
    (dict(N=1e9, tokens=1e9), "--D1= is missing"), (dict(D1=1e9, tokens=1e9), "--N= is missing"),
    (dict(N=1e9, D1=1e11, gpu_hours=5), "--flops_per_gpu"),
    (dict(N=1e9, D1=1e11, gpu_hours=5, flops_per_gpu=1e15, mfu=40), "mfu: 40.0 is not in"),
    (dict(N=-1e9, D1=1e11, tokens=1e9), "N: -1000000000.0 is not at least 0"),
    (dict(N=1e9, D1=1e11, gpu_hours=5, flops_per_gpu=989), "did you mean --flops_per_gpu=989e12"),
    (dict(N=5000, D1=1e11, tokens=1e9), "did you mean --N=5e+09"),
    (dict(N=1e9, D1=1e5, tokens=5e10), "did you mean --D1=1e+11"),
    (dict(N=1e9, D1=1e11, flops=1e12), "86.9 tokens at N = 1e+09, too few"),
    (dict(fresh=True, flops=1e7), "too few to plan N"), (dict(design="x", noise=0.0), "noise: 0.0"),
    (dict(fresh=True, tokens=1e10), "--tokens as a budget needs --N="),
    (dict(N=1e9, D1=1e11, tokens=1e9, num_experts_per_tok=9), "num_experts_per_tok"),
    (dict(checkpoint="/nowhere"), "/nowhere"),
    (dict(N=1e9, D1=1e11, tokens=5e10, html="/proc/none/a.html"), "/proc/none/a.html: cannot be written")])
def test_bad_input_is_refused_with_the_fix(options, said):
    with pytest.raises(ConfigError) as error:
        P.main(from_dict(P.Options, {"laws": TABLE2} | options))
    assert said in str(error.value) and "\n" not in str(error.value)


def changed(*keys, value):
    """The laws of the quick study as JSON with one value replaced."""
    with open(QUICK) as file:
        content = place = json.load(file)
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return content


@pytest.mark.parametrize("keys, value, said", [
    (("laws", "dense", "params", "E"), math.nan, "laws.dense.params.E = nan is not a finite number"),
    (("laws", "moe", "params", "A"), -5, "laws.moe.params.A = -5 must be positive"),
    (("laws", "upcycled", "params", "alpha1"), math.inf,
     "laws.upcycled.params.alpha1 = inf is not a finite number"),
    (("laws", "upcycled", "params", "B"), True, "laws.upcycled.params.B = True is not a finite number"),
    (("laws", "upcycled", "draws", "A", 3), "x", "laws.upcycled"),
    (("laws", "upcycled", "draws", "A", 3), math.nan, "laws.upcycled.draws.A = nan"),
    (("laws", "upcycled", "draws", "A"), [], "laws.upcycled"),
    (("laws", "upcycled", "draws", "A"), [1.0], "laws.upcycled"),
    (("laws", "upcycled", "draws"), 3, "laws.upcycled"),
    (("laws", "upcycled", "beside", "moe", "params", "A"), 0, "beside.moe.params.A = 0 must be positive"),
    (("laws", "upcycled", "held_out", "D2"), 7, "not of a laws file"),
    (("laws", "upcycled", "misfit", "moe"), -1, "misfit.moe = -1"),
    (("laws", "upcycled", "held_out", "D2", "rms"), math.nan, "laws.upcycled.held_out.D2"),
    (("ranges", "dense", "N"), [-1e5, 1e4], "ranges.dense.N"), (("ranges", "dense", "N"), 5, "not of a laws"),
    (("ranges",), [], "not of a laws file"), (("version",), 3, "version 3"),
    (("models", 0, "flops_per_token"), -1, "flops_per_token = -1 must be positive"),
    (("models", 0, "N"), [], "not of a laws file"), (("bits_per_nat",), "x", "not of a laws file"),
    (("bits_per_nat",), -1, "bits_per_nat = -1 must be positive"),
    (("warm_up",), "x", "not of a laws file"), (("warm_up",), math.nan, "warm_up = nan"),
    (("laws", "moe", "misfit", "moe"), 1e308, "misfit.moe"),
    (("laws", "upcycled", "methods"), {"copy": {"params": UPCYCLED_PARAMS["upcycled.additive"]}},
     "methods.copy"),
    (("origin",), {"moe": {"num_local_experts": ["many"]}}, "not of a laws file"),
    (("laws", "cubic"), {"params": {}}, "laws.cubic"), (("laws",), {}, "holds no laws"),
    (("laws",), 3, "not of a laws file"),
    (("origin",), {"dense": {"data_sha256": ["aaa"]}, "upcycled": {"data_sha256": ["bbb"]}},
     "different origin"),
    (("origin",), {"dense": {"tokenizer": ["gpt2"]}, "moe": {"tokenizer": ["bytes"]}},
     "tokenizer is dense gpt2; moe bytes"),
    (("origin",), {"moe": {"num_local_experts": [8]}, "upcycled": {"num_local_experts": [16]}},
     "num_local_experts")])
def test_broken_laws_files_are_refused_in_one_line_with_file_and_key(tmp_path, keys, value, said):
    path = tmp_path / "laws.json"
    path.write_text(json.dumps(changed(*keys, value=value)))
    with pytest.raises(ConfigError) as error:
        P.main(P.Options(laws=str(path), N=3e4, D1=1e6, tokens=1e6))
    assert str(error.value).startswith(str(path)) and said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', "[" * 100000])
def test_files_that_are_no_laws_file_are_refused(tmp_path, text):
    path = tmp_path / "laws.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="laws.json"):
        M.read_laws(str(path))


def test_laws_of_one_origin_are_taken():
    origin = {family: {"data_sha256": ["aaa"], "tokenizer": ["gpt2"], "max_seq_len": [128],
                       "num_local_experts": [4.0], "num_experts_per_tok": [1.0]} for family in FAMILIES}
    origin["dense"] |= {"num_local_experts": [], "num_experts_per_tok": []}
    origin["upcycled"]["num_local_experts"] = [16.0, 4.0]  # a method with finer experts
    book = book_of(version2(["upcycled"], origin=origin))
    assert book["moe"] == {"num_local_experts": 4, "num_experts_per_tok": 1}


def test_command_line_error_is_one_line():
    done = command("--N=1", "--D1=1e11", "--tokens=5e10")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean --N=1e9" in done.stderr
