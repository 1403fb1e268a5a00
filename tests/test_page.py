"""The page of the reference study repeats the tables that results/page.py makes from the rows."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from results import page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
README = (RESULTS / "README.md").read_text()


def runs_of(logs, out):
    """Make a directory of runs whose logs have the lines that page.py takes among others that it leaves."""
    for path in (logs / f"{name}.jsonl" for name in ("step_by_step", "ablations", "recipe", "balance")):
        for line in map(json.loads, path.read_text().splitlines()):
            run, seed, used = line["run"], line.get("seed"), line["effective_experts"]
            if path.stem == "step_by_step":
                log, lines = out / path.stem / f"{run}-s{seed}", [{"loss": 1.0}, line]
            else:
                if run == "copy":
                    run = f"upcycled-N{page.ABLATED[path.stem]}-s{seed}-D1_4194304-copy"
                study = path.stem == "balance" or run.startswith("upcycled")
                log = out / (f"study/{run}-D8388608" if study else f"{path.stem}/{run}-s{seed}-8388608")
                lines = [{"effective_experts": [1.0 for _ in used]}] + 32 * [{"effective_experts": used}]
            log.mkdir(parents=True, exist_ok=True)
            with open(log / "log.jsonl", "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        path.unlink()


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What a copy of results/page.py prints beside copies of its rows and a directory of runs that it takes
    its logs from, and the directory it ran in."""
    here = tmp_path_factory.mktemp("copy")
    for path in (*RESULTS.rglob("*.json*"), RESULTS / "page.py", ROOT / "laws" / "pysource.json"):
        copy = here / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    runs_of(here / "results" / "logs", here / "out")
    result = subprocess.run([sys.executable, here / "results" / "page.py", here / "out"],
                            capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    return result.stdout, here / "results"


def test_the_page_has_its_tables_and_figures(printed):
    tables = printed[0].strip().split("\n\n")
    assert len(tables) == 6
    for table in tables:
        assert table in README, table
    for name in ("head_starts.png", "step_by_step.png", "experts.png", "copying.png"):
        assert f"]({name})" in README and (printed[1] / name).stat().st_size > 10_000


def test_logs_are_the_lines_that_were_taken_from_runs(printed):
    logs = sorted((RESULTS / "logs").iterdir())
    assert [path.stem for path in logs] == ["ablations", "balance", "recipe", "step_by_step", "twice"]
    for path in logs:
        assert (printed[1] / "logs" / path.name).read_text() == path.read_text()


def test_the_loss_of_a_text_that_is_read_twice():
    def model(ids):  # it knows nothing in the first reading, copies in the second, and is wrong where skipped
        logits = torch.zeros(*ids.shape, 50)
        for t in range(ids.shape[1]):  # the token at t + 1
            if t + 1 < 4 or 16 <= t + 1 < 20:
                logits[:, t, 0] = 100.0
            elif t + 1 >= 20:
                logits[:, t] = 100.0 * torch.nn.functional.one_hot(ids[:, t + 1 - 16], 50)
        return logits
    pieces = torch.randint(1, 50, (3, 16), generator=torch.Generator().manual_seed(0))
    assert page.read_twice(model, pieces) == {"first": round(math.log(50), 4), "second": 0.0}


def lines_of(*names):
    return [json.loads(line) for name in names for line in (RESULTS / name).read_text().splitlines()]


def cell(printed, first, column):
    line = next(line for line in printed[0].splitlines() if line.replace(" ", "").startswith(first))
    return line.split("|")[column].strip()


def test_a_cell_of_each_table_is_what_its_rows_say(printed):
    rows = lines_of("study.jsonl", "study_more.jsonl", "sparsity.jsonl")

    def losses(**columns):
        return {row["seed"]: row["loss"] for row in rows if all(row.get(k) == v for k, v in columns.items())}
    small = {"N": 23712, "num_local_experts": 8, "num_experts_per_tok": 2}
    copied = {row["seed"]: row["loss"] for row in rows if row["trunk"].endswith("-D1_4194304-copy")
              and row["D2"] == 2**21 and small.items() <= row.items()}
    scratch = losses(family="moe", D=2**21, **small)
    ratios = [100 * (copied[seed] / scratch[seed] - 1) for seed in (0, 1, 2)]
    told = f"{np.mean(ratios):+.2f} ± "
    assert cell(printed, "|copy|23.7k|4.19M|", 5).startswith(told)
    assert cell(printed, "|8,top-2|", 6).startswith(told)
    sixteen = losses(family="moe", D=2**21, num_local_experts=16, num_experts_per_tok=2)
    assert cell(printed, "|16,top-2|", 3) == f"{np.mean(list(sixteen.values())):.4f}"
    tenth = {row["seed"]: row["loss"] for row in lines_of("ablations.jsonl")
             if row["learning_rate"] == 8e-4 and row["D2"] == 2**21}
    ratios = [100 * (tenth[seed] / copied[seed] - 1) for seed in (0, 1, 2)]
    assert cell(printed, "|learningratewarmeduptoatenth|", 3).startswith(f"{np.mean(ratios):+.2f} ± ")
    used = [np.mean(log["effective_experts"]) for log in lines_of("logs/balance.jsonl")
            if log["run"] in [f"upcycled-N55536-s{seed}-D1_33554432-copy" for seed in (0, 1, 2)]]
    assert cell(printed, "|copy|33.6M|", 4) == f"{np.mean(used):.1f} (3)"


def test_the_gains_by_more_experts_that_the_page_names_are_paired_by_seed():
    rows = lines_of("study.jsonl", "sparsity.jsonl")

    def gain(few, D, family):
        losses = {(row["num_local_experts"], row["seed"]): row["loss"] for row in rows
                  if (row["family"], row["N"], row["num_experts_per_tok"]) == (family, 23712, 2)
                  and row.get("D2", row.get("D")) == D and row.get("D1", 2**22) == 2**22
                  and row["method"] in ("copy", None)}
        pairs = [100 * (1 - losses[16, seed] / losses[few, seed]) for seed in (0, 1, 2)]
        half = stats.t.ppf(0.975, 2) * stats.sem(pairs)
        return f"{np.mean(pairs):.1f} % (± {half:.1f})"
    for few, D in ((4, 2**23), (2, 2**21)):
        for family in ("moe", "upcycled"):
            assert gain(few, D, family) in " ".join(README.split())


def test_sealed_errors_by_what_the_rows_test_make_up_those_that_seal_judges(printed):
    for name, columns in {"sealed_far": [4], "sealed_largest": [5], "sealed_drop": [6, 7, 8]}.items():
        table = README.partition(f"`{name}.json`\n```")[2]
        judged = next(line for line in table.splitlines() if line.startswith("| upcycled | interaction "))
        errors = [float(cell(printed, "|interaction|", column)) for column in columns]
        rows = [int(cell(printed, "|law,rms", column).split("(")[1][:-1]) for column in columns]
        expected = math.sqrt(np.average(np.square(errors), weights=rows))
        assert float(judged.split("|")[4]) == pytest.approx(expected, abs=0.01)
        assert int(judged.split("|")[3]) == sum(rows)


def test_the_errors_that_the_page_names_on_the_second_seed_of_the_largest_size():
    losses = {(row["D1"], row["D2"]): row["loss"] for row in lines_of("study.jsonl")
              if (row["N"], row["method"], row["seed"]) == (554016, "copy", 1)}
    assert len(losses) == 12

    def error(name, law):
        sealed = json.loads((RESULTS / name).read_text())["rows"]
        errors = [np.log(row["predicted"][law][1] / losses[row["D1"], row["D2"]])
                  for row in sealed if row["family"] == "upcycled"]
        return 100 * np.sqrt(np.mean(np.square(errors)))
    words = (f"errs by {error('sealed_largest.json', 'upcycled'):.1f} %, and loss matching by "
             f"{error('sealed_largest.json', 'upcycled.loss_matching'):.1f} %, or "
             f"{error('sealed_largest_A_of_N.json', 'upcycled.loss_matching'):.1f} % with A")
    assert words in " ".join(README.split())
