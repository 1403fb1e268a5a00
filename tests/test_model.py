"""The model against transformers, naive loops and independent counts."""
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
from configurator import ConfigError
from model import (ModelConfig, MoE, Transformer, balance_loss, effective_experts, flops_per_token,
                   grouped_mm, grouped_op, loop_mm, parameter_counts)
from parallel import compiled

DENSE = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}
MOE = DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


def random_model(seed=0, **config):
    model = Transformer(ModelConfig(**config)).init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():  # far from init: norms are not 1, routers decide
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel())))
    return model


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


HEADS = [(kv_heads, tied, None) for kv_heads in (4, 2, 1) for tied in (True, False)]
HEADS += [(2, False, LLAMA3), (2, False, {"rope_type": "linear", "factor": 2.0})]


@pytest.mark.parametrize("kv_heads, tied, rope_scaling", HEADS)
@pytest.mark.parametrize("base", [DENSE, MOE], ids=["llama", "mixtral"])
def test_logits_equal_transformers_both_ways(base, kv_heads, tied, rope_scaling, tmp_path):
    from transformers import AutoModelForCausalLM
    model = random_model(**base, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
                         rope_scaling=rope_scaling, rope_theta=5000.0)
    checkpoint.save(tmp_path / "ours", model, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    name = "MixtralForCausalLM" if "num_local_experts" in base else "LlamaForCausalLM"
    assert type(theirs).__name__ == name
    ids = torch.randint(0, 101, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert relative_error(model(ids), expected) < 1e-5
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")  # several shards and an index
        assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
        assert relative_error(checkpoint.load_model(tmp_path / "theirs")(ids), expected) < 1e-5


def test_bfloat16_logits_near_transformers(tmp_path):
    from transformers import AutoModelForCausalLM
    model = random_model(**MOE).to(torch.bfloat16)
    checkpoint.save(tmp_path / "ours", model, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    assert theirs.dtype == torch.bfloat16
    ids = torch.randint(0, 101, (2, 60), generator=torch.Generator().manual_seed(1))
    # eight bits a number; a token near a tie may choose another expert, hence the median over tokens
    with torch.no_grad():
        a, b = model(ids).float().flatten(0, 1), theirs(ids).logits.float().flatten(0, 1)
    assert ((a - b).norm(dim=1) / b.norm(dim=1)).median() < 0.03


@pytest.mark.parametrize("counts", [[5, 0, 7, 4], [0, 0, 16, 0], [16, 0, 0, 0], [1, 3, 5, 7]])
@pytest.mark.parametrize("multiply", [grouped_mm, grouped_op, loop_mm])
def test_grouped_products_equal_separate_ones_with_gradients(multiply, counts):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=g).requires_grad_() for s in ((16, 8), (4, 8, 12))]
    out = multiply(*leaves, torch.tensor(counts).cumsum(0).to(torch.int32))
    pieces = [rows @ weight for rows, weight in zip(leaves[0].split(counts), leaves[1])]
    torch.testing.assert_close(out, torch.cat(pieces), rtol=1e-5, atol=1e-6)
    direction = torch.randn(out.shape, generator=g)
    expected = torch.autograd.grad(torch.cat(pieces), leaves, direction)
    for ours, separate in zip(torch.autograd.grad(out, leaves, direction), expected):
        torch.testing.assert_close(ours, separate, rtol=1e-5, atol=1e-6)


def naive_moe(layer, x):
    """Token by token, expert by expert, with autograd."""
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        probs = (layer.gate.weight @ token).softmax(-1)
        chosen = (probs + (layer.bias if hasattr(layer, "bias") else 0)).argsort(descending=True)[:layer.k]
        y = 0
        for e in chosen:
            gate, up = (layer.gate_up_proj[e] @ token).chunk(2)
            y = y + probs[e] / probs[chosen].sum() * (layer.down_proj[e] @ (F.silu(gate) * up))
        out.append(y)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("dtype, tolerance, narrow", [
    (torch.float32, 1e-5, False), (torch.float64, 1e-12, False),
    (torch.float32, 0.02, True)])  # products in bf16, eight bits a number, with rows that fill up
@pytest.mark.parametrize("k, bias", [(1, False), (2, False), (2, True), (4, False)])
def test_moe_layer_equals_naive_loop_with_gradients(k, bias, dtype, tolerance, narrow):
    layer = MoE(ModelConfig(**MOE | {"num_experts_per_tok": k}, router_bias=bias)).to(dtype)
    g = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g, dtype=dtype))
        layer.gate.weight[3] -= 50 * (k < 4)  # an expert that few or no tokens choose
        if bias:
            layer.bias.copy_(torch.tensor([0.0, 0.5, 0.0, 0.0]))
    x = torch.randn(2, 9, 32, generator=g, dtype=dtype).abs()
    grads = []
    for f, low in (lambda x: layer(x)[0], narrow), (lambda x: naive_moe(layer, x), False):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = f(leaf)
        out.square().sum().backward()
        grads.append([out.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    scale = max(g.abs().max().item() for g in grads[1])  # with k = 1 the router's gradient is rounding alone
    for ours, naive in zip(*grads):
        torch.testing.assert_close(ours, naive, rtol=tolerance, atol=tolerance * scale)
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        counts = layer(x)[1][0]
    assert torch.equal(counts, F.one_hot(layer.route(x.view(18, 32))[1], 4).sum((0, 1)).float())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("base", [DENSE, MOE | {"num_key_value_heads": 2}, MOE | {"num_experts_per_tok": 1}])
def test_counts_equal_transformers_and_flop_counter(base, tied, tmp_path):
    from transformers import AutoModelForCausalLM
    c = ModelConfig(**base, tie_word_embeddings=tied)
    n, model = parameter_counts(c), random_model(**base, tie_word_embeddings=tied)
    checkpoint.save(tmp_path / "m", model, {})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.num_parameters() == n["total"]
    assert theirs.num_parameters(exclude_embeddings=True) == n["N_total"] + n["lm_head"]
    if not c.num_local_experts:
        assert n["N"] == n["N_active"] == n["N_total"] == n["total"] - n["embedding"] - n["lm_head"]
    else:
        experts = sum(p.numel() for name, p in theirs.named_parameters() if "experts" in name)
        one = experts // c.num_local_experts
        assert n["N_total"] - n["N_active"] == (c.num_local_experts - c.num_experts_per_tok) * one
        kv_heads = {key: base[key] for key in ("num_key_value_heads",) if key in base}
        dense = ModelConfig(**DENSE | kv_heads, tie_word_embeddings=tied)
        assert n["N"] == parameter_counts(dense)["N"]
    ids = torch.randint(0, 101, (3, 33))
    model.double()  # the experts' loop, and attention as plain products: kernels that the counter knows
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
    assert counter.get_total_flops() == flops_per_token(c, 32) * 3 * 32


def test_balance_loss_is_one_when_balanced_and_counts_layers_apart():
    for E, k in ((4, 1), (8, 2), (16, 4)):
        even = torch.full((3, E), 1 / E)
        assert balance_loss(even * 640 * k, even).item() == pytest.approx(1.0, abs=1e-6)
    # two layers, each collapsed onto its half of the experts: balanced when pooled, twice as bad a layer
    counts = torch.tensor([[8.0, 8, 0, 0], [0, 0, 8, 8]])
    assert balance_loss(counts, counts / 16).item() == pytest.approx(2.0)
    assert effective_experts(counts).tolist() == pytest.approx([2.0, 2.0])


def test_balance_and_z_losses_equal_their_formulas():
    model = random_model(**MOE).double()
    ids = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(3))
    inputs = []
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda m, args, out: inputs.append((m, args[0].detach())))
    _, router = model(ids[:, :-1], ids[:, 1:])
    balance, z = 0.0, 0.0
    for m, x in inputs:
        logits = x.reshape(-1, 32) @ m.gate.weight.T
        f = torch.zeros(4, dtype=torch.float64)
        for row in logits:
            f[row.topk(2).indices] += 1 / (2 * len(logits))
        balance += 4 * (f * logits.softmax(-1).mean(0)).sum() / 2
        z += logits.exp().sum(-1).log().square().mean() / 2
    assert balance_loss(router["counts"], router["probs"]).item() == pytest.approx(balance.item(), rel=1e-6)
    assert router["z_loss"].item() == pytest.approx(z.item(), rel=1e-12)


def test_loss_is_the_cross_entropy_of_the_logits_alone():
    model = random_model(**MOE)
    ids = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(3))
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:])[0], expected)


def test_losses_of_tokens_and_gradients_of_the_head_equal_those_of_all_logits():
    model = random_model(**DENSE | {"max_position_embeddings": 512, "vocab_size": 1031})  # 256 tokens a chunk
    ids = torch.randint(0, 1031, (3, 301), generator=torch.Generator().manual_seed(3))
    logits = model(ids[:, :-1])
    expected = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:], reduction="none")[0], expected)
    parameters = list(model.parameters())
    naive = torch.autograd.grad(3 * expected.mean(), parameters)
    ours = torch.autograd.grad(3 * model(ids[:, :-1], ids[:, 1:])[0], parameters)
    for a, b in zip(ours, naive):  # sums of 900 terms in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_and_its_gradients_equal_torchs(dtype):
    g = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(3, 5, 32, generator=g, dtype=dtype) + 1 for _ in range(2))
    norm = random_model(**DENSE).norm.to(dtype)
    leaves = [x.requires_grad_(), norm.weight]
    outs = norm(x), F.rms_norm(x, (32,), norm.weight, norm.eps)
    torch.testing.assert_close(*outs)
    for a, b in zip(*(torch.autograd.grad(out, leaves, direction) for out in outs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width", [44, 36])
def test_bfloat16_experts_of_any_width(width):
    """bf16 rows of 44 numbers are 88 bytes, which grouped_mm refuses."""
    model = random_model(**MOE | {"hidden_size": width, "intermediate_size": 36, "num_attention_heads": 2})
    ids = torch.randint(0, 101, (2, 33), generator=torch.Generator().manual_seed(3))
    exact, _ = model(ids[:, :-1], ids[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.03 * exact.item()  # eight bits a number
    assert all(p.grad.isfinite().all() for p in model.parameters())


def traced(model):
    """Compiled, but with no code generated, which takes long."""
    return torch.compile(model, backend="aot_eager", dynamic=False)


@pytest.mark.parametrize("how, layers, features, tolerance", [
    (compiled, 1, {}, 1e-5), (compiled, 9, {}, 1e-5),  # whole, and by layer
    (compiled, 1, {"hidden_size": 64, "intermediate_size": 64}, 0.02),  # in bf16, in whole vectors
    (traced, 1, {"qk_norm": "head", "attention_bias": True}, 1e-5),
    (traced, 1, {"qk_norm": "vector", "norm_after": True}, 1e-5)])
def test_compiled_models_give_the_same_losses_and_gradients(how, layers, features, tolerance):
    ids = torch.randint(0, 101, (2, 33), generator=torch.Generator().manual_seed(3))
    results = []
    for prepare in (lambda model: model, how):
        model = random_model(**MOE | {"num_hidden_layers": layers, "num_key_value_heads": 2} | features)
        names = list(model.state_dict())
        forward = prepare(model)
        assert list(model.state_dict()) == names
        with torch.autocast("cpu", torch.bfloat16, enabled=tolerance > 0.01):
            loss, _ = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for eager, fast in zip(*results):
        atol = tolerance * eager.abs().max().item()
        torch.testing.assert_close(fast, eager, rtol=10 * tolerance, atol=atol)


def test_init_depends_on_seed_alone_and_has_its_stds():
    c = ModelConfig(**MOE | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8})
    torch.manual_seed(1)
    a = Transformer(c).init_weights(5).state_dict()
    torch.manual_seed(2)
    b = Transformer(c).init_weights(5).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    # 65k draws: a standard error of 0.3 %
    assert a["layers.0.mlp.down_proj"].std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert a["layers.0.mlp.gate_up_proj"].std().item() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(a["norm.weight"], torch.ones(64))


@pytest.mark.parametrize("change, key", [
    ({"num_attention_heads": 3}, "hidden_size"), ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"hidden_size": 12}, "head_dim"), ({"vocab_size": 0}, "vocab_size"),
    ({"hidden_size": 32.5}, "hidden_size"),
    ({"num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok")])
def test_impossible_sizes_are_refused_by_name(change, key):
    with pytest.raises(ValueError, match=key):
        ModelConfig(**DENSE | change)


@pytest.mark.parametrize("change, key", [
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"model_type": "gpt2"}, "gpt2"),
    ({"sliding_window": 4096}, "sliding_window"), ({"model_type": "mistral", "sliding_window": 0}, "window"),
    ({"vocab_size": None}, "vocab_size")])
def test_foreign_architectures_are_refused_by_name(change, key):
    good = checkpoint.to_hf_config(ModelConfig(**DENSE))
    assert checkpoint.from_hf_config(good) == ModelConfig(**DENSE)
    with pytest.raises(ConfigError, match=key):
        checkpoint.from_hf_config(good | change)


def test_unknown_rope_scaling_and_too_long_sequences_are_refused():
    with pytest.raises(ValueError, match="yarn"):
        Transformer(ModelConfig(**DENSE, rope_scaling={"rope_type": "yarn", "factor": 2.0}))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        random_model(**DENSE)(torch.zeros(1, 65, dtype=torch.int64))
