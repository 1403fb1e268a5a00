"""Scaling laws as data, and the engine that fits them.

A law is a sum of terms, each a coefficient times powers of N, D, D1, D2, ...: in logs a log-sum-exp of features that
are linear in (ln coefficient, exponents). LAWS holds them as data and one engine fits them all. Token and parameter
counts are raw numbers, losses nats per token, ln natural.
"""
import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares

from configurator import ConfigError

# ---------------------------------------------------------------------------------------------------------
# The laws: {coefficient: {exponent: feature}}. "-D" is -ln D, "D1*D2" is ln D1 * ln D2, "-effective" is
# -ln(D2 + c D1^gamma), which adds the parameters c and gamma.

N_AND_E = {"B": {"beta": "-N"}, "E": {}}
SPARSITY = {"A": {"alpha": "-sparsity", "beta": "-N_active"}, "E": {}}
SPARSITY_ADDITIVE = {"A": {"alpha": "-sparsity"}, "B": {"beta": "-N_active"}, "E": {}}
LAWS = {
    "dense": {"A": {"alpha": "-D"}, **N_AND_E},
    "moe": {"A": {"alpha": "-D"}, **N_AND_E},
    # arXiv 2502.03009: A D1^-alpha1 D2^(-alpha2 + alpha3 ln D1) + B N^-beta + E, and its rivals
    "upcycled": {"A": {"alpha1": "-D1", "alpha2": "-D2", "alpha3": "D1*D2"}, **N_AND_E},
    "upcycled.no_interaction": {"A": {"alpha1": "-D1", "alpha2": "-D2"}, **N_AND_E},
    "upcycled.additive": {"A1": {"alpha1": "-D1"}, "A2": {"alpha2": "-D2"}, **N_AND_E},
    "upcycled.effective_data": {"A": {"alpha": "-effective"}, **N_AND_E},
    "upcycled.effective_data_shared": {"A": {"alpha": "-effective"}, **N_AND_E},  # from-scratch MoE is D1 = 0 of it
    # arXiv 2502.03009 at fixed data, sparsity = N_total / N_active
    "moe.sparsity": SPARSITY, "moe.sparsity_additive": SPARSITY_ADDITIVE,
    "upcycled.sparsity": SPARSITY, "upcycled.sparsity_additive": SPARSITY_ADDITIVE,
    # arXiv 2502.05172 with the number of experts itself, where the paper puts a saturating function of it
    "moe.joint": {"a": {"delta": "experts", "alpha": "N_active", "gamma": "N_active*experts"},
                  "b": {"omega": "experts", "beta": "D", "zeta": "D*experts"}, "c": {}},
    # arXiv 2501.12370, active_share = 1 - S = top-k / experts
    "moe.optimal_sparsity": {"a": {"alpha": "-N_total"}, "b": {"beta": "-D"}, "c": {"lambda": "-active_share"},
                             "d": {"delta": "-active_share", "gamma": "-N_total"}, "e": {}},
}
SLOPES = (0.03, 0.1, 0.3, 0.8)  # the grid of exponents that fits start from
RIVALS = [name for name in LAWS if name.startswith("upcycled") and "sparsity" not in name]


def parse_feature(feature):
    """"-D" -> (-1, ["D"]); "D1*D2" -> (1, ["D1", "D2"])."""
    return (-1 if feature.startswith("-") else 1), feature.lstrip("-").split("*")


def predict(law, params, **variables):
    """Loss by the law of that name, nats per token; params {name: number or array of draws}, variables N=, D=, D1=, ...

    All broadcast against each other. Under effective data D1 = 0 is training from scratch.
    """
    with np.errstate(divide="ignore"):
        logs = {name: np.log(np.asarray(value, float)) for name, value in variables.items()}
    loss = 0.0
    for coefficient, exponents in LAWS[law].items():
        power = 0.0
        for exponent, feature in exponents.items():
            sign, factors = parse_feature(feature)
            if factors == ["effective"]:
                value = np.logaddexp(logs["D2"], np.log(params["c"]) + params["gamma"] * logs["D1"])
            else:
                value = math.prod(logs[name] for name in factors)
            power = power + sign * params[exponent] * value
        loss = loss + params[coefficient] * np.exp(power)
    return loss


# ---------------------------------------------------------------------------------------------------------
# The engine: features of a system of laws, prediction with its Jacobian, starts, descent

@dataclass
class Problem:
    """Rows and laws as arrays; p parameters, n rows, K terms. Coefficients are fitted as logs, variables are centred."""
    rows: list
    system: dict           # {family: law}
    names: list            # "law:parameter", or "parameter" where laws share it
    is_log: np.ndarray     # (p,) the parameter is the log of a coefficient
    slot: np.ndarray       # (p,) the term it belongs to
    features: np.ndarray   # (p, n)
    offset: np.ndarray     # (K, n) 0 where the row's law has the term, -inf where not
    to_raw: np.ndarray     # (p, p) and
    to_raw0: np.ndarray    # (p,) raw = to_raw @ centred + to_raw0
    y: np.ndarray          # (n,) ln loss
    fixed: dict            # {law: {parameter: (value, why)}} that these rows cannot determine
    layout: dict           # {law: (its rows (n,), {coefficient's place in p: {exponent's place: values to start from}})}
    limit: np.ndarray      # (p,) bound on the size of an exponent
    head: tuple | None = None  # effective data: rows of alpha, c, gamma; centred ln D1, ln D2; which rows use it; which have D1
    by_slot: np.ndarray = field(init=False)  # (K, p, n)
    low: np.ndarray = field(init=False)      # (p,) bounds that keep what is not identified finite: exponents within 3 (of a product .3),
    high: np.ndarray = field(init=False)     # (p,) a term at least a millionth of the loss at the centre, a head start within e^7

    def __post_init__(self):
        self.low = np.where(self.is_log, self.y.min() + math.log(1e-6), -self.limit)
        self.high = np.where(self.is_log, self.y.max() + 3.0, self.limit)
        if self.head:
            _, c, gamma = self.head[:3]
            self.low[c], self.high[c], self.low[gamma] = -7.0, 7.0, 0.01
        self.by_slot = np.where(self.slot[None, :, None] == np.arange(len(self.offset))[:, None, None], self.features, 0.0)


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


def count_levels(rows, name):
    return len({variable(row, name) for row in rows} - {math.nan})


def n_levels(rows, system):
    """Levels of N of each family of the system."""
    return [count_levels([row for row in rows if row["family"] == family], "N") for family in system]


def build(rows, system, share=("E",)):
    """The Problem of fitting `system` = {family: law} to the rows of those families, at once, laws sharing the named parameters.

    One level of N: the B-term folds into an E of the law's own. Two levels of N in every law that shares E: E and B N^-beta
    cannot be told apart, E is 0. Raises ConfigError where laws would share a coefficient but not its exponents.
    """
    rows = [row for row in rows if row["family"] in system]
    of_row = np.array([system[row["family"]] for row in rows])
    laws = {law: dict(LAWS[law]) for law in dict.fromkeys(system.values())}
    members = {law: [row for row, name in zip(rows, of_row) if name == law] for law in laws}
    sizes = {law: count_levels(members[law], "N") for law in laws if laws[law].get("B") == {"beta": "-N"}}
    solo, fixed = {law for law, count in sizes.items() if count == 1}, {law: {} for law in laws}
    for law, count in sizes.items():
        others = [c for name, c in sizes.items() if name not in solo] if "E" in share and law not in solo else [count]
        if count == 1:
            del laws[law]["B"]
            fixed[law] = {name: (0.0, "one level of N: B N^-beta is part of E") for name in ("B", "beta")}
        elif max(others) == 2:
            del laws[law]["E"]
            fixed[law] = {"E": (0.0, "two levels of N do not separate E from B N^-beta")}

    for name in share:
        users = [law for law in laws if law not in solo and name in laws[law]]
        forms = [laws[law][name] for law in users]
        if len(forms) > 1 and any(form != forms[0] or not set(form) <= set(share) for form in forms):
            raise ConfigError(f"--share: {', '.join(users)} can share {name} only where its exponents are the same and shared too "
                              f"({', '.join(forms[0])}): else what is shared depends on the unit of counting")

    features_used = {v for law in laws.values() for e in law.values() for f in e.values() for v in parse_feature(f)[1]}
    logs = {v: np.log([variable(row, v) for row in rows]) for v in features_used - {"effective"}}
    center = {v: np.nanmean(value) for v, value in logs.items()}
    index, slots, features, log_names, slot = {}, {}, [], [], []
    offset = {}

    def position(law, name, coefficient, is_log=False):
        full = name if name in share and law not in solo else f"{law}:{name}"
        if full not in index:
            index[full] = len(index)
            features.append(np.zeros(len(rows)))
            slot.append(slots.setdefault(coefficient, len(slots)))
            log_names.append(is_log)
        return index[full]

    head, linear, constant, products, layout = None, [], [], [], {}
    for law, terms in laws.items():
        here = of_row == law
        layout[law] = (here, {})
        for coefficient, exponents in terms.items():
            a = position(law, coefficient, coefficient, True)
            features[a][here] = 1.0
            offset.setdefault(coefficient, np.full(len(rows), -np.inf))[here] = 0.0
            grid = layout[law][1][a] = {}
            single = {}
            for exponent, feature in exponents.items():
                j = position(law, exponent, coefficient)
                sign, factors = parse_feature(feature)
                if factors == ["effective"]:  # u = m2 + logaddexp(x2, ln c' + gamma x1)
                    c, gamma = position(law, "c", coefficient, True), position(law, "gamma", coefficient)
                    d1 = np.array([row.get("D1", 0.0) for row in rows], float)
                    x2 = np.log([row.get("D2", row.get("D")) for row in rows])
                    m1, m2 = np.log(d1[here & (d1 > 0)]).mean(), x2[here].mean()
                    started = here & (d1 > 0)
                    x1 = np.where(started, np.log(np.where(started, d1, 1.0)) - m1, 0.0)
                    grid |= {j: SLOPES, c: (-2.0, 0.0, 2.0), gamma: (0.3, 0.7, 1.1)}
                    head = (j, c, gamma, x1, x2 - m2, here, started)
                    linear += [(a, j, m2), (c, gamma, -m1)]
                    constant.append((c, m2))
                    continue
                features[j][here] = sign * math.prod(logs[v][here] - center[v] for v in factors)
                if len(factors) == 1:
                    single[factors[0]] = (j, sign)
                    grid[j] = [-sign * slope for slope in SLOPES]
                    linear.append((a, j, -sign * center[factors[0]]))
                else:
                    v, w = factors
                    grid[j] = (-0.03, 0.0, 0.03)
                    products.append(j)
                    linear += [(a, j, sign * center[v] * center[w]),
                               (single[v][0], j, -sign * center[w] * single[v][1]),
                               (single[w][0], j, -sign * center[v] * single[w][1])]
    to_raw, to_raw0 = np.eye(len(index)), np.zeros(len(index))
    limit = np.full(len(index), 3.0)
    limit[products] = 0.3  # at 3 a raw coefficient overflows
    for i, j, value in linear:
        if to_raw[i, j] == 0:  # laws that share both parameters agree
            to_raw[i, j] = value
    for i, value in constant:
        to_raw0[i] = value
    return Problem(rows, system, list(index), np.array(log_names), np.array(slot), np.array(features), np.array([offset[s] for s in slots]),
                   to_raw, to_raw0, np.log([row["loss"] for row in rows]), fixed, layout, limit, head)


def log_terms(problem, theta):
    """Logs of a law's terms (K, S, n); under effective data also ln of the head start and ln of the effective tokens (S, n)."""
    terms, z, u = np.matmul(theta, problem.by_slot) + problem.offset[:, None, :], None, None
    if problem.head:
        a, c, gamma, x1, x2, here, started = problem.head
        z = np.where(started, theta[:, c, None] + theta[:, gamma, None] * x1, -np.inf)
        u = np.logaddexp(x2, z)
        terms[problem.slot[a]] -= np.where(here, theta[:, a, None] * u, 0.0)
    return terms, z, u


def evaluate(problem, theta):
    """ln loss (S, n) and its Jacobian (S, p, n) at centred parameters theta (S, p)."""
    terms, z, u = log_terms(problem, theta)
    top = terms.max(axis=0)
    terms = np.exp(terms - top)
    total = terms.sum(axis=0)
    share = (terms / total).transpose(1, 0, 2)  # (S, K, n)
    jacobian = share[:, problem.slot] * problem.features
    if problem.head:
        a, c, gamma, x1, _, here, _ = problem.head
        mine = share[:, problem.slot[a]] * here
        jacobian[:, a] = -mine * u
        jacobian[:, c] = -mine * theta[:, a, None] * np.exp(z - u)
        jacobian[:, gamma] = jacobian[:, c] * x1
    return top + np.log(total), jacobian


def huber(residual, delta):
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))


def descend(problem, theta, delta, y=None, weights=None, free=None, max_steps=400, tolerance=1e-11):
    """Many weighted Huber fits at once by Levenberg-Marquardt: theta (S, p) starts -> (theta, objective (S,)).

    y and weights: (S, n) or (n,), default the problem's own losses and 1; free: (p,) False holds a parameter at its start.
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
        gradient = (jacobian @ (weight * residual)[:, :, None])
        held = ((theta[live] <= problem.low) & (gradient[:, :, 0] < 0)) | ((theta[live] >= problem.high) & (gradient[:, :, 0] > 0))
        open_ = ~held if free is None else ~held & free
        jacobian, gradient = jacobian * open_[:, :, None], gradient * open_[:, :, None]
        hessian = (jacobian * weight[:, None, :]) @ jacobian.transpose(0, 2, 1)
        diagonal = np.einsum("sii->si", hessian)
        floor = 1e-14 * diagonal.max(axis=1, keepdims=True) + 1e-300
        added = damping[live, None] * diagonal + floor
        hessian[:, np.arange(theta.shape[1]), np.arange(theta.shape[1])] += added
        step = np.linalg.solve(hessian, gradient)[:, :, 0]
        gain = (step * gradient[:, :, 0]).sum(axis=1)  # twice the decrease that the quadratic model promises, at least
        step = np.where(problem.is_log, np.log(np.maximum(1.0 + step, 0.1)), step)  # linear in the coefficient: 20 times fewer steps
        target = np.where(open_, np.clip(theta[live] + step, problem.low, problem.high), theta[live])
        trial, trial_jacobian = evaluate(problem, target)
        with np.errstate(invalid="ignore"):
            trial_cost = (weights[live] * huber(y[live] - trial, delta)).sum(axis=1)
        better = trial_cost <= cost
        theta[live[better]] = target[better]
        final[live] = np.where(better, trial_cost, cost)
        done = (better & (gain <= tolerance * cost) & (damping[live] < 1e-2)) | (damping[live] > 1e12) | (cost < 1e-26 * n)
        damping[live] = np.where(better, np.maximum(damping[live] / 10, 1e-9), damping[live] * 5)
        predicted = np.where(better[:, None], trial, predicted)[~done]
        jacobian = np.where(better[:, None, None], trial_jacobian, jacobian)[~done]
        live = live[~done]
        if not len(live):
            break
    return theta, final


def grid_starts(problem, keep=3):
    """Starts (S, p) by variable projection: with exponents on a grid and E a share of the lowest loss, the other
    coefficients are a linear least-squares problem, solved in closed form and kept positive. The best of each law and E are joined."""
    loss, low = np.exp(problem.y), math.exp(problem.y.min())
    has_constant = any(not exponents for _, terms in problem.layout.values() for exponents in terms.values())
    shares = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95) if has_constant else (0.0,)
    starts = np.zeros((len(shares), keep, len(problem.names)))
    for here, terms in problem.layout.values():
        grid = {j: values for exponents in terms.values() for j, values in exponents.items()}
        theta = np.zeros((math.prod(map(len, grid.values())), len(problem.names)))
        theta[:, list(grid)] = list(itertools.product(*grid.values()))
        coefficients = [a for a, exponents in terms.items() if exponents]
        basis = np.exp(log_terms(problem, theta)[0][problem.slot[coefficients]][:, :, here]) / loss[here]  # (k, G, n)
        normal = np.einsum("jgn,kgn->gjk", basis, basis)
        mean = basis.mean(axis=2)
        for i, share in enumerate(shares):
            target = 1.0 - share * low / loss[here]
            ridge = 1e-9 * np.einsum("gjj->gj", normal).max(axis=1)[:, None, None] * np.eye(len(coefficients))
            value = np.linalg.solve(normal + ridge, (basis @ target).T[:, :, None])[:, :, 0]
            value = np.maximum(value, 0.02 * target.mean() / mean.T)
            cost = ((np.einsum("gk,kgn->gn", value, basis) - target) ** 2).sum(axis=1)
            best = np.resize(np.argsort(cost)[:keep], keep)
            starts[i, :, list(grid)] = theta[best][:, list(grid)].T
            starts[i, :, coefficients] = np.log(value[best]).T
            for a, exponents in terms.items():
                if not exponents:
                    starts[i, :, a] = math.log(max(share, 1e-3) * low)
    return starts.reshape(-1, len(problem.names))


def robust_sigma(residual, parameters):
    """Standard deviation by the median absolute residual, corrected for the fitted parameters."""
    n = len(residual)
    return 1.4826 * np.median(np.abs(residual)) * math.sqrt(n / max(n - parameters, 1))


@dataclass
class Fit:
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
        found = {name.rpartition(":")[2]: raw[..., j] for j, name in enumerate(problem.names) if name.rpartition(":")[0] in ("", law)}
        found |= {name: np.full(theta.shape[:-1], value)[()] for name, (value, _) in problem.fixed[law].items()}
        return {name: found[name] for name in parameter_names(law)}


def parameter_names(law):
    """In the order of the formula: A alpha1 alpha2 alpha3 B beta E."""
    names = []
    for coefficient, exponents in LAWS[law].items():
        names += [coefficient, *exponents] + ["c", "gamma"] * ("-effective" in exponents.values())
    return names


def fit(rows, system, share=("E",), delta="auto"):
    """The Fit of a system {family: law}: variable-projection starts, then Huber least squares on ln loss with the analytic
    Jacobian. delta "auto" is 1.345 robust standard deviations of the residuals."""
    problem = build(rows, system, share)
    theta, cost = descend(problem, grid_starts(problem), 0.02 if delta == "auto" else max(delta, 0.005), max_steps=7, tolerance=1e-4)
    theta = theta[np.argsort(cost)[:2]]
    width = delta
    for tolerance in (1e-5, 1e-5, 1e-11) if delta == "auto" else (1e-11,):
        if delta == "auto":
            width = max(1.345 * robust_sigma(problem.y - evaluate(problem, theta[:1])[0][0], len(problem.names)), 1e-7)
        theta, cost = descend(problem, theta, width, tolerance=tolerance)
        theta = theta[[np.argmin(cost)]]
    theta = theta[0]
    inside = (theta > problem.low) & (theta < problem.high)

    def full(t):
        return np.where(inside, np.bincount(np.flatnonzero(inside), t, len(theta)), theta)[None]

    best = least_squares(lambda t: evaluate(problem, full(t))[0][0] - problem.y, theta[inside], loss="huber", f_scale=width, x_scale="jac",
                         jac=lambda t: evaluate(problem, full(t))[1][0, inside].T, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=50)
    polished = full(best.x)[0]
    if best.cost <= cost.min() and (polished >= problem.low).all() and (polished <= problem.high).all():
        theta, cost = polished, best.cost
    return Fit(problem, theta, width, float(np.min(cost)), problem.y - evaluate(problem, theta[None])[0][0])


# ---------------------------------------------------------------------------------------------------------
# What rows must hold

def missing(rows, system):
    """What these rows lack to fit `system`, [text]: three levels of each variable (N may have one), and more rows than parameters."""
    lacks = []
    for law in dict.fromkeys(system.values()):
        mine = [row for row in rows if system.get(row["family"]) == law]
        names = {v for e in LAWS[law].values() for f in e.values() for v in parse_feature(f)[1]}
        variables = sorted({v for name in names for v in (("D1", "D2") if name == "effective" else (name,))})
        families = [family for family, its in system.items() if its == law]
        if lost := [family for family in families if not any(row["family"] == family for row in rows)]:
            lacks.append(f"has no {' or '.join(lost)} rows")
            continue
        for name in variables:
            needed, has = 1 if name == "N" else 3, count_levels(mine, name)
            if has < needed:
                lacks.append(f"needs {needed} levels of {name}, has {has}")
    if not lacks:
        problem = build(rows, system)
        if len(problem.y) < len(problem.names) + 3:
            lacks.append(f"has {len(problem.y)} rows for {len(problem.names)} parameters, needs {len(problem.names) + 3}")
    return lacks
