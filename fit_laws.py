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

import numpy as np

import report
from configurator import (REQUIRED, ConfigError, code_version, progress, run, setting,
                          write_text_atomically)
from engine import fit
from laws import (LAWS, MATCHING, RIVALS, SHARED_CURVE, levels, levels_of_N, missing, parameter_names,
                  predict, variable, variables_of)
from rows import FAMILIES, method_label, mixed_conditions, read_rows, run_key
from uncertainty import (INTERVALS, aicc, bootstrap, fit_with_noise, leave_trunk_out, of_family,
                         profile_E, standard_errors, unidentified)

# Laws that are fitted to the rows of one (D, D1, D2).
AT_ONE_DATA = [law for law in LAWS if law.endswith((".sparsity", ".sparsity_additive"))]


@dataclass
class Options:
    """Fit dense, MoE and upcycled scaling laws and their rivals to rows of finished runs; write laws.json,
    report.md and figures."""
    rows: list[str] = setting(
        REQUIRED, "JSONL files of rows, or CSV files with columns family,N,D,D1,D2,loss; or a laws file "
        "(.json), whose dense and MoE laws then predict its upcycled law", positional=True)
    out: str = setting("out/laws", "directory for laws.json, report.md and the figures")
    laws: str = setting("", "laws to fit, comma-separated; empty: all that the rows allow")
    share: str = setting(
        "E", "parameters that the laws of the families share, comma-separated; none: nothing")
    delta: Literal["auto"] | float = setting(
        "auto", "Huber's delta on log residuals; auto: 1.345 standard deviations of the noise")
    A_of_N: bool = setting(False, "let A of every law depend on N, as A N^-nu")
    repeats: Literal["refuse", "lowest", "mean"] = setting(
        "refuse", "of repeated runs take the lowest loss (of a search) or the mean loss (of seeds)")
    draws: int = setting(1000, "bootstrap draws", least=20)
    seed: int = setting(0, "seed of the bootstrap", least=0)
    skip_bad: bool = setting(False, "drop bad rows and count them, instead of stopping at the first")


# ---------------------------------------------------------------------------------------------------------
# Which laws, on which rows

def resolve_repeats(rows, how):
    """([row], [text: what was done]) where no run is repeated: each group of one run_key gives the row of
    its lowest loss, or its first row with the mean loss. Raises ConfigError where runs are repeated and
    how is "refuse"."""
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
    kept = []
    for group in groups.values():
        best = min(group, key=lambda row: row["loss"])
        mean = float(np.mean([row["loss"] for row in group]))
        kept.append(best if how == "lowest" else group[0] | {"loss": mean})
    return kept, [f"{said}; the {how} loss of each is taken"]


def rows_at_one_data(rows):
    """The rows of the (D, D1, D2) that occurs most often; of those that tie, the one with most tokens."""
    data = [tuple(row.get(name, 0.0) for name in ("D", "D1", "D2")) for row in rows]
    counts = Counter(data)
    chosen = max(counts, key=lambda tokens: (counts[tokens], sum(tokens)), default=None)
    return [row for row, tokens in zip(rows, data) if tokens == chosen]


def system_of(law, base):
    """{family: law} of the system that a law is fitted in. Dense, MoE and upcycled law are one system;
    each rival takes the upcycled law's place, so that all of them explain the same rows. A law whose curve
    from scratch is its own takes the MoE's place too. Loss matching with delta = 0 is fitted to no
    upcycled row."""
    if law in FAMILIES:
        return base | {law: law}
    if law not in RIVALS:
        return {law.partition(".")[0]: law}
    system = base | {"upcycled": law} | ({"moe": law} if law in SHARED_CURVE else {})
    if law == "upcycled.loss_matching_0":
        del system["upcycled"]
    return system


def plan_fits(rows, wanted=()):
    """({law: (system, rows)} of what can be fitted, {law: what it lacks})."""
    fits, lacks = {}, {}
    base = {family: family for family in FAMILIES if not missing(rows, {family: family})}
    for law in wanted or LAWS:
        system = system_of(law, base)
        chosen = [row for row in rows if row["family"] in system]
        if law in AT_ONE_DATA:
            chosen = rows_at_one_data(chosen)
        needed = {family: name for family, name in system.items()
                  if name == law or law in MATCHING and family == "dense"}
        lack = missing(chosen, needed)
        if lack:
            lacks[law] = "; ".join(lack)
        else:
            fits[law] = (system, chosen)
    return fits, lacks


def shared_names(options):
    """The parameters that --share names."""
    return tuple(name for name in map(str.strip, options.share.split(",")) if name not in ("", "none"))


# ---------------------------------------------------------------------------------------------------------
# From fits to the entries of laws.json

def rounded(params):
    """Parameters as JSON: arrays of draws with five digits."""
    return {name: [float(f"{x:.5g}") for x in value] if np.ndim(value) else float(value)
            for name, value in params.items()}


@dataclass
class Analysis:
    """A fitted system with what is known about its errors."""
    fit: object             # engine.Fit
    narrow: object          # the fit at Huber's delta 0.001
    theta: np.ndarray       # (draws, p) bootstrap
    left_out: np.ndarray    # (n,) log errors where the row's trunk was left out
    aicc: float


def analysed(rows, system, options, tick):
    """The Analysis of one system; options are those of the command."""
    settings = {"share": shared_names(options), "A_of_N": options.A_of_N}
    fitted = fit_with_noise(rows, system, delta=options.delta, **settings)
    theta = bootstrap(fitted, options.draws, options.seed, tick)
    narrow = fit(rows, system, delta=1e-3, **settings)
    return Analysis(fitted, narrow, theta, leave_trunk_out(fitted), aicc(fitted))


def explained_rows(law, rows):
    """The rows whose losses a law is there to explain: those of its own family."""
    return [row for row in rows if row["family"] == law.partition(".")[0]]


def law_entry(law, rows, analysis, held_out):
    """The entry of one law in laws.json."""
    fitted, theta = analysis.fit, analysis.theta
    problem = fitted.problem
    system, draws, explained = problem.system, fitted.params(law, theta), explained_rows(law, rows)
    noise, misfit = fitted.noise.table()
    fixed = {name: why for name, (_, why) in problem.fixed[law].items()}
    entry = {
        "params": rounded(fitted.params(law)),
        "ci95": {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in draws.items()},
        "se_asymptotic": standard_errors(fitted, law),
        "n": len(explained), "rmse_log": rms(errors(fitted, law, explained)), "held_out": held_out,
        "aicc": analysis.aicc, "n_with": len(fitted.residual), "fitted_with": system,
        "shared": sorted(set(problem.options["share"]) & set(problem.names)),
        "not_identified": fixed | unidentified(fitted, law, theta),
        "huber_delta": float(np.median(fitted.delta)),
        "params_at_delta_0.001": rounded(analysis.narrow.params(law)),
        "noise": noise, "misfit": misfit, "draws": rounded(draws)}
    if law in AT_ONE_DATA:
        entry["at"] = {name: explained[0][name] for name in ("D", "D1", "D2") if name in explained[0]}
    if problem.methods and law == system.get("upcycled"):
        entry["methods"] = {
            label: {"params": rounded(fitted.params(law, method=label)),
                    "draws": rounded(fitted.params(law, theta, label))} for label in problem.methods}
    if law in RIVALS:  # the laws to compare it with are those of the same fit, draw by draw
        others = [other for other in dict.fromkeys(system.values()) if other != law]
        entry["beside"] = {other: {"params": rounded(fitted.params(other)),
                                   "draws": rounded(fitted.params(other, theta))} for other in others}
    return entry


def held_out_errors(law, rows, analysis, options):
    """{variable or "trunk": {"rms", "rows", "beyond"} or None}: errors of rows of the law's family that
    the fit did not see."""
    fitted = analysis.fit
    settings = {"delta": options.delta, **fitted.problem.options}
    names = FAMILIES["upcycled"] if law in RIVALS else variables_of(law)
    found = {name: extrapolate(rows, fitted.problem.system, law, name, **settings) for name in names}
    if law == "upcycled.loss_matching_0":  # no upcycled trunk was seen
        left = errors(fitted, law, explained_rows(law, rows))
    else:
        left = of_family(analysis.left_out, fitted, law.partition(".")[0])
    found["trunk"] = counted(left)
    return found


def analyse(rows, options, fits, bar):
    """({law: its entry in laws.json}, the Fit with the interaction law or None)."""
    entries, cache, main_fit = {}, {}, None
    for law, (system, chosen) in fits.items():
        key = tuple(system.items()) + (len(chosen),)
        if key not in cache:
            cache[key] = analysed(chosen, system, options, bar.update)
        if law == "upcycled":
            main_fit = cache[key].fit
        if law == "upcycled.loss_matching_0":
            chosen = chosen + explained_rows(law, rows)
        entries[law] = law_entry(law, chosen, cache[key], held_out_errors(law, chosen, cache[key], options))
    return entries, main_fit


def at_each_N(rows, options):
    """({N: {law: {"params", "se_asymptotic", "n", "rmse_log", "held_out"}}}, {title: profile of E}) of the
    upcycled laws fitted to one size at a time. They hold with no assumption on how N enters."""
    found, profiles = {}, {}
    for n in levels(row["N"] for row in rows if row["family"] == "upcycled"):
        one = [row for row in rows if n <= row["N"] <= 1.05 * n]
        for law, (system, chosen) in plan_fits(one, RIVALS)[0].items():
            fitted = fit_with_noise(chosen, system, (), options.delta)
            explained, left = explained_rows(law, one), leave_trunk_out(fitted)
            found.setdefault(f"{n:.6g}", {})[law] = {
                "params": rounded(fitted.params(law)), "se_asymptotic": standard_errors(fitted, law),
                "n": len(explained), "rmse_log": rms(errors(fitted, law, explained)),
                "held_out": {"trunk": counted(of_family(left, fitted, "upcycled"))}}
            if law == "upcycled":
                profiles[f"N = {report.short(n)} alone"] = profile_E(fitted, law)
    return found, profiles


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
    names, predicted = variables_of(law), []
    for row in rows:
        point = {name: variable(row, name) for name in names}
        predicted.append(float(predict(law, params[method_label(row)], **point)))
    return np.log([row["loss"] for row in rows]) - np.log(predicted)


def held_out_from(rows, family, name):
    """The value of variable `name` from which rows of a family are held out: its largest level, or the
    upper fifth of its range (in logarithms) where that level has less than 15 % of the rows. None where
    that leaves nothing."""
    values = np.array([variable(row, name) for row in rows if row["family"] == family], float)
    values = values[np.isfinite(values)]
    found = levels(values)
    if len(found) < 2:
        return None
    threshold = found[-1]
    if (values >= threshold).mean() < 0.15:
        threshold = min(threshold, math.exp(0.8 * math.log(values.max()) + 0.2 * math.log(values.min())))
    return threshold


def extrapolate(rows, system, law, name, **options):
    """How a fit predicts a law's rows at the largest values of variable `name`, which it did not see; for N
    it saw them in no family. options go to fit_with_noise.

    Returns {"rms": error of ln loss, "rows": how many rows were held out, "beyond": the largest held-out
    value over the largest fitted one}, or None where too few rows are left to fit.
    """
    family = law.partition(".")[0]
    threshold = held_out_from(rows, family, name)
    if threshold is None:
        return None

    def is_held(row, families):
        return row["family"] in families and variable(row, name) >= threshold

    held = [row for row in rows if is_held(row, {family})]
    kept = [row for row in rows if not is_held(row, set(system) | {family} if name == "N" else {family})]
    if missing(kept, system) or name == "N" and min(levels_of_N(kept, system)) < 2:
        return None
    fitted = fit_with_noise(kept, system, **options)
    rest = [variable(row, name) for row in kept if row["family"] == family]
    largest = max(variable(row, name) for row in held)
    return counted(errors(fitted, law, held), float(largest / max(rest)))


# ---------------------------------------------------------------------------------------------------------
# The command

def ranges(rows):
    """{family: {variable: [smallest, largest]}}."""
    found = {}
    for family, names in FAMILIES.items():
        members = [row for row in rows if row["family"] == family]
        if members:
            found[family] = {name: [extreme(row[name] for row in members) for extreme in (min, max)]
                             for name in names}
    return found


def mixtures(rows):
    """Warnings, [text], where rows of one family come from different data or numbers of experts, where
    methods are mixed (only laws with a head start tell them apart), and where rows were made under
    different settings."""
    found = []
    for family in FAMILIES:
        for key in ("data_sha256", "method", "num_local_experts", "num_experts_per_tok"):
            values = [row[key] for row in rows if row["family"] == family and key in row]
            names = {f"{value:g}" if isinstance(value, float) else ascii(value).strip("'")
                     for value in values}
            if len(names) > 1:
                shown = ", ".join(sorted(name[:12] for name in names))
                found.append(f"{family} rows mix {len(names)} values of {key} ({shown}); "
                             "the laws take them as one")
    for key, values in mixed_conditions(rows).items():
        shown = ", ".join(map(str, values[:5]))
        found.append(f"rows mix {len(values)} values of {key} ({shown}); the laws take them as one")
    return found


def wanted_laws(options):
    """The laws that --laws names. Raises ConfigError where --laws, --delta or --share make no sense."""
    wanted = [name.strip() for name in options.laws.split(",") if name.strip()]
    for name in wanted:
        if name not in LAWS:
            raise ConfigError(f"--laws: no law '{name}'; there are {', '.join(LAWS)}")
    if options.delta != "auto" and options.delta <= 0:
        raise ConfigError(f"--delta={options.delta:g} is not positive; "
                          "auto, or a size of log residuals such as 0.001")
    for name in shared_names(options):
        if name not in parameter_names("dense"):
            known = ", ".join(parameter_names("dense"))
            raise ConfigError(f"--share: '{name}' is none of {known}")
    return wanted


def planned(rows, wanted, options):
    """{law: (system, rows)} of the laws that these rows allow; it prints which laws it skips. Raises
    ConfigError where a wanted law, or every law, lacks rows."""
    fits, lacks = plan_fits(rows, wanted)
    if wanted and lacks:
        raise ConfigError("--laws: " + "; ".join(f"{law} {lack}" for law, lack in lacks.items()))
    for lack in dict.fromkeys(lacks.values()):
        print(f"skipped {', '.join(law for law in lacks if lacks[law] == lack)}: {lack}")
    if not fits:
        raise ConfigError(f"{', '.join(options.rows)}: no law can be fitted to these {len(rows)} rows")
    return fits


def unidentified_note(entries):
    """[a warning] that names the parameters these rows do not identify."""
    unclear = {}
    for law, entry in entries.items():
        why = entry["not_identified"]
        names = [name for name in why if why[name].endswith(("bound of the fit", "sign is open"))]
        if names:
            unclear[law] = names
    said = ", ".join(f"{law} ({', '.join(names)})" for law, names in unclear.items())
    return [f"these rows do not identify {said}; outside the data those laws say little"] if said else []


def scope_notes(entries):
    """[warning] on laws that hold at one horizon D, and at one D, D1 and D2 by their definition."""
    folded = [law for law, entry in entries.items()
              if "one level of D" in entry["not_identified"].get("A", "")]
    notes = [f"{', '.join(folded)}: the rows have one horizon D, whose term is part of E; "
             "the law says nothing of other horizons"] if folded else []
    for law, entry in entries.items():
        if "at" in entry:
            tokens = ", ".join(f"{name} = {report.short(value)}" for name, value in entry["at"].items())
            notes.append(f"{law} is fitted at {tokens} alone")
    return notes


def origin(rows):
    """{family: {column: its values}} of what must agree among laws that are compared."""
    columns = ("data_sha256", "tokenizer", "num_local_experts", "num_experts_per_tok", "max_seq_len")
    found = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        members = [row for row in rows if row["family"] == family]
        found[family] = {name: sorted({row[name] for row in members if name in row}, key=str)
                         for name in columns}
    return found


def models(rows):
    """[{"family", "N", "N_active", "N_total", "num_local_experts", "num_experts_per_tok",
    "flops_per_token"}]: the models of the rows that say their FLOPs."""
    found = {}
    for row in rows:
        tokens = row.get("D2", row.get("D"))
        columns = ("family", "N", "N_active", "N_total", "num_local_experts", "num_experts_per_tok")
        model = {name: row[name] for name in columns if name in row}
        if isinstance(row.get("flops"), (int, float)) and row["flops"] > 0:
            found[tuple(model.values())] = model | {"flops_per_token": row["flops"] / tokens}
    return list(found.values())


def compared(rows, options, settings):
    """[(claim, whether it holds, text)] on the interaction law and the handicap law; [] where one cannot
    be fitted."""
    fits, _ = plan_fits(rows, ["upcycled", "upcycled.handicap"])
    if len(fits) < 2:
        return []
    settings = {"delta": options.delta, **settings}
    fitted = {law: fit_with_noise(chosen, system, **settings) for law, (system, chosen) in fits.items()}
    found = []
    for claim, (law, name) in {"alpha3 of the interaction law is positive": ("upcycled", "alpha3"),
                               "upcycling has a lasting cost kappa": ("upcycled.handicap", "kappa")}.items():
        value, error = fitted[law].params(law)[name], standard_errors(fitted[law], law)[name]
        found.append((claim, value > 1.96 * error, f"{value:.3g}, standard error {error:.2g}"))
    gain = aicc(fitted["upcycled"]) - aicc(fitted["upcycled.handicap"])
    better = "the handicap law is better than the interaction law"
    found.append((f"{better} by AICc", gain > 6, f"the difference is {-gain:+.1f}"))
    for name in ("D1", "D2"):
        held = [extrapolate(chosen, system, law, name, **settings) for law, (system, chosen) in fits.items()]
        if all(held):
            errors_of = " against ".join(f"{100 * one['rms']:.2f} %" for one in held[::-1])
            text = f"{errors_of} on {held[0]['rows']} rows"
            found.append((f"{better} at the held-out largest {name}", held[1]["rms"] < held[0]["rms"], text))
    return found


def claims(rows, options):
    """{claim: {variation of the analysis: {"holds": whether it does, "value": text}}} on the upcycled rows.

    The variations drop the smallest D2, share B and beta among the families, and let A depend on N.
    """
    smallest = min((row["D2"] for row in rows if row["family"] == "upcycled"), default=0.0)
    without = [row for row in rows if row.get("D2", math.inf) > 1.05 * smallest]
    usual = {"share": shared_names(options), "A_of_N": options.A_of_N}
    variations = {"as fitted": (rows, usual), "without the smallest D2": (without, usual),
                  "B and beta shared": (rows, usual | {"share": ("E", "B", "beta")}),
                  "A depends on N": (rows, usual | {"A_of_N": True})}
    found = {}
    for variation, (chosen, settings) in variations.items():
        for claim, holds, text in compared(chosen, options, settings):
            found.setdefault(claim, {})[variation] = {"holds": bool(holds), "value": text}
    return found


def main(options):
    """Read rows, fit the laws, write the results; laws.json comes last, since its presence says that all
    is done."""
    if options.rows[0].endswith(".json"):
        report.write_published(options.rows[0], options.out)
        print(f"{os.path.join(options.out, 'report.md')} and its figure written")
        return
    rows, dropped = read_rows(options.rows, options.skip_bad)
    notes = [f"{len(dropped)} bad rows dropped, the first {dropped[0]}"] if dropped else []
    rows, said = resolve_repeats(rows, options.repeats)
    wanted = wanted_laws(options)
    fits = planned(rows, wanted, options)
    notes += said + mixtures(rows)
    try:
        os.makedirs(options.out, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={options.out}: cannot be a directory: {error.strerror}") from None
    systems = {tuple(system.items()) for system, _ in fits.values()}
    with progress(options.draws * len(systems), "bootstrap", "draw") as bar:
        entries, main_fit = analyse(rows, options, fits, bar)
    notes += unidentified_note(entries) + scope_notes(entries)
    sizes, profiles = at_each_N(rows, options) if not wanted else ({}, {})
    if main_fit:
        profiles = {"all N": profile_E(main_fit, "upcycled")} | profiles
    profiles = {title: profile for title, profile in profiles.items() if profile}
    lines = sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
    out = {"version": 2, "laws": entries, "intervals": INTERVALS, "at_each_N": sizes, "ranges": ranges(rows),
           "origin": origin(rows), "models": models(rows),
           "claims": claims(rows, options) if not wanted else {},
           "data_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(), "git": code_version()}
    report.write(rows, out, profiles, notes, options.out)
    path = os.path.join(options.out, "laws.json")
    write_text_atomically(path, json.dumps(out, allow_nan=False))
    best = min((law for law in RIVALS if law in entries), key=lambda law: entries[law]["aicc"], default="")
    shown = {law: entry for law, entry in entries.items() if wanted or law in (*FAMILIES, best)}
    for block in (report.comparison_table(entries), report.single_size_table(sizes),
                  report.parameter_table(shown), report.methods_table(report.method_differences(rows)),
                  report.findings(rows, out), [f"warning: {note}" for note in notes]):
        print("\n".join(block) + "\n" * bool(block))
    print(f"{path}, report.md and figures written")


if __name__ == "__main__":
    run(main, Options)
