"""An answer of the planner in words and as a page."""
import json
import math
import os
import textwrap

from configurator import HERE, read_text, write_text_atomically
from laws import TIE, short
from rows import loss_text

WORDS = {  # plan.html says the same sentences
    "unknown": "the fitted range of {name} ({family}) is not known",
    "above": "{name} = {value} is {times} times above the largest fitted, {edge} ({family})",
    "below": "{name} = {value} is {times} times below the smallest fitted, {edge} ({family})",
    "too_distant": "{text}, and such laws were tested to {reach} times",
    "start": "{laws} would put the upcycled model above its own dense start, which cannot hold",
    "lacks": "the laws file has no laws of one fit for two options",
    "clear": "Clearly {best}: the laws are {sure} sure, it leads {second} by {gap} of the loss, and all laws "
             "agree.",
    "mixed": "No option is clearly best. The lowest expected loss is that of: {best}. It leads {second} by "
             "{gap} of the loss and is best with a probability of {sure}. {decides}",
    "close": "The lead is below half a percent, so cost and convenience may decide.",
    "disagree": "The laws disagree ({sides}), so the runs below would decide.",
    "unsure": "The laws agree, but their errors are as large as the lead, so the runs below would decide.",
    "void": "Cannot say: {reasons}.",
    "overtakes": "D2*, the tokens after which the MoE from scratch leads the upcycled model, is in {low} .. "
                 "{high} (90 %). It never leads with a probability of {never}.",
    "worth": "By the law of the most weight that has an H, {law}, the checkpoint is worth {head} tokens of "
             "MoE training, once, and upcycling costs {kappa} of the loss, for ever. Its D2*: {star}.",
    "method": "At this budget the way of upcycling with the lowest expected loss is {method}. It is {gap} "
              "below {second}.",
    "pilot": "The cheapest runs that would decide are a pilot of {flops} FLOPs, {share} of the budget. The "
             "option that wins goes on from its trunk. A curve from scratch up to a quarter of the budget "
             "predicts the budget to 1-10 %.",
    "again": "The laws' rows reach all branches of a pilot already. A second seed of them costs {flops} "
             "FLOPs, {share} of the budget, and shows what is luck. Runs on the whole budget would decide.",
    "run": "{family}: one trunk with decayed branches at {branches} tokens",
}


def say(key, **values):
    return WORDS[key].format(**values)


def percent(share):
    return f"{100 * share * (1 + TIE):.1f} %"


def lead(options):
    """(the option of the lowest loss, the next one, the lead as a share of the loss)."""
    best, second = sorted(options, key=lambda option: options[option]["loss"])[:2]
    return best, second, options[second]["loss"] / options[best]["loss"] - 1


# ---------------------------------------------------------------------------------------------------------
# In the terminal

def columns(table):
    """Lines of cells, with the columns padded."""
    width = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, width)).rstrip() for row in table]


def say_star(star):
    return "never" if star is None else short(star) if star else "from the start"


def say_options(options, what, cell):
    return columns([("option", what, "loss", "90 % interval", "best with probability")] + [
        (name, cell(found), loss_text(found), "{:.4f} .. {:.4f}".format(*found["interval"]),
         percent(found["probability_best"])) for name, found in options.items()])


def say_plan(found):
    """What an option does: its tokens from now on, or its plan from nothing."""
    if "tokens" in found:
        return short(found["tokens"])
    plan = {name: found["plan"][name] for name in ("N", "D", "D1", "D2") if name in found["plan"]}
    return ", ".join(f"{name} {short(value)}" for name, value in plan.items())


def say_head(found):
    """(H, kappa) in words, of a law or a method; two empty ones where it has none."""
    return (short(found["head_start"]), percent(math.expm1(found["kappa"]))) if "kappa" in found else ("", "")


def say_laws(laws):
    rows = [(found["label"], percent(found["weight"]), found["best"], *say_head(found),
             say_star(found["D2_star"]) if "D2_star" in found else "") for found in laws.values()]
    return columns([("law", "weight", "best", "H", "kappa", "D2*"), *rows])


def folded(line, width=100):
    """A sentence over several lines; a line of a table, which starts with spaces, stays as it is."""
    return line if line.startswith("  ") else textwrap.fill(line, width, break_on_hyphens=False)


def say_answer(result):
    """The lines of an answer."""
    lines = [result["says"], ""]
    if result["options"]:
        lines += say_options(result["options"], "tokens or plan", say_plan) + [""]
        if len(result["methods"]) > 1:
            lines += say_options(result["methods"], "H, kappa", lambda found: "  ".join(say_head(found)))
            best, second, gap = lead(result["methods"])
            lines += [say("method", method=best, second=second, gap=percent(gap)), ""]
        lines += say_laws(result["laws"]) + [""]
    if result["overtaking"]:
        low, high = map(say_star, result["overtaking"]["interval"])
        lines.append(say("overtakes", low=low, high=high, never=percent(result["overtaking"]["never"])))
    if heads := [found for found in result["laws"].values() if "head_start" in found]:
        law = sorted(heads, key=lambda found: found["weight"])[-1]
        head, kappa = say_head(law)
        lines.append(say("worth", law=law["label"], head=head, kappa=kappa, star=say_star(law["D2_star"])))
    lines += [f"{route} has no plan: {why}." for route, why in result.get("refused", {}).items()]
    if result["pilot"]:
        found = result["pilot"]
        lines.append(say("again" if found["again"] else "pilot", flops=short(found["flops"]),
                         share=percent(found["share"])))
        lines += ["  " + say("run", family=one["family"], branches=", ".join(map(short, one["branches"])))
                  for one in found["runs"]]
    return lines + [f"warning: {warning}" for warning in result["warnings"]]


# ---------------------------------------------------------------------------------------------------------
# As a page

def write_page(filled, path):
    """plan.html with {"book", "question", "constants", "answers"} filled in. Raises ConfigError."""
    text = json.dumps(filled, default=lambda value: value.tolist(), allow_nan=False).replace("</", "<\\/")
    template = os.path.join(HERE, "plan.html")
    write_text_atomically(path, read_text(template).replace("/*FILLED*/null", text))
