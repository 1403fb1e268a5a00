"""Text -> tokens: data/<name>/{train,val}.npy, each one flat array of token ids, and meta.json about them.

    python data/prepare.py pysource                           # Python sources of this installation
    python data/prepare.py corpus.jsonl.gz --tokenizer=bpe    # or .txt, .parquet, or a directory of files
    python data/prepare.py HuggingFaceFW/fineweb-edu --dataset_config=sample-10BT --tokenizer=gpt2

All sources go one way. Each document is tokenised as it comes and appended to a spool on disk. Its key is
sha256(seed, text). Sorting by key shuffles the documents in an order that depends on seed and content alone.
Equal neighbours in that order are exact duplicates. The first documents, up to val_fraction of the text, are
the validation set, so it is the same for every tokenizer. A document takes about 100 bytes of memory.
"""
import array
import contextlib
import fcntl
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
from configurator import REQUIRED, ConfigError, progress, run, setting, write_text_atomically  # noqa: E402
from data.stream import DATA, load_tokens  # noqa: E402

END_OF_TEXT = "<|endoftext|>"


@dataclass
class Options:
    """Turn text into tokens: out_dir/{train,val}.npy and meta.json."""
    source: str = setting(REQUIRED, "pysource (Python sources of the standard library and of the packages in "
                          "requirements.txt), a text, .jsonl or .parquet file, a directory of such files, or "
                          "the name of a Hugging Face dataset", positional=True)
    out_dir: str = setting("", "directory to write; empty: data/<name of the source>")
    tokenizer: str = setting("bytes", "bytes (256 and end-of-text), bpe (byte-level, trained on the training "
                             "documents), gpt2, or the path of a tokenizer.json")
    bpe_vocab_size: int = setting(1024, "size of the bpe vocabulary, end-of-text included", least=257)
    seed: int = setting(0, "seed of the shuffle and of the split into train and val")
    val_fraction: float = setting(0.01, "share of the text in val, one document at least", least=0, most=1)
    text_field: str = setting("text", "field of the text in .jsonl, .parquet and Hugging Face datasets")
    dataset_config: str | None = setting(None, "configuration of the Hugging Face dataset, e.g. sample-10BT")
    dataset_split: str = setting("train", "split of the Hugging Face dataset")
    max_tokens: int | None = setting(None, "reading stops after so many tokens (bytes with bpe)", least=1)


def need(module):
    """An optional package. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"this needs the package {module}; run: pip install {module}") from None


def one_line(error):
    return " ".join(str(error).split())


# ---------------------------------------------------------------------------------------------------------
# Tokenizers

@dataclass
class Tokenizer:
    """Text <-> token ids. No text encodes to end-of-text, and end-of-text decodes to nothing."""
    encode: Callable  # texts -> the token ids of each
    decode: Callable  # token ids -> text
    vocab_size: int
    eos_token_id: int
    save: Callable | None = None  # writes tokenizer.json to a path

    @property
    def dtype(self):
        return np.min_scalar_type(self.vocab_size - 1)


BYTES = Tokenizer(  # UTF-8; 256 ends a text
    lambda texts: [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts],
    lambda ids: bytes(i for i in ids if i < 256).decode("utf-8", "replace"), vocab_size=257, eos_token_id=256)


def of_tiktoken(encoding):
    return Tokenizer(lambda texts: encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count()),
                     lambda ids: encoding.decode([i for i in ids if i != encoding.eot_token]),
                     encoding.n_vocab, encoding.eot_token)


def of_file(path):
    """A tokenizer.json. Files beside it state the end-of-text, or else it is one of the usual names."""
    tokenizers, stated = need("tokenizers"), {}
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path}: cannot be read as a tokenizer.json: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
    for file in ("config.json", "meta.json", "tokenizer_config.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # no such file, or no dict in it
            stated |= json.loads((path.parent / file).read_text())
    token, ids = stated.get("eos_token"), stated.get("eos_token_id")
    candidates = [token.get("content") if isinstance(token, dict) else token,  # {"content": "</s>", ...}
                  *(ids if isinstance(ids, list) else [ids]), END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"]
    ids = [tokenizer.token_to_id(c) if isinstance(c, str) else c for c in candidates]
    eos_token_id = next((i for i in ids if isinstance(i, int)), None)
    if eos_token_id is None:
        raise ConfigError(f"{path}: no end-of-text; name it as eos_token in tokenizer_config.json beside it")
    return Tokenizer(
        lambda texts: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)],
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        max(tokenizer.get_vocab().values()) + 1, eos_token_id, tokenizer.save)


def load_tokenizer(name_or_path):
    """A Tokenizer by its name (bytes, gpt2), or by a tokenizer.json or its folder. Raises ConfigError."""
    if name_or_path == "bytes":
        return BYTES
    if name_or_path == "gpt2":
        try:
            return of_tiktoken(need("tiktoken").get_encoding("gpt2"))
        except (OSError, ValueError) as error:  # no network; a damaged download
            raise ConfigError(
                f"tokenizer gpt2: cannot be downloaded ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a "
                "folder where a machine with network has put it, or use --tokenizer=bytes") from None
    path = Path(name_or_path, "tokenizer.json") if os.path.isdir(name_or_path) else Path(name_or_path)
    if not path.is_file():
        raise ConfigError(f"tokenizer {name_or_path!r}: neither bytes, bpe, gpt2 nor a tokenizer.json")
    return of_file(path)


def train_bpe(texts, vocab_size):
    """A byte-level BPE (tokenizers.Tokenizer) of `vocab_size` entries: end-of-text, 256 bytes, merges."""
    tokenizers = need("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


# ---------------------------------------------------------------------------------------------------------
# Sources: generators of texts, str or bytes. `seen` counts what they leave out or mend

def pinned_versions():
    """{package: installed version} of requirements.txt. Raises ConfigError for another version."""
    versions, fix = {}, "run: pip install -r requirements.txt"
    for name, pin in re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.M):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
        if versions[name].split("+")[0] != pin:  # 2.13.0+cpu is a build of the sources of 2.13.0
            raise ConfigError(f"pysource: {name} is {versions[name]}, but requirements.txt pins {pin}; {fix}")
    return versions


def pysource_files():
    """The .py files of the standard library and of the packages in requirements.txt."""
    stdlib, packages = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages"}
    files = [p for p in sorted(stdlib.rglob("*.py")) if not packages & set(p.relative_to(stdlib).parts)]
    for name in pinned_versions():
        package = importlib.metadata.files(name) or []
        files += [Path(p.locate()) for p in package if p.suffix == ".py" and p.parts[0] != ".."]
    return files


def local_files(source):
    """The file itself, or the files in a directory: the data files if there are any, and no hidden ones."""
    if not source.is_dir():
        return [source]
    files = sorted(p for p in source.rglob("*") if p.is_file() and "/." not in f"/{p.relative_to(source)}")
    return [p for p in files if re.search(r"\.(jsonl|parquet)(\.gz)?$", p.name)] or files


def text_of(row, field, where):
    """The text in a row of data, "" for null. Raises ConfigError that starts with `where`."""
    if not isinstance(row, dict) or field not in row:
        names = ", ".join(row) if isinstance(row, dict) else "none"
        raise ConfigError(f"{where}: no field {field!r} (--text_field); there are: {names}")
    if not isinstance(row[field], str | None):
        raise ConfigError(f"{where}: field {field!r} is not text but {type(row[field]).__name__}")
    return row[field] or ""


def read_parquet(path, file, field):
    table = need("pyarrow.parquet").ParquetFile(file)
    text_of(dict.fromkeys(table.schema_arrow.names), field, path)  # the column must be there
    kind = str(table.schema_arrow.field(field).type)
    if kind not in ("string", "large_string"):
        raise ConfigError(f"{path}: field {field!r} is not text but {kind}")
    for batch in table.iter_batches(1024, columns=[field]):
        for data in batch.column(0).cast(kind.replace("string", "binary")).to_pylist():
            yield data or b""


def read_jsonl(path, file, field):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: line {number}: not valid JSON: {one_line(error)}") from None
            yield text_of(row, field, f"{path}: line {number}")


def read_text(path, file, piece_bytes, seen):
    """The file as one text if `piece_bytes` is 0, and else as texts of lines, each so long or longer."""
    if b"\0" in file.read(2**13):
        if piece_bytes:
            raise ConfigError(f"{path}: not UTF-8 text, it holds NUL bytes")
        seen["binary_files"] += 1
        return
    file.seek(0)
    if not piece_bytes:
        yield file.read()
    while data := b"".join(file.readlines(piece_bytes)):
        yield data


def read_file(path, field, piece_bytes, seen):
    """Texts of a file. `field` is for data files, and `piece_bytes` for text files."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if kind == ".parquet":
                yield from read_parquet(path, file, field)
            elif kind == ".jsonl":
                yield from read_jsonl(path, file, field)
            else:
                yield from read_text(path, file, piece_bytes, seen)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read, or cut short or damaged: {one_line(error)}") from None


def hub_documents(name, options):
    """The texts of a Hugging Face dataset, streamed, by its name or the directory of its files."""
    load_dataset = need("datasets").load_dataset
    need("huggingface_hub").utils.logging.set_verbosity_error()  # its retries would fill the screen
    try:
        rows = load_dataset(name, options.dataset_config, split=options.dataset_split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield text_of(row, options.text_field, f"{name}: document {number}")
    except ConfigError:
        raise
    except Exception as error:  # each library under datasets raises its own kinds
        raise ConfigError(f"{name}: no file, and no Hugging Face dataset that can be read: {one_line(error)} "
                          "(without network: give a directory of files)") from None


def documents(options, seen):
    """All texts of the source, in any order."""
    source = Path(options.source)
    if options.source != "pysource" and not source.exists():
        if re.search(r"^[./~]|/.*/|\.(txt|jsonl|parquet|gz)$", options.source):  # a path
            raise ConfigError(f"{options.source}: no such file or directory")
        yield from hub_documents(options.source, options)
        return
    files = pysource_files() if options.source == "pysource" else local_files(source)
    for number, path in enumerate(files):
        if path.suffix == ".arrow":
            raise ConfigError(f"{path}: .arrow files cannot be read; write the dataset with to_parquet")
        seen["share"] = number / len(files)
        piece_bytes = 0
        if path == source:  # the only file is cut into documents, of which val gets one at least
            piece_bytes = min(2**16, int(options.val_fraction * path.stat().st_size) + 1)
        yield from read_file(path, options.text_field, piece_bytes, seen)


def cleaned(texts, seen):
    """Texts as str, without the empty ones, and with U+FFFD for what is not UTF-8."""
    for text in texts:
        text = text if isinstance(text, str) else text.decode("utf-8", "surrogateescape")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a lone surrogate
            seen["bad_utf8"] += 1
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        seen["empty"] += not text
        if text:
            yield text


# ---------------------------------------------------------------------------------------------------------
# Documents -> spool -> sorted, without duplicates, split -> .npy

@dataclass
class Spool:
    """A file of the token ids of n documents, each with end-of-text, in order of arrival."""
    path: Path
    dtype: np.dtype
    keys: np.ndarray  # (n, 2) uint64
    sizes: np.ndarray  # (n,) bytes of text
    ends: np.ndarray  # (n,) where a document ends in the file, in tokens

    def ids(self, numbers):
        """The token ids of each of these documents."""
        tokens, starts = np.memmap(self.path, self.dtype, "r"), np.append(0, self.ends[:-1])
        return (tokens[starts[i]:self.ends[i]] for i in numbers)

    def texts(self, numbers):
        """The text of each of these documents, where the tokens are bytes."""
        return (ids[:-1].astype(np.uint8).tobytes().decode("utf-8") for ids in self.ids(numbers))


def encoded(texts, tokenizer):
    """(text, ids and end-of-text) of each text. Batches let tokenizers use their threads."""
    texts, dtype = iter(texts), tokenizer.dtype
    while batch := list(itertools.islice(texts, 256)):
        for text, ids in zip(batch, tokenizer.encode(batch)):
            yield text, np.append(np.asarray(ids, dtype), dtype.type(tokenizer.eos_token_id))


def write_spool(path, texts, tokenizer, options, seen):
    """A Spool of all texts, or of the first ones that have max_tokens."""
    keys, sizes, ends, total = bytearray(), array.array("q"), array.array("q"), 0
    salt, limit = f"{options.seed}\0".encode(), options.max_tokens
    with open(path, "wb") as f, progress(limit, f"reading {options.source}", "tok") as bar:
        for text, ids in encoded(texts, tokenizer):
            data = text.encode("utf-8")
            keys += hashlib.sha256(salt + data).digest()[:16]
            f.write(ids)
            total += len(ids)
            sizes.append(len(data))
            ends.append(total)
            bar.total = limit or (total / seen["share"] if seen["share"] else None)
            bar.update(len(ids))
            if limit and total >= limit:
                break
    keys = np.frombuffer(keys, ">u8").reshape(-1, 2)
    return Spool(path, tokenizer.dtype, keys, np.array(sizes), np.array(ends))


def split(spool, val_fraction):
    """{"train": (n_train,), "val": (n_val,)} document numbers, shuffled, without duplicates."""
    order = np.lexsort(spool.keys.T)
    is_first = np.append(True, (spool.keys[order[1:]] != spool.keys[order[:-1]]).any(axis=1))[:len(order)]
    order = order[is_first]
    text_bytes = np.cumsum(spool.sizes[order])
    n_val = min(np.searchsorted(text_bytes, val_fraction * spool.sizes[order].sum()) + 1, len(order) - 1)
    return {"train": order[n_val:], "val": order[:n_val]}


def write_npy(path, pieces, n_pieces, dtype):
    """A new .npy file of all `pieces`, arrays of ids. Returns (tokens, sha256)."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": (0,)}
    count = 0
    with open(path, "wb+") as f, progress(n_pieces, f"writing {path.name}", "doc") as bar:
        np.lib.format.write_array_header_1_0(f, header)
        for ids in pieces:
            f.write(ids)
            count += len(ids)
            bar.update()
        f.seek(0)
        np.lib.format.write_array_header_1_0(f, header | {"shape": (count,)})  # numpy pads it
        f.flush()
        os.fsync(f.fileno())
        f.seek(0)
        return count, hashlib.file_digest(f, "sha256").hexdigest()


def build(options, folder):
    """Write train.npy, val.npy and, if the tokenizer is a file, tokenizer.json to `folder`. Returns meta."""
    is_bpe, seen = options.tokenizer == "bpe", Counter()
    tokenizer = load_tokenizer("bytes" if is_bpe else options.tokenizer)
    spool = write_spool(folder / "spool", cleaned(documents(options, seen), seen), tokenizer, options, seen)
    splits = split(spool, options.val_fraction)
    n_documents = {part: len(numbers) for part, numbers in splits.items()}
    n_distinct = sum(n_documents.values())
    if n_distinct < 2:
        raise ConfigError(f"{options.source}: the split needs two different documents; found {n_distinct}, "
                          f"{seen['empty']} empty texts and {seen['binary_files']} binary files")

    n_bytes = {part: int(spool.sizes[numbers].sum()) for part, numbers in splits.items()}
    if is_bpe:
        print(f"training a tokenizer on {n_bytes['train']:,} bytes", file=sys.stderr, flush=True)
        train_bpe(spool.texts(splits["train"]), options.bpe_vocab_size).save(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(folder)
    elif tokenizer.save:
        tokenizer.save(str(folder / "tokenizer.json"))
    name = "tokenizer.json" if tokenizer.save else options.tokenizer

    dtype, n_tokens, sha256 = tokenizer.dtype, {}, {}
    for part, numbers in splits.items():
        pieces = spool.ids(numbers)
        if is_bpe:  # the spool holds bytes
            pieces = (ids for _, ids in encoded(spool.texts(numbers), tokenizer))
        n_tokens[part], sha256[part] = write_npy(folder / f"{part}.npy", pieces, n_documents[part], dtype)
    os.remove(spool.path)
    content = "\n".join([name, sha256["train"], sha256["val"]])
    return {"source": options.source, "tokenizer": name, "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_token_id, "dtype": dtype.name, "seed": options.seed,
            "tokens": n_tokens, "documents": n_documents, "bytes": n_bytes,
            "duplicates": len(spool.keys) - n_distinct, "empty": seen["empty"], "bad_utf8": seen["bad_utf8"],
            "binary_files": seen["binary_files"], "sha256": sha256,
            "data_sha256": hashlib.sha256(content.encode()).hexdigest()}


# ---------------------------------------------------------------------------------------------------------
# A data set: complete or not there, built again if its settings or its input changed

def fingerprint(*paths):
    """A hash of the names, sizes and times of change of all files under those of `paths` that exist."""
    files = [file for path in paths if path.exists() for file in local_files(path)]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


@contextlib.contextmanager
def locked(folder):
    """Hold the lock of a folder. Raises ConfigError if another process holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{folder}: another prepare.py is writing there") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


def rebuild(options, settings, out, old_meta):
    """Build a data set in a folder within `out`, then move its files to `out`. Returns meta."""
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # a killed run leaves it
    partial.mkdir()
    try:
        meta = {"name": out.resolve().name} | build(options, partial) | {"settings": settings}
        write_text_atomically(partial / "meta.json", json.dumps(meta, indent=1) + "\n")
        (out / "meta.json").unlink(missing_ok=True)  # it goes first and comes last: it says complete
        if old_meta.get("tokenizer") == "tokenizer.json":
            (out / "tokenizer.json").unlink(missing_ok=True)
        for name in sorted(os.listdir(partial), key=lambda name: name == "meta.json"):
            os.replace(partial / name, out / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            out.rmdir()  # an error may leave it empty
    return meta


def prepare(options):
    """(meta, built): the data set of these options, built now unless it is there. Raises ConfigError."""
    source = Path(options.source)
    name = (source.resolve() if source.exists() else source).name
    out = Path(options.out_dir or DATA / re.sub(r"(\.txt|\.jsonl|\.parquet)?(\.gz)?$", "", name))
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"out_dir: {out} lies in the source itself; choose another with --out_dir=DIR")
    settings = {key: value for key, value in asdict(options).items() if key != "out_dir"}
    settings["inputs"] = fingerprint(source, Path(options.tokenizer))
    if options.source == "pysource":
        settings["versions"] = {"python": platform.python_version()} | pinned_versions()

    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        old_meta = {}
        with contextlib.suppress(ConfigError):  # incomplete
            old_meta, _ = [load_tokens(out, part)[1] for part in ("train", "val")]
        has_tokenizer = old_meta.get("tokenizer") != "tokenizer.json" or (out / "tokenizer.json").exists()
        if old_meta.get("settings") == settings and has_tokenizer:
            return old_meta, False
        return rebuild(options, settings, out, old_meta), True


def main(options):
    try:
        meta, built = prepare(options)
    except OSError as error:  # no space left, no permission
        raise ConfigError(one_line(error)) from None
    for part in ("train", "val"):
        counts = [f"{meta[what][part]:,} {what}" for what in ("documents", "tokens", "bytes")]
        print(f"{', '.join(counts)} in {part}")
    if not built:
        print("already there with these settings: nothing to do")
        return
    print(f"left out: {meta['duplicates']:,} duplicates, {meta['empty']:,} empty texts, "
          f"{meta['binary_files']:,} binary files; {meta['bad_utf8']:,} texts are not UTF-8 and hold U+FFFD")


if __name__ == "__main__":
    run(main, Options)
