"""What a planned study will find, were the laws of a file true: the errors of alpha3 and D2*, its cost."""
import dataclasses
import json
import math

import numpy as np
from scipy.stats import norm

from configurator import ConfigError, parse
from engine import evaluate, fit
from laws import overtaking, predict
from plan_page import columns, percent
from problem import of_family, point_of
from rows import FAMILIES
from sweep import Study, planned_rows, study_totals
from uncertainty import covariance, trunk_of


def expected(laws, rows, options, N, D1):
    """What least squares on planned rows, which have no losses yet, will find, to first order in the noise.

    {"rows", "s.e. of alpha3", "power" to reject alpha3 = 0 at 5 %, "D2*" at N and D1, "s.e. of ln D2*"}; the
    last two are nan where there is no D2*.
    """
    system = {family: family for family in FAMILIES if family in laws and of_family(rows, family)}
    if "upcycled" not in system:
        raise ConfigError("--design needs an upcycled law in the laws file and upcycled runs in the study")
    rows = [row | {"loss": float(predict(row["family"], laws[row["family"]]["params"], **point_of(row)))}
            for row in rows if row["family"] in system]
    found = fit(rows, system)
    free = (found.theta > found.problem.low) & (found.theta < found.problem.high)  # the laws may lack a term
    jacobian = evaluate(found.problem, found.theta[None])[1][0] * free[:, None]
    trunks = trunk_of(found.problem.rows)
    together = np.equal.outer(trunks, trunks)
    noise = options.trunk_noise ** 2 * together + options.noise ** 2 * np.eye(len(trunks))
    cov = covariance(jacobian, noise)
    place, alpha3 = found.problem.names.index("upcycled:alpha3"), found.params("upcycled")["alpha3"]
    error = math.sqrt(cov[place, place])

    def ln_star(theta):
        if "moe" not in system:
            return math.nan
        star = overtaking(D1, lambda tokens: predict("moe", found.params("moe", theta), N=N, D=tokens)
                          - predict("upcycled", found.params("upcycled", theta), N=N, D1=D1, D2=tokens))
        return math.log(star) if 0 < star < math.inf else math.nan

    step = 1e-4 * np.diag(free)
    slope = np.array([(ln_star(found.theta + e) - ln_star(found.theta - e)) / 2e-4 for e in step])
    return {"rows": len(rows), "s.e. of alpha3": error,
            "power": float(norm.cdf(alpha3 / error - 1.96) + norm.cdf(-alpha3 / error - 1.96)),
            "D2*": math.exp(ln_star(found.theta)), "s.e. of ln D2*": float(np.sqrt(slope @ cov @ slope))}


def longer(levels):
    """Levels with one more, as far from the last as that is from the one before."""
    levels = sorted(levels)
    factor = levels[-1] / levels[-2] if len(levels) > 1 else 4
    return [*levels, int(levels[-1] * factor)]


def variants(study):
    """{name: study}: the study, and the study with one more level of each axis; another N doubles widths."""
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    wider = {key: value * 2 if key in widths else value for key, value in study.sizes[-1].items()}
    changes = {"D1": {"D1": longer(study.D1)}, "D2": {"D2": longer(study.D2)},
               "N": {"sizes": [*study.sizes, wider]}}
    more = {f"one more level of {name}": dataclasses.replace(study, **new) for name, new in changes.items()}
    return {"as it is": study} | more


def plan_design(laws, options):
    """{variant of the study: what `expected` says, with its tokens, FLOPs and hours}."""
    study, found = parse(Study, [options.design, "--train_withheld"]), {}
    runs = [row for row in planned_rows(study) if row["family"] == "upcycled"]
    N, D1 = (getattr(options, name) or max((row[name] for row in runs), default=0.0) for name in ("N", "D1"))
    for name, variant in variants(study).items():
        totals = study_totals(variant)
        found[name] = {"N": N, "D1": D1} | expected(laws, planned_rows(variant), options, N, D1) | totals
        if options.flops_per_gpu:
            found[name]["hours"] = totals["flops"] / (options.flops_per_gpu * options.mfu * 3600)
    return found


def print_design(laws, options):
    """What plan.py --design prints: a table of the variants, or JSON; what there is none of is a dash or
    null."""
    found = plan_design(laws, options)
    if options.json:
        print(json.dumps({name: {key: value if math.isfinite(value) else None for key, value in cells.items()}
                          for name, cells in found.items()}))
        return
    table = [(name, *(f"{value:.3g}" if math.isfinite(value) else "-" for value in cells.values()))
             for name, cells in found.items()]
    print(f"Were {options.laws} true, with noise of {percent(options.noise)} a run and "
          f"{percent(options.trunk_noise)} a trunk:", *columns([("design", *found["as it is"]), *table]),
          sep="\n")
