"""Figures of a study, from its rows and fitted laws.

`rows` are those of rows.read_rows, `laws` is {law: entry} as laws.json holds them. Losses: nats per token.
"""
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from scipy import stats

from laws import RIVALS, law_name, predict, short
from problem import levels, levels_of, of_family, point_of
from rows import method_label

plt.rcParams.update({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 8, "figure.dpi": 150, "savefig.bbox": "tight", "figure.constrained_layout.use": True})
FAMILY_STYLES = {  # name, marker and colour
    "dense": ("dense", "o", "#888888"), "moe": ("MoE from scratch", "s", "#222222"),
    "upcycled": ("upcycled", "D", "#3b6fb6")}
RIVAL_STYLES = {law: (plt.cm.tab10(i % 10), ("-", "--", "-.")[i % 3]) for i, law in enumerate(RIVALS)}


def few(levels):
    """At most nine of the levels, evenly spread: more curves or panels cannot be told apart."""
    return [levels[i] for i in np.unique(np.linspace(0, len(levels) - 1, 9).round().astype(int)) if levels]


def mean_loss(rows, name):
    """(n,) levels of a variable, the mean loss at each, and half the range of its losses."""
    levels = levels_of(rows, name)
    groups = [[row["loss"] for row in rows if row[name] == level] for level in levels]
    mean, spread = zip(*((np.mean(group), np.ptp(group) / 2) for group in groups))
    return np.array(levels), np.array(mean), np.array(spread)


def predicted_losses(rows, law, entry):
    """(n,) losses of rows by the laws of the fit that `entry` describes; nan where it has no law."""
    losses = np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        own = row["family"] == law.partition(".")[0]
        row_law = law if own else entry["fitted_with"].get(row["family"])
        fitted = entry if row_law == law else entry.get("beside", {}).get(row_law)
        if fitted and all(len(levels((row.get(name, 0.0), value))) == 1
                          for name, value in entry.get("at", {}).items()):
            fitted = entry.get("methods", {}).get(method_label(row), entry) if own else fitted
            losses[i] = predict(row_law, fitted["params"], **point_of(row))
    return losses


def t_interval(values):
    """The mean and half of its 95 % t-interval; the half is nan for one value."""
    if len(values) < 2:
        return np.mean(values), np.nan
    return np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def local_exponent(tokens, loss):
    """d ln loss / d ln tokens by least squares over (n,) points, and its standard error."""
    line = stats.linregress(np.log(tokens), np.log(loss))
    return line.slope, line.stderr


# ---------------------------------------------------------------------------------------------------------
# Axes

def panels(count, sharey=False):
    """A figure with `count` axes, at most three side by side, and room for a legend right of them."""
    columns = 2 if count == 4 else min(count, 3)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.1 * columns + 2.2, 3.4 * lines),
                                squeeze=False, sharey=sharey)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def spread_ticks(levels, most):
    """Those of the sorted levels whose labels do not touch on a log axis; first and last are among them."""
    gap, kept = 0.8 * np.log(levels[-1] / levels[0]) / (most - 1), [levels[0]]
    for level in levels[1:]:
        if np.log(level / kept[-1]) >= gap and (np.log(levels[-1] / level) >= gap or level == levels[-1]):
            kept.append(level)
    return kept if kept[-1] == levels[-1] else [*kept, levels[-1]]


def log_axis(axis, levels, most=5):
    """A log axis across, with ticks at some of the sorted levels, written short."""
    ticks = spread_ticks(levels, most)
    if levels[0] == levels[-1]:  # margins of nothing are nothing
        axis.set_xlim(levels[0] / 2, levels[0] * 2)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [short(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.margins(x=0.09)


def aside(levels, place, count):
    """The factor that moves curve `place` of `count` aside on a log axis over the sorted levels."""
    return max(levels[-1] / levels[0], 2.0) ** (0.02 * (place - (count - 1) / 2))


def shades(levels):
    """{level: colour}, dark to bright."""
    return dict(zip(levels, plt.cm.viridis(np.linspace(0.0, 0.85, len(levels)))))


def finished(figure, axes, ylabel, title=None):
    """The figure with a label left of its panels, and right of them one legend for all, with a title."""
    axes[0].set_ylabel(ylabel)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", title=title,
                  title_fontsize=8, alignment="left")
    return figure


# ---------------------------------------------------------------------------------------------------------
# The figures

def curves_of(rows):
    """{(family, D1 or number of experts): (label, colour)} of the curves that loss against tokens shows."""
    curves = {}
    for d1, color in shades(few(levels_of(rows, "D1"))).items():
        curves["upcycled", d1] = f"upcycled, D1 = {short(d1)}", color
    counts = few(sorted({row.get("num_local_experts", 0) for row in of_family(rows, "moe")}))
    for count, color in shades(counts).items():
        label = FAMILY_STYLES["moe"][0] + f", {count:g} experts" * (count > 0)
        curves["moe", count] = label, color if len(counts) > 1 else FAMILY_STYLES["moe"][2]
    for count in {row.get("num_local_experts", 0) for row in of_family(rows, "dense")}:
        curves["dense", count] = FAMILY_STYLES["dense"][0], FAMILY_STYLES["dense"][2]
    return curves


def loss_against_tokens(rows, laws, shown):
    """One panel a size: mean loss, its range over repeats, and the laws. shown is {family: [law that is drawn
    as lines, law that is drawn as dashes]}."""
    upcycled = of_family(rows, "upcycled")
    sizes = few(levels_of(upcycled or rows, "N"))
    figure, axes = panels(len(sizes))
    for axis, n in zip(axes, sizes):
        for (family, level), (label, color) in curves_of(rows).items():
            tokens, column = ("D2", "D1") if family == "upcycled" else ("D", "num_local_experts")
            here = [row for row in of_family(rows, family, N=n) if row.get(column, 0) == level]
            if not here:
                continue
            x, loss, spread = mean_loss(here, tokens)
            axis.errorbar(x, loss, spread, fmt=FAMILY_STYLES[family][1], ms=4, color=color, label=label,
                          mfc=color if family == "upcycled" else "white")
            for law, dash in zip(shown[family], ("-", "--")):
                fine = [{**here[0], tokens: value} for value in np.geomspace(x[0], x[-1], 60)]
                axis.plot([row[tokens] for row in fine], predicted_losses(fine, law, laws[law]), dash, lw=1.2,
                          color=color)
        log_axis(axis, levels_of([row for row in rows if row["N"] == n], "effective"))
        axis.set(yscale="log", title=f"N = {short(n)}",
                 xlabel="D2, or D from scratch (tokens)" if upcycled else "D (tokens)")
        axis.yaxis.set_major_locator(ticker.MaxNLocator(6))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axis.yaxis.set_minor_locator(ticker.NullLocator())
    names = [f"{dash}: {law_name(law)}" for law, dash in zip(shown["upcycled"], ("lines", "dashes"))]
    return finished(figure, axes, "validation loss (nats per token)", "\n".join(names))


def exponent_against_D1(rows, laws):
    """How fast loss falls with D2, measured and by each law, against D1: one panel a size."""
    sizes = few(levels_of(of_family(rows, "upcycled"), "N"))
    figure, axes = panels(len(sizes), sharey=True)
    for axis, n in zip(axes, sizes):
        here = of_family(rows, "upcycled", N=n)
        means = {d1: mean_loss(of_family(here, "upcycled", D1=d1), "D2") for d1 in levels_of(here, "D1")}
        means = {d1: mean for d1, mean in means.items() if len(mean[0]) > 2}
        slopes = np.array([local_exponent(D2, loss) for D2, loss, _ in means.values()]).reshape(-1, 2)
        axis.errorbar(list(means), slopes[:, 0], 2 * slopes[:, 1], fmt="o", ms=5, color="black", zorder=5,
                      label="measured, ± 2 s.e.")
        for law, (color, dash) in RIVAL_STYLES.items():
            if law in laws:  # over the same D2 as the points
                fitted = [predicted_losses([{**here[0], "D1": d1, "D2": d2} for d2 in D2], law, laws[law])
                          for d1, (D2, _, _) in means.items()]
                slopes = [local_exponent(D2, loss)[0] for loss, (D2, _, _) in zip(fitted, means.values())]
                axis.plot(list(means), slopes, color=color, ls=dash, label=law_name(law))
        log_axis(axis, levels_of(here, "D1"))
        axis.set(xlabel="D1 (tokens before upcycling)", title=f"N = {short(n)}")
    return finished(figure, axes, "local exponent  d ln L / d ln D2")


def residuals(rows, law, entry):
    """Measured over fitted loss against each variable, for all families of the fit that `entry` describes."""
    error = 100 * (np.array([row["loss"] for row in rows]) / predicted_losses(rows, law, entry) - 1)
    fitted = [(row, value) for row, value in zip(rows, error) if np.isfinite(value)]
    titles = {"N": "N (parameters)", "D": "D (tokens)", "D1": "D1 (tokens)", "D2": "D2 (tokens)",
              "num_local_experts": "experts per layer"}
    levels = {name: levels_of([row for row, _ in fitted if row.get(name)], name) for name in titles}
    names = [name for name in titles if len(levels[name]) > 1] or ["N"]
    figure, axes = plt.subplots(1, len(names), figsize=(2.5 * len(names) + 1.8, 2.8), sharey=True,
                                squeeze=False)
    for axis, name in zip(axes[0], names):
        families = sorted({row["family"] for row, _ in fitted if row.get(name)})
        for place, family in enumerate(families):
            label, mark, color = FAMILY_STYLES[family]
            points = [(row[name] * aside(levels[name], place, len(families)), value) for row, value in fitted
                      if row["family"] == family and row.get(name)]
            axis.plot(*zip(*points), mark, ms=3.5, color=color, alpha=0.8, label=label)
        axis.axhline(0, color="black", lw=0.8)
        log_axis(axis, levels[name], most=4)
        axis.set_xlabel(titles[name])
    return finished(figure, axes[0], "measured - fitted (%)", f"law: {law_name(law)}")


def against_copy(differences):
    """Loss against copying over D2, mean over pairs and interval: one panel a (N, D1), one colour a method;
    of one method alone a panel a N, a colour a D1. differences is that of report.method_differences."""
    if len({label for label, _, _ in differences}) == 1:
        differences = {(f"{label},\nD1 = {short(d1)}", n, ""): cells
                       for (label, n, d1), cells in differences.items()}
    labels = list(dict.fromkeys(label for label, _, _ in differences))
    places = few(sorted({(n, d1) for _, n, d1 in differences}))
    figure, axes = panels(len(places), sharey=True)
    for axis, (n, d1) in zip(axes, places):
        here = {key[0]: cells for key, cells in differences.items() if key[1:] == (n, d1)}
        tokens = sorted({d2 for cells in here.values() for d2 in cells})
        for label, cells in here.items():
            place = labels.index(label)
            color = FAMILY_STYLES["moe"][2] if label == FAMILY_STYLES["moe"][0] else plt.cm.tab10(place % 10)
            x = np.array(list(cells)) * aside(tokens, place, len(labels))
            mean, half = 100 * np.array([t_interval(pairs) for pairs in cells.values()]).T
            axis.errorbar(x, mean, half, fmt="o-", ms=4, lw=1, color=color, label=label)
        axis.axhline(0, color="black", lw=0.8, ls=":")
        log_axis(axis, tokens)
        axis.set_yscale("symlog", linthresh=2, linscale=1.5)
        axis.yaxis.set_major_locator(ticker.FixedLocator([-20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50]))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
        axis.yaxis.set_minor_locator(ticker.NullLocator())
        title = f"N = {short(n)}" + (f", D1 = {short(d1)}" if d1 else "")
        axis.set(xlabel="D2 (tokens after upcycling)", title=title)
    return finished(figure, axes, "loss against copying (%)\nlinear within ± 2 %, then logarithmic",
                    "mean over pairs\nand 95 % interval")


def loss_matching(curves):
    """Loss matching less a published law over D2: one panel a N, one colour a D1. curves is {N: {D1: (D2,
    difference, where that law is above its start, above from scratch)}}, all (n,)."""
    figure, axes = panels(len(curves), sharey=True)
    for axis, (n, by_D1) in zip(axes, curves.items()):
        for (d1, (D2, difference, *above)), color in zip(by_D1.items(), shades(by_D1).values()):
            valid = ~np.any(above, axis=0)
            axis.plot(D2, 100 * difference, "--", lw=0.8, color=color)
            axis.plot(D2, np.where(valid, 100 * difference, np.nan), color=color, label=f"D1 = {short(d1)}")
        axis.axhline(0, color="black", lw=0.8, ls=":")
        log_axis(axis, [D2[0], D2[len(D2) // 2], D2[-1]])
        axis.set(xlabel="D2 (tokens)", title=f"N = {short(n)}")
    return finished(figure, axes, "loss matching - published law (%)")
