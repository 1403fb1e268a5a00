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
from formats import MIXTURES
from model import ModelConfig, Transformer, balance_loss
from test_model import DENSE, MOE, random_model

STATE = {"step": 1, "history": [["a", 20]], "tokens": 20, "lineage": {"family": "moe"}}


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
    assert len(load_file(path / "optimizer.moments")) == 1 + 2 * len(load_file(path / "model.safetensors"))


def test_tensor_names_are_mixtrals(saved):
    names = set(load_file(saved[0] / "model.safetensors"))
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names
    assert "model.layers.1.block_sparse_moe.gate.weight" in names
    assert len(names) == 3 + 2 * (2 + 4 + 1 + 3 * 4)


def test_an_existing_checkpoint_is_not_overwritten(saved):
    before = (saved[0] / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="already exists"):
        checkpoint.save(saved[0], random_model(seed=1, **MOE), {})
    assert (saved[0] / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("error, kind", [(OSError(errno.ENOSPC, "No space left on device"), ConfigError),
                                         (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failed_write_leaves_nothing(tmp_path, error, kind):
    with pytest.raises(kind):
        with checkpoint.atomic_directory(tmp_path / "c") as temporary:
            open(os.path.join(temporary, "half"), "w").write("x")
            raise error
    assert os.listdir(tmp_path) == []


def test_a_real_full_disk(tmp_path):
    """/dev/full fails each write with ENOSPC; a checkpoint whose file is a link to it cannot be written."""
    with pytest.raises(ConfigError, match="the disk is full: 10,000,000 bytes needed"):
        with checkpoint.atomic_directory(tmp_path / "c", needed=10_000_000) as temporary:
            os.symlink("/dev/full", os.path.join(temporary, "model.safetensors"))
            with open(os.path.join(temporary, "model.safetensors"), "wb") as f:
                f.write(b"x" * 10_000_000)
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_writer_are_cleared_and_not_mistaken(saved):
    parent = saved[0].parent
    os.makedirs(parent / ".checkpoint-7.tmp")
    assert checkpoint.checkpoints(parent) == []
    checkpoint.save(parent / "checkpoint-7", saved[1], {})
    assert [step for step, _ in checkpoint.checkpoints(parent)] == [7]
    assert not (parent / ".checkpoint-7.tmp").exists()


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
    "lying header": (lambda d: (d / "model.safetensors").write_bytes(
        b"\xff" * 8 + (d / "model.safetensors").read_bytes()[8:]), "not a complete"),
    "pickle as safetensors": (lambda d: (d / "model.safetensors").write_bytes(pickle.dumps({"a": 1})),
                              "not a complete"),
    "a tensor missing": (lambda d: rewrite(d / "model.safetensors", lambda t: t.pop("model.norm.weight")),
                         "model.norm.weight is missing"),
    "a wrong shape": (lambda d: rewrite(
        d / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(5)})),
        r"model.norm.weight is \(5,\)"),
    "an unknown tensor": (lambda d: rewrite(
        d / "model.safetensors", lambda t: t.update({"model.extra": torch.ones(5)})), "model.extra"),
    "integers": (lambda d: rewrite(
        d / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int)})),
        "model.norm.weight is I32"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(saved, name):
    damage, message = DAMAGE[name]
    damage(saved[0])
    with pytest.raises(ConfigError, match=message):
        checkpoint.load_model(saved[0])


@pytest.mark.parametrize("index, message", [
    ({"weight_map": {"a": "../c/model.safetensors"}}, "not a safetensors file of its own folder"),
    ({}, "no weight_map"), ({"weight_map": {"a": "w.bin"}}, "not a safetensors file"),
    ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors"),
    ({"weight_map": {"nothing": "part.safetensors"}}, "part.safetensors does not hold nothing")])
def test_bad_indexes_are_refused(saved, index, message):
    (saved[0] / "model.safetensors").rename(saved[0] / "part.safetensors")
    (saved[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        checkpoint.load_model(saved[0])


@pytest.mark.parametrize("right", ["a.safetensors", "b.safetensors"])
def test_the_index_says_which_of_two_equal_names_is_meant(saved, right):
    path, model, _ = saved
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        sign = 1 if name == right else -1
        save_file({key: sign * t for key, t in tensors.items()}, path / name)
    index = {"weight_map": dict.fromkeys(tensors, right)}
    index["weight_map"]["model.norm.weight"] = ({"a.safetensors", "b.safetensors"} - {right}).pop()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    again = checkpoint.load_model(path)
    assert torch.equal(again.norm.weight, -model.norm.weight)
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)


def test_pickled_weights_are_never_loaded(saved):
    (saved[0] / "model.safetensors").rename(saved[0] / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are never loaded"):
        checkpoint.load_model(saved[0])


@pytest.mark.parametrize("damage", [lambda p: cut(p, 0.5), lambda p: p.unlink(), lambda p: p.write_bytes(b""),
                                    lambda p: p.write_bytes(pickle.dumps(os.getcwd)),
                                    lambda p: torch.save({"step": 1, "exp_avg": {}, "exp_avg_sq": {}}, p),
                                    lambda p: rewrite(p, lambda t: t.pop("step")),
                                    lambda p: rewrite(p, lambda t: t.pop("exp_avg.model.norm.weight"))])
def test_damaged_or_dangerous_optimizer_files_are_named(saved, damage):
    path, model, optimizer = saved
    damage(path / "optimizer.moments")
    with pytest.raises(ConfigError, match="optimizer.moments|/c: tensor (step|exp_avg.*) is missing"):
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
    beside = checkpoint.companions(tmp_path / "data")
    checkpoint.save(tmp_path / "c", random_model(**DENSE), {}, beside=beside)
    assert (tmp_path / "c" / "tokenizer.json").exists()
    assert isinstance(checkpoint.load_model(tmp_path / "c"), Transformer)


def test_another_tools_trainer_state_is_no_state(saved):
    (saved[0] / "trainer_state.json").write_text('{"epoch": 1.0, "global_step": 500, "log_history": []}')
    assert checkpoint.read_state(saved[0]) == {}


# ---------------------------------------------------------------------------------------------------------
# Architectures

@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_an_unknown_parameter_is_refused_by_name(tmp_path, kind):
    model = random_model(**MOE)
    w2 = model.layers[1].mlp.down_proj.detach().clone()
    if kind == "parameter":
        model.layers[1].mlp.extra = torch.nn.Parameter(torch.zeros_like(w2))
    else:
        model.layers[1].mlp.register_buffer("extra", torch.zeros_like(w2))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.extra"):
        checkpoint.save(tmp_path / "c", model, STATE)
    assert os.listdir(tmp_path) == []


def test_the_tensors_of_a_model_are_those_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM
    for base in (DENSE, MOE):
        path = tmp_path / str(len(base))
        checkpoint.save(path, random_model(**base), {})
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(path / "again")
        ours, again = (load_file(p / "model.safetensors") for p in (path, path / "again"))
        assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("model_type", [name for name in checkpoint.FORMATS if "router_bias" not in name])
def test_missing_keys_mean_what_transformers_takes_for_them(model_type):
    from transformers import AutoConfig
    d = {"model_type": model_type, "vocab_size": 101, "hidden_size": 128, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 32}
    hf_config = AutoConfig.for_model(**d)
    if model_type == "mistral":
        assert hf_config.sliding_window == 4096  # which is refused
        d["sliding_window"] = None
    if "norm_topk_prob" in checkpoint.FORMATS[model_type]["only"]:
        assert not hf_config.norm_topk_prob  # which is refused
        d["norm_topk_prob"] = True
    if model_type == "qwen2_moe":
        assert hf_config.shared_expert_intermediate_size == 5632  # which is refused
        d["shared_expert_intermediate_size"] = 64
    c = checkpoint.from_hf_config(d)
    for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                "initializer_range", "eos_token_id"):
        assert getattr(c, key) == getattr(hf_config, key), key
    assert c.rope_theta == hf_config.rope_parameters["rope_theta"]
    assert c.head_dim == (getattr(hf_config, "head_dim", None) or 128 // 32)
    if c.num_local_experts:
        assert c.intermediate_size == getattr(hf_config, "moe_intermediate_size", 48)
        key = "num_experts" if hasattr(hf_config, "num_experts") else "num_local_experts"
        assert c.num_local_experts == getattr(hf_config, key)
        assert c.num_experts_per_tok == hf_config.num_experts_per_tok
        assert c.router_aux_loss_coef == hf_config.router_aux_loss_coef * hf_config.num_experts_per_tok


@pytest.mark.parametrize("k, family", [(1, "mixtral"), (3, "mixtral"), (4, "mixtral"),
                                       *((2, family) for family in MIXTURES)])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_balance_loss_has_its_strength_in_transformers(tmp_path, k, family, layers):
    """Pooled over layers, both train on the same loss, and unpooled as well where there is one layer."""
    from transformers import AutoModelForCausalLM
    model = random_model(**MOE | {"num_hidden_layers": layers, "num_experts_per_tok": k},
                         router_aux_loss_coef=0.7, **MIXTURES[family]["sets"])
    checkpoint.save(tmp_path / "ours", model, {})
    ids = torch.randint(0, 101, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(ids, labels=ids)
        losses, router = model(ids, ids.roll(-1, 1), reduction="none")
        loss = losses[:, :-1].mean()  # as in transformers, the last token has no successor
        balance = balance_loss(router["counts"], router["probs"], pooled=layers > 1)
    assert abs(balance - 1) > 1e-3 or k == 4  # with all experts chosen it is 1 whatever the router does
    torch.testing.assert_close(output.loss, loss + 0.7 * balance, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7])
def test_the_balance_coefficient_comes_back(k, tmp_path):
    from transformers import AutoConfig
    for coefficient in (0.0, 0.01, 0.001, 0.07, 0.3, 1 / 3, 12345.678, 1e-9):
        c = ModelConfig(**MOE | {"num_local_experts": 8, "num_experts_per_tok": k},
                        router_aux_loss_coef=coefficient)
        d = checkpoint.to_hf_config(c)
        assert d["router_aux_loss_coef"] == pytest.approx(coefficient / k, rel=1e-15)
        AutoConfig.for_model(**d).save_pretrained(tmp_path)
        again = checkpoint.read_config(tmp_path)
        assert again.router_aux_loss_coef == float(f"{coefficient:.15g}")
        assert checkpoint.from_hf_config(checkpoint.to_hf_config(again)) == again


# ---------------------------------------------------------------------------------------------------------
# Tokens seen

def test_tokens_of_a_run_count_once():
    def state(*history):
        return {"tokens": history[-1][1], "lineage": {}, "history": [list(run) for run in history]}
    trunk, branch = ("trunk", 700), ("branch", 50)
    assert checkpoint.tokens_seen(state(trunk)) == 700
    assert checkpoint.tokens_seen(state(trunk, branch)) == 750
    assert checkpoint.tokens_seen(state(trunk, branch), state(trunk, branch)) == 750
    assert checkpoint.tokens_seen(state(trunk, branch), state(("trunk", 900), ("other", 20))) == 970
    assert checkpoint.tokens_seen(state(trunk), state(("stranger", 30))) == 730
    assert checkpoint.tokens_seen({"tokens": 0, "lineage": {}, "history": []}) == 0
    unknown = state(trunk) | {"lineage": {"D1": None}}
    assert checkpoint.tokens_known(state(trunk), state(branch)) == 750
    assert checkpoint.tokens_known({}) is checkpoint.tokens_known(state(trunk), unknown) is None
