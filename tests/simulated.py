"""Rows from known laws, for the tests of the laws."""

import json
import math
import os

import numpy as np

from rows import FAMILIES

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "laws", "liew2025.json")) as file:
    TABLE2 = {law: entry["params"] for law, entry in json.load(file)["laws"].items()}
HEAD_START = {
    "dense": dict(A=20.0, alpha=0.15, B=12.3, beta=0.2, E=1.0),
    "moe": dict(A=60.0, alpha=0.22, B=7.05, beta=0.16, E=1.0),
    "upcycled.effective_data_shared": dict(A=60.0, alpha=0.22, c=80.0, gamma=0.67, B=7.05, beta=0.16, E=1.0),
}
THREE = {family: family for family in FAMILIES}
SHARED = {
    "dense": "dense",
    "moe": "upcycled.effective_data_shared",
    "upcycled": "upcycled.effective_data_shared",
}
SIZES, DATA = [1.5e7, 6e7, 2.5e8, 1e9], np.geomspace(1e9, 1e11, 5)


def simulate(
    truth, system=THREE, N=SIZES, D=DATA, D1=DATA[::2], D2=DATA, noise=0.0, trunk_noise=0.0, seed=0, copies=1
):
    """Rows from laws, the formulas written out here; a trunk is (family, N, D1, copy)."""
    random, rows = np.random.default_rng(seed), []
    for n in N:
        for family, points in (
            ("dense", [{"D": d} for d in D]),
            ("moe", [{"D": d} for d in D]),
            ("upcycled", [{"D1": a, "D2": b} for a in D1 for b in D2]),
        ):
            effects = {}
            for point in points if family in system else ():
                law, p = system[family], truth[system[family]]
                if "effective" in law:
                    head = p["c"] * point["D1"] ** p["gamma"] if "D1" in point else 0.0
                    term = p["A"] * (point.get("D2", point.get("D")) + head) ** -p["alpha"]
                elif law == "upcycled.additive":
                    term = p["A1"] * point["D1"] ** -p["alpha1"] + p["A2"] * point["D2"] ** -p["alpha2"]
                elif family == "upcycled":
                    term = (
                        p["A"]
                        * point["D1"] ** -p["alpha1"]
                        * point["D2"] ** (-p["alpha2"] + p.get("alpha3", 0.0) * math.log(point["D1"]))
                    )
                else:
                    term = p["A"] * point["D"] ** -p["alpha"]
                for copy in range(copies):
                    trunk = f"{n}-{point.get('D1')}-{copy}"
                    effect = effects.setdefault(trunk, trunk_noise * random.standard_normal())
                    loss = (term + p["B"] * n ** -p["beta"] + p["E"]) * math.exp(
                        effect + noise * random.standard_normal()
                    )
                    rows.append(
                        {"family": family, "N": n, **point, "trunk": trunk, "seed": copy, "loss": float(loss)}
                    )
    return rows
