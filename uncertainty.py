"""How sure a fit is: nested noise, intervals, information criterion, and rows that were left out.

All runs upcycled from one dense trunk, at whatever D1, share that trunk's luck with its dense runs. Runs of
one MoE or upcycled trunk share theirs, and each run adds its own. Where seeds were repeated, what all seeds
of one design cell have in common and the law does not fit is misfit, not noise.
"""
import math
from collections import Counter

import numpy as np
from scipy.linalg import block_diag, solve_triangular
from scipy.optimize import minimize
from scipy.sparse import csr_array

from engine import Fit, descend, evaluate, fit, starts
from problem import levels_of_N, methods_of, missing
from rows import run_key

INTERVALS = (
    "parametric bootstrap of generalised least squares: fitted losses are redrawn with row noise, one random "
    "effect a trunk and one a dense trunk that all its D1 share; variances of each family are drawn from "
    "their REML posterior, whose prior, 0.5 % a trunk (MoE: 0.9 %) within a factor of 2.2 (one sd), decides "
    "where the rows repeat no seed; Huber's delta is in standard deviations of the noise")

# The prior of each standard deviation of ln loss: its median, and the sd of its logarithm. In small models
# seeds of dense trunks differed by 0.2-0.5 %, those of MoE trunks by 0.2-1.3 %.
PRIOR = {"row": (0.003, 1.5), "trunk": (0.005, 0.8), "dense_trunk": (0.005, 0.8), "cell": (0.005, 1.5),
         ("trunk", "moe"): (0.009, 0.8)}
LEAST_SD = 1e-6


# ---------------------------------------------------------------------------------------------------------
# Which rows share luck

def trunk_of(rows):
    """(n,) the trunk number of each row. A row that names no trunk is a trunk of its own."""
    keys = [(row["family"], row["trunk"]) if "trunk" in row else i for i, row in enumerate(rows)]
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([place[key] for key in keys])


def dense_trunks(rows):
    """[the dense trunk of each row, or None]: its column dense_trunk; a dense row's own trunk; and for an
    upcycled row with no such column the dense trunk of the same N and seed."""
    by_seed = {(row["N"], str(row["seed"])): row["trunk"] for row in rows
               if row["family"] == "dense" and "trunk" in row and "seed" in row}
    found = []
    for row in rows:
        if row["family"] == "upcycled":
            key = (row["N"], str(row["seed"])) if "seed" in row else None
            found.append(row.get("dense_trunk", by_seed.get(key, key)))
        else:
            found.append(row.get("trunk") if row["family"] == "dense" else None)
    return found


def shared_luck(rows):
    """{(kind, family): [what rows with the same effect have in common, or None]}. A dense trunk has the
    family "". The misfit of a "cell" of the design is what its repeated seeds share."""
    found = {("dense_trunk", ""): dense_trunks(rows)}
    for family in dict.fromkeys(row["family"] for row in rows):
        here = [row if row["family"] == family else {} for row in rows]
        if family != "dense":
            found["trunk", family] = [row.get("trunk") for row in here]
        found["cell", family] = [run_key(row, but=("seed", "trunk", "dense_trunk")) if row else None
                                 for row in here]
    return found


# ---------------------------------------------------------------------------------------------------------
# Noise and its variances

class Noise:
    """The noise of ln loss: each of n rows has its own, and shares q random effects with other rows. Its c
    standard deviations are those of rows, by family, and of the kinds of effects that two rows share."""

    def __init__(self, rows):
        families = list(dict.fromkeys(row["family"] for row in rows))
        self.kinds = [("row", family) for family in families]             # (c,) (kind, family)
        self.row_kind = np.array([families.index(row["family"]) for row in rows])  # (n,)
        columns, column_kind = [], []
        for kind, of_row in shared_luck(rows).items():
            counts = Counter(key for key in of_row if key is not None)
            if max(counts.values(), default=0) > 1:
                columns += [[key == effect for key in of_row] for effect in counts]
                column_kind += [len(self.kinds)] * len(counts)
                self.kinds.append(kind)
        self.columns = np.array(columns, float).reshape(-1, len(rows)).T  # (n, q) a row has an effect
        self.column_kind = np.array(column_kind, int)                     # (q,)
        self.prior = np.array([PRIOR.get(kind, PRIOR[kind[0]]) for kind in self.kinds])  # (c, 2)
        self.log_sd = np.log(self.prior[:, 0])                            # (c,) the estimate

    def covariance(self, log_sd=None):
        """(n, n) of ln loss, for log standard deviations (c,), by default the estimate."""
        sd = np.exp(self.log_sd if log_sd is None else log_sd)
        return np.diag(sd[self.row_kind] ** 2) + (self.columns * sd[self.column_kind] ** 2) @ self.columns.T

    def redraw(self, log_sd, random):
        """(S, n) noise of ln loss, for log standard deviations (S, c)."""
        sd = np.exp(log_sd)
        rows = sd[:, self.row_kind] * random.standard_normal((len(sd), len(self.row_kind)))
        effects = sd[:, self.column_kind] * random.standard_normal((len(sd), len(self.column_kind)))
        return rows + effects @ self.columns.T

    def deviance(self, log_sd, restricted=True):
        """(S,) -2 ln likelihood of ln loss at log standard deviations (S, c), the parameters fitted to first
        order; restricted (REML): the parameters integrated out.

        One Cholesky factor of the mixed-model equations with the residual as a last column gives all of it:
        self.products (families, m, m) are those of the effects, directions of the parameters and residual.
        """
        families = len(self.counts)
        precision = np.exp(-2 * log_sd)
        matrix = np.tensordot(precision[:, :families], self.products, 1)
        logs = 2 * log_sd[:, :families] @ self.counts
        kinds = self.column_kind
        q = len(kinds)
        matrix[:, np.arange(q), np.arange(q)] += precision[:, kinds]
        np.einsum("sii->si", matrix)[:] *= 1 + 1e-12  # positive definite after rounding too
        root = np.einsum("sii->si", np.linalg.cholesky(matrix))
        logs += 2 * log_sd[:, kinds].sum(axis=1) + 2 * np.log(root[:, :-1 if restricted else q]).sum(axis=1)
        return logs + root[:, -1] ** 2

    def penalty(self, log_sd):
        """(S,) -2 ln prior."""
        median, width = self.prior.T
        return (((log_sd - np.log(median)) / width) ** 2).sum(axis=1)

    def minimised(self, deviance):
        """(log_sd (c,), lowest value) of a function of log_sd (S, c)."""
        step = 1e-4 * np.eye(len(self.log_sd))

        def value_and_slope(log_sd):
            values = deviance(np.concatenate([log_sd[None], log_sd + step, log_sd - step]))
            return values[0], (values[1:len(step) + 1] - values[len(step) + 1:]) / 2e-4

        best = minimize(value_and_slope, self.log_sd, jac=True, method="L-BFGS-B",
                        bounds=[(math.log(LEAST_SD), 0.0)] * len(step))
        return best.x, best.fun

    def posterior(self, draws, random, chains=60, steps=70):
        """(draws, c) log standard deviations from their REML posterior by differential-evolution Markov
        chains."""
        c = len(self.log_sd)
        state = np.clip(self.log_sd + 0.4 * random.standard_normal((chains, c)), math.log(LEAST_SD), 0.0)
        height = self.deviance(state) + self.penalty(state)
        kept = []
        for step in range(steps):
            first, second = random.integers(0, chains, (2, chains))
            reach = 1.0 if step % 10 == 9 else 2.38 / math.sqrt(2 * c)
            trial = state + reach * (state[first] - state[second])
            trial = np.clip(trial + 1e-3 * random.standard_normal((chains, c)), math.log(LEAST_SD), 0.0)
            trial_height = self.deviance(trial) + self.penalty(trial)
            taken = np.log(random.random(chains)) < (height - trial_height) / 2
            state, height = np.where(taken[:, None], trial, state), np.where(taken, trial_height, height)
            kept += [state] if step >= steps // 2 else []
        return np.concatenate(kept)[random.integers(0, chains * len(kept), draws)]

    def table(self):
        """({family: {"row", "trunk", "dense_trunk": sd of ln loss}}, {family: sd of misfit, or None})."""
        sd = {kind: float(value) for kind, value in zip(self.kinds, np.exp(self.log_sd))}
        families = [family for kind, family in self.kinds if kind == "row"]
        shared = sd.get(("dense_trunk", ""), 0.0)
        noise = {family: {"row": sd["row", family], "trunk": sd.get(("trunk", family), 0.0),
                          "dense_trunk": 0.0 if family == "moe" else shared} for family in families}
        return noise, {family: sd.get(("cell", family)) for family in families}


def noise_of(problem, theta, most=4.0):
    """The Noise of a fit with parameters theta (p,). A residual beyond `most` robust standard deviations of
    its family counts as so many of them."""
    noise, (predicted, jacobian) = Noise(problem.rows), evaluate(problem, theta[None])
    residual, jacobian, families = problem.y - predicted[0], jacobian[0], noise.row_kind
    for k in np.unique(families):
        own = families == k
        limit = most * 1.4826 * np.median(np.abs(residual[own])) + 1e-12
        residual[own] = np.clip(residual[own], -limit, limit)
        noise.log_sd[k] = math.log(max(residual[own].std(), LEAST_SD))
    _, size, basis = np.linalg.svd(jacobian / (np.linalg.norm(jacobian, axis=1, keepdims=True) + 1e-300),
                                   full_matrices=False)
    columns = np.hstack([noise.columns, basis[size > 1e-7 * size[0]].T, residual[:, None]])
    noise.counts = np.bincount(families).astype(float)
    parts = [columns[families == k] for k in range(len(noise.counts))]
    noise.products = np.array([part.T @ part for part in parts])
    noise.products[:, -1, -1] += 1e-13 * noise.counts
    noise.log_sd = noise.minimised(lambda log_sd: noise.deviance(log_sd) + noise.penalty(log_sd))[0]
    return noise


def whitening(covariance, kept=None):
    """(n, n) the matrix that makes noise of that covariance white, sparse where rows are many; rows that
    are not kept get zeros."""
    n = len(covariance)
    block = np.ix_(*[np.arange(n) if kept is None else np.flatnonzero(kept)] * 2)
    whiten, root = np.zeros((n, n)), np.linalg.cholesky(covariance[block])
    whiten[block] = solve_triangular(root, np.eye(len(root)), lower=True)
    return csr_array(whiten) if n > 400 else whiten


def fit_with_noise(rows, system, share=("E",), A_of_N=False, priors=None):
    """The Fit of a system {family: law} with its Noise, by generalised least squares: Huber's loss, delta
    1.345, of residuals whitened by that noise. priors: {law: (mean, standard deviation) of its alpha}."""
    plain = fit(rows, system, share, A_of_N=A_of_N)
    problem, noise = plain.problem, noise_of(plain.problem, plain.theta)
    prior = (np.array([problem.places(law)["alpha"] for law in priors]),
             *np.array(list(priors.values())).T) if priors else None
    theta = np.concatenate([plain.theta[None], starts(problem)[:2]])
    for _ in range(2):
        whiten = whitening(noise.covariance())
        theta, cost = descend(problem, theta, 1.345, whiten=whiten, prior=prior)
        theta = theta[[np.argmin(cost)]]
        noise = noise_of(problem, theta[0])
    residual = problem.y - evaluate(problem, theta)[0][0]
    return Fit(problem, theta[0], 1.345, float(cost.min()), residual, whiten, noise, prior)


# ---------------------------------------------------------------------------------------------------------
# Intervals and the information criterion

def refits(fitted, count, **changes):
    """(count, p) refits from the estimate; where a parameter of it is at a bound, which a descent from
    there cannot leave, also from the best start of the grid. `changes` go to engine.descend."""
    problem, arguments = fitted.problem, {"whiten": fitted.whiten, "prior": fitted.prior} | changes
    theta, cost = descend(problem, np.tile(fitted.theta, (count, 1)), fitted.delta, **arguments)
    if ((fitted.theta > problem.low) & (fitted.theta < problem.high)).all():
        return theta
    first, height = descend(problem, starts(problem), fitted.delta, whiten=fitted.whiten, max_steps=20,
                            tolerance=1e-5)
    start = np.tile(first[np.argmin(height)], (count, 1))
    other, other_cost = descend(problem, start, fitted.delta, **arguments)
    return np.where((other_cost < cost)[:, None], other, theta)


def bootstrap(fitted, draws=1000, seed=0, tick=lambda count: None):
    """Parameters refitted to redrawn losses, (draws, p) centred: fitted losses times noise, whose standard
    deviations are drawn anew each time from their posterior. dev/LOG.md has the coverage of its intervals."""
    random, found, prior = np.random.default_rng(seed), [], fitted.prior
    log_sd = fitted.noise.posterior(draws, random)
    for first in range(0, draws, 100):
        part = log_sd[first:first + 100]
        y = fitted.problem.y - fitted.residual + fitted.noise.redraw(part, random)
        if fitted.prior:  # the prior is an observation, and is redrawn as the others are
            place, mean, sd = fitted.prior
            prior = (place, fitted.theta[place] + sd * random.standard_normal((len(part), len(sd))), sd)
        found.append(refits(fitted, len(part), y=y, prior=prior, tolerance=1e-6, max_steps=60))
        tick(len(part))
    return np.concatenate(found)


def covariance(jacobian, noise, whiten=None, prior=None):
    """(p, p) of the estimate to first order, from its Jacobian (p, n), the noise (n, n), what residuals were
    multiplied by (n, n), and the prior of engine.descend."""
    if whiten is not None:
        jacobian, noise = jacobian @ whiten.T, whiten @ noise @ whiten.T
    if prior:  # more observations, with noise of 1
        slope = (np.arange(len(jacobian))[:, None] == prior[0]) / prior[2]
        jacobian, noise = np.column_stack([jacobian, slope]), block_diag(noise, np.eye(len(prior[2])))
    scale = np.linalg.norm(jacobian, axis=1) + 1e-12
    scaled = jacobian / scale[:, None]
    inverse = np.linalg.pinv(scaled @ scaled.T, rcond=1e-12, hermitian=True) / np.outer(scale, scale)
    return inverse @ (jacobian @ noise @ jacobian.T) @ inverse


def standard_errors(fitted, law):
    """{parameter: asymptotic standard error} of a law of the fit."""
    problem, jacobian = fitted.problem, evaluate(fitted.problem, fitted.theta[None])[1][0]
    centred = covariance(jacobian, fitted.noise.covariance(), fitted.whiten, fitted.prior)
    error = np.sqrt(np.maximum(np.diag(problem.to_raw @ centred @ problem.to_raw.T), 0.0))
    places = problem.places(law)
    return {name: 0.0 if places[name] is None else
            float(error[places[name]] * (value if problem.is_log[places[name]] else 1.0))
            for name, value in fitted.params(law).items()}


def aicc(fitted):
    """Akaike's criterion with its small-sample correction, over all rows of the system: the likelihood has
    the nested noise in it, and its variances are parameters. No residual is clipped, as laws differ there."""
    noise = noise_of(fitted.problem, fitted.theta, most=math.inf)
    n, k = noise.counts.sum(), len(fitted.theta) + len(noise.kinds)
    deviance = noise.minimised(lambda log_sd: noise.deviance(log_sd, restricted=False))[1]
    return float(deviance + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1))


def leave_trunk_out(fitted, most=40):
    """(n,) ln measured - ln predicted by fits that did not see the row's trunk; nan where leaving it
    out loses a level of N or a method. Where upcycled rows of one N come of several dense trunks, all that
    came of a dense trunk is left out at once. More trunks than `most` are left out in that many groups."""
    problem, luck = fitted.problem, dense_trunks(fitted.problem.rows)
    several = Counter(N for N, _ in {(row["N"], key) for row, key in zip(problem.rows, luck)
                                     if key and "D1" in row})
    trunks = trunk_of([row | {"family": "", "trunk": (row["N"], key)} if key and several[row["N"]] > 1
                       else row for row, key in zip(problem.rows, luck)]) % most
    sizes, error = levels_of_N(problem.rows, problem.system), np.full(len(trunks), np.nan)
    noise = fitted.noise.covariance()
    for number in np.unique(trunks):
        kept = [row for row, t in zip(problem.rows, trunks) if t != number]
        if (missing(kept, problem.system) or levels_of_N(kept, problem.system) != sizes
                or methods_of(kept, problem.system) != problem.methods):
            continue
        theta = refits(fitted, 1, whiten=whitening(noise, trunks != number))
        left_out = trunks == number
        error[left_out] = (problem.y - evaluate(problem, theta)[0][0])[left_out]
    return error


def profile_E(fitted, law):
    """E held at 17 values and all else refitted: {"E", "alpha3", "objective": relative, above its minimum,
    "inside": whether E is in its 95 % likelihood interval}, lists; {} where the fit has no E of its own."""
    problem = fitted.problem
    place = problem.places(law).get("E")
    if place is None:
        return {}
    E = np.linspace(0.02, 0.98, 17) * math.exp(problem.y.min())
    theta = np.tile(fitted.theta, (len(E), 1))
    theta[:, place] = np.log(E) - problem.to_raw0[place]
    theta, cost = descend(problem, theta, fitted.delta, whiten=fitted.whiten,
                          prior=([place], theta[:, [place]], [1e-6]))
    objective = cost / max(fitted.cost, 1e-300) - 1
    inside = objective < 3.84 / max(len(fitted.residual) - len(fitted.theta), 1)
    return {"E": E.tolist(), "alpha3": fitted.params(law, theta)["alpha3"].tolist(),
            "objective": objective.tolist(), "inside": inside.tolist()}


def unidentified(fitted, law, theta):
    """{parameter: why} where the fit or an end of its interval (theta: draws) sits on a bound, or where an
    exponent's sign or a coefficient's size is open."""
    problem, why = fitted.problem, {}
    low, high = np.quantile(theta, [0.025, 0.975], axis=0)
    bound = np.minimum(fitted.theta, low) <= problem.low
    bound |= np.maximum(fitted.theta, high) >= problem.high
    places = problem.places(law)
    for name, values in fitted.params(law, theta).items():
        low, high = np.quantile(values, [0.025, 0.975])
        if places[name] is None:
            continue
        if bound[places[name]]:
            why[name] = "not identified: it or its interval at a bound of the fit"
        elif low > 0 and high > 100 * low:
            why[name] = "not identified: its interval spans a factor of more than 100"
        elif low < 0 < high and name not in ("alpha3", "kappa", "delta"):
            why[name] = "not identified: its sign is open"
    return why
