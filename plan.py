"""Laws and your numbers -> upcycle, train the MoE from scratch or continue the dense model; or: cannot say.

    python plan.py --N=1e9 --D1=1e11 --tokens=5e10        a dense checkpoint is there: what now?
    python plan.py --flops=1e21 --fresh                   nothing is there: how to split the budget?
    python plan.py --N=1e9 --D1=1e11 --tokens=5e10 --html=plan.html      the answer as a page with sliders
    python plan.py --design=config/study_quick.py         what will this study find, were the laws true?

--laws names the laws file; by default it is the published table. N and tokens are raw counts, losses are nats
per token. A verdict is "clear", "mixed" or "void". A void verdict ranks nothing: it says why the laws cannot
tell, and it lists the cheapest runs that would.
"""
import dataclasses
import json
import math
import os
import signal
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from configurator import ConfigError, run, setting
from mixture import (DRAWS, MOE, REACH, WITH_WEIGHT, distance, estimate, head_start, make_book, quantile, read_laws,
                     sample)

DENSE, UPCYCLE, SCRATCH = "continue the dense model", "upcycle", "MoE from scratch"
ONLY_DENSE, SPLIT = "dense", "dense, then upcycle"  # with SCRATCH the three routes from nothing
INTERVAL = (0.05, 0.95)
SURE, GAP = 0.95, 0.005  # a clear verdict is at least so sure, and its lead is at least this share of the loss
PILOT = {"upcycled": (1 / 16, 1 / 8), "MoE from scratch": (1 / 32, 1 / 16, 1 / 8, 1 / 4),
         "dense": (1 / 16, 1 / 8)}  # {run: its branches as shares of the budget}
MLP_SHARE = 2 / 3        # of N in the MLPs of a Llama whose intermediate size is 8/3 of the hidden size


@dataclass
class Options:
    """Compare upcycling, a MoE from scratch and continued dense training at equal FLOPs from now on."""
    laws: str = setting("laws/liew2025.json", "laws.json of fit_laws.py, or published laws")
    law: str = setting("", "one upcycled law to plan by; empty: all laws, weighted by their held-out errors")
    checkpoint: str = setting("", "dense checkpoint directory; it gives N, D1 and the FLOPs of a token")
    N: float = setting(0.0, "non-embedding parameters of the dense model, a raw count", least=0)
    D1: float = setting(0.0, "tokens the dense model has seen, a raw count", least=0)
    tokens: float = setting(0.0, "budget as tokens of MoE training", least=0)
    flops: float = setting(0.0, "budget in training FLOPs", least=0)
    gpu_hours: float = setting(0.0, "budget in GPU hours; it needs flops_per_gpu and mfu", least=0)
    flops_per_gpu: float = setting(0.0, "peak FLOP/s of a GPU", least=0)
    mfu: float = setting(0.4, "share of the peak that training uses", least=0.001, most=1)
    num_local_experts: int | None = setting(None, "experts of the MoE; none: as in the laws file", least=1)
    num_experts_per_tok: int | None = setting(None, "experts a token uses; none: as in the laws file", least=1)
    active_ratio: float = setting(0.0, "FLOPs of a MoE token over those of a dense one; 0: as counted", least=0)
    max_seq_len: int = setting(0, "context that a checkpoint's FLOPs count; 0: the laws' own, else 4096", least=0)
    fresh: bool = setting(False, "plan from nothing: the best split of the budget; with no N, the best N too")
    design: str = setting("", "study file: what would it find, were these laws true")
    noise: float = setting(0.005, "design: standard deviation of ln loss between runs", least=1e-6)
    trunk_noise: float = setting(0.003, "design: standard deviation of ln loss that runs of a trunk share", least=0)
    figure: str = setting("out/plan.png", "figure file (.png, .svg or .pdf), with a PDF beside it; empty: none")
    html: str = setting("", "page with the answer and sliders, one file that opens offline; empty: none")
    json: bool = setting(False, "print JSON")


# ---------------------------------------------------------------------------------------------------------
# A comparison of options and its verdict

WORDS = {  # the page says the same sentences
    "unknown": "the fitted range of {name} ({family}) is not known",
    "above": "{name} = {value} is {times} times above the largest fitted, {edge} ({family})",
    "below": "{name} = {value} is {times} times below the smallest fitted, {edge} ({family})",
    "far": "{text}, and such laws were tested to {reach} times",
    "start": "{laws} would put the upcycled model above its own dense start, which cannot hold",
    "lacks": "the laws file has no laws of one fit for all of the options",
    "clear": "Clearly {best}: the laws are {sure} sure, it leads {second} by {gap} of the loss, and all laws agree.",
    "mixed": "No option is clearly best. {best} has the lowest expected loss, {gap} below {second}, and is best "
             "with a probability of {sure}. {decides}",
    "close": "The gap is below half a percent, so cost and convenience may decide.",
    "disagree": "The laws disagree: {sides}.",
    "unsure": "The laws agree, but their errors are as large as the gap.",
    "void": "Cannot say: {reasons}.",
    "overtakes": "The MoE from scratch overtakes the upcycled one at D2* tokens: {low} .. {high} (90 %), never with a "
                 "probability of {never}.",
    "worth": "worth: the MoE tokens that the dense checkpoint saves, once; costs: what upcycling adds to the loss, for ever.",
    "pilot": "The cheapest runs that would decide cost {flops} FLOPs, {share} of the budget. The winner goes on from its trunk.",
    "run": "{family}: one trunk with decayed branches at {branches} tokens",
}


def short(value):
    """A count in words, 50.6B, or a large one as 1.5e21."""
    if value >= 1e15 or value < 1:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}" + f"e{int(exponent)}" * (exponent != "+00")
    value = float(f"{value:.3g}")
    unit, name = next((u, n) for u, n in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if value >= u)
    return f"{value / unit:.3g}{name}"


def percent(share):
    return f"{100 * share:.1f} %"


def say(key, **values):
    return WORDS[key].format(**values)


def above_own_start(law, points):
    """Whether a law puts the upcycled model above the dense one that it starts as: copying keeps that one's loss."""
    variables = next((variables for family, variables in points.values() if family == "upcycled"), None)
    if variables is None or law["routes"]["dense"] is None:
        return False
    start = estimate(law, "dense", {"N": variables["N"], "D": variables["D1"]})
    return min(estimate(law, "upcycled", variables, method) for method in law["routes"]["upcycled"]) > start


def beyond_the_data(book, points):
    """([why a verdict would be void], [warnings]): which variables lie beyond the fitted range, and how far."""
    reasons, warnings = {}, {}
    for family, variables in points.values():
        for name, far in distance(book, family, variables).items():
            if name not in book["ranges"].get(family, {}):
                warnings[name, family] = say("unknown", name=name, family=family)
            elif far > 0:
                low, high = book["ranges"][family][name]
                value, side, edge = variables[name], *(("above", high) if variables[name] > high else ("below", low))
                text = say(side, name=name, value=short(value), times=short(math.exp(far)), edge=short(edge), family=family)
                if far > math.log(book["reach"][name]) + 1e-9:
                    reasons.setdefault((name, short(value)), say("far", text=text, reach=short(book["reach"][name])))
                else:
                    warnings.setdefault((name, short(value)), text)
    return list(reasons.values()), list(warnings.values())


def mix(book, kept, points):
    """({option: (loss by each kept law, all draws of all laws)}, the same for each method of upcycling)."""
    def losses(family, variables, method="copy"):
        return ([float(estimate(law, family, variables, method)) for law in kept],
                np.concatenate([sample(book, law, family, variables, method) for law in kept]))

    options, methods = {}, {}
    for option, (family, variables) in points.items():
        if family == "upcycled":
            methods = {method: losses(family, variables, method) for method in book["methods"]}
            weights = [law["weight"] for law in kept]
            options[option] = min(methods.values(), key=lambda found: np.dot(weights, found[0]))
        else:
            options[option] = losses(family, variables)
    return options, methods


def summary(found, weights):
    """{name: {"loss", "interval", "probability_best"}} of {name: (loss by each law, draws)} and the laws' weights."""
    of_draws = np.repeat(weights, DRAWS) / DRAWS
    best = np.stack([draws for _, draws in found.values()]).argmin(axis=0) if found else None
    return {name: {"loss": float(sum(w * loss for w, loss in zip(weights, losses))),
                   "interval": [quantile(draws, of_draws, q) for q in INTERVAL],
                   "probability_best": float(of_draws[best == i].sum())}
            for i, (name, (losses, draws)) in enumerate(found.items())}


def compare(book, points, reasons=()):
    """The options of {option: (family, {variable: value})} by the mixture of laws, and the verdict.

    {"verdict": clear, mixed or void, "says": the verdict in words, "best", "options": {option: {"loss", "interval",
    "probability_best"}}, "methods": {method: the same}, "laws": {law: {"weight", "best", "losses"}}, "warnings"}.
    A void verdict, for the given reasons or for those found here, ranks nothing and has no options.
    """
    far, warnings = beyond_the_data(book, points)
    reasons = [*reasons, *far]
    kept = [law for law in book["laws"] if not above_own_start(law, points)]
    total = sum(law["weight"] for law in kept)
    if len(kept) < len(book["laws"]) and not reasons:
        lost = ", ".join(law["name"] for law in book["laws"] if law not in kept)
        (reasons if total < 0.5 else warnings).append(say("start", laws=lost))
    if len(points) < 2 and not reasons:
        reasons.append(say("lacks"))
    if reasons:
        return {"verdict": "void", "says": say("void", reasons="; ".join(reasons)), "best": None, "options": {},
                "methods": {}, "laws": {}, "warnings": warnings}
    weights = [law["weight"] / total for law in kept]
    found, found_methods = mix(book, kept, points)
    options = summary(found, weights)
    laws = {law["name"]: {"weight": weights[i], "losses": {option: found[option][0][i] for option in found},
                          "best": min(found, key=lambda option: found[option][0][i])} for i, law in enumerate(kept)}
    result = {"options": options, "methods": summary(found_methods, weights), "laws": laws, "warnings": warnings}
    return judge(options, laws) | result


def judge(options, laws):
    """{"verdict": clear or mixed, "says", "best"} of the options' summary and of what each law says."""
    best, second = sorted(options, key=lambda option: options[option]["loss"])[:2]
    gap, sure = options[second]["loss"] / options[best]["loss"] - 1, options[best]["probability_best"]
    sides = {}
    for law, found in laws.items():
        if found["weight"] >= WITH_WEIGHT:
            sides.setdefault(found["best"], []).append(law)
    words = {"best": best, "second": second, "gap": percent(gap), "sure": percent(sure)}
    if sure >= SURE and gap > GAP and list(sides) == [best]:
        return {"verdict": "clear", "says": say("clear", **words), "best": best}
    if gap <= GAP:
        decides = say("close")
    elif len(sides) > 1:
        decides = say("disagree", sides="; ".join(f"{', '.join(sides[option])}: {option}" for option in sides))
    else:
        decides = say("unsure")
    return {"verdict": "mixed", "says": say("mixed", decides=decides, **words), "best": best}


# ---------------------------------------------------------------------------------------------------------
# Now: a dense checkpoint is there

def flops_per_token(book, family, N):
    """Training FLOPs of a token of the dense model or the MoE: 6 N times a factor, interpolated in ln N."""
    sizes, factors = np.transpose(book["costs"][family])
    return 6 * N * np.interp(np.log(N), np.log(sizes), factors)


def points_now(book, question):
    """({option: (family, variables)}, {option: tokens from now on}) at equal FLOPs from now on."""
    N, D1, flops = question["N"], question["D1"], question["flops"]
    moe = {name: question[name] for name in MOE}
    tokens = {family: float(flops / flops_per_token(book, family, N)) for family in ("dense", "moe")}
    points = {UPCYCLE: ("upcycled", {"N": N, "D1": D1, "D2": tokens["moe"]} | moe),
              DENSE: ("dense", {"N": N, "D": D1 + tokens["dense"]}), SCRATCH: ("moe", {"N": N, "D": tokens["moe"]} | moe)}
    points = {option: point for option, point in points.items() if all(law["routes"][point[0]] for law in book["laws"])}
    return points, {option: tokens["dense" if option == DENSE else "moe"] for option in points}


def first_crossing(x, difference):
    """x at which each row of difference (..., len(x)) first falls below 0: 0 from the start, inf never."""
    below = difference < -1e-9  # curves that merge do not cross
    at = below.argmax(axis=-1)
    after = np.take_along_axis(difference, at[..., None], -1)[..., 0]
    before = np.take_along_axis(difference, np.maximum(at - 1, 0)[..., None], -1)[..., 0]
    ln_x, last = np.log(x), np.maximum(at - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.exp(ln_x[last] + (ln_x[at] - ln_x[last]) * before / (before - after))
    return np.where(below.any(axis=-1), np.where(at == 0, 0.0, root), math.inf)


def overtaking(book, question, laws, method):
    """({law: D2*}, {"interval": 90 %, "never": probability}) where a MoE from scratch overtakes the upcycled one.

    Both train on equally many tokens after the dense model's D1. D2* is 0 where from scratch leads from the start,
    inf where it does not overtake within 10,000 D1.
    """
    N, D1 = question["N"], question["D1"]
    moe = {name: question[name] for name in MOE}
    x = D1 * np.geomspace(1e-4, 1e4, 161)
    scratch, upcycled = ("moe", {"N": N, "D": x} | moe), ("upcycled", {"N": N, "D1": D1, "D2": x} | moe, method)
    kept = [law for law in book["laws"] if law["name"] in laws]
    stars = {law["name"]: float(first_crossing(x, estimate(law, *scratch) - estimate(law, *upcycled))) for law in kept}
    draws = np.concatenate([first_crossing(x, sample(book, law, *scratch) - sample(book, law, *upcycled)) for law in kept])
    weights = np.repeat([laws[law["name"]]["weight"] for law in kept], DRAWS) / DRAWS
    ends = [quantile(draws, weights, q) for q in INTERVAL]
    return stars, {"interval": [end if math.isfinite(end) else None for end in ends],
                   "never": float(weights[np.isinf(draws)].sum())}


def answer_now(book, question):
    """The comparison for {"N", "D1", "flops", settings of the MoE}, with tokens, D2*, what the checkpoint is worth, and a pilot."""
    points, tokens = points_now(book, question)
    result = question | compare(book, points)
    for option, found in result["options"].items():
        found["tokens"] = tokens[option]
    result["pilot"] = pilot(book, question) if result["verdict"] != "clear" else None
    result["method"] = min(result["methods"], key=lambda method: result["methods"][method]["loss"], default=None)
    result["overtaking"] = None
    if result["method"] and SCRATCH in points:
        stars, result["overtaking"] = overtaking(book, question, result["laws"], result["method"])
        for law in (law for law in book["laws"] if law["name"] in stars):
            star, route = stars[law["name"]], law["routes"]["upcycled"][result["method"]]
            found = result["laws"][law["name"]]
            found["D2_star"] = star if math.isfinite(star) else None
            if route["params"].get("alpha") == law["routes"]["moe"]["params"]["alpha"]:  # one curve for both
                found["head_start"] = float(head_start(route["params"], question["N"], question["D1"]))
                found["kappa"] = route["params"].get("kappa", 0.0)
    return result


def pilot(book, question):
    """{"runs": [{"family", "branches": tokens, "flops"}], "flops", "share" of the budget}: the runs that would decide.

    Each run is one trunk with short decayed branches. The MoE from scratch goes to a quarter of the budget, from
    where its curve predicts the budget to 2-4 %; the others go to an eighth. A branch adds a fifth of its tokens.
    """
    runs = []
    for family, shares in PILOT.items():
        per_token = float(flops_per_token(book, "dense" if family == "dense" else "moe", question["N"]))
        branches = [share * question["flops"] / per_token for share in shares]
        runs.append({"family": family, "branches": branches, "flops": per_token * (0.8 * branches[-1] + 0.2 * sum(branches))})
    flops = sum(one["flops"] for one in runs)
    return {"runs": runs, "flops": flops, "share": flops / question["flops"]}


# ---------------------------------------------------------------------------------------------------------
# Fresh: nothing is there

def lowest(loss, grid):
    """x of the lowest loss(array of x), by a grid and Brent's method; None where an end of the grid is the lowest."""
    i = int(np.argmin(loss(grid)))
    if i in (0, len(grid) - 1):
        return None
    return float(minimize_scalar(lambda x: loss(np.array([x]))[0], bounds=grid[[i - 1, i + 1]], method="bounded",
                                 options={"xatol": 1e-9}).x)


def points_fresh(book, question):
    """({route: (family, variables)}, {route: why it has no plan}) with the lowest expected loss for a budget from nothing."""
    flops, moe, logits = question["flops"], {name: question[name] for name in MOE}, np.linspace(-14, 14, 141)
    families = [family for family in ("dense", "moe", "upcycled") if all(law["routes"][family] for law in book["laws"])]
    fitted = [n for family in families for n in book["ranges"].get(family, {}).get("N", ())]
    low, high = (min(fitted) / REACH, max(fitted) * REACH) if fitted else (1e3, flops / 6e3)
    sizes = np.linspace(math.log(low), math.log(high), 121)

    def counts(family, N, logit):
        dense, mixture = (flops / flops_per_token(book, name, N) for name in ("dense", "moe"))
        share = 1 / (1 + np.exp(-logit))
        return {"N": N} | ({"D": dense} if family == "dense" else {"D": mixture} | moe if family == "moe" else
                           {"D1": share * dense, "D2": (1 - share) * mixture} | moe)

    def loss(family, N, logit=0.0):
        """Expected loss by the mixture, with the best method"""
        means = [sum(law["weight"] * estimate(law, family, counts(family, N, logit), method) for law in book["laws"])
                 for method in (book["methods"] if family == "upcycled" else [""])]
        return np.min(means, axis=0)

    def of_sizes(family):
        if family == "upcycled":
            return lambda x: loss(family, np.exp(x)[:, None], logits).min(axis=1)
        return lambda x: loss(family, np.exp(x))

    points, refused = {}, {}
    for route, family in ((ONLY_DENSE, "dense"), (SCRATCH, "moe"), (SPLIT, "upcycled")):
        if family not in families:
            continue
        x = math.log(question["N"]) if question["N"] else lowest(of_sizes(family), sizes)
        if x is None:
            refused[route] = f"its best N is not within {short(low)} .. {short(high)}, where such laws were tested"
            continue
        logit = lowest(lambda y: loss(family, math.exp(x), y), logits) if family == "upcycled" else 0.0
        if logit is None:
            refused[route] = "the expected loss falls up to one end of the split"
        else:
            points[route] = family, counts(family, math.exp(x), logit)
    return points, refused


def answer_fresh(book, question):
    points, refused = points_fresh(book, question)
    void = [f"{route}: {why}" for route, why in refused.items() if "best N" in why]
    result = question | compare(book, points, void) | {"refused": refused}
    for route, found in result["options"].items():
        found["plan"] = {name: float(value) for name, value in points[route][1].items()}
    largest = max((variables["N"] for _, variables in points.values()), default=math.sqrt(question["flops"] / 120))
    pilot_of = question | {"N": question["N"] or largest}  # else 20 tokens a parameter
    return result | {"pilot": pilot(book, pilot_of) if result["verdict"] != "clear" else None}


# ---------------------------------------------------------------------------------------------------------
# Words and figures

def columns(table):
    """Lines of cells, columns padded."""
    width = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip() for row in table]


def say_pilot(found):
    if not found:
        return []
    return [say("pilot", flops=short(found["flops"]), share=percent(found["share"]))] + [
        "  " + say("run", family=one["family"], branches=", ".join(map(short, one["branches"]))) for one in found["runs"]]


def say_star(star):
    return "never" if star is None else short(star) if star else "from the start"


def say_options(options, what, cell):
    return columns([("option", what, "loss", "90 % interval", "best with probability")] + [
        (name, cell(found), f"{found['loss']:.4f}", "{:.4f} .. {:.4f}".format(*found["interval"]),
         percent(found["probability_best"])) for name, found in options.items()])


def say_now(result):
    lines = [result["says"], ""]
    if result["options"]:
        lines += say_options(result["options"], "tokens", lambda found: short(found["tokens"])) + [""]
    if len(result["methods"]) > 1:
        lines += [f"Of the methods of upcycling, {result['method']} has the lowest expected loss at this budget:"]
        lines += say_options(result["methods"], "", lambda found: "") + [""]
    if result["laws"]:
        lines += columns([("law", "weight", "best", "worth", "costs", "D2*")] + [
            (law, percent(found["weight"]), found["best"], short(found["head_start"]) if "head_start" in found else "",
             percent(math.expm1(found["kappa"])) if "kappa" in found else "", say_star(found.get("D2_star")))
            for law, found in result["laws"].items()])
    if result["overtaking"]:
        low, high = map(say_star, result["overtaking"]["interval"])
        lines.append(say("overtakes", low=low, high=high, never=percent(result["overtaking"]["never"])))
    if any("head_start" in found for found in result["laws"].values()):
        lines.append(say("worth"))
    return lines + say_pilot(result["pilot"])


def say_fresh(result):
    def plan(found):
        return ", ".join(f"{name} {short(found['plan'][name])}" for name in ("N", "D", "D1", "D2") if name in found["plan"])

    lines = [result["says"], ""]
    if result["options"]:
        lines += say_options(result["options"], "plan", plan) + [""]
        lines += columns([("law", "weight", "best")] + [
            (law or "dense and MoE", percent(found["weight"]), found["best"]) for law, found in result["laws"].items()])
    lines += [f"{route} has no plan: {why}." for route, why in result["refused"].items()]
    return lines + say_pilot(result["pilot"])


def draw_figure(book, question, answer, path):
    """Loss against the budget around the question's, with 90 % bands; the budgets within the fitted ranges are shaded."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.4, 3.8), constrained_layout=True)
    budgets = question["flops"] * np.geomspace(1 / 30, 30, 31)
    answers = [answer(book, question | {"flops": flops}) for flops in budgets]
    for option in dict.fromkeys(option for found in answers for option in found["options"]):
        color = {UPCYCLE: "#3b6fb6", SPLIT: "#3b6fb6", SCRATCH: "#222222"}.get(option, "#888888")
        options = [found["options"].get(option) for found in answers]
        loss, low, high = np.array([(o["loss"], *o["interval"]) if o else [math.nan] * 3 for o in options]).T
        axis.plot(budgets, loss, color=color, label=option)
        axis.fill_between(budgets, low, high, color=color, alpha=0.15, lw=0)
    inside = [flops for flops, found in zip(budgets, answers) if found["options"] and not found["warnings"]]
    if inside:
        axis.axvspan(inside[0], inside[-1], color="#2e8b57", alpha=0.08, lw=0, label="within the fitted ranges")
    axis.axvline(question["flops"], color="#c0392b", lw=1, label="budget")
    if not any(found["options"] for found in answers):
        axis.text(0.5, 0.5, "cannot say at any of these budgets", transform=axis.transAxes, ha="center")
    axis.set(xscale="log", xlabel="budget, training FLOPs", ylabel="predicted loss (nats a token)")
    axis.set_xlim(budgets[0], budgets[-1])
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        for name in {path, os.path.splitext(path)[0] + ".pdf"}:
            figure.savefig(name, dpi=150)
    except OSError as error:
        raise ConfigError(f"--figure={path}: {error.strerror}") from None
    plt.close(figure)


def write_page(book, question, path):
    """The answer as one HTML file: plan.html with the laws, the question and the words filled in. Raises ConfigError."""
    def plain(value):
        return value.tolist() if isinstance(value, np.ndarray) else float(value)

    constants = {"DRAWS": DRAWS, "WITH_WEIGHT": WITH_WEIGHT, "SURE": SURE, "GAP": GAP, "INTERVAL": INTERVAL, "WORDS": WORDS,
                 "MOE": list(MOE), "NAMES": {"dense": DENSE, "upcycled": UPCYCLE, "moe": SCRATCH}, "PILOT": PILOT}
    filled = json.dumps({"book": book, "question": question, "constants": constants}, default=plain).replace("</", "<\\/")
    try:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "plan.html"), encoding="utf-8") as f:
            page = f.read().replace("/*FILLED*/null", filled)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(page)
    except OSError as error:
        raise ConfigError(f"--html={path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------
# The command

def check(options):
    """Refuse what cannot be meant, with a hint on counts given in billions or millions. Raises ConfigError."""
    for name, floor in (("N", 1e4), ("D1", max(1e3, options.N / 1e3)), ("tokens", max(1e3, options.N / 1e3))):
        if 0 < (value := getattr(options, name)) < floor:
            meant = f"billions; did you mean --{name}={value:g}e9?" if value < 1000 else f"millions; did you mean --{name}={value * 1e6:g}?"
            raise ConfigError(f"--{name}={value:g} is a raw count here, not {meant}")
    if 0 < options.flops < 1e6:
        raise ConfigError(f"--flops={options.flops:g} is a raw count of operations; a budget is more like 1e20")
    if 0 < options.flops_per_gpu < 1e9:
        raise ConfigError(f"--flops_per_gpu={options.flops_per_gpu:g} is a raw count of operations a second; "
                          f"did you mean {options.flops_per_gpu:g}e12?")
    if options.figure and os.path.splitext(options.figure)[1] not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--figure={options.figure}: must end in .png, .svg or .pdf")
    if options.html and options.fresh:
        raise ConfigError("--html shows the options of a dense checkpoint; leave out --fresh")


def tokens_seen(state):
    """Tokens that a checkpoint has seen in all runs, from its trainer_state.json; 0 where that does not say."""
    if "history" in state:
        return sum(tokens for _, tokens in state["history"])
    return state.get("tokens", 0) + state.get("lineage", {}).get("tokens_before", 0)


def of_checkpoint(options, question, context):
    """(N, D1, the costs of a token of it and of its MoE, where they are from). Raises ConfigError."""
    from checkpoint import read_config, read_state  # they need torch
    from model import flops_per_token as count_flops
    from model import parameter_counts

    config, state = read_config(options.checkpoint), read_state(options.checkpoint)
    if config.num_local_experts:
        raise ConfigError(f"{options.checkpoint}: is a mixture of experts already; give the dense checkpoint")
    N, D1 = float(options.N or parameter_counts(config)["N"]), float(options.D1 or tokens_seen(state))
    if not D1:
        raise ConfigError(f"{options.checkpoint}: trainer_state.json does not say on how many tokens it was trained; "
                          "give --D1=")
    moe = dataclasses.replace(config, **{name: question[name] for name in MOE})
    costs = {family: [(N, count_flops(c, context) / (6 * N))] for family, c in (("dense", config), ("moe", moe))}
    return N, D1, costs, f"the checkpoint's, with a context of {context}"


def ask(options, content, book):
    """(the question, where the FLOPs of a token are from); the costs go to book["costs"]. Raises ConfigError.

    costs: {"dense", "moe": [(N, FLOPs of a token / 6 N)]}.
    """
    question = {"N": options.N, "D1": options.D1, "flops": 0.0} | {
        name: getattr(options, name) or book["experts"][name] for name in MOE}
    if question["num_experts_per_tok"] > question["num_local_experts"]:
        raise ConfigError(f"--num_experts_per_tok={question['num_experts_per_tok']} is more than "
                          f"--num_local_experts={question['num_local_experts']}")
    more = MLP_SHARE * (question["num_experts_per_tok"] - book["experts"]["num_experts_per_tok"])
    models = {family: {m["N"]: m["flops_per_token"] / (6 * m["N"]) for m in content.get("models", ())
                       if m["family"] == family} for family in ("dense", "upcycled", "moe")}
    if options.checkpoint:
        context = options.max_seq_len or int((content.get("origin", {}).get("dense", {}).get("max_seq_len") or [4096])[0])
        question["N"], question["D1"], book["costs"], source = of_checkpoint(options, question, context)
    elif models["dense"] and (models["moe"] or models["upcycled"]):
        moe = models["upcycled"] | models["moe"]
        book["costs"] = {"dense": sorted(models["dense"].items()), "moe": [(n, moe[n] + more) for n in sorted(moe)]}
        source = "those of the models that the laws were fitted on"
    else:
        ratio = content.get("active_ratio", 1 + MLP_SHARE * (book["experts"]["num_experts_per_tok"] - 1)) + more
        book["costs"] = {"dense": [(1.0, 1.0)], "moe": [(1.0, ratio)]}
        source = f"assumed, 6 N a dense token and {ratio:.3g} times that a MoE token, without head and attention"
    if options.active_ratio:
        book["costs"]["moe"] = [(n, cost * options.active_ratio) for n, cost in book["costs"]["dense"]]
        source += f", but a MoE token {options.active_ratio:g} times a dense one, as given"
    return question, source


def budget(options, book, N):
    """The budget in FLOPs. Raises ConfigError unless exactly one is given, and where it is less than 1,000 tokens."""
    given = [name for name in ("tokens", "flops", "gpu_hours") if getattr(options, name)]
    if len(given) != 1:
        raise ConfigError(f"give one budget, --tokens=, --flops= or --gpu_hours= ({'got ' + ', '.join(given) if given else 'got none'})")
    if options.gpu_hours and not options.flops_per_gpu:
        raise ConfigError("--gpu_hours needs --flops_per_gpu= (989e12 for an H100 in bf16) and --mfu=")
    if options.tokens and not N:
        raise ConfigError("--tokens as a budget needs --N=; give --flops=")
    per_token = float(flops_per_token(book, "moe", N or 1e6))
    flops = options.flops or options.tokens * per_token or options.gpu_hours * 3600 * options.flops_per_gpu * options.mfu
    if flops < 1e3 * per_token:
        raise ConfigError(f"--{given[0]}={getattr(options, given[0]):g}: {flops:.3g} FLOPs are " + (
            f"{flops / per_token:.3g} tokens at N = {N:.3g}, too few to plan" if N else "too few to plan N with"))
    return flops


def main(options):
    check(options)
    content = read_laws(options.laws)
    book = make_book(options.laws, content, options.law)
    question, source = ask(options, content, book)
    if not options.fresh and not (question["N"] and question["D1"]):
        raise ConfigError(f"--{'D1' if question['N'] else 'N'}= is missing (or --checkpoint=; --fresh plans from nothing)")
    question["flops"] = budget(options, book, question["N"])
    answer = answer_fresh if options.fresh else answer_now
    result = answer(book, question) | {"flops_from": source}
    if options.json:
        print(json.dumps(result, allow_nan=False))
    else:
        known = ", ".join(f"{name} = {short(question[name])}" for name in ("N", "D1") if question[name] and not options.fresh)
        print(f"{known + ', ' if known else ''}budget {short(question['flops'])} FLOPs; FLOPs of a token: {source}\n")
        print("\n".join((say_fresh if options.fresh else say_now)(result)))
        for warning in result["warnings"]:
            print(f"warning: {warning}")
    if options.html:
        write_page(book, question, options.html)
    if options.figure:
        draw_figure(book, question, answer, options.figure)
    if not options.json:
        print("".join(f"written: {path}\n" for path in (options.figure, options.html) if path), end="")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # plan.py --help | head
    run(main, Options)
