"""Figures of a study: rows and fitted laws -> matplotlib figures.

`rows` are those of rows.read_rows. `laws` is {law: entry}, as laws.json holds them. Losses are nats per token.
"""
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from scipy import stats

from laws import predict, variable

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "legend.fontsize": 8, "figure.dpi": 150, "savefig.bbox": "tight", "figure.constrained_layout.use": True})
FAMILY_NAMES = {"dense": "dense", "moe": "MoE from scratch", "upcycled": "upcycled"}
MARKS = {"dense": ("o", "#888888"), "moe": ("s", "#222222"), "upcycled": ("D", "#3b6fb6")}  # marker and colour
RIVAL_STYLES = {"upcycled": ("interaction", "#c0392b", "-"),  # name, colour and dashes of each upcycled law
                "upcycled.no_interaction": ("no interaction", "#7f8c8d", ":"),
                "upcycled.additive": ("additive", "#b8860b", "-."),
                "upcycled.effective_data": ("effective data", "#27874a", "--"),
                "upcycled.effective_data_shared": ("effective data, shared", "#5b3b9c", (0, (4, 1, 1, 1))),
                "upcycled.saturating": ("saturating head start", "#0f8b8d", (0, (5, 2))),
                "upcycled.handicap": ("handicap", "#d35400", (0, (6, 1))),
                "upcycled.loss_matching": ("loss matching", "#2c3e90", (0, (2, 1))),
                "upcycled.loss_matching_0": ("loss matching, delta = 0", "#7fb3d5", (0, (1, 1)))}
HELD_OUT_MARKS = {"trunk": "o", "D": "<", "D1": "^", "D2": "v", "N": "P", "experts": "X"}
VARIABLES = ("N", "D", "D1", "D2", "N_active", "N_total", "experts", "sparsity", "active_share")


def short(value):
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:  # 999,999 is 1M and not 1e+03k
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def law_name(law):
    """The name of a law in words."""
    return RIVAL_STYLES[law][0] if law in RIVAL_STYLES else FAMILY_NAMES.get(law, law.replace(".", ": ").replace("_", " "))


def sorted_levels(rows, name):
    """The different values of a variable in the rows that have it, ascending."""
    return sorted({row[name] for row in rows if name in row})


def of_family(rows, family, **values):
    """The rows of a family whose variables have the given values."""
    return [row for row in rows if row["family"] == family and all(row[name] == value for name, value in values.items())]


def mean_loss(rows, name):
    """Levels of a variable, the mean loss at each, and half the range of its losses (repeats, seeds): three (n,) arrays."""
    levels = sorted_levels(rows, name)
    groups = [[row["loss"] for row in rows if row[name] == level] for level in levels]
    return np.array(levels), np.array([np.mean(group) for group in groups]), np.array([np.ptp(group) / 2 for group in groups])


def predicted_losses(rows, law, entry):
    """(n,) losses of the rows by the laws of the fit that `entry` of laws.json describes; nan where it has no law for a row."""
    losses = np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        row_law = entry["fitted_with"].get(row["family"])
        params = entry["params"] if row_law == law else entry.get("beside", {}).get(row_law, {}).get("params")
        if params:
            known = {name: variable(row, name) for name in VARIABLES}
            if row["family"] == "moe" and row_law.startswith("upcycled"):  # from scratch is D1 = 0
                known |= {"D1": 0.0, "D2": row["D"]}
            losses[i] = predict(row_law, params, **{name: value for name, value in known.items() if not np.isnan(value)})
    return losses


def t_interval(values):
    """Mean and half of its 95 % t-interval. The half is nan for one value, both are nan for none."""
    if not len(values):
        return np.nan, np.nan
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(stats.t.ppf(0.975, max(len(values) - 1, 1)) * spread)


def local_exponent(tokens, loss):
    """d ln loss / d ln tokens by least squares over (n,) points, and its standard error."""
    x, y = np.log(tokens) - np.log(tokens).mean(), np.log(loss) - np.log(loss).mean()
    slope = (x * y).sum() / (x * x).sum()
    return slope, np.sqrt(((y - slope * x) ** 2).sum() / max(len(x) - 2, 1) / (x * x).sum())


# ---------------------------------------------------------------------------------------------------------
# Axes

def panels(count, height=3.4, sharey=False):
    """A figure and its `count` axes, at most three a line."""
    columns = 2 if count == 4 else min(count, 3)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.3 * columns + 0.6, height * lines), squeeze=False, sharey=sharey)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def spread_ticks(levels, most=5):
    """Those of the sorted levels whose labels do not touch on a log axis; the first and the last are among them."""
    gap = 0.8 * np.log(levels[-1] / levels[0]) / max(most - 1, 1)
    kept = [levels[0]]
    for level in levels[1:]:
        if np.log(level / kept[-1]) >= gap:
            kept.append(level)
    if kept[-1] != levels[-1]:
        kept[len(kept) - 1 or 1:] = [levels[-1]]  # never in place of the first
    return kept


def log_axis(axis, levels, most=5):
    """A log axis across with ticks at some of the sorted levels, at most `most`, written short."""
    ticks = spread_ticks(levels, most)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [short(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.margins(x=0.09)


def loss_axis(axis):
    """A log axis of losses upwards, with round numbers for ticks."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.MaxNLocator(6))
    axis.yaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))


def shades(levels):
    """{level: colour}, dark to bright."""
    return dict(zip(levels, plt.cm.viridis(np.linspace(0.0, 0.85, len(levels)))))


def legend_outside(figure, axes, title=None):
    """One legend for all panels, right of them."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", title=title, title_fontsize=8, alignment="left")


# ---------------------------------------------------------------------------------------------------------
# The figures

def series_of(rows, n):
    """[(family, label, rows, token variable, colour)] of the curves of one size: upcycled by D1, MoE by experts, dense."""
    colors = shades(sorted_levels(rows, "D1"))
    curves = [("upcycled", f"upcycled at D1 = {short(d1)}", of_family(rows, "upcycled", N=n, D1=d1), "D2", colors[d1])
              for d1 in colors]
    counts = sorted({row.get("num_local_experts", 0) for row in of_family(rows, "moe")})
    for experts, gray in zip(counts, plt.cm.plasma(np.linspace(0, 0.85, len(counts))) if len(counts) > 1 else ["#222222"]):
        here = [row for row in of_family(rows, "moe", N=n) if row.get("num_local_experts", 0) == experts]
        curves.append(("moe", "MoE from scratch" + (f", {experts:g} experts" if len(counts) > 1 else ""), here, "D", gray))
    return [*curves, ("dense", "dense", of_family(rows, "dense", N=n), "D", "#888888")]


def loss_against_tokens(rows, laws, shown):
    """One panel a size (nine at most): means over repeats with their range, and the laws {family: [law of lines, of dashes]}."""
    sizes = sorted_levels(of_family(rows, "upcycled") or rows, "N")
    sizes = [sizes[i] for i in np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), 9)).astype(int))]
    figure, axes = panels(len(sizes))
    for axis, n in zip(axes, sizes):
        for family, label, here, tokens, color in series_of(rows, n):
            if not here:
                continue
            x, loss, spread = mean_loss(here, tokens)
            axis.errorbar(x, loss, spread, fmt=MARKS[family][0], ms=4, mfc=color if family == "upcycled" else "white",
                          color=color, label=label)
            fine = np.geomspace(x[0], x[-1], 60)
            for law, dash in zip(shown[family], ("-", "--")):
                curve = predicted_losses([{**here[0], tokens: value} for value in fine], law, laws[law])
                axis.plot(fine, curve, dash, lw=1.2, color=color)
        log_axis(axis, sorted({row.get("D2", row.get("D")) for row in rows if row["N"] == n}))
        loss_axis(axis)
        axis.set(xlabel="D2, or D from scratch (tokens)" if of_family(rows, "upcycled") else "D (tokens)", title=f"N = {short(n)}")
    axes[0].set_ylabel("validation loss (nats per token)")
    legend_outside(figure, axes, "\n".join(f"{dash}: {law_name(law)}" for law, dash in zip(shown["upcycled"], ("lines", "dashes"))))
    return figure


def exponent_against_D1(rows, laws):
    """How fast loss falls with D2, measured and by each law, against D1: one panel a size."""
    sizes = sorted_levels(of_family(rows, "upcycled"), "N")
    figure, axes = panels(len(sizes), sharey=True)
    for axis, n in zip(axes, sizes):
        groups = {d1: of_family(rows, "upcycled", N=n, D1=d1) for d1 in sorted_levels(of_family(rows, "upcycled", N=n), "D1")}
        means = {d1: mean_loss(group, "D2")[:2] for d1, group in groups.items()}
        means = {d1: mean for d1, mean in means.items() if len(mean[0]) > 2}
        measured = np.array([local_exponent(*mean) for mean in means.values()]).reshape(-1, 2)
        axis.errorbar(list(means), measured[:, 0], 2 * measured[:, 1], fmt="o", ms=5, color="black",
                      label="measured, ± 2 s.e.", zorder=5)
        for law, (name, color, dash) in RIVAL_STYLES.items():
            if law in laws:  # over the same D2 as the points
                fitted = [local_exponent(D2, predict(law, laws[law]["params"], N=n, D1=d1, D2=D2))[0]
                          for d1, (D2, _) in means.items()]
                axis.plot(list(means), fitted, color=color, ls=dash, label=name)
        log_axis(axis, list(groups))
        axis.set(xlabel="D1 (tokens before upcycling)", title=f"N = {short(n)}")
    axes[0].set_ylabel("local exponent  d ln L / d ln D2")
    legend_outside(figure, axes)
    return figure


def held_out_errors(laws):
    """One line a law: its error in sample and on each kind of held-out rows."""
    figure, axis = plt.subplots(figsize=(5.2, 0.8 + 0.28 * len(laws)))
    places = {law: -i for i, law in enumerate(laws)}
    for kind, mark in {"in sample": "|", **HELD_OUT_MARKS}.items():
        errors = {law: entry["rmse_log"] if kind == "in sample" else (entry["held_out"].get(kind) or {}).get("rms")
                  for law, entry in laws.items()}
        errors = {law: 100 * error for law, error in errors.items() if error}
        label = kind if kind == "in sample" else "a trunk held out" if kind == "trunk" else f"largest {kind} held out"
        if errors:
            axis.plot(list(errors.values()), [places[law] for law in errors], mark, ms=7, mfc="none", mew=1.3, label=label)
    axis.set_yticks(list(places.values()), [law_name(law) for law in places])
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.grid(axis="y", lw=0.4)
    axis.set_xlabel("root mean square error of the loss (%)")
    legend_outside(figure, [axis])
    return figure


def residuals(rows, law, entry):
    """Measured over fitted loss against each variable with several levels, for all families that were fitted with the law."""
    error = 100 * (np.array([row["loss"] for row in rows]) / predicted_losses(rows, law, entry) - 1)
    seen = [row for row, value in zip(rows, error) if np.isfinite(value)]
    units = {"N": "parameters", "D": "tokens", "D1": "tokens", "D2": "tokens", "num_local_experts": "per layer"}
    names = [name for name in units if len(set(sorted_levels(seen, name)) - {0}) > 1]
    figure, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names) + 1, 2.8), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        for i, (family, (mark, color)) in enumerate(MARKS.items()):
            here = [k for k, row in enumerate(rows) if row["family"] == family and row.get(name) and np.isfinite(error[k])]
            if here:  # families side by side
                x = 1.06 ** (i - 1) * np.array([rows[k][name] for k in here])
                axis.plot(x, error[here], mark, ms=3.5, color=color, alpha=0.8, label=FAMILY_NAMES[family])
        axis.axhline(0, color="black", lw=0.8)
        log_axis(axis, [level for level in sorted_levels(seen, name) if level], most=4)
        axis.set_xlabel(f"{'experts' if name == 'num_local_experts' else name} ({units[name]})")
    axes[0, 0].set_ylabel("measured - fitted (%)")
    legend_outside(figure, axes[0], law_name(law))
    return figure


def alpha3_along_E(profiles):
    """alpha3 with E held at each value, and how much worse that fit is: one panel a profile {title: profile}."""
    figure, axes = panels(len(profiles), height=3.0)
    for axis, (title, profile) in zip(axes, profiles.items()):
        near = np.array(profile["objective"]) < 1
        E, alpha3, objective = (np.array(profile[key])[near] for key in ("E", "alpha3", "objective"))
        axis.plot(E, alpha3, color="#c0392b", label="alpha3")
        axis.plot(*profile["fit"], "o", color="#c0392b", label="the fit")
        axis.axhline(0, color="black", lw=0.8)
        likely = E[objective < profile["inside"]]
        if len(likely):
            axis.axvspan(likely[0], likely[-1], color="#c0392b", alpha=0.12, lw=0, label="95 % likelihood interval of E")
        axis.set(xlabel="E held at (nats per token)", title=title)
        right = axis.twinx()
        right.plot(E, 100 * objective, color="#888888", ls="--", label="misfit above its least (%, right axis)")
        right.set_ylim(0, 105)
        right.spines["right"].set_visible(True)
    axes[0].set_ylabel("alpha3, all else refitted")
    handles = [sum(pair, []) for pair in zip(axes[0].get_legend_handles_labels(), right.get_legend_handles_labels())]
    figure.legend(*handles, loc="outside upper center", ncols=2)
    return figure


def against_copy(differences):
    """Loss against copying over D2: mean over seeds and 95 % interval, one panel a (N, D1), one colour a method.

    `differences` is {label: {(N, D1, D2): {seed: relative difference}}}. One label alone: one panel a N, one colour a D1.
    """
    curves = {}  # {(N, D1 or None): {label: {D2: (mean, half of the interval)}}}
    for label, cells in differences.items():
        for (n, d1, d2), by_seed in sorted(cells.items()):
            panel, line = ((n, d1), label) if len(differences) > 1 else ((n, None), f"{label},\nD1 = {short(d1)}")
            curves.setdefault(panel, {}).setdefault(line, {})[d2] = t_interval(list(by_seed.values()))
    figure, axes = panels(len(curves), sharey=True)
    labels = list(dict.fromkeys(label for lines in curves.values() for label in lines))
    for axis, ((n, d1), lines) in zip(axes, sorted(curves.items())):
        for label, points in lines.items():
            place = labels.index(label)
            x = np.array(list(points)) * 1.03 ** (place - (len(labels) - 1) / 2)  # side by side
            mean, half = 100 * np.array(list(points.values())).T
            axis.errorbar(x, mean, half, fmt="o-", ms=4, lw=1, color=plt.cm.tab10(place % 10), label=label)
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.set_yscale("symlog", linthresh=2, linscale=1.5)
        log_axis(axis, sorted({d2 for points in lines.values() for d2 in points}))
        axis.yaxis.set_major_locator(ticker.FixedLocator([-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50]))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.set(xlabel="D2 (tokens after upcycling)", title=f"N = {short(n)}" + (f", D1 = {short(d1)}" if d1 else ""))
    axes[0].set_ylabel("loss against copying (%)\nlinear within ± 2 %, then logarithmic")
    legend_outside(figure, axes, "mean over seeds\nand 95 % interval")
    return figure
