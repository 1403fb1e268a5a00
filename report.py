"""Figures (PNG and PDF) and report.md of what fit_laws.py found."""
import math
import os

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from laws import predict
from rows import method_label

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "legend.fontsize": 8, "figure.dpi": 150, "savefig.bbox": "tight", "figure.constrained_layout.use": True})
MARKS = {"dense": ("o", "#888888"), "moe": ("s", "#222222"), "upcycled": ("D", "#3b6fb6")}
STYLE = {"upcycled": ("#c0392b", "-"), "upcycled.no_interaction": ("#7f8c8d", ":"), "upcycled.additive": ("#b8860b", "-."),
         "upcycled.effective_data": ("#27874a", "--"), "upcycled.effective_data_shared": ("#5b3b9c", (0, (4, 1, 1, 1)))}


def short(value):
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def shades(values):
    return dict(zip(values, plt.cm.viridis(np.linspace(0.0, 0.85, len(values)))))


def named(law):
    return "interaction law" if law == "upcycled" else law.removeprefix("upcycled.").replace("_", " ")


def levels(rows, name):
    return sorted({row[name] for row in rows})


def mean_loss(rows, name):
    """x, mean loss and half the spread over seeds at each level of a variable."""
    x = levels(rows, name)
    groups = [[row["loss"] for row in rows if row[name] == v] for v in x]
    return np.array(x), np.array([np.mean(g) for g in groups]), np.array([np.ptp(g) / 2 for g in groups])


def panels(count, height=3.4, sharey=False):
    columns = 2 if count == 4 else min(count, 3)
    figure, axes = plt.subplots(-(-count // columns), columns, figsize=(3.3 * columns + 0.6, height * -(-count // columns)), squeeze=False, sharey=sharey)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def log_axis(axis, values, which="x"):
    """A log axis with up to five of the values as ticks, written short."""
    picked = np.array(values)[np.unique(np.linspace(0, len(values) - 1, min(len(values), 5)).astype(int))]
    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}ticks")(picked, [short(v) for v in picked])
    getattr(axis, f"{which}axis").set_minor_formatter("")


def loss_against_D2(rows, laws, best):
    up = [row for row in rows if row["family"] == "upcycled"]
    figure, axes = panels(len(levels(up, "N")))
    for axis, n in zip(axes, levels(up, "N")):
        mine = [row for row in up if row["N"] == n]
        color = shades(levels(mine, "D1"))
        for d1 in color:
            x, y, spread = mean_loss([row for row in mine if row["D1"] == d1], "D2")
            axis.errorbar(x, y, spread, fmt="D", ms=4, color=color[d1], label=f"upcycled at D1 = {short(d1)}")
            fine = np.geomspace(x[0] / 1.2, x[-1] * 1.2, 60)
            for law, style in ((("upcycled", "-"),) + (((best, "--"),) if best != "upcycled" else ())):
                if law in laws:
                    axis.plot(fine, predict(law, laws[law]["params"], N=n, D1=d1, D2=fine), style, lw=1.2, color=color[d1])
        for family, name in (("moe", "MoE from scratch"), ("dense", "dense")):
            its = [row for row in rows if row["family"] == family and row["N"] == n]
            if its:
                x, y, spread = mean_loss(its, "D")
                axis.errorbar(x, y, spread, fmt=MARKS[family][0], ms=4, mfc="white", color=MARKS[family][1], label=name)
                if family in laws:
                    fine = np.geomspace(x[0], x[-1], 60)
                    axis.plot(fine, predict(family, laws[family]["params"], N=n, D=fine), lw=0.8, color=MARKS[family][1])
        log_axis(axis, sorted({row.get("D2", row.get("D")) for row in rows if row["N"] == n}))
        axis.set(yscale="log", xlabel="D2 (from scratch: D), tokens", title=f"N = {short(n)}")
        axis.yaxis.set_major_formatter("{x:.2f}")
        axis.yaxis.set_minor_formatter("{x:.2f}")
    axes[0].set_ylabel("validation loss (nats a token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", title_fontsize=8, alignment="left",
                  title="lines: interaction law" + (f"\ndashes: {named(best)}" if best != "upcycled" else ""))
    return figure


def slope(d2, loss):
    """d ln loss / d ln D2 by least squares, and its standard error."""
    x, y = np.log(d2) - np.log(d2).mean(), np.log(loss) - np.log(loss).mean()
    b = (x * y).sum() / (x * x).sum()
    return b, np.sqrt(((y - b * x) ** 2).sum() / max(len(x) - 2, 1) / (x * x).sum())


def slope_against_D1(rows, laws):
    up = [row for row in rows if row["family"] == "upcycled"]
    figure, axes = panels(len(levels(up, "N")), sharey=True)
    for axis, n in zip(axes, levels(up, "N")):
        mine = [row for row in up if row["N"] == n]
        d1s = [d for d in levels(mine, "D1") if len(levels([r for r in mine if r["D1"] == d], "D2")) > 2]
        measured = [slope(*mean_loss([row for row in mine if row["D1"] == d], "D2")[:2]) for d in d1s]
        axis.errorbar(d1s, [m[0] for m in measured], [2 * m[1] for m in measured], fmt="o", ms=5, color="black", label="measured, ± 2 s.e.", zorder=5)
        for law, (color, dash) in STYLE.items():
            if law in laws:  # over the D2 that were measured, as the points are
                axis.plot(d1s, [slope(d2 := np.array(levels([r for r in mine if r["D1"] == d], "D2")),
                                      predict(law, laws[law]["params"], N=n, D1=d, D2=d2))[0] for d in d1s],
                          color=color, ls=dash, label=named(law))
        log_axis(axis, d1s)
        axis.set(xlabel="D1 (tokens before upcycling)", title=f"N = {short(n)}")
    axes[0].set_ylabel("local exponent  d ln L / d ln D2")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def predicted_against_measured(laws, details):
    figure, axes = panels(min(len(STYLE), sum(law in laws for law in STYLE)), height=3.2, sharey=True)
    for axis, law in zip(axes, [law for law in STYLE if law in laws]):
        detail = details[law]
        f = detail["fit"]
        for family, (mark, color) in MARKS.items():
            here = np.array([row["family"] == family for row in f.problem.rows])
            if here.any():
                axis.plot(np.exp(f.problem.y[here]), 100 * np.expm1(-f.residual[here]), mark, ms=3.5, color=color, alpha=0.8, label=family)
        for name, mark in (("D1", "^"), ("D2", "v"), ("N", "P")):
            if detail["far"].get(name):
                held, error = detail["far"][name]
                axis.plot([row["loss"] for row in held], 100 * np.expm1(-error), mark, ms=6, mfc="none", color="#c0392b", label=f"largest {name} held out")
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xlabel="measured loss (nats a token)", title=named(law))
    axes[0].set_ylabel("predicted - measured (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def residuals(details):
    f = details["fit"]
    names = [name for name in ("N", "D", "D1", "D2") if any(name in row for row in f.problem.rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(2.4 * len(names) + 1, 2.8), sharey=True, squeeze=False)
    axes = axes[0]
    for axis, name in zip(axes, names):
        for k, (family, (mark, color)) in enumerate(MARKS.items()):
            mine = [(row[name], r) for row, r in zip(f.problem.rows, f.residual) if row["family"] == family and name in row]
            if mine:
                x, r = np.array(mine).T
                axis.plot(x * (1 + 0.06 * (k - 1)), 100 * r, mark, ms=3.5, color=color, alpha=0.8, label=family)
        axis.axhline(0, color="black", lw=0.8)
        log_axis(axis, levels([row for row in f.problem.rows if name in row], name))
        axis.set_xlabel(name)
    axes[0].set_ylabel("measured - fitted (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def alpha3_along_E(profiles):
    figure, axes = panels(len(profiles), height=3.0)
    for axis, (title, profile) in zip(axes, profiles.items()):
        near = np.array(profile["objective"]) < 1
        E, alpha3, objective = (np.array(profile[key])[near] for key in ("E", "alpha3", "objective"))
        axis.plot(E, alpha3, color="#c0392b", label="alpha3")
        axis.plot(*profile["fit"], "o", color="#c0392b", label="fit")
        axis.axhline(0, color="black", lw=0.8)
        likely = E[objective < profile["inside"]]
        if len(likely):
            axis.axvspan(likely[0], likely[-1], color="#c0392b", alpha=0.12, lw=0, label="E within its 95 % likelihood interval")
        axis.set(xlabel="E held at (nats a token)", title=title)
        other = axis.twinx()
        other.plot(E, 100 * objective, color="#888888", ls="--", label="objective above its minimum (right, %)")
        other.set_ylim(0, 105)
        other.spines["right"].set_visible(True)
    axes[0].set_ylabel("alpha3, all else refitted")
    handles = [sum(pair, []) for pair in zip(axes[0].get_legend_handles_labels(), other.get_legend_handles_labels())]
    figure.legend(*handles, loc="outside upper center", ncols=2)
    return figure


def contours(rows, laws, best):
    up = [row for row in rows if row["family"] == "upcycled"]
    n = max(levels(up, "N"))
    show = [law for law in dict.fromkeys(("upcycled", best)) if law in laws]
    d1, d2 = (np.geomspace(levels(up, name)[0] / 2, levels(up, name)[-1] * 2, 80) for name in ("D1", "D2"))
    losses = {law: predict(law, laws[law]["params"], N=n, D1=d1[None, :], D2=d2[:, None]) for law in show}
    inside = [predict(law, laws[law]["params"], N=n, D1=row["D1"], D2=row["D2"]) for law in show for row in up]
    at = np.unique(np.geomspace(min(inside), max(inside), 11))  # levels where the data are
    figure, axes = panels(len(show), sharey=True)
    for axis, law in zip(axes, show):
        mine = [row for row in up if row["N"] == n]
        log_axis(axis, levels(mine, "D1"))
        log_axis(axis, levels(mine, "D2"), "y")  # before the labels are placed
        axis.clabel(axis.contour(d1, d2, losses[law], levels=at, cmap="viridis", linewidths=1.2), fmt="%.2f", fontsize=7)
        axis.plot([row["D1"] for row in mine], [row["D2"] for row in mine], "D", ms=3, color="#3b6fb6", label="measured here")
        axis.set(xlabel="D1 (tokens)", title=f"{named(law)}, N = {short(n)}")
    axes[0].set_ylabel("D2 (tokens)")
    return figure


def method_differences(rows):
    """{method: {(N, D1, D2): {seed: relative difference of loss from copy}}}: pairs that share the dense trunk and its data."""
    up = {(method_label(r), r["N"], r["D1"], r["D2"], str(r.get("seed")), r.get("data_sha256")): r["loss"] for r in rows if r["family"] == "upcycled"}
    out = {}
    for (label, n, d1, d2, seed, data), loss in up.items():
        base = up.get(("copy", n, d1, d2, seed, data))
        if label != "copy" and base:
            out.setdefault(label, {}).setdefault((n, d1, d2), {})[seed] = loss / base - 1
    return out


def interval(values):
    """Mean and half of its 95 % t-interval; the half is nan for one value, both for none."""
    if not values:
        return np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return np.mean(values), half


def methods_against_copy(differences):
    cells = sorted({cell for its in differences.values() for cell in its})
    columns = sorted({cell[:2] for cell in cells})
    figure, axes = panels(len(columns), sharey=True)
    for axis, column in zip(axes, columns):
        d2s = [cell[2] for cell in cells if cell[:2] == column]
        for i, (label, its) in enumerate(differences.items()):
            points = [interval(list(its.get((*column, d2), {}).values())) for d2 in d2s]
            x = np.array(d2s) * 1.06 ** (i - (len(differences) - 1) / 2)  # side by side
            axis.errorbar(x, [100 * m for m, _ in points], [100 * h for _, h in points], fmt="o", ms=4, lw=1, color=plt.cm.tab10(i), label=label)
        axis.axhline(0, color="black", lw=0.8)
        log_axis(axis, d2s)
        axis.set(xlabel="D2 (tokens after upcycling)", title=f"N = {short(column[0])}, D1 = {short(column[1])}")
    axes[0].set_ylabel("validation loss against copy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", title="mean over seeds\nand 95 % interval", title_fontsize=8, alignment="left")
    return figure


def method_lines(differences):
    """A table: each method's mean difference over cells (N, D1, D2), one value a seed that has them all, with its 95 % t-interval over seeds."""
    lines = ["| method | loss against copy | 95 % interval | seeds | cells |", "|---|---|---|---|---|"] * bool(differences)
    for label, its in differences.items():
        whole = set.intersection(*map(set, its.values()))
        mean, half = interval([np.mean([cell[seed] for cell in its.values()]) for seed in whole])
        numbers = f"{100 * mean:+.2f} % | {100 * (mean - half):+.2f} .. {100 * (mean + half):+.2f} %" if len(whole) > 1 else \
                  f"{100 * mean:+.2f} % | -" if whole else "no seed has every cell | -"
        lines.append(f"| {label} | {numbers} | {len(whole)} | {len(its)} |")
    return aligned(lines)


def say_p(entry):
    floor = 2 / (len(entry["draws"]["alpha3"]) + 1)
    return f"p {'<=' if entry['alpha3_p'] <= floor * 1.001 else '='} {entry['alpha3_p']:.2g}"


def percent(value):
    return "-" if value is None else f"{100 * value:.2f} %"


def table(entries, sizes):
    """The comparison, the parameters and the fits at each N: lines of three tables that read on a terminal and in Markdown."""
    best = {}
    for law, e in entries.items():
        group = *e["fitted_with"], e["n_with"]
        best[group] = min(best.get(group, math.inf), e["aicc"])
    compared = ["| law | rows | in sample | trunk left out | to largest D or D1 | to largest D2 | to largest N | AICc - best |", "|---|---|---|---|---|---|---|---|"]
    for law, e in entries.items():
        far = e["extrapolation"]
        behind = "-" if law in ("dense", "moe") else f"{e['aicc'] - best[*e['fitted_with'], e['n_with']]:.1f}"  # theirs is their system's
        compared.append(f"| {law} | {e['n']} | {percent(e['rmse_log'])} | {percent(e['leave_trunk_out'])} | {percent(far.get('D1', far.get('D')))} | "
                     f"{percent(far.get('D2'))} | {percent(far.get('N'))} | {behind} |")
    parameters = ["| law | parameter | estimate | 95 % interval | asymptotic s.e. | at delta 0.001 | |", "|---|---|---|---|---|---|---|"]
    for law, e in entries.items():
        for name, value in e["params"].items():
            low, high = e["ci95"][name]
            note = e["not_identified"].get(name, "shared" if name in e["shared"] else "")
            if name == "alpha3":
                note = "; ".join(filter(None, [say_p(e), note]))
            numbers = f"{low:.4g} .. {high:.4g} | {e['se_asymptotic'][name]:.2g} | {e['params_at_delta_0.001'][name]:.4g}" if low < high else "- | - | -"
            parameters.append(f"| {law} | {name} | {value:.4g} | {numbers} | {note} |")
    each = ["| at one N | law | rows | in sample | trunk left out | exponents, each with its asymptotic s.e. |", "|---|---|---|---|---|---|"] * bool(sizes)
    for n, its in sizes.items():
        for law, e in its.items():
            exponents = ", ".join(f"{k} {v:.3g} ± {e['se_asymptotic'][k]:.1g}" for k, v in e["params"].items() if k.startswith(("alpha", "gamma")))
            each.append(f"| {short(float(n))} | {law} | {e['n']} | {percent(e['rmse_log'])} | {percent(e['leave_trunk_out'])} | {exponents} |")
    return aligned(compared), aligned(parameters), aligned(each)


def aligned(lines):
    """Lines of a Markdown table with their columns padded to one width."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    width = [max(map(len, column)) for column in zip(*cells)]
    return ["| " + " | ".join("-" * w if cell == "---" else cell.ljust(w) for cell, w in zip(row, width)) + " |" for row in cells]


def findings(laws, ranges):
    """What the laws say, [sentence]."""
    said = []
    if "upcycled" in laws:
        e = laws["upcycled"]
        (low, high), p = e["ci95"]["alpha3"], e["params"]
        ends = [-p["alpha2"] + p["alpha3"] * np.log(d) for d in ranges["upcycled"]["D1"]]
        said.append(f"alpha3 = {p['alpha3']:.3g} ({low:.3g} .. {high:.3g}, {say_p(e)}): from D1 = {short(ranges['upcycled']['D1'][0])} to "
                    f"{short(ranges['upcycled']['D1'][1])} the exponent of D2 goes from {ends[0]:.3f} to {ends[1]:.3f}.")
    for name in ("D1", "D2", "N"):
        errors = {law: laws[law]["extrapolation"].get(name) for law in STYLE if law in laws and laws[law]["extrapolation"].get(name) is not None}
        if len(errors) > 1:
            order = sorted(errors, key=errors.get)
            said.append(f"Predicting the held-out largest {name}: " + ", ".join(f"{law} {100 * errors[law]:.2f} %" for law in order) + ".")
    for law in ("upcycled.effective_data_shared", "upcycled.effective_data"):
        if law in laws:
            draws, p = laws[law]["draws"], laws[law]["params"]
            for d1 in ranges["upcycled"]["D1"]:
                worth = np.quantile(np.array(draws["c"]) * d1 ** np.array(draws["gamma"]), [0.025, 0.975])
                said.append(f"Under {law} a dense checkpoint of {short(d1)} tokens is worth {short(p['c'] * d1 ** p['gamma'])} "
                            f"({short(worth[0])} .. {short(worth[1])}) tokens of " + ("MoE training." if law.endswith("_shared") else
                                                                                     "upcycled training (fitted apart from the MoE from scratch)."))
            break
    return said


def report(rows, out, details, profiles, lines, notes, directory):
    """Write report.md and every figure that the fitted laws allow: {figure name} in PNG and PDF."""
    laws = out["laws"]
    rivals = [law for law in STYLE if law in laws]
    best = min(rivals, key=lambda law: laws[law]["aicc"]) if rivals else None
    figures = {}
    if rivals:
        figures["loss_against_D2"] = (loss_against_D2(rows, laws, best), "Loss against D2 for each D1, measured and fitted.")
        figures["slope_against_D1"] = (slope_against_D1(rows, laws), "The interaction, seen directly: how fast loss falls with D2, against D1.")
        figures["predicted_against_measured"] = (predicted_against_measured(laws, details), "Errors of each law in sample, and where the largest level was held out.")
        figures["contours"] = (contours(rows, laws, best), "Predicted loss over (D1, D2).")
    main = details.get("upcycled") or next(iter(details.values()))
    figures["residuals"] = (residuals(main), "Residuals against each variable.")
    shown = {"all N": main["profile"]} if main["profile"] else {}
    shown |= {f"N = {short(n)} alone": profile for n, profile in profiles.items()}
    if shown:
        figures["alpha3_along_E"] = (alpha3_along_E(shown), "alpha3 with E held at each value.")
    if differences := method_differences(rows):
        figures["methods_against_copy"] = (methods_against_copy(differences), "Ways to upcycle against copying: runs of the same dense trunk and data, paired.")
    for name, (figure, _) in figures.items():
        for kind in ("png", "pdf"):
            figure.savefig(os.path.join(directory, f"{name}.{kind}"), metadata={"CreationDate": None} if kind == "pdf" else {})
        plt.close(figure)
    spans = "; ".join(f"{family}: " + ", ".join(f"{name} {short(a)} .. {short(b)}" for name, (a, b) in its.items()) for family, its in out["ranges"].items())
    first = next(iter(laws.values()))
    text = ["# Scaling laws", "", f"{len(rows)} rows. Fitted ranges: {spans}.", "",
            f"Noise of ln loss: {100 * first['row_sd']:.2f} % a run, {100 * first['trunk_sd']:.2f} % a trunk ({first['trunks']} trunks). "
            f"Huber's delta {first['huber_delta']:.2g}. Intervals: {len(next(iter(first['draws'].values())))} draws, {out['intervals']}.", ""]
    text += [f"- {said}" for said in [*findings(laws, out["ranges"]), *(f"warning: {note}" for note in notes)]] + ["", *lines]
    for name, (_, caption) in figures.items():
        text += ["", f"![{caption}]({name}.png)", "", caption]
    with open(os.path.join(directory, "report.md"), "w", encoding="utf-8") as f:
        f.write("\n".join(text) + "\n")
