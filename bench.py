"""Measure speed.

    python bench.py train     a training step beside transformers' and a GPT-2-like model's
    python bench.py laws      fitting scaling laws, on one core
    python bench.py coverage  how often intervals hold the truth of simulated studies, on one core
    python bench.py upcycle   a 0.65B Llama to 8 experts beside cp and sync; 16 GB in the temporary directory

`train` wants an idle machine. On a busy one the processor time of one thread tells more:
`taskset -c 1 python bench.py train --threads=1 --clock=cpu`.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
import time
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from bench_train import SHAPES, train
from configurator import REQUIRED, ConfigError, run, setting


HERE = os.path.dirname(os.path.abspath(__file__))


def seconds(work, repeats=5):
    """Median CPU time of `work()`, which does not count what else the machine does."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return float(np.median(times))


# ---------------------------------------------------------------------------------------------------------
# Laws

def planted(laws, N, D, D1, D2, noise=0.005):
    """Rows from laws {family: params} with noise in ln loss, one trunk a (N, D1)."""
    from laws import predict

    random, rows = np.random.default_rng(0), []
    for n in N:
        scratch = [{"D": d} for d in D]
        upcycled = [{"D1": a, "D2": b} for a in D1 for b in D2]
        for family, points in (("dense", scratch), ("moe", scratch), ("upcycled", upcycled)):
            for point in points if family in laws else ():
                loss = predict(family, laws[family], N=n, **point) * np.exp(noise * random.standard_normal())
                trunk = f"{n}-{point.get('D1', '')}"
                rows.append({"family": family, "N": n, "loss": float(loss), "trunk": trunk, **point})
    return rows


def customary_grid(rows, part):
    """Seconds that the customary fit of the dense law would take: Huber loss (delta 1e-3),
    L-BFGS-B with finite differences from 4,500 starts (arXiv 2203.15556, appendix D.3), scaled from `part`
    random ones. Returns (seconds, best objective)."""
    from scipy.optimize import minimize
    from scipy.special import huber, logsumexp

    log_n, log_d, log_loss = (np.log([row[key] for row in rows]) for key in ("N", "D", "loss"))

    def objective(t):
        predicted = logsumexp([t[0] - t[3] * log_d, t[1] - t[4] * log_n, np.full_like(log_d, t[2])], axis=0)
        return huber(1e-3, log_loss - predicted).sum()

    logs, exponents = range(0, 30, 5), np.arange(0, 2.5, 0.5)
    starts = list(product(logs, logs, np.arange(-1, 1.5, 0.5), exponents, exponents))
    chosen = np.random.default_rng(0).choice(len(starts), part, replace=False)
    begin = time.process_time()
    best = min(minimize(objective, starts[i], method="L-BFGS-B").fun for i in chosen)
    return (time.process_time() - begin) * len(starts) / part, best


def laws(options):
    """Fits on simulated rows of published size: time, and the customary grid of starts beside it."""
    from engine import fit
    from uncertainty import bootstrap, fit_with_noise

    with open(os.path.join(HERE, "laws", "liew2025.json"), encoding="utf-8") as f:
        params = {law: entry["params"] for law, entry in json.load(f)["laws"].items()}
    levels = np.geomspace(1e9, 1e11, 5)
    sizes, tokens = np.geomspace(1.5e7, 1e9, 12), np.geomspace(1e9, 4e11, 20)
    dense = planted({"dense": params["dense"]}, sizes, tokens, (), ())
    three = planted(params, np.geomspace(1.5e7, 1e9, 5), levels, levels, levels)
    system = {family: family for family in params}
    ours = seconds(lambda: fit(dense, {"dense": "dense"}))
    narrow = seconds(lambda: fit(dense, {"dense": "dense"}, delta=1e-3))
    print(f"dense law, {len(dense)} rows: {1000 * ours:.1f} ms ({1000 * narrow:.1f} ms at delta 1e-3)")
    print(f"three families, shared E, {len(three)} rows: {1000 * seconds(lambda: fit(three, system)):.1f} ms")
    three_fit = fit_with_noise(three, system)
    refits = seconds(lambda: bootstrap(three_fit, 1000), repeats=1)
    print(f"1,000 bootstrap refits of it, with an effect a trunk: {refits:.1f} s")
    part = 45
    grid, best = customary_grid(dense, part)
    lowest = fit(dense, {"dense": "dense"}, delta=1e-3).cost
    print(f"customary grid of 4,500 L-BFGS-B starts, finite differences, on the dense rows: {grid:.0f} s "
          f"(scaled from {part} starts), {grid / narrow:,.0f} times ours at the same delta; its lowest "
          f"objective {best:.6g}, ours {lowest:.6g}")


UPCYCLINGS = {  # arguments of upcycle.py beyond source and destination
    "copy": [], "noise": ["--method=noise"], "drop": ["--method=drop"],
    "virtual groups": ["--method=virtual_groups", "--granularity=2", "--num_local_experts=16",
                       "--num_experts_per_tok=4"]}


def upcycle(options):
    """Upcycling a synthetic 0.65B Llama in bf16 to 8 experts, beside cp and sync of the same bytes."""
    import shutil
    import subprocess
    import tempfile
    import torch
    from checkpoint import to_hf_config
    from configurator import progress
    from model import ModelConfig
    from upcycle import Piece, layout, write_weights

    c = ModelConfig(vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=22,
                    num_attention_heads=24, num_key_value_heads=8)
    root = tempfile.mkdtemp(prefix="bench_upcycle_")
    source, moe, copied = (os.path.join(root, name) for name in ("dense", "moe", "copied"))
    try:
        if shutil.disk_usage(root).free < 18e9:
            raise ConfigError(f"{root}: less than 18 GB are free; choose another directory by TMPDIR")
        os.mkdir(source)
        names = [view for views in layout(c).values() for view in views]
        pieces = [Piece(name, shape, torch.bfloat16, None) for name, shape in names]
        with progress(sum(p.bytes for p in pieces), "synthetic Llama", "B") as bar:
            write_weights(source, pieces, 10 ** 12, lambda p: (0.02 * torch.randn(p.shape)).bfloat16(), bar)
        with open(os.path.join(source, "config.json"), "w", encoding="utf-8") as f:
            json.dump(to_hf_config(c, "bfloat16"), f)
        for method, arguments in UPCYCLINGS.items():
            times, copies, peak = [], [], 0
            for _ in range(options.repeats):
                for directory in (moe, copied):
                    shutil.rmtree(directory, ignore_errors=True)
                os.sync()
                script = os.path.join(HERE, "upcycle.py")
                took, resident = watched([sys.executable, script, source, moe, "--check=false", *arguments])
                times.append(took)
                peak = max(peak, resident)
                os.sync()
                begin = time.perf_counter()
                subprocess.run(["cp", "-r", moe, copied], check=True)
                os.sync()
                copies.append(time.perf_counter() - begin)
            size = sum(os.path.getsize(os.path.join(moe, name)) for name in os.listdir(moe))
            ratio = np.median(times) / np.median(copies)
            print(f"{method}: {size / 1e9:.1f} GB in {np.median(times):.1f} s, {ratio:.2f} times cp and sync "
                  f"(medians of {options.repeats}); {peak / 1e9:.2f} GB resident", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def watched(command):
    """Run a command: (seconds, most bytes resident beyond mapped files). Raises ConfigError if it fails."""
    import subprocess

    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as f:
                resident = [int(line.split()[1]) for line in f if line.startswith("RssAnon")]  # kB
                peak = max(peak, *(1024 * n for n in resident), 0)
        except OSError:
            pass
        time.sleep(0.01)
    if process.returncode:
        raise ConfigError(f"{os.path.basename(command[1])} failed: {' '.join(command)}")
    return time.perf_counter() - begin, peak


def coverage(options):
    """How often 95 % and 90 % intervals hold the truth of simulated studies, in per cent."""
    sys.path.append(os.path.join(HERE, "tests"))
    from simulated import STUDIES, coverage as simulate

    for kind, size in STUDIES:
        print(f"{kind} law, {size} study, {options.sets} sets:")
        for target, (wide, narrow) in simulate(kind, size, options.sets).items():
            print(f"  {target:26}{100 * wide:4.0f} {100 * narrow:4.0f}", flush=True)


BENCHMARKS = {"train": train, "laws": laws, "coverage": coverage, "upcycle": upcycle}


@dataclass
class Options:
    """Run a benchmark and print what it measured."""
    what: Literal[tuple(BENCHMARKS)] = setting(
        REQUIRED, "; ".join(f"{name}: {f.__doc__.splitlines()[0]}" for name, f in BENCHMARKS.items()),
        positional=True)
    families: list[str] = setting(["dense", "moe"], "train: of the models")
    sizes: list[int] = setting([64, 128, 256], f"train: hidden sizes, of {', '.join(map(str, SHAPES))}")
    dtypes: list[str] = setting(["float32", "bfloat16"], "train: of matrix products")
    modes: list[str] = setting(["eager", "compiled"], "train: of which models")
    threads: list[int] = setting([1, os.cpu_count()], "train: processor threads", least=1)
    repeats: int = setting(15, "train: steps of which the median counts; upcycle: runs", least=1)
    clock: Literal["wall", "cpu"] = setting("wall", "train: cpu counts the time of the processors")
    sets: int = setting(100, "coverage: simulated studies of each kind", least=1)
    out: str = setting("out/bench_train.json", "train: file of the numbers; its figure is the .png beside it")
    against: str | None = setting(None, "train: an older file of numbers to compare with")


if __name__ == "__main__":
    run(lambda options: BENCHMARKS[options.what](options), Options)
