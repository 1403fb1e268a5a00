"""Rows of finished runs -> scaling laws with intervals, rivals and held-out errors.

    python fit_laws.py results/study_quick.jsonl --out=out/laws
"""
import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from configurator import (REQUIRED, ConfigError, code_version, locked, progress, run, setting,
                          write_text_atomically, writing)

import numpy as np

import report
from engine import fit
from laws import LAWS, MATCHING, RIVALS, SHARED_CURVE, predict, short
from mixture import ORIGIN, WARM_UPS, read_laws
from problem import at_levels, levels, levels_of_N, missing, of_family, point_of, variable, variables_of
from rows import EXPERTS, FAMILIES, bits_per_nat, method_label, mixed_conditions, read_rows, run_key
from uncertainty import (INTERVALS, aicc, bootstrap, fit_with_noise, leave_trunk_out, profile_E,
                         standard_errors, unidentified)

# Laws that are fitted to the rows of one (D, D1, D2).
AT_ONE_DATA = [law for law in LAWS if law.endswith((".sparsity", ".sparsity_additive"))]
# Mean and sd of a dense model's -d ln loss / d ln D, which a short pilot cannot tell: laws have 0.03 to 0.13.
LOCAL_ALPHA = (0.08, 0.05)


@dataclass
class Options:
    """Fit dense, MoE and upcycled scaling laws and their rivals to rows of finished runs; write laws.json,
    report.md and figures."""
    rows: list[str] = setting(
        REQUIRED, "JSONL files of rows, or CSV files with columns family,N,D,D1,D2,loss; or a laws file "
        "(.json), whose dense and MoE laws then predict its upcycled law", positional=True)
    out: str = setting("out/laws", "directory for laws.json, report.md and the figures")
    laws: list[str] = setting([], "laws to fit, comma-separated; empty: all that the rows allow")
    share: Literal["none", "E", "E,B,beta"] = setting("E", "what the laws of the families share")
    prior: str = setting("", "laws.json of other sizes; its alpha is a prior of the alpha of a pilot's "
                         "law, upcycled.head_start")
    A_of_N: bool = setting(False, "let A of every law depend on N, as A N^-nu")
    repeats: Literal["refuse", "lowest", "mean"] = setting(
        "refuse", "of repeated runs take the lowest loss (of a search) or the mean loss (of seeds)")
    draws: int = setting(1000, "bootstrap draws", least=20)
    skip_bad: bool = setting(False, "drop bad rows and count them, instead of stopping at the first")


# ---------------------------------------------------------------------------------------------------------
# Which laws, on which rows

def resolve_repeats(rows, how):
    """([row], [text: what was done]) where no run is repeated: each group of one run_key gives its first row
    with the lowest or the mean loss. Raises ConfigError where runs are repeated and how is "refuse"."""
    groups = {}
    for row in rows:
        groups.setdefault(run_key(row), []).append(row)
    repeated = [group for group in groups.values() if len(group) > 1]
    if not repeated:
        return rows, []
    first = repeated[0]
    losses = ", ".join(format(row["loss"], ".4g") for row in first[:4])
    said = (f"{len(repeated)} runs are there more than once, such as {first[0]['family']} "
            f"N={first[0]['N']:g} with losses {losses}")
    if how == "refuse":
        raise ConfigError(f"{said}; --repeats=mean takes their mean, --repeats=lowest the best of a search, "
                          "or add the columns that tell them apart (seed, trunk, learning_rate)")
    take = {"lowest": min, "mean": np.mean}[how]
    kept = [group[0] | {"loss": float(take([row["loss"] for row in group]))} for group in groups.values()]
    return kept, [f"{said}; the {how} loss of each is taken"]


def rows_at_one_data(rows):
    """The rows of the (D, D1, D2) that occurs most often; of those that tie, the one with most tokens."""
    data = [tuple(row.get(name, 0.0) for name in ("D", "D1", "D2")) for row in at_levels(rows)]
    counts = Counter(data)
    chosen = max(counts, key=lambda tokens: (counts[tokens], sum(tokens)), default=None)
    return [row for row, tokens in zip(rows, data) if tokens == chosen]


def system_of(law, base, rows):
    """{family: law} of the system that a law is fitted in. Dense, MoE and upcycled law are one system; each
    rival takes the upcycled law's place, so that all of them explain the same rows. A law whose curve from
    scratch is its own takes the MoE's place too. Loss matching with delta = 0 is fitted to no upcycled row.
    A pilot's law takes the checkpoint continued as a power law, where its rows allow no more."""
    if law in FAMILIES:
        return base | {law: law}
    if law not in RIVALS:
        return {law.partition(".")[0]: law}
    system = base | {"upcycled": law} | ({"moe": law} if law in SHARED_CURVE else {})
    if law == "upcycled.head_start" and "dense" not in base and not missing(rows, {"dense": "dense.local"}):
        system = {"dense": "dense.local"} | system
    if law == "upcycled.loss_matching_0":
        del system["upcycled"]
    return system


def plan_fits(rows, wanted=(), A_of_N=False):
    """({law: (system, rows)} of what can be fitted, {law: what it lacks})."""
    fits, lacks = {}, {}
    base = {family: family for family in FAMILIES if not missing(rows, {family: family}, A_of_N)}
    for law in wanted or [law for law in LAWS if law != "dense.local"]:
        system = system_of(law, base, rows)
        chosen = rows
        if law in AT_ONE_DATA:
            chosen = rows_at_one_data([row for row in rows if row["family"] in system])
        needed = {family: name for family, name in system.items()
                  if name == law or law in MATCHING and family == "dense"}
        lack = missing(chosen, needed, A_of_N)
        if lack:
            lacks[law] = "; ".join(lack)
        else:
            fits[law] = (system, chosen)
    return fits, lacks


def fit_settings(options, system):
    """The settings of fit_with_noise for a system {family: law}. Raises ConfigError."""
    share = () if options.share == "none" else tuple(options.share.split(","))
    priors = {"dense.local": LOCAL_ALPHA, "upcycled.head_start": alpha_prior(options.prior)}
    priors = {law: prior for law, prior in priors.items() if prior and law in system.values()}
    return {"share": share, "A_of_N": options.A_of_N, "priors": priors}


def alpha_prior(path):
    """(mean, standard deviation) of the alpha of MoEs from scratch in a laws file; None without a file. Those
    of the three sizes of the quick study differ by 12 %. Raises ConfigError."""
    if not path:
        return None
    laws = read_laws(path)[0]["laws"]
    entry = laws.get("upcycled.effective_data_shared") or laws.get("moe") or {}
    if "draws" not in entry:
        raise ConfigError(f"--prior={path}: has no law of MoEs from scratch with draws of alpha")
    alpha = entry["params"]["alpha"]
    return alpha, math.hypot(np.std(entry["draws"]["alpha"]), 0.12 * alpha)


# ---------------------------------------------------------------------------------------------------------
# From fits to the entries of laws.json

def rounded(params):
    """Parameters as JSON: arrays of draws with five digits."""
    return {name: [float(f"{x:.5g}") for x in value] if np.ndim(value) else float(value)
            for name, value in params.items()}


def entries_of(laws, system, rows, options, tick):
    """({law: its entry in laws.json}, the Fit) of the laws of one system."""
    settings = fit_settings(options, system)
    fitted = fit_with_noise(rows, system, **settings)
    theta = bootstrap(fitted, options.draws, tick=tick)
    narrow = fit(rows, system, settings["share"], 1e-3, options.A_of_N)
    problem, left_out, (noise, misfit) = fitted.problem, leave_trunk_out(fitted), fitted.noise.table()
    of_system = {"aicc": aicc(fitted), "n_with": len(fitted.residual), "fitted_with": system,
                 "shared": sorted(set(settings["share"]) & set(problem.names)),
                 "huber_delta": fitted.delta, "noise": noise, "misfit": misfit}

    def fit_of(law, method=None):
        return {"params": rounded(fitted.params(law, method=method)),
                "draws": rounded(fitted.params(law, theta, method))}

    entries = {}
    for law in laws:
        family, draws = law.partition(".")[0], fitted.params(law, theta)
        explained = of_family(rows, family)
        inside = errors(fitted, law, explained)
        left = left_out[np.isfinite(left_out) & [row["family"] == family for row in problem.rows]]
        if law == "upcycled.loss_matching_0":  # it saw no upcycled trunk
            left = inside
        names = FAMILIES["upcycled"] if law in RIVALS else [  # the smallest share is that of the most experts
            name.replace("active_share", "experts") for name in variables_of(law)]
        entry = of_system | fit_of(law) | {
            "n": len(explained), "rmse_log": rms(inside), "se_asymptotic": standard_errors(fitted, law),
            "held_out": {name: extrapolate(rows, system, law, name, **settings) for name in names},
            "ci95": {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in draws.items()},
            "not_identified": problem.fixed[law] | unidentified(fitted, law, theta),
            "params_at_delta_0.001": rounded(narrow.params(law))}
        entry["held_out"]["trunk"] = counted(left)
        if law in AT_ONE_DATA:
            entry["at"] = {name: explained[0][name] for name in ("D", "D1", "D2") if name in explained[0]}
        labels = {method_label(row) for row in explained}
        labels = problem.methods or (labels - {"copy", "None"} if len(labels) == 1 else ())
        if labels and law == system.get("upcycled"):
            entry["methods"] = {label: fit_of(law, label) for label in labels}
        if law in RIVALS:  # the laws to compare it with are those of the same fit, draw by draw
            others = dict.fromkeys(system.values())
            entry["beside"] = {other: fit_of(other) for other in others if other != law}
        entries[law] = entry
    return entries, fitted


# ---------------------------------------------------------------------------------------------------------
# Rows that a fit did not see

def rms(values):
    """Root mean square; None of nothing."""
    values = np.asarray(values, float)
    return float(np.sqrt((values ** 2).mean())) if len(values) else None


def counted(values, beyond=None):
    """An entry of held_out: {"rms" of errors of ln loss, "rows", "beyond"}; None of no errors."""
    return {"rms": rms(values), "rows": len(values), "beyond": beyond} if len(values) else None


def errors(fitted, law, rows):
    """(len(rows),) ln measured - ln predicted by a law of the fit for rows of the law's family, each by
    its own method, whether the fit saw them or not."""
    params = {label: fitted.params(law, method=label) for label in {method_label(row) for row in rows}}
    predicted = [predict(law, params[method_label(row)], **point_of(row)) for row in rows]
    return np.log([row["loss"] for row in rows]) - np.log(predicted)


def held_out_from(rows, family, name):
    """The value of `name` from which rows of a family are held out: its largest level, or where that has less
    than 15 % of them the upper fifth of its range (in logarithms), of 5 % at least; None for one level."""
    values = np.array([variable(row, name) for row in of_family(rows, family)], float)
    values = values[np.isfinite(values)]
    found = levels(values)
    if len(found) < 2:
        return None
    if (values >= found[-1]).mean() >= 0.15:
        return found[-1]
    enough = max(level for level in found if (values >= level).mean() >= 0.05)
    return min(enough, math.exp(0.8 * math.log(values.max()) + 0.2 * math.log(values.min())))


def extrapolate(rows, system, law, name, **options):
    """How a fit predicts a law's rows at the largest values of variable `name`, which it did not see; for N
    it saw them in no family. Returns what `counted` says, with the largest held-out value over the largest
    fitted one, or None where too few rows are left to fit. options go to fit_with_noise."""
    family = law.partition(".")[0]
    if (threshold := held_out_from(rows, family, name)) is None:
        return None
    families = {family, *system} if name == "N" else {family}
    held = [row for row in of_family(rows, family) if variable(row, name) >= threshold]
    kept = [row for row in rows if not (row["family"] in families and variable(row, name) >= threshold)]
    if missing(kept, system) or name == "N" and min(levels_of_N(kept, system)) < 2:
        return None
    fitted = fit_with_noise(kept, system, **options)
    largest, rest = (max(variable(row, name) for row in some) for some in (held, of_family(kept, family)))
    return counted(errors(fitted, law, held), float(largest / rest))


# ---------------------------------------------------------------------------------------------------------
# The command

def families_of(rows):
    """{family: its rows} of the families that have rows."""
    return {family: members for family in FAMILIES if (members := of_family(rows, family))}


def values_of(members, names):
    """{column: its values, sorted} of rows."""
    return {name: sorted({row[name] for row in members if name in row}, key=str) for name in names}


def mixtures(rows):
    """Yields warnings where rows of one family mix data, numbers of experts or methods (only laws with a
    head start tell these apart), and where rows were made under different settings."""
    found = {f"{family} rows": values_of(members, ("data_sha256", "method", *EXPERTS))
             for family, members in families_of(rows).items()}
    for who, columns in (found | {"rows": mixed_conditions(rows)}).items():
        for key, values in columns.items():
            if len(values) > 1:
                shown = [f"{value:g}" if isinstance(value, float) else ascii(value).strip("'")[:12]
                         for value in values[:5]]
                yield (f"{who} mix {len(values)} values of {key} ({', '.join(shown)}); "
                       "the laws take them as one")


def planned(rows, options):
    """{law: (system, rows)} of the laws that these rows allow; it prints which laws it skips. Raises
    ConfigError where a wanted law is unknown, or where it, or every law, lacks rows."""
    for name in options.laws:
        if name not in LAWS:
            raise ConfigError(f"--laws: no law '{name}'; there are {', '.join(LAWS)}")
    fits, lacks = plan_fits(rows, options.laws, options.A_of_N)
    if options.laws and lacks:
        raise ConfigError("--laws: " + "; ".join(f"{law} {lack}" for law, lack in lacks.items()))
    if options.prior and "upcycled.head_start" not in fits:
        raise ConfigError("--prior is for a pilot's law, upcycled.head_start: "
                          f"{lacks.get('upcycled.head_start', 'leave out --laws')}")
    for lack in dict.fromkeys(lacks.values()):
        print(f"skipped {', '.join(law for law in lacks if lacks[law] == lack)}: {lack}")
    if not fits:
        raise ConfigError(f"{', '.join(options.rows)}: no law can be fitted to these {len(rows)} rows")
    return fits


def notes_on(entries):
    """Yields warnings on parameters that are not identified, and on laws that hold at one D, D1 and D2."""
    found = {}  # {why: {law: [parameter]}}
    for law, entry in entries.items():
        for name, why in entry["not_identified"].items():
            if why.endswith(("bound of the fit", "sign is open", "another D")):
                found.setdefault(why, {}).setdefault(law, []).append(name)
    for why, of_laws in found.items():
        yield ", ".join(f"{law} ({' '.join(names)})" for law, names in of_laws.items()) + f": {why}"
    for law, entry in entries.items():
        if "at" in entry:
            tokens = ", ".join(f"{name} = {short(value)}" for name, value in entry["at"].items())
            yield f"{law} is fitted at {tokens} alone"


def models(rows):
    """[{"family", "N", "N_active", "N_total", "num_local_experts", "num_experts_per_tok",
    "flops_per_token"}]: the models of the rows that say their FLOPs."""
    found = {}
    for row in rows:
        tokens = row.get("D2", row.get("D"))
        columns = ("family", "N", "N_active", "N_total", *EXPERTS)
        model = {name: row[name] for name in columns if name in row}
        if isinstance(row.get("flops"), (int, float)) and row["flops"] > 0:
            found[tuple(model.values())] = model | {"flops_per_token": row["flops"] / tokens}
    return list(found.values())


def warm_up(row):
    """The tokens of a row's warm-up; 0 where it does not say."""
    return (row.get("warmup_steps") or 0) * (row.get("tokens_per_step") or 0)


def measured(rows):
    """Yields (claim, whether it holds, text) on losses, without a law."""
    scratch, slopes = {}, report.local_exponents(rows)
    if len(slopes) > 1:
        small, large = slopes.values()
        text = ", ".join(f"D2^{slope:.3f} after D1 = {short(d1)}" for d1, slope in slopes.items())
        yield "the loss falls more slowly with D2 after the largest D1", large > small, text
    for (label, _, d1), cells in report.method_differences(rows).items():
        if label == report.FAMILY_STYLES["moe"][0]:
            scratch.setdefault(d1, []).append(cells)
    of_sizes = scratch[min(scratch)] if scratch else [{}]
    if common := set.intersection(*map(set, of_sizes)):
        pairs = [pair for cells in of_sizes for pair in cells[max(common)]]
        yield ("a MoE from scratch leads copying at the smallest D1 and the largest D2",
               sum(report.t_interval(pairs)) < 0, report.mean_text(pairs))


def compared(entries, rows):
    """Yields (claim, whether it holds, text) on entries of the interaction law, the handicap law or both."""
    handicap = "upcycled.handicap"
    for claim, law, name in (("alpha3 of the interaction law is positive", "upcycled", "alpha3"),
                             ("upcycling has a lasting cost kappa", handicap, "kappa")):
        if law in entries:
            value, error = float(entries[law]["params"][name]), entries[law]["se_asymptotic"][name]
            yield claim, value > 1.96 * error, f"{value:.3g}, standard error {error:.2g}"
    if handicap in entries:
        corner = [max(row[name] for row in of_family(rows, "upcycled")) for name in ("N", "D1")]
        star, = report.overtaking_by(handicap, entries[handicap]["params"], *corner)
        yield ("by the handicap law a MoE from scratch overtakes after the largest D1", math.isfinite(star),
               f"D2* = {star:.3g}")
    if len(entries) < 2:
        return
    interaction, handicap = entries["upcycled"], entries[handicap]
    better = "the handicap law is better than the interaction law"
    gain = interaction["aicc"] - handicap["aicc"]
    if interaction["n"] == handicap["n"]:  # of other rows it is no comparison
        yield f"{better} by AICc", gain > 6, f"the difference is {-gain:+.1f}"
    for name in ("D1", "D2"):
        ours, other = handicap["held_out"][name], interaction["held_out"][name]
        if ours and other:
            text = f"{100 * ours['rms']:.2f} % against {100 * other['rms']:.2f} % on {ours['rows']} rows"
            yield f"{better} at the held-out largest {name}", ours["rms"] < other["rms"], text


def claims(rows, options):
    """({claim: {variation of the analysis: {"holds": whether it does, "value": text}}} on upcycled rows of
    the main method, as not all laws fit each method apart, [note]). All leave out runs that are shorter than
    WARM_UPS times their warm-up, where they name it."""
    method = report.main_method_rows(rows)[0]
    rows = [row for row in rows if row["family"] != "upcycled" or method_label(row) == method]
    long = [row for row in rows if row.get("D2", row.get("D")) >= WARM_UPS * warm_up(row)]
    smallest = min((row["D2"] for row in of_family(long, "upcycled")), default=0.0)
    without = [row for row in long if row.get("D2", math.inf) > 1.05 * smallest]
    usual, found, scores = fit_settings(options, {}), {}, {}
    for variation, chosen, settings in (
            ("as fitted", long, usual), ("without the smallest D2", without, usual),
            ("B and beta shared", long, usual | {"share": ("E", "B", "beta")}),
            ("A depends on N", long, usual | {"A_of_N": True})):
        entries = {}
        fits, _ = plan_fits(chosen, ["upcycled", "upcycled.handicap"], settings["A_of_N"])
        for law, (system, explained) in fits.items():
            fitted = fit_with_noise(explained, system, **settings)
            held_out = {name: extrapolate(explained, system, law, name, **settings) for name in ("D1", "D2")}
            entries[law] = {"params": fitted.params(law), "se_asymptotic": standard_errors(fitted, law),
                            "aicc": aicc(fitted), "n": len(fitted.residual), "held_out": held_out}
        scores[variation] = [entry["aicc"] for entry in entries.values()]
        without_law = measured(chosen) if settings is usual else ()
        for claim, holds, text in (*compared(entries, chosen), *without_law):
            found.setdefault(claim, {})[variation] = {"holds": bool(holds), "value": text}
    left = len(rows) - len(long)
    said = [f"{left} rows are shorter than {WARM_UPS} warm-ups; claims leave them out"] * bool(left)
    gain = min((a - b for a, b in zip(scores["as fitted"], scores["A depends on N"])), default=0.0)
    return found, said + [f"AICc is lower by {gain:.0f} or more with --A_of_N"] * (gain > 6)


def main(options):
    """Read rows, fit the laws, write the results; laws.json comes last and says that all is done."""
    if options.rows[0].endswith(".json"):
        report.write_published(options.rows[0], options.out)
        print(f"{os.path.join(options.out, 'report.md')} and its figure written")
        return
    rows, dropped = read_rows(options.rows, options.skip_bad)
    ratio = bits_per_nat(rows)
    notes = [f"{len(dropped)} bad rows dropped, the first {dropped[0]}"] if dropped else []
    rows, said = resolve_repeats(rows, options.repeats)
    if len(rows) > 5_000:  # there are matrices of rows x rows
        raise ConfigError(f"{', '.join(options.rows)}: {len(rows):,} rows; at most 5,000 are fitted")
    fits = planned(rows, options)
    notes += [*said, *mixtures(rows)]
    with writing(options.out):
        os.makedirs(options.out, exist_ok=True)
    systems, entries, profile = {}, {}, {}
    for law, (system, chosen) in fits.items():
        systems.setdefault(tuple(system.items()), (system, chosen, []))[2].append(law)
    with progress(options.draws * len(systems), "bootstrap", "draw") as bar:
        for system, chosen, laws in systems.values():
            found, fitted = entries_of(laws, system, chosen, options, bar.update)
            entries |= found
            if "upcycled" in laws:
                profile = profile_E(fitted, "upcycled")
    claimed, left_out = claims(rows, options) if not options.laws else ({}, [])
    notes += [*notes_on(entries), *report.doubts(entries), *left_out]
    lines = sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
    families = families_of(rows)
    ranges = {family: {name: [extreme(row[name] for row in families[family]) for extreme in (min, max)]
                       for name in FAMILIES[family]} for family in families}
    out = {"version": 2, "laws": entries, "intervals": INTERVALS, "ranges": ranges,
           "origin": {family: values_of(families[family], ORIGIN) for family in families},
           "models": models(rows), "warm_up": max(map(warm_up, rows)),
           "bits_per_nat": ratio, "claims": claimed, "git": code_version(),
           "data_sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
    path = os.path.join(options.out, "laws.json")
    with locked(options.out, ".lock", "", wait=True):  # another fit may be writing there
        report.write(rows, out, profile, notes, options.out)
        write_text_atomically(path, json.dumps(out, allow_nan=False))
    for block in (report.comparison_table(entries), report.methods_table(report.method_differences(rows)),
                  report.findings(rows, out), [f"warning: {note}" for note in notes]):
        print("\n".join(block) + "\n" * bool(block))
    print(f"{path}, report.md and figures written")


if __name__ == "__main__":
    run(main, Options)
