"""Rows and a system of laws as the arrays that engine.py fits, and what rows lack for a fit."""
import itertools
import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass

import numpy as np

from laws import HEAD_START, LAWS, MATCHING, SHARED_CURVE, law_terms, parameter_names, parse_feature
from rows import before_split, method_label

# Each method of upcycling has its own c, H and kappa. Methods have gamma in common: fitted apart, six of
# seven methods of one study agreed on it within their standard errors (0.05), and few studies have many D1.
BY_METHOD = ("c", "H", "kappa")
SLOPES = (0.03, 0.1, 0.3, 0.8)  # the grid of exponents that fits start from
HEAD_PARAMETERS = {  # {parameter of a head start: (bounds, values to start from)}; tokens are centred logs
    "gamma": ((0.01, 3.0), (0.3, 0.7, 1.1)), "c": ((-7.0, 7.0), (-2.0, 0.0, 2.0)),
    "H": ((-7.0, 7.0), (-2.0, 0.0, 2.0)), "H_max": ((-7.0, 9.0), (0.5, 3.0, 6.0)),
    "kappa": ((-1.0, 1.0), (0.0,)), "delta": ((-1.0, 1.0), (0.0,))}

# ---------------------------------------------------------------------------------------------------------
# What rows hold

def variable(row, name):
    """The row's value of a law's variable; nan where it has none."""
    try:
        if name == "sparsity":
            return row["N_total"] / row["N_active"]
        if name == "active_share":
            return row["num_experts_per_tok"] / row["num_local_experts"]
        if name == "effective":  # but for the head start
            return row.get("D2", row.get("D"))
        return row[{"experts": "num_local_experts"}.get(name, name)]
    except (KeyError, ZeroDivisionError):  # a dense model has no or 0 experts
        return math.nan


def of_family(rows, family, **values):
    """The rows of a family that have the given values."""
    return [row for row in rows
            if row["family"] == family and all(row[name] == value for name, value in values.items())]


def point_of(row):
    """{variable: its value} of all variables that a row has, for laws.predict."""
    names = ("N", "D", "D1", "D2", "N_active", "N_total", "experts", "sparsity", "active_share")
    return {name: value for name in names if not math.isnan(value := variable(row, name))}


def factors_of(terms):
    """The names in the features of a law's terms."""
    return {name for exponents in terms.values() for feature in exponents.values()
            for name in parse_feature(feature)[1]}


def variables_of(law):
    """The variables of a law, sorted: N, D, D1, ..."""
    factors = factors_of(LAWS[law])
    return sorted(factors - {"effective"} | ({"D1", "D2"} if "effective" in factors else set()))


def levels(values):
    """The levels of some numbers, ascending: each is the smallest of the values within 5 % above it."""
    found = []
    for value in sorted(value for value in set(values) if not math.isnan(value)):
        if not found or value > 1.05 * found[-1]:
            found.append(value)
    return found


def at_levels(rows):
    """The rows with the levels of their N and tokens in place of these, so that close ones are equal."""
    for names in (("N",), ("D", "D1", "D2")):
        found = levels(row[name] for row in rows for name in names if name in row)
        rows = [row | {name: found[bisect_right(found, row[name]) - 1] for name in names if name in row}
                for row in rows]
    return rows


def levels_of(rows, name):
    """The levels of a variable in the rows that have it."""
    return levels(variable(row, name) for row in rows)


def levels_of_N(rows, system):
    """The number of levels of N in each family of the system {family: law}."""
    return [len(levels_of(of_family(rows, family), "N")) for family in system]


# ---------------------------------------------------------------------------------------------------------
# The arrays of a fit

@dataclass
class Head:
    """The head start in a problem: a term A (D2 + H)^-alpha. ln H, or what it saturates from, is linear."""
    slot: int            # the term A
    alpha: int           # the place of alpha
    x2: np.ndarray       # (n,) centred ln D2, or ln D from scratch
    here: np.ndarray     # (n,) whether the row's law has the term
    started: np.ndarray  # (n,) whether the row started from a dense checkpoint
    H_max: int | None    # its place, in the saturating law
    delta: int | None    # its place, in loss matching
    linear: np.ndarray   # (p, n) features of ln(c D1^gamma), or of ln H
    dense: np.ndarray    # (terms, p, n) features of the dense law at (N, D1); no terms but in loss matching


class Problem:
    """The rows of the families of a system {family: law} and these laws as arrays, to be fitted at once. The
    laws share the named parameters. With A_of_N, A depends on N. Coefficients are fitted as logs, variables
    are centred. Bounds keep finite what rows leave open: exponents within 3, of a product within 0.3, a term
    above a millionth of the loss.
    """

    def __init__(self, rows, system, share=("E",), A_of_N=False):
        self.system = system
        self.rows = rows = [row for row in rows if row["family"] in system]
        self.law_of_row = np.array([system[row["family"]] for row in rows])
        self.laws, self.fixed, alone = identified_terms(rows, system, share, A_of_N)
        self.methods = methods_of(rows, system)  # labels of methods with parameters of their own
        self.names = names_of(self.laws, alone, share, self.methods)
        self.y = np.log([row["loss"] for row in rows])                          # (n,) ln loss
        self.slots = list(dict.fromkeys(itertools.chain(*self.laws.values())))  # (K,) coefficients of terms
        p, n, terms = len(self.names), len(rows), len(self.slots)
        short = [name.partition("|")[0].rpartition(":")[2] for name in self.names]
        self.is_log = np.array([name in (*self.slots, "c", "H", "H_max") for name in short])
        self.low = np.full(p, self.y.min() + math.log(1e-6))
        self.high = np.full(p, self.y.max() + 3.0)
        self.grid = {}                              # {name of an exponent: values to start from}
        self.features = np.zeros((terms, p, n))
        self.offset = np.full((terms, n), -np.inf)  # 0 where the row's law has the term
        self.shift = np.zeros((p, n))               # features of what is added to ln loss: kappa
        self.to_raw, self.to_raw0 = np.eye(p), np.zeros(p)  # raw = to_raw @ centred + to_raw0
        self.head = None
        self.fill()

    def fill(self):
        """Fill the arrays, term by term."""
        factors = set().union(*map(factors_of, self.laws.values()))
        factors |= {"D1"} if any("D1" in row for row in self.rows) else set()
        logs = {name: np.log([variable(row, name) for row in self.rows]) for name in factors}
        center = {name: np.nanmean(values) for name, values in logs.items()}
        logs = {name: values - center[name] for name, values in logs.items()}
        for law, terms in self.laws.items():
            here = self.law_of_row == law
            for coefficient in terms:
                slot = self.slots.index(coefficient)
                self.offset[slot, here] = 0.0
                add_term(self, law, coefficient, self.features[slot], here, logs, center)
            if law in HEAD_START:
                add_head(self, law, logs, center)
        if set(self.laws) & set(MATCHING):
            D1 = logs.get("D1", 0.0 * self.y) + center.get("D1", 0.0) - center.get("D", 0.0)
            self.head.dense = np.zeros((len(self.laws["dense"]), *self.shift.shape))
            for coefficient, features in zip(self.laws["dense"], self.head.dense):
                add_term(self, "dense", coefficient, features, slice(None),
                         logs | {"D": np.nan_to_num(D1)}, center)

    def places(self, law, method=None):
        """{parameter of a law: its place, or None where it is fixed at 0}, for one method of upcycling, or
        for copy or the first one."""
        found = {}
        for full in parameter_names(law, A_of_N=True):
            owner, name = ("dense" if full.startswith("dense_") else law), full.removeprefix("dense_")
            named = f"{owner}:{name}|{method}", f"{owner}:{name}", name
            if name in self.fixed[owner]:
                found[full] = None
            elif known := [self.names.index(one) for one in named if one in self.names]:
                found[full] = known[0]
        return found


def identified_terms(rows, system, share, A_of_N):
    """({law: its terms that these rows can tell apart}, {law: {parameter that is fixed at 0: why}}, laws
    that share nothing). One level of N or D: the term folds into an E of the law's own. Rows that mix numbers
    of experts have an E of their own too. Two levels of N in every law that shares E: E is 0."""
    laws = {law: law_terms(law, A_of_N) for law in dict.fromkeys(system[row["family"]] for row in rows)}
    fixed, alone, sizes = {law: {} for law in laws}, set(), {}
    for law, terms in laws.items():
        if terms.get("B") != {"beta": "-N"}:
            continue
        members = [row for row in rows if system[row["family"]] == law]
        sizes[law] = len(levels_of(members, "N"))
        experts = levels(before_split(row)["num_local_experts"] or math.nan for row in members)
        one_D = law in ("dense", "moe") and len(levels_of(members, "D")) == 1
        if one_D:
            why = "one level of D: A D^-alpha is part of E, and nothing is known of another D"
            fixed[law] |= dict.fromkeys(("A", *terms.pop("A")), why)
        if sizes[law] == 1:
            fixed[law] |= dict.fromkeys(("B", *terms.pop("B")), "one level of N: B N^-beta is part of E")
            for exponents in terms.values():
                if exponents.pop("nu", None):
                    fixed[law]["nu"] = "one level of N: N^-nu is part of A"
        if one_D or sizes[law] == 1 or len(experts) > 1:
            alone.add(law)
    for law in sizes:
        joint = [law] if law in alone or "E" not in share else sizes.keys() - alone
        if sizes[law] == 2 == max(sizes[other] for other in joint):
            del laws[law]["E"]
            fixed[law]["E"] = "two levels of N do not separate E from B N^-beta"
    return laws, fixed, alone


def names_of(laws, alone, share, methods):
    """The names of all parameters of a problem: "law:parameter", or "parameter" where laws share it, or
    "law:parameter|method" for each method of upcycling but the first, which has no mark."""
    names = []
    for law, terms in laws.items():
        for coefficient, exponents in terms.items():
            head = HEAD_START[law] if "-effective" in exponents.values() else ()
            for name in (coefficient, *exponents, *head):
                names.append(name if name in share and law not in alone else f"{law}:{name}")
                names += [f"{names[-1]}|{label}" for label in methods[1:] if name in BY_METHOD]
    return list(dict.fromkeys(names))


def add_term(problem, law, coefficient, features, here, logs, center):
    """Add one term of a law for some rows to features (p, n), from centred logs {variable: (n,)} and
    centers {variable: mean of its ln}."""
    places = problem.places(law)
    features[places[coefficient], here] = 1.0
    known = {(): (places[coefficient], 1)}  # {variables of a feature: (place of its parameter, sign)}
    for exponent, feature in problem.laws[law][coefficient].items():
        sign, factors = parse_feature(feature)
        j, single = places[exponent], len(factors) == 1
        if feature != "-effective":
            features[j, here] = sign * math.prod(logs[name][here] for name in factors)
        # a product of centred variables, multiplied out, adds to the parameters of products of fewer
        for rest in itertools.chain(*(itertools.combinations(factors, k) for k in range(len(factors)))):
            i, sign_of_rest = known[rest]
            means = [-center[name] for name in factors if name not in rest]
            problem.to_raw[i, j] = sign * sign_of_rest * math.prod(means)
        known[tuple(factors)] = j, sign
        positive = feature == "-effective" and (law in MATCHING or "H_max" in HEAD_START[law])
        problem.low[j], problem.high[j] = (0.005 if positive else -3.0, 3.0) if single else (-0.3, 0.3)
        if exponent != "nu":
            problem.grid[problem.names[j]] = [-sign * s for s in SLOPES] if single else (-0.03, 0.0, 0.03)


def add_head(problem, law, logs, center):
    """Add the head start of a law to its term A, as problem.head, and the handicap."""
    places, here = problem.places(law), problem.law_of_row == law
    started = here & np.array(["D1" in row for row in problem.rows])
    labels = np.array([method_label(row) for row in problem.rows])
    problem.head = head = Head(
        problem.slots.index("A"), places["alpha"], logs["effective"], here, started,
        places.get("H_max"), places.get("delta"), np.zeros_like(problem.shift), np.empty(0))
    for name in HEAD_START[law]:
        bounds, problem.grid[problem.names[places[name]]] = HEAD_PARAMETERS[name]
        for label in problem.methods if name in BY_METHOD and problem.methods else [None]:
            j, of_method = problem.places(law, label)[name], started & ((labels == label) | (label is None))
            problem.low[j], problem.high[j] = bounds
            if name == "kappa":
                problem.shift[j, of_method] = 1.0
            elif name in ("c", "H", "gamma"):
                head.linear[j, of_method] = logs["D1"][of_method] if name == "gamma" else 1.0
            if name in ("c", "H", "H_max"):  # tokens
                problem.to_raw0[j] = center["effective"]
            if name == "c":
                problem.to_raw[j, places["gamma"]] = -center["D1"]


def methods_of(rows, system):
    """Labels of the methods of upcycling in the rows, copy or the first one first; [] of one method, or of
    laws in which methods do not differ."""
    if not set(BY_METHOD) & set(HEAD_START.get(system.get("upcycled"), ())):
        return []
    labels = {method_label(row) for row in rows if row["family"] == "upcycled"}
    return sorted(labels, key=lambda label: (label != "copy", label)) if len(labels) > 1 else []


def missing(rows, system, A_of_N=False):
    """What these rows lack to fit `system`, [text]: three levels of each variable and enough rows. N may have
    one level, and so may D where N has three. The laws of a pilot are for one N and one D1 alone."""
    lacks = []
    fewest = {("upcycled.effective_data_shared", "D1"): 2, ("upcycled.handicap", "D1"): 2,
              ("upcycled.head_start", "D1"): 1, ("upcycled.head_start", "D2"): 1, ("dense.local", "D"): 2}
    fewest |= {(law, "D1"): 1 for law in MATCHING}
    pilot = "upcycled.head_start" in system.values()
    if set(system.values()) & set(MATCHING) and "dense" not in system:
        return ["needs a dense law of the same rows"]
    for law in dict.fromkeys(system.values()):
        families = [family for family in system if system[family] == law]
        absent = [family for family in families if not of_family(rows, family)]
        if absent:
            lacks.append(f"has no {' or '.join(absent)} rows")
            continue
        members = [row for row in rows if row["family"] in families]
        names = variables_of(law)
        if law in SHARED_CURVE and ("upcycled" not in families or pilot):  # the MoE's own curve
            names = ["D", "N"] + ["D1", "D2"] * pilot
        elif law not in SHARED_CURVE:  # there a row from scratch has no D1
            lacks += [f"has rows without {name}" for name in names
                      if any(math.isnan(variable(row, name)) for row in members)]
        found = {name: len(levels_of(members, name)) for name in names}
        if law == "dense.local":  # D1 may be much larger than what comes after it
            found["D"] = len({row["D"] for row in members})
        one_D = law in ("dense", "moe") and found["D"] == 1
        for name, count in found.items():
            needed = fewest.get((law, name), 1 if name == "N" and not one_D else 3)
            if count < needed and not (name == "D" and one_D):
                lacks.append(f"needs {needed} levels of {name}, has {count}" + ", at one D" * one_D)
            if pilot and name in ("N", "D1") and count > 1:
                lacks.append(f"is for one level of {name}, has {count}")
    for label, count in Counter(method_label(row) for row in rows if row["family"] == "upcycled").items():
        if label in methods_of(rows, system) and count < (1 if pilot else 4):
            lacks.append(f"needs 4 rows of the method {label}, has {count}")
    if not lacks:
        problem = Problem(rows, system, A_of_N=A_of_N)
        needed = len(problem.names) + (1 if pilot else 0 if "dense.local" in system.values() else 3)
        if len(problem.y) < needed:
            lacks.append(f"has {len(problem.y)} rows for {len(problem.names)} parameters, needs {needed}")
    return lacks
