"""A laws file -> the mixture of laws that the planner answers by.

All upcycled laws of one fit enter, each with the dense and the MoE law that were fitted with it. A law's
weight says how well it predicted what was held out. Its draws carry the uncertainty of its parameters. Each
loss also gets a draw of the law's misfit and, beyond the data, of the error of its form.
"""
import math

import numpy as np
from scipy.special import ndtri

from configurator import ConfigError, read_json
from laws import LAWS, RIVALS, law_name, parameter_names, predict
from rows import FAMILIES

DRAWS = 250           # draws of each law at most; a law with fewer repeats them
NUMBERS = 45_000      # numbers in the draws of all laws at most, so that a page with them stays below 500 kB
LEAST_WEIGHT = 0.01   # laws of less weight are left out
LEAST_ERROR = 0.003   # a held-out error below the noise of a run is luck
# Fits of published tables of 0.1-3B parameters, tried on runs at 2-8 times the size, err by 1-2 % in one
# variable and by 3-5 % in two: each adds 1 % of the loss per factor e beyond the data. Beyond 8 times, or the
# farthest held-out test of the laws themselves, there is no verdict.
FORM_ERROR, REACH = 0.01, 8.0
EXPERTS_ERROR = 0.03  # per factor e in experts: published routed models of 4 to 32 experts gain 2-4 %
WARM_UPS = 5  # a shorter run, in lengths of its warm-up, says little of the law
MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}  # the MoE of laws that do not name theirs
ORIGIN = ("data_sha256", "tokenizer", *MOE, "max_seq_len")  # what must agree among laws that are compared

# The least that a number in a laws file can be, by its key; others may be negative. E may be 0, and so may
# the B of a law for one N. A misfit has its family as the key.
TINY = 5e-324  # the smallest positive number
LEAST = dict.fromkeys(("A", "A1", "A2", "c", "H", "H_max", "N", "D", "D1", "D2", "flops_per_token",
                       "bits_per_nat"), TINY)
LEAST |= dict.fromkeys(("B", "E", "rms", "beyond", "rmse_log", "relative_error", *FAMILIES, *MOE), 0.0)


# ---------------------------------------------------------------------------------------------------------
# The laws file

def check_numbers(where, value, key=""):
    """Raises ConfigError where a number at any depth of a part of a laws file is not finite or too small."""
    if isinstance(value, dict):
        for name, part in value.items():
            check_numbers(f"{where}.{name}", part, name.removeprefix("dense_"))
    elif isinstance(value, list):
        for part in value:
            check_numbers(where, part, key)
    elif isinstance(value, (int, float)):
        if isinstance(value, bool) or not abs(value) < 1e100:
            raise ConfigError(f"{where} = {value} is not a finite number")
        if value < LEAST.get(key, -math.inf):
            raise ConfigError(f"{where} = {value:g} must be positive")


def check_origin(path, origin):
    """Raises ConfigError where laws were fitted on different data, or with different tokenizers or MoEs.
    Methods of upcycling may have other numbers of experts beside that of the MoE from scratch."""
    for key in ORIGIN:
        values = {family: {str(value) for value in origin.get(family, {}).get(key) or ()}
                  for family in FAMILIES if family != "dense" or key not in MOE}
        if key in MOE and values["moe"] and values["moe"] <= values["upcycled"]:
            values["upcycled"] = values["moe"]
        if len(set().union(*values.values())) > 1:
            said = "; ".join(f"{family} {', '.join(sorted(value[:12] for value in found))}"
                             for family, found in values.items() if found)
            raise ConfigError(f"{path}: laws of different origin are not compared: {key} is {said}; "
                              "fit them apart")


def check_laws(path, content):
    """Raises ConfigError, or another error where the structure is not that of a laws file, unless all laws
    are known and of one origin and numbers are finite."""
    if content["version"] not in (1, 2):
        raise ConfigError(f"{path}: version {content['version']!r} is neither 1 nor 2")
    for part in ("laws", "ranges", "models", "origin", "bits_per_nat", "warm_up"):
        check_numbers(f"{path}: {part}", content.get(part, {}), part)
    check_origin(path, content.get("origin", {}))
    for law, entry in content["laws"].items():
        if law not in LAWS:
            raise ConfigError(f"{path}: laws.{law} is no law that this program knows")
        drawn(f"{path}: laws.{law}", law, entry, 1)
    if not content["laws"]:
        raise ConfigError(f"{path}: holds no laws")


def read_laws(path):
    """(the laws file as a dict, its book). Raises ConfigError."""
    content = read_json(path, 2**24)
    try:
        check_laws(path, content)
        return content, make_book(path, content)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{path}: not of a laws file ({error!r:.80})") from None


# ---------------------------------------------------------------------------------------------------------
# The mixture

def held_out(entry):
    """{what was left out: {"rms" error of ln loss, how many times "beyond" the fitted rows it is}}."""
    return {name: test for name, test in entry.get("held_out", {}).items() if test}


def weigh(entries):
    """{law: weight}, in proportion to the product of 1 / (held-out error) over those of the tests D1, D2 and
    trunk that all laws have. It is the likelihood of a law when each test is one observation of the size of
    its errors. N is no such test, since laws of one fit have the same terms in N."""
    errors = {law: held_out(entry) for law, entry in entries.items()}
    tests = [name for name in ("D1", "D2", "trunk") if all(name in found for found in errors.values())]
    weights = {law: math.prod(1 / max(found[name]["rms"], LEAST_ERROR) for name in tests)
               for law, found in errors.items()}
    kept = {law: w for law, w in weights.items() if w >= LEAST_WEIGHT * sum(weights.values())}
    return {law: w / sum(kept.values()) for law, w in kept.items()}


def drawn(where, law, entry, wanted):
    """{"law", "params", "draws"} of a law's parameters in an entry, with the wanted number of draws, or with
    one where the entry has none. Raises ConfigError where some are missing or no numbers."""
    try:
        names = [name for name in parameter_names(law, A_of_N=True)
                 if name in entry["params"] or name in parameter_names(law)]
        params = {name: float(entry["params"][name]) for name in names}
        draws = entry.get("draws") or {name: [value] for name, value in params.items()}
        draws = np.array([draws[name] for name in names], float)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: its params or draws cannot be used ({error!r:.80})") from None
    count = draws.shape[1]
    pick = [i * count // wanted if count > wanted else i % count for i in range(wanted)] if count > 1 else [0]
    return {"law": law, "params": params, "draws": dict(zip(names, draws[:, pick]))}


def routes_of(path, laws, name, wanted):
    """{"dense", "moe": a law of the same fit or None, "upcycled": {method: law}} for an upcycled law's name,
    or for no name, of the dense and the MoE law alone. Published laws do not name their fit."""
    entry, where = laws.get(name, {}), f"{path}: laws.{name}"
    methods = (entry.get("methods") or {"copy": entry}) if name else {}
    system, fit = {"dense": "dense", "moe": "moe"}, laws
    if "fitted_with" in entry:
        system, fit = entry["fitted_with"], entry.get("beside", {}) | {name: entry}
    elif not name and laws["dense"].get("fitted_with") != laws["moe"].get("fitted_with"):
        fit = {}
    routes = {"upcycled": {method: drawn(f"{where}.methods.{method}", name, of_method, wanted)
                           for method, of_method in methods.items()}}
    for family in ("dense", "moe"):
        law = system.get(family)  # the upcycled law itself where one curve serves both families
        routes[family] = drawn(f"{where}.beside.{law}", family if law == name else law, fit[law],
                               wanted) if law in fit else None
    return routes


def misfit(laws, name, family):
    """Standard deviation of ln loss that a law leaves unexplained: its misfit where the rows tell that from
    noise, else that of its residuals, else (published laws, no rows of the family) an assumed one."""
    entry = laws.get(name if family == "upcycled" else family, {})
    errors = (laws.get(name, {}).get("misfit", {}).get(family), entry.get("rmse_log"),
              entry.get("relative_error"), FORM_ERROR)
    return float(next(error for error in errors if error is not None))


def make_book(path, content, wanted=""):
    """All that an answer needs of a laws file, by one wanted upcycled law or by all of them, as a dict that
    the page gets as JSON. Raises ConfigError.

    {"laws": [{"name", "label", "weight", "routes", "misfit": {family: sd}}], "ranges": {family: {variable:
    [low, high]}}, "reach": {variable: factor}, "moe": {setting: value that the laws hold for}, "models":
    {family: {N: FLOPs of a token / 6 N}}, "methods": of upcycling, "draws": their number, "normal": {family:
    standard normal deviates, one a draw}, "bits_per_nat": of rows.bits_per_nat, "shortest": the fewest tokens
    of a run that tells something, 0 where the laws file does not say its warm-up}
    """
    laws, origin, ratio = content["laws"], content.get("origin", {}), content.get("bits_per_nat")
    names = [law for law in RIVALS if law in laws]
    if not names and not {"dense", "moe"} <= set(laws):
        raise ConfigError(f"{path}: has no upcycled law, nor a dense and a MoE law to compare")
    names = [wanted] if wanted else names
    methods_of = {law: sorted(laws[law].get("methods") or ["copy"]) for law in names}
    methods = max(methods_of.values(), key=len, default=[])
    names = [law for law in methods_of if methods_of[law] == methods]  # the others know fewer methods
    tests = [(name, test.get("beyond") or 1.0) for entry in laws.values()
             for name, test in held_out(entry).items()]
    moe = {key: int((origin.get("moe", {}).get(key) or origin.get("upcycled", {}).get(key) or [default])[0])
           for key, default in MOE.items()}
    ranges = {family: {name: [float(low), float(high)] for name, (low, high) in
                       content.get("ranges", {}).get(family, {}).items()} for family in FAMILIES}
    for family in ("moe", "upcycled"):
        ranges[family] |= {key: [value, value] for key, value in moe.items()}
    weights = weigh({law: laws[law] for law in names}) or {"": 1.0}
    sizes = [10 + len(laws[law]["params"]) * len(laws[law].get("methods") or [law]) for law in weights if law]
    draws = min(DRAWS, NUMBERS // max(sum(sizes), 1))
    random, levels = np.random.default_rng(0), ndtri((np.arange(draws) + 0.5) / draws).round(4)
    return {"laws": [{"name": law, "label": law_name(law), "weight": weight,
                      "routes": routes_of(path, laws, law, draws),
                      "misfit": {family: misfit(laws, law, family) for family in FAMILIES}}
                     for law, weight in weights.items()],
            "ranges": ranges, "moe": moe,
            "reach": {name: max([REACH, *(beyond for kind, beyond in tests if kind == name)])
                      for name in ("N", "D", "D1", "D2", *MOE)}
            | ({"N": 1.0, "D1": 1.0} if "upcycled.head_start" in laws else {}),  # it is of one checkpoint
            "models": {family: {float(model["N"]): model["flops_per_token"] / (6 * model["N"])
                                for model in content.get("models", ()) if model["family"] == family}
                       for family in FAMILIES},
            "methods": methods, "bits_per_nat": ratio and float(ratio),
            "shortest": WARM_UPS * float(content.get("warm_up") or 0.0),
            "draws": draws, "normal": {family: random.permutation(levels) for family in FAMILIES}}


# ---------------------------------------------------------------------------------------------------------
# Losses

def distance(book, family, variables):
    """{variable: ln of how many times it lies beyond the fitted range}; 0 inside, or where none is known."""
    found = {}
    for name, value in variables.items():
        low, high = book["ranges"][family].get(name, (value, value))
        found[name] = np.maximum(np.maximum(np.log(low / value), np.log(value / high)), 0.0)
    return found


def estimate(law, family, variables, method="copy", part="params"):
    """The loss of one family by a law's own "params" or, first in the shape, by each of its "draws"."""
    route = law["routes"]["upcycled"][method] if family == "upcycled" else law["routes"][family]
    shape = (-1,) + (1,) * max(map(np.ndim, variables.values())) if part == "draws" else ()
    params = {name: np.reshape(value, shape) for name, value in route[part].items()}
    return predict(route["law"], params, **variables)


def sample(book, law, family, variables, method="copy"):
    """(draws, ...) losses of one family by a law's draws, each with a draw of misfit and of error of form."""
    losses = estimate(law, family, variables, method, "draws")
    form = sum((EXPERTS_ERROR if name in MOE else FORM_ERROR) * ln_times
               for name, ln_times in distance(book, family, variables).items())
    error = np.sqrt(law["misfit"][family] ** 2 + np.asarray(form) ** 2)
    return losses * np.exp(error * book["normal"][family].reshape((-1,) + (1,) * (losses.ndim - 1)))


def losses_of(book, laws, family, variables, method="copy"):
    """((laws, ...) losses of one family by some laws, (laws * draws, ...) draws of them)."""
    return (np.array([estimate(law, family, variables, method) for law in laws]),
            np.concatenate([sample(book, law, family, variables, method) for law in laws]))


def weights_of_draws(book, weights):
    """(laws * draws,) the weight of each draw, from those of the laws."""
    return np.repeat(weights, book["draws"]) / book["draws"]


def routes(book, options):
    """Those of the {option: family} for whose family all laws of the mixture come with a law."""
    return {option: family for option, family in options.items()
            if all(law["routes"][family] for law in book["laws"])}


def quantile(values, weights, q):
    """The smallest value at which the summed weights reach the share q."""
    order = np.argsort(values, kind="stable")
    summed = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(summed, q * summed[-1] - 1e-12)])
