"""The laws engine against planted laws, finite differences, scipy, and simulation; the row reader against bad rows."""
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import least_squares

import fit_laws as F
import laws
import report
from rows import FAMILIES, RowError, clean, read_rows
from configurator import parse

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "laws", "liew2025.json")) as file:
    TABLE2 = {law: entry["params"] for law, entry in json.load(file)["laws"].items()}
HEAD_START = {"dense": dict(A=20.0, alpha=0.15, B=12.3, beta=0.2, E=1.0), "moe": dict(A=60.0, alpha=0.22, B=7.05, beta=0.16, E=1.0),
              "upcycled.effective_data_shared": dict(A=60.0, alpha=0.22, c=80.0, gamma=0.67, B=7.05, beta=0.16, E=1.0)}
THREE = {family: family for family in FAMILIES}
SHARED = {"dense": "dense", "moe": "upcycled.effective_data_shared", "upcycled": "upcycled.effective_data_shared"}
SIZES, DATA = [1.5e7, 6e7, 2.5e8, 1e9], np.geomspace(1e9, 1e11, 5)


def simulate(truth, system=THREE, N=SIZES, D=DATA, D1=DATA[::2], D2=DATA, noise=0.0, trunk_noise=0.0, seed=0, copies=1):
    """Rows from laws, the formulas written out here; a trunk is (family, N, D1, copy)."""
    random, rows = np.random.default_rng(seed), []
    for n in N:
        for family, points in (("dense", [{"D": d} for d in D]), ("moe", [{"D": d} for d in D]), ("upcycled", [{"D1": a, "D2": b} for a in D1 for b in D2])):
            effects = {}
            for point in points if family in system else ():
                law, p = system[family], truth[system[family]]
                if "effective" in law:
                    head = p["c"] * point["D1"] ** p["gamma"] if "D1" in point else 0.0
                    term = p["A"] * (point.get("D2", point.get("D")) + head) ** -p["alpha"]
                elif law == "upcycled.additive":
                    term = p["A1"] * point["D1"] ** -p["alpha1"] + p["A2"] * point["D2"] ** -p["alpha2"]
                elif family == "upcycled":
                    term = p["A"] * point["D1"] ** -p["alpha1"] * point["D2"] ** (-p["alpha2"] + p.get("alpha3", 0.0) * math.log(point["D1"]))
                else:
                    term = p["A"] * point["D"] ** -p["alpha"]
                for copy in range(copies):
                    trunk = f"{n}-{point.get('D1')}-{copy}"
                    effect = effects.setdefault(trunk, trunk_noise * random.standard_normal())
                    loss = (term + p["B"] * n ** -p["beta"] + p["E"]) * math.exp(effect + noise * random.standard_normal())
                    rows.append({"family": family, "N": n, **point, "trunk": trunk, "seed": copy, "loss": float(loss)})
    return rows


def assert_params(found, truth, tolerance=1e-6):
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=tolerance), name


# Planted laws

@pytest.mark.parametrize("family", FAMILIES)
def test_recovers_planted_table2_alone(family):
    fit = laws.fit(simulate(TABLE2, {family: family}), {family: family})
    assert_params(fit.params(family), TABLE2[family])


def test_recovers_planted_table2_with_shared_E():
    fit = laws.fit(simulate(TABLE2), THREE)
    assert fit.problem.names.count("E") == 1 and len(fit.theta) == 4 + 4 + 6 + 1
    for family in FAMILIES:
        assert_params(fit.params(family), TABLE2[family])


@pytest.mark.parametrize("law, truth", [
    ("upcycled.no_interaction", dict(A=16.3, alpha1=0.043, alpha2=0.085, B=8.53, beta=0.112, E=0.165)),
    ("upcycled.additive", dict(A1=5.0, alpha1=0.12, A2=9.0, alpha2=0.15, B=8.53, beta=0.112, E=0.5)),
    ("upcycled.effective_data", dict(A=60.0, alpha=0.22, c=80.0, gamma=0.8, B=7.05, beta=0.16, E=1.0))])
def test_recovers_planted_rivals(law, truth):
    system = {"upcycled": law}
    assert_params(laws.fit(simulate({law: truth}, system), system).params(law), truth)


def test_recovers_planted_head_start_shared_with_from_scratch():
    fit = laws.fit(simulate(HEAD_START, SHARED, N=[4e4, 1e5, 3e5], D=np.geomspace(2e5, 8e6, 5), D1=np.geomspace(5e5, 8e6, 4), D2=np.geomspace(2e5, 8e6, 5)), SHARED)
    assert_params(fit.params("upcycled.effective_data_shared"), HEAD_START["upcycled.effective_data_shared"])


def test_one_N_folds_the_B_term_into_E_and_two_fold_E_into_it():
    p = TABLE2["upcycled"]
    one = laws.fit(simulate(TABLE2, {"upcycled": "upcycled"}, N=[1e8]), {"upcycled": "upcycled"})
    assert_params(one.params("upcycled"), p | {"B": 0.0, "beta": 0.0, "E": p["E"] + p["B"] * 1e8 ** -p["beta"]})
    two = laws.fit(simulate(TABLE2, {"upcycled": "upcycled"}, N=[1e8, 1e9]), {"upcycled": "upcycled"})
    found = two.params("upcycled")
    assert found["E"] == 0.0 and "two levels" in two.problem.fixed["upcycled"]["E"][1]
    for n in (1e8, 1e9):
        assert found["B"] * n ** -found["beta"] == pytest.approx(p["E"] + p["B"] * n ** -p["beta"], rel=1e-6)


def moe_rows(loss, experts=(4, 8, 16, 64), N=(1e7, 4e7, 1.6e8, 6e8), D=(1e9, 4e9, 1.6e10, 6e10), noise=0.0):
    random, rows = np.random.default_rng(0), []
    for e in experts:
        for n in N:
            for d in D:
                row = {"family": "moe", "N": n, "N_active": 1.5 * n, "N_total": n * (0.3 + 0.7 * e), "num_local_experts": e, "num_experts_per_tok": 2, "D": d}
                rows.append(row | {"loss": loss(row) * math.exp(noise * random.standard_normal())})
    return rows


def test_recovers_planted_joint_moe_law():
    def loss(r):
        e = math.log(r["num_local_experts"])
        return 36 * math.exp(0.22 * e) * r["N_active"] ** (-0.19 - 0.01 * e) + 36 * math.exp(-0.55 * e) * r["D"] ** (-0.18 + 0.026 * e) + 1.36
    truth = dict(a=36.0, delta=0.22, alpha=-0.19, gamma=-0.01, b=36.0, omega=-0.55, beta=-0.18, zeta=0.026, c=1.36)
    assert_params(laws.fit(moe_rows(loss), {"moe": "moe.joint"}, ()).params("moe.joint"), truth, 1e-4)


def test_recovers_the_predictions_of_a_planted_optimal_sparsity_law():
    def loss(r):
        share = r["num_experts_per_tok"] / r["num_local_experts"]
        return 1600 * r["N_total"] ** -0.5 + 500 * r["D"] ** -0.35 + 0.46 * share ** 0.17 + 17 * share ** -0.16 * r["N_total"] ** -0.2 + 0.94
    fit = laws.fit(moe_rows(loss), {"moe": "moe.optimal_sparsity"}, ())
    assert np.abs(fit.residual).max() < 1e-6  # five terms: many coefficients predict alike


@pytest.mark.parametrize("law, truth", [("moe.sparsity", dict(A=12.0, alpha=0.05, beta=0.1, E=0.5)), ("moe.sparsity_additive", dict(A=1.0, alpha=0.3, B=9.0, beta=0.12, E=0.5))])
def test_recovers_planted_sparsity_laws(law, truth):
    def loss(r):
        ratio = r["N_total"] / r["N_active"]
        if "additive" in law:
            return truth["A"] * ratio ** -truth["alpha"] + truth["B"] * r["N_active"] ** -truth["beta"] + truth["E"]
        return truth["A"] * ratio ** -truth["alpha"] * r["N_active"] ** -truth["beta"] + truth["E"]
    assert_params(laws.fit(moe_rows(loss, D=(1e9,)), {"moe": law}, ()).params(law), truth, 1e-5)


# The engine

SYSTEMS = [THREE, SHARED, THREE | {"upcycled": "upcycled.additive"}, {"moe": "moe.joint"}, {"moe": "moe.optimal_sparsity"}]


@pytest.mark.parametrize("system", SYSTEMS)
def test_jacobian_is_that_of_finite_differences(system):
    rows = simulate(TABLE2) if "dense" in system else moe_rows(lambda r: 3.0 + r["N"] ** -0.1)
    problem = laws.build(rows, system)
    theta = laws.grid_starts(problem)[::4]
    _, jacobian = laws.evaluate(problem, theta)
    for j, step in enumerate(1e-6 * np.eye(theta.shape[1])):
        numeric = (laws.evaluate(problem, theta + step)[0] - laws.evaluate(problem, theta - step)[0]) / 2e-6
        assert np.abs(numeric - jacobian[:, j]).max() < 1e-8, problem.names[j]


@pytest.mark.parametrize("system, share", [(system, ("E",)) for system in SYSTEMS[:3]] + [
    (THREE, share) for share in ((), ("B", "beta"), ("E", "beta"), ("E", "B", "beta"), ("alpha",))] + [({"dense": "dense", "moe": "moe"}, ("A", "alpha"))])
def test_engine_and_formula_predict_alike(system, share):
    rows = simulate(TABLE2, noise=0.1)
    fit = laws.fit(rows, system, share)
    for name in share:
        assert len({float(fit.params(law)[name]) for law in set(system.values()) if name in fit.params(law)}) == 1
    for family, law in system.items():
        here = np.array([row["family"] == family for row in fit.problem.rows])
        mine = [row for row in rows if row["family"] == family]
        point = {name: np.array([row[name] for row in mine]) for name in FAMILIES[family]}
        if "effective" in law and family == "moe":
            point = {"N": point["N"], "D1": 0.0, "D2": point["D"]}
        assert np.allclose(np.log(laws.predict(law, fit.params(law), **point)), (fit.problem.y - fit.residual)[here], rtol=0, atol=1e-10)


@pytest.mark.parametrize("share, system", [(("E", "B"), THREE), (("A",), THREE), (("A", "alpha"), THREE), (("A", "alpha"), SHARED)])
def test_a_coefficient_is_shared_only_with_its_exponents(share, system):
    with pytest.raises(F.ConfigError, match=f"can share {share[-1] if share[-1] != 'alpha' else 'A'} only where its exponents"):
        laws.fit(simulate(TABLE2), system, share)


def test_no_random_start_finds_a_lower_objective():
    random = np.random.default_rng(0)
    for seed in range(10):
        truth, system = ((TABLE2, THREE), (HEAD_START, SHARED))[seed % 2]
        fit = laws.fit(simulate(truth, system, noise=0.005, trunk_noise=0.003, seed=seed), (THREE, SHARED, THREE | {"upcycled": "upcycled.additive"})[seed % 3])
        low, high = np.where(fit.problem.is_log, -3.0, -0.1), np.where(fit.problem.is_log, 1.0, 0.6)
        starts = random.uniform(low, high, (100, len(fit.theta)))
        assert laws.descend(fit.problem, starts, fit.delta)[1].min() > fit.cost * (1 - 1e-6)
        other = least_squares(lambda t: laws.evaluate(fit.problem, t[None])[0][0] - fit.problem.y, starts[0], loss="huber", f_scale=fit.delta, max_nfev=300)
        assert other.cost > fit.cost * (1 - 1e-6)


def test_many_weighted_refits_are_what_scipy_finds_one_by_one():
    fit = laws.fit(simulate(TABLE2, {"upcycled": "upcycled"}, noise=0.004), {"upcycled": "upcycled"})
    random = np.random.default_rng(1)
    y, weights = fit.problem.y + 0.004 * random.standard_normal((6, len(fit.problem.y))), random.integers(0, 3, (6, len(fit.problem.y)))
    _, cost = laws.descend(fit.problem, np.tile(fit.theta, (6, 1)), 0.005, y, weights)
    for k in range(6):
        again = np.repeat(np.arange(len(y[k])), weights[k])  # a row of weight 2 is there twice
        scipy = least_squares(lambda t: (laws.evaluate(fit.problem, t[None])[0][0] - y[k])[again], fit.theta, loss="huber", f_scale=0.005, x_scale="jac",
                              jac=lambda t: laws.evaluate(fit.problem, t[None])[1][0].T[again], xtol=1e-14, ftol=1e-14, gtol=1e-14)
        assert cost[k] == pytest.approx(scipy.cost, rel=1e-6)


def test_an_outlier_hardly_moves_the_fit_and_delta_is_honoured():
    rows = simulate(TABLE2, {"dense": "dense"}, noise=0.002)
    clean = laws.fit(rows, {"dense": "dense"}).params("dense")
    rows[7] = rows[7] | {"loss": rows[7]["loss"] * 1.3}

    def shift(fit):
        at = {"N": 1e8, "D": 1e10}
        return abs(math.log(laws.predict("dense", fit.params("dense"), **at) / laws.predict("dense", clean, **at)))
    robust, squares = laws.fit(rows, {"dense": "dense"}), laws.fit(rows, {"dense": "dense"}, delta=10.0)
    assert robust.delta < 0.01 and squares.delta == 10.0
    assert shift(robust) < 0.002 < shift(squares)


def test_profile_of_E_passes_through_the_planted_alpha3():
    fit = laws.fit(simulate(TABLE2, noise=0.001), THREE)
    profile = F.profile_E(fit, "upcycled")
    assert min(profile["objective"]) > -1e-9
    at = np.interp(fit.params("upcycled")["E"], profile["E"], profile["alpha3"])
    assert at == pytest.approx(fit.params("upcycled")["alpha3"], abs=1e-4)
    assert profile["alpha3"][0] > 0 > profile["alpha3"][-1]  # a wrong E turns its sign


# Uncertainty

def coverage(system, law, targets, sets, draws, by_trunk=(True,), **design):
    """Share of 95 % intervals that hold the truth of Table 2, for each way of drawing; targets are functions of a law's parameters."""
    hits = np.zeros((len(by_trunk), sets, len(targets)))
    for seed in range(sets):
        fit = laws.fit(simulate(TABLE2, system, seed=seed, **design), system)
        for way, trunks in enumerate(by_trunk):
            params = fit.params(law, F.bootstrap(fit, draws, seed, trunks))
            for k, target in enumerate(targets):
                low, high = np.quantile(target(params), [0.025, 0.975])
                hits[way, seed, k] = low <= target(TABLE2[law]) <= high
    return hits.mean(axis=(1, 2))


def test_intervals_cover_under_row_noise():
    targets = [lambda p, name=name: p[name] for name in ("alpha1", "alpha2", "alpha3", "beta")]
    covered, = coverage({"upcycled": "upcycled"}, "upcycled", targets, 50, 150, D2=DATA[::2], noise=0.005)
    assert 0.90 <= covered <= 0.99


def test_trunk_bootstrap_covers_better_than_row_bootstrap_under_clustered_noise():
    def gain(p):  # between trunks: what more dense training is worth
        return np.log(laws.predict("upcycled", p, N=2.5e8, D1=1e9, D2=1e10) / laws.predict("upcycled", p, N=2.5e8, D1=1e11, D2=1e10))
    clustered, rowwise = coverage({"upcycled": "upcycled"}, "upcycled", [gain], 50, 100, (True, False), N=SIZES[1:],
                                  D1=np.geomspace(1e9, 1e11, 4), noise=0.001, trunk_noise=0.005)
    assert 0.88 <= clustered <= 1.0 and rowwise < clustered - 0.15


def test_variance_components_are_found():
    rows = simulate(TABLE2, noise=0.002, trunk_noise=0.006, copies=6, seed=3)
    fit = laws.fit(rows, THREE)
    row, trunk, row_df, trunk_df = F.variances(fit, F.trunk_of(fit.problem.rows))
    assert math.sqrt(row) == pytest.approx(0.002, rel=4 / math.sqrt(2 * row_df)) and math.sqrt(trunk) == pytest.approx(0.006, rel=4 / math.sqrt(2 * trunk_df))


def test_asymptotic_errors_agree_with_the_bootstrap_where_the_law_is_well_identified():
    fit = laws.fit(simulate(TABLE2, noise=0.001, D=np.geomspace(1e8, 1e12, 8), N=np.geomspace(1e6, 1e10, 6)), THREE)
    draws, errors = fit.params("dense", F.bootstrap(fit, 400)), F.standard_errors(fit, "dense")
    for name in ("alpha", "beta"):
        assert errors[name] == pytest.approx(draws[name].std(), rel=0.25)


# Truth tests

def test_a_true_law_extrapolates_and_a_wrong_one_does_not():
    rows = simulate(TABLE2, D1=np.geomspace(1e9, 1e11, 4))
    for name in ("D1", "D2", "N"):
        held, error = F.extrapolate(rows, THREE, "upcycled", name, ("E",), "auto")
        assert {row[name] for row in held} == {max(row[name] for row in rows if row["family"] == "upcycled")}
        assert np.abs(error).max() < 1e-6
        wrong = F.extrapolate(rows, THREE | {"upcycled": "upcycled.additive"}, "upcycled.additive", name, ("E",), "auto")[1]
        assert np.abs(wrong).max() > 1e-3


def test_shared_law_extrapolates_upcycled_rows_where_the_moe_has_too_few_levels():
    rows = simulate(HEAD_START, SHARED, D=DATA[::2], D1=np.geomspace(1e9, 1e11, 4))
    rows = [row for row in rows if not (row["family"] == "moe" and row["D"] == DATA[2])]
    system = F.plan_fits(rows)[0]["upcycled.effective_data_shared"][0]
    for name in ("D1", "D2", "N"):
        held, error = F.extrapolate(rows, system, "upcycled.effective_data_shared", name, ("E",), "auto")
        assert {row["family"] for row in held} == {"upcycled"} and np.abs(error).max() < 1e-5


def test_a_parameter_at_a_bound_or_whose_interval_reaches_it_is_not_identified():
    fit = laws.fit(simulate(TABLE2, {"dense": "dense"}, noise=0.001), {"dense": "dense"})
    place, theta = fit.problem.names.index("dense:beta"), np.tile(fit.theta, (100, 1))
    assert "beta" not in F.unidentified(fit, "dense", theta)
    theta[:4, place] = fit.problem.high[place]
    assert "bound" in F.unidentified(fit, "dense", theta)["beta"]


def test_held_out_rows_do_not_reach_the_fit():
    rows = simulate(TABLE2, D1=np.geomspace(1e9, 1e11, 4), noise=0.003)
    top = max(row["D1"] for row in rows if "D1" in row)
    spoiled = [row | {"loss": row["loss"] * 2} if row.get("D1") == top else row for row in rows]
    errors = [F.extrapolate(r, THREE, "upcycled", "D1", ("E",), "auto")[1] for r in (rows, spoiled)]
    assert np.allclose(errors[1] - errors[0], math.log(2), atol=1e-9)
    fit, trunk = laws.fit(rows, THREE), next(row["trunk"] for row in rows if "D1" in row)
    hit = np.array([row["trunk"] == trunk for row in fit.problem.rows])
    spoiled = laws.Fit(fit.problem, fit.theta, fit.delta, fit.cost, fit.residual)
    before = F.leave_trunk_out(fit)
    spoiled.problem.y = fit.problem.y + np.where(hit, math.log(2), 0.0)
    assert np.allclose((F.leave_trunk_out(spoiled) - before)[hit], math.log(2), atol=1e-5)


def test_true_law_has_the_lowest_aicc():
    for truth, system in ((TABLE2, THREE), (HEAD_START, SHARED)):
        rows = simulate(truth, system, noise=0.002)
        fits, _ = F.plan_fits(rows, laws.RIVALS)
        aicc = {law: F.aicc(laws.fit(mine, its)) for law, (its, mine) in fits.items()}
        assert min(aicc, key=aicc.get) == system["upcycled"]


# Rows

GOOD = {"family": "dense", "N": 1e6, "D": 1e9, "loss": 3.0}


@pytest.mark.parametrize("line, complaint", [
    ('{"family": "dense", "N": 1e6, "loss": 3}', "D is missing"), ('{"family": "dense", "N": 1e6, "D": "", "loss": 3}', "D is missing"),
    ('{"family": "dense", "N": 0, "D": 1e9, "loss": 3}', "N: 0.0 is not positive"), ('{"family": "dense", "N": 1e6, "D": 1e9, "loss": NaN}', "loss: nan"),
    ('{"family": "dense", "N": 1e6, "D": 1e9, "loss": -2}', "loss: -2.0 is not positive"), ('{"family": "dense", "N": "many", "D": 1e9, "loss": 3}', "'many' is not a number"),
    ('{"family": "dense", "N": true, "D": 1e9, "loss": 3}', "True is not a number"), ('{"family": "Dense", "N": 1e6, "D": 1e9, "loss": 3}', "family 'Dense' is none of dense, moe, upcycled"),
    ('{"family": "upcycled", "N": 1e6, "D1": 1e9, "loss": 3}', "D2 is missing"), ('{"family": "upcycled", "N": 1e6, "D1": 0, "D2": 1, "loss": 3}', "D1: 0.0"),
    ('{"family": "dense", "N": 1e6, "D": 1e17, "loss": 3}', "D: 1e+17 is not within"), ("[1, 2]", "not a JSON object"), ("{", "not valid JSON"), ('{"family": "dense", "N": 1e6, "D": 1e9, "loss": 3.1}', "but the same run has 3 at"),
    ('{"family": "dense", "N": 1' + "0" * 400 + ', "D": 1e9, "loss": 3}', "not a number")])
def test_bad_rows_are_refused_with_file_and_line_or_dropped_and_counted(tmp_path, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(RowError) as error:
        read_rows([str(path)])
    assert f"{path}:3: " in str(error.value) and complaint in str(error.value) and "\n" not in str(error.value)
    rows, dropped = read_rows([str(path)], skip_bad=True)
    assert len(rows) == 1 and len(dropped) == 1 and complaint in dropped[0]


def test_csv_and_jsonl_give_the_same_rows_and_repeats_count_once(tmp_path):
    rows = simulate(TABLE2)
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    table.write_text("\ufefffamily,N,D,D1,D2,loss,trunk,seed,note\r\n" + "".join(
        f"{r['family']},{r['N']!r},{float(r['D']) if 'D' in r else ''},{float(r['D1']) if 'D1' in r else ''},{float(r['D2']) if 'D2' in r else ''},{r['loss']!r},{r['trunk']},{r['seed']},\"a, b\"\r\n" for r in rows))
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows))
    a, b = read_rows([str(table)])[0], read_rows([str(lines), str(lines)])[0]
    assert len(a) == len(b) == len(rows) and all(x["note"] == "a, b" for x in a)
    assert [[x.get(k) for k in ("family", "N", "D", "D1", "D2", "loss")] for x in a] == [[x.get(k) for k in ("family", "N", "D", "D1", "D2", "loss")] for x in b]


def test_columns_of_other_families_and_knobs_of_the_method(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("family,N,D,D1,D2,loss,method,drop_ratio\ndense,1e6,1e9,0,nan,3,,\nupcycled,1e6,2e9,1e9,1e9,2.9,drop,0.5\nupcycled,1e6,0,1e9,1e9,2.8,drop,0.25\n")
    rows, _ = read_rows([str(path)])
    assert [set(row) & {"D", "D1", "D2"} for row in rows] == [{"D"}, {"D1", "D2"}, {"D1", "D2"}]
    assert [report.method_label(row) for row in rows[1:]] == ["drop 0.5", "drop 0.25"]


NUMBERS = st.sampled_from([1, 2.0, "3", 1e6, 1e7, 1e-6, 1e16])


@settings(max_examples=150)
@given(st.lists(st.fixed_dictionaries({"family": st.sampled_from(list(FAMILIES)), "N": NUMBERS, "D": NUMBERS, "D1": NUMBERS, "D2": NUMBERS, "loss": NUMBERS},
                                      optional={"trunk": st.integers(0, 3), "N_active": NUMBERS, "N_total": NUMBERS}), min_size=1, max_size=24))
def test_whatever_rows_can_be_read_can_be_planned(rows):
    fits, lacks = F.plan_fits([clean(row) for row in rows])
    assert set(fits) | set(lacks) == set(laws.LAWS)


@settings(max_examples=12)
@given(st.integers(0, 2 ** 32 - 1), st.sampled_from([(1e7, 1e8, 1e9), (1e-6, 1.0, 1e16), (1e6, 1.000001e6, 3e6)]), st.sampled_from([0.1, 1.0, 6.0]))
def test_few_and_odd_rows_that_are_accepted_can_be_fitted(seed, D, spread):
    random = np.random.default_rng(seed)
    rows = [clean({"family": family, "N": 1e6, "D": d, "D1": d, "D2": e, "loss": float(np.clip(random.lognormal(0, spread), 1e-6, 1e6))})
            for family in FAMILIES for d in D for e in D]
    rows = [row for row in rows if random.random() < 0.7]
    for law, (system, mine) in F.plan_fits(rows)[0].items():
        fit = laws.fit(mine, system)
        assert math.isfinite(F.aicc(fit)) and all(map(math.isfinite, fit.params(law).values()))


@settings(max_examples=150)
@given(st.binary(max_size=300) | st.lists(st.dictionaries(st.sampled_from(["family", "N", "D", "D1", "D2", "loss", "trunk", "N_active"]),
       st.sampled_from(["dense", "upcycled", "moe"]) | st.integers() | st.floats() | st.text(max_size=8) | st.none() | st.booleans() | st.lists(st.integers(), max_size=2)),
       max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()), st.sampled_from(["jsonl", "csv"]))
def test_reader_never_crashes(tmp_path_factory, content, kind):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes((b"family,N,D,D1,D2,loss\n" if kind == "csv" else b"") + content)
    for skip in (False, True):
        try:
            rows, dropped = read_rows([str(path)], skip)
        except RowError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert rows and all(row[k] > 0 and math.isfinite(row[k]) for row in rows for k in (*FAMILIES[row["family"]], "loss"))


def test_missing_levels_are_named():
    assert laws.missing(simulate(TABLE2, D=DATA[:2]), {"dense": "dense"}) == ["needs 3 levels of D, has 2"]
    assert laws.missing(simulate(TABLE2, D1=DATA[:1]), {"upcycled": "upcycled"}) == ["needs 3 levels of D1, has 1"]
    assert laws.missing(simulate(TABLE2, {"dense": "dense"}), THREE) == ["has no moe rows", "has no upcycled rows"]
    assert laws.missing(simulate(TABLE2, N=[1e8], D=DATA[:3]), {"dense": "dense"}) == ["has 3 rows for 3 parameters, needs 6"]
    fits, lacks = F.plan_fits(simulate(TABLE2, {"dense": "dense", "upcycled": "upcycled"}))
    assert "upcycled.additive" in fits and fits["upcycled"][0] == {"dense": "dense", "upcycled": "upcycled"}
    assert lacks["moe"] == lacks["upcycled.effective_data_shared"] == "has no moe rows" and "levels of experts" in F.plan_fits(simulate(TABLE2))[1]["moe.joint"]


# The command

def test_command_writes_laws_report_and_figures(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = simulate(HEAD_START, SHARED, N=[4e4, 1e5, 3e5], D=np.geomspace(2e5, 8e6, 4), D1=np.geomspace(5e5, 8e6, 3), D2=np.geomspace(2e5, 8e6, 4), noise=0.004)
    path.write_text("".join(json.dumps(row | {"N_active": 1.5 * row["N"], "N_total": 5 * row["N"]}) + "\n" for row in rows))
    F.main(F.Options(rows=[str(path)], out=str(tmp_path / "a"), draws=20))
    printed = capsys.readouterr().out
    assert "skipped moe.joint" in printed and "upcycled.effective_data_shared" in printed and "alpha3 = " in printed
    written = json.loads((tmp_path / "a" / "laws.json").read_text())
    read, _ = read_rows([str(path)])  # the same command gives the same draws
    again = laws.fit(read, THREE)
    assert written["laws"]["moe"]["draws"]["alpha"] == pytest.approx(again.params("moe", F.bootstrap(again, 20))["alpha"], rel=1e-6)
    assert written["version"] == 1 and written["active_ratio"] == 1.5 and written["ranges"]["upcycled"]["D1"] == pytest.approx([5e5, 8e6])
    assert set(written["laws"]) == {"dense", "moe", *laws.RIVALS}
    assert len(written["at_each_N"]) == 3 and all(set(its) == set(laws.RIVALS) and its["upcycled"]["n"] == 12 for its in written["at_each_N"].values())
    for law in laws.RIVALS:  # each with the laws of its own fit
        beside = written["laws"][law]["beside"]
        assert set(beside) == ({"dense"} if law.endswith("_shared") else {"dense", "moe"})
        assert all(len(values) == 20 for entry in beside.values() for values in entry["draws"].values())
    assert written["laws"]["upcycled"]["beside"]["moe"]["params"] == written["laws"]["moe"]["params"] != written["laws"]["upcycled.additive"]["beside"]["moe"]["params"]
    for law, entry in written["laws"].items():
        assert list(entry["params"]) == list(entry["ci95"]) == list(entry["draws"]) == laws.parameter_names(law)
        assert all(len(values) == 20 for values in entry["draws"].values())
        assert entry["n"] == sum(entry["fitted_with"].get(row["family"]) == law for row in rows)
    figures = {"loss_against_D2", "slope_against_D1", "predicted_against_measured", "contours", "residuals", "alpha3_along_E"}
    text = (tmp_path / "a" / "report.md").read_text()
    assert "parametric bootstrap" in text and "p <= 0.095" in text
    for name in figures:
        assert (tmp_path / "a" / f"{name}.png").stat().st_size > 5000 and (tmp_path / "a" / f"{name}.pdf").stat().st_size > 5000 and f"]({name}.png)" in text


def test_methods_are_paired_by_seed_and_may_miss_cells():
    def row(method, seed, d2, loss, **knobs):
        return {"family": "upcycled", "N": 1e6, "D1": 1e7, "D2": d2, "seed": seed, "method": method, "loss": loss, **knobs}
    rows = [row("copy", seed, d2, 2.0 + seed) for seed in range(3) for d2 in (1e6, 2e6)]
    rows += [row("noise", seed, d2, (2.0 + seed) * 1.01, noise_std=0.1) for seed in (2, 0) for d2 in (2e6, 1e6)]
    rows += [row("drop", 1, 1e6, 3.3, drop_ratio=0.5)]
    differences = report.method_differences(rows)
    assert {cell[2]: its for cell, its in differences["noise 0.1 σ"].items()} == {d2: pytest.approx({"0": 0.01, "2": 0.01}) for d2 in (1e6, 2e6)}
    lines = report.method_lines(differences)
    assert "+1.00 %" in lines[2] and "| 2     | 2" in lines[2] and "+10.00 %" in lines[3] and "nan" not in "".join(lines)
    report.plt.close(report.methods_against_copy(differences))


def test_command_says_what_is_wrong_in_one_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("family,N,D,loss\ndense,1e6,1e9,3\ndense,1e6,2e9,2.9\n")
    for words, said in ((["--laws=dense"], "--laws: dense needs 3 levels of D, has 2"), (["--laws=dens"], "no law 'dens'"), (["--draws=3"], "draws: 3 is not at least 20"),
                        ([], "no law can be fitted"), ([str(tmp_path / "none.csv")], "No such file"), (["--delta=0"], "--delta=0 is not positive"), (["--seed=-1"], "seed: -1"),
                        (["--share=E,alpha9"], "'alpha9' is none of A, alpha, B, beta, E")):
        with pytest.raises(F.ConfigError, match=said):
            F.main(parse(F.Options, [str(path), f"--out={tmp_path / 'out'}", *words]))
    full = tmp_path / "full.jsonl"
    full.write_text("".join(json.dumps(row) + "\n" for row in simulate(TABLE2, {"dense": "dense"})))
    with pytest.raises(F.ConfigError, match="cannot be a directory"):
        F.main(parse(F.Options, [str(full), f"--out={path}"]))
    done = subprocess.run([sys.executable, os.path.join(ROOT, "fit_laws.py"), str(path), "--laws=dense"], capture_output=True, text=True)
    assert done.returncode == 2 and "has 2" in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
