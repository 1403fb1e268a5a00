"""Many processes: fsdp against one process, checkpoints of parts, memory, launches that fail and go on."""
import contextlib
import ctypes
import dataclasses
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import checkpoint
import cost
import train as train_module
from configurator import ConfigError
from data.stream import batches
from model import Layer, MoE, parameter_counts
from start import Stopped
from test_train import STEP, data, log, moe, quiet, same_state, tiny  # noqa: F401  (fixtures)
from train import train
from upcycle import Options, upcycle


def in_ranks(world, job):
    """What forks of this process print that run job(rank) as ranks of a gloo group. Fails where one does."""
    folder = tempfile.mkdtemp()
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if not pids[-1]:
            status = 1
            try:
                with (open(f"{folder}/{rank}.txt", "w", buffering=1) as out,
                      contextlib.redirect_stdout(out), contextlib.redirect_stderr(out)):
                    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                            world_size=world)
                    job(rank)
                    dist.barrier()
                    status = 0
            except BaseException:
                with open(f"{folder}/{rank}.txt", "a") as out:
                    traceback.print_exc(file=out)
            os._exit(status)
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    said = "".join(open(f"{folder}/{rank}.txt").read() for rank in range(world))
    shutil.rmtree(folder)
    assert not any(ends), said
    return said


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def variant(c, kind, world, **changes):
    """Settings of a run of so many processes, with the same sequences in one pass of all. Sizes are no
    multiples of 4, so that there parts are uneven and one rank has none of the router."""
    changes = {"hidden_size": 18, "num_attention_heads": 3, "micro_batch_size": 4 // world, "rows": None,
               "max_tokens": 8 * STEP, "decay_steps": 2, "eval_every_steps": 4, "eval_tokens": 7 * 16,
               "out_dir": f"{c.out_dir}-{kind}{world}", "parallel": "fsdp"} | changes
    if "moe" in kind:
        changes |= {"num_local_experts": 3, "router_aux_loss_coef": 0.1, "router_bias_update_rate": 0.01,
                    "tie_word_embeddings": False}
    return dataclasses.replace(c, **changes)


def compare(a, b, rtol):
    for key in ("loss", "grad_norm", "balance_loss", "z_loss", "val_loss"):
        x, y = ([line[key] for line in log(c) if key in line] for c in (a, b))
        np.testing.assert_allclose(x, y, rtol=rtol, err_msg=key)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_many_ranks_have_the_losses_of_one_process(tiny, double, world):  # noqa: F811
    """In fp64, where only the order of sums differs: 8 steps of two passes each. Activations that are
    computed again are the same. The mixtures have a balance loss and a router bias."""
    alone = {kind: variant(tiny, kind, 1, out_dir=f"{tiny.out_dir}-{kind}") for kind in ("dense", "moe")}
    frugal = {"activation_checkpointing": True, "cpu_offload": True}
    many = [variant(tiny, "dense", world, **frugal), variant(tiny, "moe", world, shard_size=2000),
            variant(tiny, "moe-frugal", world, **frugal), variant(tiny, "moe-ddp", world, parallel="ddp")]
    for c in alone.values():
        train(c, report=quiet)
    in_ranks(world, lambda rank: [train(c, report=quiet) for c in many])
    for b in many:
        a = alone["moe" if b.num_local_experts else "dense"]
        compare(a, b, rtol=1e-9)
        x, y = (checkpoint.load_model(f"{run.out_dir}/checkpoint-8", torch.float64).state_dict()
                for run in (a, b))
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-7, atol=1e-9)
    files = os.listdir(f"{many[1].out_dir}/checkpoint-8")
    assert sum(name.startswith("model-") for name in files) > 4 and "model.safetensors.index.json" in files
    assert sum(name.startswith("optimizer-") for name in files) > 8


@pytest.mark.parametrize("writers", [2, 4])
def test_what_some_ranks_saved_any_number_opens(tiny, writers):  # noqa: F811
    """What the ranks saved at step 4 goes on there bit for bit. One process, other numbers of ranks, ddp and
    ranks that keep their parts on the host go on with the same data, and losses that differ by the rounding
    of fp32, which grows over 4 steps."""
    c = variant(tiny, "moe", writers)
    runs = {"1": {}, "2": {}, "2ddp": {"parallel": "ddp"}, "4": {},
            "2frugal": {"cpu_offload": True, "activation_checkpointing": True}}
    runs = {name: dataclasses.replace(c, out_dir=f"{c.out_dir}-{name}", resume=True,
                                      micro_batch_size=4 // int(name[0]), **changes)
            for name, changes in runs.items()}
    in_ranks(writers, lambda rank: train(dataclasses.replace(c, save_at_tokens=[4 * STEP]), report=quiet))
    for run in runs.values():
        shutil.copytree(f"{c.out_dir}/checkpoint-4", f"{run.out_dir}/checkpoint-4")
    train(runs["1"], report=quiet)
    for world in (2, 4):
        said = in_ranks(world, lambda rank: [train(run, report=quiet) for name, run in runs.items()
                                             if name[0] == str(world)])
        assert "balance loss" not in said
    whole = [line["loss"] for line in log(c)]
    for name, run in runs.items():
        assert [line["step"] for line in log(run)] == [5, 6, 7, 8]
        np.testing.assert_allclose([line["loss"] for line in log(run)], whole[4:], rtol=1e-4)
    for name in ("model.safetensors", "optimizer.moments"):
        a, b = (load_file(f"{x.out_dir}/checkpoint-8/{name}") for x in (c, runs[str(writers)]))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_upcycle_wrote_is_trained_in_parts_and_opened_by_transformers(tiny):  # noqa: F811
    """From its weights alone and from copied moments; the shards that two ranks wrote, as they are."""
    from transformers import AutoModelForCausalLM
    sizes = {"hidden_size": 20, "num_attention_heads": 5}  # widths that transformers can run
    dense, start = variant(tiny, "dense", 1, **sizes), f"{tiny.out_dir}-start"
    train(dense, report=quiet)
    upcycle(Options(f"{dense.out_dir}/checkpoint-8", start, num_local_experts=4, optimizer="copy",
                    check=False))
    found = {}
    for branch in (False, True):
        one, two = (variant(tiny, f"from-{branch}", world, init_from=start, branch=branch, shard_size=2000,
                            max_tokens=6 * STEP, **sizes) for world in (1, 2))
        train(one, report=quiet)
        in_ranks(2, lambda rank: train(two, report=quiet))
        compare(one, two, rtol=1e-4)
        found[branch] = np.array([line["loss"] for line in log(two)])
    assert found[False][0] == found[True][0] and (abs(found[False] - found[True])[1:] > 1e-3).all()
    path, ids = f"{two.out_dir}/checkpoint-6", torch.arange(10).view(1, 10)
    assert sum(name.startswith("model-") for name in os.listdir(path)) > 4
    judge = AutoModelForCausalLM.from_pretrained(path)
    torch.testing.assert_close(judge(ids).logits, checkpoint.load_model(path)(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_fsdp_in_bf16_has_the_losses_of_one_process_in_bf16(tiny, kind):  # noqa: F811
    """To a few roundings of bf16. The router's weights are not rounded, and its products are in fp32."""
    one, *many = (variant(tiny, kind, world, dtype="bfloat16", hidden_size=16, num_attention_heads=2,
                          out_dir=f"{tiny.out_dir}-{kind}-{name}")
                  for name, world in (("alone", 1), ("1", 1), ("2", 2)))
    train(one, report=quiet)

    def look(module, inputs, output):
        if isinstance(module, MoE):
            x, weight = inputs[0].flatten(0, 1).double(), module.gate.weight.detach()
            assert weight.dtype == torch.float32 and (weight != weight.bfloat16()).any()
            exact = (x @ weight.double().T).logsumexp(-1).square().mean()
            torch.testing.assert_close(output[1][2].double(), exact, rtol=1e-5, atol=0)

    def job(rank):
        torch.nn.modules.module.register_module_forward_hook(look)
        train(many[dist.get_world_size() - 1], report=quiet)
    for world in (1, 2):
        in_ranks(world, job)
        compare(one, many[world - 1], rtol=2e-2)


def test_fsdp_compiled_by_layer_has_the_losses_of_one_process(tiny, monkeypatch):  # noqa: F811
    """Traced and differentiated by torch.compile, but run without its C++, which takes a minute to make."""
    monkeypatch.setattr(Layer, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    one, two = (variant(tiny, "dense", world, compile=world == 2, max_tokens=4 * STEP) for world in (1, 2))
    train(one, report=quiet)

    def job(rank):
        train(two, report=quiet)
        print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
    said = in_ranks(2, job)
    assert said.count("graphs:") == 2 and "graphs: 0" not in said
    compare(one, two, rtol=1e-4)


def test_rank_0_decides_what_is_resumed(tiny):  # noqa: F811
    """Rank 1 sees an older state of the directory: one of its own, where checkpoint-8 is not yet."""
    c = variant(tiny, "dense", 2, save_at_tokens=[4 * STEP])
    late, one = (dataclasses.replace(c, resume=True, max_tokens=12 * STEP, out_dir=f"{c.out_dir}-{name}")
                 for name in ("late", "one"))

    def job(rank):
        train(c, report=quiet)
        if rank == 0:
            for run in (late, one):
                shutil.copytree(c.out_dir, run.out_dir)
            shutil.rmtree(f"{late.out_dir}/checkpoint-8")
        dist.barrier()
        train(late if rank else dataclasses.replace(late, out_dir=c.out_dir), report=quiet)
    in_ranks(2, job)
    train(dataclasses.replace(one, micro_batch_size=4), report=quiet)
    assert [line["step"] for line in log(c)] == list(range(1, 13)) and len(log(late)) == 8
    compare(one, c, rtol=1e-4)


def test_another_number_of_sequences_in_a_pass_is_said(tiny, capsys):  # noqa: F811
    c = moe(tiny, rows=None, decay_steps=0)
    train(dataclasses.replace(c, max_tokens=2 * STEP, micro_batch_size=4), report=quiet)
    for steps, size, said in ((4, 4, 0), (6, 2, 1)):
        more = {"max_tokens": steps * STEP, "micro_batch_size": size}
        train(dataclasses.replace(c, **more, resume=True), report=quiet)
        assert capsys.readouterr().err.count("is taken over 2 sequences, up to here it was over 4") == said


# ---------------------------------------------------------------------------------------------------------
# Writing while training goes on

def test_a_checkpoint_is_that_of_its_step_though_training_goes_on(tiny, tmp_path, monkeypatch):  # noqa: F811
    """The writer of step 4 begins when step 8 is done; that of step 20 is waited for."""
    c = dataclasses.replace(tiny, save_at_tokens=[4 * STEP], rows=None, num_local_experts=4)
    train(dataclasses.replace(c, out_dir=str(tmp_path / "other")), report=quiet)
    steps, later, true_write, waited = [], threading.Event(), checkpoint.write, []

    def write(*args):
        waited.append(later.wait(60))
        true_write(*args)

    def report(tokens):
        steps.append(tokens)
        if len(steps) == 8:
            assert not checkpoint.checkpoints(c.out_dir)
            later.set()
    monkeypatch.setattr(checkpoint, "write", write)
    train(c, report=report)
    assert waited == [True, True]
    for step in (4, 20):
        same_state(f"{c.out_dir}/checkpoint-{step}", tmp_path / "other" / f"checkpoint-{step}")


def test_a_writer_that_fails_stops_the_steps(tiny, monkeypatch):  # noqa: F811
    def write(*args):
        raise ConfigError("the disk is full")
    monkeypatch.setattr(checkpoint, "write", write)
    with pytest.raises(ConfigError, match="the disk is full"):
        train(dataclasses.replace(tiny, save_at_tokens=[4 * STEP], max_tokens=10**9, compile=False),
              report=lambda tokens: time.sleep(0.01))
    assert 4 <= len(log(tiny)) < 100


def test_a_disk_of_rank_0_that_is_full_ends_all_ranks(tiny):  # noqa: F811
    """Files of more than 9 kB cannot be written there. No checkpoint is left, and no rank waits."""
    c = variant(tiny, "dense", 2, save_at_tokens=[4 * STEP], max_tokens=10**7)

    def job(rank):
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        try:
            train(c, report=lambda tokens: None)
        except (ConfigError, RuntimeError) as error:
            print(f"rank {rank}: {type(error).__name__} {str(error)[:200]}", flush=True)
            os._exit(0)
    said = in_ranks(2, job)
    assert "rank 0: ConfigError" in said and "checkpoint-4: cannot be written: File too large" in said
    assert "rank 1: " in said and [name for name in os.listdir(c.out_dir) if "checkpoint" in name] == []


@pytest.mark.parametrize("parallel, steps", [("ddp", 10**4), ("fsdp", 4)])
def test_no_rank_ends_before_rank_0_has_written(tiny, parallel, steps):  # noqa: F811
    """srun and torchrun end all ranks when one has ended. Here both ranks get SIGUSR1 in a step, or rank 1
    alone when the last step is done; rank 0 takes 2.5 s to write and gets its SIGTERM after that."""
    c, true_write = variant(tiny, "dense", 2, parallel=parallel, max_tokens=steps * STEP), checkpoint.write

    def job(rank):
        pids = [None, None]
        dist.all_gather_object(pids, os.getpid())

        def write(*args):
            if rank == 0 and steps == 4:
                os.kill(pids[1], signal.SIGUSR1)
            time.sleep(2.5 * (rank == 0))
            os.kill(os.getpid(), signal.SIGTERM) if rank == 0 else None
            time.sleep(0.2)
            true_write(*args)
            print(f"rank {rank} wrote at {time.monotonic()}")

        def report(tokens):
            if len(log(c)) == 3 and steps > 4:
                for pid in pids:
                    os.kill(pid, signal.SIGUSR1)
        checkpoint.write = write
        with pytest.raises(Stopped):
            train(c, report=report)
        print(f"rank {rank} ended at {time.monotonic()}")
    said = in_ranks(2, job)
    wrote = float(re.search("rank 0 wrote at (.+)", said)[1])
    assert all(float(end) >= wrote for end in re.findall("ended at (.+)", said)) and said.count("ended") == 2
    step, path = checkpoint.checkpoints(c.out_dir)[-1]
    assert step == len(log(c)) and checkpoint.load_model(path)


# ---------------------------------------------------------------------------------------------------------
# Memory

def anonymous():
    """Bytes of this process's memory that is no file's."""
    ctypes.CDLL(None).malloc_trim(0)  # free pages go back to the system, whatever was freed before
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def peak():
    """Yields a list that ends with the most memory that was added meanwhile, sampled all the time."""
    start, found, stop = anonymous(), [0], threading.Event()

    def watch():
        while not stop.is_set():
            found.append(max(found.pop(), anonymous() - start))
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    stop.set()
    thread.join()


def readme_bytes(parallel, dtype, P, L, R, n):
    """What the formula in the README gives."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    cells = re.search(rf"^\| {parallel} \| (.+) \| (.+) \|$", text, re.MULTILINE)
    formula = cells[1 if dtype == "float32" else 2]
    return eval(re.sub(r"(\d+) ([PLR])", r"\1 * \2", formula), {"P": P, "L": L, "R": R, "n": n})


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_a_rank_is_what_the_readme_and_the_dry_run_say(tiny, parallel, dtype, request):  # noqa: F811
    """Two ranks, 7 M parameters: training, saving, loading, within 9 MB, which libraries and pages take
    (loading: 18), and 7 MB more in bf16, for which oneDNN keeps more. It runs in a process of its own, since
    ranks are forks, and use memory anew that other tests have freed."""
    if "ALONE" not in os.environ:
        command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::{request.node.name}"]
        result = subprocess.run(command, env=os.environ | {"ALONE": "1"}, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return
    c = variant(tiny, "dense", 2, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, dtype=dtype,
                parallel=parallel, tokens_per_step=32, micro_batch_size=1)
    path, slack, w = f"{c.out_dir}/checkpoint-1", *((9e6, 4) if dtype == "float32" else (16e6, 2))

    def job(rank):
        ctypes.CDLL(None).mallopt(-3, 65536)  # what is larger goes back to the system once it is free
        start, cpu = anonymous(), torch.device("cpu")
        with contextlib.ExitStack() as stack:
            run = train_module.plan_run(c, cpu, stack)
            stream = batches(run.tokens, rank, 1, 2, 16, 0, cpu)
            with peak() as training:
                train_module.build(run)
                for _ in range(3):
                    train_module.train_step(run, stream, 1e-3, False, False)
                between = anonymous() - start
            stream.close()
            P, largest = parameter_counts(run.model_config)["total"], 2 * 1024 * 384
            L = 4 * 384 ** 2 + 3 * 384 * 1024
            held = readme_bytes(parallel, dtype, P, L, P - 4 * L, 2)
            counted = cost.device_bytes(SimpleNamespace(settings=c, model=run.model_config, ranks=2))
            assert counted == held + cost.activation_bytes(run.model_config, 16, w)
            if rank == 0 or parallel == "fsdp":
                saved = checkpoint.contents(run.model, run.optimizer, copy=True)
                with peak() as writing:
                    state = run.state | {"step": 1, "tokens": 32}
                    checkpoint.write(path, saved, state, group=run.writers)
                assert writing[0] < 3 * 4 * largest + slack
                del saved
            del run.model, run.optimizer, run.forward, run.no_sync
        dist.barrier()
        with contextlib.ExitStack() as stack:
            run = train_module.plan_run(dataclasses.replace(c, resume=True), cpu, stack)
            with peak() as loading:
                train_module.build(run)
        part = P if parallel == "ddp" else P / 2
        print(rank, P, L, held, counted, between, training, loading)
        reused = 2 ** 20  # bytes in pages that were partly in use
        assert 12 * part - reused < between < (16 * P if parallel == "ddp" else 12 * part) + slack
        assert 16 * part - reused < training[0] < counted + slack
        assert loading[0] < (16 if parallel == "ddp" else 12) * part + 3 * 4 * largest + 2 * slack
    print(in_ranks(2, job))
