"""What a planned study will find, were the laws of a file true: the errors of alpha3 and D2*, its cost."""
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
    found = fit(rows, system, A_of_N=any("nu" in laws[family]["params"] for family in system))
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
                          - predict("upcycled", found.params("upcycled", theta), N=N, D1=D1, D2=tokens),
                          points=4001)  # its slope is taken
        return math.log(star) if 0 < star < math.inf else math.nan

    step = 1e-4 * np.diag(free)
    slope = np.array([(ln_star(found.theta + e) - ln_star(found.theta - e)) / 2e-4 for e in step])
    return {"rows": len(rows), "s.e. of alpha3": error,
            "power": float(norm.cdf(alpha3 / error - 1.96) + norm.cdf(-alpha3 / error - 1.96)),
            "D2*": math.exp(ln_star(found.theta)), "s.e. of ln D2*": float(np.sqrt(slope @ cov @ slope))}


def print_design(laws, options):
    """What plan.py --design prints: what `expected` says of a study, with its tokens, FLOPs and hours, as a
    table or JSON; what there is none of is a dash or null."""
    study = parse(Study, [options.design, "--train_withheld"])
    rows = planned_rows(study)
    runs = of_family(rows, "upcycled")
    N, D1 = (getattr(options, name) or max((row[name] for row in runs), default=0.0) for name in ("N", "D1"))
    found = {"N": N, "D1": D1} | expected(laws, rows, options, N, D1) | study_totals(study)
    if options.flops_per_gpu:
        found["hours"] = found["flops"] / (options.flops_per_gpu * options.mfu * 3600)
    if options.json:
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in found.items()}))
        return
    values = [f"{value:.3g}" if math.isfinite(value) else "-" for value in found.values()]
    print(f"Were {options.laws} true, with noise of {percent(options.noise)} a run and "
          f"{percent(options.trunk_noise)} a trunk:", *columns([list(found), values]), sep="\n")
