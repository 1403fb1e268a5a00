"""Directories that are complete or not there, and limits to the sizes in a stranger's checkpoint."""
import contextlib
import errno
import os
import shutil
from typing import Literal

from configurator import ConfigError, convert, lock, writing

# ---------------------------------------------------------------------------------------------------------
# Limits

# What config.json may say of a field: its type, the least and the most. A table of positions, of tensors or
# of experts beyond these takes more memory or time than any model there is.
LIMITS = {
    "vocab_size": (int, 1, 2**22), "hidden_size": (int, 1, 2**17), "intermediate_size": (int, 1, 2**20),
    "num_hidden_layers": (int, 1, 2**12), "num_attention_heads": (int, 1, 2**12),
    "num_key_value_heads": (int, 1, 2**12), "head_dim": (int, 1, 2**13),
    "max_position_embeddings": (int, 1, 2**24), "rms_norm_eps": (float, 0, 1), "rope_theta": (float, 1, 1e12),
    "rope_scaling": (dict,), "tie_word_embeddings": (bool,), "initializer_range": (float, 0, 1e3),
    "bos_token_id": (int,), "eos_token_id": (int | list[int],), "pad_token_id": (int,),
    "num_local_experts": (int, 0, 2**16), "num_experts_per_tok": (int, 1, 2**16),
    "router_aux_loss_coef": (float, 0, 1e6)}
MOST_EXPERTS = 2**16  # of all layers together
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes of this machine

COUNT, WORD = (int, 0), (str | None,)
STATE = {"step": COUNT, "tokens": COUNT, "skipped": COUNT, "sequence": COUNT, "max_seq_len": COUNT,
         "data_seed": COUNT, "passing": (bool,), "history": (list[list],), "lineage": (dict,),
         "dataset": WORD, "data_sha256": WORD, "tokenizer": WORD, "trunk": WORD}
LINEAGE = {"family": (Literal["dense", "moe", "upcycled"],), "N": (int, 1), "D1": (int | None, 0),
           "method": WORD, "dense_trunk": WORD}


def check_model(c):
    """`c`, a ModelConfig. Raises ConfigError where it is beyond LIMITS, or has more than MOST_EXPERTS."""
    if c.num_hidden_layers * c.num_local_experts > MOST_EXPERTS:
        raise ConfigError(f"num_local_experts = {c.num_local_experts} in each of {c.num_hidden_layers} "
                          f"layers are more than {MOST_EXPERTS:,} together")
    for key, limits in LIMITS.items():
        if getattr(c, key) is not None:
            convert(key, getattr(c, key), *limits)
    return c


def check_state(path, state):
    """Raises ConfigError where the content of a trainer_state.json is not of the types in STATE."""
    for values, limits in ((state, STATE), (state["lineage"], LINEAGE)):
        for key in values.keys() & limits.keys():
            convert(f"{path}: {key}", values[key], *limits[key])
    for entry in state.get("history", ()):
        if list(map(type, entry)) != [str, int] or not 0 <= entry[1] <= 10**18:
            raise ConfigError(f"{path}: history: {entry!r:.100} is not [run, tokens]")


# ---------------------------------------------------------------------------------------------------------
# Directories

def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_directory(path, needed=0):
    """Yields a temporary sibling of `path` to fill, which is synced and renamed to `path` at the end.
    Whatever goes wrong and whenever the process dies, `path` is absent or complete. Raises ConfigError when
    `path` exists or is being written, or when the disk has no room for `needed` bytes or fails."""
    path = os.path.normpath(path)
    if os.path.exists(path):
        raise ConfigError(f"{path}: already exists; remove it or choose another name")
    parent = os.path.dirname(path) or "."
    temporary, held = os.path.join(parent, f".{os.path.basename(path)}.tmp"), f"{path}: is being written"
    with writing(path, needed), contextlib.ExitStack() as stack:
        os.makedirs(temporary, exist_ok=True)
        fd = os.open(temporary, os.O_RDONLY)
        stack.callback(os.close, fd)
        lock(fd, held)
        if not (os.path.exists(temporary) and os.path.samestat(os.stat(temporary), os.fstat(fd))):
            raise ConfigError(held)  # the other process has just finished
        try:
            if os.path.exists(path):
                raise ConfigError(held)
            for name in os.listdir(temporary):  # left by a killed writer of this directory
                os.remove(os.path.join(temporary, name))
            if shutil.disk_usage(parent).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield temporary
            for name in os.listdir(temporary):
                sync(os.path.join(temporary, name))
            sync(temporary)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(parent)
