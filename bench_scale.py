"""The benchmark of many processes: tokens/s and bytes sent in a step, and an estimate of the step on GPUs.

A step of train.py on n processes is taken to last a·FLOPs/(n·f) + b·(bytes/bandwidth + hops·latency), with f
the FLOP/s of the matrix products alone. The constants a and b are fitted to the steps that were measured.
"""
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import product

from configurator import (HERE, ConfigError, code_version, from_dict, read_config, write_config,
                          write_text_atomically)

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from bench_train import DEVICE, SEQUENCE, TOKENS, model_config, products_alone
from data.prepare import Options as Prepare, prepare
from model import flops_per_token, parameter_counts
from rows import EXPERTS, SIZES
from start import passes, resolve_architecture
from sweep import data_of
from train import Train

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
WARM_UP = 5  # steps that are not measured
GLOO = DEVICE.type == "cpu"
DTYPE = "float32" if GLOO else "bfloat16"


def traffic(m, parallel, n, in_bf16, accumulate, gloo=False):
    """(bytes that a rank sends in a step, hops one after another) for a ModelConfig on n ranks.

    A ring all-reduce sends 2·(n-1)/n of its bytes, an all-gather or a reduce-scatter (n-1)/n (Thakur et al.
    2005). ddp reduces the fp32 gradients once, in buckets of 25 MB. fsdp gathers the matrices of a layer in
    the type of products, forward and backward, and scatters their gradients in fp32, in each pass; the other
    parameters are gathered once a pass, in fp32. gloo sends an all-reduce for a reduce-scatter. Hops are
    those of trees, log2(n) a collective.
    """
    counts, hops = parameter_counts(m), math.ceil(math.log2(n))
    if parallel == "ddp":
        size = 4 * counts["total"]
        return 2 * (n - 1) / n * size, 2 * hops * math.ceil(size / 25e6)
    matrices, reduced = counts["attention"] + counts["mlp"], 8 if gloo else 4
    size = matrices * (2 * (2 if in_bf16 else 4) + reduced) + (counts["total"] - matrices) * (4 + reduced)
    return accumulate * (n - 1) / n * size, accumulate * hops * (3 * m.num_hidden_layers + 2)


def parts(m, c, n, flops_per_s, bandwidth, latency, gloo=False):
    """(seconds of products, seconds of communication, bytes that a rank sends) of a step of Train settings c
    on n ranks."""
    size, hops = traffic(m, c.parallel, n, c.dtype == "bfloat16", passes(c, n)[1], gloo)
    work = c.tokens_per_step * flops_per_token(m, c.max_seq_len) / (n * flops_per_s)
    return work, size / bandwidth + hops * latency, size


def said_by(command, look=lambda pid: None):
    """What a command prints; look(its pid) is called every 10 ms. Raises ConfigError if it fails."""
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, cwd=HERE, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            look(process.pid)
            time.sleep(0.01)
        file.seek(0)
        text = file.read()
    if process.returncode:
        raise ConfigError(f"{' '.join(command)} failed: {text[-500:]}")
    return text


def probe(hidden, family):
    """Rank 0 prints what n processes reach at once: FLOP/s of products alone, bytes/s and seconds a hop."""
    if not GLOO:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if GLOO else "nccl")
    n, c = dist.get_world_size(), model_config(int(hidden), family)
    large, small = torch.zeros(2 ** 22, device=DEVICE), torch.zeros(1, device=DEVICE)

    def seconds(work):
        times = []
        for _ in range(7):
            dist.barrier()
            start = time.perf_counter()
            work()
            small.item()  # waits for a GPU
            times.append(time.perf_counter() - start)
        return float(np.median(times))
    found = {"flops_per_s": TOKENS * flops_per_token(c, 0) / seconds(products_alone(c, DTYPE)),
             "bandwidth": max(2 * (n - 1) / n * large.nbytes, 1) / seconds(lambda: dist.all_reduce(large)),
             "latency": seconds(lambda: dist.all_reduce(small)) / max(2 * math.log2(n), 1)}
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def measure(c, n):
    """(seconds of a step, bytes that a rank sends in it or None) of train.py on n processes."""
    config, log, seen = f"{c.out_dir}.py", os.path.join(c.out_dir, "log.jsonl"), []
    write_config(c, config)

    def look(pid):
        with contextlib.suppress(OSError), open(log, encoding="utf-8") as f, open("/proc/net/dev") as devices:
            steps = f.read().count("\n")  # gloo's processes talk by the loopback device
            seen.append((steps, next(int(line.split()[9]) for line in devices if line.lstrip()[:3] == "lo:")))
    said_by([*TORCHRUN, f"--nproc_per_node={n}", "train.py", config], look)
    with open(log, encoding="utf-8") as f:
        speeds = [json.loads(line)["tokens_per_s"] for line in f][WARM_UP:]
    points = {steps: sent for steps, sent in seen if WARM_UP <= steps < WARM_UP + len(speeds)}
    seconds, slope = c.tokens_per_step / float(np.median(speeds)), None
    if GLOO and n > 1 and len(points) > 1:
        slope = float(np.polyfit(*zip(*points.items()), 1)[0]) / n
    return seconds, slope


def fit(rows):
    """(a, b, rms of the relative errors): the constants by which seconds are a·work + b·communication."""
    work, communication = (np.array([row[key] / row["seconds"] for row in rows])
                           for key in ("work", "communication"))
    (a, b), norm = nnls(np.stack((work, communication), axis=1), np.ones(len(rows)))
    return float(a), float(b), float(norm) / math.sqrt(len(rows))


def races(options, folder):
    """Rows of the measured steps: family, hidden size, parallel and n, with what was counted for each."""
    rows, most = [], math.inf if GLOO else torch.cuda.device_count()
    for family, hidden, n in product(options.families, options.sizes, options.processes):
        if n > most:
            continue
        said = said_by([*TORCHRUN, f"--nproc_per_node={n}", "bench_scale.py", str(hidden), family])
        reached = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
        m = model_config(hidden, family)
        for parallel in ("ddp", "fsdp"):
            name = f"{family} {hidden} {parallel} {n}"
            c = Train(out_dir=os.path.join(folder, name), rows=None, dataset=os.path.join(folder, "data"),
                      **{key: getattr(m, key) for key in (*SIZES, *EXPERTS)}, max_seq_len=SEQUENCE,
                      tokens_per_step=TOKENS, max_tokens=TOKENS * (WARM_UP + options.repeats), dtype=DTYPE,
                      save_every_seconds=0, compile=False, decay_steps=0, parallel=parallel)
            seconds, sent = measure(c, n)
            work, communication, counted = parts(m, c, n, gloo=GLOO, **reached)
            rows.append({"family": family, "hidden": hidden, "parallel": parallel, "processes": n,
                         "seconds": seconds, "tokens_per_s": TOKENS / seconds, "bytes_counted": counted,
                         "bytes_sent": sent, "work": work, "communication": communication, **reached})
            print(f"{name}: {TOKENS / seconds:,.0f} tokens/s; a rank sends {counted / 1e6:.2f} MB a step by "
                  f"count", "" if sent is None else f"and {sent / 1e6:.2f} MB in fact", flush=True)
    return rows


def estimates(options, a, b):
    """Rows of the estimated step of the settings options.model on GPUs, by parallel and their number."""
    c = from_dict(Train, {"dtype": "bfloat16"} | read_config(options.model), f"{options.model}: ")  # on GPUs
    c, m = resolve_architecture(c, None, data_of(c, dry_run=True))
    rows = []
    for parallel, n in product(("ddp", "fsdp"), options.gpus):
        c = replace(c, parallel=parallel)
        with contextlib.suppress(ConfigError):  # the sequences of a step do not divide among n
            work, communication, _ = parts(m, c, n, options.flops_per_gpu, options.bandwidth, options.latency)
            seconds = a * work + b * communication
            rows.append({"parallel": parallel, "gpus": n, "seconds": seconds,
                         "communication": b * communication / seconds,
                         "tokens_per_s": c.tokens_per_step / seconds})
    return rows


def scale(options):
    """Training on several processes, ddp and fsdp: tokens/s, bytes sent, and an estimate for many GPUs."""
    with tempfile.TemporaryDirectory(prefix="bench_scale_") as folder:
        data = os.path.join(folder, "data")
        prepare(Prepare(source=os.path.join(HERE, "config"), out_dir=data, val_fraction=0.2))
        rows = races(options, folder)
    a, b, error = fit(rows)
    estimated = estimates(options, a, b)
    card = None if GLOO else torch.cuda.get_device_name()
    print("\nA step lasts a x FLOPs / (n x FLOP/s) + b x (bytes / bandwidth + hops x latency), with "
          f"a = {a:.2f} and b = {b:.2f}, fitted to {len(rows)} kinds of steps on {card or 'this CPU'} "
          f"(rms error {error:.0%}).\nAn estimate by these constants: {options.model} on GPUs of "
          f"{options.flops_per_gpu:.3g} FLOP/s, {options.bandwidth:.3g} bytes/s and {options.latency:.0e} s")
    for row in estimated:
        print(f"  {row['parallel']} on {row['gpus']}: {row['seconds']:.3g} s a step, "
              f"{row['communication']:.0%} of it communication; {row['tokens_per_s']:,.0f} tokens/s")
    result = {"git": code_version(), "torch": torch.__version__, "card": card, "options": asdict(options),
              "measured": rows, "a": a, "b": b, "rms_error": error, "estimated": estimated}
    write_text_atomically(options.out, json.dumps(result, indent=1))


if __name__ == "__main__":  # what torchrun starts
    if len(sys.argv) != 3:
        raise SystemExit("bench_scale.py: `python bench.py scale` runs it")
    probe(*sys.argv[1:])
