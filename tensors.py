"""Safetensors files, one or shards with an index: opened without being read, written a tensor at a time."""
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from configurator import ConfigError, check_file, one_line, read_json

WEIGHTS = "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
MOST_HEADER = 2**25  # bytes of a safetensors header that is read


class Span(NamedTuple):
    """A tensor in an open safetensors file, and the place of its bytes."""
    name: str
    shape: tuple
    dtype: torch.dtype | str  # the file's word for it where DTYPES has none
    file: safe_open
    path: str
    start: int
    nbytes: int
    first_row: int | None = None  # of the tensor in the file, where this is a part of it

    def rows(self, start, shape):
        """The Span of a part of shape `shape` that begins at row `start`."""
        row_bytes = self.nbytes // self.shape[0]
        return self._replace(shape=shape, start=self.start + start * row_bytes, nbytes=shape[0] * row_bytes,
                             first_row=start)

    def read(self):  # a memory map
        t = self.file.get_tensor(self.name)
        return t if self.first_row is None else t[self.first_row:self.first_row + self.shape[0]]

    def read_finite(self):
        """The tensor. Raises ConfigError where it is not finite."""
        if not is_finite(t := self.read()):
            raise ConfigError(f"{self.path}: {self.name} is not finite")
        return t

    def copy_to(self, f):
        """Append the bytes to f inside the kernel: a third of the CPU time of writing out a memory map."""
        f.flush()
        position, end = self.start, self.start + self.nbytes
        with open(self.path, "rb") as source:
            while position < end:
                sent = os.sendfile(f.fileno(), source.fileno(), position, end - position)
                if not sent:
                    raise OSError(f"{self.path} ended early")
                position += sent


def is_finite(t):
    """Whether all numbers of a tensor are finite, in a twentieth of the time of t.isfinite().all()."""
    return not t.numel() or bool(torch.stack(torch.aminmax(t)).isfinite().all())


def open_tensors(directory, stored=WEIGHTS):
    """{tensor name: Span} of the file `stored` or its shards, of which only the headers are read. Raises
    ConfigError for a missing, truncated or lying file, for a header beyond MOST_HEADER, for an index that
    points outside the directory or at a tensor that is not in its file, and for pickled weights, which are
    never loaded."""
    index = os.path.join(directory, f"{stored}.index.json")
    files, weight_map = [stored], {}
    if not os.path.exists(os.path.join(directory, files[0])):
        if not os.path.exists(index):
            raise ConfigError(f"{directory}: has no {stored}; pickled weights are never loaded")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index}: has no weight_map of tensor names to files")
        files = sorted(set(map(str, weight_map.values())))
    tensors = {}
    for file in files:
        path = os.path.join(directory, file)
        if os.path.basename(file) != file or not file.endswith(os.path.splitext(stored)[1]):
            raise ConfigError(f"{index}: points at '{file}', not a safetensors file of its own folder")
        check_file(path)
        try:
            with open(path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                if length > MOST_HEADER:
                    raise OSError(f"its header of {length:,} bytes is longer than {MOST_HEADER:,}")
                opened = safe_open(path, "pt")  # it compares the header with the file
                header = json.loads(f.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(f"{path}: not a complete safetensors file: {one_line(error)}") from None
        for name in opened.keys():
            if not weight_map or weight_map.get(name) == file:  # two files may have tensors of one name
                shape, dtype, (start, end) = (header[name][key] for key in ("shape", "dtype", "data_offsets"))
                tensors[name] = Span(name, tuple(shape), DTYPES.get(dtype, dtype), opened, path,
                                     8 + length + start, end - start)
    for name, file in weight_map.items():
        if name not in tensors:
            raise ConfigError(f"{index}: {file} does not hold {name}")
    return tensors


def check_tensors(directory, tensors, shapes):
    """Compare open_tensors' result with shapes {name: shape}. Position tables and the copy of a tied head are
    ignored. Raises ConfigError naming the tensor that does not fit."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise ConfigError(f"{directory}: tensor {name} is missing")
        span = tensors[name]
        if span.shape != shape:
            raise ConfigError(f"{directory}: {name} is {span.shape}, config.json wants {shape}")
        if span.dtype not in DTYPES.values():
            raise ConfigError(f"{directory}: {name} is {span.dtype}, none of {', '.join(DTYPES)}")
    for name in sorted(set(tensors) - set(shapes)):
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
            raise ConfigError(f"{directory}: tensor {name} is none of this architecture's")


def write_json(directory, name, value):
    with open(os.path.join(directory, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)


@dataclass
class Stored:
    """A tensor of a file that is to be written."""
    name: str
    shape: tuple
    dtype: torch.dtype

    @property
    def bytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(directory, pieces, tensors, shard_size, stored=WEIGHTS):
    """The file `stored`, or shards of at most shard_size bytes (a larger tensor alone) and their index, of
    pieces, [Stored]. tensors: an iterator over their tensors, or over Spans that have the very bytes."""
    shards, size = [[]], 0
    for p in pieces:
        size += p.bytes
        if shards[-1] and size > shard_size:
            shards.append([])
            size = p.bytes
        shards[-1].append(p)
    if len(shards) == 1:
        return write_shard(os.path.join(directory, stored), pieces, tensors)
    weight_map, (stem, suffix) = {}, os.path.splitext(stored)
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}{suffix}"
        write_shard(os.path.join(directory, name), shard, tensors)
        weight_map |= {p.name: name for p in shard}
    total = {"total_size": sum(p.bytes for p in pieces)}
    write_json(directory, f"{stored}.index.json", {"metadata": total, "weight_map": weight_map})


def write_shard(path, pieces, tensors):
    """A safetensors file: the header, then each tensor. Memory holds one tensor at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for p in pieces:
        start, end = end, end + p.bytes
        header[p.name] = {"dtype": names[p.dtype], "shape": p.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for p in pieces:
            t = next(tensors)
            assert t.shape == p.shape and t.dtype == p.dtype, p.name
            if isinstance(t, Span) and sys.platform == "linux":
                t.copy_to(f)
            else:
                t = t.read() if isinstance(t, Span) else t
                f.write(t.contiguous().view(-1).view(torch.uint8).numpy())
            del t  # before the next one is made
