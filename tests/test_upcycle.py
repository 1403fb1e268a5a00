"""upcycle.py is held against theory (in fp64, through files) and transformers, and meets sources that lie."""
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM)

import rows
import tensors
import upcycle as u
from checkpoint import KEYS, load_model, load_moments, save
from configurator import ConfigError, run
from methods import Method, clusters, generator
from model import ModelConfig, Transformer, parameter_counts

ROOT = Path(__file__).resolve().parent.parent
V, FF = 61, 64  # vocabulary, intermediate_size
METHODS = {"copy": {}, "noise": {"noise_std": 0.1}, "drop": {}, "drop_per_matrix": {},
           "virtual_groups": {"granularity": 4, "num_local_experts": 16, "num_experts_per_tok": 8},
           "merge": {}}


def config(**changes):
    return ModelConfig(**{**dict(vocab_size=V, hidden_size=32, intermediate_size=FF, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                 initializer_range=0.2), **changes})


def load(file):
    # no memory map of a file that a test overwrites
    return {name: t.clone() for name, t in load_file(file).items()}


def tokens(rows=4, length=32, seed=0):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def write(path, dtype=torch.float64, seed=0, state=None, **changes):
    model = Transformer(config(**changes)).init_weights(seed).to(dtype)
    save(path, model, state or {"step": 5, "tokens": 1000, "sequence": 31, "dataset": "none",
                                "history": [["dense", 1000]], "lineage": {"family": "dense"}})
    return str(path)


@pytest.fixture(scope="module")
def random_dense(tmp_path_factory):
    return write(tmp_path_factory.mktemp("random") / "dense")


@pytest.fixture(scope="module")
def trained_dense(tmp_path_factory):
    """Trained until it has learnt a rule, with AdamW's moments."""
    model = Transformer(config()).init_weights(0).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = None
    for step in range(60):
        start = tokens(16, 1, seed=step)
        ids = (start + 7 * torch.arange(33)) % V
        loss, _ = model(ids[:, :-1], ids[:, 1:])
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2
    path = tmp_path_factory.mktemp("trained") / "dense"
    save(path, model, {"step": 60, "tokens": 30720, "history": [["dense", 30720]],
                       "lineage": {"family": "dense"}}, optimizer)
    return str(path)


def upcycled(tmp_path, source, name="moe", **options):
    options = {"check": False, **options}
    path = str(tmp_path / name)
    return path, u.upcycle(u.Options(source, path, **options))


def difference(a, b):
    return ((a - b).abs().max() / a.abs().max()).item()


def assert_same_function(source, path):
    dtype = torch.float64
    a, b = (load_model(p, dtype)(tokens()) for p in (source, path))
    assert difference(a, b) < 1e-12


def experts(path, layers=2):
    """{(layer, expert, matrix): tensor} read with safetensors alone."""
    files = sorted(Path(path).glob("*.safetensors"))
    every = {name: t for file in files for name, t in load(file).items()}
    return {(i, int(name.split(".")[5]), name.split(".")[6]): t
            for i in range(layers) for name, t in every.items()
            if name.startswith(f"model.layers.{i}.block_sparse_moe.experts.")}


def mlp(path, layer=0):
    t = load(Path(path) / "model.safetensors")
    return {w: t[f"model.layers.{layer}.mlp.{p}_proj.weight"]
            for w, p in (("w1", "gate"), ("w3", "up"), ("w2", "down"))}


# ---------------------------------------------------------------------------------------------------------
# Exact where theory says exact

@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("weights", ["random_dense", "trained_dense"])
def test_copy_and_virtual_groups_preserve_the_function(tmp_path, request, weights, G, k):
    source = request.getfixturevalue(weights)
    path, _ = upcycled(tmp_path, source, "groups", method="virtual_groups", granularity=G,
                       num_local_experts=4 * G, num_experts_per_tok=k * G)
    assert_same_function(source, path)
    if G == 1:
        path, _ = upcycled(tmp_path, source, "copy", num_local_experts=5, num_experts_per_tok=k,
                           router_std=3.0)
        assert_same_function(source, path)


@pytest.mark.parametrize("method", [{}, {"method": "virtual_groups", "granularity": 2}])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_matrix_5_percent_off_is_caught(tmp_path, random_dense, monkeypatch, method, part):
    name = method.get("method", "copy")
    right = u.METHODS[name].weights or (lambda o, w, p: w)
    wrong = u.METHODS[name]._replace(weights=lambda o, w, p: right(o, w, p) * (1.05 if p.part == part else 1))
    monkeypatch.setitem(u.METHODS, name, wrong)
    path, _ = upcycled(tmp_path, random_dense, **method)
    with pytest.raises(AssertionError):
        assert_same_function(random_dense, path)
    with pytest.raises(ConfigError, match="not kept: logits differ"):
        upcycled(tmp_path, random_dense, "checked", check=True, **method)
    assert not (tmp_path / "checked").exists()


@pytest.mark.parametrize("G", [2, 8])
def test_scale_spread_over_three_matrices_errs_as_predicted(tmp_path, G):
    """With c = G^(1/3) on gate, up and down an MLP computes silu(c·g)/c for silu(g). Compare it
    with quadrature over g ~ N(0, 1)."""
    source = write(tmp_path / "dense", hidden_size=128, intermediate_size=2048, num_hidden_layers=1,
                   initializer_range=128 ** -0.5)
    path, _ = upcycled(tmp_path, source, method="virtual_groups", granularity=G, num_local_experts=2 * G,
                       num_experts_per_tok=G)
    dense, moe = (load_model(p, torch.float64).layers[0].mlp for p in (source, path))
    x = torch.randn(1, 512, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right = dense(x)
    assert difference(right, moe(x)[0]) < 1e-12
    c = G ** (1 / 3)
    with torch.no_grad():
        moe.gate_up_proj.mul_(c)
        moe.down_proj.mul_(c / G)
    measured = ((moe(x)[0] - right).square().mean() / right.square().mean()).sqrt().item()
    g, weight = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(100))
    error = ((F.silu(c * g) / c - F.silu(g)).square() * weight).sum() / (F.silu(g).square() * weight).sum()
    assert measured == pytest.approx(error.sqrt().item(), rel=0.05)


def test_groups_are_chosen_whole(tmp_path, random_dense):
    path, _ = upcycled(tmp_path, random_dense, method="virtual_groups", granularity=4, num_local_experts=32,
                       num_experts_per_tok=8)
    model = load_model(path, torch.float32)
    ids = tokens(32, 64)
    _, router = model(ids[:, :-1], ids[:, 1:])
    counts = router["counts"].view(2, 8, 4)
    assert (counts == counts[..., :1]).all() and counts.sum() == 2 * 8 * 32 * 63


# ---------------------------------------------------------------------------------------------------------
# Drawn as promised

@pytest.mark.parametrize("r", [0.0, 0.25, 0.5, 1.0])
def test_drop_keeps_1_minus_r_of_the_channels(tmp_path, random_dense, r):
    path, record = upcycled(tmp_path, random_dense, method="drop", drop_ratio=r, check=True)
    old, new, sets = mlp(random_dense), experts(path), set()
    for e in range(8):
        gate, up = ((new[0, e, w] == old[w]).all(1) for w in ("w1", "w3"))
        down = (new[0, e, "w2"] == old["w2"]).all(0)
        assert (gate == up).all() and (gate == down).all() and gate.sum() == (1 - r) * FF
        assert r == 0 or (new[0, e, "w1"] != old["w1"])[~gate].all()
        sets.add(tuple(gate.tolist()))
    assert len(sets) == (8 if 0 < r < 1 else 1)
    assert record["predicted"]["channels_kept"] == record["measured"]["channels_kept"] == 1 - r
    assert record["measured"]["weight_change"] == pytest.approx(math.sqrt(2 * r), rel=0.03)


def test_drop_per_matrix_keeps_the_cube(tmp_path):
    source = write(tmp_path / "dense", intermediate_size=1024)
    path, record = upcycled(tmp_path, source, method="drop_per_matrix", drop_ratio=0.25, check=True)
    old, new = mlp(source), experts(path)
    for w, dim in (("w1", 1), ("w3", 1), ("w2", 0)):
        assert all((new[0, e, w] == old[w]).all(dim).sum() == 768 for e in range(8))
    n = 2 * 8 * 1024
    # of independent channels; sets without replacement vary less
    sd = math.sqrt(0.75 ** 3 * (1 - 0.75 ** 3) / n)
    assert record["measured"]["channels_kept"] == pytest.approx(0.75 ** 3, abs=4 * sd)


def test_redrawn_channels_follow_the_block_they_replace(tmp_path):
    model = Transformer(config(intermediate_size=1024)).init_weights(0).double()
    with torch.no_grad():
        model.layers[0].mlp.gate_up_proj.weight += 0.3  # a mean to be kept
    save(tmp_path / "dense", model, {})
    path, _ = upcycled(tmp_path, str(tmp_path / "dense"), method="drop", drop_ratio=0.5)
    old, new = mlp(tmp_path / "dense"), experts(path)
    drawn = [(new[i, e, w].T if w == "w2"
              else new[i, e, w])[(new[i, e, "w1"] != mlp(tmp_path / "dense", i)["w1"]).any(1)].flatten()
             for i in (0, 1) for e in range(8) for w in ("w1", "w3", "w2")]
    pairs = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert pairs.abs().max() < 5 / math.sqrt(512 * 32)  # nothing is drawn twice
    redrawn = torch.zeros(1024)
    for e in range(8):
        changed = (new[0, e, "w1"] != old["w1"]).any(1)
        redrawn += changed
        for w in ("w1", "w3", "w2"):
            a, b = (old[w].T, new[0, e, w].T) if w == "w2" else (old[w], new[0, e, w])
            a, b = a[changed], b[changed]
            n = a.numel()
            assert b.mean().item() == pytest.approx(a.mean().item(), abs=4 * a.std().item() / math.sqrt(n))
            assert b.std().item() == pytest.approx(a.std().item(), rel=4 / math.sqrt(2 * n))
            assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < 4 / math.sqrt(n)
    # binomial: every channel as likely
    assert redrawn.var().item() == pytest.approx(8 * 0.25, rel=4 * math.sqrt(2 / 1024))


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_noise_statistics(tmp_path, fraction):
    source = write(tmp_path / "dense", intermediate_size=1024)
    path, record = upcycled(tmp_path, source, method="noise", noise_std=0.2, noise_fraction=fraction,
                            check=True)
    old, new = mlp(source), experts(path)
    deltas = {key: (t - old[key[2]]).flatten() / old[key[2]].std() for key, t in new.items() if key[0] == 0}
    for d in deltas.values():
        hit, n = d[d != 0], d.numel()
        assert len(hit) / n == pytest.approx(
            fraction, abs=4 * math.sqrt(fraction * (1 - fraction) / n) + 1e-9)
        assert hit.mean().abs() < 4 * 0.2 / math.sqrt(len(hit))
        assert hit.std().item() == pytest.approx(0.2, rel=4 / math.sqrt(2 * len(hit)))
        assert (hit / 0.2).pow(4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / len(hit)))
    pairs = torch.corrcoef(torch.stack([d for key, d in deltas.items() if key[2] != "w2"])).fill_diagonal_(0)
    assert pairs.abs().max() < 5 / math.sqrt(n)
    assert record["measured"]["weight_change"] == pytest.approx(0.2 * math.sqrt(fraction), rel=0.01)
    assert record["measured"]["channels_kept"] == record["predicted"]["channels_kept"] == 0


def test_noise_is_the_formula_bit_for_bit_and_takes_the_std_of_a_matrix_once(tmp_path, random_dense,
                                                                             monkeypatch):
    taken, std = [], torch.Tensor.std
    monkeypatch.setattr(torch.Tensor, "std", lambda t: taken.append(t.shape) or std(t))
    path, _ = upcycled(tmp_path, random_dense, method="noise", noise_std=0.3, seed=7)
    assert len(taken) == 2 * 3  # matrices of the dense MLPs, not 8 times as many
    for layer in (0, 1):
        old = mlp(random_dense, layer)
        for (i, e, w), t in experts(path).items():
            name = f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight"
            drawn = torch.empty_like(t).normal_(generator=generator(7, name))
            assert i != layer or torch.equal(t, drawn * (0.3 * old[w].std()) + old[w]), name


def test_router_is_drawn_per_group_and_layer(tmp_path):
    source = write(tmp_path / "dense", hidden_size=512, num_attention_heads=8)
    path, _ = upcycled(tmp_path, source, router_std=0.5, method="virtual_groups", granularity=2,
                       num_local_experts=16)
    rows = [load(Path(path) / "model.safetensors")[f"model.layers.{i}.block_sparse_moe.gate.weight"]
            for i in (0, 1)]
    for r in rows:
        assert (r[0::2] == r[1::2]).all()
        n = r[0::2].numel()
        assert r[0::2].std().item() == pytest.approx(0.5, rel=4 / math.sqrt(2 * n))
        assert r[0::2].mean().abs() < 2 / math.sqrt(n)
    pairs = torch.corrcoef(torch.cat([r[0::2] for r in rows])).fill_diagonal_(0)
    assert pairs.abs().max() < 5 / math.sqrt(512)


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_whatever_the_shards(tmp_path, random_dense, method):
    options = dict(method=method, **METHODS[method], merge_with=[random_dense] if method == "merge" else [])
    paths = [upcycled(tmp_path, random_dense, str(i), shard_size=size, seed=seed, **options)[0]
             for i, (size, seed) in enumerate(((5 * 10 ** 9, 0), (5 * 10 ** 9, 0), (40_000, 0),
                                            (5 * 10 ** 9, 1)))]
    weights = [(Path(p) / "model.safetensors").read_bytes() for p in (paths[0], paths[1], paths[3])]
    assert weights[0] == weights[1] != weights[2]
    index = json.loads((Path(paths[2]) / "model.safetensors.index.json").read_text())
    unsharded, n = load(Path(paths[0]) / "model.safetensors"), len(set(index["weight_map"].values()))
    assert n > 3 and set(index["weight_map"].values()) == {f"model-{i + 1:05d}-of-{n:05d}.safetensors"
                                                           for i in range(n)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in unsharded.values())
    pieces = {}
    for file in set(index["weight_map"].values()):
        shard = load(Path(paths[2]) / file)
        assert sum(t.nbytes for t in shard.values()) <= 40_000
        assert all(index["weight_map"][name] == file for name in shard)
        pieces |= shard
    assert pieces.keys() == unsharded.keys()
    assert all(t.dtype == unsharded[name].dtype and t.numpy().tobytes() == unsharded[name].numpy().tobytes()
               for name, t in pieces.items())


# ---------------------------------------------------------------------------------------------------------
# Methods

def test_a_method_may_work_in_place(tmp_path, random_dense, monkeypatch):
    """What it does to its tensors is in the result, once for each expert, and nowhere else."""
    dense = shutil.copytree(random_dense, tmp_path / "dense")
    model = load_model(dense, torch.float64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens()[:, :-1], tokens()[:, 1:])[0].backward()
    optimizer.step()
    shutil.rmtree(dense)
    save(dense, model, {"tokens": 1, "history": [], "lineage": {}}, optimizer)
    files = [(dense / name).read_bytes() for name in ("model.safetensors", "optimizer.moments")]
    monkeypatch.setitem(u.METHODS, "copy", Method(
        weights=lambda o, w, p: w.mul_(1.05), moments=lambda o, m, p, power: m.mul_(2)))
    path, _ = upcycled(tmp_path, str(dense), optimizer="copy")
    assert [(dense / name).read_bytes() for name in ("model.safetensors", "optimizer.moments")] == files
    old, new = mlp(dense), experts(path)
    assert all(torch.equal(new[0, e, w], old[w] * 1.05) for e in range(8) for w in old)
    old, new = (load(Path(p) / "optimizer.moments") for p in (dense, path))
    for e in range(8):
        assert torch.equal(new[f"exp_avg_sq.model.layers.1.block_sparse_moe.experts.{e}.w3.weight"],
                           2 * old["exp_avg_sq.model.layers.1.mlp.up_proj.weight"])


def test_every_method_is_described_and_its_knobs_are_settings(tmp_path, random_dense):
    columns = set(rows.KNOBS)
    assert {knob for method in u.METHODS.values() for knob in method.knobs} | set(u.KNOBS_OF_ALL) == columns
    assert columns <= set(u.Options.__dataclass_fields__)
    assert METHODS.keys() == u.METHODS.keys() == set(typing.get_args(u.Options.__annotations__["method"]))
    for method in METHODS:
        assert sum(line.startswith(f"| {method} ") for line in u.__doc__.splitlines()) == 1
        path, _ = upcycled(tmp_path, random_dense, method, method=method, **METHODS[method], router_std=0.5,
                           merge_with=[random_dense] if method == "merge" else [])
        lineage = json.loads((Path(path) / "trainer_state.json").read_text())["lineage"]
        assert columns & lineage.keys() == set(u.METHODS[method].knobs) | {"router_std", "optimizer"}
        assert rows.method_label(lineage | {"router_init": "normal"}) == rows.method_label(lineage)
        assert all(lineage[knob] == METHODS[method][knob] for knob in METHODS[method] if knob in columns)
        assert lineage["router_std"] == 0.5 and lineage["optimizer"] == "reset"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_copies_go_from_file_to_file(tmp_path, random_dense, monkeypatch, platform):
    """On Linux each tensor of the source is read once. Without sendfile the bytes are the same."""
    expected, _ = upcycled(tmp_path, random_dense, "expected", method="noise", noise_std=0.0)
    monkeypatch.setattr(tensors.sys, "platform", platform)
    read, names = tensors.Span.read, []
    monkeypatch.setattr(tensors.Span, "read", lambda span: names.append(span.name) or read(span))
    if platform != "linux":
        monkeypatch.delattr(os, "sendfile")
    path, _ = upcycled(tmp_path, random_dense)
    assert platform != "linux" or sorted(names) == sorted(load(Path(random_dense) / "model.safetensors"))
    assert (Path(path) / "model.safetensors").read_bytes() == (
        Path(expected) / "model.safetensors").read_bytes()


def test_a_source_that_shrinks_is_no_endless_copy(tmp_path):
    (tmp_path / "short").write_bytes(bytes(100))
    span = tensors.Span("a", (50,), torch.float32, None, str(tmp_path / "short"), 60, 200)
    with pytest.raises(OSError, match="short ended early"), open(tmp_path / "copy", "wb") as f:
        f.write(b"header")
        span.copy_to(f)
    assert (tmp_path / "copy").read_bytes() == b"header" + bytes(40)


# ---------------------------------------------------------------------------------------------------------
# Routers from clusters

def planted(n, per=200, D=24, spread=0.05, seed=0):
    """(x (n·per, D), clusters (n·per,)): n clusters about random directions, all far from the origin."""
    g = torch.Generator().manual_seed(seed)
    places = torch.linalg.qr(torch.randn(D, n, generator=g))[0].T
    cluster = torch.arange(n).repeat_interleave(per)[torch.randperm(n * per, generator=g)]
    x = places[cluster] + spread * torch.randn(n * per, D, generator=g)
    return 0.5 * x + 3 * torch.randn(D, generator=g), cluster


@pytest.mark.parametrize("n, seed", [(n, seed) for n in (2, 3, 8, 16) for seed in range(5)])
def test_each_planted_cluster_gets_a_router_row_of_its_own(n, seed):
    x, cluster = planted(n, seed=seed)
    rows_of_router = clusters(x, n, generator(seed))
    chosen = F.linear(x, rows_of_router).argmax(1)  # as the router chooses: not centred
    table = torch.zeros(n, n).index_put((cluster, chosen), torch.ones(len(x)), accumulate=True)
    assert (table.amax(1) == 200).all() and (table.amax(0) == 200).all()
    assert torch.equal(rows_of_router, clusters(x, n, generator(seed)))
    torch.testing.assert_close(rows_of_router.norm(dim=1), torch.ones(n))
    torch.testing.assert_close(F.linear(x.mean(0), rows_of_router), torch.zeros(n), atol=1e-5, rtol=0)


def test_more_clusters_than_different_tokens_still_give_rows():
    found = clusters(torch.eye(6)[:2].repeat(50, 1) + 1, 4, generator(0))
    assert found.shape == (4, 6) and found.isfinite().all()


@pytest.mark.parametrize("options", [
    {}, {"router_std": 2.0}, {"method": "virtual_groups", "granularity": 2, "num_local_experts": 8,
                              "num_experts_per_tok": 4}])
@pytest.mark.parametrize("given", [True, False])
def test_a_router_from_clusters_keeps_the_function_and_follows_the_data(tmp_path, options, given):
    """The router is held against transformers' hidden states on tokens of the training data: the logits of
    each have a mean of zero over tokens, and each token's are as large as the clusters make them."""
    folder = tmp_path / "data"
    folder.mkdir()
    counts = {}
    for split, seed in (("train", 1), ("val", 2)):
        ids = np.random.default_rng(seed).integers(V, size=64 * 64 + 1).astype(np.uint16)
        np.save(folder / f"{split}.npy", ids)
        counts[split] = len(ids)
    (folder / "meta.json").write_text(json.dumps(
        {"dtype": "uint16", "vocab_size": V, "tokens": counts, "data_sha256": "0" * 64, "tokenizer": "none",
         "eos_token_id": None}))
    source = write(tmp_path / "dense", torch.float32, state=None if given else {
        "step": 5, "tokens": 1000, "sequence": 31, "dataset": str(folder), "history": [["dense", 1000]],
        "lineage": {"family": "dense"}})
    options = {"router_init": "clusters", **({"dataset": str(folder)} if given else {}), **options}
    path, _ = upcycled(tmp_path, source, **options)
    again, _ = upcycled(tmp_path, source, "again", **options)
    assert (Path(path) / "model.safetensors").read_bytes() == (Path(again) / "model.safetensors").read_bytes()
    with torch.no_grad():
        assert difference(load_model(source)(tokens()), load_model(path)(tokens())) < 1e-5
    G = options.get("granularity", 1)
    ids = torch.from_numpy(np.load(folder / "train.npy").astype(np.int64))[:-1].view(64, 64)
    inputs = {}
    dense = AutoModelForCausalLM.from_pretrained(source)
    for i, layer in enumerate(dense.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, i=i: inputs.setdefault(i, args[0]))
    with torch.no_grad():
        dense(ids)
    written = load(Path(path) / "model.safetensors")
    for i in range(2):
        w, x = written[f"model.layers.{i}.block_sparse_moe.gate.weight"], inputs[i].flatten(0, 1)
        assert w.square().mean().sqrt().item() == pytest.approx(options.get("router_std", 0.02), rel=1e-3)
        assert all(torch.equal(w[e], w[e - e % G]) for e in range(8)) and len(w.unique(dim=0)) == 8 // G
        logits = F.linear(x, w)
        assert (logits.mean(0).abs() < 1e-4 * logits.std(0)).all()
        drawn = F.linear(x - x.mean(0), torch.randn(8, 32, generator=generator(0)) * w.square().mean().sqrt())
        assert logits[:, ::G].amax(1).mean() > 1.2 * drawn[:, ::G].amax(1).mean()
    lineage = json.loads((Path(path) / "trainer_state.json").read_text())["lineage"]
    assert lineage["router_init"] == "clusters" and "router from clusters" in rows.method_label(lineage)
    assert "router_init clusters" in (Path(path) / "README.md").read_text()


def test_clusters_want_data(tmp_path, random_dense):
    with pytest.raises(ConfigError, match="--router_init=clusters needs the data .* --dataset"):
        upcycled(tmp_path, random_dense, router_init="clusters")
    with pytest.raises(ConfigError, match="nowhere"):
        upcycled(tmp_path, random_dense, router_init="clusters", dataset=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="router_init: 'kmeans'"):
        upcycled(tmp_path, random_dense, router_init="kmeans")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------
# Merge

def test_merge_takes_experts_in_turn_and_averages_the_rest(tmp_path):
    a = write(tmp_path / "a", seed=0)
    b = write(tmp_path / "b", seed=1, state={"tokens": 500, "history": [["b", 500]], "lineage": {}})
    path, record = upcycled(tmp_path, a, "average", merge_with=[b], method="merge", num_local_experts=4)
    new, old = experts(path), {0: mlp(a), 1: mlp(b)}
    assert all((new[0, e, w] == old[e % 2][w]).all() for e in range(4) for w in ("w1", "w2", "w3"))
    average, first, second = (load(Path(p) / "model.safetensors") for p in (path, a, b))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"):
        torch.testing.assert_close(average[name], (first[name] + second[name]) / 2, rtol=1e-15, atol=0)
    assert record["D1"] == 1500 and [s["path"] for s in record["sources"]] == [a, b]
    path, _ = upcycled(tmp_path, a, "first", merge_with=[b], method="merge", merge_shared="first")
    assert (load(Path(path) / "model.safetensors")["lm_head.weight"] == first["lm_head.weight"]).all()
    path, _ = upcycled(tmp_path, a, "same", merge_with=[a], method="merge")
    assert_same_function(a, path)


def test_merged_checkpoints_of_another_type_are_converted(tmp_path):
    a, b = write(tmp_path / "a", torch.float32), write(tmp_path / "b", torch.float64, seed=1)
    path, _ = upcycled(tmp_path, a, merge_with=[b], method="merge", num_local_experts=2)
    assert torch.equal(experts(path)[0, 0, "w1"], mlp(a)["w1"])
    assert torch.equal(experts(path)[0, 1, "w1"], mlp(b)["w1"].float())


def test_tokens_of_a_common_trunk_count_once(tmp_path):
    """Two branches of a trunk saw 1,000 and 1,500 of its tokens and 200 and 300 of their own. A third model
    is a stranger."""
    def state(*history):
        return {"tokens": history[-1][1], "history": history, "lineage": {"family": "dense"}}
    a = write(tmp_path / "a", state=state(["trunk", 1000], ["a", 200]))
    b = write(tmp_path / "b", state=state(["trunk", 1500], ["b", 300]))
    c = write(tmp_path / "c", state=state(["c", 40]))
    assert upcycled(tmp_path, a, "alone")[1]["D1"] == 1200
    path, record = upcycled(tmp_path, a, "two", merge_with=[b], method="merge")
    assert record["D1"] == 2000 and [s["tokens"] for s in record["sources"]] == [1200, 1800]
    state_of_result = json.loads((Path(path) / "trainer_state.json").read_text())
    assert state_of_result["history"] == [] and state_of_result["lineage"]["D1"] == 2000
    assert upcycled(tmp_path, a, "same", merge_with=[a], method="merge")[1]["D1"] == 1200
    _, record = upcycled(tmp_path, a, "three", merge_with=[b, c], method="merge", num_local_experts=6)
    assert record["D1"] == 2040


def test_the_dense_trunk_is_recorded(tmp_path):
    dense = {"tokens": 1000, "trunk": "dense-seed-3", "history": [], "lineage": {"family": "dense"}}
    path, _ = upcycled(tmp_path, write(tmp_path / "dense", state=dense))
    state = json.loads((Path(path) / "trainer_state.json").read_text())
    assert state["lineage"]["dense_trunk"] == "dense-seed-3" and "trunk" not in state


# ---------------------------------------------------------------------------------------------------------
# transformers is the judge

def hf_logits(path, ids, dtype="auto"):
    with torch.no_grad():
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        return model.eval()(ids).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,tied", [(2, False), (4, True)])
@pytest.mark.parametrize("method", METHODS)
def test_transformers_opens_every_method(tmp_path, method, heads, tied, dtype):
    source = write(tmp_path / "dense", dtype, num_key_value_heads=heads, tie_word_embeddings=tied)
    path, _ = upcycled(tmp_path, source, method=method, shard_size=60_000, **METHODS[method],
                       merge_with=[source] if method == "merge" else [])
    assert (Path(path) / "model.safetensors.index.json").exists()
    ids = tokens()
    with torch.no_grad():
        exact = hf_logits(path, ids, torch.float32)
        assert difference(exact, load_model(path, torch.float32)(ids)) < 1e-5
        if dtype == torch.bfloat16:
            bf16 = hf_logits(path, ids)
            assert bf16.dtype == dtype
            # Both round to 8 bits. Transformers' router logits do too: where they tie or nearly so, another
            # expert is chosen, and attention carries that to later tokens. So most tokens are compared.
            ours, error = ((logits.float() - exact).abs().amax(-1).median()
                           for logits in (load_model(path, dtype)(ids), bf16))
            assert ours < 1.5 * error < 0.05 * exact.abs().max()


ROPES = {"plain": None, "linear": {"rope_type": "linear", "factor": 2.0},
         "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32},
         "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}


@pytest.mark.parametrize("rope", ROPES)
def test_sources_from_transformers(tmp_path, rope):
    """A source may be sharded, with RoPE scaling, a head_dim of its own, tokenizer and generation files."""
    theta = {} if rope == "plain" else {"rope_parameters": {"rope_theta": 5000.0, **ROPES[rope]}}
    c = LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=FF, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                    max_position_embeddings=128, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6,
                    initializer_range=0.2, **theta)
    dense = LlamaForCausalLM(c)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    path, record = upcycled(tmp_path, str(tmp_path / "dense"), check=True, check_tokens=64)
    ids = tokens(2, 64)
    with torch.no_grad():
        assert difference(dense(ids).logits, hf_logits(path, ids)) < 1e-5
    new, old = (json.loads((p / "config.json").read_text()) for p in (Path(path), tmp_path / "dense"))
    for key in ("rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "vocab_size",
                "rms_norm_eps", "dtype"):
        assert new[key] == old[key]
    assert new["rms_norm_eps"] == 1e-6 and "attention_bias" not in new
    assert new["architectures"] == ["MixtralForCausalLM"]
    assert (Path(path) / "tokenizer.json").read_text() == "{}"
    assert (Path(path) / "generation_config.json").exists()
    if rope == "yarn":
        assert "yarn" in record["measured"]["not_run"] and record["measured"]["channels_kept"] == 1
    else:
        assert record["measured"]["relative_logit_difference"] < 1e-5 and record["D1"] is None


def test_old_rope_key_and_mistral(tmp_path):
    c = MistralConfig(vocab_size=V, hidden_size=32, intermediate_size=FF, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2,
                      head_dim=8, max_position_embeddings=64, sliding_window=None, initializer_range=0.2)
    dense = MistralForCausalLM(c).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    d = json.loads(file.read_text())
    del d["rope_parameters"]
    file.write_text(json.dumps(d | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    path, _ = upcycled(tmp_path, str(tmp_path / "dense"))
    ids = tokens(2, 64)
    a, b = hf_logits(tmp_path / "dense", ids, torch.float32), hf_logits(path, ids, torch.float32)
    assert difference(a, b) < 1e-5
    with torch.no_grad():
        assert difference(dense.float()(ids).logits, b) > 1e-3  # the scaling does something
        assert difference(load_model(path)(ids), b) < 1e-5
    # left out, it is 4096
    file.write_text(json.dumps({key: value for key, value in d.items() if key != "sliding_window"}))
    path, _ = upcycled(tmp_path, str(tmp_path / "dense"), "sliding")
    assert json.loads((Path(path) / "config.json").read_text())["sliding_window"] == 4096


def test_float16_passes_through_and_overflow_is_refused(tmp_path):
    source = write(tmp_path / "dense", torch.float16)
    path, _ = upcycled(tmp_path, source, method="virtual_groups", granularity=2)
    assert all(t.dtype == torch.float16 for t in load(Path(path) / "model.safetensors").values())
    t = load(Path(source) / "model.safetensors")
    t["model.layers.1.mlp.down_proj.weight"][0, 0] = 40000
    save_file(t, Path(source) / "model.safetensors")
    with pytest.raises(ConfigError, match="overflows float16"):
        upcycled(tmp_path, source, "over", method="virtual_groups", granularity=2)


# ---------------------------------------------------------------------------------------------------------
# The record, the check, the optimizer

def test_lineage_and_record(tmp_path, random_dense):
    path, record = upcycled(tmp_path, random_dense, seed=7)
    digest = hashlib.sha256((Path(random_dense) / "model.safetensors").read_bytes()).hexdigest()
    state = json.loads((Path(path) / "trainer_state.json").read_text())
    n = parameter_counts(config())["N"]
    assert state == {"step": 0, "tokens": 0, "sequence": 31, "dataset": "none", "history": [], "lineage": {
        "family": "upcycled", "N": n, "D1": 1000, "source": random_dense,
        "source_sha256": {"model.safetensors": digest}, "method": "copy", "seed": 7, "router_std": 0.02,
        "optimizer": "reset", "dense_trunk": None, "parent": {"family": "dense"}}}
    assert json.loads((Path(path) / "upcycle.json").read_text()) == record
    assert record["sources"][0]["sha256"] == {"model.safetensors": digest}
    assert record["settings"]["num_local_experts"] == 8
    assert upcycled(tmp_path, random_dense, "given", D1=77)[1]["D1"] == 77
    path, record = upcycled(tmp_path, random_dense, "groups", method="virtual_groups", granularity=2)
    assert record["N"] == n and load_model(path).config.intermediate_size == FF // 2


def test_the_model_card_is_one_a_hub_reads(tmp_path, random_dense):
    from huggingface_hub import ModelCard
    path, record = upcycled(tmp_path, random_dense, check=True, check_tokens=64, seed=7, method="drop")
    card = ModelCard.load(Path(path) / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["mixture-of-experts", "upcycled"]
    text = (Path(path) / "README.md").read_text()
    digest = hashlib.sha256((Path(random_dense) / "model.safetensors").read_bytes()).hexdigest()
    for said in (f"| dense | 1,000 | model.safetensors | `{digest}` |", "A MixtralForCausalLM", "D1 1,000",
                 "Method `drop`, seed 7, drop_ratio 0.5, router_std 0.02, optimizer reset.", "# moe\n",
                 f"{record['measured']['kl']:.5g}", f"{record['measured']['weight_change']:.5g}"):
        assert said in text, said
    assert str(tmp_path) not in text


@pytest.mark.parametrize("E, words", [
    (8, []), (7, ["vLLM routes 7"]), (192, []), (513, ["512 experts", "vLLM"]), (512, []),
    (640, ["512 experts", "vLLM"])])
def test_hints_say_what_other_tools_make_of_a_number_of_experts(E, words):
    hints = u.hints_for(E, "mixtral")
    assert len(hints) == len(words) and all(word in hint for word, hint in zip(words, hints))
    assert u.hints_for(E, "qwen2_moe")[:-1] == hints and "llama.cpp" in u.hints_for(E, "qwen2_moe")[-1]


def test_hints_are_seen_on_the_terminal(tmp_path, random_dense, capsys):
    u.main(u.Options(random_dense, str(tmp_path / "moe"), num_local_experts=7, check=False))
    assert "\nhint: vLLM routes 7 experts with a slow kernel, powers of two with a fast one\n" in (
        capsys.readouterr().out)


def test_every_tensor_is_used_or_needless_or_refused(tmp_path):
    source = write(tmp_path / "dense", torch.float32, tie_word_embeddings=True)
    t = load(Path(source) / "model.safetensors")
    extra = {"lm_head.weight": t["model.embed_tokens.weight"].clone(),
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(t | extra, Path(source) / "model.safetensors")
    path, _ = upcycled(tmp_path, source)
    assert not extra.keys() & load(Path(path) / "model.safetensors").keys()
    with torch.no_grad():
        assert difference(load_model(source)(tokens()), load_model(path)(tokens())) < 1e-5
    save_file(t | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
              Path(source) / "model.safetensors")
    with pytest.raises(ConfigError, match="q_norm.weight is none of this architecture's"):
        upcycled(tmp_path, source, "refused")


def test_check_agrees_with_transformers(tmp_path, monkeypatch):
    """Loss, KL, logits and router of the check are computed again with transformers on the same tokens."""
    source = write(tmp_path / "dense", torch.float32)
    val = np.random.default_rng(0).integers(V, size=300).astype(np.uint16)
    np.save(tmp_path / "val.npy", val)
    meta = {"tokens": {"val": 300}, "bytes": {"val": 600}}
    monkeypatch.setattr(u, "load_tokens", lambda directory, split: (np.load(tmp_path / f"{split}.npy"), meta))
    path, record = upcycled(tmp_path, source, method="drop", check=True, check_tokens=192, dataset="here")
    found, T = record["measured"], 64
    ids = torch.from_numpy(val[:193].astype(np.int64))
    x, y = ids[:-1].view(3, T), ids[1:].view(3, T)
    a, b = hf_logits(source, x), hf_logits(path, x)
    kl = F.kl_div(b.double().log_softmax(-1), a.double().log_softmax(-1), log_target=True,
                  reduction="none").sum(-1).mean()
    assert found["tokens"] == 192 and found["on"] == "val tokens of here"
    assert found["loss_before"] == pytest.approx(F.cross_entropy(a.flatten(0, 1), y.flatten()).item(),
                                                 rel=1e-5)
    assert found["loss_after"] == pytest.approx(F.cross_entropy(b.flatten(0, 1), y.flatten()).item(),
                                                rel=1e-5)
    for end in ("before", "after"):
        assert found[f"bits_per_byte_{end}"] == pytest.approx(found[f"loss_{end}"] / math.log(2) / 2)
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-4) and found["kl"] > 0.01
    assert found["relative_logit_difference"] == pytest.approx(difference(a, b), rel=1e-4)
    routers = AutoModelForCausalLM.from_pretrained(path)(x, output_router_logits=True).router_logits
    for logits, effective in zip(routers, found["effective_experts"]):
        share = torch.bincount(logits.topk(2).indices.flatten(), minlength=8).double() / (2 * 192)
        assert effective == pytest.approx(torch.special.entr(share).sum().exp().item(), rel=1e-5)
    np.save(tmp_path / "val.npy", val + V)
    with pytest.raises(ConfigError, match="holds token"):
        upcycled(tmp_path, source, "other", check=True, check_tokens=192, dataset="here")


@pytest.mark.parametrize("method", ["copy", "drop", "virtual_groups"])
def test_moments_come_along(tmp_path, trained_dense, method):
    G = METHODS[method].get("granularity", 1)
    path, _ = upcycled(tmp_path, trained_dense, method=method, optimizer="copy", **METHODS[method])
    stored = [load(Path(p) / "optimizer.moments") for p in (trained_dense, path)]
    model = load_model(path, torch.float64)
    load_moments(path, model, torch.optim.AdamW(model.parameters()))
    assert stored[1]["step"] == 60
    names = load(Path(path) / "model.safetensors").keys()
    assert stored[1].keys() == {"step", *(f"{key}.{name}" for key in KEYS for name in names)}
    for power, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
        old, new = ({name.removeprefix(f"{key}."): t for name, t in file.items()
                     if name.startswith(f"{key}.")} for file in stored)
        assert new["model.layers.0.block_sparse_moe.gate.weight"].eq(0).all()
        assert (new["model.layers.1.self_attn.q_proj.weight"]
                == old["model.layers.1.self_attn.q_proj.weight"]).all()
        gate, down = old["model.layers.0.mlp.gate_proj.weight"], old["model.layers.0.mlp.down_proj.weight"]
        new_gate, new_down = (new[f"model.layers.0.block_sparse_moe.experts.5.{w}.weight"]
                              for w in ("w1", "w2"))
        if method == "drop":
            same = (experts(path)[0, 5, "w1"] == mlp(trained_dense)["w1"]).all(1)
            gate, down = gate * same[:, None], down * same
        part = slice(5 % G * FF // G, (5 % G + 1) * FF // G)
        assert (new_gate == gate[part]).all() and (new_down == down[:, part] / G ** power).all()


def test_moments_of_one_whole_group_are_its_gradients(tmp_path, random_dense):
    """A single group is the dense model under other parameters: AdamW's first moments must be those of its
    gradients."""
    ids = tokens()

    def first_step(path):
        model = load_model(path, torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0)
        model(ids[:, :-1], ids[:, 1:])[0].backward()
        optimizer.step()
        return model, optimizer
    dense = str(tmp_path / "dense")
    model, optimizer = first_step(random_dense)
    save(dense, model, {}, optimizer)
    path, _ = upcycled(tmp_path, dense, method="virtual_groups", granularity=4, num_local_experts=4,
                       num_experts_per_tok=4, optimizer="copy")
    model, optimizer = first_step(path)
    carried = torch.optim.AdamW(model.parameters())
    load_moments(path, model, carried)
    for name, p in model.named_parameters():
        if not name.endswith("mlp.gate.weight"):
            for key in ("exp_avg", "exp_avg_sq"):
                # the loss is taken in fp32
                assert difference(optimizer.state[p][key], carried.state[p][key]) < 1e-6, (name, key)


# ---------------------------------------------------------------------------------------------------------
# Refusals

@pytest.mark.parametrize("options,message", [
    (dict(method="virtual_groups", granularity=4, num_local_experts=8, num_experts_per_tok=2),
     "not a multiple of granularity"),
    (dict(method="virtual_groups", granularity=4, num_local_experts=10, num_experts_per_tok=4),
     "last group lacks 2"),
    (dict(method="virtual_groups", granularity=5, num_local_experts=10, num_experts_per_tok=5),
     "does not divide intermediate_size"),
    (dict(granularity=2), "goes with --method=virtual_groups"),
    (dict(router_std=0.0), "every token chooses the same ones"),
    (dict(num_experts_per_tok=9), "num_experts_per_tok = 9 is more than num_local_experts = 8"),
    (dict(num_local_experts=0), "num_local_experts: 0 is not at least 1"),
    (dict(method="drop", drop_ratio=1.5), "drop_ratio: 1.5"),
    (dict(method="noise", noise_fraction=-0.1), "noise_fraction: -0.1"),
    (dict(method="merge"), "further checkpoints"),
    (dict(shard_size="5GB"), "shard_size: '5GB' is not of type int"),
    (dict(shard_size=0), "shard_size: 0 is not at least 1"),
    (dict(optimizer="copy"), "optimizer.moments")])
def test_settings_refused(tmp_path, random_dense, options, message):
    with pytest.raises(ConfigError, match=message):
        upcycled(tmp_path, random_dense, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options,cost", [
    (dict(method="virtual_groups", granularity=4, num_local_experts=8, num_experts_per_tok=2),
     "2 of a token's experts are part of a group"),
    (dict(method="virtual_groups", granularity=4, num_local_experts=10, num_experts_per_tok=4),
     "the last group lacks 2"),
    (dict(router_std=0.0), "router_std = 0")])
def test_force_writes_it_promises_nothing_and_says_what_it_costs(tmp_path, random_dense, options, cost):
    path, record = upcycled(tmp_path, random_dense, force=True, check=True, check_tokens=64, **options)
    assert len(record["costs"]) == 1 and cost in record["costs"][0]
    assert f"forced: {record['costs'][0]}" in u.summary(record).splitlines()
    assert record["predicted"]["kl"] is None
    lost = record["measured"]["relative_logit_difference"]
    assert lost > 1e-3 if "granularity" in options else lost < 1e-5
    assert json.loads((Path(path) / "upcycle.json").read_text()) == record


def test_a_failed_proof_is_kept_with_force_alone(tmp_path, random_dense, monkeypatch):
    monkeypatch.setitem(u.METHODS, "copy", u.METHODS["copy"]._replace(weights=lambda o, w, p: w * 1.05))
    with pytest.raises(ConfigError, match="not kept: logits differ by .*--force keeps it"):
        upcycled(tmp_path, random_dense, check=True)
    assert not list(tmp_path.iterdir())
    path, record = upcycled(tmp_path, random_dense, check=True, force=True)
    assert "logits differ by" in record["costs"][0] and record["costs"][0] in u.summary(record)
    assert record["predicted"]["kl"] == 0 < record["measured"]["kl"] and Path(path).is_dir()


@pytest.mark.parametrize("key,value", [
    ("attention_bias", True), ("mlp_bias", True), ("sliding_window", 4096), ("use_qk_norm", True),
    ("hidden_act", "gelu"), ("model_type", "gpt2"), ("quantization_config", {"bits": 4}),
    ("num_hidden_layers", 10 ** 9), ("hidden_size", 10 ** 12), ("hidden_size", 64), ("hidden_size", "32"),
    ("intermediate_size", 65), ("vocab_size", -1), ("num_attention_heads", 3)])
def test_what_mixtral_cannot_express_is_refused(tmp_path, key, value):
    source = write(tmp_path / "dense", torch.float32)
    file = Path(source) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    sizes = key.startswith(("num", "hidden_s", "inter", "vocab"))
    with pytest.raises(ConfigError, match="layers|size|config.json" if sizes else key):
        upcycled(tmp_path, source)
    assert os.listdir(tmp_path) == ["dense"]


def test_other_shapes_and_mixtures_are_refused(tmp_path, random_dense):
    other = write(tmp_path / "other", intermediate_size=72)
    with pytest.raises(ConfigError, match="intermediate_size = 72, but 64"):
        upcycled(tmp_path, random_dense, merge_with=[other], method="merge")
    with pytest.raises(ConfigError, match="not a multiple of the 2 checkpoints"):
        upcycled(tmp_path, random_dense, merge_with=[random_dense], method="merge", num_local_experts=5)
    with pytest.raises(ConfigError, match="a set of moments each"):
        upcycled(tmp_path, random_dense, merge_with=[random_dense], method="merge", optimizer="copy")
    path, _ = upcycled(tmp_path, random_dense)
    with pytest.raises(ConfigError, match="is a mixture of experts already"):
        upcycled(tmp_path, path, "again")
    with pytest.raises(ConfigError, match="already exists"):
        upcycled(tmp_path, random_dense)
    with pytest.raises(ConfigError, match="no such checkpoint directory"):
        upcycled(tmp_path, str(tmp_path / "nowhere"), "again")


# ---------------------------------------------------------------------------------------------------------
# Sources that are broken or lie

def header_of(file):
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + n]), data[8 + n:]


def with_header(file, change):
    header, data = header_of(file)
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


NAME, OTHER = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"


def truncated(d):
    file = d / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(d):
    torch.save(load(d / "model.safetensors"), d / "pytorch_model.bin")
    (d / "model.safetensors").unlink()


def pickle_in_disguise(d):
    torch.save(load(d / "model.safetensors"), d / "model.safetensors")


def index_to(target):
    def lie(d):
        os.rename(d / "model.safetensors", d.parent / "outside.safetensors")
        names = header_of(d.parent / "outside.safetensors")[0]
        weight_map = {n: target for n in names if n != "__metadata__"}
        (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return lie


LIES = {
    "truncated": truncated,
    "empty": lambda d: (d / "model.safetensors").write_bytes(b""),
    "header longer than the file": lambda d: (d / "model.safetensors").write_bytes(
        (1 << 62).to_bytes(8, "little") + b"{}"),
    "header not JSON": lambda d: (d / "model.safetensors").write_bytes(
        (8).to_bytes(8, "little") + b"{nothing" + bytes(64)),
    "offsets past the end": lambda d: with_header(d / "model.safetensors", lambda h: h[NAME].update(
        data_offsets=[10 ** 15, 10 ** 15 + h[NAME]["data_offsets"][1] - h[NAME]["data_offsets"][0]])),
    "overlap": lambda d: with_header(d / "model.safetensors",
                                     lambda h: h[NAME].update(data_offsets=h[OTHER]["data_offsets"])),
    "backwards": lambda d: with_header(d / "model.safetensors",
                                       lambda h: h[NAME].update(data_offsets=h[NAME]["data_offsets"][::-1])),
    "negative": lambda d: with_header(d / "model.safetensors",
                                      lambda h: h[NAME].update(data_offsets=[-8, 8])),
    "shape larger than the data": lambda d: with_header(d / "model.safetensors",
                                                        lambda h: h[NAME].update(shape=[FF, 3200])),
    "shape overflows": lambda d: with_header(d / "model.safetensors",
                                             lambda h: h[NAME].update(shape=[2 ** 62, 16])),
    "type smaller than the data": lambda d: with_header(d / "model.safetensors",
                                                        lambda h: h[NAME].update(dtype="U8")),
    "integers": lambda d: with_header(d / "model.safetensors", lambda h: h[NAME].update(dtype="I32")),
    "transposed": lambda d: with_header(d / "model.safetensors",
                                        lambda h: h[NAME].update(shape=h[NAME]["shape"][::-1])),
    "tensor missing": lambda d: save_file(
        {n: t for n, t in load(d / "model.safetensors").items() if n != NAME}, d / "model.safetensors"),
    "bias": lambda d: save_file(
        load(d / "model.safetensors") | {NAME.replace("weight", "bias"): torch.ones(FF)},
        d / "model.safetensors"),
    "pickle": pickled, "pickle in disguise": pickle_in_disguise,
    "index outside": index_to("../outside.safetensors"), "index absolute": index_to("/etc/passwd"),
    "index to a missing file": index_to("model-00001-of-00002.safetensors"),
    "index to a pickle": index_to("pytorch_model.bin"),
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "config not JSON": lambda d: (d / "config.json").write_text("{"),
    "config too deep": lambda d: (d / "config.json").write_text("[" * 100_000),
    "config a list": lambda d: (d / "config.json").write_text("[]")}


@pytest.mark.parametrize("lie", LIES)
def test_broken_sources_are_refused(tmp_path, lie):
    source = write(tmp_path / "dense", torch.float32)
    LIES[lie](Path(source))
    before = set(os.listdir(tmp_path))
    with pytest.raises(ConfigError) as error:
        upcycled(tmp_path, source)
    assert "dense" in str(error.value) and "\n" not in str(error.value)
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, place", [(NAME, "layers.0."), ("model.norm.weight", "model.norm.weight"),
                                         ("model.layers.1.mlp.down_proj.weight", "layers.1.")])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_never_written(tmp_path, dtype, name, place, value):
    good, source = write(tmp_path / "good", dtype, seed=1), write(tmp_path / "dense", dtype)
    t = load(Path(source) / "model.safetensors")
    t[name].view(-1)[-1] = value
    save_file(t, Path(source) / "model.safetensors")
    for method, options in METHODS.items():
        merge = [[source, good], [good, source]] if method == "merge" else [[source]]
        for first, *more in merge:
            with pytest.raises(ConfigError, match="not finite") as error:
                upcycled(tmp_path, first, method=method, merge_with=more, force=True, **options)
            assert "\n" not in str(error.value) and place in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["dense", "good"]


# ---------------------------------------------------------------------------------------------------------
# Disk, memory, command line

def test_no_room_says_what_is_needed(tmp_path, random_dense, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda path: shutil._ntuple_diskusage(10 ** 9, 10 ** 9 - 1000, 1000))
    with pytest.raises(ConfigError, match="the disk is full: [0-9,]+ bytes needed"):
        upcycled(tmp_path, random_dense)
    assert not list(tmp_path.iterdir())


def python(code, *args, **kwargs):
    return subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, text=True, capture_output=True,
                          timeout=120, **kwargs)


def test_killed_or_cut_off_it_leaves_nothing(tmp_path, random_dense):
    """A file-size limit makes a write fail midway, and SIGKILL ends the next one between two shards."""
    done = python("""
import resource, sys, tensors, upcycle as u
from configurator import ConfigError
o = u.Options(sys.argv[1], sys.argv[2], shard_size=40_000, check=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
try:
    u.upcycle(o)
except ConfigError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
import os; print(os.listdir(os.path.dirname(sys.argv[2])), flush=True)
write, shards = tensors.write_shard, []
def killed(*args):
    if len(shards) == 2:
        os.kill(os.getpid(), 9)
    shards.append(write(*args))
tensors.write_shard = killed
u.upcycle(o)
""", random_dense, str(tmp_path / "moe"))
    assert done.returncode == -9, done.stderr
    said, listing = done.stdout.splitlines()
    assert "cannot be written: File too large" in said and listing == "[]"
    assert not (tmp_path / "moe").exists()
    path, _ = upcycled(tmp_path, random_dense)
    assert_same_function(random_dense, path)
    assert os.listdir(tmp_path) == ["moe"]


@pytest.mark.parametrize("layers, methods, returned, slack", [
    (1, "copy drop noise virtual_groups", {"MALLOC_MMAP_THRESHOLD_": "131072"}, 1),  # freed memory goes back
    (8, "copy noise", {}, 2)])  # the allocator keeps some, but no more with each layer
def test_memory_is_a_few_times_the_largest_tensor(tmp_path, layers, methods, returned, slack):
    """Anonymous memory, sampled while 100 or 850 MB are written, tensors of at most 4 MB."""
    source = tmp_path / "dense"
    model = Transformer(config(vocab_size=512, hidden_size=1024, intermediate_size=2048,
                               num_attention_heads=8, num_hidden_layers=layers))
    save(source, model.bfloat16(), {})
    done = python("""
import sys, threading, time, upcycle as u
def anonymous():
    return int(next(line for line in open("/proc/self/status")
                    if line.startswith("RssAnon")).split()[1]) * 1024
source, out, methods = sys.argv[1:]
u.upcycle(u.Options(source, out + "/first", num_local_experts=2, check=False))
groups = {"granularity": 2, "num_local_experts": 16, "num_experts_per_tok": 4}
for method in methods.split():
    start, peak, stop = anonymous(), [0], threading.Event()
    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    more = groups if method == "virtual_groups" else {}
    u.upcycle(u.Options(source, out + "/" + method, method=method, check=False, **more))
    stop.set(); thread.join()
    print(method, peak[0] - start)
""", str(source), str(tmp_path), methods, env=os.environ | returned)
    assert not done.returncode, done.stderr
    grown = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    largest = 2048 * 1024 * 2
    assert sum(f.stat().st_size for f in (tmp_path / "copy").glob("*.safetensors")) > 8 * 3 * largest
    assert grown["copy"] < 2 * largest and list(grown) == methods.split()
    # drop computes in fp32, on some tensors at a time; noise takes one std at a time in fp32, and virtual
    # groups scale halves of a matrix
    bounds = {"drop": 4 * (2 + u.THREADS), "noise": 2 * (3 + u.THREADS), "virtual_groups": 2 + u.THREADS}
    for method in methods.split()[1:]:
        assert grown[method] < slack * bounds[method] * largest, grown


def test_command_line(tmp_path, random_dense, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["upcycle.py", random_dense, str(tmp_path / "moe"), "--method=drop",
                                      "--drop_ratio=0.25", "--check_tokens=64"])
    run(u.main, u.Options)
    out = capsys.readouterr().out
    assert "8 experts, top-2, by drop" in out and "D1 1,000" in out and "64 random tokens" in out
    assert any(line.split()[-2:] == ["0.75", "0.75"] for line in out.splitlines()
               if line.startswith("channels kept"))
    with pytest.raises(SystemExit) as stop:
        run(u.main, u.Options)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("upcycle.py: ")
