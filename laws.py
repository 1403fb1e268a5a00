"""Scaling laws as data, and what they predict.

A law is a sum of terms. Each term is a coefficient times powers of N, D, D1, D2, ..., so its logarithm is
linear in (ln coefficient, exponents), and the logarithm of the loss is a log-sum-exp. LAWS holds the laws as
data; engine.py fits them all. Token and parameter counts are raw numbers, losses are nats per token, ln is
natural.
"""
import math

import numpy as np

# ---------------------------------------------------------------------------------------------------------
# The laws: {coefficient: {exponent: feature}}. The feature "-D" is -ln D, "D1*D2" is ln D1 * ln D2, and
# "-effective" is -ln(D2 + H), where H is the head start that the dense checkpoint gives, in tokens.

N_AND_E = {"B": {"beta": "-N"}, "E": {}}
SPARSITY = {"A": {"alpha": "-sparsity", "beta": "-N_active"}, "E": {}}
SPARSITY_ADDITIVE = {"A": {"alpha": "-sparsity"}, "B": {"beta": "-N_active"}, "E": {}}
EFFECTIVE = {"A": {"alpha": "-effective"}, **N_AND_E}
LAWS = {
    "dense": {"A": {"alpha": "-D"}, **N_AND_E},
    "moe": {"A": {"alpha": "-D"}, **N_AND_E},
    # arXiv 2502.03009: A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N^-beta + E, and its rivals
    "upcycled": {"A": {"alpha1": "-D1", "alpha2": "-D2", "alpha3": "D1*D2"}, **N_AND_E},
    "upcycled.no_interaction": {"A": {"alpha1": "-D1", "alpha2": "-D2"}, **N_AND_E},
    "upcycled.additive": {"A1": {"alpha1": "-D1"}, "A2": {"alpha2": "-D2"}, **N_AND_E},
    # A (D2 + H)^-alpha + B N^-beta + E: the head start H, in tokens, fades
    "upcycled.effective_data": EFFECTIVE,
    # the same curve for the MoE from scratch, which is H = 0, in all that follow
    "upcycled.effective_data_shared": EFFECTIVE,
    "upcycled.saturating": EFFECTIVE,
    "upcycled.handicap": EFFECTIVE,  # times e^kappa for upcycled runs
    "upcycled.loss_matching": EFFECTIVE,
    "upcycled.loss_matching_0": EFFECTIVE,
    # arXiv 2502.03009 at fixed data, sparsity = N_total / N_active
    "moe.sparsity": SPARSITY, "moe.sparsity_additive": SPARSITY_ADDITIVE,
    "upcycled.sparsity": SPARSITY, "upcycled.sparsity_additive": SPARSITY_ADDITIVE,
    # arXiv 2502.05172 with the number of experts itself, where the paper puts a saturating function of it
    "moe.joint": {"a": {"delta": "experts", "alpha": "N_active", "gamma": "N_active*experts"},
                  "b": {"omega": "experts", "beta": "D", "zeta": "D*experts"}, "c": {}},
    # arXiv 2501.12370, active_share = 1 - S = top-k / experts
    "moe.optimal_sparsity": {
        "a": {"alpha": "-N_total"}, "b": {"beta": "-D"}, "c": {"lambda": "-active_share"},
        "d": {"delta": "-active_share", "gamma": "-N_total"}, "e": {}},
}
HEAD_START = {  # {law with a head start: the parameters that it adds}
    "upcycled.effective_data": ("c", "gamma"),         # H = c D1^gamma
    "upcycled.effective_data_shared": ("c", "gamma"),
    "upcycled.saturating": ("c", "gamma", "H_max"),    # H^-alpha = (c D1^gamma)^-alpha + H_max^-alpha
    "upcycled.handicap": ("c", "gamma", "kappa"),
    "upcycled.loss_matching": ("delta",),              # L_moe(N, H) = e^delta L_dense(N, D1)
    "upcycled.loss_matching_0": (),                    # delta = 0: nothing is fitted to upcycled runs
}
BY_METHOD = ("c", "kappa")  # each method of upcycling has its own; gamma and H_max are common to all methods
MATCHING = ("upcycled.loss_matching", "upcycled.loss_matching_0")
SHARED_CURVE = [law for law in HEAD_START if law != "upcycled.effective_data"]
LEAST_GAP = 1e-4  # loss matching takes the dense loss to lie at least this share of it above the MoE's asymptote
SLOPES = (0.03, 0.1, 0.3, 0.8)  # the grid of exponents that fits start from
RIVALS = [law for law in LAWS if law.startswith("upcycled") and "sparsity" not in law]


def parse_feature(feature):
    """"-D" -> (-1, ["D"]); "D1*D2" -> (1, ["D1", "D2"])."""
    return (-1 if feature.startswith("-") else 1), feature.lstrip("-").split("*")


def parameter_names(law, A_of_N=False):
    """The names of a law's parameters in the order of the formula: A alpha1 alpha2 alpha3 B beta E.

    With A_of_N, A is A N^-nu. Loss matching has the dense law's parameters too, as dense_A, dense_alpha, ...
    """
    names = []
    for coefficient, exponents in law_terms(law, A_of_N).items():
        names += [coefficient, *exponents] + [*HEAD_START.get(law, ())] * ("-effective" in exponents.values())
    if law in MATCHING:
        names += [f"dense_{name}" for name in parameter_names("dense", A_of_N)]
    return list(dict.fromkeys(names))


def law_terms(law, A_of_N=False):
    """The terms of a law. With A_of_N the terms of data are also proportional to N^-nu, in laws that know
    N."""
    terms = LAWS[law]
    if not A_of_N or terms.get("B") != {"beta": "-N"}:
        return terms
    return {name: exponents | {"nu": "-N"} if name in ("A", "A1", "A2") else exponents
            for name, exponents in terms.items()}


def head_start(law, params, N=None, D1=0.0):
    """H in tokens: how many tokens of MoE training a dense checkpoint is worth that has seen D1 tokens.

    Only loss matching needs N: its H solves L_moe(N, H) = e^delta L_dense(N, D1).
    """
    alpha = params["alpha"]
    with np.errstate(divide="ignore", over="ignore"):
        if law in MATCHING:
            dense = {name.removeprefix("dense_"): params[name] for name in params if name.startswith("dense_")}
            goal = np.exp(params.get("delta", 0.0)) * predict("dense", dense, N=N, D=D1)
            floor = params["B"] * np.asarray(N, float) ** -params["beta"] + params["E"]
            gap = np.maximum(goal - floor, LEAST_GAP * goal)
            scale = params["A"] * np.asarray(N, float) ** -params.get("nu", 0.0)
            return (gap / scale) ** (-1 / alpha)
        power = np.exp(np.log(params["c"]) + params["gamma"] * np.log(np.asarray(D1, float)))
        if "H_max" in params:
            return (power ** -alpha + params["H_max"] ** -alpha) ** (-1 / alpha)
        return power


def predict(law, params, **variables):
    """The loss by the law of that name, in nats per token.

    params is {name: number or array of draws}; variables are N=, D=, D1=, D2=, ... All of them broadcast
    against each other. Under a law with a head start, D1 = 0 or D= instead of D1= and D2= is training from
    scratch.
    """
    variables = {name: np.asarray(value, float) for name, value in variables.items()}
    factor = 1.0
    with np.errstate(divide="ignore"):
        if law in HEAD_START:
            D1, D2 = variables.get("D1", np.zeros(())), variables.get("D2", variables.get("D"))
            head = head_start(law, params, variables.get("N"), D1)
            variables["effective"] = D2 + np.where(D1 > 0, head, 0.0)
            factor = np.exp(np.where(D1 > 0, params.get("kappa", 0.0), 0.0))
        logs = {name: np.log(value) for name, value in variables.items()}
    loss = 0.0
    for coefficient, exponents in law_terms(law, "nu" in params).items():
        power = 0.0
        for exponent, feature in exponents.items():
            sign, factors = parse_feature(feature)
            power = power + sign * params[exponent] * math.prod(logs[name] for name in factors)
        loss = loss + params[coefficient] * np.exp(power)
    return factor * loss


# ---------------------------------------------------------------------------------------------------------
# What rows hold

def variable(row, name):
    """The row's value of a law's variable; nan where it has none."""
    try:
        if name == "sparsity":
            return row["N_total"] / row["N_active"]
        if name == "active_share":
            return row["num_experts_per_tok"] / row["num_local_experts"]
        return row[{"experts": "num_local_experts"}.get(name, name)]
    except KeyError:
        return math.nan


def factors_of(terms):
    """The names in the features of a law's terms."""
    return {name for exponents in terms.values() for feature in exponents.values()
            for name in parse_feature(feature)[1]}


def variables_of(law):
    """The variables of a law, sorted: N, D, D1, ..."""
    factors = factors_of(LAWS[law])
    return sorted(factors - {"effective"} | ({"D1", "D2"} if "effective" in factors else set()))


def levels(values):
    """The distinct levels of some numbers, ascending: each is the smallest of the values within 5 % above
    it."""
    found = []
    for value in sorted(value for value in set(values) if not math.isnan(value)):
        if not found or value > 1.05 * found[-1]:
            found.append(value)
    return found


def count_levels(rows, name):
    """How many levels a variable has in these rows."""
    return len(levels(variable(row, name) for row in rows))


def levels_of_N(rows, system):
    """The number of levels of N in each family of the system {family: law}."""
    return [count_levels([row for row in rows if row["family"] == family], "N") for family in system]


def published_check(params, N, D1, D2):
    """Loss matching from dense and MoE laws alone, relative to an upcycled law: its prediction / the law's -
    1.

    params is {"dense", "moe", "upcycled": {parameter: value}}, as laws/liew2025.json has them. With D1 tokens
    per dense checkpoint and D2 after it, all broadcast against each other.
    """
    matched = params["moe"] | {f"dense_{name}": value for name, value in params["dense"].items()}
    predicted = predict("upcycled.loss_matching_0", matched, N=N, D1=D1, D2=D2)
    return predicted / predict("upcycled", params["upcycled"], N=N, D1=D1, D2=D2) - 1
