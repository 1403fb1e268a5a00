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
from fit_laws import covariance, trunk_of
from laws import RIVALS, evaluate, fit, parameter_names, predict
from rows import FAMILIES

DENSE, UPCYCLE, SCRATCH = "continue the dense model", "upcycle", "MoE from scratch"
ONLY_DENSE, BOTH = "dense", "dense, then upcycle"  # with SCRATCH the routes from nothing
INTERVAL = [0.05, 0.95]


@dataclass
class Options:
    """Compare upcycling a dense model, training the MoE from scratch and continuing dense training, at equal FLOPs from now on."""
    laws: str = setting("laws/liew2025.json", "laws.json of fit_laws.py, or published laws")
    law: str = setting("", "upcycled law to plan by; empty: the one that best predicts the held-out largest D2, else the interaction law")
    checkpoint: str = setting("", "dense checkpoint directory, for N and D1")
    N: float = setting(0.0, "non-embedding parameters of the dense model, a raw count", least=0)
    D1: float = setting(0.0, "tokens it has seen, a raw count", least=0)
    tokens: float = setting(0.0, "budget as tokens of MoE training", least=0)
    flops: float = setting(0.0, "budget in training FLOPs", least=0)
    gpu_hours: float = setting(0.0, "budget in GPU hours, with flops_per_gpu and mfu", least=0)
    flops_per_gpu: float = setting(0.0, "peak FLOP/s of a GPU", least=0)
    mfu: float = setting(0.4, "share of the peak that training uses", least=0.001, most=1)
    num_local_experts: int | None = setting(None, "experts of the MoE (the laws hold for the MoE they were fitted on); none: 8", least=1)
    num_experts_per_tok: int | None = setting(None, "experts a token uses; none: 2", least=1)
    mlp_share: float | None = setting(None, "share of N in the MLPs; none: 2/3, of Llama with intermediate size 8/3 of hidden", least=0, most=1)
    active_ratio: float = setting(0.0, "N_active / N; 0: the checkpoint's, the laws file's, or 1 + mlp_share (num_experts_per_tok - 1)", least=0)
    fresh: bool = setting(False, "plan from nothing: the best split of the budget; with no N, the best N too")
    design: str = setting("", "study file: what would it find, were these laws true")
    noise: float = setting(0.005, "design: standard deviation of ln loss between runs", least=1e-6)
    trunk_noise: float = setting(0.003, "design: standard deviation of ln loss that runs of a trunk share", least=0)
    figure: str = setting("out/plan.png", "where the figure goes (.png, .svg or .pdf), a PDF beside it; empty: none")
    json: bool = setting(False, "print JSON")


# ---------------------------------------------------------------------------------------------------------
# Laws with draws

def read_laws(path, draws=1000, seed=0):
    """{law: {"params", "draws": {name: array}, "beside": {dense or moe: the same}, ...}} and the laws file as it is. Raises ConfigError.

    A law with no draws gets uniform ones over the rounding of its digits where the file gives it, parameters it shares drawn once.
    """
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        if content["version"] != 1:
            raise ConfigError(f"{path}: version {content['version']!r} is not 1")
        random, common = np.random.default_rng(seed), {}

        def loaded(law, entry):
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
            beside = {other: loaded(other, its) for other, its in entry.get("beside", {}).items()}
            return entry | {"params": params, "draws": its, "beside": beside}

        laws = {law: loaded(law, entry) for law, entry in content["laws"].items()}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a laws file ({type(error).__name__}: {error})") from None
    if not laws:
        raise ConfigError(f"{path}: holds no laws")
    entries = [e for entry in laws.values() for e in (entry, *entry["beside"].values())]
    count = min(len(values) for entry in entries for values in entry["draws"].values())
    if not count:
        raise ConfigError(f"{path}: a law has no draws")
    for entry in entries:
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


def of_one_fit(laws, law):
    """The laws with the dense and MoE ones that were fitted together with this law, where the file has them."""
    return laws | laws[law].get("beside", {})


def scratch(laws, law, **variables):
    """Loss of the MoE from scratch beside an upcycled law: by that law itself with D1 = 0 where it covers both."""
    if law.endswith("_shared"):
        return both(laws, law, N=variables["N"], D1=0.0, D2=variables["D"])
    laws = of_one_fit(laws, law)
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


def overtaking(laws, law, N, D1, span=None, points=800):
    """Where a MoE from scratch overtakes the upcycled one, at equal tokens (and FLOPs) after the dense checkpoint.

    span: the fitted range of D2, where known; the start is a hundredth of its lower end. {"D2_star": tokens (0: from the start)
    or None, "interval": 90 % (None: never), "never", "from_start": shares of draws, "regained": the second root, where the upcycled
    model leads again, or None, "regained_far": it lies above all data}. None where there is no law for the MoE from scratch.
    """
    x = np.geomspace(span[0] / 100 if span else D1 * 1e-6, D1 * 1e9, points)
    from_scratch = scratch(laws, law, N=N, D=x)
    if from_scratch is None:
        return None
    upcycled = both(laws, law, N=N, D1=D1, D2=x)

    def first(difference):  # the one where from scratch becomes better
        return 0.0 if difference[0] < -1e-9 else next((root for root, slope in crossings(x, difference) if slope < 0), math.inf)

    difference = from_scratch[0] - upcycled[0]
    star = first(difference)
    regained = next((root for root, slope in crossings(x, difference) if slope > 0 and root > star), None)
    drawn = np.array([first(d) for d in from_scratch[1] - upcycled[1]])
    interval = [v if math.isfinite(v) else None for v in np.quantile(drawn, INTERVAL, method="inverted_cdf")]
    return {"D2_star": star if math.isfinite(star) else None, "interval": interval, "never": float(np.isinf(drawn).mean()),
            "from_start": float((drawn == 0).mean()), "regained": regained,
            "regained_far": regained is not None and regained > (span[1] if span else 100 * star)}


def worse_than_start(laws, law, N, D1):
    """D2 below which the law puts the upcycled model above its own dense start, where the law cannot hold; None if nowhere."""
    laws = of_one_fit(laws, law)
    if "dense" not in laws:
        return None
    x = np.geomspace(D1 * 1e-6, D1 * 1e3, 2000)
    worse = predict(law, laws[law]["params"], N=N, D1=D1, D2=x) > predict("dense", laws["dense"]["params"], N=N, D=D1)
    return float(x[np.flatnonzero(worse)[-1]]) if worse.any() else None


# ---------------------------------------------------------------------------------------------------------
# Now: a dense checkpoint is there

def losses_now(laws, law, N, D1, flops, ratio):
    """{option: {"tokens", "loss", "interval", "probability_best"}} at equal training FLOPs from now on."""
    laws, dense, moe = of_one_fit(laws, law), flops / (6 * N), flops / (6 * N * ratio)
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


def outside(ranges, family, least=1.0, **values):
    """[text]: how far values lie outside the range that the family was fitted on, by more than a factor `least`."""
    said = []
    for name, value in values.items():
        if name not in ranges.get(family, {}):
            said += [f"the fitted range of {name} ({family}) is not known"] * (least == 1.0)
            continue
        low, high = ranges[family][name]
        if not low / least <= value <= high * least:
            factor, side, edge = (value / high, "above the largest", high) if value > high else (low / value, "below the smallest", low)
            said.append(f"{name} = {value:.3g} is {factor:.3g} times {side} fitted ({family}: {edge:.3g})")
    return said


def plan_now(laws, content, law, N, D1, flops, ratio):
    options = losses_now(laws, law, N, D1, flops, ratio)
    best = max(options, key=lambda name: options[name]["probability_best"])
    tokens = options[UPCYCLE]["tokens"]
    ranges = content.get("ranges", {})
    warnings = outside(ranges, "upcycled", N=N, D1=D1, D2=tokens)
    warnings += outside(ranges, "dense", N=N, D=D1 + options[DENSE]["tokens"]) if DENSE in options else ["no dense law: continuing is left out"]
    warnings += outside(ranges, "moe", N=N, D=tokens) if SCRATCH in options else ["no MoE law: from scratch is left out"]
    floor = worse_than_start(laws, law, N, D1)
    if floor and tokens < floor:
        warnings.insert(0, f"below D2 = {floor:.3g} this law puts the upcycled model above its own dense start: it does not hold there, "
                           "upcycling is better than it says")
    others, span = {}, ranges.get("upcycled", {}).get("D2")
    for other in (name for name in RIVALS if name in laws):
        its = losses_now(laws, other, N, D1, flops, ratio)
        others[other] = {"best": max(its, key=lambda name: its[name]["probability_best"]), "upcycled_loss": its[UPCYCLE]["loss"],
                         "probability_upcycle_best": its[UPCYCLE]["probability_best"], "overtaking": overtaking(laws, other, N, D1, span)}
    worth = {}
    for other in (name for name in RIVALS if "effective" in name and name in laws):
        draws, params = laws[other]["draws"], laws[other]["params"]
        worth[other] = {"tokens": float(params["c"] * D1 ** params["gamma"]), "interval": np.quantile(draws["c"] * D1 ** draws["gamma"], INTERVAL).tolist()}
    return {"N": N, "D1": D1, "flops": flops, "options": options, "best": best, "worse_than_start_below": floor, "laws": others,
            "worth": worth, "warnings": warnings}


# ---------------------------------------------------------------------------------------------------------
# Fresh: nothing is there

LOGITS = np.linspace(-14, 14, 281)  # of the share of the FLOPs that goes to dense training


def split_losses(law, params, flops, N, ratio, logit=LOGITS):
    """Loss of spending 6 N D1 + 6 N_active D2 = flops with each share on dense training; N and params broadcast against logit."""
    share = 1 / (1 + np.exp(-logit))
    return predict(law, params, N=N, D1=share * flops / (6 * N), D2=(1 - share) * flops / (6 * N * ratio))


def best_split(law, params, flops, N, ratio):
    """(share of the FLOPs for dense training, loss) of the best D1, D2; None twice where the loss falls up to the end of the grid.

    params may be draws: arrays, on the grid alone. With alpha3 = 0 the share is alpha1 / (alpha1 + alpha2).
    """
    if np.ndim(params["E"]):
        losses = split_losses(law, {name: np.reshape(value, (-1, 1)) for name, value in params.items()}, flops, N, ratio)
        return 1 / (1 + np.exp(-LOGITS[losses.argmin(axis=1)])), losses.min(axis=1)
    i = int(split_losses(law, params, flops, N, ratio).argmin())
    if i in (0, len(LOGITS) - 1):
        return None, None
    exact = minimize_scalar(lambda x: split_losses(law, params, flops, N, ratio, x), bounds=LOGITS[[i - 1, i + 1]], method="bounded",
                            options={"xatol": 1e-10})
    return 1 / (1 + math.exp(-exact.x)), float(exact.fun)


def best_N(loss, flops):
    """The N that minimises loss(array of N) for a budget: a grid over ln N, then Brent's method; None at an end of the grid."""
    grid = np.linspace(math.log(1e3), math.log(flops / 6e3), 160)
    i = int(np.argmin(loss(np.exp(grid))))
    if i in (0, len(grid) - 1):
        return None
    found = minimize_scalar(lambda x: loss(np.exp([x]))[0], bounds=grid[[i - 1, i + 1]], method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x)


def plan_fresh(laws, content, law, N, flops, ratio):
    """The best of dense, MoE from scratch and dense-then-upcycled for a budget from nothing; N is optimised for each where it is 0.

    A route whose optimum is at the end of what is searched has no plan, but a reason why under "refused"; "far" under a plan
    says where it leaves the fitted range by a factor of more than 30.
    """
    laws, ranges = of_one_fit(laws, law), content.get("ranges", {})
    routes, refused, warnings = {}, {}, []

    def tokens(n):
        return flops / (6 * n * ratio)

    def add(route, family, plan, losses):
        counts = {name: plan[name] for name in FAMILIES[family]}
        routes[route] = {"plan": plan, "far": outside(ranges, family, 30, **counts)}, losses
        warnings.extend(outside(ranges, family, **counts))

    no_optimum = "no interior optimum, the loss falls up to the end of the search in {}: outside the law's domain"
    if "dense" not in laws:
        refused[ONLY_DENSE] = "no dense law"
    elif n := N or best_N(lambda n: predict("dense", laws["dense"]["params"], N=n, D=flops / (6 * n)), flops):
        add(ONLY_DENSE, "dense", {"N": n, "D": flops / (6 * n)}, both(laws, "dense", N=n, D=flops / (6 * n)))
    else:
        refused[ONLY_DENSE] = no_optimum.format("N")
    if scratch(laws, law, N=1.0, D=1.0) is None:
        refused[SCRATCH] = "no moe law"
    elif n := N or best_N(lambda n: scratch(laws, law, N=n, D=tokens(n))[0], flops):
        add(SCRATCH, "moe", {"N": n, "D": tokens(n)}, scratch(laws, law, N=n, D=tokens(n)))
    else:
        refused[SCRATCH] = no_optimum.format("N")
    params = laws[law]["params"]
    n = N or best_N(lambda n: split_losses(law, params, flops, n[:, None], ratio).min(axis=1), flops)
    share = n and best_split(law, params, flops, n, ratio)[0]
    if share:
        plan = {"N": n, "D1": share * flops / (6 * n), "D2": (1 - share) * tokens(n), "dense_share_of_flops": share,
                "dense_share_interval": np.quantile(best_split(law, laws[law]["draws"], flops, n, ratio)[0], INTERVAL).tolist()}
        add(BOTH, "upcycled", plan, both(laws, law, N=n, D1=plan["D1"], D2=plan["D2"]))
    else:
        refused[BOTH] = no_optimum.format("the split between D1 and D2" if n else "N")
    options = summarise(routes) if routes else {}
    return {"flops": flops, "options": options, "best": max(options, key=lambda name: options[name]["probability_best"], default=None),
            "refused": refused, "warnings": warnings}


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
    up = [row for row in planned_rows(study) if row["family"] == "upcycled"]
    N, D1 = (getattr(options, name) or max((row[name] for row in up), default=0) for name in ("N", "D1"))
    for name, variant in variants(study).items():
        totals = study_totals(variant)
        found[name] = expected(laws, planned_rows(variant), options.noise, options.trunk_noise, N, D1) | totals | {"N": N, "D1": D1}
        if options.flops_per_gpu:
            found[name]["hours"] = totals["flops"] / (options.flops_per_gpu * options.mfu * 3600)
    return found


# ---------------------------------------------------------------------------------------------------------
# The command

def check(options):
    """Refuse what cannot be meant, with a hint on counts given in billions or millions. Raises ConfigError."""
    for name, floor in (("N", 1e4), ("D1", max(1e3, options.N / 1e3)), ("tokens", max(1e3, options.N / 1e3))):
        if 0 < (value := getattr(options, name)) < floor:
            unit = "billions; did you mean --{0}={1:g}e9" if value < 1000 else "millions; did you mean --{0}={2:g}"
            raise ConfigError(f"--{name}={value:g} is a raw count here, not " + unit.format(name, value, value * 1e6) + "?")
    if 0 < options.flops < 1e6:
        raise ConfigError(f"--flops={options.flops:g} is a raw count of operations; a budget is more like 1e20")
    if 0 < options.flops_per_gpu < 1e9:
        raise ConfigError(f"--flops_per_gpu={options.flops_per_gpu:g} is a raw count of operations a second; did you mean {options.flops_per_gpu:g}e12?")
    if options.figure and os.path.splitext(options.figure)[1] not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--figure={options.figure}: must end in .png, .svg or .pdf")


def tokens_seen(state):
    """Tokens that a checkpoint has seen in all runs, from its trainer_state.json; 0 where that does not say."""
    if "history" in state:
        return sum(tokens for _, tokens in state["history"])
    return state.get("tokens", 0) + state.get("lineage", {}).get("tokens_before", 0)


def inputs(options, of_rows=0.0):
    """(N, D1, N_active / N, where that is from) from the settings, the checkpoint and the ratio of the laws file's rows. Raises ConfigError."""
    N, D1 = options.N, options.D1
    given = [name for name in ("num_local_experts", "num_experts_per_tok", "mlp_share") if getattr(options, name) is not None]
    experts, top = options.num_local_experts or 8, options.num_experts_per_tok or 2
    mlp_share = 2 / 3 if options.mlp_share is None else options.mlp_share
    if top > experts:
        raise ConfigError(f"--num_experts_per_tok={top} is more than --num_local_experts={experts}")
    ratio, source = 1 + mlp_share * (top - 1), f"assumed: {experts} experts, top-{top}, MLPs hold {mlp_share:.2f} of N"
    if of_rows:
        ratio, source = of_rows, "mean of the laws file's rows"
    if options.checkpoint:
        from checkpoint import read_config, read_state  # they need torch
        from model import parameter_counts

        config, state = read_config(options.checkpoint), read_state(options.checkpoint)
        if config.num_local_experts:
            raise ConfigError(f"{options.checkpoint}: is a mixture of experts already; give the dense checkpoint")
        N, D1 = N or parameter_counts(config)["N"], D1 or tokens_seen(state)
        if not D1:
            raise ConfigError(f"{options.checkpoint}: trainer_state.json does not say on how many tokens it was trained; give --D1=")
        moe = dataclasses.replace(config, num_local_experts=experts, num_experts_per_tok=top)
        ratio, source = parameter_counts(moe)["N_active"] / parameter_counts(config)["N"], f"the checkpoint with {experts} experts, top-{top}"
        given = [name for name in given if name == "mlp_share"]
    if options.active_ratio:
        ratio, source = options.active_ratio, "given"
    if given and not source.startswith("assumed"):
        raise ConfigError(f"--{given[0]} has no effect here: N_active = {ratio:.4g} N ({source}); leave it out" +
                          ", or give --active_ratio=, though the laws hold for the MoE they were fitted on" * (ratio == of_rows))
    return N, D1, ratio, source


def budget(options, N, ratio):
    """The budget in FLOPs. Raises ConfigError unless exactly one is given, and where it is less than 1,000 tokens."""
    given = [name for name in ("tokens", "flops", "gpu_hours") if getattr(options, name)]
    if len(given) != 1:
        raise ConfigError(f"give one budget, --tokens=, --flops= or --gpu_hours= ({'got ' + ', '.join(given) if given else 'got none'})")
    if options.gpu_hours and not options.flops_per_gpu:
        raise ConfigError("--gpu_hours needs --flops_per_gpu= (989e12 for an H100 in bf16) and --mfu=")
    if options.tokens and not N:
        raise ConfigError("--tokens as a budget needs --N=; give --flops=")
    flops = options.flops or options.tokens * 6 * N * ratio or options.gpu_hours * 3600 * options.flops_per_gpu * options.mfu
    if flops < 6e3 * ratio * (N or 1e6):
        raise ConfigError(f"--{given[0]}={getattr(options, given[0]):g}: {flops:.3g} FLOPs are " + (
            f"{flops / (6 * N * ratio):.3g} tokens at N = {N:.3g}, too few to plan" if N else "too few to plan N with"))
    return flops


def rows_of(table):
    """Lines of cells, columns padded."""
    width = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip() for row in table]


def say_star(star):
    """D2* in words."""
    if star is None:
        return "no MoE law to compare with"
    low, high = ("never" if v is None else f"{v:.3g}" if v else "from the start" for v in star["interval"])
    shares = "".join(f", {word} in {100 * star[key]:.1f} % of draws" for key, word in (("never", "never"), ("from_start", "from the start")) if star[key])
    root = "never" if star["D2_star"] is None else f"{star['D2_star']:.3g} tokens" if star["D2_star"] else "from the start"
    again = "" if star["regained"] is None else f"; a second root at {star['regained']:.3g}" + (
        " is an artefact of the formula far outside any data" if star["regained_far"] else ": there the upcycled model takes the lead")
    return f"{root} (90 % interval {low} .. {high}{shares}){again}"


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
        of = "MoE training" if law.endswith("_shared") else "upcycled training, a law fitted apart from the MoE from scratch"
        lines.append(f"{law}: the dense checkpoint is worth {its['tokens']:.3g} tokens of {of} (90 % interval {low:.3g} .. {high:.3g})")
    return lines


def say_fresh(result):
    def say(plan):
        return ", ".join(f"{name} {plan[name]:.3g}" for name in ("N", "D", "D1", "D2") if name in plan)
    options = result["options"]
    lines = rows_of([("route", "plan", "loss", "90 % interval", "best in")] + [
        (name, say(o["plan"]), *say_loss(o)) for name, o in options.items()])
    lines += [f"  {route}: no plan ({reason})" for route, reason in result["refused"].items()]
    best = options[result["best"]]
    lines += ["", f"Best: {result['best']}, of those with a plan." if result["refused"] else f"Best: {result['best']}."]
    if best["far"]:
        lines[-1] += f" But do not rely on it: {'; '.join(best['far'])}."
    if BOTH in options:
        plan = options[BOTH]["plan"]
        share, low, high = (100 * v for v in (plan["dense_share_of_flops"], *plan["dense_share_interval"]))
        lines[-1] += f" Of an upcycled plan's FLOPs {share:.1f} % go to dense training (90 % interval {low:.1f} .. {high:.1f} %)."
    return lines


def say_design(found):
    def cell(value):
        return f"{value:.3g}" if math.isfinite(value) else "-"
    first = found["as it is"]
    head = ("design", "rows", "trunks", "s.e. of alpha3", "power", f"D2* (N {first['N']:.3g}, D1 {first['D1']:.3g})", "s.e. of ln D2*",
            "tokens", "FLOPs", "hours")
    return rows_of([head] + [(name, str(e["rows"]), str(e["trunks"]), cell(e["se_alpha3"]), f"{100 * e['power']:.0f} %", cell(e["D2_star"]), cell(e["se_ln_D2_star"]),
                              cell(e["tokens"]), cell(e["flops"]), cell(e.get("hours", math.nan))) for name, e in found.items()])


def draw(options_at, at, marks, path, what):
    """Loss against FLOPs around the budget `at`: options_at(flops) -> {option: {"loss", "interval"}}; marks {text: FLOPs}."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.4, 3.8), constrained_layout=True)
    x = np.geomspace(at / 30, at * 30, 41)
    found = [options_at(v) for v in x]
    for name in dict.fromkeys(name for options in found for name in options):
        color = {UPCYCLE: "#3b6fb6", BOTH: "#3b6fb6", SCRATCH: "#222222"}.get(name, "#888888")
        loss, low, high = np.array([(o[name]["loss"], *o[name]["interval"]) if name in o else [math.nan] * 3 for o in found]).T
        axis.plot(x, loss, color=color, label=name)
        axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axis.axvline(at, color="#c0392b", lw=1, label="budget")
    for text, place in marks.items():
        if x[0] < place < x[-1]:
            axis.axvline(place, color="#5b3b9c", lw=1, ls=":", label=text)
    axis.set(xscale="log", xlabel=what, ylabel="predicted loss (nats a token)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        for name in {path, os.path.splitext(path)[0] + ".pdf"}:
            figure.savefig(name, dpi=150)
    except OSError as error:
        raise ConfigError(f"--figure={path}: {error.strerror}") from None
    plt.close(figure)


def main(options):
    check(options)
    laws, content = read_laws(options.laws)
    if options.design:
        found = plan_design(laws, options)
        lines = [f"were {options.laws} true, with noise of {100 * options.noise:.2g} % a run and {100 * options.trunk_noise:.2g} % a trunk:", *say_design(found)]
        print(json.dumps({k: {n: None if math.isnan(v) else v for n, v in e.items()} for k, e in found.items()}) if options.json else "\n".join(lines))
        return
    of_rows = content.get("active_ratio", 0.0)
    N, D1, ratio, source = inputs(options, of_rows)
    if not options.fresh and not (N and D1):
        raise ConfigError(f"--{'D1' if N else 'N'}= is missing (or --checkpoint=; --fresh plans from nothing)")
    flops = budget(options, N, ratio)
    law, why = choose_law(laws, options.law)
    result = plan_fresh(laws, content, law, N, flops, ratio) if options.fresh else plan_now(laws, content, law, N, D1, flops, ratio)
    if not result["options"]:
        raise ConfigError("no plan: " + "; ".join(f"{route}: {reason}" for route, reason in result["refused"].items()))
    if of_rows and abs(ratio / of_rows - 1) > 0.1:
        result["warnings"].append(f"N_active = {ratio:.3f} N, but the laws were fitted on a MoE with {of_rows:.3f} N")
    uncertainty = (f"{len(next(iter(laws[law]['draws'].values())))} bootstrap draws" if "draws" in content["laws"][law] else
                   "the rounding of the law's digits alone, so too narrow" if "rounding" in content["laws"][law] else "none given by the laws file")
    result |= {"law": law, "law_chosen_because": why, "active_ratio": ratio, "active_ratio_from": source, "uncertainty": uncertainty}
    if options.json:
        print(json.dumps(result, allow_nan=False))
    else:
        print(f"N = {N:.4g}, D1 = {D1:.4g}, " * (not options.fresh) + f"budget {flops:.4g} FLOPs; N_active = {ratio:.3f} N ({source})")
        print(f"law: {law} ({why}); uncertainty: {uncertainty}\n")
        print("\n".join((say_fresh if options.fresh else say_now)(result)))
        for warning in result["warnings"]:
            print(f"warning: {warning}")
    if options.figure:
        if options.fresh:
            draw(lambda f: plan_fresh(laws, content, law, N, f, ratio)["options"], flops, {}, options.figure, "training FLOPs")
        else:
            star = result["laws"][law]["overtaking"]
            marks = {"D2*: MoE from scratch overtakes": 6 * N * ratio * star["D2_star"]} if star and star["D2_star"] else {}
            draw(lambda f: losses_now(laws, law, N, D1, f, ratio), flops, marks, options.figure, "training FLOPs from now on")
        if not options.json:
            print(f"figure: {options.figure}")


if __name__ == "__main__":
    run(main, Options)
