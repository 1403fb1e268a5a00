"""What must hold on any device. Tests of GPUs are skipped where there is none; `make gpu` runs them alone."""
import dataclasses

import numpy as np
import pytest
import torch

from model import ModelConfig, Transformer, loop_mm, run_experts
from test_train import STEP, data, log, moe, quiet, tiny, torchrun  # noqa: F401  (data and tiny are fixtures)
from train import train

GPUS = torch.cuda.device_count()
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not GPUS, reason="torch sees no GPU here"))


def losses(c, **changes):
    c = dataclasses.replace(c, rows=None, **changes)
    train(c, report=quiet)
    return [line["loss"] for line in log(c)]


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_loss_and_logits_are_those_of_fp64_on_the_cpu(device, experts):
    c = ModelConfig(61, 32, 64, 2, 4, num_key_value_heads=2, num_local_experts=experts, initializer_range=0.1)
    ids = torch.randint(0, 61, (4, 32), generator=torch.Generator().manual_seed(1))
    exact, model = Transformer(c).init_weights(0).double(), Transformer(c).init_weights(0).to(device)
    with torch.no_grad():
        logits = exact(ids)
        found = model(ids.to(device)).double().cpu()
        loss = model(ids.to(device), ids.to(device))[0].item()
    assert (found - logits).abs().max() < 1e-4 * logits.abs().max()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_grouped_experts_in_bf16_equal_the_loop(device):
    """Values and gradients, with an expert that no token chose, to a few roundings of 2⁻⁸."""
    generator, ends = torch.Generator().manual_seed(0), torch.tensor([10, 10, 37, 64], dtype=torch.int32)
    x, gate_up, down = (torch.randn(shape, generator=generator).to(device, torch.bfloat16).requires_grad_()
                        for shape in ((64, 32), (4, 96, 32), (4, 32, 48)))
    ends = ends.to(device)
    out = run_experts(x, gate_up, down, ends)
    found = [out, *torch.autograd.grad(out.float().square().sum(), (x, gate_up, down))]
    wide = [t.detach().float().requires_grad_() for t in (x, gate_up, down)]
    gate, up = (loop_mm(wide[0], w.transpose(1, 2), ends) for w in wide[1].chunk(2, dim=1))
    out = loop_mm(torch.nn.functional.silu(gate) * up, wide[2].transpose(1, 2), ends)
    expected = [out, *torch.autograd.grad(out.square().sum(), wide)]
    for a, b in zip(found, expected):
        assert (a.float() - b).norm() < 2 ** -6 * b.norm()


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tiny, tmp_path, device, kind):  # noqa: F811
    """Bit for bit on a CPU. On a GPU the order of sums may change from run to run."""
    c = dataclasses.replace(tiny, device=device, decay_steps=0, max_tokens=8 * STEP, dtype="float32")
    c = moe(c) if kind == "moe" else c
    straight = losses(c, out_dir=str(tmp_path / "straight"))
    losses(c, max_tokens=4 * STEP)
    found = losses(c, resume=True)
    np.testing.assert_allclose(found, straight, rtol=0 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("device", [CUDA])
def test_a_compiled_run_in_bf16_has_the_losses_of_an_eager_one(tiny, tmp_path, device, kind):  # noqa: F811
    c = dataclasses.replace(tiny, device=device, max_tokens=8 * STEP, dtype="bfloat16")
    c = moe(c) if kind == "moe" else c
    eager = losses(c, out_dir=str(tmp_path / "eager"), compile=False)
    np.testing.assert_allclose(losses(c, compile=True), eager, rtol=2e-2)


@pytest.mark.skipif(GPUS < 2, reason="torch sees no two GPUs here")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_on_cuda_have_the_losses_of_one(tiny, tmp_path, parallel):  # noqa: F811
    c = moe(dataclasses.replace(tiny, device="cuda", dtype="float32", max_tokens=8 * STEP))
    two = dataclasses.replace(c, out_dir=str(tmp_path / "two"), parallel=parallel)
    torchrun(two, 2, tmp_path)
    np.testing.assert_allclose([line["loss"] for line in log(two)], losses(c), rtol=1e-3)
