"""Predict the withheld rows of a study before they are run, and judge the predictions when they are there.

    python seal.py config/study.py --laws=out/study/laws/laws.json --out=results/sealed.json
    python seal.py config/study.py --withheld="[{'family': 'upcycled'}]" --out=results/sealed_scratch.json
    python seal.py results/study.jsonl --out=results/sealed.json

The first command writes each law's prediction of each row that the study withholds, with a 95 % interval.
Commit the file before you run `sweep.py --train_withheld`. The second does so for other rows: here for all
upcycled ones, which loss matching predicts from dense and MoE rows alone. The third compares the predictions
with the rows that were run.
"""
import json
import math
from dataclasses import dataclass

from configurator import (REQUIRED, ConfigError, code_version, parse, read_json, run, setting,
                          write_text_atomically)

import numpy as np

from laws import RIVALS, law_name
from mixture import make_book, read_laws, sample
from report import aligned
from rows import EXPERTS, FAMILIES, KNOBS, method_label, read_rows
from sweep import Study, is_withheld, planned_rows

# What tells one sealed row from another.
COLUMNS = ("family", "N", "D", "D1", "D2", "seed", *EXPERTS, "method", *KNOBS)


@dataclass
class Options:
    """Seal predictions of a study's withheld rows, or judge the sealed ones."""
    what: str = setting(REQUIRED, "study file, to predict its withheld rows; or file of rows, to judge",
                        positional=True)
    laws: str = setting("out/study/laws/laws.json", "laws file that predicts")
    out: str = setting("results/sealed.json", "file of the sealed predictions")
    withheld: list[dict] = setting([], "rows to predict, {column: value} each; empty: as the study says")


def identity(row):
    """{column: value} of what tells sealed rows apart. A dense row has no number of experts."""
    return {key: row[key] for key in COLUMNS if row.get(key) is not None and (row[key] or key not in EXPERTS)}


def interval(laws, book, row, random):
    """Quantiles (.025, .5, .975) of the loss by the only law of `book`, or None where it knows no such row.

    The uncertainty of parameters, misfit, the error of form beyond the data and a run's noise are in them.
    """
    law, family = book["laws"][0], row["family"]
    entry = laws.get(law["name"]) or laws.get(family, {})
    method = "copy"  # all methods are alike to a law that was fitted to none
    if family == "upcycled" and "upcycled" in entry.get("fitted_with", ()):
        method = method_label(row)
    if law["routes"].get(family) is None or family == "upcycled" and method not in law["routes"]["upcycled"]:
        return None
    variables = {name: float(row[name]) for name in FAMILIES[family] + EXPERTS * (family != "dense")}
    losses = sample(book, law, family, variables, method)
    noise = math.hypot(*(entry.get("noise", {}).get(family) or {"row": 0.0}).values())
    losses = losses * np.exp(noise * random.standard_normal(losses.shape))
    return [round(float(q), 5) for q in np.quantile(losses, (0.025, 0.5, 0.975))]


def seal(options):
    """Write what each law of the laws file predicts for each row that the study withholds. Raises
    ConfigError where it withholds none."""
    withheld = [f"--withheld={options.withheld}"] if options.withheld else []
    study = parse(Study, [options.what, "--train_withheld", *withheld])
    rows = [row for row in planned_rows(study) if is_withheld(study, row)]
    if not rows:
        raise ConfigError(f"{options.what}: withholds no rows")
    content, book = read_laws(options.laws)
    names = [name for name in RIVALS if name in content["laws"]]
    books = {name: make_book(options.laws, content, name) for name in names} or {"": book}
    random, sealed = np.random.default_rng(0), []
    for row in map(identity, rows):
        found = {name: interval(content["laws"], book, row, random) for name, book in books.items()}
        sealed.append(row | {"predicted": {name: value for name, value in found.items() if value}})
    result = {"git": code_version(), "study": options.what, "laws_git": content.get("git"),
              "fitted_rows": {law: entry.get("n") for law, entry in content["laws"].items()}, "rows": sealed}
    if not any(row["predicted"] for row in sealed):
        raise ConfigError(f"{options.laws}: has no law of the rows that {options.what} withholds")
    write_text_atomically(options.out, json.dumps(result, indent=1) + "\n")
    print(f"{options.out}: {len(sealed)} rows are predicted by {len(books)} laws; commit it before they run")


def judge(options):
    """Print, by law and family, the errors of the sealed predictions and how often their intervals held."""
    content, (rows, _) = read_json(options.out), read_rows([options.what])
    measured = {frozenset(identity(row).items()): row["loss"] for row in rows}
    scores, lines = {}, []
    try:
        losses = [measured.get(frozenset(identity(row).items())) for row in content["rows"]]
        for row, loss in zip(content["rows"], losses):
            for name, (low, middle, high) in row["predicted"].items() if loss else ():
                error = math.log(middle / loss)
                scores.setdefault((row["family"], name), []).append((error, low <= loss <= high))
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{options.out}: holds no sealed predictions ({error!r:.80})") from None
    for (family, name), found in scores.items():
        errors, held = np.array(found).T
        numbers = 100 * math.sqrt(np.mean(errors ** 2)), 100 * errors.mean(), held.sum()
        lines.append([family, law_name(name), str(len(found)),
                      *map(str.format, ("{:.2f}", "{:+.2f}", "{:.0f}"), numbers)])
    print(f"{len(losses) - losses.count(None)} of {len(losses)} sealed rows were run. "
          f"The code {content.get('git')} predicted them.\n")
    print(*aligned(["family", "law", "rows", "rms error %", "mean error %", "in the 95 % interval"],
                   sorted(lines, key=lambda line: (line[0], float(line[3])))), sep="\n")


def main(options):
    (judge if options.what.endswith((".jsonl", ".csv")) else seal)(options)


if __name__ == "__main__":
    run(main, Options)
