"""Many processes: fsdp against one process, checkpoints of parts, memory, launches that fail and go on."""
import contextlib
import ctypes
import dataclasses
import os
import resource
import shutil
import tempfile
import threading
import time
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import checkpoint
import train as train_module
from configurator import ConfigError
from data.stream import batches
from test_train import STEP, data, log, moe, quiet, same_state, tiny  # noqa: F401  (fixtures)
from train import train


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
def test_fsdp_has_the_losses_of_one_process(tiny, double, world):  # noqa: F811
    """In fp64, where only the order of sums differs: 8 steps of two passes each. Activations that are
    computed again are the same."""
    alone = [variant(tiny, kind, 1, out_dir=f"{tiny.out_dir}-{kind}") for kind in ("dense", "moe")]
    many = [variant(tiny, "dense", world, activation_checkpointing=True, cpu_offload=True),
            variant(tiny, "moe", world, shard_size=2000)]
    for c in alone:
        train(c, report=quiet)
    in_ranks(world, lambda rank: [train(c, report=quiet) for c in many])
    for a, b in zip(alone, many):
        compare(a, b, rtol=1e-9)
        x, y = (checkpoint.load_model(f"{run.out_dir}/checkpoint-8", torch.float64).state_dict()
                for run in (a, b))
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-7, atol=1e-9)
    files = os.listdir(f"{many[1].out_dir}/checkpoint-8")
    assert sum(name.startswith("model-") for name in files) > 4 and "model.safetensors.index.json" in files
    assert sum(name.startswith("optimizer-") for name in files) > 8


def test_parts_of_two_ranks_are_opened_by_one_four_and_transformers(tiny):  # noqa: F811
    """What two ranks saved at step 4 goes on there bit for bit. One process, four ranks and ddp go on with
    the same data, and losses that differ by the rounding of fp32, which grows over 4 steps."""
    from transformers import AutoModelForCausalLM
    c = variant(tiny, "moe", 2, hidden_size=20, num_attention_heads=5)  # widths that transformers can run
    runs = {"1": {"micro_batch_size": 4}, "2": {}, "2ddp": {"parallel": "ddp"}, "4": {"micro_batch_size": 1}}
    runs = {name: dataclasses.replace(c, out_dir=f"{c.out_dir}-{name}", resume=True, **changes)
            for name, changes in runs.items()}

    def begin(rank):
        train(dataclasses.replace(c, save_at_tokens=[4 * STEP]), report=quiet)
        if rank == 0:
            for run in runs.values():
                shutil.copytree(f"{c.out_dir}/checkpoint-4", f"{run.out_dir}/checkpoint-4")
        dist.barrier()
        for name in ("2", "2ddp"):
            train(runs[name], report=quiet)
    in_ranks(2, begin)
    said = in_ranks(4, lambda rank: train(runs["4"], report=quiet))
    assert "balance loss" not in said
    train(runs["1"], report=quiet)
    whole = [line["loss"] for line in log(c)]
    for name, run in runs.items():
        assert [line["step"] for line in log(run)] == [5, 6, 7, 8]
        np.testing.assert_allclose([line["loss"] for line in log(run)], whole[4:], rtol=1e-4)
    for name in ("model.safetensors", "optimizer.moments"):
        a, b = (load_file(f"{x.out_dir}/checkpoint-8/{name}") for x in (c, runs["2"]))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    saved = checkpoint.load_model(f"{c.out_dir}/checkpoint-8")
    for layer in saved.layers:
        layer.mlp.bias.zero_()
    checkpoint.save(f"{c.out_dir}/plain", saved, {})
    ids = torch.arange(10).view(1, 10)
    judge = AutoModelForCausalLM.from_pretrained(f"{c.out_dir}/plain")
    torch.testing.assert_close(judge(ids).logits, saved(ids), rtol=1e-4, atol=1e-5)


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


# ---------------------------------------------------------------------------------------------------------
# Memory

def anonymous():
    """Bytes of this process's memory that is no file's."""
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


def test_memory_of_a_rank_is_what_the_readme_says(tiny):  # noqa: F811
    """Two ranks, 7 M parameters: training, saving, loading, within 9 MB, which libraries and pages take."""
    c = variant(tiny, "dense", 2, hidden_size=384, intermediate_size=1024, num_hidden_layers=4,
                tokens_per_step=32, micro_batch_size=1)
    path, slack = f"{c.out_dir}/checkpoint-1", 9e6

    def job(rank):
        ctypes.CDLL(None).mallopt(-3, 65536)  # what is freed goes back to the system,
        ctypes.CDLL(None).malloc_trim(0)      # and so does what was freed before the fork
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
            sizes = [p.numel() for p in run.model.parameters()]
            P, L = sum(sizes), sum(p.numel() for p in run.model.layers[0].parameters())
            R, largest = P - 4 * L, max(sizes)
            saved = checkpoint.contents(run.model, run.optimizer, copy=True)
            with peak() as writing:
                checkpoint.write(path, saved, run.state | {"step": 1, "tokens": 32}, group=run.writers)
            del saved, run.model, run.optimizer, run.forward
        dist.barrier()
        with contextlib.ExitStack() as stack:
            run = train_module.plan_run(dataclasses.replace(c, resume=True), cpu, stack)
            with peak() as loading:
                train_module.build(run)
        print(rank, P, L, R, between, training, writing, loading)
        reused = 2 ** 20  # bytes in pages that were partly in use
        assert 12 * P / 2 - reused < between < 12 * P / 2 + slack
        assert 16 * P / 2 - reused < training[0] < 16 * P / 2 + 8 * R + 16 * L + slack
        assert writing[0] < 3 * 4 * largest + slack and loading[0] < 12 * P / 2 + 3 * 4 * largest + slack
    print(in_ranks(2, job))
