"""Scaling laws as data, what they predict, and rows with a system of laws as the arrays that engine.py fits.

A law is a sum of terms. Each term is a coefficient times powers of N, D, D1, D2, ..., so its logarithm is
linear in (ln coefficient, exponents), and the logarithm of the loss is a log-sum-exp. LAWS holds the laws as
data; engine.py fits them all. Token and parameter counts are raw numbers, losses are nats per token, ln is
natural.
"""
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from configurator import ConfigError
from rows import method_label

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
    # A (D2 + H)^-alpha + B N^-beta + E: the head start H, in tokens, fades
    "upcycled.effective_data": EFFECTIVE,
    # the same curve for the MoE from scratch, which is H = 0, in all that follow
    "upcycled.effective_data_shared": EFFECTIVE,
    "upcycled.saturating": EFFECTIVE,
    "upcycled.handicap": EFFECTIVE,  # times e^kappa for upcycled runs
    "upcycled.loss_matching": EFFECTIVE,
    "upcycled.loss_matching_0": EFFECTIVE,
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
HEAD_START = {  # {law with a head start: the parameters that it adds}
    "upcycled.effective_data": ("c", "gamma"),         # H = c D1^gamma
    "upcycled.effective_data_shared": ("c", "gamma"),
    "upcycled.saturating": ("c", "gamma", "H_max"),    # H^-alpha = (c D1^gamma)^-alpha + H_max^-alpha
    "upcycled.handicap": ("c", "gamma", "kappa"),
    "upcycled.loss_matching": ("delta",),              # L_moe(N, H) = e^delta L_dense(N, D1)
    "upcycled.loss_matching_0": (),                    # delta = 0: nothing is fitted to upcycled runs
}
# Each method of upcycling has its own c and kappa. Methods have gamma in common: fitted apart, six of seven
# methods of one study agreed on it within their standard errors (0.05), and few studies have many D1.
BY_METHOD = ("c", "kappa")
MATCHING = ("upcycled.loss_matching", "upcycled.loss_matching_0")
SHARED_CURVE = [law for law in HEAD_START if law != "upcycled.effective_data"]
LEAST_GAP = 1e-4  # loss matching: the dense loss counts as at least this share above the MoE's asymptote
SLOPES = (0.03, 0.1, 0.3, 0.8)  # the grid of exponents that fits start from
RIVALS = [law for law in LAWS if law.startswith("upcycled") and "sparsity" not in law]
NAMES = {  # where the name of a law is not that of its key
    "moe": "MoE from scratch", "upcycled": "interaction",
    "upcycled.effective_data_shared": "effective data (shared)",
    "upcycled.saturating": "saturating head start", "upcycled.loss_matching_0": "loss matching (delta = 0)"}


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
    return f"{value / unit:.3g}{name}"


# ---------------------------------------------------------------------------------------------------------
# What laws predict

def parse_feature(feature):
    """"-D" -> (-1, ["D"]); "D1*D2" -> (1, ["D1", "D2"])."""
    return (-1 if feature.startswith("-") else 1), feature.lstrip("-").split("*")


def parameter_names(law, A_of_N=False):
    """The names of a law's parameters in the order of the formula: A alpha1 alpha2 alpha3 B beta E.

    With A_of_N, A is A N^-nu. Loss matching has the dense law's parameters too, as dense_A, dense_alpha, ...
    """
    names = []
    for coefficient, exponents in law_terms(law, A_of_N).items():
        names += [coefficient, *exponents] + [*HEAD_START.get(law, ())] * ("-effective" in exponents.values())
    if law in MATCHING:
        names += [f"dense_{name}" for name in parameter_names("dense", A_of_N)]
    return list(dict.fromkeys(names))


def law_terms(law, A_of_N=False):
    """The terms of a law. With A_of_N the terms of data are also proportional to N^-nu, in laws that know
    N."""
    terms = LAWS[law]
    if not A_of_N or terms.get("B") != {"beta": "-N"}:
        return terms
    return {name: exponents | {"nu": "-N"} if name in ("A", "A1", "A2") else exponents
            for name, exponents in terms.items()}


def head_start(law, params, N=None, D1=0.0):
    """H in tokens: how many tokens of MoE training a dense checkpoint is worth that has seen D1 tokens.

    Only loss matching needs N: its H solves L_moe(N, H) = e^delta L_dense(N, D1).
    """
    alpha = params["alpha"]
    with np.errstate(divide="ignore", over="ignore"):
        if law in MATCHING:
            names = [name for name in params if name.startswith("dense_")]
            dense = {name.removeprefix("dense_"): params[name] for name in names}
            goal = np.exp(params.get("delta", 0.0)) * predict("dense", dense, N=N, D=D1)
            floor = params["B"] * np.asarray(N, float) ** -params["beta"] + params["E"]
            gap = np.maximum(goal - floor, LEAST_GAP * goal)
            scale = params["A"] * np.asarray(N, float) ** -params.get("nu", 0.0)
            return (gap / scale) ** (-1 / alpha)
        power = np.exp(np.log(params["c"]) + params["gamma"] * np.log(np.asarray(D1, float)))
        if "H_max" in params:
            return (power ** -alpha + params["H_max"] ** -alpha) ** (-1 / alpha)
        return power


def predict(law, params, **variables):
    """The loss by the law of that name, in nats per token.

    params is {name: number or array of draws}; variables are N=, D=, D1=, D2=, ... All of them broadcast
    against each other. Under a law with a head start, D1 = 0 or D= instead of D1= and D2= is training from
    scratch.
    """
    variables = {name: np.asarray(value, float) for name, value in variables.items()}
    factor = 1.0
    with np.errstate(divide="ignore"):
        if law in HEAD_START:
            D1, D2 = variables.get("D1", np.zeros(())), variables.get("D2", variables.get("D"))
            head = head_start(law, params, variables.get("N"), D1)
            variables["effective"] = D2 + np.where(D1 > 0, head, 0.0)
            factor = np.exp(np.where(D1 > 0, params.get("kappa", 0.0), 0.0))
        logs = {name: np.log(value) for name, value in variables.items()}
    loss = 0.0
    for coefficient, exponents in law_terms(law, "nu" in params).items():
        power = 0.0
        for exponent, feature in exponents.items():
            sign, factors = parse_feature(feature)
            power = power + sign * params[exponent] * math.prod(logs[name] for name in factors)
        loss = loss + params[coefficient] * np.exp(power)
    return factor * loss


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
    a, alpha = draft.place(law, coefficient), draft.place(law, "alpha")
    x2 = np.log([row.get("D2", row.get("D")) for row in draft.rows])
    started = here & np.array(["D1" in row for row in draft.rows])
    m1, m2 = log_D1[started].mean() if started.any() else 0.0, x2[here].mean()
    draft.linear[a, alpha] = m2
    added, grid = HEAD_START[law], {alpha: SLOPES}
    draft.bounds[alpha] = (0.005 if "H_max" in added or law in MATCHING else -3.0, 3.0)
    if "gamma" in added:
        gamma = draft.place(law, "gamma")
        draft.set("head", gamma, started, log_D1[started] - m1)
        draft.bounds[gamma] = (0.01, 3.0)
    for name in set(added) & {"c", "H"}:
        for j, of_method in of_methods(draft, law, name, started):
            draft.set("head", j, of_method, 1.0)
            draft.linear |= {(j, gamma): -m1} if name == "c" else {}
            draft.constant[j] = m2
            draft.bounds[j] = (-7.0, 7.0)
            grid[j] = (-2.0, 0.0, 2.0)
    if "gamma" in added:
        grid[gamma] = (0.3, 0.7, 1.1)
    if "kappa" in added:
        for j, of_method in of_methods(draft, law, "kappa", started):
            draft.set("shift", j, of_method, 1.0)
            draft.bounds[j] = (-1.0, 1.0)
    places = {name: draft.place(law, name) for name in ("H_max", "delta") if name in added}
    if "H_max" in places:
        draft.constant[places["H_max"]] = m2
    draft.bounds |= {places[name]: bounds for name, bounds in
                     (("H_max", (-7.0, 9.0)), ("delta", (-1.0, 1.0))) if name in places}
    return grid, Head(coefficient, alpha, x2 - m2, here, started, places.get("H_max"), places.get("delta"))


def of_methods(draft, law, name, started):
    """[(place, (n,) which started rows have it)] of a parameter that each method of upcycling has for
    itself."""
    if not draft.methods:
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

    N may have one level, and so may D where N has three. Laws that share the MoE's curve need fewer D1.
    """
    lacks = []
    needed_D1 = {"upcycled.effective_data_shared": 2, "upcycled.handicap": 2} | dict.fromkeys(MATCHING, 1)
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
            needed = needed_D1.get(law, 3) if name == "D1" else 3 if name != "N" or one_D else 1
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
