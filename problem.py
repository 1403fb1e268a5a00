"""Rows and a system of laws as the arrays that engine.py fits, and what rows lack for a fit."""
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from laws import HEAD_START, LAWS, MATCHING, SHARED_CURVE, law_terms, parameter_names, parse_feature
from rows import method_label

# Each method of upcycling has its own c, H and kappa. Methods have gamma in common: fitted apart, six of
# seven methods of one study agreed on it within their standard errors (0.05), and few studies have many D1.
BY_METHOD = ("c", "H", "kappa")
SLOPES = (0.03, 0.1, 0.3, 0.8)  # the grid of exponents that fits start from
HEAD_PARAMETERS = {  # {parameter of a head start: (the part that it is in, bounds, values to start from)}
    "gamma": ("head", (0.01, 3.0), (0.3, 0.7, 1.1)), "c": ("head", (-7.0, 7.0), (-2.0, 0.0, 2.0)),
    "H": ("head", (-7.0, 7.0), (-2.0, 0.0, 2.0)), "kappa": ("shift", (-1.0, 1.0), ()),
    "H_max": (None, (-7.0, 9.0), ()), "delta": (None, (-1.0, 1.0), ())}

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


# ---------------------------------------------------------------------------------------------------------
# The arrays of a fit

@dataclass
class Head:
    """The head start in a problem: the term A (D2 + H)^-alpha, where ln H or what it saturates from is
    linear."""
    slot: int                  # the term A
    alpha: int                 # the place of alpha
    x2: np.ndarray             # (n,) centred ln D2, or ln D from scratch
    here: np.ndarray           # (n,) whether the row's law has the term
    started: np.ndarray        # (n,) whether the row started from a dense checkpoint
    H_max: int | None          # its place, in the saturating law
    delta: int | None          # its place, in loss matching
    linear: np.ndarray = None  # (p, n) features of ln(c D1^gamma)
    dense: np.ndarray = None   # (terms, p, n) features of the dense law at (N, D1), in loss matching


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
    methods: list          # labels of methods of upcycling that have parameters of their own
    shift: np.ndarray      # (p, n) features of what is added to ln loss: kappa
    head: Head | None
    used: list = field(init=False)  # (K,) places of the parameters that occur in each term

    def __post_init__(self):
        self.used = [np.flatnonzero(np.abs(features).any(axis=1)) for features in self.features]

    def places(self, law, method=None):
        """{parameter of a law: its place}, for one method of upcycling, or for copy or the first one. A fixed
        parameter has none."""
        prefixes = {"": [""], law: [""]}
        if law in MATCHING:
            prefixes |= {"": ["", "dense_"], "dense": ["dense_"]}
        found = {}
        for place, full in enumerate(self.names):
            owner, _, name = full.rpartition(":")
            name, _, label = name.partition("|")
            if not label or label == method:
                found |= {prefix + name: place for prefix in prefixes.get(owner, ())}
        names = parameter_names(law, self.options["A_of_N"])
        return {name: found[name] for name in names if name in found}


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
        if law in ("dense", "moe") and count_levels(members[law], "D") == 1:
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


@dataclass
class Draft:
    """A problem under construction. A feature is an (n,) array that a parameter has in a part of the problem:
    in a term, which its coefficient names; in "head", ln(c D1^gamma); in "shift", ln of the handicap; or in
    "dense A", "dense B", ..., a term of the dense law at (N, D1)."""
    rows: list
    share: tuple
    alone: set                                    # laws that share nothing
    methods: list                                 # labels of methods with parameters of their own
    center: dict                                  # {variable: mean of its ln}
    names: dict = field(default_factory=dict)     # {full name: place}
    bounds: dict = field(default_factory=dict)    # {place: (low, high)} where they are not a coefficient's
    features: dict = field(default_factory=dict)  # {part: {place: (n,)}}
    linear: dict = field(default_factory=dict)    # {(place, place): value} of to_raw off its diagonal
    constant: dict = field(default_factory=dict)  # {place: value} of to_raw0

    def place(self, law, name):
        """The place of a law's parameter; a new one where it has none yet."""
        full = name if name in self.share and law not in self.alone else f"{law}:{name}"
        return self.names.setdefault(full, len(self.names))

    def set(self, part, place, here, values):
        """Set the feature of a parameter in a part, for some rows."""
        of_part = self.features.setdefault(part, {})
        of_part.setdefault(place, np.zeros(len(self.rows)))[here] = values

    def array(self, part):
        """(p, n) the features of all parameters in a part."""
        zeros, of_part = np.zeros(len(self.rows)), self.features.get(part, {})
        return np.array([of_part.get(place, zeros) for place in range(len(self.names))])


def add_term(draft, law, part, exponents, here, logs):
    """Add one term of a law for some rows, from {variable: (n,) its ln}; returns {exponent's place: values to
    start from}. The part is the term's coefficient, or that of the dense law at D1, as "dense A"."""
    a = draft.place(law, part.removeprefix("dense "))
    draft.set(part, a, here, 1.0)
    grid, single = {}, {}
    for exponent, feature in exponents.items():
        if feature == "-effective":
            continue
        sign, factors = parse_feature(feature)
        j = draft.place(law, exponent)
        draft.set(part, j, here, sign * math.prod(logs[name][here] - draft.center[name] for name in factors))
        if len(factors) == 1:
            single[factors[0]] = (j, sign)
            grid[j] = (0.0,) if exponent == "nu" else [-sign * slope for slope in SLOPES]
            draft.bounds.setdefault(j, (-3.0, 3.0))
            draft.linear[a, j] = -sign * draft.center[factors[0]]
        else:
            v, w = factors
            (jv, sign_v), (jw, sign_w) = single[v], single[w]
            grid[j] = (-0.03, 0.0, 0.03)
            draft.bounds[j] = (-0.3, 0.3)  # at 3 a raw coefficient overflows
            mean_v, mean_w = draft.center[v], draft.center[w]
            draft.linear |= {(a, j): sign * mean_v * mean_w, (jv, j): -sign * mean_w * sign_v,
                             (jw, j): -sign * mean_v * sign_w}
    return grid


def add_head(draft, law, coefficient, here, log_D1):
    """Add ln(D2 + H) to a term; returns ({place: values to start from}, the Head without its arrays of
    features)."""
    a, alpha, places = draft.place(law, coefficient), draft.place(law, "alpha"), {}
    x2 = np.log([row.get("D2", row.get("D")) for row in draft.rows])
    started = here & np.array(["D1" in row for row in draft.rows])
    m1, m2 = log_D1[started].mean() if started.any() else 0.0, x2[here].mean()
    draft.linear[a, alpha] = m2
    draft.bounds[alpha] = (0.005 if "H_max" in HEAD_START[law] or law in MATCHING else -3.0, 3.0)
    grid = {alpha: SLOPES}
    gamma = draft.place(law, "gamma") if "gamma" in HEAD_START[law] else None
    for name in HEAD_START[law]:
        part, bounds, values = HEAD_PARAMETERS[name]
        for j, of_method in of_methods(draft, law, name, started):
            places[name], draft.bounds[j] = j, bounds
            grid |= {j: values} if values else {}
            if part:
                draft.set(part, j, of_method, log_D1[started] - m1 if name == "gamma" else 1.0)
            if name in ("c", "H", "H_max"):  # tokens
                draft.constant[j] = m2
            if name == "c":
                draft.linear[j, gamma] = -m1
    return grid, Head(coefficient, alpha, x2 - m2, here, started, places.get("H_max"), places.get("delta"))


def of_methods(draft, law, name, started):
    """[(place, (n,) which started rows have it)] of a parameter, one for each method of upcycling where they
    differ in it."""
    if not draft.methods or name not in BY_METHOD:
        return [(draft.place(law, name), started)]
    labels = np.array([method_label(row) for row in draft.rows])
    return [(draft.place(law, name + f"|{label}" * (k > 0)), started & (labels == label))
            for k, label in enumerate(draft.methods)]


def methods_of(rows, system):
    """Labels of the methods of upcycling in the rows, copy or the first one first; [] of one method, or of
    laws in which methods do not differ."""
    if not set(BY_METHOD) & set(HEAD_START.get(system.get("upcycled"), ())):
        return []
    labels = {method_label(row) for row in rows if row["family"] == "upcycled"}
    return sorted(labels, key=lambda label: (label != "copy", label)) if len(labels) > 1 else []


def build(rows, system, share=("E",), A_of_N=False):
    """The Problem of fitting `system` = {family: law} to the rows of those families at once; laws share
    the named parameters. With A_of_N, A depends on N."""
    options = {"share": share, "A_of_N": A_of_N}
    rows = [row for row in rows if row["family"] in system]
    law_of_row = np.array([system[row["family"]] for row in rows])
    laws, fixed, alone = identified_terms(rows, law_of_row, options)
    factors = set().union(*map(factors_of, laws.values())) - {"effective"}
    logs = {name: np.log([variable(row, name) for row in rows]) for name in factors}
    center = {name: np.nanmean(value) for name, value in logs.items()}
    log_D1 = np.log([row.get("D1", 1.0) for row in rows])
    draft = Draft(rows, share, alone, methods_of(rows, system), center)
    layout, offset, head = {}, {}, None
    for law, terms in laws.items():
        here = law_of_row == law
        layout[law] = (here, {})
        for coefficient, exponents in terms.items():
            offset.setdefault(coefficient, np.full(len(rows), -np.inf))[here] = 0.0
            grid = {}
            if "-effective" in exponents.values():
                grid, head = add_head(draft, law, coefficient, here, log_D1)
            grid |= add_term(draft, law, coefficient, exponents, here, logs)
            layout[law][1][draft.place(law, coefficient)] = grid
    if set(system.values()) & set(MATCHING):
        for coefficient, exponents in laws["dense"].items():
            add_term(draft, "dense", f"dense {coefficient}", exponents, slice(None), logs | {"D": log_D1})
    return finished(draft, system, options, fixed, layout, offset, head)


def finished(draft, system, options, fixed, layout, offset, head):
    """The Problem of a complete draft."""
    p, y = len(draft.names), np.log([row["loss"] for row in draft.rows])
    to_raw, to_raw0 = np.eye(p), np.zeros(p)
    for (i, j), value in draft.linear.items():
        to_raw[i, j] = value
    for i, value in draft.constant.items():
        to_raw0[i] = value
    logs = (*offset, "c", "H", "H_max")
    is_log = np.array([name.rpartition(":")[2].partition("|")[0] in logs for name in draft.names])
    bounds = [draft.bounds.get(j, (y.min() + math.log(1e-6), y.max() + 3.0)) for j in range(p)]
    low, high = np.array(bounds).T
    if head:
        dense = [draft.array(part) for part in draft.features if part.startswith("dense ")]
        head.slot, head.linear = list(offset).index(head.slot), draft.array("head")
        head.dense = np.array(dense) if dense else None
    return Problem(draft.rows, system, options, list(draft.names), is_log, low, high,
                   np.array([draft.array(part) for part in offset]), np.array(list(offset.values())),
                   to_raw, to_raw0, y, fixed, layout, draft.methods, draft.array("shift"), head)


def missing(rows, system):
    """What these rows lack to fit `system`, [text]: three levels of each variable and enough rows.

    N may have one level, and so may D where N has three. Laws that share the MoE's curve need fewer D1. The
    laws of a pilot are for one N and one D1 alone, and they need fewer rows.
    """
    lacks = []
    fewest = {("upcycled.effective_data_shared", "D1"): 2, ("upcycled.handicap", "D1"): 2,
              ("upcycled.head_start", "D1"): 1, ("upcycled.head_start", "D2"): 1, ("dense.local", "D"): 2}
    fewest |= {(law, "D1"): 1 for law in MATCHING}
    pilot = "upcycled.head_start" in system.values()
    if set(system.values()) & set(MATCHING) and "dense" not in system:
        return ["needs a dense law of the same rows"]
    for law in dict.fromkeys(system.values()):
        families = [family for family in system if system[family] == law]
        absent = [family for family in families if not any(row["family"] == family for row in rows)]
        if absent:
            lacks.append(f"has no {' or '.join(absent)} rows")
            continue
        members = [row for row in rows if row["family"] in families]
        names = variables_of(law)
        if law in SHARED_CURVE and ("upcycled" not in families or pilot):  # the MoE's own curve
            names = ["D", "N"] + ["D1", "D2"] * pilot
        found = {name: count_levels(members, name) for name in names}
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
        problem = build(rows, system)
        needed = len(problem.names) + (1 if pilot else 0 if "dense.local" in system.values() else 3)
        if len(problem.y) < needed:
            lacks.append(f"has {len(problem.y)} rows for {len(problem.names)} parameters, needs {needed}")
    return lacks
