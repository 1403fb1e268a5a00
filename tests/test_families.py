"""Every architecture that is read: transformers builds it, and judges what is made of it."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import checkpoint
import upcycle as u
from configurator import ConfigError
from formats import FORMATS, MIXTURES, NO_MIXTURE
from model import ModelConfig, Transformer, parameter_counts
from test_upcycle import METHODS, difference, tokens
from train import Train, train

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# {model_type: (further keys, the class of the result, the class that our trainer saves)}
FAMILIES = {
    "llama": ({}, "Mixtral", "Llama"),
    "mistral": ({"sliding_window": 40, "head_dim": 16}, "Mixtral", "Mistral"),
    "phi3": ({"sliding_window": 40}, "Mixtral", "Mistral"),
    "qwen2": ({}, "Qwen2Moe", "Qwen2"),
    "qwen3": ({"head_dim": 16}, "Qwen3Moe", "Qwen3"),
    "olmo2": ({}, "FlexOlmo", "Olmo2")}


def build(path, model_type, dtype=torch.float32, **changes):
    """A model of transformers whose norms, biases and weights are all random, saved in shards."""
    torch.manual_seed(len(model_type))
    c = AutoConfig.for_model(model_type, **SHAPE | FAMILIES[model_type][0] | changes)
    model = AutoModelForCausalLM.from_config(c)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.to(dtype).save_pretrained(path, max_shard_size="20KB")
    return model.eval()


def opened(path, dtype=torch.float32):
    """The model that transformers makes of a directory, with every tensor in its place."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def upcycled(source, path, **options):
    return u.upcycle(u.Options(str(source), str(path), **{"check": False, **options}))


def logits(model, ids):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


KINDS = [(False, torch.float32), (True, torch.bfloat16)]
ALL_KINDS = [*KINDS, (True, torch.float32), (False, torch.bfloat16)]


@pytest.fixture(scope="module", params=[(family, *kind) for family in FAMILIES for kind in
                                        (ALL_KINDS if family in ("qwen2", "qwen3") else KINDS)],
                ids=lambda p: f"{p[0]}{'-tied' * p[1]}-{str(p[2])[6:]}")
def source(request, tmp_path_factory):
    """(family, directory, logits of transformers in fp32)"""
    family, tied, dtype = request.param
    path = tmp_path_factory.mktemp(family) / "dense"
    build(path, family, dtype, tie_word_embeddings=tied)
    return family, path, logits(opened(path), tokens())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_opens_in_transformers_and_here(source, tmp_path, method):
    family, dense, expected = source
    further = {"merge": {"merge_with": [str(dense)]}}.get(method, {})
    record = upcycled(dense, tmp_path / "moe", method=method, shard_size=60_000, check=True, check_tokens=64,
                      **METHODS[method] | further)
    assert (tmp_path / "moe" / "model.safetensors.index.json").exists()
    moe = opened(tmp_path / "moe")
    assert type(moe).__name__ == FAMILIES[family][1] + "ForCausalLM"
    found = logits(moe, tokens())
    assert difference(found, logits(checkpoint.load_model(tmp_path / "moe"), tokens())) < 1e-5
    exact = method in ("copy", "virtual_groups", "merge")  # a model merged with itself
    assert exact == (difference(expected, found) < 1e-5)
    assert exact == (record["measured"]["relative_logit_difference"] < 1e-5)


def test_both_train_on_as_in_transformers_and_come_back(source, tmp_path):
    """The loss and its gradients are those of transformers. What is saved after a step opens there, and
    opens here with the same weights."""
    family, dense, expected = source
    assert difference(expected, logits(checkpoint.load_model(dense), tokens())) < 1e-5
    upcycled(dense, tmp_path / "moe", method="noise", noise_std=0.5)
    ids = tokens(2, 33, seed=1)
    for path, classes in ((dense, FAMILIES[family][2]), (tmp_path / "moe", FAMILIES[family][1])):
        ours, judge = checkpoint.load_model(path), opened(path)
        loss, _ = ours(ids[:, :-1], ids[:, 1:])
        loss.backward()
        expected_loss = F.cross_entropy(judge(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        expected_loss.backward()
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        judged = {name: p.grad for name, p in judge.named_parameters()}
        model_type = json.loads((path / "config.json").read_text())["model_type"]
        for name, p in ours.named_parameters():
            for hf_name, grad in checkpoint.hf_views(name, p.grad, ours.config, model_type):
                hf_name = hf_name.replace("block_sparse_moe", "mlp")
                if ".experts." not in hf_name:  # which transformers stacks
                    scale = judged[hf_name].abs().max().item()
                    torch.testing.assert_close(grad, judged[hf_name], rtol=1e-4, atol=1e-4 * scale)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
        optimizer.step()
        saved = tmp_path / f"trained-{path.name}"
        checkpoint.save(saved, ours, {}, optimizer)
        again = checkpoint.load_model(saved)
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))
        judge = opened(saved)
        assert type(judge).__name__ == classes + "ForCausalLM"
        assert difference(logits(judge, ids), logits(ours, ids)) < 1e-5
        checkpoint.load_moments(saved, again, torch.optim.AdamW(again.parameters()))
    # Moments of the dense model go to the experts and to whatever is copied.
    upcycled(tmp_path / "trained-dense", tmp_path / "with_moments", optimizer="copy", num_local_experts=3)
    again = checkpoint.load_model(tmp_path / "with_moments")
    optimizer = torch.optim.AdamW(again.parameters())
    checkpoint.load_moments(tmp_path / "with_moments", again, optimizer)
    dense = checkpoint.load_model(tmp_path / "trained-dense")
    dense_optimizer = torch.optim.AdamW(dense.parameters())
    checkpoint.load_moments(tmp_path / "trained-dense", dense, dense_optimizer)
    there = dict(dense.named_parameters())
    for name, p in again.named_parameters():
        moment = optimizer.state[p]["exp_avg_sq"]
        if name in there:
            assert torch.equal(moment, dense_optimizer.state[there[name]]["exp_avg_sq"]) and moment.any()
        elif name.endswith("gate.weight"):
            assert not moment.any()
        else:
            assert all(torch.equal(m, dense_optimizer.state[there[name + ".weight"]]["exp_avg_sq"])
                       for m in moment)


def test_in_bfloat16_the_error_is_that_of_transformers(source, tmp_path):
    """Both round to 8 bits. A token near a tie may choose another expert, hence the median over tokens."""
    _, dense, _ = source
    upcycled(dense, tmp_path / "moe", method="noise", noise_std=0.5)
    for path in (dense, tmp_path / "moe"):
        exact = logits(opened(path), tokens())
        ours, judge = ((logits(model, tokens()).float() - exact).abs().amax(-1).median() for model in
                       (checkpoint.load_model(path, torch.bfloat16), opened(path, torch.bfloat16)))
        assert ours < 1.5 * judge < 0.05 * exact.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_generates_the_same_text(tmp_path, family):
    window = {"sliding_window": 12} if family in ("mistral", "phi3") else {}
    dense = build(tmp_path / "dense", family, **window)
    upcycled(tmp_path / "dense", tmp_path / "moe")
    ids = tokens(3, 6)
    with torch.no_grad():
        texts = [model.generate(ids, max_new_tokens=24, do_sample=False)
                 for model in (dense, opened(tmp_path / "moe"))]
    assert texts[0].shape == (3, 30) and torch.equal(*texts)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_sliding_window_is_kept(tmp_path, family):
    """Transformers sees through the window in source and result. Here sequences up to the window are exact,
    and longer ones are refused."""
    dense = build(tmp_path / "dense", family, sliding_window=24)
    record = upcycled(tmp_path / "dense", tmp_path / "moe", check=True)
    moe, ids = opened(tmp_path / "moe"), tokens(2, 40)
    assert moe.config.sliding_window == 24 and moe.config.max_position_embeddings == 64
    assert difference(logits(dense, ids), logits(moe, ids)) < 1e-5
    moe.config.sliding_window = None
    assert difference(logits(dense, ids)[:, 24:], logits(moe, ids)[:, 24:]) > 1e-3
    assert record["measured"]["tokens"] % 24 == 0
    for name in ("dense", "moe"):
        ours = checkpoint.load_model(tmp_path / name)
        assert difference(logits(dense, ids[:, :24]), logits(ours, ids[:, :24])) < 1e-5
        with pytest.raises(ValueError, match="25 tokens exceed .* the window 24"):
            ours(ids[:, :25])


def test_a_phi3_merges_with_the_llama_that_it_is(tmp_path):
    """Saved as a Llama, Phi-3 has q, k, v, gate and up apart. Experts and the mean are the same."""
    build(tmp_path / "phi3", "phi3", sliding_window=None)
    checkpoint.save(tmp_path / "llama", checkpoint.load_model(tmp_path / "phi3"), {})
    upcycled(tmp_path / "phi3", tmp_path / "merged", method="merge", merge_with=[str(tmp_path / "llama")])
    upcycled(tmp_path / "llama", tmp_path / "copied")
    merged, copied = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "copied"))
    assert merged.keys() == copied.keys()
    assert all(torch.equal(merged[name], copied[name]) for name in merged)


@pytest.mark.parametrize("style", ["transformers 5", "as published"])
def test_phi3_with_longrope_is_passed_through(tmp_path, style):
    """Its factors change where sequences outgrow those of the first training. Our model has no such RoPE."""
    rope = {"rope_type": "longrope", "rope_theta": 5e3, "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [2.0, 3.0, 5.0, 9.0], "original_max_position_embeddings": 32}
    build(tmp_path / "dense", "phi3", sliding_window=None, rope_parameters=rope,
          original_max_position_embeddings=32)
    if style == "as published":
        file = tmp_path / "dense" / "config.json"
        d = json.loads(file.read_text())
        del d["rope_parameters"]
        scaling = {"type": "longrope", **{key: rope[key] for key in ("short_factor", "long_factor")}}
        file.write_text(json.dumps(d | {"rope_theta": 5e3, "rope_scaling": scaling}))
    record = upcycled(tmp_path / "dense", tmp_path / "moe", check=True)
    assert "longrope" in record["measured"]["not_run"]
    dense, moe = opened(tmp_path / "dense"), opened(tmp_path / "moe")
    for length in (24, 48):
        assert difference(logits(dense, tokens(2, length)), logits(moe, tokens(2, length))) < 1e-5
    # the factors do something, and other ones do from 33 tokens on
    assert difference(logits(dense, tokens(2, 48))[:, :24], logits(dense, tokens(2, 48)[:, :24])) > 1e-3


# config.json as the models are published with it, but for the sizes and ids.
COMMON = {"hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 64,
          "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
          "num_key_value_heads": 2, "torch_dtype": "float32", "use_cache": True, "vocab_size": 61}
DROPOUT = {"attention_bias": False, "attention_dropout": 0.0}
QWEN = {"bos_token_id": 7, "max_window_layers": 2, "use_sliding_window": False}
PUBLISHED = {
    "llama": DROPOUT | {  # 3.2
        "bos_token_id": 7, "eos_token_id": [8, 9], "head_dim": 8, "mlp_bias": False, "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True, "rope_scaling": {
            "factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32, "rope_type": "llama3"}},
    "mistral": {  # 0.1
        "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 40,
        "tie_word_embeddings": False},
    "phi3": DROPOUT | {  # 3 mini
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
                     "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 8, "original_max_position_embeddings": 64,
        "pad_token_id": 9, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1e4,
        "sliding_window": 40, "tie_word_embeddings": False},
    "qwen2": QWEN | {  # 2.5
        "attention_dropout": 0.0, "eos_token_id": 7, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "sliding_window": 64, "tie_word_embeddings": True, "use_mrope": False},
    "qwen3": QWEN | DROPOUT | {
        "eos_token_id": 8, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True},
    "olmo2": DROPOUT | {
        "eos_token_id": 8, "pad_token_id": 9, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False}}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_published_is_upcycled_and_trained_and_keeps_its_ids(tmp_path, family):
    """After two steps of train.py the validation loss is what transformers makes of the checkpoint."""
    given = COMMON | PUBLISHED[family]
    usual = dict.fromkeys(FAMILIES[family][0])
    dense, random = build(tmp_path / "dense", family, **usual | given), np.random.default_rng(0)
    config = {"architectures": [type(dense).__name__], "model_type": family, **given}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    assert difference(logits(dense, tokens()), logits(opened(tmp_path / "dense"), tokens())) < 1e-6
    upcycled(tmp_path / "dense", tmp_path / "moe", D1=5000)
    assert difference(logits(dense, tokens()), logits(opened(tmp_path / "moe"), tokens())) < 1e-5
    (tmp_path / "data").mkdir()
    ids = {part: random.integers(0, 61, 3000).astype(np.uint8) for part in ("train", "val")}
    for part, values in ids.items():
        np.save(tmp_path / "data" / f"{part}.npy", values)
    (tmp_path / "data" / "meta.json").write_text(json.dumps({
        "vocab_size": 61, "eos_token_id": None, "dtype": "uint8", "tokenizer": "none",
        "data_sha256": "0" * 64, "tokens": {part: len(values) for part, values in ids.items()}}))
    for start, classes, expected in (("dense", FAMILIES[family][2], {"family": "dense", "D": 5256}),
                                     ("moe", FAMILIES[family][1], {"D1": 5000, "D2": 256})):
        c = Train(dataset=str(tmp_path / "data"), init_from=str(tmp_path / start), max_seq_len=32,
                  tokens_per_step=128, max_tokens=256, warmup_steps=1, eval_tokens=1024, learning_rate=1e-2,
                  out_dir=str(tmp_path / f"run-{start}"), rows=str(tmp_path / "rows.jsonl"),
                  D1=5000 if start == "dense" else None)
        row = train(c, report=lambda n: None)
        assert expected.items() <= row.items()
        path = tmp_path / f"run-{start}" / "checkpoint-2"
        judge, x = opened(path), torch.from_numpy(ids["val"][:1025].astype(np.int64))
        assert type(judge).__name__ == classes + "ForCausalLM"
        loss = F.cross_entropy(logits(judge, x[:-1].view(32, 32)).flatten(0, 1), x[1:])
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert difference(logits(judge, tokens()), logits(dense, tokens())) > 1e-3
        saved = json.loads((path / "config.json").read_text())
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert saved[key] == given.get(key) == getattr(judge.config, key), key


# ---------------------------------------------------------------------------------------------------------
# What is refused

@pytest.mark.parametrize("model_type", NO_MIXTURE)
def test_models_without_a_mixture_are_refused_with_the_reason(tmp_path, model_type):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError) as error:
        upcycled(tmp_path / "dense", tmp_path / "moe")
    assert f"the same as a {model_type} is known: {NO_MIXTURE[model_type]}" in str(error.value)


@pytest.mark.parametrize("family, change, message", [
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen3", {"attention_bias": True}, "attention_bias = True"),
    ("olmo2", {"attention_bias": True}, "attention_bias = True"),
    ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.75}}, "partial_rotary_factor = 0.75"),
    ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "su"}}, "rope_type 'su'"),
    ("phi3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
    ("llama", {"sliding_window": 32}, "sliding_window = 32")])
def test_what_the_mixture_cannot_do_is_refused_by_its_key(tmp_path, family, change, message):
    build(tmp_path / "dense", family)
    file = tmp_path / "dense" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        upcycled(tmp_path / "dense", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("family, change, message", [
    ("qwen3", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("olmo2", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("qwen3", {"mlp_only_layers": [0]}, "mlp_only_layers"), ("qwen3", {"decoder_sparse_step": 2}, "sparse"),
    ("qwen2", {"qkv_bias": False}, "qkv_bias"),
    ("qwen2", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8")])
def test_mixtures_that_route_otherwise_are_refused(tmp_path, family, change, message):
    build(tmp_path / "dense", family)
    upcycled(tmp_path / "dense", tmp_path / "moe")
    file = tmp_path / "moe" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        checkpoint.load_model(tmp_path / "moe")


def test_a_shared_expert_that_computes_something_is_refused(tmp_path):
    build(tmp_path / "dense", "qwen2")
    upcycled(tmp_path / "dense", tmp_path / "moe")
    file, name = tmp_path / "moe" / "model.safetensors", "model.layers.1.mlp.shared_expert.down_proj.weight"
    tensors = {key: t.clone() for key, t in load_file(file).items()}
    tensors[name][3, 5] = 1
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=f"{name} is not zero"):
        checkpoint.load_model(tmp_path / "moe")


def test_the_shared_expert_of_nothing_stays_nothing_in_transformers(tmp_path):
    build(tmp_path / "dense", "qwen2")
    upcycled(tmp_path / "dense", tmp_path / "moe")
    model = opened(tmp_path / "moe").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    assert difference(logits(model.eval(), tokens()),
                      logits(checkpoint.load_model(tmp_path / "trained"), tokens())) < 1e-5


# ---------------------------------------------------------------------------------------------------------
# Data

OURS = {key: value for key, value in SHAPE.items() if value is not None}
FEATURES = {model_type: entry["sets"] for model_type, entry in MIXTURES.items()}


@pytest.mark.parametrize("model_type", MIXTURES)
def test_parameters_are_counted_as_in_transformers(tmp_path, model_type):
    c = ModelConfig(**OURS, num_local_experts=4, **FEATURES[model_type])
    n = parameter_counts(c)
    checkpoint.save(tmp_path / "m", Transformer(c).init_weights(0), {})
    model = opened(tmp_path / "m")
    idle = sum(p.numel() for name, p in model.named_parameters() if "shared_expert" in name)
    assert model.num_parameters() - idle == n["total"] and (idle > 0) == (model_type == "qwen2_moe")
    vectors = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 1)
    assert n["norms"] == vectors
    assert all(p.eq(0 if name.endswith("bias") else 1).all()
               for name, p in model.named_parameters() if p.dim() == 1)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_router_bias_is_never_saved_under_a_name_of_transformers(tmp_path, model_type):
    c = ModelConfig(**OURS, num_local_experts=4, router_bias=True,
                    **FEATURES[model_type])
    model = Transformer(c).init_weights(0)
    model.layers[1].mlp.bias[2] = 0.5
    checkpoint.save(tmp_path / "m", model, {})
    with pytest.raises(ValueError, match=f"{model_type}_with_router_bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(checkpoint.load_model(tmp_path / "m"), tokens()), logits(model, tokens()))


def test_features_of_no_architecture_are_not_saved(tmp_path):
    c = ModelConfig(**OURS, qk_norm="head", attention_bias=True)
    with pytest.raises(ConfigError, match="no architecture of FORMATS has"):
        checkpoint.save(tmp_path / "m", Transformer(c), {})
    assert not list(Path(tmp_path).iterdir())


def test_every_class_is_one_of_transformers():
    import transformers
    for model_type, entry in FORMATS.items():
        assert model_type.endswith("_with_router_bias") or hasattr(transformers, entry["architecture"])
