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

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

from configurator import REQUIRED, ConfigError, run, setting

import numpy as np

from bench_train import SHAPES, alternate, train
from checkpoint import save
from engine import fit
from model import ModelConfig, Transformer
from uncertainty import bootstrap, fit_with_noise

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.join(HERE, "tests"))

import simulated


def laws(options):
    """Fits on simulated rows of published size."""
    dense_law, levels = {"dense": "dense"}, np.geomspace(1e9, 1e11, 5)
    dense = simulated.simulate(simulated.TABLE2, dense_law, N=np.geomspace(1.5e7, 1e9, 12),
                               D=np.geomspace(1e9, 4e11, 20), noise=0.005)
    three = simulated.simulate(simulated.TABLE2, N=np.geomspace(1.5e7, 1e9, 5), D=levels, D1=levels,
                               D2=levels, noise=0.005)
    fit_of_three = fit_with_noise(three, simulated.THREE)
    took = alternate({
        f"dense law, {len(dense)} rows": lambda: fit(dense, dense_law),
        "the same at delta 1e-3": lambda: fit(dense, dense_law, delta=1e-3),
        f"three families, shared E, {len(three)} rows": lambda: fit(three, simulated.THREE),
        "1,000 bootstrap refits of it, with an effect a trunk": lambda: bootstrap(fit_of_three, 1000),
    }, options.repeats, "cpu")
    for name, seconds in took.items():
        print(f"{name}: {1000 * seconds:,.1f} ms")


UPCYCLINGS = {  # arguments of upcycle.py beyond source and destination
    "copy": [], "noise": ["--method=noise"], "drop": ["--method=drop"],
    "virtual groups": ["--method=virtual_groups", "--granularity=2", "--num_local_experts=16",
                       "--num_experts_per_tok=4"]}


def upcycle(options):
    """Upcycling a synthetic 0.65B Llama in bf16 to 8 experts, beside cp and sync of the same bytes."""
    c = ModelConfig(vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=22,
                    num_attention_heads=24, num_key_value_heads=8)
    with tempfile.TemporaryDirectory(prefix="bench_upcycle_") as root:
        if shutil.disk_usage(root).free < 18e9:
            raise ConfigError(f"{root}: less than 18 GB are free; choose another directory by TMPDIR")
        source, moe, copied = (os.path.join(root, name) for name in ("dense", "moe", "copied"))
        save(source, Transformer(c).init_weights(0).bfloat16(), {})
        command = [sys.executable, os.path.join(HERE, "upcycle.py"), source, moe, "--check=false"]
        for method, arguments in UPCYCLINGS.items():
            runs, copies = [], []
            for _ in range(options.repeats):
                for directory in (moe, copied):
                    shutil.rmtree(directory, ignore_errors=True)
                runs.append(watched([*command, *arguments]))
                copies.append(watched(["cp", "-r", moe, copied]))
            size = sum(os.path.getsize(os.path.join(moe, name)) for name in os.listdir(moe))
            took, resident = np.median(runs, axis=0)[0], np.max(runs, axis=0)[1]
            print(f"{method}: {size / 1e9:.1f} GB in {took:.1f} s, {took / np.median(copies, axis=0)[0]:.2f} "
                  f"times cp and sync (medians of {options.repeats}); {resident / 1e9:.2f} GB resident",
                  flush=True)


def watched(command):
    """Run a command and sync: (seconds, most bytes resident beyond mapped files). Raises ConfigError if the
    command fails."""
    os.sync()
    begin, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status", encoding="utf-8") as f:
                resident = [int(line.split()[1]) for line in f if line.startswith("RssAnon")]  # kB
        except OSError:
            resident = []
        peak = max(peak, *(1024 * n for n in resident), 0)
        time.sleep(0.01)
    if process.returncode:
        raise ConfigError(f"{' '.join(command)} failed")
    os.sync()
    return time.perf_counter() - begin, peak


def coverage(options):
    """How often 95 % and 90 % intervals hold the truth of simulated studies, in per cent."""
    for kind, size in simulated.STUDIES:
        print(f"{kind} law, {size} study, {options.sets} sets:")
        for target, (wide, narrow) in simulated.coverage(kind, size, options.sets).items():
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
    repeats: int = setting(15, "runs of which the median counts", least=1)
    clock: Literal["wall", "cpu"] = setting("wall", "train: cpu counts the time of the processors")
    sets: int = setting(100, "coverage: simulated studies of each kind", least=1)
    out: str = setting("out/bench_train.json", "train: file of the numbers; its figure is the .png beside it")
    against: str | None = setting(None, "train: an older file of numbers to compare with")


if __name__ == "__main__":
    run(lambda options: BENCHMARKS[options.what](options), Options)
