"""The engine that fits a system of laws: rows as arrays, loss with its Jacobian, starts, and descent.

All parameters are fitted at once: coefficients as logarithms, variables centred. S is a number of fits done
side by side, p of parameters, n of rows, K of terms.
"""
import itertools
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares

from configurator import ConfigError
from laws import (BY_METHOD, HEAD_START, LEAST_GAP, MATCHING, SHARED_CURVE, count_levels, factors_of, law_terms,
                  levels, parameter_names, parse_feature, variable, variables_of)
from rows import KNOBS, method_label

SLOPES = (0.03, 0.1, 0.3, 0.8)  # the grid of exponents that fits start from


# ---------------------------------------------------------------------------------------------------------
# Rows and a system of laws as arrays

@dataclass
class Head:
    """The head start in a problem: the term A (D2 + H)^-alpha, where ln H or what it saturates from is
    linear."""
    slot: int                  # the term A
    alpha: int                 # the place of alpha
    x2: np.ndarray             # (n,) centred ln D2, or ln D from scratch
    here: np.ndarray           # (n,) whether the row's law has the term
    started: np.ndarray        # (n,) whether the row started from a dense checkpoint
    linear: np.ndarray         # (p, n) features of ln(c D1^gamma)
    H_max: int | None          # its place, in the saturating law
    delta: int | None          # its place, in loss matching
    dense: np.ndarray | None   # (terms, p, n) features of the dense law at (N, D1), in loss matching


@dataclass
class Problem:
    """Rows and laws as arrays. Coefficients are fitted as logs, variables are centred."""
    rows: list
    system: dict           # {family: law}
    options: dict          # what build was called with: share, A_of_N
    names: list            # "law:parameter", or "parameter" where laws share it, or "law:parameter|method"
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
    methods: list          # labels of the methods of upcycling that have parameters of their own; copy comes first
    shift: np.ndarray      # (p, n) features of what is added to ln loss: kappa
    head: Head | None
    used: list = field(init=False)  # (K,) places of the parameters that occur in each term

    def __post_init__(self):
        self.used = [np.flatnonzero(np.abs(features).any(axis=1)) for features in self.features]


def identified_terms(rows, law_of_row, options):
    """({law: its terms that these rows can tell apart}, {law: {parameter: (fixed value, why)}}, laws that
    share nothing).

    One level of N or D: the term folds into an E of the law's own. Rows that mix numbers of experts have an E
    of their own too. Two levels of N in every law that shares E: E and B N^-beta cannot be told apart, E is
    0.
    """
    laws = {law: dict(law_terms(law, options["A_of_N"])) for law in dict.fromkeys(law_of_row)}
    members = {law: [row for row, name in zip(rows, law_of_row) if name == law] for law in laws}
    fixed, alone = {law: {} for law in laws}, set()
    sizes = {law: count_levels(members[law], "N") for law in laws if laws[law].get("B") == {"beta": "-N"}}
    for law, count in sizes.items():
        experts = [variable(row, "experts") / (row.get("granularity") or 1) for row in members[law]]
        if len(levels(experts)) > 1:
            alone.add(law)
        if laws[law]["A" if "A" in laws[law] else "A1"].get("alpha") == "-D" and count_levels(members[law], "D") == 1:
            why = "one level of D: A D^-alpha is part of E"
            fixed[law] |= {name: (0.0, why) for name in ("A", *laws[law].pop("A"))}
            alone.add(law)
        if count == 1:
            for name in laws[law]:
                laws[law][name] = {k: feature for k, feature in laws[law][name].items() if k != "nu"}
            fixed[law] |= {name: (0.0, "one level of N: B N^-beta is part of E") for name in ("B", "beta")}
            fixed[law] |= {"nu": (0.0, "one level of N: N^-nu is part of A")} if options["A_of_N"] else {}
            del laws[law]["B"]
            alone.add(law)
    joint = [count for law, count in sizes.items() if law not in alone]
    for law, count in sizes.items():
        if count == 2 and max(joint if "E" in options["share"] and law not in alone else [count]) == 2:
            del laws[law]["E"]
            fixed[law]["E"] = (0.0, "two levels of N do not separate E from B N^-beta")
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
    methods: list                                 # labels of methods with parameters of their own
    names: dict = field(default_factory=dict)     # {full name: place}
    bounds: dict = field(default_factory=dict)    # {place: (low, high)} where they are not a coefficient's
    features: dict = field(default_factory=dict)  # {(coefficient, place): (n,)}
    shift: dict = field(default_factory=dict)     # {place: (n,)}
    linear: list = field(default_factory=list)    # (place, place, value) off the diagonal of to_raw
    constant: list = field(default_factory=list)  # (place, value) of to_raw0
    head: dict = field(default_factory=dict)      # the fields of Head, features as {place: (n,)}

    def place(self, law, name):
        """The place of a law's parameter; a new one where it has none yet."""
        full = name if name in self.share and law not in self.alone else f"{law}:{name}"
        return self.names.setdefault(full, len(self.names))

    def feature(self, coefficient, place, here, value):
        """Set the feature of a parameter in a term, for some rows."""
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
            grid[j] = (0.0,) if exponent == "nu" else [-sign * slope for slope in SLOPES]
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
    """Add ln(D2 + H) to the draft; returns {place: values to start from}."""
    here, alpha = draft.law_of_row == law, draft.place(law, exponent)
    D1 = np.array([row.get("D1", 0.0) for row in draft.rows], float)
    x2 = np.log([row.get("D2", row.get("D")) for row in draft.rows])
    started = here & (D1 > 0)
    log_D1 = np.where(started, np.log(np.where(started, D1, 1.0)), 0.0)
    m1, m2 = log_D1[started].mean() if started.any() else 0.0, x2[here].mean()
    draft.head = dict(slot=coefficient, alpha=alpha, x2=x2 - m2, here=here, started=started, linear={}, H_max=None,
                      delta=None, dense=None, log_D1=log_D1)
    draft.linear.append((draft.place(law, coefficient), alpha, m2))
    draft.bounds[alpha] = (-3.0, 3.0)
    grid = {alpha: SLOPES}
    if "c" in HEAD_START[law]:
        gamma = draft.place(law, "gamma")
        draft.head["linear"][gamma] = np.where(started, log_D1 - m1, 0.0)
        draft.bounds[gamma] = (0.01, 3.0)
        for c, of_method in own_parameters(draft, law, "c", started):
            draft.head["linear"][c] = of_method
            draft.linear.append((c, gamma, -m1))
            draft.constant.append((c, m2))
            draft.bounds[c] = (-7.0, 7.0)
            grid[c] = (-2.0, 0.0, 2.0)
        grid[gamma] = (0.3, 0.7, 1.1)
    if "H_max" in HEAD_START[law]:
        draft.head["H_max"] = draft.place(law, "H_max")
        draft.constant.append((draft.head["H_max"], m2))
        draft.bounds[draft.head["H_max"]] = (-7.0, 9.0)
    if "kappa" in HEAD_START[law]:
        draft.shift = dict(own_parameters(draft, law, "kappa", started))
        draft.bounds |= {kappa: (-1.0, 1.0) for kappa in draft.shift}
    if "delta" in HEAD_START[law]:
        draft.head["delta"] = draft.place(law, "delta")
        draft.bounds[draft.head["delta"]] = (-1.0, 1.0)
    if "H_max" in HEAD_START[law] or law in MATCHING:
        draft.bounds[alpha] = (0.005, 3.0)
    return grid


def own_parameters(draft, law, name, started):
    """[(place, (n,) which started rows have it)] of a parameter that each method of upcycling has for
    itself."""
    if not draft.methods:
        return [(draft.place(law, name), started.astype(float))]
    labels = np.array([method_label(row) for row in draft.rows])
    return [(draft.place(law, name + f"|{label}" * (k > 0)), (started & (labels == label)).astype(float))
            for k, label in enumerate(draft.methods)]


def add_dense_loss(draft, terms):
    """Add to the draft's head the terms {coefficient: exponents} of the dense law at (N, D1)."""
    values = {"D": draft.head["log_D1"]}
    draft.head["dense"] = []
    for coefficient, exponents in terms.items():
        features = {draft.place("dense", coefficient): np.ones(len(draft.rows))}
        for exponent, feature in exponents.items():
            sign, (name,) = parse_feature(feature)
            features[draft.place("dense", exponent)] = sign * (values.get(name, draft.logs[name]) - draft.center[name])
        draft.head["dense"].append(features)


def methods_of(rows, system):
    """Labels of the methods of upcycling in the rows, copy or the first one first; [] of one method, or of
    laws in which methods do not differ."""
    if not set(BY_METHOD) & set(HEAD_START.get(system.get("upcycled"), ())):
        return []
    labels = sorted({method_label(row) for row in rows if row["family"] == "upcycled"}, key=lambda x: (x != "copy", x))
    return labels if len(labels) > 1 else []


def build(rows, system, share=("E",), A_of_N=False):
    """The Problem of fitting `system` = {family: law} to the rows of those families at once; laws share
    the named parameters. With A_of_N, A depends on N. Raises ConfigError where laws would share a
    coefficient but not its exponents."""
    options = {"share": share, "A_of_N": A_of_N}
    rows = [row for row in rows if row["family"] in system]
    law_of_row = np.array([system[row["family"]] for row in rows])
    laws, fixed, alone = identified_terms(rows, law_of_row, options)
    check_shares(laws, share, alone)
    factors = set().union(*map(factors_of, laws.values())) - {"effective"}
    logs = {name: np.log([variable(row, name) for row in rows]) for name in factors}
    center = {name: np.nanmean(value) for name, value in logs.items()}
    draft = Draft(rows, law_of_row, share, alone, logs, center, methods_of(rows, system))
    layout, offset = {}, {}
    for law, terms in laws.items():
        here = law_of_row == law
        layout[law] = (here, {})
        for coefficient, exponents in terms.items():
            offset.setdefault(coefficient, np.full(len(rows), -np.inf))[here] = 0.0
            grid = add_term(draft, law, coefficient, exponents)
            layout[law][1][draft.place(law, coefficient)] = grid
    if set(system.values()) & set(MATCHING):
        add_dense_loss(draft, laws["dense"])
    return finished(draft, system, options, fixed, layout, offset)


def finished(draft, system, options, fixed, layout, offset):
    """The Problem of a complete draft."""
    p, n, slots = len(draft.names), len(draft.rows), list(offset)
    y = np.log([row["loss"] for row in draft.rows])

    def array(features):
        return np.array([features.get(j, np.zeros(n)) for j in range(p)])

    features = {name: {j: value for (owner, j), value in draft.features.items() if owner == name} for name in slots}
    to_raw, to_raw0 = np.eye(p), np.zeros(p)
    for i, j, value in draft.linear:
        to_raw[i, j] = to_raw[i, j] or value  # laws that share both parameters agree
    for i, value in draft.constant:
        to_raw0[i] = value
    logs = (*slots, "c", "H_max")
    is_log = np.array([name.rpartition(":")[2].partition("|")[0] in logs for name in draft.names])
    bounds = [draft.bounds.get(j, (y.min() + math.log(1e-6), y.max() + 3.0)) for j in range(p)]
    low, high = np.array(bounds).T
    head = None
    if draft.head:
        dense = draft.head["dense"] and np.array([array(term) for term in draft.head["dense"]])
        parts = {name: value for name, value in draft.head.items() if name != "log_D1"}
        head = Head(**parts | {"slot": slots.index(draft.head["slot"]), "dense": dense,
                               "linear": array(draft.head["linear"])})
    return Problem(draft.rows, system, options, list(draft.names), is_log, low, high,
                   np.array([array(features[name]) for name in slots]), np.array([offset[name] for name in slots]),
                   to_raw, to_raw0, y, fixed, layout, slots, draft.methods, array(draft.shift), head)


def missing(rows, system):
    """What these rows lack to fit `system`, [text]: three levels of each variable (N, and in place of it
    D, may have one), and more rows than parameters."""
    lacks = []
    if set(system.values()) & set(MATCHING) and "dense" not in system:
        return ["needs a dense law of the same rows"]
    for law in dict.fromkeys(system.values()):
        families = [family for family in system if system[family] == law]
        absent = [family for family in families if not any(row["family"] == family for row in rows)]
        if absent:
            lacks.append(f"has no {' or '.join(absent)} rows")
            continue
        members = [row for row in rows if row["family"] in families]
        found = {name: count_levels(members, name) for name in variables_of(law)}
        if "upcycled" not in families and law in SHARED_CURVE:  # the MoE's own curve
            found = {name: count_levels(members, name) for name in ("D", "N")}
        one_D = law in ("dense", "moe") and found["D"] == 1
        for name, count in found.items():
            needed = 3 if name != "N" or one_D else 1
            if count < needed and not (name == "D" and one_D):
                lacks.append(f"needs {needed} levels of {name}, has {count}" + ", at one D" * one_D)
    for label, count in Counter(method_label(row) for row in rows if row["family"] == "upcycled").items():
        if label in methods_of(rows, system) and count < 4:
            lacks.append(f"needs 4 rows of the method {label}, has {count}")
    if not lacks:
        problem = build(rows, system)
        needed = len(problem.names) + 3
        if len(problem.y) < needed:
            lacks.append(f"has {len(problem.y)} rows for {len(problem.names)} parameters, needs {needed}")
    return lacks


# ---------------------------------------------------------------------------------------------------------
# Loss and Jacobian

def log_sum(terms):
    """(ln of the sum of exp(terms), each term's portion of it) over the first axis."""
    top = terms.max(axis=0)
    terms = np.exp(terms - top)
    total = terms.sum(axis=0)
    return top + np.log(total), terms / total


def log_head_start(problem, theta, terms):
    """(ln H (S, n), its Jacobian (S, p, n)) at theta (S, p); terms (K, S, n) are those without the head
    start.

    H is c D1^gamma, or saturates at H_max, or is where the MoE's loss from scratch equals the dense model's.
    """
    head, alpha = problem.head, theta[:, problem.head.alpha, None]
    if head.dense is not None:
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
    """(logs of the terms (K, S, n), and with a head start ln H, its Jacobian, ln(D2 + H) and alpha) at
    theta (S, p)."""
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
    jacobian = np.zeros((len(theta), len(problem.names), len(problem.y)))
    for k, places in enumerate(problem.used):
        jacobian[:, places] += portion[k][:, None, :] * problem.features[k, places]
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


def whitened(values, whiten):
    """Whiten (S, n) or (S, p, n) by matrices (n, n) or (S, n, n), or by nothing."""
    if whiten is None:
        return values
    turned = np.swapaxes(whiten, -1, -2)
    if whiten.ndim == 2 or values.ndim == 3:
        return values @ turned
    return (values[:, None, :] @ turned)[:, 0]


def descend(problem, theta, delta, y=None, whiten=None, free=None, max_steps=400, tolerance=1e-11):
    """Many Huber fits at once by Levenberg-Marquardt: theta (S, p) starts -> (theta, objective (S,)).

    y: (S, n) or (n,), by default the problem's own ln losses. whiten: (n, n) or (S, n, n), what residuals are
    multiplied by; a row of zeros leaves a row out. delta: Huber's, one number or (n,). free: (p,) False holds
    a parameter.
    """
    theta = np.array(theta, float)
    count, n = len(theta), len(problem.y)
    y = np.broadcast_to(problem.y if y is None else y, (count, n))
    final, live = np.full(count, np.inf), np.arange(count)
    damping = np.full(count, 1e-3)

    def tried(theta, live):
        own = whiten[live] if whiten is not None and whiten.ndim == 3 else whiten
        predicted, jacobian = evaluate(problem, theta)
        return whitened(y[live] - predicted, own), whitened(jacobian, own)

    residual, jacobian = tried(theta, live)
    for _ in range(max_steps):
        cost = huber(residual, delta).sum(axis=1)
        weight = np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300))
        gradient = (jacobian @ (weight * residual)[:, :, None])[:, :, 0]
        target, gain = marquardt_step(problem, theta[live], gradient, jacobian, weight, damping[live], free)
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


def starts(problem):
    """Starts (S, p): the grid's, or what a simpler law of the same rows is fitted to, with new parameters
    on a grid."""
    head = problem.head
    if not (problem.methods or problem.shift.any() or head and (head.H_max is not None or head.dense is not None)):
        return grid_starts(problem)
    rows = [{name: value for name, value in row.items() if name not in ("method", *KNOBS)} for row in problem.rows]
    system = {family: "upcycled.effective_data_shared" if law in SHARED_CURVE else law
              for family, law in problem.system.items()}
    if head.dense is not None:  # loss matching starts from the dense and MoE laws alone
        system = {"dense": "dense", "moe": "moe"}
    simple = fit(rows, system, problem.options["share"], 0.01, problem.options["A_of_N"], quick=True)
    known = {law: simple.params(law) for law in set(system.values())}
    found = []
    for ceiling in (0.3, 3.0, 100.0) if head.H_max is not None else (1.0,):
        raw = []
        for name, is_log in zip(problem.names, problem.is_log):
            owner, _, short = name.rpartition(":")
            short = short.partition("|")[0]
            laws = [owner, "upcycled.effective_data_shared", "moe", *known]
            value = next((known[law][short] for law in laws if short in known.get(law, ())), 0.0)
            if short == "H_max":
                value = ceiling * max(row["D1"] for row in rows if "D1" in row)
            raw.append(math.log(max(value, 1e-300)) if is_log else value)
        found.append(np.linalg.solve(problem.to_raw, np.array(raw) - problem.to_raw0))
    return np.clip(found, problem.low + 1e-6, problem.high - 1e-6)


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


def family_deltas(problem, residual):
    """(n,) Huber's delta of each row: 1.345 robust standard deviations of its family's residuals (n,).

    The standard deviation is the median absolute residual times 1.4826, corrected for the fitted parameters.
    """
    families, delta = np.array([row["family"] for row in problem.rows]), np.zeros(len(residual))
    correction = math.sqrt(len(residual) / max(len(residual) - len(problem.names), 1))
    for family in problem.system:
        members = families == family
        delta[members] = 1.345 * 1.4826 * correction * np.median(np.abs(residual[members]))
    return np.maximum(delta, 1e-7)


@dataclass
class Fit:
    """A fitted system of laws."""
    problem: Problem
    theta: np.ndarray      # (p,) centred
    delta: object          # Huber's, on log residuals: one number or (n,); on whitened residuals where there is a whiten
    cost: float
    residual: np.ndarray   # (n,) ln measured - ln fitted
    whiten: object = None  # (n, n) what residuals were multiplied by, or None
    noise: object = None   # uncertainty.Noise

    def params(self, law, theta=None, method=None):
        """{parameter: value} of a law of the system, for one method of upcycling; from theta (S, p) arrays of
        draws.

        Without a method, the parameters are those of the method copy, or of the first.
        """
        problem, theta = self.problem, self.theta if theta is None else theta
        raw = theta @ problem.to_raw.T + problem.to_raw0
        raw = np.where(problem.is_log, np.exp(raw), raw)
        found = {}
        owners = {"": "", law: ""} | ({"dense": "dense_"} if law in MATCHING else {})
        for j, (owner, _, name) in enumerate(full.rpartition(":") for full in problem.names):
            name, _, label = name.partition("|")
            if owner in owners and (not label or label == method):
                found[owners[owner] + name] = raw[..., j]
                if not owner and law in MATCHING:
                    found["dense_" + name] = raw[..., j]
        for owner in owners.keys() & problem.fixed.keys():
            for name, (value, _) in problem.fixed[owner].items():
                found[owners[owner] + name] = np.full(theta.shape[:-1], value)[()]
        return {name: found[name] for name in parameter_names(law, problem.options["A_of_N"]) if name in found}


def fit(rows, system, share=("E",), delta="auto", A_of_N=False, quick=False):
    """The Fit of a system {family: law}: starts, then Huber least squares on ln loss with the analytic
    Jacobian.

    delta is Huber's on log residuals; "auto" is 1.345 robust standard deviations of each family's residuals.
    quick stops early, for a start.
    """
    problem = build(rows, system, share, A_of_N)
    theta, cost = descend(problem, starts(problem), 0.02 if delta == "auto" else max(delta, 0.005),
                          max_steps=7, tolerance=1e-4)
    theta = theta[np.argsort(cost)[:2]]
    width = delta
    for tolerance in (1e-5, 1e-5, 1e-11) if delta == "auto" else (1e-4 if quick else 1e-11,):
        if delta == "auto":
            width = family_deltas(problem, problem.y - evaluate(problem, theta[:1])[0][0])
        theta, cost = descend(problem, theta, width, tolerance=tolerance, max_steps=30 if quick else 400)
        theta = theta[[np.argmin(cost)]]
    theta, cost = theta[0], float(np.min(cost))
    if not quick:
        theta, cost = polish(problem, theta, width, cost)
    return Fit(problem, theta, width, cost, problem.y - evaluate(problem, theta[None])[0][0])


def polish(problem, theta, delta, cost):
    """(theta, objective) after scipy's least squares from theta, over the parameters that are inside their
    bounds."""
    inside = (theta > problem.low) & (theta < problem.high)

    def full(part):
        return np.where(inside, np.bincount(np.flatnonzero(inside), part, len(theta)), theta)[None]

    best = least_squares(
        lambda part: (evaluate(problem, full(part))[0][0] - problem.y) / delta, theta[inside],
        jac=lambda part: evaluate(problem, full(part))[1][0, inside].T / np.reshape(delta, (-1, 1)),
        loss="huber", x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=50)
    found = full(best.x)[0]
    lowest = huber(problem.y - evaluate(problem, found[None])[0][0], delta).sum()
    if lowest <= cost and (found >= problem.low).all() and (found <= problem.high).all():
        return found, float(lowest)
    return theta, cost
