"""The engine that fits a system of laws: loss with its Jacobian, starts, and descent.

S is a number of fits done side by side, p of parameters, n of rows, K of terms.
"""
import itertools
import math
from dataclasses import dataclass

import numpy as np

from laws import LEAST_GAP, MATCHING
from problem import Problem

# ---------------------------------------------------------------------------------------------------------
# Loss and Jacobian

def log_sum(terms):
    """(ln of the sum of exp(terms), each term's portion of it) over the first axis."""
    top = terms.max(axis=0)
    terms = np.exp(terms - top)
    total = terms.sum(axis=0)
    return top + np.log(total), terms / total


def log_head_start(problem, theta, terms):
    """(ln H (S, n), its Jacobian (S, p, n)) at theta (S, p); terms (K, S, n) are those without H. It is
    c D1^gamma, or saturates at H_max, or is where the MoE's loss from scratch equals the dense model's."""
    head, alpha = problem.head, theta[:, problem.head.alpha, None]
    if len(head.dense):
        dense, portion = log_sum(np.matmul(theta, head.dense))
        slope = sum(portion[k][:, None, :] * head.dense[k] for k in range(len(head.dense)))
        if head.delta is not None:
            dense = dense + theta[:, head.delta, None]
            slope[:, head.delta] += 1.0
        others = [k for k in range(len(terms)) if k != head.slot]
        rest = np.exp(np.where(head.started, terms[others], -np.inf))
        goal = np.exp(dense)
        gap = goal - rest.sum(axis=0)
        free = gap > LEAST_GAP * goal
        gap = np.where(free, gap, LEAST_GAP * goal)
        rise = sum(rest[i][:, None, :] * problem.features[k] for i, k in enumerate(others))
        slope = np.where(free[:, None], (goal[:, None] * slope - rise) / gap[:, None], slope)
        log_h = (theta @ problem.features[head.slot] - np.log(gap)) / alpha
        jacobian = (problem.features[head.slot] - slope) / alpha[:, None]
        jacobian[:, head.alpha] -= log_h / alpha
        return log_h, jacobian
    log_h, jacobian = theta @ head.linear, np.broadcast_to(head.linear, (len(theta), *head.linear.shape))
    if head.H_max is not None:
        start, most = log_h, theta[:, head.H_max, None]
        total, (portion, capped) = log_sum(np.array(np.broadcast_arrays(-alpha * start, -alpha * most)))
        log_h, jacobian = -total / alpha, portion[:, None, :] * jacobian
        jacobian[:, head.H_max] += capped
        jacobian[:, head.alpha] += (portion * start + capped * most - log_h) / alpha
    return log_h, jacobian


def log_terms(problem, theta):
    """At theta (S, p): logs of terms (K, S, n); with a head start ln H, its Jacobian, ln(D2 + H), alpha."""
    terms, head = np.matmul(theta, problem.features) + problem.offset[:, None, :], problem.head
    if not head:
        return terms, None
    log_h, slope = log_head_start(problem, theta, terms)
    log_h = np.where(head.started, log_h, -np.inf)
    effective = np.logaddexp(head.x2, log_h)
    alpha = np.where(head.here, theta[:, head.alpha, None], 0.0)
    terms[head.slot] -= alpha * effective
    return terms, (log_h, slope, effective, alpha)


def evaluate(problem, theta):
    """ln loss (S, n) and its Jacobian (S, p, n) at centred parameters theta (S, p)."""
    terms, started = log_terms(problem, theta)
    loss, portion = log_sum(terms)
    jacobian = np.einsum("ksn,kpn->spn", portion, problem.features)
    if started:
        head, (log_h, slope, effective, alpha) = problem.head, started
        jacobian[:, head.alpha] -= np.where(head.here, portion[head.slot] * effective, 0.0)
        weight = portion[head.slot] * alpha * np.exp(log_h - effective)
        jacobian -= weight[:, None, :] * slope
    return loss + theta @ problem.shift, jacobian + problem.shift


# ---------------------------------------------------------------------------------------------------------
# Starts and descent

def huber(residual, delta):
    """Huber's loss: half the square within delta, linear outside."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))


def marquardt_step(problem, theta, gradient, jacobian, weight, damping):
    """(trial theta (S, p), decrease promised by the quadratic model (S,)) of one Levenberg-Marquardt step. A
    parameter at a bound that the step would cross is held. A coefficient steps linearly in its raw value,
    which takes 20 times fewer steps than in its logarithm."""
    movable = ~((theta <= problem.low) & (gradient < 0) | (theta >= problem.high) & (gradient > 0))
    jacobian, gradient = jacobian * movable[:, :, None], gradient * movable
    hessian = (jacobian * weight[:, None, :]) @ jacobian.transpose(0, 2, 1)
    diagonal = np.einsum("sii->si", hessian)
    added = damping[:, None] * diagonal + 1e-14 * diagonal.max(axis=1, keepdims=True) + 1e-300
    hessian[:, np.arange(theta.shape[1]), np.arange(theta.shape[1])] += added
    step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    gain = (step * gradient).sum(axis=1)
    step = np.where(problem.is_log, np.log(np.maximum(1.0 + step, 0.1)), step)
    return np.where(movable, np.clip(theta + step, problem.low, problem.high), theta), gain


def whitened(values, whiten):
    """Values (..., n) times whiten (n, n), a NumPy or SciPy sparse array; left alone where it is None."""
    if whiten is None:
        return values
    return (whiten @ values.reshape(-1, values.shape[-1]).T).T.reshape(values.shape)


def descend(problem, theta, delta, y=None, whiten=None, prior=None, max_steps=400, tolerance=1e-11):
    """Many Huber fits at once by Levenberg-Marquardt: theta (S, p) starts -> (theta, objective (S,)).

    delta: Huber's. y: (S, n) or (n,), by default the problem's own ln losses. whiten: (n, n), what residuals
    are multiplied by; a row of zeros leaves a row out. prior: (places of parameters (q,), their means (q,) or
    (S, q), their standard deviations (q,)) counts as q more whitened residuals.
    """
    theta = np.array(theta, float)
    count, n = len(theta), len(problem.y)
    y = np.broadcast_to(problem.y if y is None else y, (count, n))
    final, live = np.full(count, np.inf), np.arange(count)
    damping = np.full(count, 1e-3)

    def tried(theta, live):
        predicted, jacobian = evaluate(problem, theta)
        residual, jacobian = whitened(y[live] - predicted, whiten), whitened(jacobian, whiten)
        if prior:
            place, mean, sd = prior
            off = (np.broadcast_to(mean, (count, len(sd)))[live] - theta[:, place]) / sd
            slope = (np.arange(theta.shape[1])[:, None] == place) / sd
            residual = np.concatenate([residual, off], axis=1)
            jacobian = np.concatenate([jacobian, np.broadcast_to(slope, (len(theta), *slope.shape))], axis=2)
        return residual, jacobian

    residual, jacobian = tried(theta, live)
    for _ in range(max_steps):
        cost = huber(residual, delta).sum(axis=1)
        weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        gradient = (jacobian @ (weight * residual)[:, :, None])[:, :, 0]
        target, gain = marquardt_step(problem, theta[live], gradient, jacobian, weight, damping[live])
        trial, trial_jacobian = tried(target, live)
        with np.errstate(invalid="ignore"):
            trial_cost = huber(trial, delta).sum(axis=1)
        better = trial_cost <= cost
        theta[live[better]] = target[better]
        final[live] = np.where(better, trial_cost, cost)
        settled = better & (gain <= tolerance * cost) & (damping[live] < 1e-2)
        done = settled | (damping[live] > 1e12) | (cost < 1e-26 * n)
        damping[live] = np.where(better, np.maximum(damping[live] / 10, 1e-9), damping[live] * 5)
        residual = np.where(better[:, None], trial, residual)[~done]
        jacobian = np.where(better[:, None, None], trial_jacobian, jacobian)[~done]
        live = live[~done]
        if not len(live):
            break
    return theta, final


def starts(problem, keep=3):
    """Starts (S, p) by variable projection: with exponents on a grid and E a share of the lowest loss, the
    other coefficients are a linear least-squares problem, solved in closed form and kept positive. The
    best of each law and each E are joined."""
    low, shares = math.exp(problem.y.min()), (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
    found = np.zeros((len(shares), keep, len(problem.names)))
    for law, terms in problem.laws.items():
        places, here = problem.places(law), problem.law_of_row == law
        if law in MATCHING:  # its head start follows from the laws of rows from scratch
            here = here & ~problem.head.started
        coefficients = [places[name] for name in terms if terms[name]]
        constants = [places[name] for name in terms if not terms[name]]
        own, theta = grid_of_exponents(problem, law)
        slots = [problem.slots.index(name) for name in terms if terms[name]]
        basis = np.exp(log_terms(problem, theta)[0][slots][:, :, here] - problem.y[here])  # (k, G, n)
        normal = np.einsum("jgn,kgn->gjk", basis, basis)
        ridge = 1e-9 * np.einsum("gjj->gj", normal).max(axis=1)[:, None, None] * np.eye(len(slots))
        mean = basis.mean(axis=2)
        for i, share in enumerate(shares):
            target = 1.0 - share * bool(constants) * low / np.exp(problem.y)[here]
            value = np.linalg.solve(normal + ridge, (basis @ target).T[:, :, None])[:, :, 0]
            value = np.maximum(value, 0.02 * target.mean() / mean.T)
            cost = ((np.einsum("gk,kgn->gn", value, basis) - target) ** 2).sum(axis=1)
            best = np.resize(np.argsort(cost)[:keep], keep)
            found[i, :, own] = theta[best][:, own].T
            found[i, :, coefficients] = np.log(value[best]).T
            found[i, :, constants] = math.log(share * low)
    return np.clip(found.reshape(-1, len(problem.names)), problem.low, problem.high)


def grid_of_exponents(problem, law):
    """(places of a law's exponents, parameters (G, p) at each point of their grid)."""
    grid_name = [name.partition("|")[0] for name in problem.names]  # methods start alike
    used = {grid_name[j] for name, j in problem.places(law).items()
            if j is not None and not name.startswith("dense_")}
    grid = {name: values if name in used else values[:1] for name, values in problem.grid.items()}
    points = list(itertools.product(*grid.values()))
    theta = np.zeros((len(points), len(problem.names)))
    for name, values in zip(grid, zip(*points)):
        theta[:, [other == name for other in grid_name]] = np.reshape(values, (-1, 1))
    return [j for j, name in enumerate(grid_name) if name in used & grid.keys()], theta


@dataclass
class Fit:
    """A fitted system of laws."""
    problem: Problem
    theta: np.ndarray      # (p,) centred
    delta: float           # Huber's, on log residuals, or on whitened ones
    cost: float
    residual: np.ndarray   # (n,) ln measured - ln fitted
    whiten: object = None  # (n, n) what residuals were multiplied by, or None
    noise: object = None   # uncertainty.Noise
    prior: tuple = None    # (places of exponents, means, standard deviations), (q,) each

    def params(self, law, theta=None, method=None):
        """{parameter: value} of a law of the system, for one method of upcycling, or else for copy or the
        first; from theta (S, p) arrays of draws."""
        problem, theta = self.problem, self.theta if theta is None else theta
        raw = theta @ problem.to_raw.T + problem.to_raw0
        raw = np.where(problem.is_log, np.exp(raw), raw)
        return {name: np.zeros(theta.shape[:-1])[()] if place is None else raw[..., place]
                for name, place in problem.places(law, method).items()}


def fit(rows, system, share=("E",), delta=0.01, A_of_N=False):
    """The Fit of a system {family: law}: starts, then Huber least squares on ln loss with the analytic
    Jacobian. delta is Huber's, on log residuals."""
    problem = Problem(rows, system, share, A_of_N)
    theta, cost = descend(problem, starts(problem), max(delta, 0.01), max_steps=7, tolerance=1e-4)
    theta, cost = descend(problem, theta[np.argsort(cost)[:2]], delta)
    theta = theta[[np.argmin(cost)]]
    return Fit(problem, theta[0], delta, float(cost.min()), problem.y - evaluate(problem, theta)[0][0])
