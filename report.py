"""What fit_laws.py found, in words, tables and figures: report.md.

`rows` are those of rows.read_rows, `laws` is the {law: entry} of laws.json. A table is a list of lines.
"""
import io
import itertools
import math
import os

import matplotlib.pyplot as plt
import numpy as np

import figures
from configurator import HERE, ConfigError, write_text_atomically
from figures import FAMILY_STYLES, t_interval
from laws import RIVALS, SHARED_CURVE, head_start, law_name, overtaking, predict, short
from mixture import LEAST_ERROR, read_laws, weigh
from problem import at_levels, levels_of, of_family
from rows import KNOBS, before_split, loss_columns, loss_text, method_label, run_key

TERMS = os.path.join(HERE, "laws", "terms.md")
HELD_OUT = {"trunk": "a trunk", "D": "largest D", "D1": "largest D1", "D2": "largest D2", "N": "largest N",
            "N_active": "largest N_active", "N_total": "largest N_total", "sparsity": "largest sparsity",
            "experts": "most experts"}
D1_OF_CURVES = (1e9, 1e10, 1e11, 1e12)  # of published laws, which do not say where they were fitted
MATCHING_CAPTION = ("Loss matching less the published upcycled law. Lines are dashed where that law lies "
                    "above its dense start or above a MoE from scratch.")

# ---------------------------------------------------------------------------------------------------------
# Methods of upcycling, paired with copying

def method_differences(rows):
    """{(label, N, D1): {D2: [loss / loss of copying - 1]}}, a difference for each pair of runs, which differ
    in the method and its knobs alone. A MoE from scratch on D = D2 tokens is paired in the same way."""
    rows = at_levels(rows)
    copies = [row for row in of_family(rows, "upcycled") if method_label(row) == "copy"]
    columns = ("trunk", "method", *KNOBS, *before_split({}))
    differences = {}
    for row in (row for row in rows if row["family"] != "dense" and method_label(row) != "copy"):
        scratch = row["family"] == "moe"
        label = FAMILY_STYLES["moe"][0] if scratch else method_label(row)
        but = columns + ("family", "D", "D1", "D2", "dense_trunk") * scratch
        for copy in (copy for copy in copies if row.get("D2", row.get("D")) == copy["D2"]):
            if before_split(row) == before_split(copy) and run_key(row, but) == run_key(copy, but):
                cells = differences.setdefault((label, copy["N"], copy["D1"]), {})
                cells.setdefault(copy["D2"], []).append(row["loss"] / copy["loss"] - 1)
    return {key: dict(sorted(cells.items())) for key, cells in sorted(differences.items())}


# ---------------------------------------------------------------------------------------------------------
# Tables

def aligned(header, lines):
    """A Markdown table with its columns padded to one width; [] for no lines."""
    cells = [header, *lines]
    width = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * w for w in width])
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width)) + " |" for line in cells]
    return padded if lines else []


def percent(value):
    return "-" if value is None else f"{100 * value:.2f} %"


def held_out_text(held):
    """'1.88 % (12 rows, 2.5 x)': error, rows it rests on, how far beyond the fitted ones they reach."""
    if not held:
        return "-"
    beyond = f", {held['beyond']:.2g} x" if held.get("beyond") else ""
    return f"{percent(held['rms'])} ({held['rows']} row{'s' * (held['rows'] != 1)}{beyond})"


def comparison_table(laws):
    """Errors in sample and on held-out rows, and AICc, of each law."""
    same_rows = {}  # {(families, number of rows): [AICc]}; laws that explain the same rows are compared
    for entry in (entry for law, entry in laws.items() if law not in ("dense", "moe")):
        same_rows.setdefault((*entry["fitted_with"], entry["n_with"]), []).append(entry["aicc"])
    kinds = [kind for kind in HELD_OUT if any(entry["held_out"].get(kind) for entry in laws.values())]
    lines = []
    for law, entry in laws.items():
        rivals = same_rows.get((*entry["fitted_with"], entry["n_with"]), [])
        compared = len(rivals) > 1 and law not in ("dense", "moe")  # these two are part of each rival's fit
        predicted = entry["n"] and law.partition(".")[0] not in entry["fitted_with"]  # fitted to no such row
        lines.append([law_name(law), str(entry["n"]), percent(entry["rmse_log"]) + " predicted" * predicted,
                      *(held_out_text(entry["held_out"].get(kind)) for kind in kinds),
                      f"{entry['aicc'] - min(rivals):.1f}" if compared else "-"])
    titles = [f"{HELD_OUT[kind]} held out" for kind in kinds]
    return aligned(["law", "rows", "in sample", *titles, "AICc above the best"], lines)


def noise_table(laws):
    """The noise of each family and the misfit of each law, as standard deviations of ln loss."""
    lines = []
    for law, entry in laws.items():
        for family in (family for family in entry["noise"] if entry["fitted_with"][family] == law):
            noise = [entry["noise"][family].get(level) for level in ("row", "trunk", "dense_trunk")]
            row, *others = map(percent, [*noise, entry["misfit"].get(family)])
            row += " with misfit" * (entry["misfit"].get(family) is None)  # no seeds are repeated
            lines.append([law_name(law), FAMILY_STYLES[family][0], row, *others])
    header = ["law", "family", "noise of a row", "of a trunk", "of a dense trunk", "misfit of the law"]
    return aligned(header, lines)


def doubts(laws):
    """[warning] of each law that misses rows from scratch far more than their family's own law does."""
    found = [(law, family, *(one["misfit"][family] or one["noise"][family]["row"]
                             for one in (entry, laws[family])))
             for law, entry in laws.items() for family in {"dense", "moe"} & entry["misfit"].keys() & {*laws}]
    return [f"{law} misses the {FAMILY_STYLES[family][0]} rows by {percent(misfit)}, their own law by "
            f"{percent(own)}, so its H, kappa and D2* are not to be trusted"
            for law, family, misfit, own in sorted(found) if misfit > max(3 * own, LEAST_ERROR)]


def alpha3_p(entry):
    """'p = 0.03': twice the share of draws on the other side of 0."""
    draws = np.array(entry["draws"]["alpha3"])
    count = min((draws <= 0).sum(), (draws > 0).sum())
    return f"p {'=' if count else '<='} {min(1.0, 2 * (count + 1) / (len(draws) + 1)):.2g}"


def parameter_table(laws):
    """Each parameter with its interval, asymptotic standard error, and value at Huber's delta = 0.001."""
    lines = []
    for law, entry in laws.items():
        for name, value in entry["params"].items():
            low, high = entry["ci95"][name]
            numbers = [f"{low:.4g} .. {high:.4g}", f"{entry['se_asymptotic'].get(name, math.nan):.2g}",
                       f"{entry['params_at_delta_0.001'][name]:.4g}"]
            notes = [alpha3_p(entry) if name == "alpha3" else "", "shared" if name in entry["shared"] else "",
                     entry["not_identified"].get(name, "")]
            lines.append([law_name(law), name, f"{value:.4g}", *(numbers if low < high else "---"),
                          "; ".join(filter(None, notes))])
    header = ["law", "parameter", "estimate", "95 % interval", "asymptotic s.e.", "at delta 0.001", "note"]
    return aligned(header, lines)


def mean_text(pairs):
    """'-1.24 ± 7.20 % (2)': the mean over pairs, half of its t-interval, the number of pairs."""
    mean, half = t_interval(pairs)
    return f"{100 * mean:+.2f}" + ("" if math.isnan(half) else f" ± {100 * half:.2f}") + f" % ({len(pairs)})"


def methods_table(differences):
    """Mean loss against copying ± half of its t-interval, number of pairs: one line a method, N and D1."""
    tokens, lines = sorted({d2 for cells in differences.values() for d2 in cells}), []
    for (label, n, d1), cells in differences.items():
        lines.append([label, short(n), short(d1)])
        for pairs in map(cells.get, tokens):
            lines[-1].append(mean_text(pairs) if pairs else "-")
    return aligned(["method", "N", "D1", *(f"at D2 = {short(d2)} (pairs)" for d2 in tokens)], lines)


def profile_table(profile):
    """alpha3 with E held at each value and all else refitted, and how much worse that fit is."""
    return aligned(["E held at", "alpha3", "objective above its least", "in the 95 % interval of E"], [
        [f"{E:.3f}", f"{alpha3:.3g}", percent(above), "yes" if inside else ""]
        for E, alpha3, above, inside in zip(*profile.values()) if above < 1])


def claims_table(claims):
    """Each claim and variation of the analysis: {claim: {variation: {"holds": bool, "value": text}}}."""
    lines = [[claim, variation, "yes" if found["holds"] else "no", found["value"]]
             for claim, variations in claims.items() for variation, found in variations.items()]
    return aligned(["claim", "variation", "holds", "value"], lines)


# ---------------------------------------------------------------------------------------------------------
# Head starts, and words

def overtaking_by(law, params, n, d1):
    """D2* (S,) of S draws of the parameters of a law that knows from scratch."""
    params = {name: np.reshape(value, (-1, 1)) for name, value in params.items()}
    return overtaking(d1, lambda tokens: predict(law, params, N=n, D=tokens)
                      - predict(law, params, N=n, D1=d1, D2=tokens))


def with_interval(value, draws, form=short):
    """'2M (1.7M to 2.4M)': a value and the middle 95 % of its (S,) draws; 'never' stands for infinity."""
    ends = np.quantile(draws, [0.025, 0.975], method="nearest")
    value, low, high = (form(end) if np.isfinite(end) else "never" for end in (np.squeeze(value), *ends))
    return value if value == low == high else f"{value} ({low} to {high})"


def head_starts(laws, ranges):
    """Yields {"law", "method", "D1", "H", "kappa", "D2*"}, texts with intervals, at the largest N, by each
    law with a head start, for each method of upcycling and both ends of the range of D1."""
    for law in SHARED_CURVE if "upcycled" in ranges else ():
        n = ranges["upcycled"]["N"][1]
        fits = laws[law].get("methods", {"every method": laws[law]}) if law in laws else {}
        for (method, fit), d1 in itertools.product(fits.items(), dict.fromkeys(ranges["upcycled"]["D1"])):
            params, draws = fit["params"], {name: np.array(value) for name, value in fit["draws"].items()}
            line = {"law": law_name(law), "method": method, "D1": short(d1),
                    "H": with_interval(*(head_start(law, p, n, d1) for p in (params, draws))),
                    "kappa": "-", "D2*": "-"}
            if "kappa" in params:
                line["kappa"] = with_interval(params["kappa"], draws["kappa"], lambda k: f"{100 * k:.2f} %")
                line["D2*"] = with_interval(*(overtaking_by(law, p, n, d1) for p in (params, draws)))
            yield line


def head_start_table(lines):
    """The table of head_starts."""
    header = ["law", "method", "D1", "head start H (tokens)", "handicap kappa", "D2* (tokens)"]
    return aligned(header, [list(line.values()) for line in lines])


def main_method_rows(rows):
    """copy or else the commonest method of upcycled rows, and the rows without others, at their levels."""
    labels = [method_label(row) for row in of_family(rows, "upcycled")]
    method = "copy" if "copy" in labels else max(labels, key=labels.count, default="none")
    return method, at_levels([row for row in rows
                              if row["family"] != "upcycled" or method_label(row) == method])


def local_exponents(rows):
    """{D1: d ln L / d ln D2 by the main method, the mean over sizes}, at the smallest and the largest D1 and
    over the sizes and D2 that both have."""
    rows, found = main_method_rows(rows)[1], {}
    levels = levels_of(rows, "D1")
    ends = {d1: of_family(rows, "upcycled", D1=d1) for d1 in levels[:1] + levels[-1:]}
    cells = [{(row["N"], row["D2"]) for row in end} for end in ends.values()]
    for d1, end in ends.items():
        here = [row for row in end if all((row["N"], row["D2"]) in known for known in cells)]
        curves = [figures.mean_loss(of_family(here, "upcycled", N=n), "D2") for n in levels_of(here, "N")]
        slopes = [figures.local_exponent(D2, loss)[0] for D2, loss, _ in curves if len(D2) > 2]
        found |= {d1: np.mean(slopes)} if slopes else {}
    return found


def findings(rows, content):
    """Yields what the rows and the laws say."""
    laws, ranges = content["laws"], content["ranges"]
    if "upcycled" in laws:
        low, high = laws["upcycled"]["ci95"]["alpha3"]
        yield (f"alpha3 of the interaction law is {laws['upcycled']['params']['alpha3']:.3g} (95 % interval "
               f"{low:.3g} to {high:.3g}, {alpha3_p(laws['upcycled'])}).")
    for d1, slope in local_exponents(rows).items():
        yield f"At D1 = {short(d1)} the loss falls as D2^{slope:.3f}, on average over sizes."
    for line in head_starts(laws, ranges):
        n, d1, d2 = (short(ranges["upcycled"][name][1]) for name in ("N", "D1", "D2"))
        if line["law"] in ("handicap", "free head start") and line["D1"] == d1:
            lasting = (f" Upcycling costs {line['kappa']} of the loss for ever. A MoE from scratch overtakes "
                       f"at D2*: {line['D2*']}.") if line["law"] == "handicap" else ""
            yield (f"By the {line['law']} law, N = {n}, {line['method']}: a dense checkpoint of {d1} tokens "
                   f"is worth {line['H']} tokens of MoE training, once.{lasting} The largest measured D2 is "
                   f"{d2}.")


# ---------------------------------------------------------------------------------------------------------
# report.md

def draw_figures(rows, laws):
    """{file name: (figure, caption)} of all that these rows and laws allow."""
    method, one_method = main_method_rows(rows)
    rivals = [law for law in RIVALS if law in laws and of_family(rows, "upcycled")]
    weights = weigh({law: laws[law] for law in rivals})  # how well they predict what was held out
    best = max(weights, key=weights.get, default=next(iter(laws)))
    pair = [law for law in dict.fromkeys(["upcycled", best]) if law in rivals]  # each draws all families
    shown = {family: pair or [law for law in alone if law in laws][:1] for family, alone in
             (("upcycled", ()), ("moe", ("moe.joint", "moe", best)), ("dense", ("dense", best)))}
    found, curves = {}, max(len(levels_of(rows, name)) for name in ("D", "D2")) > 1
    if curves:
        found["loss_against_tokens"] = (figures.loss_against_tokens(one_method, laws, shown), "Loss against "
            f"tokens, measured and fitted. Method: {method}. Bars are the range over repeats.")
    if rivals and len(levels_of(of_family(rows, "upcycled"), "D1")) > 1:
        found["exponent_against_D1"] = (figures.exponent_against_D1(one_method, laws),
                                        "The interaction: how fast the loss falls with D2, against D1.")
    alone = [law for law in laws if law.startswith("moe.") or not rivals]
    for law in dict.fromkeys([best, *alone]):
        found["residuals" if law == best else f"residuals_{law.replace('.', '_')}"] = (
            figures.residuals(rows, law, laws[law]), f"What the law '{law_name(law)}' leaves unexplained.")
    if curves and (differences := method_differences(rows)):
        found["methods_against_copy"] = (
            figures.against_copy(differences), "Methods of upcycling, and a MoE from scratch on D = D2 "
            "tokens, against copying. Paired runs differ in the method alone.")
    return found


def write_report(title, sections, found, directory):
    """Write report.md: the terms, {heading: lines} where there are lines, {file name: (figure, caption)}."""
    with open(TERMS, encoding="utf-8") as file:
        text = [f"# {title}", "", file.read()]
    for heading, lines in sections.items():
        text += [f"## {heading}", "", *lines, ""] if lines else []
    for name, (figure, caption) in found.items():
        text += [f"![{name.replace('_', ' ')}]({name}.png)", "", caption, ""]
        for kind, options in (("png", {}), ("pdf", {"metadata": {"CreationDate": None}})):
            figure.savefig(drawn := io.BytesIO(), format=kind, **options)
            write_text_atomically(os.path.join(directory, f"{name}.{kind}"), drawn.getvalue())
        plt.close(figure)
    write_text_atomically(os.path.join(directory, "report.md"), "\n".join(text).rstrip() + "\n")


def write(rows, content, profile, notes, directory):
    """Write report.md and its figures (PNG and PDF) of rows and laws. profile is that of
    uncertainty.profile_E; notes are warnings, [text]."""
    laws, first = content["laws"], next(iter(content["laws"].values()))
    spans = []
    for family, limits in content["ranges"].items():
        lowest = min(row["loss"] for row in of_family(rows, family))
        said = [f"{name} {short(low)} to {short(high)}" for name, (low, high) in limits.items()]
        said.append(f"lowest loss {loss_text(loss_columns(lowest, content.get('bits_per_nat')))}")
        spans.append(f"- {FAMILY_STYLES[family][0]}: {', '.join(said)}")
    draws = len(next(iter(first["draws"].values())))
    sections = {
        "What was measured": [f"There are {len(rows)} rows, in these ranges:", "", *spans],
        "Warnings": [f"- {note}" for note in notes],
        "What was found": [f"- {text}" for text in findings(rows, content)],
        "Claims under variations of the analysis": claims_table(content.get("claims", {})),
        "How well the laws predict": comparison_table(laws),
        "Head starts at the largest N": head_start_table(head_starts(laws, content["ranges"])),
        "Noise and misfit": noise_table(laws),
        "Parameters": [*parameter_table(laws), "",
                       f"The intervals come from {draws} draws: {content['intervals']}.",
                       f"Huber's delta is {first['huber_delta']:.2g}."],
        "alpha3 of the interaction law along E": profile_table(profile),
        "Methods against copying": methods_table(method_differences(rows))}
    write_report("Scaling laws of this study", sections, draw_figures(rows, laws), directory)


# ---------------------------------------------------------------------------------------------------------
# Published laws

def compared(params, N, D1, D2):
    """(loss matching from dense and MoE laws alone / a published upcycled law - 1, where that law lies above
    its dense start, where it lies above a MoE from scratch on D = D2 tokens), all broadcast; params is
    {"dense", "moe", "upcycled": {parameter: value}}."""
    matched = params["moe"] | {f"dense_{name}": value for name, value in params["dense"].items()}
    predicted = predict("upcycled.loss_matching_0", matched, N=N, D1=D1, D2=D2)
    published = predict("upcycled", params["upcycled"], N=N, D1=D1, D2=D2)
    return (predicted / published - 1, published > predict("dense", params["dense"], N=N, D=D1),
            published > predict("moe", params["moe"], N=N, D=D2))


def write_published(path, directory):
    """Write report.md on a laws file: what loss matching makes of its dense and MoE laws."""
    content, laws = read_laws(path)[0], ("dense", "moe", "upcycled")
    sizes = content.get("ranges", {}).get("upcycled", {}).get("N")
    if not sizes or not set(laws) <= set(content["laws"]):
        raise ConfigError(f"{path}: no laws file with dense, moe and upcycled laws and their range of N")
    params = {law: content["laws"][law]["params"] for law in laws}
    D2 = np.geomspace(1e9, 1e12, 61)
    curves = {n: {d1: (D2, *compared(params, n, d1, D2)) for d1 in D1_OF_CURVES}
              for n in np.geomspace(*sizes, 3)}
    write_report("Loss matching against a published law",
                 {"What was compared": [f"Source: {content.get('source', path)}"]},
                 {"loss_matching": (figures.loss_matching(curves), MATCHING_CAPTION)}, directory)
