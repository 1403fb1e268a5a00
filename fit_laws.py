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
from laws import LAWS, RIVALS, descend, evaluate, fit, grid_starts, missing, n_levels, parameter_names, predict, variable
from rows import FAMILIES, read_rows

INTERVALS = ("parametric bootstrap: fitted losses with redrawn row noise and a random effect per trunk, variances estimated by REML; runs "
             "upcycled from one dense trunk at different D1 count as trunks of their own, so with one seed that trunk's own noise is not in the intervals")

# ---------------------------------------------------------------------------------------------------------
# Uncertainty: runs that share a trunk share its luck

def trunk_of(rows):
    """(n,) trunk number of each row; a row that names no trunk is its own."""
    names = [(row["family"], str(row["trunk"])) if "trunk" in row else i for i, row in enumerate(rows)]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([place[name] for name in names])


def variances(fit, trunks):
    """(row variance, trunk variance, their degrees of freedom) of ln loss, given each row's trunk (n,).

    By restricted maximum likelihood (REML): what is left of the residuals when the fitted parameters are projected out, as row
    noise plus one random effect a trunk. Directions of trunk effects that the law all but absorbs are left out: there its
    misfit would pass for them.
    """
    jacobian = evaluate(fit.problem, fit.theta[None])[1][0]
    _, size, basis = np.linalg.svd(jacobian / (np.linalg.norm(jacobian, axis=1, keepdims=True) + 1e-300))
    rest = basis[(size > 1e-9 * size[0]).sum():]  # (n - p, n) orthonormal
    effects = rest @ (trunks[:, None] == np.arange(trunks.max() + 1))
    visible, directions = np.linalg.eigh(effects @ effects.T)
    power = (directions.T @ (rest @ fit.residual)) ** 2 + 1e-30
    visible = np.where(visible > 1.0, visible, 0.0)
    if not len(power) or len(set(trunks)) == len(trunks):
        return power.mean() if len(power) else 0.0, 0.0, max(len(power), 1), 1
    ratio = np.array([0.0, *np.geomspace(1e-3, 1e3, 121)])[:, None]
    spread = 1.0 + ratio * visible
    row = (power / spread).mean(axis=1)
    best = np.argmin(np.log(spread).sum(axis=1) + len(power) * np.log(row))
    return row[best], row[best] * ratio[best, 0], len(power), max((visible > 0).sum(), 1)


def second_start(fit):
    """(p,) the best start of the grid, for refits: the estimate itself may sit on a bound, a term that vanished, that a refit can leave."""
    starts = grid_starts(fit.problem)
    return starts[np.argmin(descend(fit.problem, starts, fit.delta, max_steps=20, tolerance=1e-5)[1])]


def bootstrap(fit, draws=1000, seed=0, by_trunk=True, tick=lambda n: None):
    """Parameters refitted to redrawn losses, (draws, p) centred: fitted losses times row noise times one random effect a trunk.

    Redrawing whole trunks with replacement loses whole levels of N when a size has one trunk, and weighting trunks or flipping
    their signs cannot see how much that one trunk may be off. This bootstrap learns the trunk variance where levels do
    have company (REML over all families) and gives it to all; both variances are drawn from their chi-squared posterior.
    In simulations of quick studies (12 trunks) and larger ones (48) its 95 % intervals covered 94 % and 96 % of the true values;
    resampled trunks 78 % and 96 %, exponential trunk weights 63 % and 90 %, the wild cluster bootstrap (CR3) 79 % and 93 %.
    """
    problem, random = fit.problem, np.random.default_rng(seed)
    trunks = trunk_of(problem.rows) if by_trunk else np.arange(len(problem.rows))
    row, trunk, row_df, trunk_df = variances(fit, trunks)
    start = second_start(fit)
    found = []
    for first in range(0, draws, 100):
        count = min(100, draws - first)
        noise = np.sqrt(row * row_df / random.chisquare(row_df, (count, 1))) * random.standard_normal((count, len(trunks)))
        effect = np.sqrt(trunk * trunk_df / random.chisquare(trunk_df, (count, 1))) * random.standard_normal((count, trunks.max() + 1))
        y = problem.y - fit.residual + noise + effect[:, trunks]
        theta, cost = descend(problem, np.tile(fit.theta, (count, 1)), fit.delta, y, tolerance=1e-7, max_steps=100)
        other, other_cost = descend(problem, np.tile(start, (count, 1)), fit.delta, y, tolerance=1e-7, max_steps=100)
        found.append(np.where((other_cost < cost)[:, None], other, theta))
        tick(count)
    return np.concatenate(found)


def covariance(jacobian, trunks, row, trunk):
    """(p, p) of least-squares parameters from the Jacobian (p, n), to first order, under row noise and a random effect a trunk."""
    scale = np.linalg.norm(jacobian, axis=1) + 1e-12
    inverse = np.linalg.pinv((jacobian / scale[:, None]) @ (jacobian / scale[:, None]).T, rcond=1e-12, hermitian=True) / np.outer(scale, scale)
    sums = np.stack([jacobian[:, trunks == t].sum(axis=1) for t in np.unique(trunks)], axis=1)
    return inverse @ (row * jacobian @ jacobian.T + trunk * sums @ sums.T) @ inverse


def standard_errors(fit, law):
    """{parameter: asymptotic standard error} of a law of the fit."""
    problem = fit.problem
    trunks = trunk_of(problem.rows)
    row, trunk, _, _ = variances(fit, trunks)
    cov = problem.to_raw @ covariance(evaluate(problem, fit.theta[None])[1][0], trunks, row, trunk) @ problem.to_raw.T
    error = np.sqrt(np.maximum(np.diag(cov), 0.0))
    names = [name.rpartition(":") for name in problem.names]
    params = fit.params(law)
    mine = {name: error[j] * (params[name] if problem.is_log[j] else 1.0) for j, (owner, _, name) in enumerate(names) if owner in ("", law)}
    return {name: float(mine.get(name, 0.0)) for name in params}


# ---------------------------------------------------------------------------------------------------------
# Truth tests

def leave_trunk_out(fit):
    """(n,) ln measured - ln predicted by fits that never saw the row's trunk; nan where leaving it out loses a level of N."""
    problem, trunks = fit.problem, trunk_of(fit.problem.rows)
    numbers = []
    for number in np.unique(trunks):
        kept = [row for row, t in zip(problem.rows, trunks) if t != number]
        if not missing(kept, problem.system) and n_levels(kept, problem.system) == n_levels(problem.rows, problem.system):
            numbers.append(number)
    error = np.full(len(trunks), np.nan)
    if numbers:
        weights = (trunks != np.array(numbers)[:, None]).astype(float)
        best, cost = descend(problem, np.tile(fit.theta, (len(numbers), 1)), fit.delta, weights=weights)
        other, other_cost = descend(problem, np.tile(second_start(fit), (len(numbers), 1)), fit.delta, weights=weights)
        best = np.where((other_cost < cost)[:, None], other, best)
        predicted = evaluate(problem, best)[0]
        for k, number in enumerate(numbers):
            error[trunks == number] = (problem.y - predicted[k])[trunks == number]
    return error


def extrapolate(rows, system, law, name, share, delta):
    """Held-out rows of the law at the largest level of variable `name`, and ln measured - ln predicted by a fit without that
    level (for N: without it in any family). None where too little is left to fit."""
    families = [family for family, its in system.items() if its == law]
    family = "upcycled" if "upcycled" in families else families[-1]
    top = max(variable(row, name) for row in rows if row["family"] == family)
    held = [row for row in rows if row["family"] == family and row[name] == top]
    kept = [row for row in rows if not ((row["family"] == family or name == "N") and row.get(name, 0) >= top)]
    if missing(kept, system) or name == "N" and min(n_levels(kept, system)) < 2:
        return None
    params = fit(kept, system, share, delta).params(law)
    return held, np.log([row["loss"] for row in held]) - np.log([predict(law, params, **{v: row[v] for v in FAMILIES[family]}) for row in held])


def profile_E(fit, law):
    """E held on a grid, all else refitted: {"E", "alpha3", "objective" (above its minimum, relative): lists, "fit": [E, alpha3],
    "inside": the relative objective of E's 95 % likelihood interval}; None where the fit has no E of its own."""
    problem = fit.problem
    place = [j for j, name in enumerate(problem.names) if name in ("E", f"{law}:E")]
    if not place:
        return None
    values = np.linspace(0.02, 0.98, 33) * math.exp(problem.y.min())
    theta = np.tile(fit.theta, (len(values), 1))
    theta[:, place[0]] = np.log(values)
    theta, cost = descend(problem, theta, fit.delta, free=np.arange(theta.shape[1]) != place[0])
    params = fit.params(law)
    return {"E": values.tolist(), "alpha3": fit.params(law, theta)["alpha3"].tolist(), "objective": (cost / max(fit.cost, 1e-300) - 1).tolist(),
            "fit": [float(params["E"]), float(params["alpha3"])], "inside": 3.84 / max(len(fit.residual) - len(fit.theta), 1)}


def aicc(fit):
    """Akaike's criterion with its small-sample correction, Gaussian in ln loss, over all rows of the system, more than p + 2."""
    n, k = len(fit.residual), len(fit.theta) + 1
    return n * math.log((fit.residual ** 2).mean() + 1e-300) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


# ---------------------------------------------------------------------------------------------------------
# The command

@dataclass
class Options:
    """Fit dense, MoE and upcycled scaling laws and their rivals to rows of finished runs; write laws.json, report.md and figures."""
    rows: list[str] = setting(REQUIRED, "JSONL files of rows, or CSV files with columns family,N,D,D1,D2,loss", positional=True)
    out: str = setting("out/laws", "directory for laws.json, report.md and the figures")
    laws: str = setting("", "laws to fit, comma-separated; empty: all that the rows allow")
    share: str = setting("E", "parameters that dense, MoE and upcycled laws have in common, comma-separated; none: nothing")
    delta: Literal["auto"] | float = setting("auto", "Huber's delta on log residuals; auto: 1.345 robust standard deviations")
    draws: int = setting(1000, "bootstrap draws", least=20)
    seed: int = setting(0, "seed of the bootstrap", least=0)
    skip_bad: bool = setting(False, "drop bad rows and count them, instead of stopping at the first")


def plan_fits(rows, wanted=()):
    """({law: (system, rows)} of what can be fitted, {law: what it lacks}). Dense, MoE and upcycled law are one system; each
    rival takes the upcycled law's place in it, so that all of them explain the same rows."""
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
        mine = [row for row in rows if row["family"] in system]
        if "sparsity" in kind and "optimal" not in kind and mine:  # at fixed data: where most rows are
            data = Counter(tuple(row.get(v) for v in ("D", "D1", "D2")) for row in mine).most_common(1)[0][0]
            mine = [row for row in mine if tuple(row.get(v) for v in ("D", "D1", "D2")) == data]
        lack = missing(mine, {f: l for f, l in system.items() if l == law})
        if lack:
            lacks[law] = "; ".join(lack)
        else:
            fits[law] = (system, mine)
    return fits, lacks


def shared_names(options):
    return tuple(name for name in map(str.strip, options.share.split(",")) if name not in ("", "none"))


def rounded(params):
    return {k: [float(f"{x:.7g}") for x in v] if np.ndim(v) else float(v) for k, v in params.items()}


def rms(values):
    values = np.asarray(values)
    return float(np.sqrt((values ** 2).mean())) if len(values) else None


def counted(errors):
    """{"rms", "rows"} of held-out errors of ln loss; None where there are none."""
    return {"rms": rms(errors), "rows": len(errors)} if len(errors) else None


def analyse(rows, options, fits, bar):
    """{law: its entry in laws.json} and {law: what figures need: its Fit, left-out errors, extrapolations, profile of E}."""
    share = shared_names(options)
    entries, details, cache = {}, {}, {}
    for law, (system, mine) in fits.items():
        key = tuple(system.items()) + (len(mine),)
        if key not in cache:
            its = share if set(system) & {"dense", "upcycled"} or law == "moe" else ()
            f = fit(mine, system, its, options.delta)
            cache[key] = (f, fit(mine, system, its, 1e-3), bootstrap(f, options.draws, options.seed, tick=bar.update), leave_trunk_out(f), its)
        f, narrow, theta, left_out, its = cache[key]
        here = np.array([system[row["family"]] == law for row in f.problem.rows])
        draws, params = f.params(law, theta), f.params(law)
        variables = FAMILIES[law.partition(".")[0]] if law in FAMILIES or law in RIVALS else ()
        far = {name: extrapolate(mine, system, law, name, its, options.delta) for name in variables}
        row, trunk, _, trunk_df = variances(f, trunk_of(f.problem.rows))
        entries[law] = {
            "params": rounded(params),
            "ci95": {k: np.quantile(v, [0.025, 0.975]).tolist() for k, v in draws.items()},
            "se_asymptotic": standard_errors(f, law), "n": int(here.sum()), "rmse_log": rms(f.residual[here]),
            "held_out": {"trunk": counted(left_out[here & np.isfinite(left_out)])} | {k: v and counted(v[1]) for k, v in far.items()},
            "noise": {family: {"row": math.sqrt(row), "trunk": math.sqrt(trunk)} for family in system}, "misfit": {},
            "aicc": aicc(f), "n_with": len(f.residual), "fitted_with": system, "shared": sorted(set(its) & {name for name in f.problem.names}),
            "not_identified": {k: why for k, (_, why) in f.problem.fixed[law].items()} | unidentified(f, law, theta),
            "huber_delta": f.delta, "params_at_delta_0.001": rounded(narrow.params(law)),
            "draws": rounded(draws)}
        if law in RIVALS:  # compare it with these: of the same fit, draw by draw
            entries[law]["beside"] = {other: {"params": rounded(f.params(other)), "draws": rounded(f.params(other, theta))}
                                      for other in dict.fromkeys(system.values()) if other != law}
        if "alpha3" in draws:
            below = int((draws["alpha3"] <= 0).sum())
            entries[law]["alpha3_p"] = min(1.0, 2 * (min(below, options.draws - below) + 1) / (options.draws + 1))
        details[law] = {"fit": f, "here": here, "left_out": left_out, "far": far,
                        "profile": profile_E(f, law) if law == "upcycled" else None}
    return entries, details


def at_each_N(rows, options):
    """{N: {law: {"params", "se_asymptotic", "n", "rmse_log", "leave_trunk_out"}}} of the upcycled laws fitted to one size at a time,
    and {N: profile of E}: what holds with no assumption on how N enters."""
    found, profiles = {}, {}
    for n in sorted({row["N"] for row in rows if row["family"] == "upcycled"}):
        fits, _ = plan_fits([row for row in rows if row["N"] == n], RIVALS)
        for law, (system, mine) in fits.items():
            f = fit(mine, system, (), options.delta)
            here, left_out = np.array([system[row["family"]] == law for row in f.problem.rows]), leave_trunk_out(f)
            found.setdefault(f"{n:.6g}", {})[law] = {
                "params": rounded(f.params(law)), "se_asymptotic": standard_errors(f, law), "n": int(here.sum()),
                "rmse_log": rms(f.residual[here]), "held_out": {"trunk": counted(left_out[here & np.isfinite(left_out)])}}
            if law == "upcycled":
                profiles[n] = profile_E(f, law)
    return found, profiles


def unidentified(fit, law, theta):
    """{parameter: why} where the fit or an end of its interval (theta: draws) sits on a bound, or an exponent's sign or a
    coefficient's size is open."""
    problem, why, draws = fit.problem, {}, fit.params(law, theta)
    low, high = np.quantile(theta, [0.025, 0.975], axis=0)
    bound = (np.minimum(fit.theta, low) <= problem.low) | (np.maximum(fit.theta, high) >= problem.high)
    at_bound = {name.rpartition(":")[2] for name, its in zip(problem.names, bound) if its and name.rpartition(":")[0] in ("", law)}
    for name, values in draws.items():
        low, high = np.quantile(values, [0.025, 0.975])
        if name in problem.fixed[law]:
            continue
        if name in at_bound:
            why[name] = "not identified: it or its interval at a bound of the fit"
        elif low > 0 and high > 100 * low:
            why[name] = "not identified: its interval spans a factor of more than 100"
        elif low < 0 < high and name != "alpha3":
            why[name] = "not identified: its sign is open"
    return why


def ranges(rows):
    """{family: {variable: [smallest, largest]}}."""
    out = {}
    for family, names in FAMILIES.items():
        if mine := [row for row in rows if row["family"] == family]:
            out[family] = {name: [min(row[name] for row in mine), max(row[name] for row in mine)] for name in names}
    return out


def mixtures(rows):
    """Warnings, [text], where rows of one family come from different data, methods or numbers of experts."""
    found = []
    for family in FAMILIES:
        for key in ("data_sha256", "method", "num_local_experts", "num_experts_per_tok"):
            values = {f"{row[key]:g}" if isinstance(row[key], float) else ascii(row[key]).strip("'") for row in rows if row["family"] == family and key in row}
            if len(values) > 1:
                found.append(f"{family} rows mix {len(values)} values of {key} ({', '.join(sorted(v[:12] for v in values))}); the laws take them as one")
    return found


def main(options):
    rows, dropped = read_rows(options.rows, options.skip_bad)
    wanted = [name.strip() for name in options.laws.split(",") if name.strip()]
    for name in wanted:
        if name not in LAWS:
            raise ConfigError(f"--laws: no law '{name}'; there are {', '.join(LAWS)}")
    if options.delta != "auto" and options.delta <= 0:
        raise ConfigError(f"--delta={options.delta:g} is not positive; auto, or a size of log residuals such as 0.001")
    for name in shared_names(options):
        if name not in parameter_names("dense"):
            raise ConfigError(f"--share: '{name}' is none of {', '.join(parameter_names('dense'))}")
    fits, lacks = plan_fits(rows, wanted)
    if wanted and lacks:
        raise ConfigError("--laws: " + "; ".join(f"{law} {lack}" for law, lack in lacks.items()))
    for lack in dict.fromkeys(lacks.values()):
        print(f"skipped {', '.join(law for law in lacks if lacks[law] == lack)}: {lack}")
    if not fits:
        raise ConfigError(f"{', '.join(options.rows)}: no law can be fitted to these {len(rows)} rows")
    notes = [f"{len(dropped)} bad rows dropped, the first {dropped[0]}"] if dropped else []
    notes += mixtures(rows)
    try:
        os.makedirs(options.out, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={options.out}: cannot be a directory: {error.strerror}") from None
    systems = {tuple(system.items()) for system, _ in fits.values()}
    with progress(options.draws * len(systems), "bootstrap", "draw") as bar:
        entries, details = analyse(rows, options, fits, bar)
    unclear = {law: [k for k, why in e["not_identified"].items() if why.endswith(("bound of the fit", "sign is open"))] for law, e in entries.items()}
    if said := [f"{law} ({', '.join(names)})" for law, names in unclear.items() if names]:
        notes.append("these rows do not identify " + ", ".join(said) + "; outside the data those laws say little")
    sizes, profiles = at_each_N(rows, options) if not wanted else ({}, {})
    content = hashlib.sha256("".join(sorted(json.dumps(row, sort_keys=True, default=str) for row in rows)).encode()).hexdigest()
    out = {"version": 1, "laws": entries, "intervals": INTERVALS, "at_each_N": sizes, "ranges": ranges(rows), "data_sha256": content, "git": code_version()}
    if ratios := [row["N_active"] / row["N"] for row in rows if row["family"] != "dense" and "N_active" in row]:
        out["active_ratio"] = float(np.mean(ratios))
    with open(os.path.join(options.out, "laws.json"), "w", encoding="utf-8") as f:
        json.dump(out, f, allow_nan=False)
    shown = {f"N = {report.short(n)} alone": profile for n, profile in profiles.items()}
    if "upcycled" in details and details["upcycled"]["profile"]:
        shown = {"all N": details["upcycled"]["profile"]} | shown
    report.write(rows, out, shown, notes, options.out)
    for lines in (report.comparison_table(entries), report.single_size_table(sizes), report.parameter_table(entries),
                  report.methods_table(report.method_differences(rows)), report.findings(rows, out), [f"warning: {note}" for note in notes]):
        print("\n".join(lines) + "\n" * bool(lines))
    print(f"{os.path.join(options.out, 'laws.json')}, report.md and figures written")


if __name__ == "__main__":
    run(main, Options)
