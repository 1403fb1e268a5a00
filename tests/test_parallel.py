"""Many processes: fsdp against one process, checkpoints of parts, memory, launches that fail and go on."""
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import checkpoint
import train as train_module
from model import ModelConfig, Transformer
from test_train import STEP, data, log, quiet, tiny  # noqa: F401  (fixtures)
from train import train


def in_ranks(world, job):
    """Run job(rank) in forks of this process that are the ranks of a gloo group. Fails where one of them does,
    with what it printed."""
    folder = tempfile.mkdtemp()
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if not pids[-1]:
            status = 1
            try:
                with open(f"{folder}/{rank}.txt", "w") as out:
                    os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
                    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                            world_size=world)
                    job(rank)
                    dist.barrier()
                    status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
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
    """Settings of a run of so many processes, on the same tokens and the same sequences in a pass of all. Sizes
    are multiples of no number of ranks but 2, so that parts are uneven and one rank has none."""
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
    """In fp64, where only the order of sums differs: 8 steps of two passes each. Activations that are computed
    again are the same."""
    alone = [variant(tiny, kind, 1, out_dir=f"{tiny.out_dir}-{kind}") for kind in ("dense", "moe")]
    many = [variant(tiny, "dense", world, activation_checkpointing=True, cpu_offload=True),
            variant(tiny, "moe", world, shard_size=2000)]
    for c in alone:
        train(c, report=quiet)
    in_ranks(world, lambda rank: [train(c, report=quiet) for c in many])
    for a, b in zip(alone, many):
        compare(a, b, rtol=1e-9)
        x, y = (checkpoint.load_model(f"{c.out_dir}/checkpoint-8", torch.float64).state_dict() for c in (a, b))
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-7, atol=1e-9)
    files = os.listdir(f"{many[1].out_dir}/checkpoint-8")
    assert sum(name.startswith("model-") for name in files) > 4 and "model.safetensors.index.json" in files
    assert sum(name.startswith("optimizer-") for name in files) > 8
