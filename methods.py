"""The methods that make experts of an MLP. The table at the head of upcycle.py says what each keeps."""
import hashlib
import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from configurator import ConfigError
from model import wide
from tensors import Stored


@dataclass
class Piece(Stored):
    """A tensor of the result and what it is made of."""
    dense_name: str | None = None  # the dense tensor; None: it has none
    layer: int = 0
    expert: int | None = None  # None: attention, norms, embeddings, router
    part: int = 0  # gate 0, up 1, down 2
    std: list | None = None  # of the dense tensor, from when one of its experts has wanted it
    drawn: bool = False  # the router; what is neither drawn nor of a dense tensor is zero

    @property
    def channels(self):
        """The dimension of the intermediate channels: gate and up are (F, D), down is (D, F)."""
        return 1 if self.part == 2 else 0


def slice_of(o, t, p):
    """Slice e mod granularity of the intermediate channels of a dense matrix, or of its moment."""
    size = t.shape[p.channels] // o.granularity
    return t.narrow(p.channels, p.expert % o.granularity * size, size)


class Method(NamedTuple):
    """How experts are made. Its functions get Options o, the Piece p to make, and copies of tensors, which
    they may overwrite. None for weights or moments: they are the MLP's, copied byte by byte."""
    weights: Callable | None = None  # (o, w, p): the expert's matrix, from the MLP's or slice e mod G of it
    moments: Callable | None = None  # (o, m, p, power): AdamW's mean of gradient ** power
    theory: Callable = lambda o, dense: {}  # {key of MEASURED: the value to expect}; dense: a ModelConfig
    costs: Callable = lambda o, sources: []  # [how settings break its promise]; raises ConfigError for others
    knobs: tuple = ()  # the settings that tell two uses of the method apart


STD_LOCK = threading.Lock()  # one std at a time is in fp32
SAME_WEIGHTS = {"channels_kept": 1.0, "weight_change": 0.0}
SAME_FUNCTION = {"relative_logit_difference": 0.0, "kl": 0.0}


def generator(*key):
    """A random generator that is a function of `key` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def add_normal(t, std, g, share=1.0):
    """Add std · N(0, 1) to a random share of the entries of a matrix t, in place; g: a generator. It takes a
    few rows at a time, drawn in fp32 at least, so that they stay in the cache. Returns t."""
    for rows in t.split(max(1, 2**17 // t.shape[1])):
        delta = torch.empty(rows.shape, dtype=torch.promote_types(t.dtype, torch.float32))
        delta.normal_(generator=g).mul_(std)
        if share < 1:
            delta *= torch.empty(rows.shape).uniform_(generator=g) < share
        rows.copy_(delta.add_(rows))
    return t


def clusters(x, n, g):
    """(n, D) unit rows, each the direction of a cluster of x (S, D) from its mean; g: a generator.

    It is k-means on the sphere, so that a token's largest logit is that of its cluster. Rows are at right
    angles to the mean of x, or all tokens would favour the same ones.
    """
    mean = F.normalize(x.mean(0), dim=0)
    x = F.normalize(x - x.mean(0) - (x - x.mean(0)) @ torch.outer(mean, mean), dim=1)
    some = x[torch.randint(len(x), (256,), generator=g)]  # few, or outliers would be the first rows
    rows = some[:1]
    for _ in range(n - 1):  # the token that is farthest from all rows
        rows = torch.cat((rows, some[(some @ rows.T).amax(1).argmin()][None]))
    for _ in range(20):
        members = F.one_hot((x @ rows.T).argmax(1), n).to(x.dtype)  # (S, n)
        rows = F.normalize(members.T @ x + 1e-6 * rows, dim=1)  # a row without members stays
    return rows


def add_noise(o, w, p):
    """w + noise_std · std(w) · N(0, 1) on a random share noise_fraction of its entries. The first thread that
    wants the std of a dense matrix computes it for all its experts."""
    with STD_LOCK:
        p.std[:] = p.std or [wide(w).std().item()]  # a tensor would pin the freed heap below it
    return add_normal(w, o.noise_std * p.std[0], generator(o.seed, p.name), o.noise_fraction)


def dropped(o, t, p):
    """The channels to draw anew: one set for an expert, or one for each of its matrices."""
    matrix = (p.part,) if o.method == "drop_per_matrix" else ()
    order = torch.randperm(t.shape[p.channels],
                           generator=generator(o.seed, "channels", p.layer, p.expert, *matrix))
    return order[:round(o.drop_ratio * len(order))]


def drop(o, w, p):
    channels = dropped(o, w, p)
    if not len(channels):
        return w
    block = w.index_select(p.channels, channels)
    std, mean = torch.std_mean(wide(block))
    return w.index_copy_(p.channels, channels, add_normal(block.fill_(mean), std, generator(o.seed, p.name)))


def theory_of_drop(o, dense):
    r = round(o.drop_ratio * dense.intermediate_size) / dense.intermediate_size
    matrices = 3 if o.method == "drop_per_matrix" else 1
    return {"channels_kept": (1 - r) ** matrices, "weight_change": math.sqrt(2 * r)}


def costs_of_groups(o, sources):
    E, k, G = o.num_local_experts, o.num_experts_per_tok, o.granularity
    channels = sources[0].config.intermediate_size
    if channels % G:
        raise ConfigError(f"granularity = {G} does not divide intermediate_size {channels} into equal slices")
    costs = []
    if k % G:
        costs.append(f"num_experts_per_tok = {k} is not a multiple of granularity = {G}: {k % G} of a "
                     "token's experts are part of a group and do not add up to an MLP")
    if E % G:
        costs.append(f"num_local_experts = {E} is not a multiple of granularity = {G}: the last group lacks "
                     f"{G - E % G} of its slices")
    return costs


def costs_of_merge(o, sources):
    n, E, dense = len(sources), o.num_local_experts, sources[0].config
    for s in sources[1:]:
        for key, value in asdict(dense).items():
            found = getattr(s.config, key)
            if found != value and not key.endswith(("_token_id", "position_embeddings", "initializer_range")):
                raise ConfigError(f"{s.path}: {key} = {found}, but {value} in {o.source}: merge equal shapes")
    if n == 1:
        raise ConfigError("--method=merge needs further checkpoints after the destination")
    if o.optimizer == "copy":
        raise ConfigError("--optimizer=copy: merged checkpoints have a set of moments each, and no right one")
    uneven = f"num_local_experts = {E} is not a multiple of the {n} checkpoints: some have more experts"
    return [uneven] if E % n else []


DROP = Method(drop, lambda o, m, p, power: m.index_fill_(p.channels, dropped(o, m, p), 0), theory_of_drop,
              knobs=("drop_ratio",))
METHODS = {
    "copy": Method(theory=lambda o, dense: SAME_WEIGHTS | SAME_FUNCTION),
    "noise": Method(
        weights=add_noise,
        theory=lambda o, dense: {"channels_kept": float(o.noise_std * o.noise_fraction == 0),
                                 "weight_change": o.noise_std * math.sqrt(o.noise_fraction)},
        knobs=("noise_std", "noise_fraction")),
    "drop": DROP,
    "drop_per_matrix": DROP,
    "virtual_groups": Method(
        weights=lambda o, w, p: w * o.granularity if p.part == 2 else w,
        # a weight G times as large has a gradient G times smaller
        moments=lambda o, m, p, power: m / o.granularity ** power if p.part == 2 else m,
        theory=lambda o, dense: SAME_WEIGHTS | SAME_FUNCTION,
        costs=costs_of_groups,
        knobs=("granularity",)),
    "merge": Method(
        theory=lambda o, dense: SAME_WEIGHTS,
        costs=costs_of_merge,
        knobs=("merge_shared",))}
