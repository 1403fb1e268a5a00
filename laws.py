"""Scaling laws as data, and what they predict.

A law is a sum of terms. Each term is a coefficient times powers of N, D, D1, D2, ..., so its logarithm is
linear in (ln coefficient, exponents), and the logarithm of the loss is a log-sum-exp. LAWS holds the laws as
data; engine.py fits them all. Counts are raw numbers, losses are nats per token, ln is natural.
"""
import math

import numpy as np

# ---------------------------------------------------------------------------------------------------------
# The laws: {coefficient: {exponent: feature}}. The feature "-D" is -ln D, "D1*D2" is ln D1 * ln D2, and
# "-effective" is -ln(D2 + H), where H is the head start that the dense checkpoint gives, in tokens.

N_AND_E = {"B": {"beta": "-N"}, "E": {}}
SPARSITY = {"A": {"alpha": "-sparsity", "beta": "-N_active"}, "E": {}}
SPARSITY_ADDITIVE = {"A": {"alpha": "-sparsity"}, "B": {"beta": "-N_active"}, "E": {}}
HEAD_START = {  # {law with a term A (D2 + H)^-alpha: the parameters of H and of a factor on the loss}
    "upcycled.effective_data": ("c", "gamma"),         # H = c D1^gamma
    # the curve of the MoE from scratch, which is H = 0, in all that follow
    "upcycled.effective_data_shared": ("c", "gamma"),
    "upcycled.saturating": ("c", "gamma", "H_max"),    # H^-alpha = (c D1^gamma)^-alpha + H_max^-alpha
    "upcycled.handicap": ("c", "gamma", "kappa"),      # times e^kappa for upcycled runs
    "upcycled.saturating_handicap": ("c", "gamma", "H_max", "kappa"),
    "upcycled.loss_matching": ("delta",),              # L_moe(N, H) = e^delta L_dense(N, D1)
    "upcycled.loss_matching_handicap": ("delta", "kappa"),
    "upcycled.loss_matching_0": (),                    # delta = 0: nothing is fitted to upcycled runs
    "upcycled.head_start": ("H",),  # a pilot on one dense checkpoint: one N and one D1, so H is one number
}
LAWS = {
    "dense": {"A": {"alpha": "-D"}, **N_AND_E},
    "moe": {"A": {"alpha": "-D"}, **N_AND_E},
    # arXiv 2502.03009: A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N^-beta + E, and its rivals
    "upcycled": {"A": {"alpha1": "-D1", "alpha2": "-D2", "alpha3": "D1*D2"}, **N_AND_E},
    "upcycled.no_interaction": {"A": {"alpha1": "-D1", "alpha2": "-D2"}, **N_AND_E},
    "upcycled.additive": {"A1": {"alpha1": "-D1"}, "A2": {"alpha2": "-D2"}, **N_AND_E},
    **dict.fromkeys(HEAD_START, {"A": {"alpha": "-effective"}, **N_AND_E}),
    "dense.local": {"A": {"alpha": "-D"}},  # the checkpoint continued: a power law at one N, near D1
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
MATCHING = [law for law in HEAD_START if "loss_matching" in law]
SHARED_CURVE = [law for law in HEAD_START if law != "upcycled.effective_data"]
LEAST_GAP = 1e-4  # loss matching: the dense loss counts as at least this share above the MoE's asymptote
RIVALS = [law for law in LAWS if law.startswith("upcycled") and "sparsity" not in law]
NAMES = {  # where the name of a law is not that of its key
    "": "dense and MoE", "moe": "MoE from scratch", "upcycled": "interaction",
    "upcycled.effective_data_shared": "effective data (shared)",
    "upcycled.saturating": "saturating head start", "upcycled.head_start": "free head start",
    "upcycled.loss_matching_0": "loss matching (delta = 0)"}


# ---------------------------------------------------------------------------------------------------------
# Words

def law_name(law):
    """The name of a law in words."""
    plain = law.removeprefix("upcycled.") if law in RIVALS else law
    return NAMES.get(law, plain.replace(".", ": ").replace("_", " "))


TIE = 1e-12  # the relative size of a step that takes a tie over the edge


def short(value):
    """A count in words, as 50.6B; a large one as 1.5e21. Ties round up, as they do on the planner's page."""
    value *= 1 + TIE
    if value >= 1e15 or value < 1:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}" + f"e{int(exponent)}" * (int(exponent) != 0)
    value = float(f"{value:.3g}")
    units = (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")
    unit, name = next(pair for pair in units if value >= pair[0])
    return f"{value / unit:.4g}{name}"  # of three digits, or 1000T


# ---------------------------------------------------------------------------------------------------------
# What laws predict

def parse_feature(feature):
    """"-D" -> (-1, ["D"]); "D1*D2" -> (1, ["D1", "D2"])."""
    return (-1 if feature.startswith("-") else 1), feature.lstrip("-").split("*")


def parameter_names(law, A_of_N=False):
    """The names of a law's parameters in the order of the formula: A alpha1 alpha2 alpha3 B beta E. With
    A_of_N, A is A N^-nu. Loss matching has the dense law's too, as dense_A, dense_alpha, ..."""
    names = []
    for coefficient, exponents in law_terms(law, A_of_N).items():
        names += [coefficient, *exponents] + [*HEAD_START.get(law, ())] * ("-effective" in exponents.values())
    if law in MATCHING:
        names += [f"dense_{name}" for name in parameter_names("dense", A_of_N)]
    return list(dict.fromkeys(names))


def law_terms(law, A_of_N=False):
    """The terms of a law. With A_of_N those of data are also proportional to N^-nu, in laws that know N."""
    depends = A_of_N and LAWS[law].get("B") == {"beta": "-N"}
    return {name: exponents | ({"nu": "-N"} if depends and name in ("A", "A1", "A2") else {})
            for name, exponents in LAWS[law].items()}


def head_start(law, params, N=None, D1=None):
    """H in tokens: how many tokens of MoE training a dense checkpoint is worth that has seen D1 tokens. Only
    loss matching needs N: its H solves L_moe(N, H) = e^delta L_dense(N, D1)."""
    alpha = params["alpha"]
    with np.errstate(divide="ignore", over="ignore"):
        if law in MATCHING:
            dense = {name[6:]: value for name, value in params.items() if name.startswith("dense_")}
            goal = np.exp(params.get("delta", 0.0)) * predict("dense", dense, N=N, D=D1)
            floor = params["B"] * np.asarray(N, float) ** -params["beta"] + params["E"]
            gap = np.maximum(goal - floor, LEAST_GAP * goal)
            scale = params["A"] * np.asarray(N, float) ** -params.get("nu", 0.0)
            return (gap / scale) ** (-1 / alpha)
        if "H" in params:
            return np.asarray(params["H"], float)
        power = np.exp(np.log(params["c"]) + params["gamma"] * np.log(np.asarray(D1, float)))
        if "H_max" in params:
            return (power ** -alpha + params["H_max"] ** -alpha) ** (-1 / alpha)
        return power


def predict(law, params, **variables):
    """The loss by the law of that name, in nats per token. params is {name: number or array of draws},
    variables are N=, D=, D1=, D2=, ...; all broadcast. Under a law with a head start, D= instead of D1= and
    D2= is training from scratch."""
    variables = {name: np.asarray(value, float) for name, value in variables.items()}
    factor = 1.0
    if law in HEAD_START and "D1" in variables:
        head = head_start(law, params, variables.get("N"), variables["D1"])
        variables["effective"] = variables["D2"] + head
        factor = np.exp(params.get("kappa", 0.0))
    elif law in HEAD_START:
        variables["effective"] = variables["D"]
    loss = 0.0
    for coefficient, exponents in law_terms(law, "nu" in params).items():
        power = 0.0
        for exponent, feature in exponents.items():
            sign, factors = parse_feature(feature)
            power = power + sign * params[exponent] * math.prod(np.log(variables[name]) for name in factors)
        loss = loss + params[coefficient] * np.exp(power)
    return factor * loss


def overtaking(D1, behind, points=161):
    """D2* (...,): after how many tokens a MoE from scratch first leads the upcycled model, on as many tokens:
    0 from the start, inf not within 10,000 times D1. behind(tokens (n,)) is (..., n) the loss from scratch
    less that of the upcycled model. It is asked at so many points, and is a straight line between them."""
    x = D1 * np.geomspace(1e-4, 1e4, points)
    difference = behind(x)
    leads = difference < -1e-9  # curves that merge do not cross
    place = leads.argmax(axis=-1)
    before = np.maximum(place - 1, 0)
    high = np.take_along_axis(difference, before[..., None], -1)[..., 0]
    low = np.take_along_axis(difference, place[..., None], -1)[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.exp(np.log(x[before]) + np.log(x[place] / x[before]) * high / (high - low))
    return np.where(leads.any(axis=-1), np.where(place == 0, 0.0, root), math.inf)
