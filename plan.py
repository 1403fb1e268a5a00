"""Laws and your numbers -> upcycle, train the MoE from scratch, or continue the dense model, with error bars.

    python plan.py --laws=laws/liew2025.json --N=1e9 --D1=1e11 --tokens=5e10     a dense checkpoint is there: what now?
    python plan.py --laws=laws/liew2025.json --N=1e9 --flops=1e21 --fresh        nothing is there: how to split the budget?
    python plan.py --laws=out/laws/laws.json --design=config/study_quick.py      what will this study find?

N and tokens are raw counts. A dense token costs 6 N FLOPs, a token of the MoE 6 N_active, attention and head left out.
"""
import dataclasses
import json
import math
import os
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from configurator import ConfigError, parse, run, setting
from fit_laws import FAMILIES, RIVALS, covariance, evaluate, fit, parameter_names, predict, trunk_of

DENSE, UPCYCLE, SCRATCH = "continue the dense model", "upcycle", "MoE from scratch"
ONLY_DENSE, BOTH = "dense", "dense, then upcycle"  # with SCRATCH the routes from nothing
INTERVAL = [0.05, 0.95]


@dataclass
class Options:
    """Compare upcycling a dense model, training the MoE from scratch and continuing dense training, at equal FLOPs from now on."""
    laws: str = setting("laws/liew2025.json", "laws.json of fit_laws.py, or published laws")
    law: str = setting("", "upcycled law to plan by; empty: the one that best predicts the held-out largest D2, else the interaction law")
    checkpoint: str = setting("", "dense checkpoint directory, for N and D1")
    N: float = setting(0.0, "non-embedding parameters of the dense model, a raw count")
    D1: float = setting(0.0, "tokens it has seen, a raw count")
    tokens: float = setting(0.0, "budget as tokens of MoE training")
    flops: float = setting(0.0, "budget in training FLOPs")
    gpu_hours: float = setting(0.0, "budget in GPU hours, with flops_per_gpu and mfu")
    flops_per_gpu: float = setting(0.0, "peak FLOP/s of a GPU")
    mfu: float = setting(0.4, "share of the peak that training uses")
    num_local_experts: int = setting(8, "experts of the MoE (the laws hold for the MoE they were fitted on)")
    num_experts_per_tok: int = setting(2, "experts a token uses")
    mlp_share: float = setting(2 / 3, "share of N in the MLPs; Llama with intermediate size 8/3 of hidden has 2/3")
    active_ratio: float = setting(0.0, "N_active / N; 0: the checkpoint's, the laws file's, or 1 + mlp_share (num_experts_per_tok - 1)")
    fresh: bool = setting(False, "plan from nothing: the best split of the budget; with no N, the best N too")
    design: str = setting("", "study file: what would it find, were these laws true")
    noise: float = setting(0.005, "design: standard deviation of ln loss between runs")
    trunk_noise: float = setting(0.003, "design: standard deviation of ln loss that runs of a trunk share")
    figure: str = setting("out/plan.png", "where the figure goes, a PDF beside it; empty: none")
    json: bool = setting(False, "print JSON")


# ---------------------------------------------------------------------------------------------------------
# Laws with draws

def read_laws(path, draws=1000, seed=0):
    """{law: {"params", "draws": {name: array}, ...}} and the rest of a laws file. Raises ConfigError.

    A law with no draws gets uniform ones over the rounding of its digits where the file gives it, parameters it shares drawn once.
    """
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        if content["version"] != 1:
            raise ConfigError(f"{path}: version {content['version']!r} is not 1")
        random, common = np.random.default_rng(seed), {}
        laws = {}
        for law, entry in content["laws"].items():
            params = {name: float(entry["params"][name]) for name in parameter_names(law)}
            if "draws" in entry:
                its = {name: np.array(entry["draws"][name], float) for name in params}
            else:
                its = {}
                for name, value in params.items():
                    shift = common.get(name) if name in entry.get("shared", ()) else None
                    shift = random.uniform(-1, 1, draws) if shift is None else shift
                    if name in entry.get("shared", ()):
                        common[name] = shift
                    its[name] = value + entry.get("rounding", {}).get(name, 0.0) * shift
            laws[law] = entry | {"params": params, "draws": its}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a laws file ({type(error).__name__}: {error})") from None
    if not laws:
        raise ConfigError(f"{path}: holds no laws")
    count = min(len(next(iter(entry["draws"].values()))) for entry in laws.values())
    for entry in laws.values():
        entry["draws"] = {name: values[:count] for name, values in entry["draws"].items()}
    return laws, content


def choose_law(laws, wanted=""):
    """The upcycled law to plan by, and why."""
    there = [law for law in RIVALS if law in laws]
    if wanted and wanted not in there:
        raise ConfigError(f"--law: '{wanted}' is not in the laws file, which has {', '.join(there) or 'no upcycled law'}")
    if wanted:
        return wanted, "as asked"
    if not there:
        raise ConfigError("the laws file has no upcycled law")
    errors = {law: (laws[law].get("extrapolation") or {}).get("D2") for law in there}
    if all(error is None for error in errors.values()):
        return there[0], "the laws file has no held-out errors to choose by"
    best = min((law for law in there if errors[law] is not None), key=errors.get)
    return best, f"it best predicts the held-out largest D2, to {100 * errors[best]:.2f} %"


def both(laws, law, **variables):
    """(loss by the estimate, loss by each draw) of a law; the variables broadcast, draws first."""
    at_draws = {name: values.reshape(-1, *[1] * max(np.ndim(v) for v in variables.values())) for name, values in laws[law]["draws"].items()}
    return predict(law, laws[law]["params"], **variables), predict(law, at_draws, **variables)


def scratch(laws, law, **variables):
    """Loss of the MoE from scratch beside an upcycled law: by that law itself with D1 = 0 where it covers both."""
    if law.endswith("_shared"):
        return both(laws, law, N=variables["N"], D1=0.0, D2=variables["D"])
    return both(laws, "moe", **variables) if "moe" in laws else None


# ---------------------------------------------------------------------------------------------------------
# Crossings

def crossings(x, difference):
    """[(x of the root, sign of the slope)] of a curve on a grid, by linear interpolation in ln x; curves that merge do not cross."""
    sign = np.sign(difference) * (np.abs(difference) > 1e-9)
    at = np.flatnonzero(sign[:-1] * sign[1:] < 0)
    lx = np.log(x)
    return [(float(np.exp(lx[i] - difference[i] * (lx[i + 1] - lx[i]) / (difference[i + 1] - difference[i]))),
             int(np.sign(difference[i + 1] - difference[i]))) for i in at]


def overtaking(laws, law, N, D1, points=800):
    """Where a MoE from scratch overtakes the upcycled one, at equal tokens (and FLOPs) after the dense checkpoint.

    {"D2_star": tokens or None, "interval": 90 % (None: never), "never": share of draws without it, "regained": the second
    root, where the upcycled model leads again, or None}. None where there is no law for the MoE from scratch.
    """
    x = np.geomspace(D1 * 1e-6, D1 * 1e9, points)
    from_scratch = scratch(laws, law, N=N, D=x)
    if from_scratch is None:
        return None
    upcycled = both(laws, law, N=N, D1=D1, D2=x)

    def first(difference):  # the one where from scratch becomes better
        return next((root for root, slope in crossings(x, difference) if slope < 0), math.inf)

    roots = crossings(x, from_scratch[0] - upcycled[0])
    star = next((root for root, slope in roots if slope < 0), None)
    regained = next((root for root, slope in roots if slope > 0 and root > (star or math.inf)), None)
    drawn = np.array([first(d) for d in from_scratch[1] - upcycled[1]])
    interval = [v if math.isfinite(v) else None for v in np.quantile(drawn, INTERVAL, method="inverted_cdf")]
    return {"D2_star": star, "interval": interval, "never": float(np.isinf(drawn).mean()), "regained": regained}


def worse_than_start(laws, law, N, D1):
    """D2 below which the law puts the upcycled model above its own dense start, where the law cannot hold; None if nowhere."""
    if "dense" not in laws:
        return None
    x = np.geomspace(D1 * 1e-6, D1 * 1e3, 2000)
    worse = predict(law, laws[law]["params"], N=N, D1=D1, D2=x) > predict("dense", laws["dense"]["params"], N=N, D=D1)
    return float(x[np.flatnonzero(worse)[-1]]) if worse.any() else None


# ---------------------------------------------------------------------------------------------------------
# Now: a dense checkpoint is there

def losses_now(laws, law, N, D1, flops, ratio):
    """{option: {"tokens", "loss", "interval", "probability_best"}} at equal training FLOPs from now on."""
    dense, moe = flops / (6 * N), flops / (6 * N * ratio)
    options = {UPCYCLE: ({"tokens": moe}, both(laws, law, N=N, D1=D1, D2=moe))}
    if "dense" in laws:
        options[DENSE] = {"tokens": dense}, both(laws, "dense", N=N, D=D1 + dense)
    if (from_scratch := scratch(laws, law, N=N, D=moe)) is not None:
        options[SCRATCH] = {"tokens": moe}, from_scratch
    return summarise(options)


def summarise(options):
    """{option: (what it does {...}, (loss, draws))} -> each with its loss, interval and the probability that it is the best."""
    table = np.stack([loss[1] for _, loss in options.values()])
    wins = np.bincount(table.argmin(axis=0), minlength=len(table)) / table.shape[1]
    return {name: does | {"loss": float(loss), "interval": np.quantile(draws, INTERVAL).tolist(), "probability_best": float(win)}
            for (name, (does, (loss, draws))), win in zip(options.items(), wins)}


def outside(ranges, family, **values):
    """[text]: how far values lie outside the range that the family was fitted on."""
    said = []
    for name, value in values.items():
        if name not in ranges.get(family, {}):
            said.append(f"the fitted range of {name} ({family}) is not known")
            continue
        low, high = ranges[family][name]
        if not low <= value <= high:
            factor, side, edge = (value / high, "above the largest", high) if value > high else (low / value, "below the smallest", low)
            said.append(f"{name} = {value:.3g} is {factor:.3g} times {side} fitted ({family}: {edge:.3g})")
    return said


def plan_now(laws, content, law, N, D1, flops, ratio):
    options = losses_now(laws, law, N, D1, flops, ratio)
    best = max(options, key=lambda name: options[name]["probability_best"])
    tokens = options[UPCYCLE]["tokens"]
    ranges = content.get("ranges", {})
    warnings = outside(ranges, "upcycled", N=N, D1=D1, D2=tokens)
    warnings += outside(ranges, "dense", D=D1 + options[DENSE]["tokens"]) if DENSE in options else ["no dense law: continuing is left out"]
    warnings += outside(ranges, "moe", D=tokens) if SCRATCH in options else ["no MoE law: from scratch is left out"]
    floor = worse_than_start(laws, law, N, D1)
    if floor and tokens < floor:
        warnings.insert(0, f"below D2 = {floor:.3g} this law puts the upcycled model above its own dense start: it does not hold there, "
                           "upcycling is better than it says")
    others = {}
    for other in (name for name in RIVALS if name in laws):
        its = losses_now(laws, other, N, D1, flops, ratio)
        others[other] = {"best": max(its, key=lambda name: its[name]["probability_best"]), "upcycled_loss": its[UPCYCLE]["loss"],
                         "probability_upcycle_best": its[UPCYCLE]["probability_best"], "overtaking": overtaking(laws, other, N, D1)}
    worth = {}
    for other in (name for name in RIVALS if "effective" in name and name in laws):
        draws, params = laws[other]["draws"], laws[other]["params"]
        worth[other] = {"tokens": float(params["c"] * D1 ** params["gamma"]), "interval": np.quantile(draws["c"] * D1 ** draws["gamma"], INTERVAL).tolist()}
    return {"N": N, "D1": D1, "flops": flops, "options": options, "best": best, "worse_than_start_below": floor, "laws": others,
            "worth": worth, "warnings": warnings}


# ---------------------------------------------------------------------------------------------------------
# Fresh: nothing is there

def best_split(law, params, flops, N, ratio):
    """(share of the FLOPs for dense training, loss) of the best D1, D2 with 6 N D1 + 6 N_active D2 = flops; params may be draws.

    With alpha3 = 0 the share is alpha1 / (alpha1 + alpha2).
    """
    def loss(logit, params):
        share = 1 / (1 + np.exp(-logit))
        return predict(law, params, N=N, D1=share * flops / (6 * N), D2=(1 - share) * flops / (6 * N * ratio))

    grid = np.linspace(-14, 14, 281)
    columns = {name: np.reshape(value, (-1, 1)) for name, value in params.items()}
    places = grid[loss(grid, columns).argmin(axis=1)]
    if np.ndim(params["E"]):
        return 1 / (1 + np.exp(-places)), loss(places, params)
    exact = minimize_scalar(loss, bounds=(places[0] - 0.2, places[0] + 0.2), args=(params,), method="bounded", options={"xatol": 1e-10})
    return 1 / (1 + math.exp(-exact.x)), float(exact.fun)


def best_N(loss, flops):
    """The N that minimises loss(N) for a budget: a grid over ln N, then Brent's method."""
    grid = np.linspace(math.log(1e3), math.log(flops / 6e3), 160)
    i = int(np.argmin([loss(math.exp(x)) for x in grid]))
    bounds = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
    found = minimize_scalar(lambda x: loss(math.exp(x)), bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x)


def plan_fresh(laws, content, law, N, flops, ratio):
    """The best of dense, MoE from scratch and dense-then-upcycled for a budget from nothing; N is optimised for each where it is 0."""
    routes = {}
    if "dense" in laws:
        n = N or best_N(lambda n: predict("dense", laws["dense"]["params"], N=n, D=flops / (6 * n)), flops)
        routes[ONLY_DENSE] = {"plan": {"N": n, "D": flops / (6 * n)}}, both(laws, "dense", N=n, D=flops / (6 * n))
    if scratch(laws, law, N=1.0, D=1.0) is not None:
        n = N or best_N(lambda n: scratch(laws, law, N=n, D=flops / (6 * n * ratio))[0], flops)
        routes[SCRATCH] = {"plan": {"N": n, "D": flops / (6 * n * ratio)}}, scratch(laws, law, N=n, D=flops / (6 * n * ratio))
    n = N or best_N(lambda n: best_split(law, laws[law]["params"], flops, n, ratio)[1], flops)
    share = best_split(law, laws[law]["params"], flops, n, ratio)[0]
    plan = {"N": n, "D1": share * flops / (6 * n), "D2": (1 - share) * flops / (6 * n * ratio), "dense_share_of_flops": share,
            "dense_share_interval": np.quantile(best_split(law, laws[law]["draws"], flops, n, ratio)[0], INTERVAL).tolist()}
    routes[BOTH] = {"plan": plan}, both(laws, law, N=n, D1=plan["D1"], D2=plan["D2"])
    options = summarise(routes)
    ranges = content.get("ranges", {})
    warnings = outside(ranges, "upcycled", **{name: plan[name] for name in ("N", "D1", "D2")})
    for name, family in ((ONLY_DENSE, "dense"), (SCRATCH, "moe")):
        warnings += outside(ranges, family, **routes[name][0]["plan"]) if name in routes else [f"no {family} law: {name} is left out"]
    return {"flops": flops, "options": options, "best": max(options, key=lambda name: options[name]["probability_best"]), "warnings": warnings}


# ---------------------------------------------------------------------------------------------------------
# Design: what a study will find

def expected(laws, rows, noise, trunk_noise, N, D1):
    """What least squares on planned rows (no losses yet) will find, were these laws true, to first order in the noise.

    {"rows", "trunks", "alpha3", "se_alpha3", "power" to reject alpha3 = 0 at 5 %, "D2_star" at N, D1 and the standard error
    of its logarithm, nan where there is none}.
    """
    system = {family: family for family in FAMILIES if family in laws and any(row["family"] == family for row in rows)}
    if "upcycled" not in system:
        raise ConfigError("--design needs an upcycled law in the laws file and upcycled runs in the study")
    rows = [row | {"loss": float(predict(row["family"], laws[row["family"]]["params"], **{v: row[v] for v in FAMILIES[row["family"]]}))}
            for row in rows if row["family"] in system]
    f = fit(rows, system)
    trunks = trunk_of(f.problem.rows)
    free = (f.theta > f.problem.low) & (f.theta < f.problem.high)  # a term that these laws do not have stays out
    cov = covariance(evaluate(f.problem, f.theta[None])[1][0] * free[:, None], trunks, noise ** 2, trunk_noise ** 2)
    place = f.problem.names.index("upcycled:alpha3")
    se, alpha3 = math.sqrt(cov[place, place]), f.params("upcycled")["alpha3"]

    def star(theta):
        at = {law: {"params": f.params(law, theta), "draws": {k: np.array([v]) for k, v in f.params(law, theta).items()}} for law in system}
        found = overtaking(at, "upcycled", N, D1, points=4000)
        return math.log(found["D2_star"]) if found and found["D2_star"] else math.nan

    slope = np.array([(star(f.theta + e) - star(f.theta - e)) / 2e-4 for e in 1e-4 * np.diag(free)])
    return {"rows": len(rows), "trunks": len(set(trunks)), "alpha3": float(alpha3), "se_alpha3": se,
            "power": float(norm.cdf(alpha3 / se - 1.96) + norm.cdf(-alpha3 / se - 1.96)),
            "D2_star": math.exp(star(f.theta)), "se_ln_D2_star": float(np.sqrt(slope @ cov @ slope))}


def longer(levels):
    """Levels with one more, as far again as the last two are apart."""
    return [*levels, int(levels[-1] * levels[-1] / levels[-2])] if len(levels) > 1 else [*levels, 4 * levels[-1]]


def variants(study):
    """{name: study}: the study and itself with one more level of each axis. A level of N doubles every width of the largest size."""
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    wider = {key: value * 2 if key in widths else value for key, value in study.sizes[-1].items()}
    changed = {"D1": {"D1": longer(sorted(study.D1))}, "D2": {"D2": longer(sorted(study.D2))}, "N": {"sizes": [*study.sizes, wider]}}
    return {"as it is": study} | {f"one more level of {name}": dataclasses.replace(study, **new) for name, new in changed.items()}


def plan_design(laws, options):
    from sweep import Study, planned_rows, study_totals  # they need torch

    study = parse(Study, [options.design])
    found = {}
    for name, variant in variants(study).items():
        rows, totals = planned_rows(variant), study_totals(variant)
        up = [row for row in rows if row["family"] == "upcycled"]
        N, D1 = options.N or max(row["N"] for row in up), options.D1 or max(row["D1"] for row in up)
        found[name] = expected(laws, rows, options.noise, options.trunk_noise, N, D1) | totals
        if options.flops_per_gpu:
            found[name]["hours"] = totals["flops"] / (options.flops_per_gpu * options.mfu * 3600)
    return found


# ---------------------------------------------------------------------------------------------------------
# The command

def inputs(options):
    """(N, D1, active ratio or 0) from the settings and the checkpoint. Raises ConfigError, with a hint on counts given in billions."""
    N, D1, ratio = options.N, options.D1, options.active_ratio
    if options.checkpoint:
        from checkpoint import read_config, read_state  # they need torch
        from model import parameter_counts

        config, state = read_config(options.checkpoint), read_state(options.checkpoint)
        if config.num_local_experts:
            raise ConfigError(f"{options.checkpoint}: is a mixture of experts already; give the dense checkpoint")
        N, D1 = N or parameter_counts(config)["N"], D1 or state.get("tokens", 0)
        if not D1:
            raise ConfigError(f"{options.checkpoint}: trainer_state.json does not say on how many tokens it was trained; give --D1=")
        moe = dataclasses.replace(config, num_local_experts=options.num_local_experts, num_experts_per_tok=options.num_experts_per_tok)
        ratio = ratio or parameter_counts(moe)["N_active"] / parameter_counts(config)["N"]
    for name, value in (("N", N), ("D1", D1), ("tokens", options.tokens), ("flops", options.flops), ("gpu_hours", options.gpu_hours)):
        if value < 0:
            raise ConfigError(f"--{name}={value:g} is negative")
    for name, value in (("N", N), ("D1", D1), ("tokens", options.tokens)):
        if 0 < value < 1000:
            raise ConfigError(f"--{name}={value:g} is a raw count here, not billions; did you mean --{name}={value:g}e9?")
    if 0 < options.flops < 1e6:
        raise ConfigError(f"--flops={options.flops:g} is a raw count of operations; a budget is more like 1e20")
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu={options.mfu:g} is a share of the peak, between 0 and 1")
    if not 0 <= options.mlp_share <= 1 or ratio < 0 or not 1 <= options.num_experts_per_tok <= options.num_local_experts:
        raise ConfigError("--mlp_share is a share, --active_ratio positive and --num_experts_per_tok at most --num_local_experts")
    return N, D1, ratio


def budget(options, N, ratio):
    """The budget in FLOPs. Raises ConfigError unless exactly one is given."""
    given = [name for name in ("tokens", "flops", "gpu_hours") if getattr(options, name)]
    if len(given) != 1:
        raise ConfigError(f"give one budget, --tokens=, --flops= or --gpu_hours= ({'got ' + ', '.join(given) if given else 'got none'})")
    if options.gpu_hours:
        if not options.flops_per_gpu:
            raise ConfigError("--gpu_hours needs --flops_per_gpu= (989e12 for an H100 in bf16) and --mfu=")
        return options.gpu_hours * 3600 * options.flops_per_gpu * options.mfu
    if options.tokens and not N:
        raise ConfigError("--tokens as a budget needs --N=; give --flops=")
    return options.flops or options.tokens * 6 * N * ratio


def rows_of(table):
    """Lines of cells, columns padded."""
    width = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip() for row in table]


def say_star(star):
    """D2* in words."""
    if star is None:
        return "no MoE law to compare with"
    low, high = ("never" if v is None else f"{v:.3g}" for v in star["interval"])
    never = f", never in {100 * star['never']:.1f} % of draws" if star["never"] else ""
    if star["D2_star"] is None:
        return f"never (90 % interval {low} .. {high}{never})"
    far = f"; a second root at {star['regained']:.3g} is an artefact of the formula far outside any data" if star["regained"] else ""
    return f"{star['D2_star']:.3g} tokens (90 % interval {low} .. {high}{never}){far}"


def say_loss(option):
    return f"{option['loss']:.4f}", "{:.4f} .. {:.4f}".format(*option["interval"]), f"{100 * option['probability_best']:.1f} %"


def say_now(result):
    options = result["options"]
    lines = rows_of([("option", "tokens", "loss", "90 % interval", "best in")] + [
        (name, f"{o['tokens']:.3g}", *say_loss(o)) for name, o in options.items()])
    best = result["best"]
    sure = options[best]["probability_best"]
    agree = [law for law, its in result["laws"].items() if its["best"] == best]
    second = min((name for name in options if name != best), key=lambda name: options[name]["loss"], default=None)
    word = "Clearly" if sure >= 0.95 else "Probably" if sure >= 0.8 else "A close call:"
    lead = f", {options[second]['loss'] - options[best]['loss']:+.4f} nats ahead of: {second}" if second else ""
    lines += ["", f"{word} {best}: best in {100 * sure:.0f} % of draws{lead}; {len(agree)} of {len(result['laws'])} upcycled laws agree."]
    lines += ["", "by each law: what is best, loss if upcycled, and D2*, where a MoE from scratch overtakes the upcycled one"]
    lines += rows_of([("law", "best", "loss", "D2*")] + [
        (law, its["best"], f"{its['upcycled_loss']:.4f}", say_star(its["overtaking"])) for law, its in result["laws"].items()])
    for law, its in result["worth"].items():
        low, high = its["interval"]
        lines.append(f"{law}: the dense checkpoint is worth {its['tokens']:.3g} tokens of MoE training (90 % interval {low:.3g} .. {high:.3g})")
    return lines


def say_fresh(result):
    def say(plan):
        return ", ".join(f"{name} {plan[name]:.3g}" for name in ("N", "D", "D1", "D2") if name in plan)
    options = result["options"]
    lines = rows_of([("route", "plan", "loss", "90 % interval", "best in")] + [
        (name, say(o["plan"]), *say_loss(o)) for name, o in options.items()])
    plan = options[BOTH]["plan"]
    share, low, high = (100 * v for v in (plan["dense_share_of_flops"], *plan["dense_share_interval"]))
    return lines + ["", f"Best: {result['best']}. Of an upcycled plan's FLOPs {share:.1f} % go to dense training (90 % interval {low:.1f} .. {high:.1f} %)."]


def say_design(found):
    def cell(value):
        return f"{value:.3g}" if math.isfinite(value) else "-"
    head = ("design", "rows", "trunks", "s.e. of alpha3", "power", "D2*", "s.e. of ln D2*", "tokens", "FLOPs", "hours")
    return rows_of([head] + [(name, str(e["rows"]), str(e["trunks"]), cell(e["se_alpha3"]), f"{100 * e['power']:.0f} %", cell(e["D2_star"]), cell(e["se_ln_D2_star"]),
                              cell(e["tokens"]), cell(e["flops"]), cell(e.get("hours", math.nan))) for name, e in found.items()])


def draw(curves, at, marks, path):
    """Loss against FLOPs: {option: function of FLOPs -> (loss, interval)} around the budget `at`; marks {text: FLOPs}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.6, 3.8), constrained_layout=True)
    x = np.geomspace(at / 30, at * 30, 41)
    for name, curve in curves.items():
        color = {UPCYCLE: "#3b6fb6", BOTH: "#3b6fb6", SCRATCH: "#222222"}.get(name, "#888888")
        loss, low, high = np.array([curve(v) for v in x]).T
        axis.plot(x, loss, color=color, label=name)
        axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axis.axvline(at, color="#c0392b", lw=1, label="budget")
    for text, place in marks.items():
        if x[0] < place < x[-1]:
            axis.axvline(place, color="#5b3b9c", lw=1, ls=":", label=text)
    axis.set(xscale="log", xlabel="training FLOPs from now on", ylabel="predicted loss (nats a token)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    for name in (path, os.path.splitext(path)[0] + ".pdf"):
        figure.savefig(name, dpi=150)
    plt.close(figure)


def main(options):
    laws, content = read_laws(options.laws)
    if options.design:
        found = plan_design(laws, options)
        lines = [f"were {options.laws} true, with noise of {100 * options.noise:.2g} % a run and {100 * options.trunk_noise:.2g} % a trunk:", *say_design(found)]
        print(json.dumps({k: {n: None if math.isnan(v) else v for n, v in e.items()} for k, e in found.items()}) if options.json else "\n".join(lines))
        return
    N, D1, ratio = inputs(options)
    source = "given" if ratio else "from the laws file"
    ratio = ratio or content.get("active_ratio", 0.0)
    if not ratio:
        ratio = 1 + options.mlp_share * (options.num_experts_per_tok - 1)
        source = f"assumed: {options.num_local_experts} experts, top-{options.num_experts_per_tok}, MLPs hold {options.mlp_share:.2f} of N"
    if not options.fresh and not (N and D1):
        raise ConfigError(f"--{'D1' if N else 'N'}= is missing (or --checkpoint=; --fresh plans from nothing)")
    flops = budget(options, N, ratio)
    law, why = choose_law(laws, options.law)
    result = plan_fresh(laws, content, law, N, flops, ratio) if options.fresh else plan_now(laws, content, law, N, D1, flops, ratio)
    uncertainty = (f"{len(next(iter(laws[law]['draws'].values())))} bootstrap draws" if "draws" in content["laws"][law] else
                   "the rounding of the law's digits alone, so too narrow" if "rounding" in content["laws"][law] else "none given by the laws file")
    result |= {"law": law, "law_chosen_because": why, "active_ratio": ratio, "uncertainty": uncertainty}
    if options.figure:
        def curve(name):
            def at(f):
                o = (plan_fresh(laws, content, law, N, f, ratio) if options.fresh else {"options": losses_now(laws, law, N, D1, f, ratio)})["options"][name]
                return o["loss"], *o["interval"]
            return at
        star = None if options.fresh else result["laws"][law]["overtaking"]
        marks = {"D2*: MoE from scratch overtakes": 6 * N * ratio * star["D2_star"]} if star and star["D2_star"] else {}
        draw({name: curve(name) for name in result["options"]}, flops, marks, options.figure)
    if options.json:
        print(json.dumps(result))
        return
    print(f"N = {N:.4g}, D1 = {D1:.4g}, " * (not options.fresh) + f"budget {flops:.4g} FLOPs; N_active = {ratio:.3f} N ({source})")
    print(f"law: {law} ({why}); uncertainty: {uncertainty}\n")
    print("\n".join((say_fresh if options.fresh else say_now)(result)))
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    if options.figure:
        print(f"figure: {options.figure}")


if __name__ == "__main__":
    run(main, Options)
