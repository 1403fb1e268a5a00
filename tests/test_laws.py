"""Laws and the engine that fits them, against planted laws, finite differences and scipy."""
import math

import numpy as np
import pytest
from scipy.optimize import least_squares

import engine
import laws
import problem
import report
from rows import FAMILIES
from simulated import DATA, HEAD_START, PILOT, SHARED, SMALL, TABLE2, THREE, shared_system, simulate


def assert_params(found, truth, tolerance=1e-6):
    for name, value in truth.items():
        assert found[name] == pytest.approx(value, rel=tolerance), name


# Planted laws

@pytest.mark.parametrize("family", FAMILIES)
def test_recovers_planted_table2_alone(family):
    params = engine.fit(simulate(TABLE2, {family: family}), {family: family}).params(family)
    assert params.keys() == TABLE2[family].keys()
    assert_params(params, TABLE2[family])


def test_recovers_planted_table2_with_shared_E():
    fit = engine.fit(simulate(TABLE2), THREE)
    assert fit.problem.names.count("E") == 1 and len(fit.theta) == 4 + 4 + 6 + 1
    for family in FAMILIES:
        assert_params(fit.params(family), TABLE2[family])


@pytest.mark.parametrize("law, truth", [
    ("upcycled.no_interaction", dict(A=16.3, alpha1=0.043, alpha2=0.085, B=8.53, beta=0.112, E=0.165)),
    ("upcycled.additive", dict(A1=5.0, alpha1=0.12, A2=9.0, alpha2=0.15, B=8.53, beta=0.112, E=0.5)),
    ("upcycled.effective_data", dict(A=60.0, alpha=0.22, c=80.0, gamma=0.8, B=7.05, beta=0.16, E=1.0))])
def test_recovers_planted_rivals(law, truth):
    system = {"upcycled": law}
    assert_params(engine.fit(simulate({law: truth}, system), system).params(law), truth)


@pytest.mark.parametrize("law", [law for law in HEAD_START if law in laws.SHARED_CURVE])
def test_recovers_planted_head_starts_shared_with_from_scratch(law):
    system = shared_system(law)
    params = engine.fit(simulate(HEAD_START, system, **SMALL), system).params(law)
    assert set(params) == set(laws.parameter_names(law))
    assert_params(params, HEAD_START[law], 1e-5)
    if law in laws.MATCHING:
        dense = {name.removeprefix("dense_"): params[name] for name in params if name.startswith("dense_")}
        assert_params(dense, HEAD_START["dense"], 1e-5)


def test_a_pilot_on_one_checkpoint_finds_its_head_start():
    rows, law = simulate(HEAD_START, SHARED, **PILOT), "upcycled.head_start"
    curve, system = HEAD_START["moe"], {"dense": "dense.local", "moe": law, "upcycled": law}
    assert problem.missing(rows, system) == []
    fit = engine.fit(rows, system)
    floor = curve["E"] + curve["B"] * 1e5 ** -curve["beta"]  # at one N
    assert_params(fit.params(law), {"A": curve["A"], "alpha": curve["alpha"], "H": 80 * 4e6 ** 0.67,
                                    "B": 0.0, "E": floor}, 1e-4)
    found = laws.predict(law, fit.params(law), N=1e5, D1=4e6, D2=8e6)
    assert found == pytest.approx(curve["A"] * (8e6 + 80 * 4e6 ** 0.67) ** -curve["alpha"] + floor, rel=1e-5)
    assert laws.head_start(law, fit.params(law), N=1e5, D1=4e6) == fit.params(law)["H"]
    dense = [row for row in rows if row["family"] == "dense"]
    slope, _ = np.polyfit(np.log([row["D"] for row in dense]), np.log([row["loss"] for row in dense]), 1)
    assert fit.params("dense.local")["alpha"] == pytest.approx(-slope, rel=0.05)
    for lacking, said in (({"N": [1e5, 2e5]}, "is for one level of N, has 2"),
                          ({"D1": [1e6, 4e6]}, "is for one level of D1, has 2"),
                          ({"D": [1e6, 2e6]}, "needs 3 levels of D, has 2")):
        assert said in problem.missing(simulate(HEAD_START, SHARED, **PILOT | lacking),
                                       {"moe": law, "upcycled": law})


def test_loss_matching_with_delta_0_needs_no_upcycled_row():
    truth = HEAD_START | {"upcycled.loss_matching": HEAD_START["upcycled.loss_matching"] | {"delta": 0.0}}
    rows = simulate(truth, shared_system("upcycled.loss_matching"), **SMALL)
    system = {"dense": "dense", "moe": "upcycled.loss_matching_0"}
    params = engine.fit(rows, system).params("upcycled.loss_matching_0")
    for row in rows:
        if row["family"] == "upcycled":
            found = laws.predict("upcycled.loss_matching_0", params, N=row["N"], D1=row["D1"], D2=row["D2"])
            assert found == pytest.approx(row["loss"], rel=1e-5)


def test_each_method_has_its_own_head_start_and_handicap():
    system, law, rows = shared_system("upcycled.handicap"), "upcycled.handicap", []
    own = {"copy": {}, "mine: v2": dict(c=60.0, kappa=0.005), "noise": dict(c=70.0, kappa=0.03)}
    for method, change in own.items():
        truth = HEAD_START | {law: HEAD_START[law] | change}
        for row in simulate(truth, system, **SMALL):
            if row["family"] == "upcycled":
                rows.append(row | {"method": method})
            elif method == "copy":
                rows.append(row)
    fit = engine.fit(rows, system)
    assert fit.problem.methods == ["copy", "mine: v2", "noise"]
    for method, change in own.items():
        assert_params(fit.params(law, method=method), HEAD_START[law] | change, 1e-5)
    assert fit.params(law) == fit.params(law, method="copy")


@pytest.mark.parametrize("law", ["upcycled", "upcycled.additive", "upcycled.effective_data",
                                 "upcycled.handicap", "upcycled.saturating", "upcycled.loss_matching"])
def test_A_that_depends_on_N_is_recovered_where_it_was_planted(law):
    system = shared_system(law) if law in laws.SHARED_CURVE else THREE | {"upcycled": law}
    rows = simulate(TABLE2, THREE, **SMALL)
    planted = engine.fit(rows, system, A_of_N=True).params(law) | {"nu": 0.1}
    dense = {name.removeprefix("dense_"): planted[name] for name in planted if name.startswith("dense_")}
    truth = []
    for row in rows:  # the loss of every row comes from a law with nu
        own = system[row["family"]]
        params = planted if own == law else dense or HEAD_START["dense"] | {"nu": 0.1}
        point = {name: row[name] for name in FAMILIES[row["family"]]}
        truth.append(row | {"loss": float(laws.predict(own, params, **point))})
    fit = engine.fit(truth, system, share=(), A_of_N=True)
    assert np.abs(fit.residual).max() < 1e-4
    assert fit.params(law)["nu"] == pytest.approx(0.1, abs=0.02)


def test_one_N_folds_the_B_term_into_E_and_two_fold_E_into_it():
    p = TABLE2["upcycled"]
    one = engine.fit(simulate(TABLE2, {"upcycled": "upcycled"}, N=[1e8]), {"upcycled": "upcycled"})
    folded = p | {"B": 0.0, "beta": 0.0, "E": p["E"] + p["B"] * 1e8 ** -p["beta"]}
    assert_params(one.params("upcycled"), folded)
    two = engine.fit(simulate(TABLE2, {"upcycled": "upcycled"}, N=[1e8, 1e9]), {"upcycled": "upcycled"})
    found = two.params("upcycled")
    assert found["E"] == 0.0 and "two levels" in two.problem.fixed["upcycled"]["E"]
    for n in (1e8, 1e9):
        assert found["B"] * n ** -found["beta"] == pytest.approx(p["E"] + p["B"] * n ** -p["beta"], rel=1e-6)


def test_one_D_folds_the_data_term_into_E():
    p = TABLE2["dense"]
    rows = simulate(TABLE2, {"dense": "dense"}, N=np.geomspace(1e7, 1e9, 6), D=[1e10])
    assert problem.missing(rows, {"dense": "dense"}) == []
    found = engine.fit(rows, {"dense": "dense"}).params("dense")
    assert_params(found, p | {"A": 0.0, "alpha": 0.0, "E": p["E"] + p["A"] * 1e10 ** -p["alpha"]})


def test_levels_within_5_percent_are_one():
    assert problem.levels([88, 89, 100, 104, 105.1, math.nan]) == [88, 100, 105.1]
    rows = simulate(TABLE2, {"dense": "dense"}, D=[1e9, 1.04e9, 1.08e9])
    assert problem.missing(rows, {"dense": "dense"}) == ["needs 3 levels of D, has 2"]


def test_moe_rows_of_many_expert_counts_do_not_move_the_dense_law():
    rows = simulate(TABLE2, noise=0.002)
    alone = engine.fit(rows, {"dense": "dense"}).params("dense")
    mixed = [row | {"num_local_experts": 4 ** (i % 4), "loss": row["loss"] * (1.1 - 0.1 * (i % 4))}
             if row["family"] == "moe" else row for i, row in enumerate(rows)]
    found = engine.fit(mixed, {"dense": "dense", "moe": "moe"})
    assert_params(found.params("dense"), alone, 1e-5)


def moe_rows(loss, experts=(4, 8, 16, 64), N=(1e7, 4e7, 1.6e8, 6e8), D=(1e9, 4e9, 1.6e10, 6e10), noise=0.0):
    random, rows = np.random.default_rng(0), []
    for e in experts:
        for n in N:
            for d in D:
                row = {"family": "moe", "N": n, "N_active": 1.5 * n, "N_total": n * (0.3 + 0.7 * e),
                       "num_local_experts": e, "num_experts_per_tok": 2, "D": d}
                rows.append(row | {"loss": loss(row) * math.exp(noise * random.standard_normal())})
    return rows


def test_recovers_planted_joint_moe_law():
    def loss(r):
        e = math.log(r["num_local_experts"])
        return (36 * math.exp(0.22 * e) * r["N_active"] ** (-0.19 - 0.01 * e)
                + 36 * math.exp(-0.55 * e) * r["D"] ** (-0.18 + 0.026 * e) + 1.36)
    truth = dict(a=36.0, delta=0.22, alpha=-0.19, gamma=-0.01, b=36.0, omega=-0.55, beta=-0.18, zeta=0.026,
                 c=1.36)
    assert_params(engine.fit(moe_rows(loss), {"moe": "moe.joint"}, ()).params("moe.joint"), truth, 1e-4)


def test_recovers_the_predictions_of_a_planted_optimal_sparsity_law():
    def loss(r):
        share = r["num_experts_per_tok"] / r["num_local_experts"]
        return (1600 * r["N_total"] ** -0.5 + 500 * r["D"] ** -0.35 + 0.46 * share ** 0.17
                + 17 * share ** -0.16 * r["N_total"] ** -0.2 + 0.94)
    fit = engine.fit(moe_rows(loss), {"moe": "moe.optimal_sparsity"}, ())
    assert np.abs(fit.residual).max() < 1e-6  # five terms: many coefficients predict alike


@pytest.mark.parametrize("law, truth", [
    ("moe.sparsity", dict(A=12.0, alpha=0.05, beta=0.1, E=0.5)),
    ("moe.sparsity_additive", dict(A=1.0, alpha=0.3, B=9.0, beta=0.12, E=0.5))])
def test_recovers_planted_sparsity_laws(law, truth):
    def loss(r):
        ratio, size = r["N_total"] / r["N_active"], r["N_active"] ** -truth["beta"]
        term = truth["A"] * ratio ** -truth["alpha"]
        return (term + truth["B"] * size if "additive" in law else term * size) + truth["E"]
    assert_params(engine.fit(moe_rows(loss, D=(1e9,)), {"moe": law}, ()).params(law), truth, 1e-5)


def test_loss_matching_gives_the_published_law_from_its_dense_and_moe_laws():
    D = np.array([1e10, 1e11])
    for sizes, low, high in (([1.5e7, 1e8], -2.06, 1.52), ([1e9], -3.54, -1.39)):
        error = 100 * report.compared(TABLE2, np.array(sizes)[:, None, None], D[:, None], D)[0]
        assert error.min() == pytest.approx(low, abs=0.05) and error.max() == pytest.approx(high, abs=0.05)


def test_a_matched_head_start_is_where_the_two_curves_have_one_loss():
    params = HEAD_START["upcycled.loss_matching"] | {f"dense_{k}": v for k, v in HEAD_START["dense"].items()}
    head = laws.head_start("upcycled.loss_matching", params, N=1e5, D1=1e6)
    dense = laws.predict("dense", HEAD_START["dense"], N=1e5, D=1e6)
    moe = laws.predict("moe", HEAD_START["moe"], N=1e5, D=head)
    assert moe == pytest.approx(math.exp(0.01) * dense, rel=1e-12)


# The engine

SYSTEMS = [THREE, THREE | {"upcycled": "upcycled.additive"}, THREE | {"upcycled": "upcycled.effective_data"},
           *(shared_system(law) for law in HEAD_START if law in laws.SHARED_CURVE),
           {"dense": "dense", "moe": "upcycled.loss_matching_0"}]


def rows_of_two_methods():
    rows = simulate(HEAD_START, shared_system("upcycled.handicap"), noise=0.01, **SMALL)
    return [row | {"method": ("copy", "drop")[i % 2]} if row["family"] == "upcycled" else row
            for i, row in enumerate(rows)]


@pytest.mark.parametrize("A_of_N", [False, True])
@pytest.mark.parametrize("system", SYSTEMS + [{"moe": "moe.joint"}, {"moe": "moe.optimal_sparsity"}])
def test_jacobian_is_that_of_finite_differences(system, A_of_N):
    rows = rows_of_two_methods() if "dense" in system else moe_rows(lambda r: 3.0 + r["N"] ** -0.1)
    built = problem.Problem(rows, system, A_of_N=A_of_N)
    random, first = np.random.default_rng(0), engine.starts(built)[:3]
    theta = np.clip(first + 0.1 * random.standard_normal(first.shape), built.low, built.high)
    _, jacobian = engine.evaluate(built, theta)
    for j, step in enumerate(1e-6 * np.eye(theta.shape[1])):
        above, below = (engine.evaluate(built, theta + sign * step)[0] for sign in (1, -1))
        assert np.abs((above - below) / 2e-6 - jacobian[:, j]).max() < 3e-8, built.names[j]


@pytest.mark.parametrize("A_of_N", [False, True])
@pytest.mark.parametrize("system, share", [(system, ("E",)) for system in SYSTEMS] + [
    (THREE, share) for share in ((), ("B", "beta"), ("E", "beta"), ("E", "B", "beta"), ("alpha",))])
def test_engine_and_formula_predict_alike(system, share, A_of_N):
    rows = rows_of_two_methods()
    fit = engine.fit(rows, system, share, A_of_N=A_of_N)
    for name in share:
        assert len({float(fit.params(law)[name]) for law in system.values() if name in fit.params(law)}) == 1
    for row, fitted in zip(fit.problem.rows, fit.problem.y - fit.residual):
        law, point = system[row["family"]], {name: row[name] for name in FAMILIES[row["family"]]}
        found = laws.predict(law, fit.params(law, method=row.get("method")), **point)
        assert math.log(found) == pytest.approx(fitted, abs=1e-9)


def test_no_random_start_finds_a_lower_objective():
    random = np.random.default_rng(0)
    for seed in range(10):
        truth, system = ((TABLE2, THREE), (HEAD_START, SHARED))[seed % 2]
        rows = simulate(truth, system, noise=0.005, trunk_noise=0.003, seed=seed)
        fit = engine.fit(rows, SYSTEMS[seed % 7])
        low, high = np.where(fit.problem.is_log, -3.0, -0.1), np.where(fit.problem.is_log, 1.0, 0.6)
        starts = np.clip(random.uniform(low, high, (100, len(fit.theta))), fit.problem.low, fit.problem.high)
        assert engine.descend(fit.problem, starts, fit.delta)[1].min() > fit.cost * (1 - 1e-6)


def test_many_whitened_refits_are_what_scipy_finds_one_by_one():
    fit = engine.fit(simulate(TABLE2, {"upcycled": "upcycled"}, noise=0.004), {"upcycled": "upcycled"})
    random, n = np.random.default_rng(1), len(fit.problem.y)
    y = fit.problem.y + 0.004 * random.standard_normal((6, n))
    whiten = np.eye(n) + 0.05 * random.standard_normal((n, n))
    whiten[:5] = 0.0
    theta, cost = engine.descend(fit.problem, np.tile(fit.theta, (6, 1)), 0.005, y, whiten)
    for k in range(6):
        for start, least in ((fit.theta, 0.0), (theta[k], cost[k] * (1 - 1e-6))):
            scipy = least_squares(
                lambda t: whiten @ (engine.evaluate(fit.problem, t[None])[0][0] - y[k]), start,
                loss="huber", jac=lambda t: whiten @ engine.evaluate(fit.problem, t[None])[1][0].T,
                f_scale=0.005, x_scale="jac", xtol=1e-14, ftol=1e-14, gtol=1e-14)
            assert least <= scipy.cost and cost[k] <= scipy.cost * (1 + 1e-6)


def test_an_outlier_hardly_moves_the_fit_and_delta_is_honoured():
    rows = simulate(TABLE2, {"dense": "dense"}, noise=0.002)
    clean = engine.fit(rows, {"dense": "dense"}).params("dense")
    rows[7] = rows[7] | {"loss": rows[7]["loss"] * 1.3}

    def shift(fit):
        losses = [laws.predict("dense", params, N=1e8, D=1e10) for params in (fit.params("dense"), clean)]
        return abs(math.log(losses[0] / losses[1]))

    robust, squares = (engine.fit(rows, {"dense": "dense"}, delta=delta) for delta in (0.003, 10.0))
    assert shift(robust) < 0.002 < shift(squares)


def test_missing_levels_are_named():
    assert problem.missing(simulate(TABLE2, D=DATA[:2]), {"dense": "dense"}) == ["needs 3 levels of D, has 2"]
    one_D1 = simulate(TABLE2, D1=DATA[:1])
    assert problem.missing(one_D1, {"upcycled": "upcycled"}) == ["needs 3 levels of D1, has 1"]
    dense = simulate(TABLE2, {"dense": "dense"})
    assert problem.missing(dense, THREE) == ["has no moe rows", "has no upcycled rows"]
    few = simulate(TABLE2, N=[1e8], D=DATA[:3])
    assert problem.missing(few, {"dense": "dense"}) == ["has 3 rows for 3 parameters, needs 6"]
    mixed = moe_rows(lambda row: 3.0)
    del mixed[5]["N_active"]
    assert problem.missing(mixed, {"moe": "moe.joint"}) == ["has rows without N_active"]
    assert problem.missing(few, {"dense": "dense"}, A_of_N=True) == ["has 3 rows for 3 parameters, needs 6"]
    one_D = simulate(TABLE2, {"dense": "dense"}, N=[1e7, 1e8], D=[1e10])
    assert problem.missing(one_D, {"dense": "dense"}) == ["needs 3 levels of N, has 2, at one D"]
