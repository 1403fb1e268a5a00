"""fit_laws.py: laws and rows, held-out errors, published tables, what the command writes and says."""
import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import fit_laws as F
import laws
import uncertainty
from configurator import ConfigError, locked, parse
from mixture import read_laws
from rows import FAMILIES, clean, read_rows
from simulated import DATA, HEAD_START, PILOT, ROOT, SHARED, SMALL, TABLE2, THREE, shared_system, simulate


def published(name):
    return read_rows([os.path.join(ROOT, "tests", "data", name)])[0]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Which laws, on which rows

def test_laws_and_what_they_lack_are_planned():
    fits, lacks = F.plan_fits(simulate(TABLE2, {"dense": "dense", "upcycled": "upcycled"}))
    assert fits["upcycled"][0] == {"dense": "dense", "upcycled": "upcycled"} and "upcycled.additive" in fits
    assert lacks["moe"] == lacks["upcycled.effective_data_shared"] == "has no moe rows"
    fits, lacks = F.plan_fits(simulate(TABLE2))
    assert "levels of experts" in lacks["moe.joint"]
    assert fits["upcycled.handicap"][0] == shared_system("upcycled.handicap")
    assert fits["upcycled.loss_matching_0"][0] == {"dense": "dense", "moe": "upcycled.loss_matching_0"}


def test_rows_at_fixed_data_are_those_with_most_tokens_among_ties():
    rows = [{"D": 1e9}, {"D": 1e9}, {"D": 4e9}, {"D": 4e9}, {"D": 8e9}]
    assert F.rows_at_one_data(rows) == [{"D": 4e9}, {"D": 4e9}] and F.rows_at_one_data([]) == []
    rows += [{"D": 1.02e9}, {"D": 1.04e9}]  # levels within 5 % are one
    assert F.rows_at_one_data(rows) == [{"D": 1e9}, {"D": 1e9}, {"D": 1.02e9}, {"D": 1.04e9}]


def test_laws_that_share_nothing_are_fitted_as_if_alone(tmp_path):
    rows = simulate(TABLE2, noise=0.004)
    found = {}
    for share in ("none", "E"):
        options = parse(F.Options, ["rows.jsonl", f"--share={share}"])
        fitted = uncertainty.fit_with_noise(rows, THREE, **F.fit_settings(options, THREE))
        found[share] = {family: float(fitted.params(family)["E"]) for family in FAMILIES}
    assert len(set(found["E"].values())) == 1 and len(set(found["none"].values())) == 3
    moe = uncertainty.fit_with_noise(rows, {"moe": "moe"})  # other families share no luck with it
    assert found["none"]["moe"] == pytest.approx(float(moe.params("moe")["E"]), rel=0.02)


def test_repeated_runs_are_refused_or_give_their_lowest_or_mean_loss():
    row = {"family": "dense", "N": 1e6, "D": 1e9, "loss": 3.0}
    rows = [row | {"loss": 3.2}, row, row | {"loss": 3.4}, row | {"D": 2e9}]
    with pytest.raises(ConfigError, match="dense N=1e\\+06 with losses 3.2, 3, 3.4; --repeats=mean"):
        F.resolve_repeats(rows, "refuse")
    assert [one["loss"] for one in F.resolve_repeats(rows, "lowest")[0]] == [3.0, 3.0]
    found, said = F.resolve_repeats(rows, "mean")
    assert [one["loss"] for one in found] == [pytest.approx(3.2), 3.0] and "the mean loss" in said[0]
    assert F.resolve_repeats(rows[:1] + rows[3:], "refuse") == (rows[:1] + rows[3:], [])
    seeds = [row | {"seed": seed, "loss": 3.0 + seed} for seed in range(3)]
    assert F.resolve_repeats(seeds, "refuse") == (seeds, [])


NUMBERS = st.sampled_from([1, 2.0, "3", 1e6, 1e7, 1e-6, 1e16])
NEEDED = {"family": st.sampled_from(list(FAMILIES)), "N": NUMBERS, "D": NUMBERS, "D1": NUMBERS, "D2": NUMBERS,
          "loss": NUMBERS}
EXTRA = {"trunk": st.integers(0, 3), "N_active": NUMBERS, "N_total": NUMBERS, "num_local_experts": NUMBERS,
         "method": st.sampled_from(["copy", "drop"]), "seed": st.integers(0, 1),
         "granularity": st.sampled_from([1, 2.0, "two"])}


@settings(max_examples=150)
@given(st.lists(st.fixed_dictionaries(NEEDED, optional=EXTRA), min_size=1, max_size=24))
def test_whatever_rows_can_be_read_can_be_planned(rows):
    fits, lacks = F.plan_fits([clean(row) for row in rows])
    assert set(fits) | set(lacks) == set(laws.LAWS) - {"dense.local"}  # which is part of a pilot's law


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2 ** 32 - 1), st.sampled_from([(1e7, 1e8, 1e9), (1e-6, 1.0, 1e16), (1e6, 1.06e6, 3e6)]),
       st.sampled_from([0.1, 1.0, 6.0]))
def test_few_and_odd_rows_that_are_accepted_can_be_fitted(seed, D, spread):
    random = np.random.default_rng(seed)
    rows = [clean({"family": family, "N": 1e6, "D": d, "D1": d, "D2": e, "trunk": f"{d}",
                   "loss": float(np.clip(random.lognormal(0, spread), 1e-6, 1e6))})
            for family in FAMILIES for d in D for e in D]
    rows, _ = F.resolve_repeats([row for row in rows if random.random() < 0.7], "mean")
    for law, (system, chosen) in F.plan_fits(rows)[0].items():
        fitted = uncertainty.fit_with_noise(chosen, system)
        assert math.isfinite(uncertainty.aicc(fitted))
        assert all(map(math.isfinite, fitted.params(law).values()))
        assert np.isfinite(uncertainty.bootstrap(fitted, 20)).all()


# Rows that a fit did not see

@pytest.mark.parametrize("law", ["upcycled", "upcycled.handicap", "upcycled.saturating",
                                 "upcycled.loss_matching"])
def test_a_true_law_extrapolates_and_a_wrong_one_does_not(law):
    truth, system = (TABLE2, THREE) if law == "upcycled" else (HEAD_START, shared_system(law))
    design = {"D1": np.geomspace(1e9, 1e11, 4)} if law == "upcycled" else SMALL | {"N": [2e4, 5e4, 1e5, 3e5]}
    rows = simulate(truth, system, **design)
    for name in ("D1", "D2", "N"):
        found = F.extrapolate(rows, system, law, name)
        top = max(row[name] for row in rows if "D2" in row)
        below = max(row[name] for row in rows if "D2" in row and row[name] < top)
        assert found["rms"] < 1e-4 and found["beyond"] == pytest.approx(top / below)
        assert found["rows"] == sum(row.get(name) == top for row in rows if "D2" in row)
        additive = "upcycled.additive"
        wrong = F.extrapolate(rows, THREE | {"upcycled": additive}, additive, name)
        assert wrong["rms"] > 1e-3


def test_where_levels_are_unique_the_upper_fifth_of_the_range_is_held_out():
    rows = [{"family": "dense", "N": 1e8, "D": float(d), "loss": 3.0} for d in np.geomspace(1e9, 1e11, 41)]
    threshold = F.held_out_from(rows, "dense", "D")
    assert threshold == pytest.approx(1e9 * 100 ** 0.8) and sum(row["D"] >= threshold for row in rows) >= 8
    levels = [row | {"D": d} for d in (1e9, 4e9, 1e10) for row in rows[:5]]
    assert F.held_out_from(levels, "dense", "D") == 1e10
    assert F.held_out_from(rows[:1], "dense", "D") is None


def test_one_long_run_alone_is_not_what_is_held_out():
    rows = simulate(HEAD_START, SHARED, **SMALL)
    longest = max(row["D2"] for row in rows if "D2" in row)
    alone = next(row for row in rows if "D2" in row) | {"D2": 100 * longest}
    assert F.held_out_from(rows + [alone], "upcycled", "D2") == pytest.approx(longest)


def test_shared_law_extrapolates_upcycled_rows_where_the_moe_has_too_few_levels():
    rows = simulate(HEAD_START, SHARED, D=DATA[::2], D1=np.geomspace(1e9, 1e11, 4))
    rows = [row for row in rows if not (row["family"] == "moe" and row["D"] == DATA[2])]
    system = F.plan_fits(rows)[0]["upcycled.effective_data_shared"][0]
    for name in ("D1", "D2", "N"):
        assert F.extrapolate(rows, system, "upcycled.effective_data_shared", name)["rms"] < 1e-4


def test_held_out_rows_do_not_reach_the_fit():
    rows = simulate(TABLE2, D1=np.geomspace(1e9, 1e11, 4), noise=0.003)
    top = max(row["D1"] for row in rows if "D1" in row)
    spoiled = [row | {"loss": row["loss"] * 100} if row.get("D1") == top else row for row in rows]
    before, after = (F.extrapolate(chosen, THREE, "upcycled", "D1") for chosen in (rows, spoiled))
    assert before["rows"] == after["rows"] and after["rms"] == pytest.approx(math.log(100), abs=0.1)


def test_the_readme_has_the_errors_of_the_quick_study():
    """Held-out D1 and D2 in the README's table are those of fits to the rows in results/."""
    rows = read_rows([os.path.join(ROOT, "results", "study_quick.jsonl")])[0]
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        lines = [line.replace("*", "").split("|") for line in file if line.count("|") == 7]
    said = {cells[1].strip(): cells[3:5] for cells in lines}
    for law, label in (("upcycled", "interaction (arXiv 2502.03009)"), ("upcycled.handicap", "handicap"),
                       ("upcycled.saturating", "saturating head start"),
                       ("upcycled.loss_matching", "loss matching")):
        system, chosen = F.plan_fits(rows, [law])[0][law]
        for name, text in zip(("D1", "D2"), said[label]):
            found = F.extrapolate(chosen, system, law, name)
            assert 100 * found["rms"] == pytest.approx(float(text), abs=0.02) and found["rows"] == 12


# A pilot

def pilot_errors(rows, most, priors):
    """(24,) errors at D2 = 1M and 2M of pilots on every checkpoint of the quick study: upcycled rows to 0.5M,
    and a MoE from scratch to `most` tokens."""
    law, found = "upcycled.head_start", []
    for n, prior in priors.items():
        for d1 in sorted({row["D1"] for row in rows if "D1" in row}):
            here = [row for row in rows if row["N"] == n and row.get("D1", d1) == d1 and row["seed"] == 0]
            small = [row for row in here if row["family"] == "moe" and row["D"] <= most
                     or row["family"] == "upcycled" and row["D2"] < 6e5]
            fitted = uncertainty.fit_with_noise(small, {"moe": law, "upcycled": law},
                                                priors=prior and {law: prior})
            found += list(F.errors(fitted, law, [row for row in here if row.get("D2", 0) > 6e5]))
    return np.array(found)


def test_pilots_of_the_quick_study_predict_longer_training_of_every_checkpoint(tmp_path):
    rows = read_rows([os.path.join(ROOT, "results", "study_quick.jsonl")])[0]
    sizes = sorted({row["N"] for row in rows})
    errors = pilot_errors(rows, 2.2e6, dict.fromkeys(sizes))
    assert len(errors) == 24 and F.rms(errors) == pytest.approx(0.0118, abs=0.001)
    short = pilot_errors(rows, 1.1e6, dict.fromkeys(sizes))  # a curve from scratch of half the length
    priors = {}
    for n in sizes:
        others, law = [row for row in rows if row["N"] != n], "upcycled.effective_data_shared"
        fitted = uncertainty.fit_with_noise(others, shared_system(law))
        params = {name: float(value) for name, value in fitted.params(law).items()}
        alpha, draws = params["alpha"], {name: [value, value] for name, value in params.items()}
        entry = {"params": params, "draws": draws | {"alpha": [alpha - 0.02, alpha + 0.02]}}
        path = tmp_path / f"{n}.json"
        path.write_text(json.dumps({"version": 2, "laws": {law: entry}}))
        priors[n] = F.alpha_prior(str(path))
        assert priors[n] == pytest.approx((alpha, math.hypot(0.02, 0.12 * alpha)))
    assert F.rms(short) == pytest.approx(0.0296, abs=0.002)
    assert F.rms(pilot_errors(rows, 1.1e6, priors)) == pytest.approx(0.0203, abs=0.002)


def test_command_fits_a_pilot_with_a_prior_and_with_the_dense_model_beside_it(tmp_path):
    rows = simulate(HEAD_START, SHARED, **PILOT, noise=0.003)
    kept = [row for row in rows if row["family"] != "dense" or row["D"] > 9e5]  # two levels
    other = write(tmp_path / "other.jsonl", simulate(HEAD_START, SHARED, **SMALL, noise=0.003))
    law = "upcycled.head_start"
    F.main(F.Options(rows=[other], out=str(tmp_path / "other"), draws=20,
                     laws=["dense", "moe", "upcycled.effective_data_shared"]))
    prior = str(tmp_path / "other" / "laws.json")
    path = write(tmp_path / "rows.jsonl", kept)
    F.main(F.Options(rows=[path], out=str(tmp_path / "a"), draws=50, prior=prior))
    content = json.loads((tmp_path / "a" / "laws.json").read_text())
    entry = content["laws"][law]
    assert entry["fitted_with"] == {"dense": "dense.local", "moe": law, "upcycled": law}
    assert len(entry["draws"]["H"]) == 50 and set(entry["beside"]) == {"dense.local"}
    low, high = entry["ci95"]["H"]
    assert low < 80 * 4e6 ** 0.67 < high and abs(entry["params"]["alpha"] - 0.22) < 0.06
    text = (tmp_path / "a" / "report.md").read_text()
    assert "By the free head start law, N = 100k, every method: a dense checkpoint of 4M tokens is" in text
    with pytest.raises(ConfigError, match="pilot's law, .* is for one level of N, has 3"):
        F.main(F.Options(rows=[other], out=str(tmp_path / "b"), prior=prior))
    for bad in (str(tmp_path / "none.json"), os.path.join(ROOT, "laws", "liew2025.json")):
        with pytest.raises(ConfigError, match="json"):
            F.alpha_prior(bad)


def test_a_pilot_of_a_checkpoint_far_longer_than_it_knows_how_the_dense_model_goes_on(tmp_path):
    """The two levels of D are 0.8 % apart, and the noise of a run is as large as what they differ by."""
    H, D1, budget, seen = 2e9, 1e10, 6.4e8, []

    def moe(D):
        return 30 * D ** -0.16 + 1.2

    def dense(D):
        return 32 * D ** -0.16 + 1.5
    for seed in range(4):
        random = np.random.default_rng(seed)
        rows = [{"family": "moe", "N": 1e8, "D": share * budget, "loss": moe(share * budget),
                 "trunk": "moe"} for share in (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)]
        for more in (budget / 16, budget / 8):
            rows += [{"family": "upcycled", "N": 1e8, "D1": D1, "D2": more, "loss": moe(H + more),
                      "trunk": "upcycled", "dense_trunk": "dense"},
                     {"family": "dense", "N": 1e8, "D": D1 + more, "loss": dense(D1 + more),
                      "trunk": "dense"}]
        for row in rows:
            row["loss"] *= math.exp(0.003 * random.standard_normal())
        path = write(tmp_path / "rows.jsonl", rows)
        F.main(F.Options(rows=[path], out=str(tmp_path), draws=100, laws=["upcycled.head_start"]))
        content = json.loads((tmp_path / "laws.json").read_text())
        local = content["laws"]["upcycled.head_start"]["beside"]["dense.local"]["draws"]
        losses = np.array(local["A"]) * (D1 + 1.7 * budget) ** -np.array(local["alpha"])
        low, high = np.quantile(losses, (0.005, 0.995))
        assert low < dense(D1 + 1.7 * budget) < high
        seen.append(math.log(high / low))
    assert np.median(seen) < 0.15  # by the rows alone: 0.003 * sqrt(2) / ln 1.004 * ln 1.1 * 5.2 = 0.5


# Published tables

def test_smaller_dense_runs_of_the_olmo_ladder_predict_the_larger():
    rows = published("olmo_ladder_c4.csv")
    small = [row for row in rows if row["N"] < 8e8]
    large = [row for row in rows if row["N"] > 8e8]  # 1.3B and 3.2B: 1.7 and 4.2 times the size
    fitted = uncertainty.fit_with_noise(small, {"dense": "dense"})
    assert len(small) == 15 and len(large) == 10
    assert 100 * F.rms(F.errors(fitted, "dense", large)) == pytest.approx(0.82, abs=0.1)
    assert F.extrapolate(rows, {"dense": "dense"}, "dense", "N")["rows"] == 5
    assert 100 * F.extrapolate(rows, {"dense": "dense"}, "dense", "N")["rms"] == pytest.approx(0.61, abs=0.1)
    assert 100 * F.extrapolate(rows, {"dense": "dense"}, "dense", "D")["rms"] == pytest.approx(0.35, abs=0.1)


def test_smaller_routed_models_predict_the_larger_and_the_sparser():
    rows = published("clark_sbase_final.csv")
    system = {"moe": "moe.sparsity"}
    small = [row for row in rows if row["family"] == "moe" and row["N"] < 2e8]
    large = [row for row in rows if row["family"] == "moe" and row["N"] > 2e8]
    fitted = uncertainty.fit_with_noise(small, system)
    assert (len(small), len(large)) == (35, 18)
    assert 100 * F.rms(F.errors(fitted, "moe.sparsity", large)) == pytest.approx(0.87, abs=0.1)
    chosen = F.plan_fits(rows, ["moe.sparsity"])[0]["moe.sparsity"][1]
    for name, count, error in (("N_active", 9, 1.13), ("sparsity", 11, 2.0)):
        found = F.extrapolate(chosen, system, "moe.sparsity", name)
        assert found["rows"] == count and 100 * found["rms"] == pytest.approx(error, abs=0.15)


def test_routed_models_of_many_expert_counts_do_not_spoil_the_dense_law_at_one_horizon():
    rows = published("clark_sbase_final.csv")
    fits, _ = F.plan_fits(rows, ["dense"])
    together = uncertainty.fit_with_noise(fits["dense"][1], fits["dense"][0])
    dense = [row for row in rows if row["family"] == "dense"]
    alone = uncertainty.fit_with_noise(dense, {"dense": "dense"})
    assert together.problem.system == {"dense": "dense", "moe": "moe"}
    assert together.params("dense")["A"] == 0.0
    losses = [laws.predict("dense", fitted.params("dense"), N=1e9, D=1e11) for fitted in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert 100 * F.rms(F.errors(together, "dense", dense)) < 0.5


# The command

def study_rows():
    """A small study with two methods, as rows of runs."""
    system, rows = shared_system("upcycled.handicap"), []
    design = dict(N=[4e4, 1e5, 3e5], D=np.geomspace(2e5, 8e6, 4), D1=np.geomspace(5e5, 8e6, 3),
                  D2=np.geomspace(2e5, 8e6, 4), noise=0.003, trunk_noise=0.002, dense_noise=0.003)
    for method in ("copy", "drop"):
        for row in simulate(HEAD_START, system, **design):
            if row["family"] == "upcycled" or method == "copy":
                row |= {"N_active": 1.5 * row["N"], "N_total": 5 * row["N"]}
                row |= {"flops": 6e3 * row.get("D2", row.get("D"))}
                if row["family"] == "upcycled":
                    row |= {"method": method, "trunk": row["trunk"] + method}
                rows.append(row)
    return rows


@pytest.mark.parametrize("nu, told", [(0.0, False), (0.3, True)])
def test_a_note_tells_where_A_depends_on_N(nu, told):
    rows, system = [], shared_system("upcycled.handicap")
    for n in (4e4, 1e5, 3e5):
        truth = {law: params | {"A": params["A"] * (n / 1e5) ** -nu} for law, params in HEAD_START.items()}
        rows += simulate(truth, system, N=[n], noise=0.003, trunk_noise=0.002, seed=int(n))
    notes = F.claims(rows, F.Options(rows=[]))[1]
    assert any("--A_of_N" in note for note in notes) == told


def test_claims_are_of_one_method_at_levels_that_all_sizes_have():
    system = shared_system("upcycled.handicap")
    rows = [row | ({"method": "copy"} if "D1" in row else {})
            for row in simulate(HEAD_START, system, **SMALL, noise=0.003)]
    copied = [row for row in rows if "D1" in row]
    usual = F.claims(rows, F.Options(rows=[]))[0]
    dropped = [row | {"method": "drop", "loss": 1.1 * row["loss"], "trunk": "drop" + row["trunk"]}
               for row in copied]
    assert F.claims(rows + dropped, F.Options(rows=[]))[0] == usual
    # One size has gone on, at the smallest D1 alone: the claims of the rows themselves stay as they are.
    first = min(SMALL["D1"])
    longer = [copied[0] | {"D1": first, "D2": 6e7, "loss": 0.5}]
    longer += [next(row for row in rows if row["family"] == "moe") | {"D": 6e7, "loss": 0.4}]
    assert list(F.measured(rows + longer)) == list(F.measured(rows))


def test_laws_of_other_rows_are_not_compared_by_aicc():
    rows = [row for row in simulate(HEAD_START, SHARED, **SMALL, noise=0.003)
            if row["family"] != "moe" or row["D"] < 6e5]  # of two levels, so the MoE has no law of its own
    found = F.claims(rows, F.Options(rows=[]))[0]
    assert "upcycling has a lasting cost kappa" in found and not any("AICc" in claim for claim in found)


def test_command_writes_laws_report_and_figures(tmp_path, capsys):
    rows, out = [row | {"bits_per_byte": 0.36 * row["loss"]} for row in study_rows()], tmp_path / "a"
    F.main(F.Options(rows=[write(tmp_path / "rows.jsonl", rows)], out=str(out), draws=20))
    assert "skipped moe.joint" in capsys.readouterr().out
    content = json.loads((out / "laws.json").read_text())
    assert content["version"] == 2 and content["bits_per_nat"] == pytest.approx(0.36)
    assert set(content["laws"]) == {"dense", "moe", *laws.RIVALS} - {"upcycled.head_start"}
    assert content["ranges"]["upcycled"]["D1"] == pytest.approx([5e5, 8e6])
    assert {model["family"] for model in content["models"]} == set(FAMILIES)
    assert all(model["flops_per_token"] == pytest.approx(6e3) for model in content["models"])
    assert content["claims"]["upcycling has a lasting cost kappa"]["as fitted"]["value"]
    for claim in ("by the handicap law a MoE from scratch overtakes after the largest D1",
                  "the loss falls more slowly with D2 after the largest D1",
                  "a MoE from scratch leads copying at the smallest D1 and the largest D2"):
        assert content["claims"][claim]["as fitted"]["value"]
        assert f"| {claim} " in (out / "report.md").read_text()
    for law, entry in content["laws"].items():
        names = laws.parameter_names(law)
        assert list(entry["params"]) == list(entry["ci95"]) == list(entry["draws"]) == names
        assert all(len(values) == 20 for values in entry["draws"].values())
        assert entry["n"] == sum(row["family"] == law.partition(".")[0] for row in rows)
        assert all(set(found) == {"rms", "rows", "beyond"} for found in entry["held_out"].values() if found)
        assert set(entry["noise"]) == set(entry["misfit"]) == set(entry["fitted_with"])
        own = {other for other in entry["fitted_with"].values() if other != law}
        assert set(entry.get("beside", own)) == own
        assert ("methods" in entry) == bool({"c", "kappa"} & set(entry["params"]))
        if "methods" in entry:
            assert set(entry["methods"]) == {"copy", "drop"}
            assert entry["methods"]["copy"]["params"] == entry["params"]
    assert content["laws"]["upcycled.handicap"]["held_out"]["D2"]["rows"] == 18
    text = (out / "report.md").read_text()
    assert "## alpha3 of the interaction law along E" in text
    for name in ("loss_against_tokens", "residuals"):
        assert (out / f"{name}.png").stat().st_size > 5000 and f"]({name}.png)" in text


def moe_study(path, noise=0.002):
    """A file of MoE rows of 4 to 64 experts by the joint law, on 1B to 64B tokens."""
    random, rows = np.random.default_rng(0), []
    for experts in (4.0, 8.0, 16.0, 32.0, 64.0):
        for n in (1e7, 4e7, 1.6e8, 6.4e8):
            for D in (1e9, 4e9, 1.6e10, 6.4e10):
                e, active = math.log(experts), 1.5 * n
                loss = (36 * math.exp(0.22 * e) * active ** (-0.19 - 0.01 * e)
                        + 36 * math.exp(-0.55 * e) * D ** (-0.18 + 0.026 * e) + 1.36)
                rows.append({"family": "moe", "N": n, "N_active": active, "D": D,
                             "N_total": n * (0.3 + 0.7 * experts), "num_local_experts": experts,
                             "num_experts_per_tok": 2.0,
                             "loss": loss * math.exp(noise * random.standard_normal())})
    return write(path, rows)


def test_every_law_of_mixtures_has_held_out_columns_for_its_variables(tmp_path):
    moe_laws = [law for law in laws.LAWS if law.startswith("moe.")]
    F.main(F.Options(rows=[moe_study(tmp_path / "rows.jsonl")], out=str(tmp_path), draws=20, laws=moe_laws))
    entries = json.loads((tmp_path / "laws.json").read_text())["laws"]
    tests = {"moe.sparsity": {"sparsity", "N_active"}, "moe.sparsity_additive": {"sparsity", "N_active"},
             "moe.joint": {"D", "N_active", "experts"}, "moe.optimal_sparsity": {"D", "N_total", "experts"}}
    assert set(entries) == set(tests)
    for law, names in tests.items():
        held = {name: found for name, found in entries[law]["held_out"].items() if found}
        assert set(held) == names | {"trunk"}
        assert all(held[name]["rows"] >= 0.15 * entries[law]["n"] for name in names)
    text = (tmp_path / "report.md").read_text()
    header = next(line for line in text.split("\n") if "in sample" in line and line.startswith("| law"))
    for column in ("a trunk", "largest D", "largest N_active", "largest N_total", "largest sparsity",
                   "most experts"):
        assert f"| {column} held out " in header
    joint = entries["moe.joint"]["held_out"]  # the law that is true, beyond what it saw
    assert all(joint[name]["rms"] < 0.006 for name in ("D", "N_active", "experts"))
    assert entries["moe.joint"]["held_out"]["experts"]["beyond"] == 2.0


def test_the_same_command_gives_the_same_draws(tmp_path):
    path = write(tmp_path / "rows.jsonl", simulate(TABLE2, {"dense": "dense"}, noise=0.004))
    found = []
    for name in ("a", "b"):
        F.main(F.Options(rows=[path], out=str(tmp_path / name), draws=20, laws=["dense"]))
        found.append(json.loads((tmp_path / name / "laws.json").read_text())["laws"]["dense"]["draws"])
    assert found[0] == found[1]


def test_command_on_dense_and_moe_rows_alone_matches_losses(tmp_path):
    rows = [row for row in study_rows() if row["family"] != "upcycled"]
    F.main(F.Options(rows=[write(tmp_path / "rows.jsonl", rows)], out=str(tmp_path / "out"), draws=20))
    entry = json.loads((tmp_path / "out" / "laws.json").read_text())["laws"]["upcycled.loss_matching_0"]
    assert entry["n"] == 0 and entry["rmse_log"] is None and "dense_alpha" in entry["params"]


@pytest.mark.filterwarnings("error::UserWarning")  # one horizon makes no axis of no width
def test_command_says_at_which_data_a_sparsity_law_and_a_single_horizon_hold(tmp_path, capsys):
    path = os.path.join(ROOT, "tests", "data", "clark_sbase_final.csv")
    F.main(F.Options(rows=[path], out=str(tmp_path), draws=20, laws=["dense", "moe.sparsity"]))
    printed = capsys.readouterr().out
    assert "moe.sparsity is fitted at D = 131B alone" in printed
    assert "warning: dense (A alpha): one level of D" in printed
    entry = json.loads((tmp_path / "laws.json").read_text())["laws"]["moe.sparsity"]
    assert entry["at"] == {"D": 131072000000} and entry["held_out"]["sparsity"]["rows"] == 11


def test_command_says_what_is_wrong_in_one_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("family,N,D,loss\ndense,1e6,1e9,3\ndense,1e6,2e9,2.9\n")
    for words, said in (
            (["--laws=dense"], "--laws: dense needs 3 levels of D, has 2"),
            (["--laws=dens"], "no law 'dens'"), (["--draws=3"], "draws: 3 is not at least 20"),
            ([], "no law can be fitted"),
            ([str(tmp_path / "none.csv")], "No such file"),
            (["--share=E,alpha9"], "share: 'E,alpha9' is none of")):
        with pytest.raises(ConfigError, match=said):
            F.main(parse(F.Options, [str(path), f"--out={tmp_path / 'out'}", *words]))
    full = write(tmp_path / "full.jsonl", simulate(TABLE2, {"dense": "dense"}))
    with pytest.raises(ConfigError, match="cannot be written"):
        F.main(parse(F.Options, [full, f"--out={path}"]))
    done = subprocess.run([sys.executable, os.path.join(ROOT, "fit_laws.py"), str(path), "--laws=dense"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "has 2" in done.stderr and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_two_fits_write_to_one_directory_in_turn(tmp_path):
    path = write(tmp_path / "rows.jsonl", simulate(TABLE2, {"dense": "dense"}, noise=0.004))
    out = tmp_path / "out"
    fit = threading.Thread(target=F.main, args=[F.Options(rows=[path], out=str(out), draws=20)])
    with locked(str(out), ".lock", ""):
        fit.start()
        fit.join(timeout=8)
        assert fit.is_alive() and os.listdir(out) == [".lock"]
    fit.join(timeout=60)
    assert not fit.is_alive() and {"laws.json", "report.md", "residuals.png"} <= set(os.listdir(out))
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


def test_more_rows_than_are_fitted_and_larger_laws_than_are_read_are_refused(tmp_path):
    rows = [{"family": "dense", "N": 1e6, "D": 1e9 + i, "loss": 3.0} for i in range(5001)]
    with pytest.raises(ConfigError, match="rows.jsonl: 5,001 rows; at most 5,000 are fitted"):
        F.main(F.Options(rows=[write(tmp_path / "rows.jsonl", rows)], out=str(tmp_path / "out")))
    with open(tmp_path / "laws.json", "wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(ConfigError, match="laws.json: has 16,777,217 bytes, at most 16,777,216 are read"):
        read_laws(str(tmp_path / "laws.json"))


def test_a_run_that_ends_before_the_report_is_whole_leaves_no_laws_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", simulate(TABLE2, {"dense": "dense"}, noise=0.004))
    (tmp_path / "out" / "residuals.png").mkdir(parents=True)  # the figure cannot be written
    with pytest.raises(ConfigError, match="cannot be written"):
        F.main(F.Options(rows=[path], out=str(tmp_path / "out"), draws=20))
    assert not (tmp_path / "out" / "laws.json").exists()
    (tmp_path / "out" / "residuals.png").rmdir()
    F.main(F.Options(rows=[path], out=str(tmp_path / "out"), draws=20))
    assert json.loads((tmp_path / "out" / "laws.json").read_text())["laws"]["dense"]["n"] == 20
    assert not (tmp_path / "out" / "laws.json.tmp").exists()
