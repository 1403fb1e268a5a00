"""What fit_laws.py found, in words, tables and figures: report.md.

`rows` are those of rows.read_rows, `laws` is {law: entry} and `content` all of laws.json. A table is a list of lines that
read on a terminal and in Markdown.
"""
import math
import os

import matplotlib.pyplot as plt
import numpy as np

import figures
from figures import FAMILY_NAMES, HELD_OUT_MARKS, RIVAL_STYLES, law_name, of_family, short, sorted_levels, t_interval
from laws import predict
from rows import KNOBS

TERMS = """
- **Loss** L is the validation cross-entropy in nats per token. Errors and differences of loss are in per cent of the loss.
- **Dense** is an ordinary language model. **MoE** is a mixture of experts that is trained from scratch. **Upcycled** is a MoE
  that is made from a dense model and then trained.
- **N** is the number of parameters of the dense model without embedding and head. All three families use this N.
- **D** is the number of tokens of a run from scratch. **D1** is the number of tokens that the dense model saw before it was
  upcycled. **D2** is the number of tokens after that.
- A **trunk** is one long run at a constant learning rate. Short runs branch off it and decay, and each gives one row. The
  rows of one trunk share its luck. A **dense trunk** is the one that upcycled runs started from.
- **Held out** rows are left out of a fit and then predicted by it. Errors on them show what a law is worth. An error
  **in sample** is on the rows of the fit itself.
- **Noise** is how much the loss varies from run to run. **Misfit** is what noise does not explain: there the law is wrong.
- **AICc** is Akaike's information criterion for few rows. It weighs the error in sample against the number of parameters.
  The lowest is the best, and differences below about 5 decide nothing.
- The **head start** H of a dense checkpoint is the number of tokens of MoE training that it is worth.
- The **handicap** kappa is a factor e^kappa on the loss of upcycled runs that more training does not remove.
- **D2\\*** is the D2 beyond which a MoE from scratch, trained on D = D2 tokens, has a lower loss than the upcycled one."""
FORMULAS = {
    "dense": "A D^-alpha + B N^-beta + E", "moe": "A D^-alpha + B N^-beta + E",
    "upcycled": "A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N^-beta + E", "upcycled.no_interaction": "alpha3 = 0",
    "upcycled.additive": "A1 D1^-alpha1 + A2 D2^-alpha2 + B N^-beta + E",
    "upcycled.effective_data": "A (D2 + H)^-alpha + B N^-beta + E with H = c D1^gamma",
    "upcycled.effective_data_shared": "the same, with A, alpha, B, beta and E of the MoE from scratch",
    "upcycled.saturating": "the shared law with H^-alpha = (c D1^gamma)^-alpha + H_max^-alpha",
    "upcycled.handicap": "the shared law times e^kappa",
    "upcycled.loss_matching": "the MoE's law at H + D2 tokens, where its loss at H is e^delta times the dense model's at D1",
    "upcycled.loss_matching_0": "loss matching with delta = 0: no upcycled run is used"}
NOT_SETTINGS = {"loss", "loss_se", "trunk", "flops", "config", "git", "torch", "method", "N_active", "N_total", *KNOBS}


# ---------------------------------------------------------------------------------------------------------
# Methods of upcycling, paired with copying

def method_label(row):
    """What tells a row's method apart: drop 0.5, virtual groups G = 2, copy."""
    forms = {"drop_ratio": "{:g}", "granularity": "G = {:g}", "noise_std": "{:g} σ", "noise_fraction": "on {:g}"}
    knobs = [form.format(row[key]) for key, form in forms.items()
             if row.get(key) is not None and (key, row[key]) != ("noise_fraction", 1)]
    return " ".join([str(row.get("method")).replace("_", " "), *knobs])


def main_method(rows):
    """copy, or the commonest method where nothing was copied; "" without upcycled rows."""
    labels = [method_label(row) for row in of_family(rows, "upcycled")]
    return "copy" if "copy" in labels else max(labels, key=labels.count, default="")


def setting(row, column):
    """The row's value of a column; numbers of experts are divided by the granularity that virtual groups multiply them by."""
    return row[column] / row.get("granularity", 1) if column.startswith("num_") else row[column]


def same_but_method(row, other, but=()):
    """Whether two runs agree in every column that both have, but for results, the method with its knobs, and `but`."""
    return all(setting(row, column) == setting(other, column)
               for column in (row.keys() & other.keys()) - NOT_SETTINGS - set(but))


def method_differences(rows):
    """{label: {(N, D1, D2): {seed: loss / loss of copy - 1}}} of runs that differ from a copied one in the method alone.

    A MoE from scratch on D = D2 tokens is compared with copying in the same way. Where rows of one label differ in other
    settings too, the label says which.
    """
    copies, pairs = {}, []
    for row in of_family(rows, "upcycled"):
        if method_label(row) == "copy":
            copies.setdefault((row["N"], row["D2"]), []).append(row)
    for row in [*of_family(rows, "upcycled"), *of_family(rows, "moe")]:
        scratch = row["family"] == "moe"
        for copy in copies.get((row["N"], row["D"] if scratch else row["D2"]), []) if method_label(row) != "copy" else []:
            if same_but_method(row, copy, ("family", "D", "D1", "D2", "dense_trunk") if scratch else ()):
                pairs.append((FAMILY_NAMES["moe"] if scratch else method_label(row), copy, row["loss"] / copy["loss"] - 1))
    values = {}
    for label, copy, _ in pairs:
        for column in copy.keys() - NOT_SETTINGS - {"seed", "dense_trunk", "D1", "D2", "N"}:
            values.setdefault(label, {}).setdefault(column, set()).add(setting(copy, column))
    differences = {}
    for label, copy, difference in pairs:
        varied = [f"{column} = {copy[column]}" for column, seen in sorted(values[label].items()) if len(seen) > 1]
        cells = differences.setdefault(", ".join([label, *varied]), {})
        cells.setdefault((copy["N"], copy["D1"], copy["D2"]), {})[str(copy.get("seed"))] = difference
    return differences


def crossings(differences):
    """Sentences, [text]: where a method's mean difference from copying changes its sign as D2 grows."""
    said = []
    for label, cells in differences.items():
        for n, d1 in sorted({cell[:2] for cell in cells}):
            tokens = sorted(cell[2] for cell in cells if cell[:2] == (n, d1))
            points = [t_interval(list(cells[n, d1, d2].values())) for d2 in tokens]
            for left, right, (low, low_half), (high, high_half) in zip(tokens, tokens[1:], points, points[1:]):
                if low * high < 0:
                    share = low / (low - high)
                    sure = abs(low) > low_half and abs(high) > high_half  # False where a half is nan
                    said.append(f"{label} {'becomes better than' if low > 0 else 'falls behind'} copying near D2 = "
                                f"{short(left * (right / left) ** share)} at N = {short(n)}, D1 = {short(d1)}"
                                + ("." if sure else ", but the 95 % intervals beside it contain 0."))
    return said


# ---------------------------------------------------------------------------------------------------------
# Tables

def aligned(header, lines):
    """A Markdown table with its columns padded to one width; nothing for no lines."""
    cells = [header, *lines]
    width = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * w for w in width])
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, width)) + " |" for line in cells] if lines else []


def percent(value, digits=2):
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def held_out_text(held):
    """1.88 % (12 rows, 2.5 x): error, rows it rests on, how far beyond the fitted rows the farthest lies."""
    if not held:
        return "-"
    beyond = f", {held['beyond']:.2g} x" if held.get("beyond") else ""
    return f"{percent(held['rms'])} ({held['rows']} row{'s' * (held['rows'] != 1)}{beyond})"


def comparison_table(laws):
    """Errors in sample and on held-out rows, and AICc, of each law."""
    lowest = {}
    for entry in laws.values():  # laws that explain the same rows can be compared
        group = *entry["fitted_with"], entry["n_with"]
        lowest[group] = min(lowest.get(group, math.inf), entry["aicc"])
    kinds = [kind for kind in HELD_OUT_MARKS if any(entry["held_out"].get(kind) for entry in laws.values())]
    lines = [[law_name(law), str(entry["n"]), percent(entry["rmse_log"]), *(held_out_text(entry["held_out"].get(kind)) for kind in kinds),
              "-" if law in FAMILY_NAMES and law != "upcycled" else f"{entry['aicc'] - lowest[*entry['fitted_with'], entry['n_with']]:.1f}"]
             for law, entry in laws.items()]
    titles = [f"{'a' if kind == 'trunk' else 'largest'} {kind} held out" for kind in kinds]
    return aligned(["law", "rows", "in sample", *titles, "AICc above the best"], lines)


def noise_table(laws):
    """Noise of each family, as standard deviations of ln loss, and the misfit of each law."""
    lines = []
    for law, entry in laws.items():
        for family in (family for family, fitted in entry["fitted_with"].items() if fitted == law and family in entry["noise"]):
            noise = entry["noise"][family]
            lines.append([law_name(law), FAMILY_NAMES[family], *(percent(noise.get(level)) for level in ("row", "trunk", "dense_trunk")),
                          percent(entry["misfit"].get(family))])
    return aligned(["law", "family", "noise of a row", "of a trunk", "of a dense trunk", "misfit of the law"], lines)


def alpha3_p(entry):
    """'p = 0.03': twice the share of draws on the other side of 0."""
    draws = np.array(entry["draws"]["alpha3"])
    count, floor = min((draws <= 0).sum(), (draws > 0).sum()), 2 / (len(draws) + 1)
    return f"p {'=' if count else '<='} {min(1.0, (count + 1) * floor):.2g}"


def parameter_table(laws):
    """Each parameter with its interval, asymptotic standard error, and value under Huber's delta = 0.001."""
    lines = []
    for law, entry in laws.items():
        for name, value in entry["params"].items():
            low, high = entry["ci95"][name]
            note = entry["not_identified"].get(name, "shared" if name in entry["shared"] else "")
            if name == "alpha3":
                note = "; ".join(filter(None, [alpha3_p(entry), note]))
            numbers = [f"{low:.4g} .. {high:.4g}", f"{entry['se_asymptotic'].get(name, math.nan):.2g}", f"{entry['params_at_delta_0.001'][name]:.4g}"]
            lines.append([law_name(law), name, f"{value:.4g}", *(numbers if low < high else "---"), note])
    return aligned(["law", "parameter", "estimate", "95 % interval", "asymptotic s.e.", "at delta 0.001", "note"], lines)


def single_size_table(sizes):
    """Fits at one N each: nothing is assumed about how N enters."""
    lines = []
    for n, entries in sizes.items():
        for law, entry in entries.items():
            exponents = ", ".join(f"{name} {value:.3g} ± {entry['se_asymptotic'][name]:.1g}" for name, value in entry["params"].items()
                                  if name.startswith(("alpha", "gamma", "kappa")))
            lines.append([short(float(n)), law_name(law), str(entry["n"]), percent(entry["rmse_log"]),
                          held_out_text((entry.get("held_out") or {}).get("trunk")), exponents])
    return aligned(["N", "law", "rows", "in sample", "a trunk held out", "exponents ± asymptotic s.e."], lines)


def methods_table(differences):
    """Mean loss against copying ± half of the 95 % t-interval over seeds, and the number of seeds: one line a method and D1."""
    tokens = sorted({cell[2] for cells in differences.values() for cell in cells})
    lines = []
    for label, cells in differences.items():
        for n, d1 in sorted({cell[:2] for cell in cells}):
            points = [(*t_interval(list(cells.get((n, d1, d2), {}).values())), len(cells.get((n, d1, d2), {}))) for d2 in tokens]
            lines.append([label, short(n), short(d1)] + ["-" if not seeds else f"{100 * mean:+.2f} %, 1 seed" if seeds == 1 else
                                                         f"{100 * mean:+.2f} ± {100 * half:.2f} %, {seeds} seeds" for mean, half, seeds in points])
    return aligned(["method", "N", "D1", *(f"at D2 = {short(d2)}" for d2 in tokens)], lines)


def claims_table(claims):
    """Each claim under each variation of the analysis: {claim: {variation: {"holds": bool, "value": text}}}."""
    return aligned(["claim", "variation", "holds", "value"],
                   [[claim, variation, "yes" if found["holds"] else "no", found["value"]]
                    for claim, variations in claims.items() for variation, found in variations.items()])


# ---------------------------------------------------------------------------------------------------------
# Words

def interval_text(values, form=short):
    """'1.7M to 2.4M': the middle 95 % of (S,) draws; 'never' for infinity."""
    low, high = np.quantile(values, [0.025, 0.975], method="nearest")
    return " to ".join(form(value) if np.isfinite(value) else "never" for value in (low, high))


def overtaking(law, params, n, d1, largest):
    """D2* (S,) of S draws of a law's parameters: the D2 beyond which a MoE from scratch is better, on a grid of 1 %.

    It is inf where from scratch does not overtake within 1000 times the largest D2. The head start fades, so a law crosses once.
    """
    D2 = largest * np.geomspace(1e-4, 1e3, 1620)
    params = {name: np.reshape(value, (-1, 1)) for name, value in params.items()}
    behind = predict(law, params, N=n, D1=d1, D2=D2) <= predict(law, params, N=n, D1=0.0, D2=D2)  # (S, 1620)
    return np.append(D2, np.inf)[behind.sum(axis=1)]


def head_start(law, params, N, D1):
    head = params["c"] * D1 ** params["gamma"]
    return (head ** -params["alpha"] + params["H_max"] ** -params["alpha"]) ** (-1 / params["alpha"]) if "H_max" in params else head


def head_start_words(laws, ranges):
    """Sentences, [text]: what a dense checkpoint is worth, what upcycling costs for ever, where from scratch overtakes."""
    said = []
    for law in ("upcycled.effective_data_shared", "upcycled.saturating", "upcycled.handicap", "upcycled.loss_matching"):
        for method, fitted in (laws[law].get("methods") or {"": laws[law]}).items() if law in laws else ():
            n, d1, largest = ranges["upcycled"]["N"][1], ranges["upcycled"]["D1"][1], ranges["upcycled"]["D2"][1]
            params, draws = fitted["params"], {name: np.array(values) for name, values in fitted["draws"].items()}
            text = (f"{law_name(law).capitalize()} law{f', method {method}' if method else ''}, N = {short(n)}: a dense checkpoint of "
                    f"{short(d1)} tokens is worth {short(head_start(law, params, N=n, D1=d1))} tokens "
                    f"({interval_text(head_start(law, draws, N=n, D1=d1))}) of MoE training, once.")
            if "H_max" in params:
                text += f" No dense checkpoint is worth more than {short(params['H_max'])} tokens ({interval_text(draws['H_max'])})."
            if "kappa" in params:
                star, = overtaking(law, params, n, d1, largest)
                text += (f" Upcycling costs {100 * params['kappa']:.2f} % of the loss for ever "
                         f"({interval_text(draws['kappa'], lambda value: f'{100 * value:.2f}')} %). A MoE from scratch "
                         + (f"overtakes at D2* = {short(star)}" if np.isfinite(star) else "does not overtake")
                         + f" ({interval_text(overtaking(law, draws, n, d1, largest))})"
                         + (f", which lies beyond the largest measured D2 of {short(largest)}." if star > largest else "."))
            said.append(text)
    return said


def interaction_words(rows, laws, ranges):
    """Sentences, [text], on alpha3 and on the exponents that were measured."""
    if "upcycled" not in laws:
        return []
    params, (low, high), ends = laws["upcycled"]["params"], laws["upcycled"]["ci95"]["alpha3"], ranges["upcycled"]["D1"]
    in_term = [-params["alpha2"] + params["alpha3"] * math.log(d1) for d1 in ends]
    said = [f"alpha3 of the interaction law is {params['alpha3']:.3g} (95 % interval {low:.3g} to {high:.3g}, {alpha3_p(laws['upcycled'])}).",
            f"The exponent of D2 in the first term of that law goes from {in_term[0]:.3f} at D1 = {short(ends[0])} to "
            f"{in_term[1]:.3f} at D1 = {short(ends[1])}."]
    measured = []
    for d1 in ends:
        groups = [figures.mean_loss(of_family(rows, "upcycled", N=n, D1=d1), "D2")[:2] for n in sorted_levels(of_family(rows, "upcycled", D1=d1), "N")]
        measured.append([figures.local_exponent(*group)[0] for group in groups if len(group[0]) > 2])
    if all(measured):
        said.append(f"The loss itself falls as D2^{np.mean(measured[0]):.3f} at D1 = {short(ends[0])} and as D2^{np.mean(measured[1]):.3f} at "
                    f"D1 = {short(ends[1])}, measured over the D2 of this study (mean over sizes).")
    return said


def findings(rows, content):
    """What the laws say, [text]."""
    laws, ranges = content["laws"], content["ranges"]
    return interaction_words(rows, laws, ranges) + head_start_words(laws, ranges)


# ---------------------------------------------------------------------------------------------------------
# report.md

def draw_figures(rows, laws, differences, profiles):
    """{file name: (figure, caption)} of all that these rows and laws allow."""
    rivals = [law for law in RIVAL_STYLES if law in laws]
    best = min(rivals, key=lambda law: laws[law]["aicc"], default=None)
    shown = {"upcycled": [law for law in dict.fromkeys(["upcycled", best]) if law in laws], "dense": ["dense"] * ("dense" in laws),
             "moe": [law for law in ("moe.joint", "moe") if law in laws][:1]}
    method = main_method(rows)
    one_method = [row for row in rows if row["family"] != "upcycled" or method_label(row) == method]
    found = {"loss_against_tokens": (figures.loss_against_tokens(one_method, laws, shown), "Loss against tokens, measured and fitted"
                                     f"{f', upcycled by {method}' if method else ''}. Bars are the range over repeats.")}
    if rivals:
        found["exponent_against_D1"] = (figures.exponent_against_D1(rows, laws), "The interaction, seen directly: how fast the loss "
                                        "falls with D2, against D1.")
    if any(any(entry["held_out"].values()) for entry in laws.values()):
        found["held_out_errors"] = (figures.held_out_errors(laws), "Errors of each law in sample and on held-out rows.")
    for law in dict.fromkeys([best or next(iter(laws)), *(law for law in laws if law.startswith("moe."))]):
        name = "residuals" if law == best else f"residuals_{law.replace('.', '_')}"
        found[name] = (figures.residuals(rows, law, laws[law]), f"What the law '{law_name(law)}' leaves unexplained.")
    if profiles:
        found["alpha3_along_E"] = (figures.alpha3_along_E(profiles), "alpha3 of the interaction law, refitted with E held at "
                                   "each value.")
    if differences:
        found["methods_against_copy"] = (figures.against_copy(differences), "Methods of upcycling, and a MoE from scratch on "
                                         "D = D2 tokens, against copying. Paired runs differ in the method alone.")
    return found


def write(rows, content, profiles, notes, directory):
    """Write report.md and its figures (PNG and PDF). content is that of laws.json, profiles {title: fit_laws.profile_E}, notes [text]."""
    laws, differences = content["laws"], method_differences(rows)
    found = draw_figures(rows, laws, differences, profiles)
    for name, (figure, _) in found.items():
        for kind in ("png", "pdf"):
            figure.savefig(os.path.join(directory, f"{name}.{kind}"), metadata={"CreationDate": None} if kind == "pdf" else {})
        plt.close(figure)
    spans = ["- " + FAMILY_NAMES[family] + ": " + ", ".join(f"{name} {short(low)} to {short(high)}" for name, (low, high) in limits.items())
             for family, limits in content["ranges"].items()]
    formulas = [f"- {law_name(law)}: " + (f"`L = {FORMULAS[law]}`" if law in FORMULAS else "see laws.py") for law in laws]
    first = next(iter(laws.values()))
    sections = {
        "Terms": TERMS.strip().split("\n"), "The laws": formulas,
        "What was measured": [f"There are {len(rows)} rows. The laws were fitted in these ranges:", "", *spans, *([""] * bool(notes)),
                              *(f"- warning: {note}" for note in notes)],
        "What was found": [f"- {text}" for text in findings(rows, content) + crossings(differences)],
        "Claims": claims_table(content.get("claims", {})), "How well the laws predict": comparison_table(laws),
        "Noise and misfit": noise_table(laws),
        "Parameters": [*parameter_table(laws), "", f"Intervals come from {len(next(iter(first['draws'].values())))} draws: {content['intervals']}. "
                       f"Huber's delta is {first['huber_delta']:.2g}."],
        "Each size alone": single_size_table(content["at_each_N"]), "Methods against copying": methods_table(differences),
        "Figures": [line for name, (_, caption) in found.items() for line in (f"![{caption}]({name}.png)", "", caption, "")]}
    text = ["# Scaling laws of this study", ""]
    for title, lines in sections.items():
        text += [f"## {title}", "", *lines, ""] if lines else []
    with open(os.path.join(directory, "report.md"), "w", encoding="utf-8") as file:
        file.write("\n".join(text).rstrip() + "\n")
