"""Rows from known laws with known noise, for the tests of the laws and for bench.py coverage."""
import json
import math
import os

import numpy as np

import laws
import uncertainty
from rows import FAMILIES

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "laws", "liew2025.json")) as file:
    TABLE2 = {law: entry["params"] for law, entry in json.load(file)["laws"].items()}
CURVE = dict(A=60.0, alpha=0.22, B=7.05, beta=0.16, E=1.0)
HEAD_START = {
    "dense": dict(A=20.0, alpha=0.15, B=12.3, beta=0.2, E=1.0), "moe": CURVE,
    "upcycled.effective_data_shared": CURVE | dict(c=80.0, gamma=0.67),
    "upcycled.saturating": CURVE | dict(c=0.02, gamma=1.2, H_max=3e6),
    "upcycled.handicap": CURVE | dict(c=80.0, gamma=0.67, kappa=0.02),
    "upcycled.saturating_handicap": CURVE | dict(c=0.02, gamma=1.2, H_max=3e6, kappa=0.02),
    "upcycled.loss_matching": CURVE | dict(delta=0.01),
    "upcycled.loss_matching_handicap": CURVE | dict(delta=0.01, kappa=0.02),
}
THREE = {family: family for family in FAMILIES}
SIZES, DATA = [1.5e7, 6e7, 2.5e8, 1e9], np.geomspace(1e9, 1e11, 5)
SMALL = dict(N=[4e4, 1e5, 3e5], D=np.geomspace(2e5, 8e6, 5), D1=np.geomspace(5e5, 8e6, 4),
             D2=np.geomspace(2e5, 8e6, 5))


def shared_system(law):
    """The system of a law whose curve from scratch is its own."""
    return {"dense": "dense", "moe": law, "upcycled": law}


SHARED = shared_system("upcycled.effective_data_shared")
PILOT = dict(N=[1e5], D=np.geomspace(1.25e5, 2e6, 5), D1=[4e6], D2=[5e5, 1e6])  # one checkpoint


def loss_of(law, p, truth, n, point):
    """The loss of a law at one point; every formula is written out here, apart from the code under test."""
    if law in laws.SHARED_CURVE or law == "upcycled.effective_data":
        head, factor = 0.0, math.exp(p.get("kappa", 0.0)) if "D1" in point else 1.0
        if "D1" in point and "delta" in p:
            dense = truth["dense"]
            goal = math.exp(p["delta"]) * (dense["A"] * point["D1"] ** -dense["alpha"]
                                           + dense["B"] * n ** -dense["beta"] + dense["E"])
            head = ((goal - p["B"] * n ** -p["beta"] - p["E"]) / p["A"]) ** (-1 / p["alpha"])
        elif "D1" in point:
            head = p["c"] * point["D1"] ** p["gamma"]
            if "H_max" in p:
                head = (head ** -p["alpha"] + p["H_max"] ** -p["alpha"]) ** (-1 / p["alpha"])
        term = p["A"] * (point.get("D2", point.get("D")) + head) ** -p["alpha"]
        return factor * (term + p["B"] * n ** -p["beta"] + p["E"])
    if law == "upcycled.additive":
        term = p["A1"] * point["D1"] ** -p["alpha1"] + p["A2"] * point["D2"] ** -p["alpha2"]
    elif law.startswith("upcycled"):
        slope = -p["alpha2"] + p.get("alpha3", 0.0) * math.log(point["D1"])
        term = p["A"] * point["D1"] ** -p["alpha1"] * point["D2"] ** slope
    else:
        term = p["A"] * point["D"] ** -p["alpha"]
    return term + p["B"] * n ** -p["beta"] + p["E"]


def simulate(truth, system=THREE, N=SIZES, D=DATA, D1=DATA[::2], D2=DATA, noise=0.0, trunk_noise=0.0,
             dense_noise=0.0, moe_noise=None, seed=0, copies=1, twice=()):
    """Rows from laws. A row has noise in ln loss, and the luck of its trunk.

    A dense trunk is (N, copy), and its luck reaches what is upcycled from it. moe_noise is the luck of MoE
    trunks where it is another than trunk_noise. Sizes in `twice` have two copies from scratch.
    """
    random, rows = np.random.default_rng(seed), []
    for n in N:
        for copy in range(max(copies, 1 + (n in twice))):
            dense_luck = dense_noise * random.standard_normal()
            for family in system:
                if family == "upcycled" and copy >= copies:
                    continue
                levels = [(d1, {"D1": d1, "D2": d2}) for d1 in D1 for d2 in D2] if family == "upcycled" else \
                         [("", {"D": d}) for d in D]
                luck = {}
                for level, point in levels:
                    size = {"dense": 0.0, "moe": moe_noise or trunk_noise}.get(family, trunk_noise)
                    own = size * random.standard_normal()
                    luck.setdefault(level, own + dense_luck * (family != "moe"))
                    loss = loss_of(system[family], truth[system[family]], truth, n, point)
                    loss *= math.exp(luck[level] + noise * random.standard_normal())
                    rows.append({"family": family, "N": n, **point, "trunk": f"{family}-{n}-{level}-{copy}",
                                 "seed": copy, "loss": float(loss)})
    return rows


# ---------------------------------------------------------------------------------------------------------
# Coverage of intervals

HANDICAP = {"dense": dict(A=300.0, alpha=0.42, B=9.0, beta=0.2, E=0.8),
            "upcycled.handicap": dict(A=250.0, alpha=0.38, c=600.0, gamma=0.52, kappa=0.02, B=9.0, beta=0.2,
                                      E=0.8)}
LADDER = {"small": [1.4e4, 2.7e4, 5.6e4], "large": [1.4e4, 2.7e4, 5.6e4, 1.1e5, 2.2e5]}  # N
TOKENS = {"small": (5, 8e6), "large": (6, 3.2e7)}  # levels of D, and the largest
STUDIES = {  # {name: (truth, system, design)}; the published law at 3,000 times the size of the other
    (kind, size): (truth, system, dict(
        N=[scale * n for n in LADDER[size]],
        D=scale * np.geomspace(5e5, most, count), D1=scale * np.geomspace(5e5, most, count - 1),
        D2=scale * np.geomspace(5e5, most, 4 if size == "small" else count),
        copies=1 if size == "small" else 2, twice=[scale * 2.7e4]))
    for kind, truth, system, scale in (("interaction", TABLE2, THREE, 3000.0),
                                       ("handicap", HANDICAP, shared_system("upcycled.handicap"), 1.0))
    for size, (count, most) in TOKENS.items()}
NOISE = dict(noise=0.002, trunk_noise=0.004, dense_noise=0.005, moe_noise=0.013)


def overtaking(system, params, n, d1, largest):
    """(S,) D2*: the first D2 on a grid beyond which the MoE from scratch is better; inf where there is
    none."""
    D2 = largest * np.geomspace(1e-3, 1e5, 400)
    draws = {family: {name: np.reshape(value, (-1, 1)) for name, value in params[family].items()}
             for family in params}
    worse = laws.predict(system["upcycled"], draws["upcycled"], N=n, D1=d1, D2=D2) > \
        laws.predict(system["moe"], draws["moe"], N=n, D=D2)
    turns = np.hstack([worse[:, :1], worse[:, 1:] & ~worse[:, :-1]])
    return np.where(turns.any(axis=1), D2[turns.argmax(axis=1)], np.inf)


def coverage_targets(system, params, design):
    """{name: (S,)} of what intervals are judged by: exponents, head start, E, losses at the largest
    levels, D2*."""
    n, d1, d2 = (max(design[name]) for name in ("N", "D1", "D2"))
    params = {family: {name: np.atleast_1d(value) for name, value in own.items()}
              for family, own in params.items()}
    upcycled, law = params["upcycled"], system["upcycled"]
    found = {name: upcycled[name] for name in ("alpha3", "kappa", "E") if name in upcycled}
    if "c" in upcycled:
        found["H"] = laws.head_start(law, upcycled, D1=design["D1"][len(design["D1"]) // 2])
    found["loss at the corner"] = laws.predict(law, upcycled, N=n, D1=d1, D2=d2)
    found["loss at the MoE's corner"] = laws.predict(system["moe"], params["moe"], N=n, D=d2)
    found["D2*"] = overtaking(system, params, n, design["D1"][1], d2)
    return found


def coverage(kind="handicap", size="small", sets=100, draws=200, first=0, **noise):
    """{target: (share of 95 % intervals that hold the truth, share of 90 % intervals)} over simulated
    studies."""
    truth, system, design = STUDIES[kind, size]
    exact = coverage_targets(system, {family: truth[system[family]] for family in system}, design)
    hits = {name: np.zeros((sets, 2)) for name in exact}
    for k in range(sets):
        rows = simulate(truth, system, **design, **NOISE | noise, seed=first + k)
        fitted = uncertainty.fit_with_noise(rows, system)
        theta = uncertainty.bootstrap(fitted, draws, first + k)
        drawn = {family: fitted.params(law, theta) for family, law in system.items()}
        found = coverage_targets(system, drawn, design)
        for name, values in found.items():
            for j, level in enumerate((0.95, 0.9)):
                low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="nearest")
                hits[name][k, j] = low <= exact[name][0] <= high
    return {name: tuple(hit.mean(axis=0)) for name, hit in hits.items()}
