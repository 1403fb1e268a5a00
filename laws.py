"""Scaling laws as data, and the engine that fits them.

A law is a sum of terms. Each term is a coefficient times powers of N, D, D1, D2, ..., so its logarithm is
linear in (ln coefficient, exponents), and the logarithm of the loss is a log-sum-exp. LAWS holds the laws as
data and one engine fits them all. Token and parameter counts are raw numbers, losses are nats per token, ln
is natural.
"""
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares

from configurator import ConfigError

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
    "upcycled.effective_data": EFFECTIVE,
    "upcycled.effective_data_shared": EFFECTIVE,  # H = 0 is the MoE from scratch
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
HEAD_START = {  # {law with a head start: the parameters that it adds}; H = c D1^gamma
    "upcycled.effective_data": ("c", "gamma"),
    "upcycled.effective_data_shared": ("c", "gamma"),
}
SLOPES = (0.03, 0.1, 0.3, 0.8)  # the grid of exponents that fits start from
RIVALS = [name for name in LAWS if name.startswith("upcycled") and "sparsity" not in name]


def parse_feature(feature):
    """"-D" -> (-1, ["D"]); "D1*D2" -> (1, ["D1", "D2"])."""
    return (-1 if feature.startswith("-") else 1), feature.lstrip("-").split("*")


def parameter_names(law):
    """The names of a law's parameters in the order of the formula: A alpha1 alpha2 alpha3 B beta E."""
    names = []
    for coefficient, exponents in LAWS[law].items():
        names += [coefficient, *exponents] + [*HEAD_START.get(law, ())] * ("-effective" in exponents.values())
    return names


def head_start(law, params, D1):
    """H in tokens: how many tokens of MoE training a dense checkpoint is worth that has seen D1 tokens."""
    with np.errstate(divide="ignore"):
        return np.exp(np.log(params["c"]) + params["gamma"] * np.log(np.asarray(D1, float)))


def predict(law, params, **variables):
    """The loss by the law of that name, in nats per token.

    params is {name: number or array of draws}; variables are N=, D=, D1=, D2=, ... All of them broadcast
    against each other. Under a law with a head start, D1 = 0 is training from scratch.
    """
    logs = {}
    with np.errstate(divide="ignore"):
        if law in HEAD_START:
            effective = variables["D2"] + head_start(law, params, variables["D1"])
            logs["effective"] = np.log(np.asarray(effective, float))
        logs |= {name: np.log(np.asarray(value, float)) for name, value in variables.items()}
    loss = 0.0
    for coefficient, exponents in LAWS[law].items():
        power = 0.0
        for exponent, feature in exponents.items():
            sign, factors = parse_feature(feature)
            power = power + sign * params[exponent] * math.prod(logs[name] for name in factors)
        loss = loss + params[coefficient] * np.exp(power)
    return loss


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


def count_levels(rows, name):
    """How many values a variable takes in these rows."""
    return len({variable(row, name) for row in rows} - {math.nan})


def levels_of_N(rows, system):
    """The number of levels of N in each family of the system."""
    return [count_levels([row for row in rows if row["family"] == family], "N") for family in system]


def missing(rows, system):
    """What these rows lack to fit `system`, [text]: three levels of each variable (N may have one), and
    more rows than parameters."""
    lacks = []
    for law in dict.fromkeys(system.values()):
        families = [family for family in system if system[family] == law]
        absent = [family for family in families if not any(row["family"] == family for row in rows)]
        if absent:
            lacks.append(f"has no {' or '.join(absent)} rows")
            continue
        members = [row for row in rows if row["family"] in families]
        for name in variables_of(law):
            needed, found = 1 if name == "N" else 3, count_levels(members, name)
            if found < needed:
                lacks.append(f"needs {needed} levels of {name}, has {found}")
    if not lacks:
        problem = build(rows, system)
        needed = len(problem.names) + 3
        if len(problem.y) < needed:
            lacks.append(f"has {len(problem.y)} rows for {len(problem.names)} parameters, needs {needed}")
    return lacks


# ---------------------------------------------------------------------------------------------------------
# The engine: rows and a system of laws as arrays

@dataclass
class Head:
    """The head start inside a problem: the term A (D2 + H)^-alpha with ln H linear in the parameters; n
    rows."""
    slot: int            # the term A
    alpha: int           # the place of alpha
    x2: np.ndarray       # (n,) centred ln D2, or ln D from scratch
    here: np.ndarray     # (n,) whether the row's law has the term
    started: np.ndarray  # (n,) whether the row started from a dense checkpoint
    linear: np.ndarray   # (p, n) features of ln H


@dataclass
class Problem:
    """Rows and laws as arrays: p parameters, n rows, K terms. Coefficients are fitted as logs, variables
    are centred."""
    rows: list
    system: dict           # {family: law}
    names: list            # "law:parameter", or "parameter" where laws share it
    is_log: np.ndarray     # (p,) the parameter is the log of a coefficient
    low: np.ndarray        # (p,) bounds keep finite what rows do not identify: exponents within 3, those of
    high: np.ndarray       # (p,) a product within 0.3, a term at the centre above a millionth of the loss
    features: np.ndarray   # (K, p, n)
    offset: np.ndarray     # (K, n) 0 where the row's law has the term, -inf where it has not
    to_raw: np.ndarray     # (p, p) and
    to_raw0: np.ndarray    # (p,) raw = to_raw @ centred + to_raw0
    y: np.ndarray          # (n,) ln loss
    fixed: dict            # {law: {parameter: (value, why)}} that these rows cannot determine
    layout: dict           # {law: (its rows (n,), {place of a coefficient: {place of an exponent: grid}})}
    slots: list            # (K,) the term's coefficient, by name
    head: Head | None
    used: list = field(init=False)  # (K,) places of the parameters that occur in each term

    def __post_init__(self):
        self.used = [np.flatnonzero(np.abs(features).any(axis=1)) for features in self.features]


def identified_terms(rows, law_of_row, share):
    """({law: its terms that these rows can tell apart}, {law: {parameter: (fixed value, why)}}, laws with an
    E of their own).

    One level of N: the B-term folds into an E of the law's own. Two levels of N in every law that shares E: E
    and B N^-beta cannot be told apart, E is 0.
    """
    laws = {law: dict(LAWS[law]) for law in dict.fromkeys(law_of_row)}
    fixed = {law: {} for law in laws}
    sizes = {law: count_levels([row for row, name in zip(rows, law_of_row) if name == law], "N")
             for law in laws if laws[law].get("B") == {"beta": "-N"}}
    alone = {law for law, count in sizes.items() if count == 1}
    joint = [count for law, count in sizes.items() if law not in alone]
    for law, count in sizes.items():
        if law in alone:
            del laws[law]["B"]
            fixed[law] = {name: (0.0, "one level of N: B N^-beta is part of E") for name in ("B", "beta")}
        elif max(joint if "E" in share else [count]) == 2:
            del laws[law]["E"]
            fixed[law] = {"E": (0.0, "two levels of N do not separate E from B N^-beta")}
    return laws, fixed, alone


def check_shares(laws, share, alone):
    """Raises ConfigError where laws would share a coefficient but not its exponents."""
    for name in share:
        users = [law for law in laws if law not in alone and name in laws[law]]
        forms = [laws[law][name] for law in users]
        if len(forms) > 1 and any(form != forms[0] or not set(form) <= set(share) for form in forms):
            raise ConfigError(
                f"--share: {', '.join(users)} can share {name} only where its exponents are the same and "
                f"shared too ({', '.join(forms[0])}): else what is shared depends on the unit of counting")


@dataclass
class Draft:
    """A problem under construction: what its arrays will hold."""
    rows: list
    law_of_row: np.ndarray                        # (n,)
    share: tuple
    alone: set                                    # laws that share nothing
    logs: dict                                    # {variable: (n,) ln of it}
    center: dict                                  # {variable: mean of its ln}
    names: dict = field(default_factory=dict)     # {full name: place}
    bounds: dict = field(default_factory=dict)    # {place: (low, high)} where they are not a coefficient's
    features: dict = field(default_factory=dict)  # {(coefficient, place): (n,)}
    linear: list = field(default_factory=list)    # (place, place, value) off the diagonal of to_raw
    constant: list = field(default_factory=list)  # (place, value) of to_raw0
    head: tuple = ()

    def place(self, law, name):
        """The place of a law's parameter; a new one where it has none yet."""
        full = name if name in self.share and law not in self.alone else f"{law}:{name}"
        return self.names.setdefault(full, len(self.names))

    def feature(self, coefficient, place, here, value):
        self.features.setdefault((coefficient, place), np.zeros(len(self.rows)))[here] = value


def add_term(draft, law, coefficient, exponents):
    """Add one term of a law to the draft; returns {exponent's place: values to start from}."""
    here, a = draft.law_of_row == law, draft.place(law, coefficient)
    draft.feature(coefficient, a, here, 1.0)
    grid, single = {}, {}
    for exponent, feature in exponents.items():
        sign, factors = parse_feature(feature)
        if factors == ["effective"]:
            grid |= add_head(draft, law, coefficient, exponent)
            continue
        j = draft.place(law, exponent)
        centred = math.prod(draft.logs[name][here] - draft.center[name] for name in factors)
        draft.feature(coefficient, j, here, sign * centred)
        if len(factors) == 1:
            single[factors[0]] = (j, sign)
            grid[j] = [-sign * slope for slope in SLOPES]
            draft.bounds[j] = (-3.0, 3.0)
            draft.linear.append((a, j, -sign * draft.center[factors[0]]))
        else:
            v, w = factors
            (jv, sign_v), (jw, sign_w) = single[v], single[w]
            grid[j] = (-0.03, 0.0, 0.03)
            draft.bounds[j] = (-0.3, 0.3)  # at 3 a raw coefficient overflows
            mean_v, mean_w = draft.center[v], draft.center[w]
            draft.linear += [(a, j, sign * mean_v * mean_w), (jv, j, -sign * mean_w * sign_v),
                             (jw, j, -sign * mean_v * sign_w)]
    return grid


def add_head(draft, law, coefficient, exponent):
    """Add ln(D2 + H) with H = c D1^gamma to the draft; returns {place: values to start from}."""
    here = draft.law_of_row == law
    a, alpha = draft.place(law, coefficient), draft.place(law, exponent)
    c, gamma = draft.place(law, "c"), draft.place(law, "gamma")
    D1 = np.array([row.get("D1", 0.0) for row in draft.rows], float)
    x2 = np.log([row.get("D2", row.get("D")) for row in draft.rows])
    started = here & (D1 > 0)
    m1, m2 = np.log(D1[started]).mean(), x2[here].mean()
    x1 = np.where(started, np.log(np.where(started, D1, 1.0)) - m1, 0.0)
    draft.head = (coefficient, alpha, x2 - m2, here, started, {c: started.astype(float), gamma: x1})
    draft.linear += [(a, alpha, m2), (c, gamma, -m1)]
    draft.constant.append((c, m2))
    draft.bounds |= {alpha: (-3.0, 3.0), c: (-7.0, 7.0), gamma: (0.01, 3.0)}
    return {alpha: SLOPES, c: (-2.0, 0.0, 2.0), gamma: (0.3, 0.7, 1.1)}


def build(rows, system, share=("E",)):
    """The Problem of fitting `system` = {family: law} to the rows of those families at once; laws share
    the named parameters. Raises ConfigError where laws would share a coefficient but not its exponents."""
    rows = [row for row in rows if row["family"] in system]
    law_of_row = np.array([system[row["family"]] for row in rows])
    laws, fixed, alone = identified_terms(rows, law_of_row, share)
    check_shares(laws, share, alone)
    factors = set().union(*map(factors_of, laws.values())) - {"effective"}
    logs = {name: np.log([variable(row, name) for row in rows]) for name in factors}
    center = {name: np.nanmean(value) for name, value in logs.items()}
    draft = Draft(rows, law_of_row, share, alone, logs, center)
    layout, offset = {}, {}
    for law, terms in laws.items():
        here = law_of_row == law
        layout[law] = (here, {})
        for coefficient, exponents in terms.items():
            offset.setdefault(coefficient, np.full(len(rows), -np.inf))[here] = 0.0
            grid = add_term(draft, law, coefficient, exponents)
            layout[law][1][draft.place(law, coefficient)] = grid
    return finished(draft, system, fixed, layout, offset)


def finished(draft, system, fixed, layout, offset):
    """The Problem of a complete draft."""
    p, n, slots = len(draft.names), len(draft.rows), list(offset)
    y = np.log([row["loss"] for row in draft.rows])
    features, to_raw, to_raw0 = np.zeros((len(slots), p, n)), np.eye(p), np.zeros(p)
    for (coefficient, j), value in draft.features.items():
        features[slots.index(coefficient), j] = value
    for i, j, value in draft.linear:
        to_raw[i, j] = to_raw[i, j] or value  # laws that share both parameters agree
    for i, value in draft.constant:
        to_raw0[i] = value
    is_log = np.array([name.rpartition(":")[2] in (*slots, "c") for name in draft.names])
    bounds = [draft.bounds.get(j, (y.min() + math.log(1e-6), y.max() + 3.0)) for j in range(p)]
    low, high = np.array(bounds).T
    head = None
    if draft.head:
        coefficient, alpha, x2, here, started, linear = draft.head
        head = Head(slots.index(coefficient), alpha, x2, here, started,
                    np.array([linear.get(j, np.zeros(n)) for j in range(p)]))
    return Problem(draft.rows, system, list(draft.names), is_log, low, high, features,
                   np.array([offset[name] for name in slots]), to_raw, to_raw0, y, fixed, layout, slots, head)


def log_terms(problem, theta):
    """Logs of the terms (K, S, n) at centred parameters theta (S, p); with a head start also ln H and
    ln(D2 + H), (S, n)."""
    terms = np.matmul(theta, problem.features) + problem.offset[:, None, :]
    if not problem.head:
        return terms, None, None
    head = problem.head
    log_h = np.where(head.started, theta @ head.linear, -np.inf)
    effective = np.logaddexp(head.x2, log_h)
    terms[head.slot] -= np.where(head.here, theta[:, head.alpha, None] * effective, 0.0)
    return terms, log_h, effective


def evaluate(problem, theta):
    """ln loss (S, n) and its Jacobian (S, p, n) at centred parameters theta (S, p)."""
    terms, log_h, effective = log_terms(problem, theta)
    top = terms.max(axis=0)
    terms = np.exp(terms - top)
    total = terms.sum(axis=0)
    portion = terms / total  # (K, S, n) of each term in the loss
    jacobian = np.zeros((len(theta), len(problem.names), len(problem.y)))
    for k, places in enumerate(problem.used):
        jacobian[:, places] += portion[k][:, None, :] * problem.features[k, places]
    if problem.head:
        head = problem.head
        term = portion[head.slot] * head.here
        jacobian[:, head.alpha] -= term * effective
        slope = -term * theta[:, head.alpha, None] * np.exp(log_h - effective)  # d ln loss / d ln H
        moved = np.flatnonzero(np.abs(head.linear).any(axis=1))
        jacobian[:, moved] += slope[:, None, :] * head.linear[moved]
    return top + np.log(total), jacobian


# ---------------------------------------------------------------------------------------------------------
# Starts and descent

def huber(residual, delta):
    """Huber's loss: half the square within delta, linear outside."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))


def marquardt_step(problem, theta, gradient, jacobian, weight, damping, free):
    """(trial theta (S, p), decrease promised by the quadratic model (S,)) of one Levenberg-Marquardt step.

    A parameter at a bound that the step would cross is held. A coefficient steps linearly in its raw value,
    which takes 20 times fewer steps than in its logarithm.
    """
    held = ((theta <= problem.low) & (gradient < 0)) | ((theta >= problem.high) & (gradient > 0))
    movable = ~held if free is None else ~held & free
    jacobian, gradient = jacobian * movable[:, :, None], gradient * movable
    hessian = (jacobian * weight[:, None, :]) @ jacobian.transpose(0, 2, 1)
    diagonal = np.einsum("sii->si", hessian)
    added = damping[:, None] * diagonal + 1e-14 * diagonal.max(axis=1, keepdims=True) + 1e-300
    hessian[:, np.arange(theta.shape[1]), np.arange(theta.shape[1])] += added
    step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    gain = (step * gradient).sum(axis=1)
    step = np.where(problem.is_log, np.log(np.maximum(1.0 + step, 0.1)), step)
    return np.where(movable, np.clip(theta + step, problem.low, problem.high), theta), gain


def descend(problem, theta, delta, y=None, weights=None, free=None, max_steps=400, tolerance=1e-11):
    """Many weighted Huber fits at once by Levenberg-Marquardt: theta (S, p) starts -> (theta, objective
    (S,)).

    y and weights: (S, n) or (n,), by default the problem's own losses and 1. free: (p,) False holds a
    parameter.
    """
    theta = np.array(theta, float)
    count, n = len(theta), len(problem.y)
    y = np.broadcast_to(problem.y if y is None else y, (count, n))
    weights = np.broadcast_to(1.0 if weights is None else weights, (count, n))
    final, live = np.full(count, np.inf), np.arange(count)
    damping = np.full(count, 1e-3)
    predicted, jacobian = evaluate(problem, theta)
    for _ in range(max_steps):
        residual = y[live] - predicted
        cost = (weights[live] * huber(residual, delta)).sum(axis=1)
        weight = weights[live] * np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        gradient = (jacobian @ (weight * residual)[:, :, None])[:, :, 0]
        target, gain = marquardt_step(problem, theta[live], gradient, jacobian, weight, damping[live], free)
        trial, trial_jacobian = evaluate(problem, target)
        with np.errstate(invalid="ignore"):
            trial_cost = (weights[live] * huber(y[live] - trial, delta)).sum(axis=1)
        better = trial_cost <= cost
        theta[live[better]] = target[better]
        final[live] = np.where(better, trial_cost, cost)
        settled = better & (gain <= tolerance * cost) & (damping[live] < 1e-2)
        done = settled | (damping[live] > 1e12) | (cost < 1e-26 * n)
        damping[live] = np.where(better, np.maximum(damping[live] / 10, 1e-9), damping[live] * 5)
        predicted = np.where(better[:, None], trial, predicted)[~done]
        jacobian = np.where(better[:, None, None], trial_jacobian, jacobian)[~done]
        live = live[~done]
        if not len(live):
            break
    return theta, final


def grid_starts(problem, keep=3):
    """Starts (S, p) by variable projection: with exponents on a grid and E a share of the lowest loss, the
    other coefficients are a linear least-squares problem, solved in closed form and kept positive. The
    best of each law and each E are joined."""
    low = math.exp(problem.y.min())
    has_constant = any(not exponents for _, terms in problem.layout.values() for exponents in terms.values())
    shares = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95) if has_constant else (0.0,)
    starts = np.zeros((len(shares), keep, len(problem.names)))
    for here, terms in problem.layout.values():
        coefficients = [a for a, exponents in terms.items() if exponents]
        exponents, theta, basis = grid_of_exponents(problem, here, terms, coefficients)
        normal = np.einsum("jgn,kgn->gjk", basis, basis)
        ridge = 1e-9 * np.einsum("gjj->gj", normal).max(axis=1)[:, None, None] * np.eye(len(coefficients))
        mean = basis.mean(axis=2)
        for i, share in enumerate(shares):
            target = 1.0 - share * low / np.exp(problem.y)[here]
            value = np.linalg.solve(normal + ridge, (basis @ target).T[:, :, None])[:, :, 0]
            value = np.maximum(value, 0.02 * target.mean() / mean.T)
            cost = ((np.einsum("gk,kgn->gn", value, basis) - target) ** 2).sum(axis=1)
            best = np.resize(np.argsort(cost)[:keep], keep)
            starts[i, :, exponents] = theta[best][:, exponents].T
            starts[i, :, coefficients] = np.log(value[best]).T
            for a in terms.keys() - set(coefficients):
                starts[i, :, a] = math.log(max(share, 1e-3) * low)
    return starts.reshape(-1, len(problem.names))


def grid_of_exponents(problem, here, terms, coefficients):
    """(places of a law's exponents, parameters (G, p) at each point of their grid, the law's terms there
    over the measured loss (k, G, n) with coefficients of 1)."""
    grid = {j: values for exponents in terms.values() for j, values in exponents.items()}
    theta = np.zeros((math.prod(map(len, grid.values())), len(problem.names)))
    theta[:, list(grid)] = list(itertools.product(*grid.values()))
    slots = [next(k for k, places in enumerate(problem.used) if a in places) for a in coefficients]
    return list(grid), theta, np.exp(log_terms(problem, theta)[0][slots][:, :, here] - problem.y[here])


def robust_sigma(residual, parameters):
    """Standard deviation by the median absolute residual, corrected for the fitted parameters."""
    n = len(residual)
    return 1.4826 * np.median(np.abs(residual)) * math.sqrt(n / max(n - parameters, 1))


@dataclass
class Fit:
    """A fitted system of laws."""
    problem: Problem
    theta: np.ndarray      # (p,) centred
    delta: float           # Huber's, on log residuals
    cost: float
    residual: np.ndarray   # (n,) ln measured - ln fitted

    def params(self, law, theta=None):
        """{parameter: value} of a law of the system; from theta (S, p) arrays of draws."""
        problem, theta = self.problem, self.theta if theta is None else theta
        raw = theta @ problem.to_raw.T + problem.to_raw0
        raw = np.where(problem.is_log, np.exp(raw), raw)
        owned = [name.rpartition(":") for name in problem.names]
        found = {name: raw[..., j] for j, (owner, _, name) in enumerate(owned) if owner in ("", law)}
        for name, (value, _) in problem.fixed[law].items():
            found[name] = np.full(theta.shape[:-1], value)[()]
        return {name: found[name] for name in parameter_names(law)}


def fit(rows, system, share=("E",), delta="auto"):
    """The Fit of a system {family: law}: variable-projection starts, then Huber least squares on ln loss
    with the analytic Jacobian. delta "auto" is 1.345 robust standard deviations of the residuals."""
    problem = build(rows, system, share)
    theta, cost = descend(problem, grid_starts(problem), 0.02 if delta == "auto" else max(delta, 0.005),
                          max_steps=7, tolerance=1e-4)
    theta = theta[np.argsort(cost)[:2]]
    width = delta
    for tolerance in (1e-5, 1e-5, 1e-11) if delta == "auto" else (1e-11,):
        if delta == "auto":
            residual = problem.y - evaluate(problem, theta[:1])[0][0]
            width = max(1.345 * robust_sigma(residual, len(problem.names)), 1e-7)
        theta, cost = descend(problem, theta, width, tolerance=tolerance)
        theta = theta[[np.argmin(cost)]]
    theta, cost = polish(problem, theta[0], width, float(np.min(cost)))
    return Fit(problem, theta, width, cost, problem.y - evaluate(problem, theta[None])[0][0])


def polish(problem, theta, delta, cost):
    """(theta, objective) after scipy's least squares from theta, over the parameters that are inside their
    bounds."""
    inside = (theta > problem.low) & (theta < problem.high)

    def full(part):
        return np.where(inside, np.bincount(np.flatnonzero(inside), part, len(theta)), theta)[None]

    best = least_squares(
        lambda part: evaluate(problem, full(part))[0][0] - problem.y, theta[inside],
        jac=lambda part: evaluate(problem, full(part))[1][0, inside].T,
        loss="huber", f_scale=delta, x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=50)
    found = full(best.x)[0]
    if best.cost <= cost and (found >= problem.low).all() and (found <= problem.high).all():
        return found, float(best.cost)
    return theta, cost
