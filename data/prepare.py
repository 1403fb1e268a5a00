"""Text -> tokens: data/<name>/{train,val}.npy, each one flat array of token ids, and meta.json, which describes them.

    python data/prepare.py pysource                                   # Python sources of this installation, nothing to download
    python data/prepare.py corpus.jsonl.gz --tokenizer=bpe            # .txt, .jsonl, .parquet (also .gz), or a directory of them
    python data/prepare.py HuggingFaceFW/fineweb-edu --dataset_config=sample-10BT --tokenizer=gpt2 --max_tokens=1e9

One way for every source: documents are tokenised as they come and appended to a spool on disk; each has the key
sha256(seed, text). Sorted by key they are shuffled in an order that depends on nothing but seed and content, equal
neighbours are exact duplicates, and the first ones, up to val_fraction of the text, are the validation set. So the
split is by document, and the same whatever the tokenizer. Memory: about 50 bytes a document.
"""
import array
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
from configurator import REQUIRED, ConfigError, configure, setting  # noqa: E402

DATA = ROOT / "data"
END_OF_TEXT = "<|endoftext|>"


@dataclass
class Options:
    """Turn text into tokens: out_dir/{train,val}.npy and meta.json."""
    source: str = setting(REQUIRED, "pysource (Python sources of the standard library and of the packages in requirements.txt), "
                          "a text, .jsonl or .parquet file (also .gz), a directory of such files, or the name of a Hugging Face dataset",
                          positional=True)
    out_dir: str = setting("", "where to write; empty: data/<name of the source>")
    tokenizer: str = setting("bytes", "bytes (256 and end-of-text), bpe (byte-level, trained on the training documents), gpt2, "
                             "or the path of a tokenizer.json")
    bpe_vocab_size: int = setting(1024, "vocabulary of --tokenizer=bpe, end-of-text included")
    seed: int = setting(0, "of the shuffle and of the split into train and val")
    val_fraction: float = setting(0.01, "share of the text, in whole documents, that is held out as val")
    text_field: str = setting("text", "the field or column that holds the text, in .jsonl, .parquet and Hugging Face datasets")
    dataset_config: str | None = setting(None, "Hugging Face datasets: the configuration, e.g. sample-10BT")
    dataset_split: str = setting("train", "Hugging Face datasets: the split to read")
    max_tokens: int | None = setting(None, "stop reading the source after so many tokens (bytes for --tokenizer=bpe)")


# ---------------------------------------------------------------------------------------------------------
# What train.py, sweep.py and sample.py use

def load_tokens(directory, split):
    """(tokens, meta): the memory-mapped ids, shape (tokens,), unsigned, of `split` (train|val), and the dict in meta.json.

    `directory` is a path, or a name under data/. Raises ConfigError when anything is missing, cut short or not as meta.json says.
    """
    folder = Path(directory) if Path(directory).is_dir() else DATA / directory
    fix = f"make it with: python data/prepare.py {Path(directory).name}"
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        dtype, count = np.dtype(meta["dtype"]), meta["tokens"][split]
        path = folder / f"{split}.npy"
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {fix}") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(f"{path}: cut short or damaged ({type(error).__name__}: {error}); delete {folder}, then {fix}") from None
    if tokens.dtype != dtype or dtype.kind != "u" or tokens.shape != (count,):
        raise ConfigError(f"{path}: holds {tokens.dtype} {tokens.shape}, but meta.json says {dtype} ({count},); "
                          f"delete {folder}, then {fix}")
    return tokens, meta


class Bytes:
    """UTF-8 bytes; 256 ends a text."""
    vocab_size, eos_token_id = 257, 256

    def encode(self, text):
        return list(text.encode("utf-8"))

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def load_tokenizer(name_or_path):
    """A tokenizer by name or path: .encode(str) -> list of ids, .decode(ids) -> str, .vocab_size, .eos_token_id.

    End-of-text is never made out of text, and decodes to nothing. Raises ConfigError.
    """
    if name_or_path == "bytes":
        return Bytes()
    raise ConfigError(f"tokenizer: {name_or_path!r} is neither bytes, gpt2 nor the path of a tokenizer.json")


# ---------------------------------------------------------------------------------------------------------
# Sources: each yields (text, share of the source read so far or None); bytes that are not UTF-8 come as lone surrogates

def as_text(data):
    return data.decode("utf-8", "surrogateescape")


def pinned_versions():
    """{package: installed version} of requirements.txt. Raises ConfigError where the installation is not what is pinned."""
    versions = {}
    for name, pin in re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(f"pysource: {name} is not installed; run: pip install -r requirements.txt") from None
        if versions[name].split("+")[0] != pin:  # +cpu, +cu130: the same sources
            raise ConfigError(f"pysource: {name} is {versions[name]}, requirements.txt pins {pin}; run: pip install -r requirements.txt")
    return versions


def pysource():
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [p for p in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & set(p.relative_to(stdlib).parts)]
    for name in pinned_versions():
        files += [p.locate() for p in importlib.metadata.files(name) or [] if p.suffix == ".py" and p.parts[0] != ".."]
    for i, path in enumerate(files):
        yield as_text(Path(path).read_bytes()), (i + 1) / len(files)


def documents(options):
    if options.source == "pysource":
        return pysource()
    raise ConfigError(f"{options.source}: no such source")


# ---------------------------------------------------------------------------------------------------------
# Documents -> spool -> sorted, without duplicates, split -> .npy

def progress(items, label):
    """Pass (item, share done or None) pairs on as items, with a bar, or with a line now and then where stderr is no terminal."""
    from tqdm import tqdm
    terminal, start = sys.stderr.isatty(), time.time()
    last = start
    with tqdm(total=100, desc=label, disable=not terminal, bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}") as bar:
        for item, share in items:
            if share is not None:
                bar.update(100 * share - bar.n)
            if not terminal and time.time() - last > 15:
                last = time.time()
                left = f"{share:.0%}, {(last - start) * (1 / share - 1):.0f} s left" if share else f"{last - start:.0f} s"
                print(f"{label}: {left}", file=sys.stderr, flush=True)
            yield item


def batches(texts, size=2**22):
    """Lists of texts of about `size` characters each, so that tokenizers can use their threads."""
    batch, held = [], 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def spool(texts, tokenizer, path, seed, max_tokens, counts):
    """Tokens of all texts to a raw file in order of arrival. Returns keys (n, 2) uint64, bytes (n,), ends (n,) in the file."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    keys, sizes, ends = bytearray(), array.array("Q"), array.array("Q")
    total = 0

    def clean():
        for text in texts:
            if not text:
                counts["empty"] += 1
                continue
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                counts["bad_utf8"] += 1
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield text

    with open(path, "wb") as f:
        for batch in batches(clean()):
            for text, ids in zip(batch, tokenizer.encode_batch(batch)):
                data = text.encode("utf-8")
                keys += hashlib.sha256(f"{seed}\0".encode() + data).digest()[:16]
                f.write(np.append(np.asarray(ids, dtype), dtype.type(tokenizer.eos_token_id)))
                total += len(ids) + 1
                sizes.append(len(data))
                ends.append(total)
                if max_tokens and total >= max_tokens:
                    break
            if max_tokens and total >= max_tokens:
                break
    return np.frombuffer(keys, np.uint64).reshape(-1, 2), np.array(sizes, np.int64), np.array(ends, np.int64), dtype


def write_npy(path, pieces, dtype):
    """Append `pieces` to a new .npy file. Returns how many tokens it holds."""
    def header(f, count):  # numpy pads it, so that the count can be filled in at the end
        np.lib.format.write_array_header_1_0(f, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
        return f.tell()

    count = 0
    with open(path, "wb") as f:
        start = header(f, 0)
        for piece in pieces:
            f.write(np.ascontiguousarray(piece, dtype))
            count += len(piece)
        f.seek(0)
        assert header(f, count) == start
        f.flush()
        os.fsync(f.fileno())
    return count


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def build(options, settings, folder):
    """Write train.npy, val.npy and meta.json into `folder`. Returns meta."""
    counts = {"duplicates": 0, "empty": 0, "bad_utf8": 0}
    tokenizer = load_tokenizer(options.tokenizer)
    texts = progress(documents(options), f"reading {options.source}")
    keys, sizes, ends, dtype = spool(texts, tokenizer, folder / "spool", options.seed, options.max_tokens, counts)

    order = np.lexsort(keys.T)
    first = np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1))[:len(order)]
    counts["duplicates"] = int((~first).sum())
    order = order[first]
    if len(order) < 2:
        raise ConfigError(f"{options.source}: {len(order)} distinct documents; a split by document takes at least two")
    text_bytes = np.cumsum(sizes[order])
    cut = min(int(np.searchsorted(text_bytes, options.val_fraction * text_bytes[-1])) + 1, len(order) - 1)

    spooled = np.memmap(folder / "spool", dtype, "r")
    starts = ends - np.diff(ends, prepend=0)
    tokens, done = {}, 0
    for split, chosen in (("val", order[:cut]), ("train", order[cut:])):
        pieces = ((spooled[starts[i]:ends[i]], (n + 1) / len(chosen)) for n, i in enumerate(chosen))
        tokens[split] = write_npy(folder / f"{split}.npy", progress(pieces, f"writing {split}"), dtype)
    del spooled
    os.remove(folder / "spool")
    hashes = {split: sha256(folder / f"{split}.npy") for split in ("train", "val")}
    meta = {"name": Path(options.out_dir or options.source).name, "source": options.source, "tokenizer": options.tokenizer,
            "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id, "seed": options.seed, "dtype": dtype.name,
            "documents": {"train": len(order) - cut, "val": cut}, "tokens": tokens,
            "bytes": {"train": int(text_bytes[-1] - text_bytes[cut - 1]), "val": int(text_bytes[cut - 1])}, **counts, "sha256": hashes,
            "data_sha256": hashlib.sha256("".join([options.tokenizer, hashes["train"], hashes["val"]]).encode()).hexdigest(),
            "settings": settings}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta


def prepare(options):
    """Write the data set and return its meta, or only return it where the same settings have already been written."""
    out = Path(options.out_dir or DATA / re.sub(r"\.(txt|jsonl|parquet)?(\.gz)?$", "", Path(options.source).name))
    settings = asdict(options) | {"versions": {"python": platform.python_version()}}
    if options.source == "pysource":
        settings["versions"] |= pinned_versions()
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            meta = [load_tokens(out, split)[1] for split in ("train", "val")][0]
            if meta.get("settings") == settings:
                print(f"{out}: already there, nothing to do")
                return meta
        except ConfigError:
            pass
        partial = out / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            meta = build(options, settings, partial)
            (out / "meta.json").unlink(missing_ok=True)  # first out, last in: with it, all is complete
            for name in sorted(os.listdir(partial), key=lambda name: name == "meta.json"):
                os.replace(partial / name, out / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except BlockingIOError:
        raise ConfigError(f"{out}: another prepare.py is writing there") from None
    finally:
        os.close(lock)
    return meta


def main():
    options = configure(Options)
    try:
        meta = prepare(options)
    except (ConfigError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        raise SystemExit(2)
    for split in ("train", "val"):
        print(f"{split}: {meta['documents'][split]:,} documents, {meta['tokens'][split]:,} tokens, {meta['bytes'][split]:,} bytes")


if __name__ == "__main__":
    main()
