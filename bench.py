"""Measure speed.

    python bench.py train     a training step beside transformers' and a GPT-2-like model's
    python bench.py laws      fitting scaling laws, on one core
    python bench.py coverage  how often intervals hold the truth of simulated studies, on one core
    python bench.py upcycle   a 0.65B Llama to 8 experts beside cp and sync; 16 GB in the temporary directory
    python bench.py scale     1, 2 and 4 processes, ddp and fsdp, and an estimate for many GPUs
    python bench.py gpu       on a GPU: its tests, `train` and a study of 30 minutes

`train` wants an idle machine. On a busy one the processor time of one thread tells more:
`taskset -c 1 python bench.py train --threads=1 --clock=cpu`.
"""
import contextlib
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

from configurator import (HERE, REQUIRED, ConfigError, code_version, read_json, run, setting,
                          write_text_atomically)

import numpy as np
import torch

from bench_scale import said_by, scale
from bench_train import BACKENDS, SHAPES, alternate, train
from checkpoint import save
from engine import fit
from model import ModelConfig, Transformer
from rows import read_rows
from uncertainty import bootstrap, fit_with_noise

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
    begin, resident = time.perf_counter(), [0]  # kB

    def look(pid):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8") as f:
            resident.extend(int(line.split()[1]) for line in f if line.startswith("RssAnon"))
    said_by(command, look)
    os.sync()
    return time.perf_counter() - begin, 1024 * max(resident)


def coverage(options):
    """How often 95 % and 90 % intervals hold the truth of simulated studies, in per cent."""
    for kind, size in simulated.STUDIES:
        print(f"{kind} law, {size} study, {options.sets} sets:")
        for target, (wide, narrow) in simulated.coverage(kind, size, options.sets).items():
            print(f"  {target:26}{100 * wide:4.0f} {100 * narrow:4.0f}", flush=True)


def gpu(options):
    """The tests of devices, `train` and a study of 30 minutes on GPUs, in a JSON of the card's name."""
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here, so there is nothing to run")
    card, folder = torch.cuda.get_device_name(), os.path.join(HERE, "out", "gpu")
    numbers, study = os.path.join(folder, "bench_train.json"), os.path.join(folder, "study")
    result = {"card": card, "cards": torch.cuda.device_count(), "torch": torch.__version__,
              "git": code_version()}
    for name, words in {"data": ["data/prepare.py", "pysource"],
                        "tests": ["-m", "pytest", "-q", "-k", "cuda", "tests/test_devices.py"],
                        "train": ["bench.py", "train", "--sizes=256,768", f"--out={numbers}"],
                        "study": ["sweep.py", "config/study_gpu.py", f"--out_dir={study}"]}.items():
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True)
        result[name] = {"status": done.returncode, "seconds": round(time.perf_counter() - begin),
                        "output": (done.stdout + done.stderr)[-10_000:]}
        print(f"{' '.join(words)}: status {done.returncode}, {result[name]['seconds']} s", flush=True)
    if os.path.exists(numbers):
        result["train"]["numbers"] = read_json(numbers)
    if os.path.exists(rows := os.path.join(study, "rows.jsonl")):
        result["study"]["rows"] = read_rows([rows])[0]
    out = os.path.join(HERE, "results", f"gpu_{card.replace(' ', '_')}.json")
    write_text_atomically(out, json.dumps(result, indent=1))
    print(f"{out}: commit it, failures too")


BENCHMARKS = {"train": train, "scale": scale, "laws": laws, "coverage": coverage, "upcycle": upcycle,
              "gpu": gpu}


@dataclass
class Options:
    """Run a benchmark and print what it measured."""
    what: Literal[tuple(BENCHMARKS)] = setting(
        REQUIRED, "; ".join(f"{name}: {f.__doc__.splitlines()[0]}" for name, f in BENCHMARKS.items()),
        positional=True)
    families: list[Literal["dense", "moe"]] = setting(["dense", "moe"], "train, scale: of the models")
    sizes: list[Literal[tuple(SHAPES)]] = setting([64, 128, 256], "train, scale: hidden sizes")
    dtypes: list[Literal["float32", "bfloat16"]] = setting(["float32", "bfloat16"], "train: of products")
    modes: list[Literal["eager", "compiled"]] = setting(["eager", "compiled"], "train: of which models")
    backends: list[Literal[BACKENDS]] = setting(
        ["eager", "grouped_mm"], "train: experts of Mixtral that race; batched_mm takes 30 times as long")
    threads: list[int] = setting([1, os.cpu_count()], "train: processor threads", least=1)
    repeats: int = setting(15, "runs of which the median counts", least=1)
    clock: Literal["wall", "cpu"] = setting("wall", "train: cpu counts the time of the processors")
    sets: int = setting(100, "coverage: simulated studies of each kind", least=1)
    processes: list[int] = setting([1, 2, 4], "scale: numbers of processes that are measured", least=1)
    model: str = setting("config/dense_150m.py", "scale: settings of train.py whose step is estimated")
    gpus: list[int] = setting([1, 8, 64, 512], "scale: numbers of GPUs in the estimate", least=1)
    flops_per_gpu: float = setting(989e12, "scale: FLOP/s of products on a GPU; an H100 in bf16 (data sheet)",
                                   least=1)
    bandwidth: float = setting(50e9, "scale: bytes/s between GPUs; InfiniBand NDR, 400 Gb/s a GPU", least=1)
    latency: float = setting(1e-5, "scale: seconds of a message between GPUs; assumed", least=0)
    out: str = setting("", "train, scale: file of the numbers; empty: out/bench_train.json or "
                       "out/bench_scale.json; the figure of train is the .png beside it")
    against: str | None = setting(None, "train: an older file of numbers to compare with")


def main(options):
    options.out = options.out or f"out/bench_{options.what}.json"
    BENCHMARKS[options.what](options)


if __name__ == "__main__":
    run(main, Options)
