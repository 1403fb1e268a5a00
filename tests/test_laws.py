"""The laws engine against planted laws, finite differences and scipy."""

import math

import numpy as np
import pytest
from scipy.optimize import least_squares

import fit_laws as F
import laws
import uncertainty
from rows import FAMILIES
from simulated import HEAD_START, SHARED, TABLE2, THREE, simulate


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


@pytest.mark.parametrize(
    "law, truth",
    [
        ("upcycled.no_interaction", dict(A=16.3, alpha1=0.043, alpha2=0.085, B=8.53, beta=0.112, E=0.165)),
        ("upcycled.additive", dict(A1=5.0, alpha1=0.12, A2=9.0, alpha2=0.15, B=8.53, beta=0.112, E=0.5)),
        ("upcycled.effective_data", dict(A=60.0, alpha=0.22, c=80.0, gamma=0.8, B=7.05, beta=0.16, E=1.0)),
    ],
)
def test_recovers_planted_rivals(law, truth):
    system = {"upcycled": law}
    assert_params(laws.fit(simulate({law: truth}, system), system).params(law), truth)


def test_recovers_planted_head_start_shared_with_from_scratch():
    fit = laws.fit(
        simulate(
            HEAD_START,
            SHARED,
            N=[4e4, 1e5, 3e5],
            D=np.geomspace(2e5, 8e6, 5),
            D1=np.geomspace(5e5, 8e6, 4),
            D2=np.geomspace(2e5, 8e6, 5),
        ),
        SHARED,
    )
    assert_params(fit.params("upcycled.effective_data_shared"), HEAD_START["upcycled.effective_data_shared"])


def test_one_N_folds_the_B_term_into_E_and_two_fold_E_into_it():
    p = TABLE2["upcycled"]
    one = laws.fit(simulate(TABLE2, {"upcycled": "upcycled"}, N=[1e8]), {"upcycled": "upcycled"})
    assert_params(
        one.params("upcycled"), p | {"B": 0.0, "beta": 0.0, "E": p["E"] + p["B"] * 1e8 ** -p["beta"]}
    )
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
                row = {
                    "family": "moe",
                    "N": n,
                    "N_active": 1.5 * n,
                    "N_total": n * (0.3 + 0.7 * e),
                    "num_local_experts": e,
                    "num_experts_per_tok": 2,
                    "D": d,
                }
                rows.append(row | {"loss": loss(row) * math.exp(noise * random.standard_normal())})
    return rows


def test_recovers_planted_joint_moe_law():
    def loss(r):
        e = math.log(r["num_local_experts"])
        return (
            36 * math.exp(0.22 * e) * r["N_active"] ** (-0.19 - 0.01 * e)
            + 36 * math.exp(-0.55 * e) * r["D"] ** (-0.18 + 0.026 * e)
            + 1.36
        )

    truth = dict(
        a=36.0, delta=0.22, alpha=-0.19, gamma=-0.01, b=36.0, omega=-0.55, beta=-0.18, zeta=0.026, c=1.36
    )
    assert_params(laws.fit(moe_rows(loss), {"moe": "moe.joint"}, ()).params("moe.joint"), truth, 1e-4)


def test_recovers_the_predictions_of_a_planted_optimal_sparsity_law():
    def loss(r):
        share = r["num_experts_per_tok"] / r["num_local_experts"]
        return (
            1600 * r["N_total"] ** -0.5
            + 500 * r["D"] ** -0.35
            + 0.46 * share**0.17
            + 17 * share**-0.16 * r["N_total"] ** -0.2
            + 0.94
        )

    fit = laws.fit(moe_rows(loss), {"moe": "moe.optimal_sparsity"}, ())
    assert np.abs(fit.residual).max() < 1e-6  # five terms: many coefficients predict alike


@pytest.mark.parametrize(
    "law, truth",
    [
        ("moe.sparsity", dict(A=12.0, alpha=0.05, beta=0.1, E=0.5)),
        ("moe.sparsity_additive", dict(A=1.0, alpha=0.3, B=9.0, beta=0.12, E=0.5)),
    ],
)
def test_recovers_planted_sparsity_laws(law, truth):
    def loss(r):
        ratio = r["N_total"] / r["N_active"]
        if "additive" in law:
            return (
                truth["A"] * ratio ** -truth["alpha"]
                + truth["B"] * r["N_active"] ** -truth["beta"]
                + truth["E"]
            )
        return truth["A"] * ratio ** -truth["alpha"] * r["N_active"] ** -truth["beta"] + truth["E"]

    assert_params(laws.fit(moe_rows(loss, D=(1e9,)), {"moe": law}, ()).params(law), truth, 1e-5)


# The engine

SYSTEMS = [
    THREE,
    SHARED,
    THREE | {"upcycled": "upcycled.additive"},
    {"moe": "moe.joint"},
    {"moe": "moe.optimal_sparsity"},
]


@pytest.mark.parametrize("system", SYSTEMS)
def test_jacobian_is_that_of_finite_differences(system):
    rows = simulate(TABLE2) if "dense" in system else moe_rows(lambda r: 3.0 + r["N"] ** -0.1)
    problem = laws.build(rows, system)
    theta = laws.grid_starts(problem)[::4]
    _, jacobian = laws.evaluate(problem, theta)
    for j, step in enumerate(1e-6 * np.eye(theta.shape[1])):
        numeric = (laws.evaluate(problem, theta + step)[0] - laws.evaluate(problem, theta - step)[0]) / 2e-6
        assert np.abs(numeric - jacobian[:, j]).max() < 1e-8, problem.names[j]


@pytest.mark.parametrize(
    "system, share",
    [(system, ("E",)) for system in SYSTEMS[:3]]
    + [(THREE, share) for share in ((), ("B", "beta"), ("E", "beta"), ("E", "B", "beta"), ("alpha",))]
    + [({"dense": "dense", "moe": "moe"}, ("A", "alpha"))],
)
def test_engine_and_formula_predict_alike(system, share):
    rows = simulate(TABLE2, noise=0.1)
    fit = laws.fit(rows, system, share)
    for name in share:
        assert (
            len({float(fit.params(law)[name]) for law in set(system.values()) if name in fit.params(law)})
            == 1
        )
    for family, law in system.items():
        here = np.array([row["family"] == family for row in fit.problem.rows])
        mine = [row for row in rows if row["family"] == family]
        point = {name: np.array([row[name] for row in mine]) for name in FAMILIES[family]}
        if "effective" in law and family == "moe":
            point = {"N": point["N"], "D1": 0.0, "D2": point["D"]}
        assert np.allclose(
            np.log(laws.predict(law, fit.params(law), **point)),
            (fit.problem.y - fit.residual)[here],
            rtol=0,
            atol=1e-10,
        )


@pytest.mark.parametrize(
    "share, system", [(("E", "B"), THREE), (("A",), THREE), (("A", "alpha"), THREE), (("A", "alpha"), SHARED)]
)
def test_a_coefficient_is_shared_only_with_its_exponents(share, system):
    with pytest.raises(
        F.ConfigError,
        match=f"can share {share[-1] if share[-1] != 'alpha' else 'A'} only where its exponents",
    ):
        laws.fit(simulate(TABLE2), system, share)


def test_no_random_start_finds_a_lower_objective():
    random = np.random.default_rng(0)
    for seed in range(10):
        truth, system = ((TABLE2, THREE), (HEAD_START, SHARED))[seed % 2]
        fit = laws.fit(
            simulate(truth, system, noise=0.005, trunk_noise=0.003, seed=seed),
            (THREE, SHARED, THREE | {"upcycled": "upcycled.additive"})[seed % 3],
        )
        low, high = np.where(fit.problem.is_log, -3.0, -0.1), np.where(fit.problem.is_log, 1.0, 0.6)
        starts = random.uniform(low, high, (100, len(fit.theta)))
        assert laws.descend(fit.problem, starts, fit.delta)[1].min() > fit.cost * (1 - 1e-6)
        other = least_squares(
            lambda t: laws.evaluate(fit.problem, t[None])[0][0] - fit.problem.y,
            starts[0],
            loss="huber",
            f_scale=fit.delta,
            max_nfev=300,
        )
        assert other.cost > fit.cost * (1 - 1e-6)


def test_many_weighted_refits_are_what_scipy_finds_one_by_one():
    fit = laws.fit(simulate(TABLE2, {"upcycled": "upcycled"}, noise=0.004), {"upcycled": "upcycled"})
    random = np.random.default_rng(1)
    y, weights = (
        fit.problem.y + 0.004 * random.standard_normal((6, len(fit.problem.y))),
        random.integers(0, 3, (6, len(fit.problem.y))),
    )
    _, cost = laws.descend(fit.problem, np.tile(fit.theta, (6, 1)), 0.005, y, weights)
    for k in range(6):
        again = np.repeat(np.arange(len(y[k])), weights[k])  # a row of weight 2 is there twice
        scipy = least_squares(
            lambda t: (laws.evaluate(fit.problem, t[None])[0][0] - y[k])[again],
            fit.theta,
            loss="huber",
            f_scale=0.005,
            x_scale="jac",
            jac=lambda t: laws.evaluate(fit.problem, t[None])[1][0].T[again],
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
        assert cost[k] == pytest.approx(scipy.cost, rel=1e-6)


def test_an_outlier_hardly_moves_the_fit_and_delta_is_honoured():
    rows = simulate(TABLE2, {"dense": "dense"}, noise=0.002)
    clean = laws.fit(rows, {"dense": "dense"}).params("dense")
    rows[7] = rows[7] | {"loss": rows[7]["loss"] * 1.3}

    def shift(fit):
        at = {"N": 1e8, "D": 1e10}
        return abs(
            math.log(laws.predict("dense", fit.params("dense"), **at) / laws.predict("dense", clean, **at))
        )

    robust, squares = laws.fit(rows, {"dense": "dense"}), laws.fit(rows, {"dense": "dense"}, delta=10.0)
    assert robust.delta < 0.01 and squares.delta == 10.0
    assert shift(robust) < 0.002 < shift(squares)


def test_profile_of_E_passes_through_the_planted_alpha3():
    fit = laws.fit(simulate(TABLE2, noise=0.001), THREE)
    profile = uncertainty.profile_E(fit, "upcycled")
    assert min(profile["objective"]) > -1e-9
    at = np.interp(fit.params("upcycled")["E"], profile["E"], profile["alpha3"])
    assert at == pytest.approx(fit.params("upcycled")["alpha3"], abs=1e-4)
    assert profile["alpha3"][0] > 0 > profile["alpha3"][-1]  # a wrong E turns its sign
