"""A laws file -> the mixture of laws that the planner answers by.

All upcycled laws of one fit enter, each with the dense and MoE law that were fitted with it. A law's weight says
how well it predicted what was held out. Its draws carry its uncertainty, and each loss also gets a draw of its
misfit and, beyond the data, of the error of its form.
"""
import json
import math

import numpy as np
from scipy.special import ndtri

from configurator import ConfigError
from laws import LAWS, RIVALS, parameter_names, predict

DRAWS = 250              # draws of each law; a law with fewer repeats them
WITH_WEIGHT = 0.05       # laws of this weight must agree to a clear verdict; laws below a fifth of it are left out
LEAST_ERROR = 0.003      # a held-out error below the noise of a run is luck
# Fits of published tables of 0.1-3B parameters, tried on larger runs at 2-8 times the size, err by 1-2 % in one
# variable and by 3-5 % in two. Beyond the data each variable therefore adds 1 % of the loss per factor e, or
# more where the law's own held-out test was worse. Beyond 8 times, or the reach of that test, there is no verdict.
FORM_ERROR, REACH = 0.01, 8.0
EXPERTS_ERROR = 0.03     # per factor e in experts: published routed models of 4 to 32 experts gain 2-4 %
MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}  # the MoE of laws that do not name theirs


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


def head_start(params, N, D1):
    """H: the tokens of MoE training that a dense checkpoint of N parameters and D1 tokens is worth, by a law's params."""
    if "dense_A" in params:  # loss matching: the MoE's loss after H tokens is e^delta times the dense loss after D1
        loss = math.exp(params["delta"]) * predict("dense", {k[6:]: v for k, v in params.items() if k[:6] == "dense_"}, N=N, D=D1)
        return ((loss - params["B"] * N ** -params["beta"] - params["E"]) / params["A"]) ** (-1 / params["alpha"])
    tokens = params["c"] * D1 ** params["gamma"]
    if "H_max" in params:
        tokens = (tokens ** -params["alpha"] + params["H_max"] ** -params["alpha"]) ** (-1 / params["alpha"])
    return tokens
