"""Laws and your numbers -> upcycle, train the MoE from scratch or continue the dense model; or: cannot say.

    python plan.py --N=1e9 --D1=1e11 --tokens=5e10        a dense checkpoint is there: what now?
    python plan.py --flops=1e21 --fresh                   nothing is there: how to split the budget?
    python plan.py --N=1e9 --D1=1e11 --tokens=5e10 --html=plan.html      the answer as a page with sliders
    python plan.py --design=config/study_quick.py         what will this study find, were the laws true?

--laws names the laws file; by default it is the published table. N and tokens are raw counts, losses are nats
per token. A verdict is "clear", "mixed" or "void". A void verdict ranks nothing: it says why the laws cannot
tell, and it lists the cheapest runs that would.
"""
import dataclasses
import json
import math
import os
import signal
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import ndtri

from configurator import ConfigError, run, setting
from laws import LAWS, RIVALS, parameter_names, predict

DENSE, UPCYCLE, SCRATCH = "continue the dense model", "upcycle", "MoE from scratch"
ONLY_DENSE, SPLIT = "dense", "dense, then upcycle"  # with SCRATCH the three routes from nothing
DRAWS = 250              # draws of each law; a law with fewer repeats them
INTERVAL = (0.05, 0.95)
SURE, GAP = 0.95, 0.005  # a clear verdict is at least so sure, and its lead is at least this share of the loss
WITH_WEIGHT = 0.05       # laws of this weight must agree to a clear verdict; laws below a fifth of it are left out
LEAST_ERROR = 0.003      # a held-out error below the noise of a run is luck
# Fits of published tables of 0.1-3B parameters, tried on larger runs at 2-8 times the size, err by 1-2 % in one
# variable and by 3-5 % in two. Beyond the data each variable therefore adds 1 % of the loss per factor e, or more
# where the law's own held-out test was worse, and beyond 8 times (or the reach of that test) there is no verdict.
FORM_ERROR, REACH = 0.01, 8.0
EXPERTS_ERROR = 0.03     # per factor e in experts: published routed models of 4-32 experts gain 2-4 %
MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}  # of laws that do not say
MLP_SHARE = 2 / 3        # of N in the MLPs of a Llama whose intermediate size is 8/3 of the hidden size


@dataclass
class Options:
    """Compare upcycling, a MoE from scratch and continued dense training at equal FLOPs from now on."""
    laws: str = setting("laws/liew2025.json", "laws.json of fit_laws.py, or published laws")
    law: str = setting("", "one upcycled law to plan by; empty: all laws, weighted by their held-out errors")
    checkpoint: str = setting("", "dense checkpoint directory; it gives N, D1 and the FLOPs of a token")
    N: float = setting(0.0, "non-embedding parameters of the dense model, a raw count", least=0)
    D1: float = setting(0.0, "tokens the dense model has seen, a raw count", least=0)
    tokens: float = setting(0.0, "budget as tokens of MoE training", least=0)
    flops: float = setting(0.0, "budget in training FLOPs", least=0)
    gpu_hours: float = setting(0.0, "budget in GPU hours; it needs flops_per_gpu and mfu", least=0)
    flops_per_gpu: float = setting(0.0, "peak FLOP/s of a GPU", least=0)
    mfu: float = setting(0.4, "share of the peak that training uses", least=0.001, most=1)
    num_local_experts: int | None = setting(None, "experts of the MoE; none: as in the laws file", least=1)
    num_experts_per_tok: int | None = setting(None, "experts a token uses; none: as in the laws file", least=1)
    active_ratio: float = setting(0.0, "FLOPs of a MoE token over those of a dense one; 0: as counted", least=0)
    max_seq_len: int = setting(0, "context that a checkpoint's FLOPs count; 0: the laws' own, else 4096", least=0)
    fresh: bool = setting(False, "plan from nothing: the best split of the budget; with no N, the best N too")
    design: str = setting("", "study file: what would it find, were these laws true")
    noise: float = setting(0.005, "design: standard deviation of ln loss between runs", least=1e-6)
    trunk_noise: float = setting(0.003, "design: standard deviation of ln loss that runs of a trunk share", least=0)
    figure: str = setting("out/plan.png", "figure file (.png, .svg or .pdf), with a PDF beside it; empty: none")
    html: str = setting("", "page with the answer and sliders, one file that opens offline; empty: none")
    json: bool = setting(False, "print JSON")


# ---------------------------------------------------------------------------------------------------------
# The laws file

def check_number(where, name, value, lowest=None):
    """Raises ConfigError unless value is a finite number, and where lowest is given not below it (0: above 0)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{where}.{name} = {str(value)[:40]} is not a finite number")
    if lowest is not None and (value < lowest or value == lowest == 0):
        raise ConfigError(f"{where}.{name} = {value:g} must be positive")


def check_law(where, law, entry):
    """Raises ConfigError where a law's params or draws are missing or are not numbers that the law can have."""
    params, draws = entry["params"], entry.get("draws", {})
    for name in {**dict.fromkeys(parameter_names(law)), **params}:
        if name not in params or draws and name not in draws:
            raise ConfigError(f"{where}: {name} is missing")
        may_vanish = name.rpartition("_")[2] in ("B", "E")  # a law for one N has B = 0, and E may be 0
        lowest = -5e-324 if may_vanish else 0 if name.rpartition("_")[2] in ("A", "A1", "A2", "c", "max") else None
        check_number(f"{where}.params", name, params[name], lowest)
        for value in draws.get(name, ()):
            check_number(f"{where}.draws", name, value, lowest)
    if len({len(values) for values in draws.values()}) > 1 or draws and not all(draws.values()):
        raise ConfigError(f"{where}.draws: the parameters must have equally many draws, and at least one")


def check_origin(path, origin):
    """Raises ConfigError where the file's laws were fitted on different data, with different tokenizers or MoEs."""
    for key in ("data_sha256", "tokenizer", "max_seq_len", "num_local_experts", "num_experts_per_tok"):
        families = ("moe", "upcycled") if key.startswith("num_") else ("dense", "moe", "upcycled")
        values = {family: origin.get(family, {}).get(key, []) for family in families}
        if len({str(value) for family in families for value in values[family]}) > 1:
            said = "; ".join(f"{f} {', '.join(str(v)[:12] for v in values[f])}" for f in families if values[f])
            raise ConfigError(f"{path}: laws of different origin are not compared: {key} of {said}; fit them apart")


def read_laws(path):
    """The laws file as a dict whose numbers are checked. Raises ConfigError in one line with file and key."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        if content["version"] not in (1, 2):
            raise ConfigError(f"{path}: version {content['version']!r} is neither 1 nor 2")
        for law, entry in content["laws"].items():
            if law not in LAWS:
                raise ConfigError(f"{path}: laws.{law} is no law that this program knows")
            check_law(f"{path}: laws.{law}", law, entry)
            for other, beside in entry.get("beside", {}).items():
                check_law(f"{path}: laws.{law}.beside.{other}", other, beside)
            for method, fitted in entry.get("methods", {}).items():
                check_law(f"{path}: laws.{law}.methods.{method}", law, entry | fitted)
            if "relative_error" in entry:
                check_number(f"{path}: laws.{law}", "relative_error", entry["relative_error"], 0)
        for family, ranges in content.get("ranges", {}).items():
            for name, limits in ranges.items():
                for value in (*limits, limits[1] - limits[0] + 1):
                    check_number(f"{path}: ranges.{family}", name, value, 0)
        for model in content.get("models", ()):
            for name in ("N", "flops_per_token"):
                check_number(f"{path}: models", name, model[name], 0)
        check_origin(path, content.get("origin", {}))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a laws file ({type(error).__name__}: {error})") from None
    if not content["laws"]:
        raise ConfigError(f"{path}: holds no laws")
    return content


# ---------------------------------------------------------------------------------------------------------
# The mixture: all laws of one fit, each with its weight, draws, misfit and error of form

def held_out(entry):
    """{what was left out: (rms error of ln loss, how far beyond the fitted rows it lay)} of a law's entry."""
    if "held_out" in entry:
        return {k: (v["rms"], v.get("beyond") or 1.0) for k, v in entry["held_out"].items() if v}
    old = entry.get("extrapolation") or {}
    return {k: (v, 1.0) for k, v in {**old, "trunk": entry.get("leave_trunk_out")}.items() if v is not None}


def weigh(entries):
    """{law: weight}, in proportion to the product of 1 / (held-out error) over D1, D2 and trunk, where all have it.

    That is each law's likelihood when each test counts as one observation of the size of its errors. How a law
    reaches beyond N tells the laws of one fit not apart, since the term in N is the same in all.
    """
    errors = {law: held_out(entry) for law, entry in entries.items()}
    tests = [name for name in ("D1", "D2", "trunk") if all(name in found for found in errors.values())]
    weights = {law: math.prod(1 / max(errors[law][name][0], LEAST_ERROR) for name in tests) for law in entries}
    total = sum(weights.values())
    kept = {law: w / total for law, w in weights.items() if w >= WITH_WEIGHT / 5 * total}
    return {law: w / sum(kept.values()) for law, w in kept.items()}


def drawn(law, entry):
    """{"law", "params", "draws"} with DRAWS draws of each parameter, or one where the file has none."""
    params = {name: float(value) for name, value in entry["params"].items()}
    draws = entry.get("draws") or {name: [value] for name, value in params.items()}
    count = len(next(iter(draws.values())))
    pick = [i * count // DRAWS if count > DRAWS else i % count for i in range(DRAWS)] if count > 1 else [0]
    return {"law": law, "params": params,
            "draws": {name: np.array([draws[name][i] for i in pick], float) for name in params}}


def routes_of(laws, name):
    """{"dense", "moe": a law of the same fit or None, "upcycled": {method: law}} for an upcycled law, or for ""."""
    if not name:
        same = laws["dense"].get("fitted_with") == laws["moe"].get("fitted_with")
        return {family: drawn(family, laws[family]) if same else None for family in ("dense", "moe")} | {"upcycled": {}}
    entry = laws[name]
    beside, system = entry.get("beside", {}), entry.get("fitted_with")
    routes = {"upcycled": {m: drawn(name, e) for m, e in (entry.get("methods") or {"copy": entry}).items()}}
    for family in ("dense", "moe"):
        if family in beside:
            routes[family] = drawn(family, beside[family])
        elif system and system.get(family) == name:  # one curve for both families
            names = {p: f"dense_{p}" if family == "dense" else p for p in (*parameter_names(family), "nu")}
            shared = {part: {p: entry[part][own] for p, own in names.items() if own in entry[part]}
                      for part in ("params", "draws") if part in entry}
            routes[family] = drawn(family, shared)
        else:  # published laws say nothing of fits; they are of one
            routes[family] = drawn(family, laws[family]) if not system and family in laws else None
    return routes


def misfit(laws, name, family):
    """Standard deviation of ln loss that a law leaves unexplained: measured, or assumed of published laws."""
    entry = laws[name] if name and (family == "upcycled" or "misfit" in laws[name]) else laws.get(family, {})
    return entry.get("misfit", {}).get(family, entry.get("rmse_log", entry.get("relative_error", FORM_ERROR)))


def form_rates(laws, name):
    """{family: {variable: error of ln loss for each factor e beyond the data}} of the laws of one fit."""
    rates = {}
    for family, names in (("dense", "ND"), ("moe", "ND"), ("upcycled", ("N", "D1", "D2"))):
        tests = held_out(laws.get(name if family == "upcycled" else family, {}))
        rates[family] = {v: max(FORM_ERROR, tests[v][0] / math.log(max(tests[v][1], 2.0))) if v in tests else FORM_ERROR
                         for v in names} | dict.fromkeys(MOE, EXPERTS_ERROR)
    return rates


def make_book(path, content, wanted=""):
    """All that an answer needs of a laws file: a dict that the page gets as JSON. Raises ConfigError.

    {"laws": [{"name", "weight", "routes", "misfit", "rates"}], "ranges", "reach": {variable: factor}, "experts":
    {setting: value} of the MoE that the laws hold for, "methods", "normal": {family: standard normal deviates, one a draw}}
    """
    laws = content["laws"]
    names = [law for law in RIVALS if law in laws]
    if wanted and wanted not in names:
        raise ConfigError(f"--law: '{wanted}' is not in {path}, which has {', '.join(names) or 'no upcycled law'}")
    with_methods = [law for law in names if laws[law].get("methods")]  # the others know one way of upcycling
    names = [wanted] if wanted else with_methods or names or [""]
    if names == [""] and not {"dense", "moe"} <= set(laws):
        raise ConfigError(f"{path}: has no upcycled law, nor a dense and a MoE law to compare")
    tests = [held_out(entry) for entry in laws.values()]
    origin = content.get("origin", {})
    experts = {key: ((origin.get("upcycled") or origin.get("moe") or {}).get(key) or [default])[0]
               for key, default in MOE.items()}
    ranges = {family: {k: [float(x) for x in limits] for k, limits in found.items()}
              for family, found in content.get("ranges", {}).items()}
    for family in ("moe", "upcycled"):
        ranges[family] = ranges.get(family, {}) | {name: [value, value] for name, value in experts.items()}
    random, levels = np.random.default_rng(0), ndtri((np.arange(DRAWS) + 0.5) / DRAWS).round(4)
    weights = weigh({law: laws[law] for law in names if law}) or {"": 1.0}
    return {"laws": [{"name": law, "weight": weight, "routes": routes_of(laws, law), "rates": form_rates(laws, law),
                      "misfit": {family: misfit(laws, law, family) for family in ("dense", "moe", "upcycled")}}
                     for law, weight in weights.items()],
            "ranges": ranges, "experts": experts,
            "reach": {name: max([REACH, *(found[name][1] for found in tests if name in found)])
                      for name in ("N", "D", "D1", "D2", *MOE)},
            "methods": sorted({m for law in names if law for m in (laws[law].get("methods") or ["copy"])}),
            "normal": {family: random.permutation(levels) for family in ("dense", "moe", "upcycled")}}


def distance(book, family, variables):
    """{variable: ln of how many times beyond the fitted range it lies, 0 inside}; where no range is known, 0."""
    found = {}
    for name, value in variables.items():
        low, high = book["ranges"].get(family, {}).get(name, (0.0, math.inf))
        with np.errstate(divide="ignore"):
            found[name] = np.maximum(np.maximum(np.log(low / value), np.log(value / high)), 0.0)
    return found


def estimate(law, family, variables, method="copy"):
    """The loss of one family by a law's own parameters; None where the law has no such family."""
    route = law["routes"]["upcycled"].get(method) if family == "upcycled" else law["routes"][family]
    used = {name: value for name, value in variables.items() if name not in MOE}
    return None if route is None else predict(route["law"], route["params"], **used)


def sample(book, law, family, variables, method="copy"):
    """(DRAWS, ...) losses of one family by a law's draws, with a draw of its misfit and of its error of form."""
    route = law["routes"]["upcycled"][method] if family == "upcycled" else law["routes"][family]
    used = {name: value for name, value in variables.items() if name not in MOE}
    shape = (-1,) + (1,) * max(np.ndim(value) for value in used.values())
    losses = predict(route["law"], {name: values.reshape(shape) for name, values in route["draws"].items()}, **used)
    beyond = distance(book, family, variables)
    form = sum(law["rates"][family][name] * far for name, far in beyond.items())
    error = np.sqrt(law["misfit"][family] ** 2 + form ** 2)
    return losses * np.exp(error * book["normal"][family].reshape(shape))


def quantile(values, weights, q):
    """The smallest value at which the summed weights reach the share q."""
    order = np.argsort(values, kind="stable")
    summed = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(summed, q * summed[-1] - 1e-12)])


# ---------------------------------------------------------------------------------------------------------
# A comparison of options and its verdict

WORDS = {  # the page says the same sentences
    "unknown": "the fitted range of {name} ({family}) is not known",
    "above": "{name} = {value} is {times} times above the largest fitted, {edge} ({family})",
    "below": "{name} = {value} is {times} times below the smallest fitted, {edge} ({family})",
    "far": "{text}, and such laws were tested to {reach} times",
    "start": "{laws} would put the upcycled model above its own dense start, which cannot hold",
    "lacks": "the laws file has no laws of one fit for all of the options",
    "clear": "Clearly {best}: the laws are {sure} sure, it leads {second} by {gap} of the loss, and all laws agree.",
    "mixed": "No option is clearly best. {best} has the lowest expected loss, {gap} below {second}, and is best "
             "with a probability of {sure}. {decides}",
    "close": "The gap is below half a percent, so cost and convenience may decide.",
    "disagree": "The laws disagree: {sides}.",
    "unsure": "The laws agree, but their errors are as large as the gap.",
    "void": "Cannot say: {reasons}.",
}


def short(value):
    """A count in words, 50.6B, or a large one as 1.5e21."""
    if value >= 1e15 or value < 1:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}" + f"e{int(exponent)}" * (exponent != "+00")
    value = float(f"{value:.3g}")
    unit, name = next((u, n) for u, n in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if value >= u)
    return f"{value / unit:.3g}{name}"


def percent(share):
    return f"{100 * share:.1f} %"


def say(key, **values):
    return WORDS[key].format(**values)


def above_own_start(law, points):
    """Whether a law puts the upcycled model above the dense one that it starts as: copying keeps that one's loss."""
    variables = next((variables for family, variables in points.values() if family == "upcycled"), None)
    if variables is None or law["routes"]["dense"] is None:
        return False
    start = estimate(law, "dense", {"N": variables["N"], "D": variables["D1"]})
    return min(estimate(law, "upcycled", variables, method) for method in law["routes"]["upcycled"]) > start


def beyond_the_data(book, points):
    """([why a verdict would be void], [warnings]): which variables lie beyond the fitted range, and how far."""
    reasons, warnings = [], []
    for family, variables in points.values():
        for name, far in distance(book, family, variables).items():
            if name not in book["ranges"].get(family, {}):
                warnings.append(say("unknown", name=name, family=family))
            elif far > 0:
                low, high = book["ranges"][family][name]
                side, edge = ("above", high) if variables[name] > high else ("below", low)
                text = say(side, name=name, value=short(variables[name]), times=short(math.exp(far)),
                           edge=short(edge), family=family)
                if far > math.log(book["reach"][name]) + 1e-9:
                    reasons.append(say("far", text=text, reach=short(book["reach"][name])))
                else:
                    warnings.append(text)
    return reasons, warnings


def mix(book, kept, points):
    """({option: (loss by each kept law, all draws of all laws)}, the same for each method of upcycling)."""
    def losses(family, variables, method="copy"):
        return ([float(estimate(law, family, variables, method)) for law in kept],
                np.concatenate([sample(book, law, family, variables, method) for law in kept]))

    options, methods = {}, {}
    for option, (family, variables) in points.items():
        if family == "upcycled":
            methods = {method: losses(family, variables, method) for method in book["methods"]}
            weights = [law["weight"] for law in kept]
            options[option] = min(methods.values(), key=lambda found: np.dot(weights, found[0]))
        else:
            options[option] = losses(family, variables)
    return options, methods


def summary(found, weights):
    """{name: {"loss", "interval", "probability_best"}} of {name: (loss by each law, draws)} and the laws' weights."""
    of_draws = np.repeat(weights, DRAWS) / DRAWS
    best = np.stack([draws for _, draws in found.values()]).argmin(axis=0) if found else None
    return {name: {"loss": float(sum(w * loss for w, loss in zip(weights, losses))),
                   "interval": [quantile(draws, of_draws, q) for q in INTERVAL],
                   "probability_best": float(of_draws[best == i].sum())}
            for i, (name, (losses, draws)) in enumerate(found.items())}


def compare(book, points):
    """The options of {option: (family, {variable: value})} by the mixture of laws, and the verdict.

    {"verdict": clear, mixed or void, "says": the verdict in words, "best", "options": {option: {"loss", "interval",
    "probability_best"}}, "methods": {method: the same}, "laws": {law: {"weight", "best", "losses"}}, "warnings"}.
    A void verdict ranks nothing and has no options.
    """
    reasons, warnings = beyond_the_data(book, points)
    kept = [law for law in book["laws"] if not above_own_start(law, points)]
    total = sum(law["weight"] for law in kept)
    if len(kept) < len(book["laws"]):
        lost = ", ".join(law["name"] for law in book["laws"] if law not in kept)
        (reasons if total < 0.5 else warnings).append(say("start", laws=lost))
    if len(points) < 2:
        reasons.append(say("lacks"))
    warnings = list(dict.fromkeys(warnings))
    if reasons:
        return {"verdict": "void", "says": say("void", reasons="; ".join(reasons)), "best": None, "options": {},
                "methods": {}, "laws": {}, "warnings": warnings}
    weights = [law["weight"] / total for law in kept]
    found, found_methods = mix(book, kept, points)
    options = summary(found, weights)
    laws = {law["name"]: {"weight": weights[i], "losses": {option: found[option][0][i] for option in found},
                          "best": min(found, key=lambda option: found[option][0][i])} for i, law in enumerate(kept)}
    result = {"options": options, "methods": summary(found_methods, weights), "laws": laws, "warnings": warnings}
    return judge(options, laws) | result


def judge(options, laws):
    """{"verdict": clear or mixed, "says", "best"} of the options' summary and of what each law says."""
    best, second = sorted(options, key=lambda option: options[option]["loss"])[:2]
    gap, sure = options[second]["loss"] / options[best]["loss"] - 1, options[best]["probability_best"]
    sides = {}
    for law, found in laws.items():
        if found["weight"] >= WITH_WEIGHT:
            sides.setdefault(found["best"], []).append(law)
    words = {"best": best, "second": second, "gap": percent(gap), "sure": percent(sure)}
    if sure >= SURE and gap > GAP and list(sides) == [best]:
        return {"verdict": "clear", "says": say("clear", **words), "best": best}
    if gap <= GAP:
        decides = say("close")
    elif len(sides) > 1:
        decides = say("disagree", sides="; ".join(f"{', '.join(sides[option])}: {option}" for option in sides))
    else:
        decides = say("unsure")
    return {"verdict": "mixed", "says": say("mixed", decides=decides, **words), "best": best}


# ---------------------------------------------------------------------------------------------------------
# Now: a dense checkpoint is there

def flops_per_token(book, family, N):
    """Training FLOPs of a token of the dense model or the MoE: 6 N times a factor, interpolated in ln N."""
    sizes, factors = np.transpose(book["costs"][family])
    return 6 * N * np.interp(np.log(N), np.log(sizes), factors)


def points_now(book, question):
    """({option: (family, variables)}, {option: tokens from now on}) at equal FLOPs from now on."""
    N, D1, flops = question["N"], question["D1"], question["flops"]
    moe = {name: question[name] for name in MOE}
    tokens = {family: float(flops / flops_per_token(book, family, N)) for family in ("dense", "moe")}
    points = {UPCYCLE: ("upcycled", {"N": N, "D1": D1, "D2": tokens["moe"]} | moe),
              DENSE: ("dense", {"N": N, "D": D1 + tokens["dense"]}), SCRATCH: ("moe", {"N": N, "D": tokens["moe"]} | moe)}
    points = {option: point for option, point in points.items() if all(law["routes"][point[0]] for law in book["laws"])}
    return points, {option: tokens["dense" if option == DENSE else "moe"] for option in points}


def first_crossing(x, difference):
    """x at which each row of difference (..., len(x)) first falls below 0: 0 from the start, inf never."""
    below = difference < -1e-9  # curves that merge do not cross
    at = below.argmax(axis=-1)
    after = np.take_along_axis(difference, at[..., None], -1)[..., 0]
    before = np.take_along_axis(difference, np.maximum(at - 1, 0)[..., None], -1)[..., 0]
    ln_x, last = np.log(x), np.maximum(at - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.exp(ln_x[last] + (ln_x[at] - ln_x[last]) * before / (before - after))
    return np.where(below.any(axis=-1), np.where(at == 0, 0.0, root), math.inf)


def overtaking(book, question, laws, method):
    """({law: D2*}, {"interval": 90 %, "never": probability}) where a MoE from scratch overtakes the upcycled one.

    Both train on equally many tokens after the dense model's D1. D2* is 0 where from scratch leads from the start,
    inf where it does not overtake within 10,000 D1.
    """
    N, D1 = question["N"], question["D1"]
    moe = {name: question[name] for name in MOE}
    x = D1 * np.geomspace(1e-4, 1e4, 161)
    scratch, upcycled = ("moe", {"N": N, "D": x} | moe), ("upcycled", {"N": N, "D1": D1, "D2": x} | moe, method)
    kept = [law for law in book["laws"] if law["name"] in laws]
    stars = {law["name"]: float(first_crossing(x, estimate(law, *scratch) - estimate(law, *upcycled))) for law in kept}
    draws = np.concatenate([first_crossing(x, sample(book, law, *scratch) - sample(book, law, *upcycled)) for law in kept])
    weights = np.repeat([laws[law["name"]]["weight"] for law in kept], DRAWS) / DRAWS
    return stars, {"interval": [quantile(draws, weights, q) for q in INTERVAL],
                   "never": float(weights[np.isinf(draws)].sum())}


def finite(value):
    """The value, or None where it is infinite, for JSON."""
    return value if math.isfinite(value) else None


def pilot(book, question, fresh=False):
    """{"runs": [{"family", "branches": tokens}], "flops", "share" of the budget}: the cheapest runs that would decide.

    Each run is one trunk with short decayed branches. The MoE from scratch goes to a quarter of the budget, from
    where its curve predicts the budget to 2-4 %; the others go to an eighth. A branch costs a fifth of its tokens.
    """
    _, tokens = points_now(book, question | {"D1": question["D1"] or 1.0})
    costs = {family: float(flops_per_token(book, family, question["N"])) for family in ("dense", "moe")}
    shares = {"upcycled": (1 / 16, 1 / 8), "moe": (1 / 32, 1 / 16, 1 / 8, 1 / 4), "dense": (1 / 16, 1 / 8)}
    runs = []
    for family, parts in shares.items():
        per_token = costs["dense" if family == "dense" else "moe"]
        branches = [part * question["flops"] / per_token for part in parts]
        spent = per_token * (0.8 * branches[-1] + 0.2 * sum(branches))
        runs.append({"family": family, "branches": branches, "flops": spent})
    spent = sum(run["flops"] for run in runs)
    return {"runs": runs, "flops": spent, "share": spent / question["flops"]}
