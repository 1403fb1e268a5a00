"""Intervals, variances and held-out errors against simulation."""

import math

import numpy as np
import pytest

import fit_laws as F
import laws
import uncertainty
from simulated import DATA, HEAD_START, SHARED, SIZES, TABLE2, THREE, simulate


def coverage(system, law, targets, sets, draws, by_trunk=(True,), **design):
    """Share of 95 % intervals that hold the truth of Table 2, for each way of drawing.

    Targets are functions of a law's parameters.
    """
    hits = np.zeros((len(by_trunk), sets, len(targets)))
    for seed in range(sets):
        fit = laws.fit(simulate(TABLE2, system, seed=seed, **design), system)
        for way, trunks in enumerate(by_trunk):
            params = fit.params(law, uncertainty.bootstrap(fit, draws, seed, trunks))
            for k, target in enumerate(targets):
                low, high = np.quantile(target(params), [0.025, 0.975])
                hits[way, seed, k] = low <= target(TABLE2[law]) <= high
    return hits.mean(axis=(1, 2))


def test_intervals_cover_under_row_noise():
    targets = [lambda p, name=name: p[name] for name in ("alpha1", "alpha2", "alpha3", "beta")]
    (covered,) = coverage({"upcycled": "upcycled"}, "upcycled", targets, 50, 150, D2=DATA[::2], noise=0.005)
    assert 0.90 <= covered <= 0.99


def test_trunk_bootstrap_covers_better_than_row_bootstrap_under_clustered_noise():
    def gain(p):  # between trunks: what more dense training is worth
        return np.log(
            laws.predict("upcycled", p, N=2.5e8, D1=1e9, D2=1e10)
            / laws.predict("upcycled", p, N=2.5e8, D1=1e11, D2=1e10)
        )

    clustered, rowwise = coverage(
        {"upcycled": "upcycled"},
        "upcycled",
        [gain],
        50,
        100,
        (True, False),
        N=SIZES[1:],
        D1=np.geomspace(1e9, 1e11, 4),
        noise=0.001,
        trunk_noise=0.005,
    )
    assert 0.88 <= clustered <= 1.0 and rowwise < clustered - 0.15


def test_variance_components_are_found():
    rows = simulate(TABLE2, noise=0.002, trunk_noise=0.006, copies=6, seed=3)
    fit = laws.fit(rows, THREE)
    row, trunk, row_df, trunk_df = uncertainty.variances(fit, uncertainty.trunk_of(fit.problem.rows))
    assert math.sqrt(row) == pytest.approx(0.002, rel=4 / math.sqrt(2 * row_df)) and math.sqrt(
        trunk
    ) == pytest.approx(0.006, rel=4 / math.sqrt(2 * trunk_df))


def test_asymptotic_errors_agree_with_the_bootstrap_where_the_law_is_well_identified():
    fit = laws.fit(
        simulate(TABLE2, noise=0.001, D=np.geomspace(1e8, 1e12, 8), N=np.geomspace(1e6, 1e10, 6)), THREE
    )
    draws, errors = (
        fit.params("dense", uncertainty.bootstrap(fit, 400)),
        uncertainty.standard_errors(fit, "dense"),
    )
    for name in ("alpha", "beta"):
        assert errors[name] == pytest.approx(draws[name].std(), rel=0.25)


# Truth tests


def test_a_true_law_extrapolates_and_a_wrong_one_does_not():
    rows = simulate(TABLE2, D1=np.geomspace(1e9, 1e11, 4))
    for name in ("D1", "D2", "N"):
        held, error = uncertainty.extrapolate(rows, THREE, "upcycled", name, ("E",), "auto")
        assert {row[name] for row in held} == {max(row[name] for row in rows if row["family"] == "upcycled")}
        assert np.abs(error).max() < 1e-6
        wrong = uncertainty.extrapolate(
            rows, THREE | {"upcycled": "upcycled.additive"}, "upcycled.additive", name, ("E",), "auto"
        )[1]
        assert np.abs(wrong).max() > 1e-3


def test_shared_law_extrapolates_upcycled_rows_where_the_moe_has_too_few_levels():
    rows = simulate(HEAD_START, SHARED, D=DATA[::2], D1=np.geomspace(1e9, 1e11, 4))
    rows = [row for row in rows if not (row["family"] == "moe" and row["D"] == DATA[2])]
    system = F.plan_fits(rows)[0]["upcycled.effective_data_shared"][0]
    for name in ("D1", "D2", "N"):
        held, error = uncertainty.extrapolate(
            rows, system, "upcycled.effective_data_shared", name, ("E",), "auto"
        )
        assert {row["family"] for row in held} == {"upcycled"} and np.abs(error).max() < 1e-5


def test_a_parameter_at_a_bound_or_whose_interval_reaches_it_is_not_identified():
    fit = laws.fit(simulate(TABLE2, {"dense": "dense"}, noise=0.001), {"dense": "dense"})
    place, theta = fit.problem.names.index("dense:beta"), np.tile(fit.theta, (100, 1))
    assert "beta" not in uncertainty.unidentified(fit, "dense", theta)
    theta[:4, place] = fit.problem.high[place]
    assert "bound" in uncertainty.unidentified(fit, "dense", theta)["beta"]


def test_held_out_rows_do_not_reach_the_fit():
    rows = simulate(TABLE2, D1=np.geomspace(1e9, 1e11, 4), noise=0.003)
    top = max(row["D1"] for row in rows if "D1" in row)
    spoiled = [row | {"loss": row["loss"] * 2} if row.get("D1") == top else row for row in rows]
    errors = [uncertainty.extrapolate(r, THREE, "upcycled", "D1", ("E",), "auto")[1] for r in (rows, spoiled)]
    assert np.allclose(errors[1] - errors[0], math.log(2), atol=1e-9)
    fit, trunk = laws.fit(rows, THREE), next(row["trunk"] for row in rows if "D1" in row)
    hit = np.array([row["trunk"] == trunk for row in fit.problem.rows])
    spoiled = laws.Fit(fit.problem, fit.theta, fit.delta, fit.cost, fit.residual)
    before = uncertainty.leave_trunk_out(fit)
    spoiled.problem.y = fit.problem.y + np.where(hit, math.log(2), 0.0)
    assert np.allclose((uncertainty.leave_trunk_out(spoiled) - before)[hit], math.log(2), atol=1e-5)


def test_true_law_has_the_lowest_aicc():
    for truth, system in ((TABLE2, THREE), (HEAD_START, SHARED)):
        rows = simulate(truth, system, noise=0.002)
        fits, _ = F.plan_fits(rows, laws.RIVALS)
        aicc = {law: uncertainty.aicc(laws.fit(mine, its)) for law, (its, mine) in fits.items()}
        assert min(aicc, key=aicc.get) == system["upcycled"]
