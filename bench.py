"""Measure speed.

    python bench.py laws      fitting scaling laws, on one core
    python bench.py upcycle   a 0.65B Llama to 8 experts beside cp and sync of the same bytes; 16 GB in the temporary directory
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from configurator import REQUIRED, run, setting


def seconds(work, repeats=5):
    """Median CPU time of `work()`, which does not count what else the machine does."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return float(np.median(times))


def planted(laws, N, D, D1, D2, noise=0.005):
    """Rows from laws {family: params} with noise in ln loss, one trunk a (N, D1)."""
    from laws import predict

    random, rows = np.random.default_rng(0), []
    for n in N:
        for family, points in (("dense", [{"D": d} for d in D]), ("moe", [{"D": d} for d in D]), ("upcycled", [{"D1": a, "D2": b} for a in D1 for b in D2])):
            for point in points if family in laws else ():
                loss = predict(family, laws[family], N=n, **point) * np.exp(noise * random.standard_normal())
                rows.append({"family": family, "N": n, "loss": float(loss), "trunk": f"{n}-{point.get('D1', '')}", **point})
    return rows


def customary_grid(rows, part):
    """Seconds that the customary fit of the dense law would take: Huber loss (delta 1e-3), L-BFGS-B with finite differences from
    4,500 starts (arXiv 2203.15556, appendix D.3), scaled from `part` of them drawn at random. Returns (seconds, best objective)."""
    from itertools import product
    from scipy.optimize import minimize
    from scipy.special import huber, logsumexp

    log_n, log_d, log_loss = (np.log([row[key] for row in rows]) for key in ("N", "D", "loss"))

    def objective(t):
        predicted = logsumexp([t[0] - t[3] * log_d, t[1] - t[4] * log_n, np.full_like(log_d, t[2])], axis=0)
        return huber(1e-3, log_loss - predicted).sum()

    starts = list(product(range(0, 30, 5), range(0, 30, 5), np.arange(-1, 1.5, 0.5), np.arange(0, 2.5, 0.5), np.arange(0, 2.5, 0.5)))
    chosen = np.random.default_rng(0).choice(len(starts), part, replace=False)
    begin = time.process_time()
    best = min(minimize(objective, starts[i], method="L-BFGS-B").fun for i in chosen)
    return (time.process_time() - begin) * len(starts) / part, best


def laws():
    """Fits on simulated rows of published size: time, and the customary grid of starts beside it."""
    import json
    from uncertainty import bootstrap, fit_with_noise
    from engine import fit

    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "laws", "liew2025.json"), encoding="utf-8") as f:
        params = {law: entry["params"] for law, entry in json.load(f)["laws"].items()}
    dense = planted({"dense": params["dense"]}, np.geomspace(1.5e7, 1e9, 12), np.geomspace(1e9, 4e11, 20), (), ())
    three = planted(params, np.geomspace(1.5e7, 1e9, 5), np.geomspace(1e9, 1e11, 5), np.geomspace(1e9, 1e11, 5), np.geomspace(1e9, 1e11, 5))
    system = {family: family for family in params}
    ours = seconds(lambda: fit(dense, {"dense": "dense"}))
    narrow = seconds(lambda: fit(dense, {"dense": "dense"}, delta=1e-3))
    print(f"dense law, {len(dense)} rows: {1000 * ours:.1f} ms ({1000 * narrow:.1f} ms at Huber's delta 1e-3)")
    print(f"three families, shared E, {len(three)} rows: {1000 * seconds(lambda: fit(three, system)):.1f} ms")
    three_fit = fit_with_noise(three, system)
    print(f"1,000 bootstrap refits of it, with an effect a trunk: {seconds(lambda: bootstrap(three_fit, 1000), repeats=1):.1f} s")
    part = 45
    grid, best = customary_grid(dense, part)
    print(f"customary grid of 4,500 L-BFGS-B starts, finite differences, on the dense rows: {grid:.0f} s (scaled from {part} starts), "
          f"{grid / narrow:,.0f} times ours at the same delta; its lowest objective {best:.6g}, ours {fit(dense, {'dense': 'dense'}, delta=1e-3).cost:.6g}")


def upcycle(repeats=3):
    """Upcycling a synthetic 0.65B Llama in bf16 to 8 experts: time beside cp and sync of the same bytes, and peak memory."""
    import json
    import shutil
    import subprocess
    import sys
    import tempfile
    import torch
    from checkpoint import to_hf_config
    from configurator import progress
    from model import ModelConfig, parameter_counts
    from upcycle import Piece, layout, write_weights

    c = ModelConfig(vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=22, num_attention_heads=24, num_key_value_heads=8)
    root = tempfile.mkdtemp(prefix="bench_upcycle_")
    source, moe, copied = (os.path.join(root, name) for name in ("dense", "moe", "copied"))
    times, peak, nothing = {"upcycle": [], "cp and sync": []}, 0, {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        if shutil.disk_usage(root).free < 18e9:
            print(f"skipped: 18 GB are needed in {os.path.dirname(root)}, {shutil.disk_usage(root).free / 1e9:.1f} GB are free")
            return
        os.mkdir(source)
        pieces = [Piece(name, shape, torch.bfloat16, None) for views in layout(c).values() for name, shape in views]
        with progress(sum(p.bytes for p in pieces), "synthetic Llama", "B") as bar:
            write_weights(source, pieces, 10 ** 12, lambda p: torch.empty(p.shape).normal_(0, 0.02).bfloat16(), bar)
        with open(os.path.join(source, "config.json"), "w", encoding="utf-8") as f:
            json.dump(to_hf_config(c, "bfloat16"), f)
        for _ in range(repeats):
            for directory in (moe, copied):
                shutil.rmtree(directory, ignore_errors=True)
            os.sync()
            begin = time.perf_counter()
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "upcycle.py")
            process = subprocess.Popen([sys.executable, script, source, moe, "--check=false"], **nothing)
            while process.poll() is None:
                try:
                    with open(f"/proc/{process.pid}/status", encoding="utf-8") as f:
                        peak = max(peak, *(1024 * int(line.split()[1]) for line in f if line.startswith("RssAnon")), 0)
                except OSError:
                    pass
                time.sleep(0.01)
            times["upcycle"].append(time.perf_counter() - begin)
            if process.returncode:
                raise SystemExit("bench.py: upcycle.py failed")
            os.sync()
            begin = time.perf_counter()
            subprocess.run(["cp", "-r", moe, copied], check=True)
            os.sync()
            times["cp and sync"].append(time.perf_counter() - begin)
            print(f"upcycle {times['upcycle'][-1]:.1f} s, cp and sync {times['cp and sync'][-1]:.1f} s", flush=True)
        size = sum(os.path.getsize(os.path.join(moe, name)) for name in os.listdir(moe))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    ours, cp = (float(np.median(times[name])) for name in times)
    print(f"{parameter_counts(c)['total'] / 1e9:.2f}B Llama to 8 experts, {size / 1e9:.1f} GB written: {ours:.1f} s from start to synced, "
          f"{ours / cp:.2f} times cp and sync (medians of {repeats}); at most {peak / 1e9:.2f} GB resident beyond mapped files")


BENCHMARKS = {"laws": laws, "upcycle": upcycle}


@dataclass
class Options:
    """Run a benchmark and print what it measured."""
    what: Literal[tuple(BENCHMARKS)] = setting(REQUIRED, "; ".join(f"{name}: {f.__doc__.splitlines()[0]}" for name, f in BENCHMARKS.items()), positional=True)


if __name__ == "__main__":
    run(lambda options: BENCHMARKS[options.what](), Options)
