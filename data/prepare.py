"""Text -> tokens: data/<name>/{train,val}.npy, each one flat array of token ids, and meta.json, which describes them.

    python data/prepare.py pysource                                   # Python sources of this installation, nothing to download
    python data/prepare.py corpus.jsonl.gz --tokenizer=bpe            # or .txt, .parquet, a directory of them
    python data/prepare.py HuggingFaceFW/fineweb-edu --dataset_config=sample-10BT --tokenizer=gpt2 --max_tokens=1e9

One way for every source: documents are tokenised as they come and appended to a spool on disk; each has the key
sha256(seed, text). Sorted by key they are shuffled in an order that depends on nothing but seed and content, equal
neighbours are exact duplicates, and the first ones, up to val_fraction of the text, are the validation set. So the
split is by document, and the same whatever the tokenizer. Memory: about 100 bytes a document.
"""
import array
import contextlib
import fcntl
import gzip
import hashlib
import importlib
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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
from configurator import REQUIRED, ConfigError, progress, run, setting  # noqa: E402
from data.stream import DATA, load_tokens  # noqa: E402

END_OF_TEXT = "<|endoftext|>"


@dataclass
class Options:
    """Turn text into tokens: out_dir/{train,val}.npy and meta.json."""
    source: str = setting(REQUIRED, "pysource (Python sources of the standard library and of the packages in requirements.txt), "
                          "a text, .jsonl(.gz) or .parquet file, a directory of them, or the name of a Hugging Face dataset",
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
# Tokenizers

class Bytes:
    """UTF-8 bytes; 256 ends a text."""
    vocab_size, eos_token_id = 257, 256

    def encode(self, text):
        return list(text.encode("utf-8"))

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class Tiktoken:
    """An encoding of tiktoken, such as gpt2."""

    def __init__(self, encoding):
        self.encoding, self.vocab_size, self.eos_token_id = encoding, encoding.n_vocab, encoding.eot_token
        self.encode = encoding.encode_ordinary

    def encode_batch(self, texts):
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i != self.eos_token_id])


class TokenizerFile:
    """A tokenizer.json. End-of-text is what a file beside it says, or else the first of the usual names that it knows."""

    def __init__(self, path):
        try:
            self.tokenizer = need("tokenizers").Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"{path}: cannot be read as a tokenizer.json: {one_line(error)}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        candidates = [END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"]
        for name, key in (("config.json", "eos_token_id"), ("meta.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
            with contextlib.suppress(OSError, ValueError, LookupError, AttributeError):  # not there, or of another shape
                said = json.loads((path.parent / name).read_text()).get(key)
                candidates.insert(0, said["content"] if isinstance(said, dict) else said[0] if isinstance(said, list) else said)
        ids = [c if isinstance(c, int) else self.tokenizer.token_to_id(c) for c in candidates if c is not None]
        self.eos_token_id = next((i for i in ids if i is not None), None)
        if self.eos_token_id is None:
            raise ConfigError(f"{path}: no end-of-text token; name it as eos_token in a tokenizer_config.json beside it")

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(name_or_path):
    """A tokenizer by name (bytes, gpt2) or by the path of a tokenizer.json or of its directory:
    .encode(str) -> list of ids, .decode(ids) -> str, .vocab_size, .eos_token_id.

    Text never encodes to end-of-text, and end-of-text decodes to nothing. Raises ConfigError.
    """
    if name_or_path == "bytes":
        return Bytes()
    if name_or_path == "gpt2":
        try:
            return Tiktoken(need("tiktoken").get_encoding("gpt2"))
        except (OSError, ValueError) as error:  # no network; a damaged download
            raise ConfigError(f"tokenizer gpt2: tiktoken cannot download its vocabulary ({type(error).__name__}); set "
                              "TIKTOKEN_CACHE_DIR to a folder, run once where there is network and copy that folder here, "
                              "or choose --tokenizer=bytes, bpe or a tokenizer.json") from None
    path = Path(name_or_path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"tokenizer {name_or_path!r}: neither bytes, bpe, gpt2 nor a tokenizer.json that exists")
    return TokenizerFile(path)


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


def need(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"this needs the package {module}; run: pip install {module}") from None


def one_line(error):
    return " ".join(str(error).split())


# ---------------------------------------------------------------------------------------------------------
# Sources: generators of texts. Bytes that are not UTF-8 come as lone surrogates; `seen` takes counts and the share read so far

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
        if versions[name].split("+")[0] != pin:  # +cpu, +cu130: builds of the same sources
            raise ConfigError(f"pysource: {name} is {versions[name]}, but requirements.txt pins {pin}; "
                              "run: pip install -r requirements.txt")
    return versions


def pysource_files():
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted(stdlib.rglob("*.py")) if not {"site-packages", "dist-packages"} & set(p.relative_to(stdlib).parts)]
    for name in pinned_versions():
        files += [Path(p.locate()) for p in importlib.metadata.files(name) or [] if p.suffix == ".py" and p.parts[0] != ".."]
    return files


def kind_of(path):
    return next((kind for kind in ("jsonl", "parquet") if re.search(rf"\.{kind}(\.gz)?$", path.name)), "text")


def local_files(source):
    """The files to read at a path: itself, or those under it, data files only where there are any, hidden ones never."""
    if not source.is_dir():
        return [source]
    files = sorted(p for p in source.rglob("*") if p.is_file() and "/." not in f"/{p.relative_to(source)}")
    return [p for p in files if kind_of(p) != "text"] or files


def text_of(row, field, where):
    if not isinstance(row, dict) or field not in row:
        there = ", ".join(row) if isinstance(row, dict) else "none"
        raise ConfigError(f"{where}: no field {field!r} (--text_field); there are: {there}")
    if not isinstance(row[field], str | None):
        raise ConfigError(f"{where}: field {field!r} is not text but {type(row[field]).__name__}")
    return row[field] or ""


def read_parquet(path, field, seen):
    table = need("pyarrow.parquet").ParquetFile(path)
    text_of(dict.fromkeys(table.schema_arrow.names), field, path)
    kind, rows = str(table.schema_arrow.field(field).type), 0
    if kind not in ("string", "large_string"):
        raise ConfigError(f"{path}: column {field!r} is not text but {kind}")
    for batch in table.iter_batches(1024, columns=[field]):
        rows += len(batch)
        seen.share = rows / table.metadata.num_rows
        for data in batch.column(0).cast(kind.replace("string", "binary")).to_pylist():
            yield as_text(data or b"")


def read_jsonl(path, lines, field):
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(as_text(line))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: line {number}: not valid JSON: {one_line(error)}") from None
            yield text_of(row, field, f"{path}: line {number}")


def read_text(path, file, piece, seen):
    """The whole file as one text, or, where `piece` is not 0, whole lines of at least so many bytes as one."""
    if b"\0" in file.read(2**13):
        if piece:
            raise ConfigError(f"{path}: not UTF-8 text, it holds NUL bytes")
        seen.binary_files += 1
        return
    file.seek(0)
    if not piece:
        yield as_text(file.read())
    while data := b"".join(file.readlines(piece)):
        yield as_text(data)


def read_file(path, options, seen, alone):
    """Texts of a file. A text file is one, but if it is all there is, it is cut at line ends, at 64 KiB or earlier."""
    try:
        if kind_of(path) == "parquet":
            yield from read_parquet(path, options.text_field, seen)
            return
        size = max(path.stat().st_size, 1)
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else contextlib.nullcontext(raw) as file:
            piece = min(2**16, int(options.val_fraction * size) + 1) if alone else 0
            is_jsonl = kind_of(path) == "jsonl"
            for text in read_jsonl(path, file, options.text_field) if is_jsonl else read_text(path, file, piece, seen):
                seen.share = raw.tell() / size
                yield text
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read, or cut short or damaged: {one_line(error)}") from None


def hub_documents(name, options):
    """A Hugging Face dataset, streamed: its name, or the directory of its files."""
    datasets = need("datasets")
    need("huggingface_hub").utils.logging.set_verbosity_error()  # its retries would fill the screen
    try:
        rows = datasets.load_dataset(name, options.dataset_config, split=options.dataset_split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield text_of(row, options.text_field, f"{name}: document {number}")
    except ConfigError:
        raise
    except Exception as error:  # every layer below has its own
        raise ConfigError(f"{name}: no local file, and cannot be read as a Hugging Face dataset: {one_line(error)} "
                          "(without network: download it elsewhere and give the directory of its files)") from None


def documents(options, seen):
    """All texts of the source, in any order."""
    source = Path(options.source)
    if options.source != "pysource" and not source.exists():
        if re.search(r"^[./~]|/.*/|\.(txt|jsonl|parquet|gz)$", options.source):
            raise ConfigError(f"{options.source}: no such file or directory")
        yield from hub_documents(options.source, options)
        return
    files = pysource_files() if options.source == "pysource" else local_files(source)
    if arrow := [p for p in files if p.suffix == ".arrow"]:
        raise ConfigError(f"{arrow[0]}: .arrow files cannot be read; write the dataset with to_parquet instead of save_to_disk")
    for i, path in enumerate(files):
        for text in read_file(path, options, seen, alone=path == source):
            seen.share = (i + min(seen.share, 1)) / len(files)
            yield text


# ---------------------------------------------------------------------------------------------------------
# Documents -> spool -> sorted, without duplicates, split -> .npy

@dataclass
class Seen:
    """Counts of a pass over the source, and how much of it is read (None: unknown)."""
    share: float | None = None
    duplicates: int = 0
    empty: int = 0
    bad_utf8: int = 0
    binary_files: int = 0


def cleaned(texts, seen):
    """Without empty texts, and with what is not UTF-8 replaced by U+FFFD; both counted."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            seen.bad_utf8 += 1
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        seen.empty += not text
        if text:
            yield text


def smallest_dtype(tokenizer):
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def encoded(texts, tokenizer):
    """(text, its ids and end-of-text) of each, in batches, so that tokenizers can use their threads."""
    texts, dtype = iter(texts), smallest_dtype(tokenizer)
    while batch := list(itertools.islice(texts, 256)):
        for text, ids in zip(batch, tokenizer.encode_batch(batch)):
            yield text, np.append(np.asarray(ids, dtype), dtype.type(tokenizer.eos_token_id))


def spool(texts, tokenizer, options, path, seen):
    """Tokens of all texts into a raw file, in order of arrival. Returns keys (n, 2), bytes (n,) and ends in the file (n,)."""
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
            bar.total = limit or (total / seen.share if seen.share else None)
            bar.update(len(ids))
            if limit and total >= limit:
                break
    return np.frombuffer(keys, ">u8").reshape(-1, 2), np.array(sizes), np.array(ends)


def write_npy(path, pieces, n_pieces, dtype):
    """A new .npy file of all `pieces`, arrays of ids. Returns (tokens, sha256)."""
    def header(count):  # numpy pads it, so that the count can be filled in at the end
        np.lib.format.write_array_header_1_0(f, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
        return f.tell()

    count = 0
    with open(path, "wb+") as f, progress(n_pieces, f"writing {path.name}", "doc") as bar:
        start = header(0)
        for ids in pieces:
            f.write(ids)
            count += len(ids)
            bar.update()
        f.seek(0)
        assert header(count) == start
        f.flush()
        os.fsync(f.fileno())
        f.seek(0)
        return count, hashlib.file_digest(f, "sha256").hexdigest()


def build(options, folder):
    """Write {train,val}.npy and perhaps tokenizer.json into `folder`. Returns meta."""
    bpe, seen = options.tokenizer == "bpe", Seen()
    tokenizer = load_tokenizer("bytes" if bpe else options.tokenizer)
    spooled_dtype = smallest_dtype(tokenizer)
    keys, sizes, ends = spool(cleaned(documents(options, seen), seen), tokenizer, options, folder / "spool", seen)

    order = np.lexsort(keys.T)
    distinct = np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1))[:len(order)]
    seen.duplicates = int(len(order) - distinct.sum())
    order = order[distinct]
    if len(order) < 2:
        raise ConfigError(f"{options.source}: the split is by document and takes two different ones at least; found {len(order)} "
                          f"({seen.empty} empty texts and {seen.binary_files} binary files left out)")
    text_bytes = np.cumsum(sizes[order])
    n_val = min(int(np.searchsorted(text_bytes, options.val_fraction * text_bytes[-1])) + 1, len(order) - 1)
    splits = {"train": order[n_val:], "val": order[:n_val]}

    spooled, starts = np.memmap(folder / "spool", spooled_dtype, "r"), np.append(0, ends[:-1])

    def ids_of(split):
        return (spooled[starts[i]:ends[i]] for i in splits[split])

    def texts_of(split):  # of a spool of bytes
        return (ids[:-1].astype(np.uint8).tobytes().decode("utf-8") for ids in ids_of(split))

    if bpe:
        print(f"training a tokenizer on {sizes[splits['train']].sum():,} bytes", file=sys.stderr, flush=True)
        train_bpe(texts_of("train"), options.bpe_vocab_size).save(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(folder)
    elif isinstance(tokenizer, TokenizerFile):
        tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    name = "tokenizer.json" if isinstance(tokenizer, TokenizerFile) else options.tokenizer

    tokens, sha256 = {}, {}
    for split, chosen in splits.items():
        pieces = (ids for _, ids in encoded(texts_of(split), tokenizer)) if bpe else ids_of(split)
        tokens[split], sha256[split] = write_npy(folder / f"{split}.npy", pieces, len(chosen), smallest_dtype(tokenizer))
    os.remove(folder / "spool")
    counts = asdict(seen)
    del counts["share"]
    return {"source": options.source, "tokenizer": name, "vocab_size": tokenizer.vocab_size,
            "eos_token_id": tokenizer.eos_token_id, "dtype": smallest_dtype(tokenizer).name, "seed": options.seed,
            "tokens": tokens, "documents": {split: len(chosen) for split, chosen in splits.items()},
            "bytes": {split: int(sizes[chosen].sum()) for split, chosen in splits.items()}, **counts, "sha256": sha256,
            "data_sha256": hashlib.sha256("\n".join([name, sha256["train"], sha256["val"]]).encode()).hexdigest()}


def stamps(*paths):
    """Names, sizes and times of change of all files under those of `paths` that exist, hashed: changed input is built again."""
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for path in paths if path.exists() for p in local_files(path)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


@contextlib.contextmanager
def locked(folder):
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


def prepare(options):
    """(meta, built): the data set of these options, built now unless it is there, complete. Raises ConfigError."""
    if not 0 < options.val_fraction < 1:
        raise ConfigError(f"val_fraction: {options.val_fraction} is not between 0 and 1")
    if options.bpe_vocab_size < 257:
        raise ConfigError(f"bpe_vocab_size: {options.bpe_vocab_size} is less than 257, the bytes and end-of-text")
    if options.max_tokens is not None and options.max_tokens < 1:
        raise ConfigError(f"max_tokens: {options.max_tokens} is less than 1")
    source = Path(options.source)
    name = (source.resolve() if source.exists() else source).name
    out = Path(options.out_dir or DATA / re.sub(r"(\.txt|\.jsonl|\.parquet)?(\.gz)?$", "", name))
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"out_dir: {out} lies in the source itself; choose another with --out_dir=DIR")
    settings = {key: value for key, value in asdict(options).items() if key != "out_dir"}
    settings["inputs"] = stamps(source, Path(options.tokenizer))
    if options.source == "pysource":
        settings["versions"] = {"python": platform.python_version()} | pinned_versions()

    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        old = {}
        with contextlib.suppress(ConfigError):
            old = [load_tokens(out, split)[1] for split in ("train", "val")][0]
        if old.get("settings") == settings and (old["tokenizer"] != "tokenizer.json" or (out / "tokenizer.json").exists()):
            return old, False
        partial = out / ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        try:
            meta = {"name": out.resolve().name} | build(options, partial) | {"settings": settings}
            (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
            (out / "meta.json").unlink(missing_ok=True)  # first out and last in: where it is, all is complete
            if old.get("tokenizer") == "tokenizer.json":
                (out / "tokenizer.json").unlink(missing_ok=True)
            for name in sorted(os.listdir(partial), key=lambda name: name == "meta.json"):
                os.replace(partial / name, out / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):
                out.rmdir()  # after an error, if nothing else is in it
    return meta, True


def main(options):
    try:
        meta, built = prepare(options)
    except OSError as error:  # no space left, no permission
        raise ConfigError(one_line(error)) from None
    for split in ("train", "val"):
        print(", ".join(f"{meta[what][split]:,} {what}" for what in ("documents", "tokens", "bytes")), "in", split)
    if not built:
        print("already there with these settings: nothing to do")
        return
    print(f"dropped {meta['duplicates']:,} duplicates, {meta['empty']:,} empty texts, {meta['binary_files']:,} binary files; "
          f"{meta['bad_utf8']:,} texts were not UTF-8 in places, now U+FFFD")


if __name__ == "__main__":
    run(main, Options)
