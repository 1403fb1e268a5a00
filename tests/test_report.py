"""Words, tables and figures of a report, against planted laws and planted differences of methods."""
import itertools
import json
import math
import os
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import brentq

import figures
import report
from configurator import ConfigError
from laws import LAWS, law_name, short
from rows import FAMILIES, RUN, clean
from simulated import DATA, HEAD_START, ROOT, SHARED, SIZES, TABLE2, THREE, simulate


def content_of(rows, truth, system, others=()):
    """What laws.json would hold if fits had found the planted laws, their draws 0.1 % about them."""
    random = np.random.default_rng(0)
    names = [*dict.fromkeys(system.values()), *others]
    draws = {law: {name: (value * (1 + 1e-3 * random.standard_normal(50))).tolist()
                   for name, value in truth[law].items()} for law in names}
    entries = {}
    for law in names:
        rows_of_law = [row for row in rows if system.get(row["family"]) == law]
        entries[law] = {
            "params": truth[law], "draws": draws[law],
            "ci95": {name: np.quantile(values, [0.025, 0.975]) for name, values in draws[law].items()},
            "n": len(rows_of_law), "rmse_log": 0.01, "se_asymptotic": {name: 0.1 for name in truth[law]},
            "fitted_with": system, "shared": ["E"], "not_identified": {}, "aicc": -100.0 - len(entries),
            "n_with": len(rows), "huber_delta": 0.01, "params_at_delta_0.001": truth[law],
            "held_out": {"trunk": None, "D1": {"rms": 0.0188, "rows": 12, "beyond": 2.5}},
            "noise": {family: {"row": 0.002, "trunk": 0.003, "dense_trunk": 0.005} for family in system},
            "misfit": {family: 0.0071 for family in system},
            "beside": {other: {"params": truth[other]} for other in names if other != law}}
    ranges = {family: {name: [end(row[name] for row in rows if row["family"] == family) for end in (min, max)]
                       for name in variables}
              for family, variables in FAMILIES.items() if family in system}
    return {"laws": entries, "ranges": ranges, "intervals": "planted", "claims": {}}


# Pairs of methods

def run(method, loss, D2=1e6, seed=0, **columns):
    return {"family": "upcycled", "N": 1e6, "D1": 1e7, "D2": D2, "seed": seed, "method": method, "loss": loss,
            "num_local_experts": 8.0, "num_experts_per_tok": 2.0} | columns


def scratch(loss, D=1e6, seed=0, **columns):
    return {"family": "moe", "N": 1e6, "D": D, "seed": seed, "loss": loss, "num_local_experts": 8.0,
            "num_experts_per_tok": 2.0} | columns


@pytest.mark.parametrize("column, one, other", [
    ("learning_rate", 1e-3, 3e-3), ("warmup_steps", 10, 100), ("max_seq_len", 128, 256), ("seed", 1, 2),
    ("eval_tokens", 1e5, 2e5), ("data_sha256", "a", "b"), ("dense_trunk", "dense-s0", "dense-s1"),
    ("num_local_experts", 8.0, 16.0), ("tokens_per_step", 1e3, 2e3), ("intermediate_size", 64, 128)])
def test_runs_that_differ_in_a_setting_are_never_paired(column, one, other):
    copies = [run("copy", 2.0, **{column: one}), run("copy", 3.0, **{column: other})]
    dropped = run("drop", 2.2, drop_ratio=0.5, **{column: one})
    for rows in itertools.permutations([*copies, dropped]):  # the order of the rows means nothing
        assert report.method_differences(rows) == {("drop 0.5", 1e6, 1e7): {1e6: [pytest.approx(0.1)]}}
    assert report.method_differences([copies[1], dropped]) == {}


@pytest.mark.parametrize("column, usual, other", [("optimizer", "reset", "copy"), ("router_std", 0.02, 0.2)])
def test_copying_with_another_knob_is_not_taken_for_copying(column, usual, other):
    rows = [run("copy", 2.0, **{column: usual}), run("copy", 3.0, **{column: other}),
            run("drop", 2.2, drop_ratio=0.5, **{column: usual})]
    for some in itertools.permutations(rows):
        differences = report.method_differences(some)
        assert differences.pop(("drop 0.5", 1e6, 1e7)) == {1e6: [pytest.approx(0.1)]}
        (label, _, _), = differences
        assert label.startswith("copy ") and differences == {(label, 1e6, 1e7): {1e6: [pytest.approx(0.5)]}}


ODD = st.sampled_from([0, -1, 2.0, "copy", "2", "x", True, None, "nan", [1], {}])


@settings(max_examples=200)
@given(st.lists(st.dictionaries(st.sampled_from(["method", *RUN]), ODD), max_size=6))
def test_whatever_rows_can_be_read_can_be_paired(columns):
    rows = [clean({**odd, "family": family, "N": 1e6, "D": 1e6, "D1": 1e6, "D2": 1e6, "loss": 2.0})
            for odd in columns for family in FAMILIES]
    for cells in report.method_differences(rows).values():
        assert set(cells) == {1e6} and set(cells[1e6]) == {0.0}  # all losses are equal
    report.methods_table(report.method_differences(rows))


def test_virtual_groups_are_paired_at_equal_experts_before_the_split():
    split = {"granularity": 2.0, "num_local_experts": 16.0, "num_experts_per_tok": 4.0,
             "intermediate_size": 32}
    rows = [run("copy", 2.0, intermediate_size=64), run("virtual_groups", 2.1, **split)]
    assert report.method_differences(rows) == {
        ("virtual groups G = 2", 1e6, 1e7): {1e6: [pytest.approx(0.05)]}}
    for wider in ({"num_local_experts": 32.0}, {"intermediate_size": 64}):
        assert report.method_differences([rows[0], run("virtual_groups", 2.1, **split | wider)]) == {}


def test_from_scratch_is_paired_at_equal_tokens_and_settings():
    rows = [run("copy", 2.0, warmup_steps=9), run("copy", 1.9, D2=2e6), scratch(2.2, warmup_steps=9),
            scratch(1.71, D=2e6), scratch(5.0, D=3e6), scratch(5.0, num_local_experts=16.0, warmup_steps=9),
            scratch(5.0, warmup_steps=99), scratch(5.0, seed=1, warmup_steps=9)]
    assert report.method_differences(rows) == {("MoE from scratch", 1e6, 1e7): {
        1e6: [pytest.approx(0.1)], 2e6: [pytest.approx(-0.1)]}}


def test_methods_are_paired_by_seed_and_may_miss_cells():
    rows = [run("copy", 2.0 + seed, D2, seed) for seed in range(3) for D2 in (1e6, 2e6)]
    rows += [run("noise", (2.0 + seed) * 1.01, D2, seed, noise_std=0.1)
             for seed in (2, 0) for D2 in (2e6, 1e6)]
    rows += [run("drop", 3.3, 1e6, 1, drop_ratio=0.5)]
    differences = report.method_differences(rows)
    assert differences["noise 0.1 σ", 1e6, 1e7] == {D2: pytest.approx([0.01, 0.01]) for D2 in (1e6, 2e6)}
    table = report.methods_table(differences)
    assert "+10.00 % (1)" in table[2] and "+1.00 ± 0.00 % (2)" in table[3] and "nan" not in "".join(table)
    plt.close(figures.against_copy(differences))


# Predictions and words

@pytest.mark.parametrize("truth, system", [(TABLE2, THREE), (HEAD_START, SHARED)])
def test_planted_laws_predict_their_rows(truth, system):
    rows = simulate(truth, system)
    for law, entry in content_of(rows, truth, system)["laws"].items():  # of one fit: each entry has all laws
        predicted = figures.predicted_losses(rows, law, entry)
        assert predicted == pytest.approx([row["loss"] for row in rows], rel=1e-12)
    alone = entry | {"beside": {}, "fitted_with": {"moe": law}}
    assert np.isnan(figures.predicted_losses(simulate(truth, {"dense": "dense"}), law, alone)).all()


def test_the_local_exponent_of_a_power_law_is_its_exponent():
    D2 = np.geomspace(1e5, 1e7, 6)
    slope, error = figures.local_exponent(D2, 3 * D2 ** -0.17)
    assert slope == pytest.approx(-0.17) and error < 1e-9


def test_numbers_are_three_digits_and_a_unit():
    told = [short(value) for value in (999.4, 50.61e9, 9.994e14, 9.996e14, 1.234e15, 0.01234)]
    assert told == ["999", "50.6B", "999T", "1000T", "1.23e15", "1.23e-2"]


def test_t_interval_covers_the_mean_of_small_samples():
    random = np.random.default_rng(0)
    samples = random.standard_normal((2000, 3))
    covered = np.mean([abs(mean) < half for mean, half in map(figures.t_interval, samples)])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)
    assert np.isnan(figures.t_interval([1.0])[1])


def test_the_planted_alpha3_and_head_start_are_said():
    rows = simulate(TABLE2)
    said = " ".join(report.findings(rows, content_of(rows, TABLE2, THREE)))
    assert "alpha3 of the interaction law is 0.000798" in said
    slopes = [np.polyfit(np.log(DATA), [math.log(row["loss"]) for row in rows
                                        if row.get("D1") == DATA[-1] and row["N"] == n], 1)[0] for n in SIZES]
    assert f"At D1 = 100B the loss falls as D2^{np.mean(slopes):.3f}, on average over sizes." in said
    rows = simulate(HEAD_START, SHARED)
    content = content_of(rows, HEAD_START, SHARED)
    table = report.head_start_table(report.head_starts(content["laws"], content["ranges"]))
    assert len(table) == 4 and f"| 100B | {short(80 * 1e11 ** 0.67)} (" in table[3]


CURVE = dict(A=60.0, alpha=0.22, B=7.05, beta=0.16, E=1.0, c=80.0, gamma=0.67)


def crossing(kappa, n, D1):
    """D2* of the handicap law by root finding; the formula is written out here."""
    def loss(tokens):
        return CURVE["A"] * tokens ** -CURVE["alpha"] + CURVE["B"] * n ** -CURVE["beta"] + CURVE["E"]

    head = CURVE["c"] * D1 ** CURVE["gamma"]
    return brentq(lambda D2: kappa + math.log(loss(D2 + head) / loss(D2)), 1e4, 1e13)


def test_from_scratch_overtakes_where_the_handicap_outweighs_the_head_start():
    kappas = np.array([0.01, 0.02, 0.05, 0.0, -0.01])
    draws = {name: np.full(5, value) for name, value in CURVE.items()} | {"kappa": kappas}
    found = report.overtaking_by("upcycled.handicap", draws, 1e6, 1e8)
    assert found[:3] == pytest.approx([crossing(kappa, 1e6, 1e8) for kappa in kappas[:3]], rel=0.005)
    assert np.isinf(found[3:]).all()  # no handicap: the head start only fades


def test_each_method_has_its_head_start_handicap_and_overtaking():
    def fitted(c, kappa):
        params, errors = CURVE | {"c": c, "kappa": kappa}, np.linspace(-1e-3, 1e-3, 21)
        draws = {name: np.full(21, value) for name, value in params.items()} | {"kappa": kappa + errors}
        return {"params": params, "draws": draws}

    methods = {"copy": fitted(80.0, 0.03), "drop 0.5": fitted(40.0, 1e-3), "noise 0.1 σ": fitted(9.0, -0.01)}
    laws = {"upcycled.handicap": methods["copy"] | {"methods": methods}}
    ranges = {"upcycled": {"N": [1e5, 1e6], "D1": [1e7, 1e8], "D2": [1e7, 2e8]}}
    table = [[cell.strip() for cell in line.split("|")[2:-1]]
             for line in report.head_start_table(report.head_starts(laws, ranges))[2:]]
    assert [line[:2] for line in table] == [[method, d1] for method in methods for d1 in ("10M", "100M")]
    star, = report.overtaking_by("upcycled.handicap", methods["copy"]["params"], 1e6, 1e8)
    method, d1, worth, cost, said = table[1]
    assert worth == short(80 * 1e8 ** 0.67) and table[3][2] == short(40 * 1e8 ** 0.67)
    assert cost == "3.00 % (2.90 % to 3.10 %)" and said.startswith(f"{short(star)} (")
    assert table[5][4] == "never"
    said = list(report.findings([], {"laws": laws, "ranges": ranges}))
    assert len(said) == 3 and f"copy: a dense checkpoint of 100M tokens is worth {worth} tokens" in said[0]
    assert f"costs {cost} of the loss for ever" in said[0] and "D2*: never." in said[2]


def test_rows_are_predicted_by_the_parameters_of_their_own_method():
    entry = {"fitted_with": {"upcycled": "upcycled.handicap"}, "params": CURVE | {"kappa": 0.0},
             "methods": {"drop 0.5": {"params": CURVE | {"kappa": 0.1}}}}
    rows = [run("copy", 1.0), run("drop", 1.0, drop_ratio=0.5)]
    copied, dropped = figures.predicted_losses(rows, "upcycled.handicap", entry)
    assert dropped / copied == pytest.approx(math.exp(0.1))


def test_loss_matching_of_the_published_laws_and_where_it_agrees(tmp_path):
    report.write_published(os.path.join(ROOT, "laws", "liew2025.json"), str(tmp_path / "out"))
    assert "arXiv 2502.03009" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "loss_matching.png").stat().st_size > 20000
    dense, moe, law = (TABLE2[name] for name in ("dense", "moe", "upcycled"))

    def from_scratch(D):
        return moe["A"] * D ** -moe["alpha"] + moe["B"] * 1e9 ** -moe["beta"] + moe["E"]

    for D1 in (1e9, 1e10, 1e11):
        start = dense["A"] * D1 ** -dense["alpha"] + dense["B"] * 1e9 ** -dense["beta"] + dense["E"]
        head = brentq(lambda D: from_scratch(D) - start, 1e3, 1e13)
        for D2 in (1e9, 1e10, 1e11, 1e12):
            slope = -law["alpha2"] + law["alpha3"] * math.log(D1)
            published = (law["A"] * D1 ** -law["alpha1"] * D2 ** slope + law["B"] * 1e9 ** -law["beta"]
                         + law["E"])
            difference, above_start, above_scratch = report.compared(TABLE2, 1e9, D1, D2)
            assert difference == pytest.approx(from_scratch(head + D2) / published - 1, abs=1e-6)
            assert (above_start, above_scratch) == (published > start, published > from_scratch(D2))


@pytest.mark.parametrize("content", [
    None, "{", "[]", '{"version": 1, "laws": {"dense": {"params": {}}}}', '{"version": 1, "laws": 3}',
    json.dumps({"version": 1, "laws": {law: {"params": TABLE2[law]} for law in ("dense", "moe")}}),
    json.dumps({"version": 1, "laws": {law: {"params": params} for law, params in TABLE2.items()},
                "ranges": {"upcycled": {"N": 3}}}),
    json.dumps({"version": 1, "laws": {law: {"params": {"A": "x"}} for law in TABLE2},
                "ranges": {"upcycled": {"N": [1e6, 1e9]}}})])
def test_a_file_of_no_published_laws_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "laws.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="laws.json: ") as error:
        report.write_published(str(path), str(tmp_path / "out"))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# Tables

def test_held_out_columns_say_how_many_rows_they_rest_on_and_misfit_is_named():
    rows = simulate(TABLE2)
    laws = content_of(rows, TABLE2, THREE)["laws"]
    header, _, *lines = report.comparison_table(laws)
    assert "largest D1 held out" in header and "a trunk held out" not in header  # no law has such an error
    assert all("1.88 % (12 rows, 2.5 x)" in line for line in lines)
    header, _, *lines = report.noise_table(laws)
    assert "misfit of the law" in header and len(lines) == 3
    assert all(f" {number} %" in line for line in lines for number in ("0.20", "0.30", "0.50", "0.71"))
    for entry in laws.values():  # no seed is repeated
        entry["misfit"] = dict.fromkeys(entry["misfit"])
    assert all("0.20 % with misfit" in line for line in report.noise_table(laws)[2:])


def test_a_law_that_was_fitted_to_no_upcycled_row_predicts_them():
    law = "upcycled.loss_matching_0"
    truth = HEAD_START | {law: {}}
    rows = simulate(HEAD_START, SHARED)
    laws = content_of(rows, HEAD_START, SHARED)["laws"]
    laws |= content_of(rows, truth, {"dense": "dense", "moe": law})["laws"] | {"dense": laws["dense"]}
    laws[law]["n"] = 3
    _, _, *lines = report.comparison_table(laws)
    assert [" predicted" in line for line in lines] == [name == law for name in laws]


def test_a_law_that_misses_rows_from_scratch_which_their_own_law_meets_is_doubted():
    laws = content_of(simulate(HEAD_START, SHARED), HEAD_START, SHARED, ["moe"])["laws"]
    shared = laws[SHARED["moe"]]
    assert report.doubts(laws) == []
    shared["misfit"] = {"dense": 0.02, "moe": 0.0214, "upcycled": 0.5}
    said, = report.doubts(laws)  # the dense rows by less than three times
    assert said.startswith(f"{SHARED['moe']} misses the MoE from scratch rows by 2.14 %, their own law by")
    for entry in laws.values():  # misfit is part of the noise
        entry["misfit"] = dict.fromkeys(entry["misfit"])
    assert report.doubts(laws) == []
    shared["noise"]["moe"]["row"] = 0.0061
    assert len(report.doubts(laws)) == 1


def test_a_claim_has_a_line_for_each_variation():
    claims = {"alpha3 > 0": {"all rows": {"holds": True, "value": "0.06"},
                             "no small D2": {"holds": False, "value": "0.0"}}}
    lines = report.claims_table(claims)
    assert len(lines) == 4 and "yes" in lines[2] and "no small D2" in lines[3] and "| no " in lines[3]
    assert report.claims_table({}) == []


CELLS = st.text(st.characters(blacklist_characters="|\n"), max_size=5)


@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=4))
def test_tables_keep_their_cells_and_one_width(lines):
    table = report.aligned(["a", "b"], lines)
    assert len(table) == (len(lines) + 2 if lines else 0) and len({len(line) for line in table}) <= 1
    for line, cells in zip(table[2:], lines):
        assert [cell.strip() for cell in line[1:-1].split("|")] == [cell.strip() for cell in cells]


def test_the_p_value_of_alpha3_is_the_share_of_draws_on_the_other_side():
    assert report.alpha3_p({"draws": {"alpha3": [1.0] * 99}}) == "p <= 0.02"
    assert report.alpha3_p({"draws": {"alpha3": [1.0] * 95 + [-1.0] * 4}}) == "p = 0.1"
    assert report.alpha3_p({"draws": {"alpha3": [-1.0, 1.0] * 50}}) == "p = 1"


# Figures

def label_boxes(axis):
    """Windows of the tick labels that are drawn beside a plot."""
    for half in filter(lambda half: half.get_visible(), (axis.xaxis, axis.yaxis)):
        low, high = sorted(half.get_view_interval())
        for tick in half.get_major_ticks():
            if low <= tick.get_loc() <= high:
                yield from (label.get_window_extent() for label in (tick.label1, tick.label2)
                            if label.get_visible() and label.get_text())


def assert_labels_do_not_overlap(figure):
    figure.canvas.draw()
    boxes = [box for axis in figure.axes for box in label_boxes(axis)]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)
    plt.close(figure)


def test_the_law_that_predicts_held_out_rows_best_is_drawn_for_all_families():
    rows = simulate(HEAD_START, SHARED)
    content = content_of(rows, HEAD_START, SHARED, ["moe", "upcycled.saturating"])
    best, laws = SHARED["moe"], content["laws"]
    laws["moe"]["params"] = CURVE | {"A": 99.0}  # the MoE's own law is another
    laws["upcycled.saturating"] |= {"aicc": -1e9, "held_out": {"D1": {"rms": 0.05, "rows": 12, "beyond": 2}}}
    figure, _ = report.draw_figures(rows, laws)["loss_against_tokens"]
    assert [law_name(best) in legend.get_title().get_text() for legend in figure.legends] == [True]
    curves = [line.get_xydata() for line in figure.axes[0].lines if len(line.get_xdata()) == 60]
    scratch = [row["loss"] for row in rows if row["family"] == "moe" and row["N"] == SIZES[0]]
    assert any(curve[[0, -1], 1] == pytest.approx([scratch[0], scratch[-1]]) for curve in curves)
    plt.close("all")


def test_levels_within_5_percent_are_one_in_figures_and_pairs():
    rows = simulate(TABLE2, N=[1e8], noise=0.01) + simulate(TABLE2, N=[1.02e8], D=1.01 * DATA,
                                                            D1=1.03 * DATA[::2], D2=1.04 * DATA)
    _, joined = report.main_method_rows(rows)
    for name, count in (("N", 1), ("D", 5), ("D1", 3), ("D2", 5)):
        assert len({row[name] for row in joined if name in row}) == count
    figure, _ = report.draw_figures(rows, content_of(rows, TABLE2, THREE)["laws"])["loss_against_tokens"]
    assert len([axis for axis in figure.axes if axis.lines]) == 1  # one panel, and a curve for each D1
    assert sum("D1 = " in text.get_text() for text in figure.legends[0].get_texts()) == 3
    plt.close("all")
    pair = [run("copy", 2.0), run("drop", 2.1, D2=1.03e6, drop_ratio=0.5)]
    assert report.method_differences(pair) == {("drop 0.5", 1e6, 1e7): {1e6: [pytest.approx(0.05)]}}
    assert report.method_differences([pair[0], pair[1] | {"D2": 1.06e6}]) == {}


CLOSE = [1e6, 1.02e6, 1.05e6, 2e6, 2.1e6, 7.9e6, 8e6]


@pytest.mark.parametrize("levels", [CLOSE, [1e6], [1e6, 1.01e6], [1e3, 1e6, 1.1e6],
                                    list(np.geomspace(1e6, 1e9, 40))])
def test_tick_labels_of_close_levels_do_not_overlap(levels):
    figure, axes = figures.panels(3)
    for axis in axes:
        figures.log_axis(axis, levels)
        axis.plot(levels, levels)
        shown = axis.get_xticks()
        assert shown[0] == levels[0] and (shown[-1] == levels[-1] or levels[-1] < 1.1 * levels[0])
    assert_labels_do_not_overlap(figure)


def test_every_figure_of_a_study_has_labels_that_do_not_overlap(tmp_path):
    rows = simulate(TABLE2, N=[1e6, 1.1e6, 4e6, 1e7], D=CLOSE, D1=CLOSE, D2=CLOSE, noise=0.01)
    for row in rows:
        row |= {"method": "copy"} if row["family"] == "upcycled" else {}
    rows += [row | {"method": "drop", "drop_ratio": 0.5, "loss": row["loss"] * 1.01} for row in rows
             if row["family"] == "upcycled"]
    content = content_of(rows, TABLE2, THREE)
    found = report.draw_figures(rows, content["laws"])
    assert set(found) == {"loss_against_tokens", "exponent_against_D1", "residuals", "methods_against_copy"}
    for figure, _ in found.values():
        assert_labels_do_not_overlap(figure)


def moe_rows():
    truth = dict(a=36.0, delta=0.22, alpha=-0.19, gamma=-0.01, b=36.0, omega=-0.55, beta=-0.18, zeta=0.026,
                 c=1.36)
    rows = []
    for experts, n, D in itertools.product((4.0, 8.0, 64.0), (1e7, 1e8), (1e9, 1e10, 1e11)):
        e = math.log(experts)
        loss = (36 * math.exp(0.22 * e) * (1.5 * n) ** (-0.19 - 0.01 * e)
                + 36 * math.exp(-0.55 * e) * D ** (-0.18 + 0.026 * e) + 1.36)
        rows.append({"family": "moe", "N": n, "N_active": 1.5 * n, "D": D, "num_local_experts": experts,
                     "num_experts_per_tok": 2.0, "loss": loss})
    return rows, {"moe.joint": truth}


def test_residuals_of_a_planted_moe_law_are_zero_against_the_number_of_experts():
    rows, truth = moe_rows()
    content = content_of(rows, truth, {"moe": "moe.joint"})
    found = report.draw_figures(rows, content["laws"])
    assert set(found) == {"loss_against_tokens", "residuals"}
    against_experts = {axis.get_xlabel(): axis for axis in found["residuals"][0].axes}["experts per layer"]
    points = against_experts.lines[0].get_xydata()
    assert sorted(set(points[:, 0])) == [4, 8, 64] and np.abs(points[:, 1]).max() < 1e-9
    loss_axis = found["loss_against_tokens"][0].axes[0]
    assert loss_axis.get_xlabel() == "D (tokens)"
    curves = [line for line in loss_axis.lines if len(line.get_xdata()) == 60]
    assert len(curves) == 3  # one a number of experts, through the measured points
    for curve, experts in zip(curves, (4.0, 8.0, 64.0)):
        measured = [row["loss"] for row in rows if row["N"] == 1e7 and row["num_local_experts"] == experts]
        assert curve.get_ydata()[[0, -1]] == pytest.approx([measured[0], measured[-1]])
    for figure, _ in found.values():
        assert_labels_do_not_overlap(figure)


# report.md

PROFILE = {"E": [0.1, 0.2, 0.3], "alpha3": [1e-3, 2e-3, 3e-3], "objective": [0.0, 0.1, 1.5],
           "inside": [True, False, False]}


def test_report_has_a_section_for_all_that_is_known_and_each_figure(tmp_path):
    rows = simulate(TABLE2, noise=0.01)
    content = content_of(rows, TABLE2, THREE)
    content["claims"] = {"a claim": {"all rows": {"holds": True, "value": "3"}}}
    content["bits_per_nat"] = 0.5
    report.write(rows, content, PROFILE, ["something is odd"], str(tmp_path))
    text = (tmp_path / "report.md").read_text()
    headings = [line[3:] for line in text.split("\n") if line.startswith("## ")]
    assert headings == ["Terms", "The laws", "What was measured", "Warnings", "What was found",
                        "Claims under variations of the analysis", "How well the laws predict",
                        "Noise and misfit", "Parameters", "alpha3 of the interaction law along E"]
    assert re.search(r"\| 0.200 +\| 0.002 +\| 10.00 % +\|  ", text) and "| 0.003 " not in text
    assert all(f"`{law}`" in text and law_name(law) in text for law in LAWS)  # under The laws
    lowest = min(row["loss"] for row in rows if row["family"] == "moe")
    assert f", lowest loss {lowest:.4f} nats a token ({lowest / 2:.4f} bits a byte)\n" in text
    assert "- something is odd" in text and f"There are {len(rows)} rows" in text
    for name in ("loss_against_tokens", "exponent_against_D1", "residuals"):
        for kind in ("png", "pdf"):
            assert (tmp_path / f"{name}.{kind}").stat().st_size > 5000
        assert f"]({name}.png)" in text


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    rows = simulate(TABLE2, {"dense": "dense"})
    (tmp_path / "residuals.png").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write(rows, content_of(rows, TABLE2, {"dense": "dense"}), {}, [], str(tmp_path))


def test_a_random_design_makes_no_more_panels_and_curves_than_can_be_told_apart():
    random = np.random.default_rng(0)
    rows = []  # a random design: every D1, D2 and N of its own
    for _ in range(60):
        rows += simulate(TABLE2, {"upcycled": "upcycled"}, N=[float(random.uniform(1e7, 1e9))],
                         D1=random.uniform(1e9, 1e11, 1), D2=random.uniform(1e9, 1e11, 1))
    system = {"upcycled": "upcycled"}
    found = report.draw_figures(rows, content_of(rows, TABLE2, system)["laws"])
    for figure, _ in found.values():
        figure.canvas.draw()
        assert min(axis.get_window_extent().width / figure.dpi for axis in figure.axes) > 1.5  # inches
        assert len(figure.axes) <= 9 and all(len(legend.get_texts()) <= 9 for legend in figure.legends)
        plt.close(figure)
