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
from dataclasses import dataclass

from configurator import ConfigError, run, setting

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from laws import head_start, overtaking, short
from mixture import (EXPERTS_ERROR, FORM_ERROR, MOE, REACH, distance, estimate, losses_of, quantile,
                     read_laws, routes, weights_of_draws)
from plan_page import WORDS, folded, lead, percent, say, say_answer, write_page
from rows import FAMILIES, loss_columns

DENSE, UPCYCLE, SCRATCH = "continue the dense model", "upcycle", "MoE from scratch"
ONLY_DENSE, SPLIT = "dense", "dense, then upcycle"
NOW = {UPCYCLE: "upcycled", DENSE: "dense", SCRATCH: "moe"}        # {option: its family} from a checkpoint
FRESH = {ONLY_DENSE: "dense", SCRATCH: "moe", SPLIT: "upcycled"}   # the same from nothing
COLORS = {UPCYCLE: "#3b6fb6", SPLIT: "#3b6fb6", SCRATCH: "#222222", DENSE: "#888888", ONLY_DENSE: "#888888"}
INTERVAL = (0.05, 0.95)
SURE, GAP = 0.95, 0.005  # a clear verdict is at least so sure, and its lead is more than this share of loss
NEAR = 0.01              # ln of how far beyond the data a variable may lie before it is said
WITH_WEIGHT = 0.05       # laws of at least this weight must agree to a clear verdict
PILOT = {"upcycled": (1 / 16, 1 / 8), "moe": (1 / 32, 1 / 16, 1 / 8, 1 / 4),
         "dense": (1 / 16, 1 / 8)}  # {family: its branches, as shares of the budget}
MLP_SHARE = 2 / 3        # of N in the MLPs of a Llama whose intermediate size is 8/3 of its hidden size


@dataclass
class Options:
    """Compare upcycling, a MoE from scratch and continued dense training at equal FLOPs from now on."""
    laws: str = setting("laws/liew2025.json", "laws.json of fit_laws.py, or published laws")
    checkpoint: str = setting("", "dense checkpoint directory; it gives N, D1 and the FLOPs of a token")
    N: float = setting(0.0, "non-embedding parameters of the dense model, a raw count", least=0)
    D1: float = setting(0.0, "tokens the dense model has seen, a raw count", least=0)
    tokens: float = setting(0.0, "budget as tokens of MoE training", least=0)
    flops: float = setting(0.0, "budget in training FLOPs", least=0)
    gpu_hours: float = setting(0.0, "budget in GPU hours; it needs flops_per_gpu and mfu", least=0)
    flops_per_gpu: float = setting(0.0, "peak FLOP/s of a GPU", least=0)
    mfu: float = setting(0.4, "share of the peak that training uses", least=0.001, most=1)
    num_local_experts: int | None = setting(None, "experts of the MoE; none: as in the laws file", least=1)
    num_experts_per_tok: int | None = setting(None, "experts a token uses; none: as the laws file", least=1)
    max_seq_len: int = setting(0, "context of a checkpoint's FLOPs; 0: the laws', else 4096", least=0)
    fresh: bool = setting(False, "plan from nothing: the best split of the budget; with no N, the best N too")
    design: str = setting("", "study file: what would it find, were these laws true")
    noise: float = setting(0.005, "design: standard deviation of ln loss between runs", least=1e-6)
    trunk_noise: float = setting(0.003, "design: the same between trunks", least=0)
    html: str = setting("", "page with the answer and sliders, one file that opens offline; empty: none")
    json: bool = setting(False, "print JSON")


# ---------------------------------------------------------------------------------------------------------
# A comparison of options and its verdict

def above_own_start(law, points):
    """Whether a law puts the upcycled model above the dense model that it starts as."""
    variables = next((variables for family, variables in points.values() if family == "upcycled"), None)
    if variables is None or law["routes"]["dense"] is None:
        return False
    start = estimate(law, "dense", {"N": variables["N"], "D": variables["D1"]})
    return min(estimate(law, "upcycled", variables, method) for method in law["routes"]["upcycled"]) > start


def beyond_the_data(book, points):
    """([why the verdict is void], [warnings]): which variables lie beyond the fitted ranges, and how far."""
    reasons, warnings = {}, {}
    for family, variables in points.values():
        for name, ln_times in distance(book, family, variables).items():
            value, key = variables[name], (name, short(variables[name]))
            if name not in book["ranges"][family]:
                warnings[name, family] = say("unknown", name=name, family=family)
            elif ln_times > NEAR:
                low, high = book["ranges"][family][name]
                side, edge = ("above", high) if value > high else ("below", low)
                text = say(side, name=name, value=short(value), times=short(math.exp(ln_times)),
                           edge=short(edge), family=family)
                if ln_times > math.log(book["reach"][name]) + 0.05:  # levels are whole steps
                    reasons.setdefault(key, say("too_distant", text=text, reach=short(book["reach"][name])))
                else:
                    warnings.setdefault(key, text)
    return list(reasons.values()), list(warnings.values())


def summary(found, weights, book):
    """{name: {"loss", "bits_per_byte" where it is known, "interval", "probability_best"}} of
    {name: (losses by the laws, draws)}. weights are those of the laws."""
    weight = weights_of_draws(book, weights)
    best = np.stack([draws for _, draws in found.values()]).argmin(axis=0) if found else None
    return {name: loss_columns(float(np.dot(weights, losses)), book["bits_per_nat"])
            | {"interval": [quantile(draws, weight, q) for q in INTERVAL],
               "probability_best": float(weight[best == i].sum())}
            for i, (name, (losses, draws)) in enumerate(found.items())}


def judge(options, laws):
    """{"verdict": clear or mixed, "says": it in words, "best", "gap": its lead as a share of the loss}."""
    best, second, gap = lead(options)
    sure, sides = options[best]["probability_best"], {}
    for found in laws.values():
        if found["weight"] >= WITH_WEIGHT:
            sides.setdefault(found["best"], []).append(found["label"])
    clear = sure >= SURE and gap > GAP and list(sides) == [best]
    why = "close" if gap <= GAP else "disagree" if len(sides) > 1 else "unsure"
    said = "; ".join(f"{option}: {', '.join(of_side)}" for option, of_side in sides.items())
    says = say("clear" if clear else "mixed", best=best, second=second, gap=percent(gap), sure=percent(sure),
               decides=say(why, sides=said))
    return {"verdict": "clear" if clear else "mixed", "says": says, "best": best, "gap": gap}


def compare(book, points, reasons=()):
    """What `judge` says of the options {name: (family, {variable: value})} by the mixture of laws, and
    "options": {name: {"loss", "interval", "probability_best"}}, "methods" and the chosen "method" of
    upcycling, "laws": {law: {"label", "weight", "best", "losses"}}, "warnings". A void verdict, for the given
    reasons or for those found here, ranks nothing: it has no options."""
    too_distant, warnings = beyond_the_data(book, points)
    reasons = [*reasons, *too_distant]
    kept = [law for law in book["laws"] if not above_own_start(law, points)]
    total = sum(law["weight"] for law in kept)
    if len(kept) < len(book["laws"]) and not reasons:
        lost = ", ".join(law["label"] for law in book["laws"] if law not in kept)
        (reasons if total < 0.5 else warnings).append(say("start", laws=lost))
    if len(points) < 2 and not reasons:
        reasons.append(say("lacks"))
    if reasons:
        return {"verdict": "void", "says": say("void", reasons="; ".join(reasons)), "best": None, "gap": None,
                "options": {}, "methods": {}, "method": None, "laws": {}, "warnings": warnings}
    weights, method, methods, found = [law["weight"] / total for law in kept], None, {}, {}
    for option, (family, variables) in points.items():
        if family == "upcycled":
            methods = {name: losses_of(book, kept, family, variables, name) for name in book["methods"]}
            method = min(methods, key=lambda name: np.dot(weights, methods[name][0]))
            found[option] = methods[method]
        else:
            found[option] = losses_of(book, kept, family, variables)
    options, laws = summary(found, weights, book), {}
    for i, law in enumerate(kept):
        of_law = {option: float(estimates[i]) for option, (estimates, _) in found.items()}
        laws[law["name"]] = {"label": law["label"], "weight": weights[i], "losses": of_law,
                             "best": min(of_law, key=of_law.get)}
    return judge(options, laws) | {"options": options, "methods": summary(methods, weights, book),
                                   "method": method, "laws": laws, "warnings": warnings}


# ---------------------------------------------------------------------------------------------------------
# Now: a dense checkpoint is there

def flops_per_token(book, family, N):
    """Training FLOPs of a token of a model of the family: 6 N times a factor, interpolated in ln N."""
    sizes, factors = np.transpose(book["costs"]["dense" if family == "dense" else "moe"])
    return 6 * N * np.interp(np.log(N), np.log(sizes), factors)


def spent(book, question, family, N, share=None):
    """The variables of a family on which the budget is spent: all of it after the D1 dense tokens of the
    question, or, with a share, from nothing: an upcycled model spends that share on dense training."""
    dense, mixture = (question["flops"] / flops_per_token(book, name, N) for name in ("dense", "moe"))
    D1, moe = question["D1"] if share is None else 0.0, {name: question[name] for name in MOE}
    if family == "dense":
        return {"N": N, "D": D1 + dense}
    if family == "moe":
        return {"N": N, "D": mixture} | moe
    D1, D2 = (D1, mixture) if share is None else (share * dense, (1 - share) * mixture)
    return {"N": N, "D1": D1, "D2": D2} | moe


def finite(value):
    """A number for JSON; None where it is infinite."""
    return float(value) if math.isfinite(value) else None


def overtaking_of(book, question, laws, method):
    """({law: D2*}, {"interval": 90 %, "never": probability}), with None for infinity."""
    N, D1, moe = question["N"], question["D1"], {name: question[name] for name in MOE}
    kept = [law for law in book["laws"] if law["name"] in laws]

    def behind(tokens):  # by the laws, then by their draws
        scratch = losses_of(book, kept, "moe", {"N": N, "D": tokens} | moe)
        upcycled = losses_of(book, kept, "upcycled", {"N": N, "D1": D1, "D2": tokens} | moe, method)
        return np.concatenate(scratch) - np.concatenate(upcycled)

    stars, draws = np.split(overtaking(D1, behind), [len(kept)])
    weights = weights_of_draws(book, [laws[law["name"]]["weight"] for law in kept])
    return ({law["name"]: finite(star) for law, star in zip(kept, stars)},
            {"interval": [finite(quantile(draws, weights, q)) for q in INTERVAL],
             "never": float(weights[np.isinf(draws)].sum())})


def longest(book, question, family):
    """The most tokens from now on that rows of a family have at the N, D1 and MoE of a question, or 0."""
    ranges, end = book["ranges"][family], "D2" if family == "upcycled" else "D"
    for name, value in spent(book, question, family, question["N"]).items():
        low, high = ranges.get(name, (math.inf, math.inf))
        if name != end and not low * (1 - NEAR) <= value <= high * (1 + NEAR):
            return 0.0
    return ranges.get(end, (0.0, 0.0))[1] * (1 + NEAR) - question["D1"] * (family == "dense")


def pilot(book, question, result):
    """{"again", "runs": [{"family", "branches": tokens, "flops"}], "flops", "share" of the budget}; None
    where the verdict is clear or where the lead hardly matters.

    Each run is one trunk with decayed branches, none too short to tell something. A branch adds a fifth of
    its tokens to the trunk. Branches that the laws' rows reach already are left out. Where that leaves none,
    all are to be run "again", with another seed.
    """
    if result["verdict"] == "clear" or result["verdict"] == "mixed" and result["gap"] <= GAP:
        return None
    runs = {False: [], True: []}  # those to run for the first time, and all of them
    for family, shares in PILOT.items():
        per_token = float(flops_per_token(book, family, question["N"]))
        most, known = question["flops"] / per_token, longest(book, question, family)
        every = [share * most for share in shares if share * most >= book["shortest"]] or [most]
        for again, branches in ((True, every), (False, [tokens for tokens in every if tokens > known])):
            if branches:
                runs[again].append({"family": SCRATCH if family == "moe" else family, "branches": branches,
                                    "flops": per_token * (0.8 * branches[-1] + 0.2 * sum(branches))})
    again = not runs[False]
    flops = sum(one["flops"] for one in runs[again])
    return {"again": again, "runs": runs[again], "flops": flops, "share": flops / question["flops"]}


def answer_now(book, question):
    """What `compare` says of {"N", "D1", "flops", settings of the MoE}, with tokens, D2*, H, kappa, pilot."""
    points = {option: (family, spent(book, question, family, question["N"]))
              for option, family in routes(book, NOW).items()}
    result = question | compare(book, points) | {"overtaking": None}
    for option, found in result["options"].items():
        found["tokens"] = float(question["flops"] / flops_per_token(book, NOW[option], question["N"]))
    if result["method"] and SCRATCH in points:
        stars, result["overtaking"] = overtaking_of(book, question, result["laws"], result["method"])
        routes_of = {law["name"]: law["routes"] for law in book["laws"]}
        for name, found in sorted(result["laws"].items(), key=lambda item: item[1]["weight"]):
            of_law, found["D2_star"] = routes_of[name], stars[name]
            for method, of_method in result["methods"].items():  # the law of the most weight comes last
                params = of_law["upcycled"][method]["params"]
                if params.get("alpha") == of_law["moe"]["params"]["alpha"]:  # one curve for both
                    head = head_start(name, params, question["N"], question["D1"])
                    worth = {"head_start": float(head), "kappa": params.get("kappa", 0.0)}
                    of_method.update(worth)
                    found.update(worth if method == result["method"] else {})
    return result | {"pilot": pilot(book, question, result)}


# ---------------------------------------------------------------------------------------------------------
# Fresh: nothing is there

LOGITS = np.linspace(-14, 14, 141)  # of the share of the FLOPs that goes to dense training


def lowest(loss, grid):
    """x of the lowest loss(array of x), by a grid and Brent's method; None at an end of the grid."""
    i = int(np.argmin(loss(grid)))
    if i in (0, len(grid) - 1):
        return None
    found = minimize_scalar(lambda x: loss(np.array([x]))[0], bounds=grid[[i - 1, i + 1]], method="bounded",
                            options={"xatol": 1e-9})
    return float(found.x)


def expected_loss(book, question, family, N, logit=0.0):
    """Loss by the mixture of laws and the best method, when the whole budget goes to one family."""
    variables = spent(book, question, family, N, expit(logit))
    methods = book["methods"] if family == "upcycled" else [""]
    return np.min([sum(law["weight"] * estimate(law, family, variables, method) for law in book["laws"])
                   for method in methods], axis=0)


def points_fresh(book, question):
    """({route: (family, {variable: value})}, {route: why it has no plan}): the best of each route."""
    points, refused = {}, {}
    fitted = [n for family in FAMILIES for n in book["ranges"][family].get("N", ())]
    low, high = (min(fitted) / REACH, max(fitted) * REACH) if fitted else (1e3, question["flops"] / 6e3)
    for route, family in routes(book, FRESH).items():
        N, logit = question["N"] or None, 0.0
        if not N:
            ln_N = lowest(
                lambda x: expected_loss(book, question, family, np.exp(x)[:, None], LOGITS).min(axis=-1),
                np.linspace(math.log(low), math.log(high), 121))
            N = ln_N and math.exp(ln_N)
        if N and family == "upcycled":
            logit = lowest(lambda x: expected_loss(book, question, family, N, x), LOGITS)
        if not N:
            refused[route] = f"its best N is not in {short(low)} .. {short(high)}, where laws were tested"
        elif logit is None:
            refused[route] = "the expected loss falls up to one end of the split"
        else:
            points[route] = family, spent(book, question, family, N, expit(logit))
    return points, refused


def answer_fresh(book, question):
    """What `compare` says of the best plans for a budget from nothing, with the plans and a pilot."""
    points, refused = points_fresh(book, question)
    without_N = [f"{route}: {why}" for route, why in refused.items() if "best N" in why]
    result = question | compare(book, points, without_N) | {"refused": refused, "overtaking": None}
    for route, found in result["options"].items():
        found["plan"] = {name: float(value) for name, value in points[route][1].items()}
    at_20_tokens = math.sqrt(question["flops"] / 120)  # N of a dense model with 20 tokens a parameter
    N = question["N"] or max((variables["N"] for _, variables in points.values()), default=at_20_tokens)
    return result | {"pilot": pilot(book, question | {"N": N}, result)}


# ---------------------------------------------------------------------------------------------------------
# The command

def check(options):
    """Refuse counts that cannot be meant, with what may be meant. Raises ConfigError."""
    few = max(1e3, options.N / 1e3)
    for name, floor in (("N", 1e4), ("D1", few), ("tokens", few), ("flops", 1e6), ("flops_per_gpu", 1e9)):
        if 0 < (value := getattr(options, name)) < floor:
            unit = "e12" if name == "flops_per_gpu" else "e9"
            meant = f"{value:g}{unit}" if value < 1000 else f"{value * 1e6:g}"
            raise ConfigError(f"--{name}={value:g} is too small for a raw count; "
                              f"did you mean --{name}={meant}?")


def of_checkpoint(options, moe, context, D1_of_laws):
    """(N, D1, costs of a token, where these are from) of a checkpoint and its MoE; D1 is that of a pilot's
    laws where the checkpoint does not say. Raises ConfigError."""
    from checkpoint import read_config, read_state, tokens_known  # these need torch
    from model import flops_per_token as count_flops, parameter_counts

    config, state = read_config(options.checkpoint), read_state(options.checkpoint)
    if config.num_local_experts:
        raise ConfigError(f"{options.checkpoint}: is a mixture of experts already; give the dense checkpoint")
    N = float(options.N or parameter_counts(config)["N"])
    low, high = D1_of_laws
    D1 = float(options.D1 or tokens_known(state) or low * (low == high))
    if not D1:
        raise ConfigError(f"{options.checkpoint}: trainer_state.json does not say on how many tokens it was "
                          "trained; give --D1=")
    costs = {family: [(N, count_flops(c, context) / (6 * N))]
             for family, c in (("dense", config), ("moe", dataclasses.replace(config, **moe)))}
    return N, D1, costs, f"those of the checkpoint with a context of {context}"


def costs_of(content, book, moe):
    """({"dense", "moe": [(N, FLOPs of a token / 6 N)]}, where they are from) of a laws file."""
    more = MLP_SHARE * (moe["num_experts_per_tok"] - book["moe"]["num_experts_per_tok"])
    dense, mixtures = book["models"]["dense"], book["models"]["upcycled"] | book["models"]["moe"]
    if dense and mixtures:
        costs = {"dense": sorted(dense.items()), "moe": [(n, mixtures[n] + more) for n in sorted(mixtures)]}
        return costs, content.get("models_from", "those of the models that the laws were fitted on")
    ratio = 1 + MLP_SHARE * (moe["num_experts_per_tok"] - 1)
    return ({"dense": [(1.0, 1.0)], "moe": [(1.0, ratio)]},
            f"assumed to be 6 N for the dense model and {ratio:.3g} times that for the MoE, without head and "
            "attention")


def ask(options, content, book):
    """The question {"N", "D1", "flops", settings of the MoE, "flops_from"}; costs go to book["costs"]. Raises
    ConfigError."""
    N, D1, moe = options.N, options.D1, {name: getattr(options, name) or book["moe"][name] for name in MOE}
    if moe["num_experts_per_tok"] > moe["num_local_experts"]:
        raise ConfigError(f"--num_experts_per_tok={moe['num_experts_per_tok']} is more than "
                          f"--num_local_experts={moe['num_local_experts']}")
    if options.checkpoint:
        of_laws = content.get("origin", {}).get("dense", {}).get("max_seq_len") or [4096]
        N, D1, book["costs"], source = of_checkpoint(options, moe, options.max_seq_len or int(of_laws[0]),
                                                     book["ranges"]["upcycled"].get("D1", (0, 0)))
    else:
        book["costs"], source = costs_of(content, book, moe)
    if not options.fresh and not (N and D1):
        name = "D1" if N else "N"
        raise ConfigError(f"--{name}= is missing (or --checkpoint=; --fresh plans from nothing)")
    return {"N": N, "D1": D1, "flops": budget(options, book, N)} | moe | {"flops_from": source}


def budget(options, book, N):
    """The budget in FLOPs. Raises ConfigError unless exactly one is given and is worth 1,000 tokens."""
    given = [name for name in ("tokens", "flops", "gpu_hours") if getattr(options, name)]
    if len(given) != 1:
        got = f"got {', '.join(given) or 'none'}"
        raise ConfigError(f"give one budget, --tokens=, --flops= or --gpu_hours= ({got})")
    if options.gpu_hours and not options.flops_per_gpu:
        raise ConfigError("--gpu_hours needs --flops_per_gpu= (989e12 for an H100 in bf16) and --mfu=")
    if options.tokens and not N:
        raise ConfigError("--tokens as a budget needs --N=; give --flops=")
    per_token = float(flops_per_token(book, "moe", N or 1e6))
    hours = options.gpu_hours * 3600 * options.flops_per_gpu * options.mfu
    flops = options.flops or options.tokens * per_token or hours
    if flops < 1e3 * per_token:
        few = "too few to plan N with"
        if N:
            few = f"{flops / per_token:.3g} tokens at N = {N:.3g}, too few to plan"
        raise ConfigError(f"--{given[0]}={getattr(options, given[0]):g}: {flops:.3g} FLOPs are {few}")
    return flops


def uncertainty(options, content, book):
    """Where the intervals come from and what is taken for granted, in words."""
    if any("draws" in content["laws"].get(law["name"] or "moe", {}) for law in book["laws"]):
        said = "Intervals hold draws of the fits, their misfit"
    else:
        said = "Intervals hold assumed errors of these published laws"
    said += f", and {percent(FORM_ERROR)} of the loss per factor e beyond the data."
    for option, family in NOW.items():
        if option not in routes(book, NOW):
            said += f" The laws file has no {family} law of the same fit, so an option is left out: {option}."
    if "source" in content:
        said = f"{content['source']} {said}"
    if options.checkpoint and "upcycled.head_start" not in content["laws"]:
        said += " The checkpoint is taken to be trained like the laws' dense models. A pilot assumes nothing."
    return said


def main(options):
    check(options)
    content, book = read_laws(options.laws)
    if options.design:
        from plan_design import print_design  # it needs torch
        return print_design(content["laws"], options)
    question = ask(options, content, book)
    answer = answer_fresh if options.fresh else answer_now
    question["uncertainty"] = uncertainty(options, content, book)
    result = answer(book, question)
    try:
        as_json = json.dumps(result, allow_nan=False)
    except ValueError:
        raise ConfigError(f"{options.laws}: its laws give no finite losses for this question") from None
    if options.json:
        print(as_json)
    else:
        given = [name for name in ("N", "D1", "flops") if question[name]]
        print(", ".join(f"{name} = {short(question[name])}" for name in given))
        said = [f"The FLOPs of a token are {question['flops_from']}.", question["uncertainty"], ""]
        print("\n".join(map(folded, said + say_answer(result))))
    if options.html:
        constants = {"WITH_WEIGHT": WITH_WEIGHT, "SURE": SURE, "GAP": GAP, "MOE": [*MOE],
                     "INTERVAL": INTERVAL, "FORM_ERROR": FORM_ERROR, "EXPERTS_ERROR": EXPERTS_ERROR,
                     "PILOT": PILOT, "NEAR": NEAR, "WORDS": WORDS, "COLORS": COLORS,
                     "NAMES": {family: option for option, family in NOW.items()}}
        budgets = question["flops"] * 30 ** (np.arange(31) / 15 - 1)
        answers = [answer(book, question | {"flops": float(flops)})  # else the page finds them itself
                   for flops in budgets] if options.fresh else None
        write_page({"book": book, "question": question, "constants": constants, "answers": answers},
                   options.html)
        if not options.json:
            print(f"written: {options.html}")


if __name__ == "__main__":
    run(main, Options)
