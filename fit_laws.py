"""Rows of finished runs -> scaling laws with intervals, rivals and held-out errors.

    python fit_laws.py results/study_quick.jsonl --out=out/laws

A law is a sum of terms, each a coefficient times powers of N, D, D1, D2, ...: in logs a log-sum-exp of features that
are linear in (ln coefficient, exponents). LAWS holds them as data and one engine fits them all. Token and parameter
counts are raw numbers, losses nats per token, ln natural.
"""
import csv
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.optimize import least_squares

from configurator import REQUIRED, ConfigError, code_version, progress, run, setting

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
FAMILIES = {"dense": ("N", "D"), "moe": ("N", "D"), "upcycled": ("N", "D1", "D2")}  # what a row must have
SLOPES = (0.03, 0.1, 0.3, 0.8)  # the grid of exponents that fits start from
KNOBS = ("noise_std", "noise_fraction", "drop_ratio", "granularity")  # columns that tell ways of upcycling apart
INTERVALS = ("parametric bootstrap: fitted losses with redrawn row noise and a random effect per trunk, variances estimated by REML; runs "
             "upcycled from one dense trunk at different D1 count as trunks of their own, so with one seed that trunk's own noise is not in the intervals")
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
# Rows

class RowError(ConfigError, ValueError):
    """A row that cannot be used, with its file and line."""


def number(value):
    """A positive number of a size that can be meant, from JSON or CSV. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number")
    try:
        value = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{str(value)[:40]!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value} is not positive and finite")
    if not 1e-6 <= value <= 1e16:
        raise ValueError(f"{value:g} is not within 1e-6 .. 1e16")
    return value


def clean(raw):
    """A checked row from a JSON object or CSV line. Raises ValueError saying what is wrong."""
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    if not isinstance(raw.get("family"), str) or raw["family"] not in FAMILIES:
        raise ValueError(f"family {raw.get('family')!r} is none of {', '.join(FAMILIES)}")
    foreign = {"D", "D1", "D2"} - set(FAMILIES[raw["family"]])  # a table gives them a 0 or nan
    row = {key: value for key, value in raw.items() if isinstance(key, str) and key not in foreign and value not in (None, "")}
    for key in (*FAMILIES[row["family"]], "loss"):
        if key not in row:
            raise ValueError(f"{key} is missing")
        try:
            row[key] = number(row[key])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    for key in ("N_active", "N_total", "num_local_experts", "num_experts_per_tok"):  # for the laws that use them
        try:
            row[key] = number(row[key])
        except (KeyError, ValueError):
            row.pop(key, None)
    for key in KNOBS:
        try:
            row[key] = float(row[key])
        except (KeyError, TypeError, ValueError, OverflowError):
            row.pop(key, None)
    return row


def read_rows(paths, skip_bad=False):
    """([row], [what was dropped and why]) from JSONL files, or CSV files (*.csv) with a header: family,N,D,D1,D2,loss and more.

    A row seen twice counts once. Raises RowError at the first bad row unless skip_bad.
    """
    rows, dropped, seen = [], [], {}
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", errors="replace", newline="" if path.endswith(".csv") else None) as f:
                text = f.read()
        except OSError as error:
            raise RowError(f"{path}: {error.strerror}") from None
        if path.endswith(".csv"):
            reader = csv.DictReader(text.splitlines(keepends=True))
            lines = ((reader.line_num, raw) for raw in reader)
        else:
            lines = ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        while True:
            try:
                line, raw = next(lines)
            except StopIteration:
                break
            except csv.Error as error:  # the rest of the file is lost with it
                line, raw = reader.line_num, error
                lines = iter(())
            try:
                if isinstance(raw, Exception):
                    raise ValueError(str(raw))
                try:
                    row = clean(json.loads(raw) if isinstance(raw, str) else raw)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"not valid JSON ({error})") from None
                key = tuple(str(row.get(k)) for k in ("family", "N", "D", "D1", "D2", "seed", "method", *KNOBS, "trunk", "data_sha256",
                                                      "num_local_experts", "num_experts_per_tok"))
                if key not in seen:
                    seen[key] = row["loss"], f"{path}:{line}"
                    rows.append(row)
                elif seen[key][0] != row["loss"]:
                    raise ValueError(f"loss {row['loss']:g}, but the same run has {seen[key][0]:g} at {seen[key][1]}")
            except ValueError as error:
                message = f"{path}:{line}: {error}"
                if not skip_bad:
                    raise RowError(f"{message} (--skip_bad drops such rows)") from None
                dropped.append(message)
    if not rows:
        raise RowError(f"{', '.join(paths)}: no rows" + f" ({len(dropped)} bad ones dropped)" * bool(dropped))
    return rows, dropped


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
            "leave_trunk_out": rms(left_out[here & np.isfinite(left_out)]), "extrapolation": {k: v and rms(v[1]) for k, v in far.items()},
            "aicc": aicc(f), "n_with": len(f.residual), "fitted_with": system, "shared": sorted(set(its) & {name for name in f.problem.names}),
            "not_identified": {k: why for k, (_, why) in f.problem.fixed[law].items()} | unidentified(f, law, theta),
            "huber_delta": f.delta, "params_at_delta_0.001": rounded(narrow.params(law)),
            "row_sd": math.sqrt(row), "trunk_sd": math.sqrt(trunk), "trunks": len(set(trunk_of(f.problem.rows))),
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
                "rmse_log": rms(f.residual[here]), "leave_trunk_out": rms(left_out[here & np.isfinite(left_out)])}
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
    import report  # which imports this file
    compared, parameters, each = report.table(entries, sizes)
    best = min((law for law in RIVALS if law in entries), key=lambda law: entries[law]["aicc"], default="")
    methods = report.method_lines(report.method_differences(rows))
    report.report(rows, out, details, profiles, [*compared, "", *parameters, "", *each, "", *methods], notes, options.out)
    shown = [line for i, line in enumerate(parameters) if i < 2 or wanted or line.split("|")[1].strip() in (*FAMILIES, best)]
    for block in (compared, each, shown, methods, report.findings(entries, out["ranges"]), [f"warning: {note}" for note in notes]):
        print("\n".join(block) + "\n" * bool(block))
    print(f"{os.path.join(options.out, 'laws.json')}, report.md and figures written")


if __name__ == "__main__":
    run(main, Options)
