"""What fit_laws.py found, in words, tables and figures: report.md.

`rows` are those of rows.read_rows, `content` is what laws.json holds, and `laws` is its {law: entry}. A table
is a list of lines that read on a terminal and in Markdown.
"""
import math
import os

import matplotlib.pyplot as plt
import numpy as np

import figures
from configurator import ConfigError
from figures import FAMILIES, HELD_OUT, RIVALS, law_name, of_family, short, sorted_levels, t_interval
from laws import SHARED_CURVE, head_start, predict, published_check
from rows import method_label

TERMS = """
- **Loss** L is the validation cross-entropy in nats per token. Errors of loss are given in per cent of it.
- **Dense** is an ordinary language model. **MoE** is a mixture of experts that is trained from scratch.
  **Upcycled** is a MoE that is made from a dense model and then trained.
- **N** is the number of parameters of the dense model without embedding and head. All three families use
  this N.
- **D** is the number of tokens of a run from scratch. **D1** is the number of tokens that a dense model saw
  before it was upcycled. **D2** is the number of tokens after that.
- A **trunk** is one long run at a constant learning rate. Short runs branch off it and decay, and each gives
  one row. The rows of one trunk share its luck. A **dense trunk** is one that upcycled runs started from.
- **Held out** rows are left out of a fit, which then predicts them. Their error shows what a law is worth. An
  error **in sample** is on the rows of the fit itself.
- **Noise** is how much the loss varies from run to run. **Misfit** is what noise does not explain: there the
  law is wrong.
- **AICc** is Akaike's information criterion for few rows. A better fit lowers it, and each parameter raises
  it. The lowest is the best, and differences below about 5 decide nothing.
- The **head start** H of a dense checkpoint is the number of tokens of MoE training that it is worth.
- The **handicap** kappa puts a factor e^kappa on the loss of upcycled runs. More training does not remove it.
- **D2\\*** is the D2 beyond which a MoE from scratch, trained on D = D2 tokens, has a lower loss than the
  upcycled one."""
FORMULAS = {
    "dense": "L = A D^-alpha + B N^-beta + E", "moe": "L = A D^-alpha + B N^-beta + E",
    "upcycled": "L = A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N^-beta + E",
    "upcycled.no_interaction": "the interaction law with alpha3 = 0",
    "upcycled.additive": "L = A1 D1^-alpha1 + A2 D2^-alpha2 + B N^-beta + E",
    "upcycled.effective_data": "L = A (D2 + H)^-alpha + B N^-beta + E with H = c D1^gamma",
    "upcycled.effective_data_shared": "effective data with A, alpha, B, beta and E of the MoE from scratch",
    "upcycled.saturating": "the shared law with H^-alpha = (c D1^gamma)^-alpha + H_max^-alpha",
    "upcycled.handicap": "the shared law times e^kappa",
    "upcycled.loss_matching": "L = L_moe(N, H + D2) with L_moe(N, H) = e^delta L_dense(N, D1)",
    "upcycled.loss_matching_0": "loss matching with delta = 0, to which no upcycled run contributes"}
RESULTS = {"loss", "loss_se", "trunk", "flops", "config", "git", "torch", "N_active", "N_total"}
METHOD = {"method", "drop_ratio", "granularity", "noise_std", "noise_fraction"}
PLACE = {"family", "N", "D", "D1", "D2", "seed", "dense_trunk"}
EXPERTS = {"num_local_experts", "num_experts_per_tok"}
TOKENS = np.geomspace(1e9, 1e12, 61)  # D1 and D2 of published laws that do not say where they were fitted
MATCHING_WORDS = """
Loss matching predicts upcycled runs from the dense and the MoE law alone. It says that an upcycled model goes
on along the MoE's own curve, from where that curve has the loss of the dense model. The difference is this
prediction less that of the published upcycled law, for D1 and D2 from 1B to 1T tokens."""
WHY_NOT = """
- A copied model starts with the loss of its dense checkpoint. A law that lies above this start is not valid
  there. Loss matching never does.
- An upcycled model has seen more tokens than a MoE from scratch on D = D2 tokens. Loss matching always puts
  the upcycled model below. The published law lets the MoE from scratch overtake it."""

# ---------------------------------------------------------------------------------------------------------
# Methods of upcycling, paired with copying


def same_but_method(row, other, but=()):
    """Whether runs agree in all columns that both have, but for results, the method and columns `but`.

    Virtual groups multiply the numbers of experts by their granularity, so these are compared without it.
    """
    def setting(run, column):
        return run[column] / (run.get("granularity") or 1) if column in EXPERTS else run[column]

    columns = (row.keys() & other.keys()) - RESULTS - METHOD - set(but)
    return all(setting(row, column) == setting(other, column) for column in columns)


def method_differences(rows):
    """{(label, N, D1): {D2: {seed: loss / loss of copying - 1}}} of runs that differ in the method alone.

    A MoE from scratch on D = D2 tokens is compared with copying in the same way. Where other settings vary
    from pair to pair of one label, the label names them.
    """
    copies = [row for row in of_family(rows, "upcycled") if row.get("method") == "copy"]
    others = [(method_label(row), row, ()) for row in of_family(rows, "upcycled")
              if row.get("method") != "copy"]
    others += [(FAMILIES["moe"][0], row, PLACE - {"N", "seed"}) for row in of_family(rows, "moe")]
    pairs = [(label, copy, row["loss"] / copy["loss"] - 1) for label, row, but in others for copy in copies
             if copy["D2"] == row.get("D2", row.get("D")) and same_but_method(row, copy, but)]
    values, differences = {}, {}
    for label, copy, _ in pairs:
        for column in copy.keys() - RESULTS - METHOD - PLACE:
            values.setdefault((label, column), set()).add(str(copy[column]))
    for label, copy, difference in sorted(pairs, key=lambda pair: pair[1]["D2"]):
        varied = [f"{column} = {copy[column]}" for column in sorted(copy)
                  if len(values.get((label, column), ())) > 1]
        key = ", ".join([label, *varied]), copy["N"], copy["D1"]
        differences.setdefault(key, {}).setdefault(copy["D2"], {})[str(copy.get("seed"))] = difference
    return dict(sorted(differences.items()))


def crossings(differences):
    """Sentences, [text]: where the mean difference of a method from copying changes sign as D2 grows."""
    said = []
    for (label, n, d1), cells in differences.items():
        points = [(d2, *t_interval(list(by_seed.values()))) for d2, by_seed in cells.items()]
        for (left, low, low_half), (right, high, high_half) in zip(points, points[1:]):
            if low * high < 0:
                place = short(left * (right / left) ** (low / (low - high)))
                sure = abs(low) > low_half and abs(high) > high_half  # False where a half is nan
                verb = "overtakes" if low > 0 else "falls behind"
                said.append(f"At N = {short(n)} and D1 = {short(d1)}, {label} {verb} copying near "
                            f"D2 = {place}." + " The seeds do not make this sure." * (not sure))
    return said


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
        lines.append([law_name(law), str(entry["n"]), percent(entry["rmse_log"]),
                      *(held_out_text(entry["held_out"].get(kind)) for kind in kinds),
                      f"{entry['aicc'] - min(rivals):.1f}" if compared else "-"])
    titles = [f"{HELD_OUT[kind][0]} held out" for kind in kinds]
    return aligned(["law", "rows", "in sample", *titles, "AICc above the best"], lines)


def noise_table(laws):
    """The noise of each family and the misfit of each law, as standard deviations of ln loss."""
    lines = []
    for law, entry in laws.items():
        for family in entry["noise"]:
            if entry["fitted_with"][family] == law:
                noise = [entry["noise"][family].get(level) for level in ("row", "trunk", "dense_trunk")]
                lines.append([law_name(law), FAMILIES[family][0],
                              *map(percent, [*noise, entry["misfit"].get(family)])])
    header = ["law", "family", "noise of a row", "of a trunk", "of a dense trunk", "misfit of the law"]
    return aligned(header, lines)


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


def single_size_table(sizes):
    """Fits at one N each, {N: {law: entry}}: nothing is assumed about how N enters."""
    lines = []
    for n, entries in sizes.items():
        for law, entry in entries.items():
            exponents = [f"{name} {entry['params'][name]:.3g} ± {error:.1g}"
                         for name, error in entry["se_asymptotic"].items()
                         if name.startswith(("alpha", "gamma", "kappa"))]
            lines.append([short(float(n)), law_name(law), str(entry["n"]), percent(entry["rmse_log"]),
                          held_out_text(entry["held_out"].get("trunk")), ", ".join(exponents)])
    header = ["N", "law", "rows", "in sample", "a trunk held out", "exponents ± asymptotic s.e."]
    return aligned(header, lines)


def methods_table(differences):
    """Mean loss against copying ± half of its 95 % t-interval, number of seeds: one line a method and D1."""
    tokens, lines = sorted({d2 for cells in differences.values() for d2 in cells}), []
    for (label, n, d1), cells in differences.items():
        lines.append([label, short(n), short(d1)])
        for by_seed in map(cells.get, tokens):
            mean, half = t_interval(list(by_seed.values())) if by_seed else (math.nan, math.nan)
            half_text = "" if math.isnan(half) else f" ± {100 * half:.2f}"
            lines[-1].append(f"{100 * mean:+.2f}{half_text} % ({len(by_seed)})" if by_seed else "-")
    return aligned(["method", "N", "D1", *(f"at D2 = {short(d2)} (seeds)" for d2 in tokens)], lines)


def claims_table(claims):
    """Each claim and variation of the analysis: {claim: {variation: {"holds": bool, "value": text}}}."""
    lines = []
    for claim, variations in claims.items():
        for variation, found in variations.items():
            shown = claim if found is next(iter(variations.values())) else ""
            lines.append([shown, variation, "yes" if found["holds"] else "no", found["value"]])
    return aligned(["claim", "variation", "holds", "value"], lines)


# ---------------------------------------------------------------------------------------------------------
# Words

def overtaking(law, params, n, d1, largest):
    """D2* (S,) of S draws of a law's parameters: where a MoE from scratch gets better, on a grid of 1 %.

    It is inf where that is beyond 1000 times the largest D2. A head start fades, so there is one crossing at
    most.
    """
    D2 = largest * np.geomspace(1e-4, 1e3, 1620)
    params = {name: np.reshape(value, (-1, 1)) for name, value in params.items()}
    upcycled, scratch = (predict(law, params, N=n, D1=tokens, D2=D2) for tokens in (d1, 0.0))  # (S, 1620)
    return np.append(D2, np.inf)[(upcycled < scratch).sum(axis=1)]


def interval_text(values, form=short):
    """'1.7M to 2.4M': the middle 95 % of (S,) draws; 'never' stands for infinity."""
    ends = np.quantile(values, [0.025, 0.975], method="nearest")
    return " to ".join(form(end) if np.isfinite(end) else "never" for end in ends)


def handicap_words(law, params, draws, n, d1, largest):
    """Text: what upcycling costs for ever and where from scratch overtakes, with intervals of the draws."""
    star, stars = overtaking(law, params, n, d1, largest)[0], overtaking(law, draws, n, d1, largest)
    cost = interval_text(draws["kappa"], lambda value: f"{100 * value:.2f}")
    overtakes = f"overtakes at D2* = {short(star)}" if np.isfinite(star) else "does not overtake"
    said = (f" Upcycling costs {100 * params['kappa']:.2f} % of the loss for ever ({cost} %). A MoE from "
            f"scratch {overtakes} ({interval_text(stars)}).")
    if np.quantile(draws["kappa"], 0.025) < 0 < np.quantile(draws["kappa"], 0.975):
        said += " These rows do not tell this cost from none."
    if max(star, np.quantile(stars, 0.975, method="nearest")) > largest:
        said += f" The largest measured D2 is {short(largest)}, so part of this lies outside the data."
    return said


def head_start_words(laws, ranges):
    """Sentences, [text]: what the longest dense training is worth, by each law and method."""
    said = []
    n, d1, largest = (ranges.get("upcycled", {}).get(name, (0, 0))[1] for name in ("N", "D1", "D2"))
    for law in (law for law in SHARED_CURVE if law in laws):
        for method, fitted in laws[law].get("methods", {"": laws[law]}).items():
            params = fitted["params"]
            draws = {name: np.array(values) for name, values in fitted["draws"].items()}
            worth, interval = head_start(law, params, n, d1), interval_text(head_start(law, draws, n, d1))
            text = (f"By the law '{law_name(law)}', N = {short(n)}{', ' * bool(method)}{method}: a dense "
                    f"checkpoint of {short(d1)} tokens is worth {short(worth)} tokens of MoE training, once "
                    f"({interval}).")
            if "H_max" in params:
                most = interval_text(draws["H_max"])
                text += f" No checkpoint is worth more than {short(params['H_max'])} tokens ({most})."
            if "kappa" in params:
                text += handicap_words(law, params, draws, n, d1, largest)
            said.append(text)
    return said


def interaction_words(rows, laws, ranges):
    """Sentences, [text], on alpha3, and on how fast the loss itself falls with D2."""
    said, ends = [], ranges.get("upcycled", {}).get("D1", ())
    if "upcycled" in laws:
        params, (low, high) = laws["upcycled"]["params"], laws["upcycled"]["ci95"]["alpha3"]
        said.append(f"alpha3 of the interaction law is {params['alpha3']:.3g} (95 % interval {low:.3g} to "
                    f"{high:.3g}, {alpha3_p(laws['upcycled'])}).")
        said += [f"At D1 = {short(d1)} the exponent of D2 in the first term of that law is "
                 f"{-params['alpha2'] + params['alpha3'] * math.log(d1):.3f}." for d1 in ends]
    for d1 in ends:
        here = of_family(rows, "upcycled", D1=d1)
        curves = [figures.mean_loss(of_family(here, "upcycled", N=n), "D2") for n in sorted_levels(here, "N")]
        slopes = [figures.local_exponent(D2, loss)[0] for D2, loss, _ in curves if len(D2) > 2]
        if slopes:
            said.append(f"At D1 = {short(d1)} the loss itself falls as D2^{np.mean(slopes):.3f}, on average "
                        "over sizes.")
    return said


def findings(rows, content):
    """What the rows and the laws say, [text]."""
    laws, ranges = content["laws"], content["ranges"]
    return [*interaction_words(rows, laws, ranges), *head_start_words(laws, ranges),
            *crossings(method_differences(rows))]


# ---------------------------------------------------------------------------------------------------------
# report.md

def draw_figures(rows, laws, profiles):
    """{file name: (figure, caption)} of all that these rows and laws allow."""
    labels = [method_label(row) for row in of_family(rows, "upcycled")]
    method = "copy" if "copy" in labels else max(labels, key=labels.count, default="")
    one_method = [row for row in rows if row["family"] != "upcycled" or method_label(row) == method]
    rivals = [law for law in RIVALS if law in laws]
    comparable = [law for law in rivals if "upcycled" in laws[law]["fitted_with"]]
    best = min(comparable, key=lambda law: laws[law]["aicc"], default=next(iter(laws)))
    shown = {"upcycled": [law for law in dict.fromkeys(["upcycled", best]) if law in rivals],
             "moe": [law for law in ("moe.joint", "moe") if law in laws][:1],
             "dense": [law for law in ("dense",) if law in laws]}
    captions = {
        "loss_against_tokens": f"Loss against tokens, measured and fitted. Method: {method or 'none'}. "
                               "Bars are the range over repeats.",
        "exponent_against_D1": "The interaction: how fast the loss falls with D2, against D1.",
        "held_out_errors": "Errors of each law in sample and on held-out rows.",
        "alpha3_along_E": "alpha3 of the interaction law, with E held at each value and all else refitted.",
        "methods_against_copy": "Methods of upcycling, and a MoE from scratch on D = D2 tokens, against "
                                "copying. Paired runs differ in the method alone."}
    found = {"loss_against_tokens": figures.loss_against_tokens(one_method, laws, shown)}
    if rivals:
        found["exponent_against_D1"] = figures.exponent_against_D1(one_method, laws)
    if any(any(entry["held_out"].values()) for entry in laws.values()):
        found["held_out_errors"] = figures.held_out_errors(laws)
    for law in dict.fromkeys([best, *(law for law in laws if law.startswith("moe."))]):
        name = "residuals" if law == best else f"residuals_{law.replace('.', '_')}"
        captions[name] = f"What the law '{law_name(law)}' leaves unexplained."
        found[name] = figures.residuals(rows, law, laws[law])
    if profiles:
        found["alpha3_along_E"] = figures.alpha3_along_E(profiles)
    if differences := method_differences(rows):
        found["methods_against_copy"] = figures.against_copy(differences)
    return {name: (figure, captions[name]) for name, figure in found.items()}


def write_report(title, sections, found, directory):
    """Write report.md of {heading: lines}, empty ones left out, and {file name: (figure, caption)}."""
    text = [f"# {title}", ""]
    for heading, lines in sections.items():
        text += [f"## {heading}", "", *lines, ""] if lines else []
    for name, (_, caption) in found.items():
        text += [f"![{caption}]({name}.png)", "", caption, ""]
    try:
        for name, (figure, _) in found.items():
            figure.savefig(os.path.join(directory, f"{name}.png"))
            figure.savefig(os.path.join(directory, f"{name}.pdf"), metadata={"CreationDate": None})
            plt.close(figure)
        with open(os.path.join(directory, "report.md"), "w", encoding="utf-8") as file:
            file.write("\n".join(text).rstrip() + "\n")
    except OSError as error:
        raise ConfigError(f"{directory}: the report cannot be written: {error.strerror}") from None


def write(rows, content, profiles, notes, directory):
    """Write report.md and its figures (PNG and PDF) of rows and laws.

    profiles is {title: profile of E, as fit_laws.profile_E gives it}, notes are warnings, [text].
    """
    laws, first = content["laws"], next(iter(content["laws"].values()))
    spans = [f"- {FAMILIES[family][0]}: "
             + ", ".join(f"{name} {short(low)} to {short(high)}" for name, (low, high) in limits.items())
             for family, limits in content["ranges"].items()]
    draws = len(next(iter(first["draws"].values())))
    sections = {
        "Terms": TERMS.strip().split("\n"),
        "The laws": [f"- **{law_name(law)}** (`{law}` in laws.json): "
                     f"{FORMULAS.get(law, 'its formula is in laws.py')}." for law in laws],
        "What was measured": [f"There are {len(rows)} rows, in these ranges:", "", *spans],
        "Warnings": [f"- {note}" for note in notes],
        "What was found": [f"- {text}" for text in findings(rows, content)],
        "Claims": claims_table(content.get("claims", {})),
        "How well the laws predict": comparison_table(laws),
        "Noise and misfit": [*noise_table(laws), "", "Repeated seeds are needed to tell misfit from noise."],
        "Parameters": [*parameter_table(laws), "",
                       f"The intervals come from {draws} draws: {content['intervals']}.",
                       f"Huber's delta is {first['huber_delta']:.2g}."],
        "Each size alone": single_size_table(content["at_each_N"]),
        "Methods against copying": methods_table(method_differences(rows))}
    write_report("Scaling laws of this study", sections, draw_figures(rows, laws, profiles), directory)


# ---------------------------------------------------------------------------------------------------------
# Published laws

def matching_planes(params, sizes):
    """[(N, difference, above_start, above_scratch)] over TOKENS (D2, D1), one for each size.

    params is {"dense", "moe", "upcycled": {parameter: value}}. The difference is loss matching / published
    upcycled law - 1. The others are True where that law lies above the dense one at D1, and above the MoE
    from scratch on D = D2 tokens.
    """
    D1, D2, planes = TOKENS[None, :], TOKENS[:, None], []
    for n in sizes:
        upcycled = predict("upcycled", params["upcycled"], N=n, D1=D1, D2=D2)
        above_start = upcycled > predict("dense", params["dense"], N=n, D=D1)
        above_scratch = upcycled > predict("moe", params["moe"], N=n, D=D2)
        planes.append((n, published_check(params, n, D1, D2), above_start, above_scratch))
    return planes


def matching_table(planes):
    """Where loss matching agrees with a published law: one line a size and region of (D1, D2)."""
    lines = []
    for n, difference, start, scratch in planes:
        for title, region in (("below both", ~start & ~scratch), ("above from scratch", scratch & ~start),
                              ("above its dense start", start)):
            found = 100 * difference[region]
            if len(found):
                shares = [f"{100 * share:.0f} %" for share in (region.mean(), (np.abs(found) < 2).mean())]
                difference_text = f"{found.min():+.1f} .. {found.max():+.1f} %"
                lines.append([short(n), title, shares[0], difference_text, shares[1]])
    return aligned(["N", "the published law is", "share of the plane", "difference", "within ± 2 %"], lines)


def write_published(content, directory):
    """Write report.md on a file of published laws: what loss matching makes of its dense and MoE laws."""
    params = {law: entry["params"] for law, entry in content["laws"].items()}
    planes = matching_planes(params, np.geomspace(*content["ranges"]["upcycled"]["N"], 3))
    caption = ("Loss matching against the published upcycled law. Lines: ± 2 %. Strokes: that law lies above "
               "its dense start. Dots: it lies above a MoE from scratch on D = D2 tokens.")
    write_report("Loss matching against a published law", {
        "Terms": TERMS.strip().split("\n"),
        "What was compared": [f"Source: {content['source']}", "", *MATCHING_WORDS.strip().split("\n")],
        "Where it agrees": matching_table(planes),
        "Why it does not agree elsewhere": WHY_NOT.strip().split("\n")},
        {"loss_matching": (figures.loss_matching(planes, TOKENS), caption)}, directory)
