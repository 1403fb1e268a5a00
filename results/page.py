"""Those tables and figures of results/README.md that fit_laws.py does not make, from the rows and logs here.

    PYTHONPATH=. python results/page.py [DIRECTORY OF RUNS]

It prints the tables, which the page repeats, and draws four figures. From a directory of runs it takes lines
of their logs first, and lets their checkpoints read pieces of data/pysource twice.
"""
import functools
import json
import math
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib import ticker

import checkpoint
from data.stream import load_tokens
from figures import FAMILY_STYLES, RIVAL_STYLES, finished, log_axis, panels, shades, t_interval
from fit_laws import rms
from laws import head_start, law_name, short
from problem import levels_of, of_family
from report import aligned, mean_text
from rows import EXPERTS, method_label, read_rows
from seal import identity

HERE = Path(__file__).parent
M = 2**20
VARIANTS = {
    "half": "learning rate warmed up to a half", "tenth": "learning rate warmed up to a tenth",
    "cosine": "cosine schedule", "repeated": "data of D1 once more", "none": "no balance loss",
    "pooled": "balance loss pooled over layers", "loss_free": "loss-free balancing",
    "decayed": "dense model after its decay", "merged": "experts of two dense models",
    "half_moe": "from scratch, half the learning rate", "cosine_moe": "from scratch, cosine schedule",
    "loss_free_moe": "from scratch, loss-free balancing",
    "best": "half the rate, loss-free, router from clusters",
    "best_moe": "from scratch, half the rate, loss-free"}
ABLATED = {"ablations": 23712, "recipe": 201280}  # {rows: N of their runs}
TRUNKS = r"(dense|moe|upcycled)-N(\d+)-s([01])(?:-D1_(\d+)-copy)?"  # whose checkpoints are read
HEAD_STARTS = ("effective_data_shared", "saturating", "handicap", "loss_matching", "loss_matching_handicap")


@functools.cache
def rows_of(*names):
    return read_rows([str(HERE / f"{name}.jsonl") for name in names])[0]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_experts(run):
    """Effective experts a layer in a directory of a run: means over the last 32 lines of its log."""
    last = read_lines(run / "log.jsonl")[-32:]
    return np.mean([line["effective_experts"] for line in last], axis=0).round(3).tolist()


def take_logs(out):
    """Write logs/*.jsonl from the runs in the directory `out`. balance.jsonl and twice.jsonl have those that
    are there, and a file of which none is there stays as it is."""
    found = {"step_by_step": [], "balance": [], "twice": []} | {name: [] for name in ABLATED}
    for run in ("upcycled", "equal"):
        for seed in range(3):
            for line in read_lines(out / "step_by_step" / f"{run}-s{seed}" / "log.jsonl"):
                if "val_loss" in line:
                    told = {key: line[key] for key in ("tokens", "val_loss", "effective_experts")}
                    found["step_by_step"].append({"run": run, "seed": seed} | told)
    for name, n in ABLATED.items():
        for run, seeds in variants_of(rows_of(name)).items():
            for seed in sorted(seeds):
                path = f"{name}/{run}-s{seed}-{8 * M}"
                if run == "copy":
                    path = f"study/upcycled-N{n}-s{seed}-D1_{4 * M}-copy-D{8 * M}"
                used = last_experts(out / path)
                found[name].append({"run": run, "seed": seed, "effective_experts": used})
    for row in rows_of("study"):
        for run in out.glob(f"*/{row['trunk']}-D{8 * M}"):
            if row["family"] != "dense" and tokens_of(row) == 8 * M:
                found["balance"].append({"run": row["trunk"], "effective_experts": last_experts(run)})
    for run in sorted(out.glob("*/*"), key=lambda run: run.name):
        for step, path in checkpoint.checkpoints(run) if re.fullmatch(TRUNKS, run.name) else ():
            losses = read_twice(checkpoint.load_model(path).eval(), pieces_of_text())
            found["twice"].append({"run": run.name, "step": step} | losses)
    for name, lines in found.items():
        if lines:
            (HERE / "logs" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@functools.cache
def pieces_of_text(count=128, length=64):
    """(count, length) tokens: pieces of the validation text of data/pysource."""
    text, _ = load_tokens("data/pysource", "val")
    places = np.random.default_rng(0).integers(0, len(text) - length, count)
    return torch.tensor(np.stack([text[i:i + length] for i in places]).astype(np.int64))


@torch.no_grad()
def read_twice(model, pieces):
    """{"first", "second"}: loss on (n, length) tokens that are read twice in a row, of each reading without
    its first quarter."""
    length, ids = pieces.shape[1], pieces.repeat(1, 2)
    logits = model(ids[:, :-1]).transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(0)
    first, second = losses[:length - 1], losses[length - 1:]  # of the predicted tokens
    return {"first": round(float(first[length // 4 - 1:].mean()), 4),
            "second": round(float(second[length // 4:].mean()), 4)}


def variants_of(rows):
    """{variant: {seed: [its rows]}} of rows of ablations, in the order of VARIANTS; copying is first."""
    found = {"copy": {row["seed"]: [] for row in rows}} | {name: {} for name in VARIANTS}
    for row in rows:
        found[row["trunk"].rpartition("-s")[0]].setdefault(row["seed"], []).append(row)
    return {name: seeds for name, seeds in found.items() if seeds}


def tokens_of(row):
    """D2 of an upcycled row, D of others."""
    return row.get("D2", row.get("D"))


def experts_of(row):
    return tuple(int(row[key]) for key in EXPERTS)


def scratch_losses(rows):
    """{(N, experts, D, seed): loss} of MoEs from scratch."""
    return {(row["N"], experts_of(row), row["D"], row["seed"]): row["loss"] for row in of_family(rows, "moe")}


def upcycled_against_scratch(rows):
    """{(method, N, experts, D1): {D2: [loss / loss of a MoE from scratch of D = D2 and that seed - 1]}}"""
    scratch, found = scratch_losses(rows), {}
    for row in of_family(rows, "upcycled"):
        key = row["N"], experts_of(row)
        if (*key, row["D2"], row["seed"]) in scratch:
            cells = found.setdefault((method_label(row), *key, row["D1"]), {})
            cells.setdefault(row["D2"], []).append(row["loss"] / scratch[*key, row["D2"], row["seed"]] - 1)
    return dict(sorted(found.items()))


def crossing(cells):
    """D2* in words: where the mean of the cells of upcycled_against_scratch crosses zero, straight between
    them in the logarithm of D2; "-" where it does not."""
    ends = [(np.mean(cells[d2]), math.log(d2)) for d2 in sorted(cells)]
    crossings = [np.interp(0, *zip(a, b)) for a, b in zip(ends, ends[1:]) if a[0] < 0 <= b[0]]
    return short(math.exp(crossings[0])) if crossings else "-"


def copies_by_experts():
    """({(experts, D): [loss from scratch]}, {experts: cells of upcycled_against_scratch}) of copying at
    N = 24k and D1 = 4M."""
    rows, scratch = [row for row in rows_of("study", "study_more", "sparsity") if row["N"] == 23712], {}
    for (_, experts, D, _), loss in scratch_losses(rows).items():
        scratch.setdefault((experts, D), []).append(loss)
    found = upcycled_against_scratch(rows)
    return scratch, {key[2]: cells for key, cells in found.items() if (key[0], key[3]) == ("copy", 4 * M)}


def at_D2(tokens):
    return [f"D2 = {short(d2)} (pairs)" for d2 in tokens]


def texts(cells, tokens):
    """The cells in words, one for each D2."""
    return [mean_text(cells[d2]) if d2 in cells else "-" for d2 in tokens]


def sealed_errors():
    """The table of sealed errors of each law by what the upcycled rows test; only rows that were run."""
    measured = {frozenset(identity(row).items()): row["loss"] for row in rows_of("study")}
    tests = {"56k, D1 = 32M": ("sealed", {"N": 55536}), "201k": ("sealed", {"N": 201280}),
             "201k, D2 = 64M": ("sealed_far", {}), "554k": ("sealed_largest", {}),
             "56k, drop 0.5": ("sealed_drop", {"N": 55536}), "201k, drop 0.5": ("sealed_drop", {"N": 201280}),
             "554k, drop 0.5": ("sealed_drop", {"N": 554016})}
    errors = {}
    for words, (name, columns) in tests.items():
        for row in json.loads((HERE / f"{name}.json").read_text())["rows"]:
            loss = measured.get(frozenset(identity(row).items()))
            if loss and row["family"] == "upcycled" and columns.items() <= row.items():
                for law, (_, middle, _) in row["predicted"].items():
                    errors.setdefault(law, {}).setdefault(words, []).append(math.log(middle / loss))
    shown = [words for words in tests if any(words in found for found in errors.values())]
    lines = [[law_name(law), *(f"{100 * rms(found[words]):.2f}" for words in shown)]
             for law, found in errors.items()]
    counts = next(iter(errors.values()))
    header = [f"{words} ({len(counts[words])})" for words in shown]
    return aligned(["law, rms error in % (rows)", *header], sorted(lines, key=lambda line: float(line[1])))


def against_scratch():
    """The table of upcycled losses against from scratch, by method, size and D1, and of D2*."""
    found = upcycled_against_scratch(rows_of("study", "study_more"))
    tokens = sorted({d2 for cells in found.values() for d2 in cells})
    lines = [[method, short(n), short(d1), *texts(cells, tokens), crossing(cells)]
             for (method, n, _, d1), cells in found.items() if method in ("copy", "drop 0.5")]
    return aligned(["method", "N", "D1", *at_D2(tokens), "D2*"], lines)


def numbers_of_experts():
    """The table of numbers of experts: losses from scratch, means over seeds, and upcycled against them."""
    (scratch, found), tokens, lines = copies_by_experts(), (M / 2, 2 * M, 8 * M), []
    for number, cells in found.items():
        losses = [scratch.get((number, D)) for D in tokens]
        lines.append(["{}, top-{}".format(*number), *(f"{np.mean(y):.4f}" if y else "-" for y in losses),
                      *texts(cells, tokens), crossing(cells)])
    header = [f"from scratch, D = {short(D)}" for D in tokens]
    return aligned(["experts", *header, *at_D2(tokens), "D2*"], lines)


def experts():
    """Loss from scratch and upcycled at 2M tokens against the number of experts, and the one over the other
    at 8M: means over seeds, the latter with its 95 % interval."""
    (scratch, found), (figure, (loss, behind)) = copies_by_experts(), panels(2)
    for k, color in shades((1, 2, 4)).items():
        numbers = [E for E, top in found if top == k]
        means = [np.mean(scratch[(E, k), 2 * M]) for E in numbers]
        ratios = [1 + np.mean(found[E, k][2 * M]) for E in numbers]
        loss.plot(numbers, means, "s-", ms=4, lw=1, color=color, label=f"top-{k}, from scratch")
        upcycled = np.multiply(means, ratios)
        loss.plot(numbers, upcycled, "D--", ms=4, lw=1, color=color, label=f"top-{k}, upcycled")
    late = {E: t_interval(cells[8 * M]) for (E, _), cells in found.items() if 8 * M in cells}
    mean, half = 100 * np.array(list(late.values())).T
    behind.errorbar(list(late), mean, half, fmt="D-", ms=4, lw=1, color=FAMILY_STYLES["upcycled"][2])
    behind.axhline(0, color="black", lw=0.8, ls=":")
    behind.set_ylabel("upcycled over from scratch (%)\nat 8.4M tokens, top-2")
    for axis in (loss, behind):
        log_axis(axis, [2, 4, 8, 16])
        axis.set_xlabel("experts")
    return finished(figure, (loss, behind), "loss at 2.1M tokens (nats per token)")


def ablations(name):
    """The table of the variants of a file of rows: loss against copying, or against from scratch, paired by
    seed, and effective experts a layer."""
    study = [row for row in rows_of("study", "study_more") if row["N"] == ABLATED[name]]
    base = {(row["family"], tokens_of(row), row["seed"]): row["loss"] for row in study
            if row["family"] == "moe" or method_label(row) == "copy" and row["D1"] == 4 * M}
    rows, logs, lines = rows_of(name), read_lines(HERE / "logs" / f"{name}.jsonl"), []
    tokens = levels_of(of_family(rows, "upcycled"), "D2")
    for run, by_seed in variants_of(rows).items():
        pairs = {d2: [] for d2 in tokens}
        for row in sum(by_seed.values(), []):
            d2 = tokens_of(row)
            pairs[d2].append(row["loss"] / base[row["family"], d2, row["seed"]] - 1)
        used = np.mean([log["effective_experts"] for log in logs if log["run"] == run], axis=0)
        cells = [mean_text(found) if found else "0" for found in pairs.values()]
        words = VARIANTS.get(run, "copying, as in the study")
        lines.append([words, *cells, ", ".join(f"{value:.1f}" for value in used)])
    return aligned(["variant", *at_D2(tokens), "effective experts by layer"], lines)


def balance():
    """The table of effective experts of 8 at 8M tokens by method, D1 and size: means over layers and runs."""
    logs = {log["run"]: log["effective_experts"] for log in read_lines(HERE / "logs" / "balance.jsonl")}
    cells = {}
    for run, row in {row["trunk"]: row for row in rows_of("study") if row["trunk"] in logs}.items():
        column = (method_label(row), row["D1"]) if "D1" in row else ("from scratch", None)
        cells.setdefault(column, {}).setdefault(row["N"], []).append(np.mean(logs[run]))
    sizes = sorted({n for found in cells.values() for n in found})
    lines = [[method, short(d1) if d1 else "-",
              *(f"{np.mean(found[n]):.1f} ({len(found[n])})" if n in found else "-" for n in sizes)]
             for (method, d1), found in sorted(cells.items())]
    return aligned(["method", "D1", *(f"N = {short(n)} (runs)" for n in sizes)], lines)


def head_starts():
    """Head start against D1 by the laws, and as measured: where the curve from scratch of the same seed has
    the loss of the upcycled model."""
    rows, laws = rows_of("study"), json.loads((HERE.parent / "laws" / "pysource.json").read_text())["laws"]
    scratch, sizes = scratch_losses(rows), levels_of(of_family(rows, "upcycled"), "N")
    figure, axes = panels(len(sizes), sharey=True)
    for axis, n in zip(axes, sizes):
        for row in (row for row in of_family(rows, "upcycled", N=n) if method_label(row) == "copy"):
            d1, d2, loss = row["D1"], row["D2"], row["loss"]
            curve = sorted((y, key[2]) for key, y in scratch.items() if (key[0], key[3]) == (n, row["seed"]))
            if d2 in (M / 2, 2 * M) and curve[0][0] < loss < curve[-1][0]:
                worth = math.exp(np.interp(math.log(loss), *np.log(curve).T)) - d2
                early = d2 < M
                axis.plot(d1 * (1 if early else 1.1), worth, "D" if early else "s", ms=4, mfc="white",
                          color="#222222", label=f"measured at D2 = {short(d2)}")
        x = np.geomspace(4e5, 4e7, 50)
        for law in (f"upcycled.{name}" for name in HEAD_STARTS):
            params = laws[law].get("methods", {}).get("copy", laws[law])["params"]
            color, dash = RIVAL_STYLES[law]
            axis.plot(x, head_start(law, params, n, x), dash, lw=1, color=color, label=law_name(law))
        log_axis(axis, levels_of(of_family(rows, "upcycled"), "D1"))
        axis.set(yscale="log", xlabel="D1 (tokens of the dense model)", title=f"N = {short(n)}")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: short(value))
        axis.yaxis.set_minor_locator(ticker.NullLocator())
    return finished(figure, axes, "head start H (tokens of MoE training)")


def step_by_step():
    """Loss and effective experts of an upcycled model and of a MoE of the same loss, step by step: each seed,
    and the mean over seeds."""
    logs = read_lines(HERE / "logs" / "step_by_step.jsonl")
    figure, (losses, experts) = plt.subplots(1, 2, figsize=(8, 3.4))
    for run, family in (("upcycled", "upcycled"), ("equal", "moe")):
        words, _, color = FAMILY_STYLES[family]
        by_seed = [[log for log in logs if (log["run"], log["seed"]) == (run, seed)] for seed in range(3)]
        tokens = np.array([log["tokens"] for log in by_seed[0]]) / M
        loss = np.array([[log["val_loss"] for log in lines] for lines in by_seed])
        used = np.mean([[log["effective_experts"] for log in lines] for lines in by_seed], axis=0)
        losses.plot(tokens, loss.T, lw=0.5, alpha=0.5, color=color)
        losses.plot(tokens, loss.mean(0), lw=1.5, color=color, label=words)
        for layer, dash in enumerate(("-", "--")):
            experts.plot(tokens, used[:, layer], dash, color=color, label=f"{words}, layer {layer + 1}")
    for axis, label in ((losses, "validation loss (nats per token)"), (experts, "effective experts of 8")):
        axis.set(xlabel="tokens from equal loss on (M = 2^20)", ylabel=label)
        axis.legend()
    return figure


def copying():
    """How much lower the loss is on a text that is read again at once, against tokens, by run."""
    runs = {}
    for log in read_lines(HERE / "logs" / "twice.jsonl"):
        runs.setdefault(re.fullmatch(TRUNKS, log["run"]).groups(), []).append(log)
    sizes, step = sorted({int(n) for _, n, *_ in runs}), rows_of("study")[0]["tokens_per_step"]
    colors = shades(sorted({d1 for *_, d1 in runs if d1}, key=int))
    figure, axes = panels(len(sizes), sharey=True)
    for family, n, seed, d1 in sorted(runs, key=lambda run: (run[0], int(run[3] or 0), run[2])):
        words, marker, color = FAMILY_STYLES[family]
        if d1:
            words, color = f"{words}, D1 = {short(int(d1))}", colors[d1]
        points = [(log["step"] * step, log["first"] - log["second"]) for log in runs[family, n, seed, d1]]
        axes[sizes.index(int(n))].plot(*zip(*points), "-" if seed == "0" else "--", marker=marker, ms=3, lw=1,
                                       color=color, label=f"{words}, seed {seed}")
    for axis, n in zip(axes, sizes):
        log_axis(axis, [M // 2, 2 * M, 8 * M, 32 * M])
        axis.set(title=f"N = {short(n)}", xlabel="tokens, after upcycling where upcycled")
    return finished(figure, axes, "gain by reading a text again (nats per token)")


def main():
    if len(sys.argv) > 1:
        take_logs(Path(sys.argv[1]))
    ablated = map(ablations, ABLATED)
    for table in (sealed_errors(), against_scratch(), numbers_of_experts(), *ablated, balance()):
        print(*table, sep="\n", end="\n\n")
    for draw in (head_starts, step_by_step, experts, copying):
        figure = draw()
        figure.savefig(HERE / f"{draw.__name__}.png")
        plt.close(figure)


if __name__ == "__main__":
    main()
