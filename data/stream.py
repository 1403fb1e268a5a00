"""Tokens -> batches: the token files that data/prepare.py wrote, and the order in which they are read."""
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from configurator import ConfigError, check_file, convert, read_json
from files import LIMITS

DATA = Path(__file__).resolve().parent
META = {"vocab_size": LIMITS["vocab_size"], "eos_token_id": (int | None, 0), "dtype": (str,),
        "tokenizer": (str,), "data_sha256": (str,), "tokens": (dict,)}  # keys of meta.json


def locate(directory):
    """The path of a data set given as a path or as a name under data/."""
    return Path(directory) if Path(directory).is_dir() else DATA / directory


def load_tokens(directory, split):
    """(tokens, meta) of `split` (train, val): memory-mapped ids, (tokens,) unsigned, and meta.json's dict.

    directory: a path, or a name under data/. Raises ConfigError for a file that is missing, cut short or not
    as meta.json says.
    """
    folder = locate(directory)
    fix = f"make it with: python data/prepare.py {Path(directory).name}"
    path = folder / "meta.json"
    try:
        meta = read_json(path)
        for key, limits in META.items():
            convert(key, meta[key], *limits)
        if meta.get("bytes"):
            convert("bytes", meta["bytes"][split], int)
        dtype, count = np.dtype(meta["dtype"]), convert("tokens", meta["tokens"][split], int)
        path = folder / f"{split}.npy"
        check_file(path)
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        if tokens.dtype != dtype or dtype.kind != "u" or tokens.shape != (count,):
            raise ValueError(f"holds {tokens.dtype} {tokens.shape}, but meta.json says {dtype} ({count},)")
        return tokens, meta
    except Exception as error:  # a damaged header can raise any kind
        if not path.exists():
            raise ConfigError(f"{path}: no such file; {fix}") from None
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: cut short or damaged ({problem:.200}); delete it and {fix}") from None


def bits_per_byte(loss, meta):
    """A validation loss in nats a token as bits a byte of the validation text, with which models of different
    tokenizers compare. meta: of load_tokens. None where it has no bytes."""
    count = (meta.get("bytes") or {}).get("val")
    return loss / math.log(2) * meta["tokens"]["val"] / count if count else None


def check_ids(directory, meta, *parts):
    """Raises ConfigError where a token id of the memory-mapped `parts` is beyond the vocabulary."""
    largest = max((int(part.max()) for part in parts if len(part)), default=0)
    if largest >= meta["vocab_size"]:
        raise ConfigError(f"{directory}: holds token {largest}, but vocab_size is {meta['vocab_size']} in "
                          "meta.json; prepare it again")


def shuffled(index, n, seed):
    """Where sequence `index` of an endless shuffled stream lies among n. index (…,) int -> (…,) int64.

    Each pass over n is a permutation keyed by (seed, pass): nothing repeats within a pass, and any index is
    found without those before it. The permutation is a Feistel network of 4 rounds on the smallest even
    number of bits, walked on while it leaves 0..n-1 (Black & Rogaway 2002).
    """
    index = np.asarray(index, np.uint64)
    turn, x = index // np.uint64(n), index % np.uint64(n)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x >> half, x & mask
        for round in range(4):
            key = np.random.SeedSequence((seed, round)).generate_state(1, np.uint64)[0]
            with np.errstate(over="ignore"):
                # The round function is splitmix64's finaliser.
                h = (right + turn * np.uint64(0x9E3779B97F4A7C15)) ^ key
                h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
                h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((h ^ (h >> np.uint64(31))) & mask)
        x = np.where(todo, (left << half) | right, x)
        todo = x >= np.uint64(n)
    return x.astype(np.int64)


def sequences(tokens, places, seq_len, device):
    """The sequences at `places` as (inputs, targets), (B, T) int64 each on `device`.

    A sequence's last target is the first input of the sequence behind it.
    """
    import torch  # preparing data needs none

    rows = np.stack([tokens[place * seq_len:(place + 1) * seq_len + 1] for place in places]).astype(np.int64)
    rows = torch.from_numpy(rows)  # (B, T + 1)
    if device.type == "cuda":
        with torch.cuda.device(device):  # a new thread has the first GPU, and pinning takes memory there
            rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:]


def batches(tokens, first, count, stride, seq_len, seed, device):
    """Yields (inputs, targets), (count, T) int64 each on `device`, without end.

    The first batch is the sequences first .. first + count - 1 of the stream shuffled by `seed`; each other
    one lies `stride` sequences further on. A thread makes a batch while the one before it is in use.
    """
    available = (len(tokens) - 1) // seq_len

    def batch(index):
        return sequences(tokens, shuffled(index + np.arange(count), available, seed), seq_len, device)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batch, first)
        while True:
            ready = ahead.result()
            first += stride
            ahead = pool.submit(batch, first)
            yield ready
