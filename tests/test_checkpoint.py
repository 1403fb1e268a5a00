"""Checkpoints: atomic, strict about what they read, and never a lie under another tool's name."""
import errno
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from configurator import ConfigError
from model import Transformer
from test_model import DENSE, MOE, random_model

STATE = {"step": 1, "tokens": 20, "lineage": {"family": "moe"}}


@pytest.fixture
def saved(tmp_path):
    model = random_model(**MOE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss, _ = model(torch.arange(20).view(1, 20), torch.arange(1, 21).view(1, 20))
    loss.backward()
    optimizer.step()
    checkpoint.save(tmp_path / "c", model, STATE, optimizer)
    return tmp_path / "c", model, optimizer


def test_weights_state_and_moments_come_back_bit_for_bit(saved):
    path, model, optimizer = saved
    again = checkpoint.load_model(path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    fresh = torch.optim.AdamW(again.parameters(), fused=True)
    checkpoint.load_moments(path, again, fresh)
    for p, q in zip(model.parameters(), again.parameters()):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key], fresh.state[q][key])
    assert checkpoint.read_state(path) == STATE
    torch.load(path / "optimizer.pt", weights_only=True)


def test_tensor_names_are_mixtrals(saved):
    names = set(load_file(saved[0] / "model.safetensors"))
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names and "model.layers.1.block_sparse_moe.gate.weight" in names
    assert len(names) == 3 + 2 * (2 + 4 + 1 + 3 * 4)


def test_an_existing_checkpoint_is_not_overwritten(saved):
    before = (saved[0] / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="already exists"):
        checkpoint.save(saved[0], random_model(seed=1, **MOE), {})
    assert (saved[0] / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("error, kind", [(OSError(errno.ENOSPC, "No space left on device"), ConfigError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failed_write_leaves_nothing(tmp_path, error, kind):
    with pytest.raises(kind):
        with checkpoint.atomic_directory(tmp_path / "c") as temporary:
            open(os.path.join(temporary, "half"), "w").write("x")
            raise error
    assert os.listdir(tmp_path) == []


def test_a_real_full_disk(tmp_path):
    """/dev/full fails each write with ENOSPC; a checkpoint whose file is a link to it cannot be written."""
    with pytest.raises(ConfigError, match="disk is full"):
        with checkpoint.atomic_directory(tmp_path / "c") as temporary:
            os.symlink("/dev/full", os.path.join(temporary, "model.safetensors"))
            with open(os.path.join(temporary, "model.safetensors"), "wb") as f:
                f.write(b"x" * 10_000_000)
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_writer_are_cleared_and_not_mistaken(saved):
    parent = saved[0].parent
    os.makedirs(parent / ".checkpoint-7.tmp")
    assert checkpoint.checkpoints(parent) == []
    checkpoint.save(parent / "checkpoint-7", saved[1], {})
    assert [step for step, _ in checkpoint.checkpoints(parent)] == [7] and not (parent / ".checkpoint-7.tmp").exists()


def cut(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * keep)])


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGE = {
    "no directory": (lambda d: d.rename(d.parent / "away"), "no such checkpoint"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "broken config": (lambda d: cut(d / "config.json", 0.5), "config.json: not valid JSON"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "truncated weights": (lambda d: cut(d / "model.safetensors", 0.9), "model.safetensors: not a complete"),
    "truncated header": (lambda d: cut(d / "model.safetensors", 0.01), "model.safetensors: not a complete"),
    "lying header": (lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 8 + (d / "model.safetensors").read_bytes()[8:]), "not a complete"),
    "pickle as safetensors": (lambda d: (d / "model.safetensors").write_bytes(pickle.dumps({"a": 1})), "not a complete"),
    "a tensor missing": (lambda d: rewrite(d / "model.safetensors", lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
    "a wrong shape": (lambda d: rewrite(d / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(5)})), r"model.norm.weight is \(5,\)"),
    "an unknown tensor": (lambda d: rewrite(d / "model.safetensors", lambda t: t.update({"model.extra": torch.ones(5)})), "model.extra"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(saved, name):
    damage, message = DAMAGE[name]
    damage(saved[0])
    with pytest.raises(ConfigError, match=message):
        checkpoint.load_model(saved[0])


@pytest.mark.parametrize("index, message", [({"weight_map": {"a": "../c/model.safetensors"}}, "not a safetensors file of its own folder"), ({}, "no weight_map"),
                                            ({"weight_map": {"a": "w.bin"}}, "not a safetensors file"), ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
                                            ({"weight_map": {"nothing": "part.safetensors"}}, "does not hold nothing")])
def test_bad_indexes_are_refused(saved, index, message):
    (saved[0] / "model.safetensors").rename(saved[0] / "part.safetensors")
    (saved[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        checkpoint.load_model(saved[0])


def test_pickled_weights_are_never_loaded(saved):
    (saved[0] / "model.safetensors").rename(saved[0] / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pytorch_model.bin is pickled"):
        checkpoint.load_model(saved[0])


@pytest.mark.parametrize("damage", [lambda p: cut(p, 0.5), lambda p: p.unlink(), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(pickle.dumps(os.getcwd))])
def test_damaged_or_dangerous_optimizer_files_are_named(saved, damage):
    path, model, optimizer = saved
    damage(path / "optimizer.pt")
    with pytest.raises(ConfigError, match="optimizer.pt"):
        checkpoint.load_moments(path, model, torch.optim.AdamW(model.parameters()))


def test_a_nonzero_router_bias_is_never_saved_as_mixtral(tmp_path):
    from transformers import AutoModelForCausalLM
    model = random_model(**MOE, router_bias=True)
    checkpoint.save(tmp_path / "zero", model, {})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "zero").config.model_type == "mixtral"
    model.layers[0].mlp.bias[1] = 0.5
    checkpoint.save(tmp_path / "biased", model, {})
    with pytest.raises(ValueError, match="mixtral_with_router_bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "biased")
    again = checkpoint.load_model(tmp_path / "biased")
    ids = torch.arange(30).view(1, 30)
    assert torch.equal(again(ids), model(ids))
    model.layers[0].mlp.bias.zero_()
    assert not torch.equal(again(ids), model(ids))


def test_tokenizer_files_come_along(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_text("{}")
    checkpoint.save(tmp_path / "c", random_model(**DENSE), {}, tokenizer_from=tmp_path / "data")
    assert (tmp_path / "c" / "tokenizer.json").exists()
    assert isinstance(checkpoint.load_model(tmp_path / "c"), Transformer)


def test_another_tools_trainer_state_is_no_state(saved):
    (saved[0] / "trainer_state.json").write_text('{"epoch": 1.0, "global_step": 500, "log_history": []}')
    assert checkpoint.read_state(saved[0]) == {}
