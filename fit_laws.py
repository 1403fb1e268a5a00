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
from configurator import REQUIRED, ConfigError, code_version, progress, run, setting
from laws import LAWS, RIVALS, fit, missing, parameter_names
from rows import FAMILIES, read_rows
from uncertainty import (INTERVALS, aicc, bootstrap, extrapolate, leave_trunk_out, profile_E, standard_errors,
                         trunk_of, unidentified, variances)


@dataclass
class Options:
    """Fit dense, MoE and upcycled scaling laws and their rivals to rows of finished runs; write laws.json,
    report.md and figures."""
    rows: list[str] = setting(
        REQUIRED, "JSONL files of rows, or CSV files with columns family,N,D,D1,D2,loss", positional=True)
    out: str = setting("out/laws", "directory for laws.json, report.md and the figures")
    laws: str = setting("", "laws to fit, comma-separated; empty: all that the rows allow")
    share: str = setting(
        "E", "parameters that the laws of the families share, comma-separated; none: nothing")
    delta: Literal["auto"] | float = setting(
        "auto", "Huber's delta on log residuals; auto: 1.345 robust standard deviations")
    draws: int = setting(1000, "bootstrap draws", least=20)
    seed: int = setting(0, "seed of the bootstrap", least=0)
    skip_bad: bool = setting(False, "drop bad rows and count them, instead of stopping at the first")


# ---------------------------------------------------------------------------------------------------------
# Which laws, on which rows

def rows_at_most_common_data(rows):
    """The rows whose (D, D1, D2) occurs most often."""
    data = [tuple(row.get(name) for name in ("D", "D1", "D2")) for row in rows]
    common = Counter(data).most_common(1)[0][0] if rows else None
    return [row for row, tokens in zip(rows, data) if tokens == common]


def plan_fits(rows, wanted=()):
    """({law: (system, rows)} of what can be fitted, {law: what it lacks}). Dense, MoE and upcycled law are
    one system. Each rival takes the upcycled law's place in it, so that all of them explain the same rows."""
    fits, lacks = {}, {}
    base = {family: family for family in FAMILIES if not missing(rows, {family: family})}
    for law in wanted or LAWS:
        family, _, kind = law.partition(".")
        if law in FAMILIES:
            system = base | {law: law}
        elif law in RIVALS:
            system = base | {"upcycled": law} | ({"moe": law} if kind.endswith("shared") else {})
        else:
            system = {family: law}
        chosen = [row for row in rows if row["family"] in system]
        if kind in ("sparsity", "sparsity_additive"):  # laws at fixed data
            chosen = rows_at_most_common_data(chosen)
        lack = missing(chosen, {family: name for family, name in system.items() if name == law})
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
    """Parameters as JSON: arrays of draws with seven digits."""
    return {name: [float(f"{x:.7g}") for x in value] if np.ndim(value) else float(value)
            for name, value in params.items()}


def rms(values):
    """Root mean square; None of nothing."""
    values = np.asarray(values)
    return float(np.sqrt((values ** 2).mean())) if len(values) else None


def counted(errors):
    """{"rms", "rows"} of log errors on held-out rows; None where there are none."""
    return {"rms": rms(errors), "rows": len(errors)} if len(errors) else None


@dataclass
class Analysis:
    """A fitted system with what is known about its errors."""
    fit: object
    narrow: object          # the fit at Huber's delta 0.001
    theta: np.ndarray       # (draws, p) bootstrap
    left_out: np.ndarray    # (n,) log errors where the row's trunk was left out
    share: tuple


def analysed(rows, system, share, options, tick):
    """The Analysis of one system."""
    fitted = fit(rows, system, share, options.delta)
    theta = bootstrap(fitted, options.draws, options.seed, tick=tick)
    return Analysis(fitted, fit(rows, system, share, 1e-3), theta, leave_trunk_out(fitted), share)


def law_entry(law, system, analysis, held_out):
    """The entry of one law in laws.json."""
    fitted, theta = analysis.fit, analysis.theta
    problem = fitted.problem
    rows_of_law = np.array([system[row["family"]] == law for row in problem.rows])
    draws, trunks = fitted.params(law, theta), trunk_of(problem.rows)
    row, trunk, _, _ = variances(fitted, trunks)
    fixed = {name: why for name, (_, why) in problem.fixed[law].items()}
    entry = {
        "params": rounded(fitted.params(law)),
        "ci95": {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in draws.items()},
        "se_asymptotic": standard_errors(fitted, law),
        "n": int(rows_of_law.sum()), "rmse_log": rms(fitted.residual[rows_of_law]),
        "held_out": {"trunk": counted(analysis.left_out[rows_of_law & np.isfinite(analysis.left_out)])}
        | {name: found and counted(found[1]) for name, found in held_out.items()},
        "aicc": aicc(fitted), "n_with": len(fitted.residual), "fitted_with": system,
        "shared": sorted(set(analysis.share) & set(problem.names)),
        "not_identified": fixed | unidentified(fitted, law, theta),
        "huber_delta": fitted.delta, "params_at_delta_0.001": rounded(analysis.narrow.params(law)),
        "noise": {family: {"row": math.sqrt(row), "trunk": math.sqrt(trunk)} for family in system},
        "misfit": {},
        "draws": rounded(draws)}
    if law in RIVALS:  # the laws to compare it with are those of the same fit, draw by draw
        others = [other for other in dict.fromkeys(system.values()) if other != law]
        entry["beside"] = {other: {"params": rounded(fitted.params(other)),
                                   "draws": rounded(fitted.params(other, theta))} for other in others}
    return entry


def analyse(options, fits, bar):
    """({law: its entry in laws.json}, {law: what figures need}). Figures need the Fit, errors with trunks
    and with the largest levels left out, and the profile of E."""
    entries, details, cache = {}, {}, {}
    for law, (system, rows) in fits.items():
        key = tuple(system.items()) + (len(rows),)
        if key not in cache:
            share = shared_names(options) if set(system) & {"dense", "upcycled"} or law == "moe" else ()
            cache[key] = analysed(rows, system, share, options, bar.update)
        analysis = cache[key]
        variables = FAMILIES[law.partition(".")[0]] if law in FAMILIES or law in RIVALS else ()
        held_out = {name: extrapolate(rows, system, law, name, analysis.share, options.delta)
                    for name in variables}
        entries[law] = law_entry(law, system, analysis, held_out)
        details[law] = {"fit": analysis.fit, "left_out": analysis.left_out, "far": held_out,
                        "here": np.array([system[row["family"]] == law for row in analysis.fit.problem.rows]),
                        "profile": profile_E(analysis.fit, law) if law == "upcycled" else None}
    return entries, details


def at_each_N(rows, options):
    """({N: {law: {"params", "se_asymptotic", "n", "rmse_log", "held_out"}}}, {N: profile of E}) of
    the upcycled laws fitted to one size at a time. They hold with no assumption on how N enters."""
    found, profiles = {}, {}
    for n in sorted({row["N"] for row in rows if row["family"] == "upcycled"}):
        fits, _ = plan_fits([row for row in rows if row["N"] == n], RIVALS)
        for law, (system, chosen) in fits.items():
            fitted = fit(chosen, system, (), options.delta)
            rows_of_law = np.array([system[row["family"]] == law for row in fitted.problem.rows])
            left_out = leave_trunk_out(fitted)
            found.setdefault(f"{n:.6g}", {})[law] = {
                "params": rounded(fitted.params(law)), "se_asymptotic": standard_errors(fitted, law),
                "n": int(rows_of_law.sum()), "rmse_log": rms(fitted.residual[rows_of_law]),
                "held_out": {"trunk": counted(left_out[rows_of_law & np.isfinite(left_out)])}}
            if law == "upcycled":
                profiles[n] = profile_E(fitted, law)
    return found, profiles


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
    """Warnings, [text], where rows of one family come from different data, methods or numbers of experts."""
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


def write_json(path, content):
    """Write a JSON file whole: a temporary file beside it takes its name once it is on the disk."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(content, f, allow_nan=False)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def write_results(rows, out, details, profiles, notes, options):
    """Write report.md and the figures, then laws.json, whose presence says that all is done; print the
    summary."""
    entries = out["laws"]
    titled = {f"N = {report.short(n)} alone": profile for n, profile in profiles.items()}
    if "upcycled" in details and details["upcycled"]["profile"]:
        titled = {"all N": details["upcycled"]["profile"]} | titled
    report.write(rows, out, titled, notes, options.out)
    path = os.path.join(options.out, "laws.json")
    write_json(path, out)
    best = min((law for law in RIVALS if law in entries), key=lambda law: entries[law]["aicc"], default="")
    shown = {law: entry for law, entry in entries.items() if options.laws or law in (*FAMILIES, best)}
    for block in (report.comparison_table(entries), report.single_size_table(out["at_each_N"]),
                  report.parameter_table(shown), report.methods_table(report.method_differences(rows)),
                  report.findings(rows, out), [f"warning: {note}" for note in notes]):
        print("\n".join(block) + "\n" * bool(block))
    print(f"{path}, report.md and figures written")


def main(options):
    """Read rows, fit the laws, write the results."""
    rows, dropped = read_rows(options.rows, options.skip_bad)
    wanted = wanted_laws(options)
    fits = planned(rows, wanted, options)
    notes = [f"{len(dropped)} bad rows dropped, the first {dropped[0]}"] if dropped else []
    notes += mixtures(rows)
    try:
        os.makedirs(options.out, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={options.out}: cannot be a directory: {error.strerror}") from None
    systems = {tuple(system.items()) for system, _ in fits.values()}
    with progress(options.draws * len(systems), "bootstrap", "draw") as bar:
        entries, details = analyse(options, fits, bar)
    notes += unidentified_note(entries)
    sizes, profiles = at_each_N(rows, options) if not wanted else ({}, {})
    lines = sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)
    out = {"version": 1, "laws": entries, "intervals": INTERVALS, "at_each_N": sizes, "ranges": ranges(rows),
           "data_sha256": hashlib.sha256("".join(lines).encode()).hexdigest(), "git": code_version()}
    ratios = [row["N_active"] / row["N"] for row in rows if row["family"] != "dense" and "N_active" in row]
    if ratios:
        out["active_ratio"] = float(np.mean(ratios))
    write_results(rows, out, details, profiles, notes, options)


if __name__ == "__main__":
    run(main, Options)
