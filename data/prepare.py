"""Text -> tokens: data/<name>/{train,val}.npy, each one flat array of token ids, and meta.json about them.

    python data/prepare.py pysource                           # Python sources of this installation
    python data/prepare.py corpus.jsonl.gz --tokenizer=bpe    # or .txt, .parquet, or a directory of files
    python data/prepare.py HuggingFaceFW/fineweb-edu --dataset_config=sample-10BT --tokenizer=gpt2

All sources go one way. Each document is appended to a spool on disk as it comes. Its key is sha256(seed,
text). Sorting by key shuffles the documents in an order that depends on seed and content alone. Equal
neighbours in that order are exact duplicates. The first documents, up to val_fraction of the text, are the
validation set, so it is the same for every tokenizer.
"""
import array
import contextlib
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
from configurator import (REQUIRED, ConfigError, check_file, naming, one_line, parse_json,  # noqa: E402
                          progress, read_json, run, setting)

import numpy as np  # noqa: E402
from data.stream import DATA, load_tokens  # noqa: E402
from files import atomic_directory  # noqa: E402

# tokenizers, tiktoken and datasets are imported where they are used, since most uses need none of them.
END_OF_TEXT = "<|endoftext|>"
MOST_TEXT = 2**26        # bytes of one text and of a line of .jsonl; characters of a row of .parquet
MOST_TOKENIZER = 2**26   # bytes of a tokenizer.json
MOST_IDS = 2**22         # entries of a vocabulary


@dataclass
class Options:
    """Turn text into tokens: out_dir/{train,val}.npy and meta.json."""
    source: str = setting(REQUIRED, "pysource (Python sources of this installation), a text, .jsonl "
                          "or parquet file, a directory of them, or a Hugging Face dataset", positional=True)
    out_dir: str = setting("", "directory to write; empty: data/<name of the source>")
    tokenizer: str = setting("bytes", "bytes (256 and end-of-text), bpe (byte-level, trained on the training "
                             "documents), gpt2, or the path of a tokenizer.json")
    bpe_vocab_size: int = setting(1024, "size of the bpe vocabulary, end-of-text included", least=257)
    seed: int = setting(0, "seed of the shuffle and of the split into train and val")
    val_fraction: float = setting(0.01, "share of the text in val, one document at least", least=0, most=1)
    text_field: str = setting("text", "field of the text in .jsonl, .parquet and Hugging Face datasets")
    dataset_config: str | None = setting(None, "configuration of the Hugging Face dataset, e.g. sample-10BT")
    dataset_split: str = setting("train", "split of the Hugging Face dataset")
    max_bytes: int | None = setting(None, "reading stops after so many bytes of text", least=1)


# ---------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer(NamedTuple):
    """Text <-> token ids. No text encodes to end-of-text, and end-of-text decodes to nothing."""
    encode: Callable  # texts -> the token ids of each
    decode: Callable  # token ids -> text
    vocab_size: int
    eos_token_id: int
    files: dict = {}  # {name: text} of tokenizer.json and what says its end of text


BYTES = Tokenizer(  # UTF-8; 256 ends a text
    lambda texts: [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts],
    lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", "replace"), vocab_size=257, eos_token_id=256)


def of_tiktoken(encoding):
    return Tokenizer(lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()),
                     lambda ids: encoding.decode([i for i in ids if i != encoding.eot_token]),
                     encoding.n_vocab, encoding.eot_token)


def end_of_text(tokenizer, folder):
    """The id that ends a text: files in `folder` state it, or else it is one of the usual names. Or None."""
    stated = {}
    for name in ("config.json", "meta.json", "tokenizer_config.json"):
        with contextlib.suppress(ConfigError):  # no such file, or no dict in it
            stated |= read_json(folder / name)
    token, ids = stated.get("eos_token"), stated.get("eos_token_id")
    candidates = [token.get("content") if isinstance(token, dict) else token,  # {"content": "</s>", ...}
                  *(ids if isinstance(ids, list) else [ids]), END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"]
    ids = [tokenizer.token_to_id(c) if isinstance(c, str) else c for c in candidates]
    return next((i for i in ids if type(i) is int and 0 <= i < MOST_IDS), None)


def of_file(path):
    """The Tokenizer of a tokenizer.json. Raises ConfigError."""
    import tokenizers
    check_file(path, MOST_TOKENIZER)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises nothing narrower, and its panics are no Exception
        raise ConfigError(f"{path}: cannot be read as a tokenizer.json: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    eos_token_id = end_of_text(tokenizer, path.parent)
    if eos_token_id is None:
        raise ConfigError(f"{path}: no end-of-text; name it as eos_token in tokenizer_config.json beside it")
    vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if not eos_token_id < vocab_size <= MOST_IDS:
        raise ConfigError(f"{path}: its vocabulary ends at {vocab_size:,}; it has to hold end-of-text, "
                          f"{eos_token_id}, and to end at {MOST_IDS:,}")
    return of_tokenizers(tokenizer, vocab_size, eos_token_id)


def of_tokenizers(tokenizer, vocab_size, eos_token_id):
    """The Tokenizer of one of the package tokenizers."""
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
    files = {"tokenizer.json": tokenizer.to_str(pretty=True),
             "tokenizer_config.json": json.dumps({"eos_token": tokenizer.id_to_token(eos_token_id)})}
    return Tokenizer(lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)],
                     lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
                     vocab_size, eos_token_id, files)


def load_tokenizer(name_or_path):
    """A Tokenizer by its name (bytes, gpt2), or by a tokenizer.json or its folder. Raises ConfigError."""
    if name_or_path == "bytes":
        return BYTES
    if name_or_path == "gpt2":
        import tiktoken
        try:
            return of_tiktoken(tiktoken.get_encoding("gpt2"))
        except (OSError, ValueError) as error:  # no network; a damaged download
            raise ConfigError(f"tokenizer gpt2: no download ({type(error).__name__}); set TIKTOKEN_CACHE_DIR "
                              "to a folder that holds it, or use --tokenizer=bytes") from None
    path = Path(name_or_path, "tokenizer.json") if os.path.isdir(name_or_path) else Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"tokenizer {name_or_path!r}: neither bytes, bpe, gpt2 nor a tokenizer.json")
    return of_file(path)


def train_bpe(texts, vocab_size):
    """A byte-level BPE (tokenizers.Tokenizer) of `vocab_size` entries: end-of-text, 256 bytes, merges."""
    import tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


# ---------------------------------------------------------------------------------------------------------
# Sources: generators of texts

def pysource_versions():
    """{package: installed version} of the packages in requirements.txt."""
    names = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    return {name: importlib.metadata.version(name) for name in names}


def pysource_files():
    """The .py files of the standard library and of the packages in requirements.txt."""
    stdlib, packages = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages"}
    files = [p for p in sorted(stdlib.rglob("*.py")) if not packages & set(p.relative_to(stdlib).parts)]
    for name in pysource_versions():
        package = importlib.metadata.files(name) or []
        files += [Path(p.locate()) for p in package if p.suffix == ".py" and p.parts[0] != ".."]
    return files


def local_files(source):
    """The file itself, or the files in a directory: the data files if there are any, and no hidden ones."""
    if not source.is_dir():
        return [source]
    files = sorted(p for p in source.rglob("*") if p.is_file() and "/." not in f"/{p.relative_to(source)}")
    return [p for p in files if re.search(r"\.(jsonl|jsonl\.gz|parquet|arrow)$", p.name)] or files


def text_of(row, field):
    """The text in a row of data, "" for null. Raises ValueError."""
    row = row if isinstance(row, dict) else {}
    if field not in row:
        raise ValueError(f"no field {field!r} (--text_field); there are: {', '.join(row) or 'none'}")
    if not isinstance(row[field], str | None):
        raise ValueError(f"field {field!r} is not text but {type(row[field]).__name__}")
    if len(row[field] or "") > MOST_TEXT:
        raise ValueError(f"field {field!r} holds a text of more than {MOST_TEXT:,} characters")
    return row[field] or ""


def read_datasets(field, *args, **kwargs):
    """The texts of datasets.load_dataset(*args, **kwargs), streamed."""
    from datasets import load_dataset
    for library in ("datasets", "huggingface_hub"):  # they log each error that they raise, and each retry
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for row in load_dataset(*args, **kwargs, streaming=True):
        yield text_of(row, field)


def pieces(file, path, piece_bytes):
    """Yields an open file in pieces of whole lines, each of `piece_bytes` or more but for the last. Raises
    ConfigError for a piece beyond MOST_TEXT, which a tiny archive can hold."""
    piece = bytearray()
    while line := file.readline(MOST_TEXT + 1):
        piece += line
        if len(piece) > MOST_TEXT:
            raise ConfigError(f"{path}: holds a text of more than {MOST_TEXT:,} bytes; cut it by lines")
        if len(piece) >= piece_bytes:
            yield piece
            piece = bytearray()
    if piece:
        yield piece


def read_file(path, field, piece_bytes):
    """The texts of a file: a text file is cut into pieces of lines, each of `piece_bytes` or more. Bytes that
    are not UTF-8 become surrogates. A binary file is an empty text."""
    check_file(path)
    if path.suffix in (".parquet", ".arrow"):
        yield from read_datasets(field, path.suffix[1:], data_files=str(path), split="train")
        return
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            for number, line in enumerate(pieces(file, path, 1), 1):
                with naming(f"{path}: line {number}"):
                    if line.strip():
                        yield text_of(parse_json(line.decode("utf-8", "surrogateescape")), field)
        elif b"\0" in (file.peek(2**13)[:2**13] or b"\0"):  # an empty file counts as a binary one
            yield ""
        else:
            for piece in pieces(file, path, piece_bytes):
                yield piece.decode("utf-8", "surrogateescape")


def read_source(options):
    """The texts of the source, in any order. Raises ConfigError for a source that cannot be read."""
    name, field = options.source, options.text_field
    try:
        if name == "pysource" or os.path.isdir(name):
            for name in pysource_files() if name == "pysource" else local_files(Path(name)):
                yield from read_file(name, field, math.inf)
        elif os.path.exists(name):  # val gets one at least of the pieces of a single text file
            piece_bytes = min(2**16, int(options.val_fraction * os.path.getsize(name)) + 1)
            yield from read_file(Path(name), field, piece_bytes)
        elif re.search(r"^[./~]|/.*/|\.(txt|jsonl|parquet|gz)$", name):  # a path
            raise ConfigError(f"{name}: no such file or directory")
        else:
            yield from read_datasets(field, name, options.dataset_config, split=options.dataset_split)
    except (ConfigError, ModuleNotFoundError):
        raise
    except Exception as error:  # each library under datasets raises its own kinds
        raise ConfigError(f"{name}: cannot be read: {one_line(error)}") from None


# ---------------------------------------------------------------------------------------------------------
# Documents -> spool -> sorted, without duplicates, split -> .npy

def write_spool(file, texts, options):
    """Write texts to `file` until it has max_bytes. Returns keys (n, 2) uint64, sizes (n,), and counts."""
    keys, sizes, salt = bytearray(), array.array("q"), f"{options.seed}\0".encode()
    counts = {"empty": 0, "bad_utf8": 0}
    with progress(options.max_bytes, f"reading {options.source}", "B") as bar:
        for text in texts:
            if not text:
                counts["empty"] += 1
                continue
            mended = re.sub("[\ud800-\udfff]", "\ufffd", text)  # a surrogate has no UTF-8
            counts["bad_utf8"] += mended != text
            data = mended.encode("utf-8")
            keys += hashlib.sha256(salt + data).digest()[:16]
            sizes.append(file.write(data))
            bar.update(len(data))
            if options.max_bytes and file.tell() >= options.max_bytes:
                break
    file.flush()
    return np.frombuffer(keys, ">u8").reshape(-1, 2), np.array(sizes, np.int64), counts


def split(keys, sizes, val_fraction):
    """{"train": (n_train,), "val": (n_val,)} document numbers, shuffled, without duplicates."""
    order = np.lexsort(keys.T)
    order = order[np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1))[:len(order)]]
    text_bytes = np.cumsum(sizes[order])
    n_val = min(np.searchsorted(text_bytes, val_fraction * sizes[order].sum()) + 1, len(order) - 1)
    return {"train": order[n_val:], "val": order[:n_val]}


def write_npy(path, texts, n_texts, tokenizer, dtype):
    """A new .npy file of the token ids of `texts`, each with end-of-text. Returns (tokens, sha256)."""
    header, n_tokens = {"descr": dtype.str, "fortran_order": False}, 0
    with open(path, "wb+") as f, progress(n_texts, f"writing {path.name}", "doc") as bar:
        np.lib.format.write_array_header_1_0(f, header | {"shape": (0,)})
        while batch := list(itertools.islice(texts, 256)):  # tokenizers use their threads
            for ids in tokenizer.encode(batch):
                f.write(np.append(ids, tokenizer.eos_token_id).astype(dtype))
                n_tokens += len(ids) + 1
            bar.update(len(batch))
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, header | {"shape": (n_tokens,)})  # numpy pads it
        f.seek(0)
        return n_tokens, hashlib.file_digest(f, "sha256").hexdigest()


def build(options, folder):
    """Write train.npy, val.npy and, if the tokenizer is a file, tokenizer.json to `folder`. Returns meta."""
    tokenizer = None if options.tokenizer == "bpe" else load_tokenizer(options.tokenizer)
    with tempfile.TemporaryFile(dir=folder) as spool:
        keys, sizes, counts = write_spool(spool, read_source(options), options)
        splits = split(keys, sizes, options.val_fraction)
        n_documents = {part: len(numbers) for part, numbers in splits.items()}
        n_distinct = sum(n_documents.values())
        if n_distinct < 2:
            raise ConfigError(f"{options.source}: the split needs two different documents; found {n_distinct}"
                              f", and {counts['empty']} empty texts or binary files")
        data, ends = np.memmap(spool, np.uint8, "r"), np.cumsum(sizes)

        def texts(part):
            return (data[ends[i] - sizes[i]:ends[i]].tobytes().decode("utf-8") for i in splits[part])

        if tokenizer is None:
            print(f"training a tokenizer on {sizes[splits['train']].sum():,} bytes", file=sys.stderr)
            trained = train_bpe(texts("train"), options.bpe_vocab_size)
            tokenizer = of_tokenizers(trained, trained.get_vocab_size(), trained.token_to_id(END_OF_TEXT))
        for name, text in tokenizer.files.items():
            (folder / name).write_text(text, "utf-8")
        dtype, n_tokens, sha256 = np.min_scalar_type(tokenizer.vocab_size - 1), {}, {}
        for part, n in n_documents.items():
            n_tokens[part], sha256[part] = write_npy(folder / f"{part}.npy", texts(part), n, tokenizer, dtype)
    name = "tokenizer.json" if tokenizer.files else options.tokenizer
    content = "\n".join([name, sha256["train"], sha256["val"]])
    return {"source": options.source, "tokenizer": name, "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_token_id, "dtype": dtype.name, "tokens": n_tokens,
            "documents": n_documents, "bytes": {part: int(sizes[i].sum()) for part, i in splits.items()},
            "duplicates": len(keys) - n_distinct, **counts, "sha256": sha256,
            "data_sha256": hashlib.sha256(content.encode()).hexdigest()}


# ---------------------------------------------------------------------------------------------------------
# A data set: complete or not there, and never changed

def prepare(options):
    """(meta, built): the data set of these options, built now unless it is there. Raises ConfigError."""
    source = Path(options.source)
    name = re.sub(r"(\.txt|\.jsonl|\.parquet)?(\.gz)?$", "", source.resolve().name)
    out = Path(options.out_dir or DATA / name)
    settings = {key: value for key, value in asdict(options).items() if key != "out_dir"}
    tokenizer = Path(options.tokenizer)
    tokenizer = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    inputs = local_files(source) if options.source != "pysource" and source.exists() else []
    inputs += [tokenizer] if tokenizer.is_file() else []
    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in inputs]
    settings["inputs"] = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    if options.source == "pysource":
        settings["versions"] = {"python": platform.python_version()} | pysource_versions()
    if os.path.exists(out):
        with contextlib.suppress(ConfigError):
            meta, _ = [load_tokens(out, part)[1] for part in ("train", "val")]
            if meta.get("settings") == settings:
                return meta, False
        raise ConfigError(f"{out}: is not what these settings and this input give; delete it, or choose "
                          "another with --out_dir=DIR")
    text_bytes = sum(size for _, size, _ in stamps)
    with atomic_directory(out, min(text_bytes, options.max_bytes or text_bytes)) as folder:
        meta = {"name": out.resolve().name} | build(options, Path(folder)) | {"settings": settings}
        Path(folder, "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta, True


def main(options):
    meta, built = prepare(options)
    for key in ("documents", "tokens", "bytes", "duplicates", "empty", "bad_utf8", "data_sha256"):
        print(f"{key:12} {meta[key]}")
    print("built" if built else "already there with these settings: nothing to do")


if __name__ == "__main__":
    run(main, Options)
