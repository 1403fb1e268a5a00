"""How sure a fit is: noise of runs that share a trunk, bootstrap, standard errors, and rows that were left
out."""
import math

import numpy as np

from laws import descend, evaluate, fit, grid_starts, levels_of_N, missing, predict, variable
from rows import FAMILIES

INTERVALS = (
    "parametric bootstrap: fitted losses with redrawn row noise and a random effect per trunk, variances "
    "estimated by REML; runs upcycled from one dense trunk at different D1 count as trunks of their own, so "
    "with one seed that trunk's own noise is not in the intervals")

# ---------------------------------------------------------------------------------------------------------
# Noise: runs that share a trunk share its luck

def trunk_of(rows):
    """(n,) the trunk number of each row. A row that names no trunk is a trunk of its own."""
    names = [(row["family"], str(row["trunk"])) if "trunk" in row else i for i, row in enumerate(rows)]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([place[name] for name in names])


def variances(fitted, trunks):
    """(row variance, trunk variance, their degrees of freedom) of ln loss, given each row's trunk (n,).

    The method is restricted maximum likelihood (REML): the fitted parameters are projected out of the
    residuals, and what is left is row noise plus one random effect a trunk. Directions of trunk effects that
    the law all but absorbs are left out, since the misfit of the law would pass for noise there.
    """
    jacobian = evaluate(fitted.problem, fitted.theta[None])[1][0]
    _, size, basis = np.linalg.svd(jacobian / (np.linalg.norm(jacobian, axis=1, keepdims=True) + 1e-300))
    rest = basis[(size > 1e-9 * size[0]).sum():]  # (n - p, n) orthonormal
    effects = rest @ (trunks[:, None] == np.arange(trunks.max() + 1))
    visible, directions = np.linalg.eigh(effects @ effects.T)
    power = (directions.T @ (rest @ fitted.residual)) ** 2 + 1e-30
    visible = np.where(visible > 1.0, visible, 0.0)
    if not len(power) or len(set(trunks)) == len(trunks):
        return power.mean() if len(power) else 0.0, 0.0, max(len(power), 1), 1
    ratio = np.array([0.0, *np.geomspace(1e-3, 1e3, 121)])[:, None]
    spread = 1.0 + ratio * visible
    row = (power / spread).mean(axis=1)
    best = np.argmin(np.log(spread).sum(axis=1) + len(power) * np.log(row))
    return row[best], row[best] * ratio[best, 0], len(power), max((visible > 0).sum(), 1)


def second_start(fitted):
    """(p,) the best start of the grid, for refits. The estimate itself may have a term that vanished or
    another parameter at a bound, which a refit from there cannot leave."""
    starts = grid_starts(fitted.problem)
    cost = descend(fitted.problem, starts, fitted.delta, max_steps=20, tolerance=1e-5)[1]
    return starts[np.argmin(cost)]


def refits(fitted, start, count, **changes):
    """(count, p) the better of two descents, from the estimate and from `start`; `changes` go to
    laws.descend."""
    theta, cost = descend(fitted.problem, np.tile(fitted.theta, (count, 1)), fitted.delta, **changes)
    other, other_cost = descend(fitted.problem, np.tile(start, (count, 1)), fitted.delta, **changes)
    return np.where((other_cost < cost)[:, None], other, theta)


def bootstrap(fitted, draws=1000, seed=0, by_trunk=True, tick=lambda count: None):
    """Parameters refitted to redrawn losses, (draws, p) centred: fitted losses, row noise, one random effect
    a trunk.

    Redrawing whole trunks with replacement loses whole levels of N when a size has one trunk, and weighting
    trunks or flipping their signs cannot see how much that one trunk may be off. This bootstrap learns the
    trunk variance where levels do have several trunks (REML over all families) and gives it to all. Both
    variances are drawn from their chi-squared posterior. In simulations of quick studies (12 trunks) and
    larger ones (48) its 95 % intervals covered 94 % and 96 % of the true values; resampled trunks covered 78
    % and 96 %, exponential trunk weights 63 % and 90 %, the wild cluster bootstrap (CR3) 79 % and 93 %.
    """
    problem, random = fitted.problem, np.random.default_rng(seed)
    trunks = trunk_of(problem.rows) if by_trunk else np.arange(len(problem.rows))
    row, trunk, row_df, trunk_df = variances(fitted, trunks)
    start = second_start(fitted)

    def noise(variance, degrees, count, size):
        drawn = variance * degrees / random.chisquare(degrees, (count, 1))
        return np.sqrt(drawn) * random.standard_normal((count, size))

    found = []
    for first in range(0, draws, 100):
        count = min(100, draws - first)
        y = problem.y - fitted.residual + noise(row, row_df, count, len(trunks))
        y += noise(trunk, trunk_df, count, trunks.max() + 1)[:, trunks]
        found.append(refits(fitted, start, count, y=y, tolerance=1e-7, max_steps=100))
        tick(count)
    return np.concatenate(found)


def covariance(jacobian, trunks, row, trunk):
    """(p, p) of least-squares parameters from the Jacobian (p, n), to first order, under row noise and a
    random effect a trunk; row and trunk are their variances."""
    scale = np.linalg.norm(jacobian, axis=1) + 1e-12
    scaled = jacobian / scale[:, None]
    inverse = np.linalg.pinv(scaled @ scaled.T, rcond=1e-12, hermitian=True) / np.outer(scale, scale)
    sums = np.stack([jacobian[:, trunks == t].sum(axis=1) for t in np.unique(trunks)], axis=1)
    return inverse @ (row * jacobian @ jacobian.T + trunk * sums @ sums.T) @ inverse


def standard_errors(fitted, law):
    """{parameter: asymptotic standard error} of a law of the fit."""
    problem = fitted.problem
    trunks = trunk_of(problem.rows)
    row, trunk, _, _ = variances(fitted, trunks)
    jacobian = evaluate(problem, fitted.theta[None])[1][0]
    centred = covariance(jacobian, trunks, row, trunk)
    error = np.sqrt(np.maximum(np.diag(problem.to_raw @ centred @ problem.to_raw.T), 0.0))
    params, found = fitted.params(law), {}
    for j, (owner, _, name) in enumerate(full.rpartition(":") for full in problem.names):
        if owner in ("", law):
            found[name] = error[j] * (params[name] if problem.is_log[j] else 1.0)
    return {name: float(found.get(name, 0.0)) for name in params}


def aicc(fitted):
    """Akaike's criterion with its small-sample correction, Gaussian in ln loss, over all rows of the
    system. There must be more rows than p + 2."""
    n, k = len(fitted.residual), len(fitted.theta) + 1
    return n * math.log((fitted.residual ** 2).mean() + 1e-300) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


# ---------------------------------------------------------------------------------------------------------
# Rows that the fit did not see, and parameters that it cannot tell

def leave_trunk_out(fitted):
    """(n,) ln measured - ln predicted by fits that did not see the row's trunk; nan where leaving the
    trunk out loses a level of N."""
    problem, trunks = fitted.problem, trunk_of(fitted.problem.rows)
    sizes, numbers = levels_of_N(problem.rows, problem.system), []
    for number in np.unique(trunks):
        kept = [row for row, t in zip(problem.rows, trunks) if t != number]
        if not missing(kept, problem.system) and levels_of_N(kept, problem.system) == sizes:
            numbers.append(number)
    error = np.full(len(trunks), np.nan)
    if numbers:
        weights = (trunks != np.array(numbers)[:, None]).astype(float)
        theta = refits(fitted, second_start(fitted), len(numbers), weights=weights)
        residual = problem.y - evaluate(problem, theta)[0]
        for k, number in enumerate(numbers):
            error[trunks == number] = residual[k, trunks == number]
    return error


def extrapolate(rows, system, law, name, share, delta):
    """(the law's rows at the largest level of variable `name`, ln measured - ln predicted for them) by a
    fit that did not see that level; for N it saw that level in no family. None where too few rows are left
    to fit."""
    families = [family for family in system if system[family] == law]
    family = "upcycled" if "upcycled" in families else families[-1]
    top = max(variable(row, name) for row in rows if row["family"] == family)
    held = [row for row in rows if row["family"] == family and row[name] == top]
    kept = [row for row in rows if not ((row["family"] == family or name == "N") and row.get(name, 0) >= top)]
    if missing(kept, system) or name == "N" and min(levels_of_N(kept, system)) < 2:
        return None
    params = fit(kept, system, share, delta).params(law)
    predicted = [predict(law, params, **{v: row[v] for v in FAMILIES[family]}) for row in held]
    return held, np.log([row["loss"] for row in held]) - np.log(predicted)


def profile_E(fitted, law):
    """E held on a grid and all else refitted: {"E", "alpha3", "objective" (relative, above its minimum):
    lists, "fit": [E, alpha3], "inside": the relative objective at the ends of E's 95 % likelihood
    interval}; None where the fit has no E of its own."""
    problem = fitted.problem
    place = [j for j, name in enumerate(problem.names) if name in ("E", f"{law}:E")]
    if not place:
        return None
    values = np.linspace(0.02, 0.98, 33) * math.exp(problem.y.min())
    theta = np.tile(fitted.theta, (len(values), 1))
    theta[:, place[0]] = np.log(values)
    theta, cost = descend(problem, theta, fitted.delta, free=np.arange(theta.shape[1]) != place[0])
    params = fitted.params(law)
    return {"E": values.tolist(), "alpha3": fitted.params(law, theta)["alpha3"].tolist(),
            "objective": (cost / max(fitted.cost, 1e-300) - 1).tolist(),
            "fit": [float(params["E"]), float(params["alpha3"])],
            "inside": 3.84 / max(len(fitted.residual) - len(fitted.theta), 1)}


def unidentified(fitted, law, theta):
    """{parameter: why} where the fit or an end of its interval (theta: draws) sits on a bound, or where an
    exponent's sign or a coefficient's size is open."""
    problem, why = fitted.problem, {}
    low, high = np.quantile(theta, [0.025, 0.975], axis=0)
    bound = np.minimum(fitted.theta, low) <= problem.low
    bound |= np.maximum(fitted.theta, high) >= problem.high
    names = [name.rpartition(":") for name in problem.names]
    bounded = {name for (owner, _, name), hit in zip(names, bound) if hit and owner in ("", law)}
    for name, values in fitted.params(law, theta).items():
        low, high = np.quantile(values, [0.025, 0.975])
        if name in problem.fixed[law]:
            continue
        if name in bounded:
            why[name] = "not identified: it or its interval at a bound of the fit"
        elif low > 0 and high > 100 * low:
            why[name] = "not identified: its interval spans a factor of more than 100"
        elif low < 0 < high and name != "alpha3":
            why[name] = "not identified: its sign is open"
    return why
