"""data/prepare.py writes all of the text once, split by document; each bad input is one clear line."""
import gzip
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tqdm

from configurator import ConfigError, parse
from data import prepare
from data.prepare import Options, load_tokenizer
from data.stream import load_tokens

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"document {i}\n" + f"line of {i}, é 漢 😀\r\n" * (i % 7 + 1) for i in range(300)]


def make(tmp_path, source, **settings):
    return prepare.prepare(Options(str(source), out_dir=str(tmp_path / "out"), **settings))


def decoded(folder, split):
    """The documents of a split, by an independent reading of the format: ids up to each end-of-text."""
    tokens, meta = load_tokens(folder, split)
    tokenizer = load_tokenizer("bytes" if meta["tokenizer"] == "bytes" else Path(folder) / meta["tokenizer"])
    assert tokens[-1] == meta["eos_token_id"] and len(tokens) == meta["tokens"][split]
    pieces = np.split(tokens, np.flatnonzero(tokens == meta["eos_token_id"]) + 1)[:-1]
    return [tokenizer.decode(piece[:-1].tolist()) for piece in pieces]


def all_decoded(folder):
    return decoded(folder, "train") + decoded(folder, "val")


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def cli(*words, **env):
    command = [sys.executable, "data/prepare.py", *map(str, words)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | env
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


def one_line_error(result, *words):
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("prepare.py: ") and "Traceback" not in result.stderr
    for word in words:
        assert str(word) in last
    return last


# ---------------------------------------------------------------------------------------------------------
# What is written

@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_distinct_document_once_split_by_document(tmp_path, tokenizer):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS[:40] + ["", ""])
    meta, built = make(tmp_path, source, tokenizer=tokenizer, bpe_vocab_size=300, val_fraction=0.1)
    train, val = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "val")
    assert built and sorted(train + val) == sorted(TEXTS)
    assert (meta["duplicates"], meta["empty"], meta["bad_utf8"]) == (40, 2, 0)
    assert meta["documents"] == {"train": len(train), "val": len(val)}
    assert meta["bytes"] == {"train": len("".join(train).encode()), "val": len("".join(val).encode())}
    longest, total = max(len(t.encode()) for t in TEXTS), sum(meta["bytes"].values())
    assert 0.1 * total <= meta["bytes"]["val"] < 0.1 * total + longest
    assert train != sorted(train) and train != [t for t in TEXTS if t in set(train)]  # shuffled
    for split in ("train", "val"):
        path = tmp_path / f"out/{split}.npy"
        assert meta["sha256"][split] == hashlib.sha256(path.read_bytes()).hexdigest()
        tokens, _ = load_tokens(tmp_path / "out", split)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16
        assert tokens.max() < meta["vocab_size"] and np.array_equal(tokens, np.load(path))
    extra = ["tokenizer.json", "tokenizer_config.json"] * (tokenizer == "bpe")
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", *extra, "train.npy", "val.npy"]


def test_order_and_split_depend_on_seed_and_content_only(tmp_path):
    first = make(tmp_path / "a", write_jsonl(tmp_path / "a.jsonl", TEXTS))[0]
    folder = tmp_path / "many"
    for i, text in enumerate(reversed(TEXTS)):
        path = folder / f"{i % 5}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    second = make(tmp_path / "b", folder)[0]
    assert first["data_sha256"] == second["data_sha256"] and first["sha256"] == second["sha256"]
    other = make(tmp_path / "c", folder, seed=1)[0]
    assert other["data_sha256"] != first["data_sha256"]
    assert set(decoded(tmp_path / "c/out", "val")) != set(decoded(tmp_path / "a/out", "val"))


def test_validation_documents_are_the_same_for_every_tokenizer(tmp_path, bpe):
    numbers = np.random.default_rng(0).integers(0, 2**60, (150, 10))  # compress badly, TEXTS well
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS[:150] + [" ".join(map(str, row)) for row in numbers])
    for fraction in (0.1, 0.3, 0.5):
        val = []
        for tokenizer in ("bytes", "bpe", str(bpe)):
            folder = tmp_path / f"{fraction}-{len(val)}"
            make(folder, source, val_fraction=fraction, tokenizer=tokenizer)
            val.append(decoded(folder / "out", "val"))
        assert val[0] == val[1] == val[2]


def test_all_formats_hold_the_same_documents(tmp_path):
    pyarrow, _ = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    plain = write_jsonl(tmp_path / "plain.jsonl", TEXTS, "content")
    zipped = tmp_path / "zipped.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = pyarrow.table({"n": range(300), "content": TEXTS})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=70)
    folder = tmp_path / "mixed"  # data files, and files that are commonly beside them
    folder.mkdir()
    large = pyarrow.array(TEXTS[:100], pyarrow.large_string())
    parquet.write_table(pyarrow.table({"content": large}), folder / "a.parquet")
    write_jsonl(folder / "b.jsonl", TEXTS[100:], "content")
    (folder / "README.md").write_text("not data")
    (folder / ".hidden").mkdir()
    write_jsonl(folder / ".hidden/c.jsonl", ["not data either"], "content")
    hashes = {make(tmp_path / f"of_{source.name}", source, text_field="content")[0]["data_sha256"]
              for source in (plain, zipped, tmp_path / "t.parquet", folder)}
    assert len(hashes) == 1


def test_a_single_text_file_is_cut_at_line_ends(tmp_path):
    lines = [f"line {i}\n" for i in range(40_000)]
    (tmp_path / "t.txt").write_text("".join(lines))
    meta, _ = make(tmp_path, tmp_path / "t.txt")
    pieces = all_decoded(tmp_path / "out")
    assert meta["documents"]["val"] >= 1
    assert 0.01 <= meta["bytes"]["val"] / sum(meta["bytes"].values()) < 0.03
    assert all(piece.endswith("\n") and len(piece) < 2**16 + 100 for piece in pieces)
    assert sorted("".join(pieces).splitlines(True)) == sorted(lines)
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(b"one\ntwo\nthree\n"))
    make(tmp_path / "gz", tmp_path / "t.txt.gz", val_fraction=0.01)
    assert sorted(all_decoded(tmp_path / "gz/out")) == ["one\n", "three\n", "two\n"]


def test_bad_utf8_is_replaced_and_counted_binary_files_are_left_out(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    (folder / "good.txt").write_bytes("café".encode())
    (folder / "picture").write_bytes(b"\x89PNG\0\0")
    (folder / "empty.txt").write_bytes(b"")
    meta, _ = make(tmp_path, folder)
    assert (meta["bad_utf8"], meta["empty"]) == (1, 2)
    assert sorted(all_decoded(tmp_path / "out")) == ["café", "caf\ufffd"]
    (tmp_path / "s.jsonl").write_text('{"text": "lone \\ud800 half"}\n{"text": "pair \\ud83d\\ude00"}\n')
    assert make(tmp_path / "s", tmp_path / "s.jsonl")[0]["bad_utf8"] == 1
    assert sorted(all_decoded(tmp_path / "s/out")) == ["lone \ufffd half", "pair 😀"]


def test_max_bytes_stops_the_reading(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    meta, _ = make(tmp_path, source, max_bytes=2000)
    longest = max(len(t.encode()) for t in TEXTS)
    assert 2000 <= sum(meta["bytes"].values()) < 2000 + longest
    texts = all_decoded(tmp_path / "out")
    assert set(texts) == set(TEXTS[:len(texts)])


def test_pysource_is_the_pinned_packages_and_the_standard_library_alone(tmp_path, monkeypatch):
    files = [str(p) for p in prepare.pysource_files()]
    assert len(files) == len(set(files)) and all(f.endswith(".py") for f in files)
    for end in ("/json/decoder.py", "/torch/nn/functional.py"):
        assert any(f.endswith(end) for f in files)
    packages = {f.split("site-packages/")[1].split("/")[0] for f in files if "site-packages/" in f}
    assert {"torch", "numpy", "tqdm", "safetensors"} <= packages
    assert not {"pytest", "_pytest", "hypothesis", "pip", "transformers", "sympy", "networkx"} & packages
    version = tqdm.__version__
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text(f"tqdm=={version}\n")
    monkeypatch.setattr(prepare.sysconfig, "get_path", lambda name: str(Path(json.__file__).parent))
    meta, _ = make(tmp_path, "pysource")
    assert meta["settings"]["versions"] == {"python": platform.python_version(), "tqdm": version}
    texts = all_decoded(tmp_path / "out")
    assert Path(json.__file__).read_text() in texts and Path(tqdm.__file__).read_text() in texts


# ---------------------------------------------------------------------------------------------------------
# Complete or not there, and never changed

def test_a_rerun_does_nothing_and_a_change_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    meta, built = make(tmp_path, source)
    content = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    again, rebuilt = make(tmp_path, source)
    assert built and not rebuilt and again == meta
    with pytest.raises(ConfigError, match="out: is not what these settings .* give; delete it"):
        make(tmp_path, source, seed=5)
    write_jsonl(source, TEXTS[:-1])
    with pytest.raises(ConfigError, match="out: is not what"):
        make(tmp_path, source)
    assert content == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}


@pytest.mark.parametrize("name", ["val.npy", "meta.json"])
def test_damaged_data_count_as_other_data(tmp_path, name):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    make(tmp_path, source)
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="out: is not what"):
        make(tmp_path, source)


def test_an_error_leaves_nothing(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with source.open("a") as f:
        f.write('{"text": "cut sho')
    with pytest.raises(ConfigError, match="line 301"):
        make(tmp_path, source)
    assert os.listdir(tmp_path) == ["a.jsonl"]


# ---------------------------------------------------------------------------------------------------------
# load_tokens: every way in which the files can be wrong

def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(b"\x80\x04" + b"not this" * 100)
    elif how == "shorter":
        np.save(path, np.load(path)[:-1])
    elif how == "int64":
        np.save(path, np.load(path).astype(np.int64))
    elif how == "objects":
        np.save(path, np.array([{}, None], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("name, how", [
    *(("val.npy", how) for how in ("missing", "cut", "empty", "garbage", "shorter", "int64", "objects")),
    *(("meta.json", how) for how in ("missing", "cut", "empty", "garbage"))])
def test_load_tokens_says_what_is_wrong(tmp_path, name, how):
    make(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    damage(tmp_path / "out" / name, how)
    with pytest.raises(ConfigError) as error:
        load_tokens(tmp_path / "out", "val")
    message = str(error.value)
    assert str(tmp_path / "out" / name) in message and "python data/prepare.py out" in message
    assert "\n" not in message


def test_load_tokens_without_a_directory_and_with_odd_meta(tmp_path):
    with pytest.raises(ConfigError, match="no such file; make it with: python data/prepare.py nosuchdata"):
        load_tokens("nosuchdata", "train")
    make(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    for odd in ([], {}, meta | {"dtype": "no such type"}, meta | {"tokens": {}},
                meta | {"tokens": {"train": "1"}}, meta | {"bytes": [1]}, meta | {"bytes": {"train": "1"}}):
        (tmp_path / "out/meta.json").write_text(json.dumps(odd))
        with pytest.raises(ConfigError):
            load_tokens(tmp_path / "out", "train")


def test_import_is_cheap():
    code = ("import sys, data.prepare\n"
            "print({'torch', 'datasets', 'tokenizers', 'tiktoken'} & set(sys.modules))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "set()\n"


# ---------------------------------------------------------------------------------------------------------
# Tokenizers

SAMPLES = ["", "def f(x):\n\treturn x\r\n", "é 漢字 😀\u200d\0", "<|endoftext|> is text here", " " * 50]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    prepare.train_bpe(TEXTS, 400).save(str(path))
    return path


def small_tiktoken():
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"re": 256, b"ret": 257, b"  ": 258}
    return prepare.of_tiktoken(tiktoken.Encoding("small", pat_str=r"\w+|\W+", mergeable_ranks=ranks,
                                                 special_tokens={"<|endoftext|>": 259}))


def encode(tokenizer, text):
    return [int(i) for i in tokenizer.encode([text])[0]]


@pytest.mark.parametrize("name", ["bytes", "bpe", "tiktoken"])
def test_tokenizers_give_text_back_and_never_make_end_of_text(name, request):
    tokenizer = {"bytes": lambda: load_tokenizer("bytes"), "tiktoken": small_tiktoken,
                 "bpe": lambda: load_tokenizer(request.getfixturevalue("bpe"))}[name]()
    all_ids = tokenizer.encode(SAMPLES)
    for text, ids in zip(SAMPLES, map(list, all_ids), strict=True):
        assert tokenizer.decode(ids) == text and tokenizer.decode(ids + [tokenizer.eos_token_id]) == text
        assert tokenizer.eos_token_id not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert ids == encode(tokenizer, text)


def test_bytes_are_utf8():
    tokenizer = load_tokenizer("bytes")
    assert encode(tokenizer, "aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (257, 256)


def test_bpe_compresses_and_is_reproducible(bpe):
    tokenizer = load_tokenizer(bpe.parent)  # the directory of a tokenizer.json
    assert tokenizer.vocab_size == 400
    assert len(encode(tokenizer, TEXTS[6])) < len(TEXTS[6].encode()) / 2
    assert json.loads(bpe.read_text()) == json.loads(prepare.train_bpe(TEXTS, 400).to_str())


def test_a_tokenizer_file_without_its_truncation_and_with_the_end_of_text_said_beside_it(bpe, tmp_path):
    changed = json.loads(bpe.read_text())
    changed["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "z"}}))
    tokenizer = load_tokenizer(tmp_path)
    end = changed["model"]["vocab"]["z"]
    assert tokenizer.decode(encode(tokenizer, TEXTS[0])) == TEXTS[0] and tokenizer.eos_token_id == end
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    meta, _ = make(tmp_path, source, tokenizer=str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "out").eos_token_id == meta["eos_token_id"] == end
    from transformers import PreTrainedTokenizerFast
    others = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")  # other tools know what ends a text
    assert others.eos_token_id == end and others.encode(TEXTS[0]) == encode(tokenizer, TEXTS[0])
    (tmp_path / "tokenizer.json").write_text(bpe.read_text().replace("<|endoftext|>", "<|other|>"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_tokenizer(tmp_path).eos_token_id == end  # tokenizer_config.json comes first
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).eos_token_id == 7
    for odd in ({"eos_token": None}, {"eos_token": {}}, {"eos_token": []}, {"eos_token": 1.5}, [1]):
        (tmp_path / "config.json").write_text("")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(odd))
        with pytest.raises(ConfigError, match="no end-of-text"):
            load_tokenizer(tmp_path)


def test_tokenizer_errors(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=str(tmp_path / "tokenizer.json")):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="'gtp2': neither bytes, bpe, gpt2 nor"):
        load_tokenizer("gtp2")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match="tokenizers"):
        load_tokenizer(tmp_path)


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def test_no_network_is_one_line(tmp_path):
    pytest.importorskip("tiktoken")
    pytest.importorskip("datasets")
    names = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY")
    offline = dict.fromkeys(names, closed_port()) | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none")}
    source, out = write_jsonl(tmp_path / "a.jsonl", TEXTS), f"--out_dir={tmp_path}/o"
    one_line_error(cli(source, "--tokenizer=gpt2", out, **offline),
                   "gpt2", "TIKTOKEN_CACHE_DIR", "--tokenizer=bytes")
    one_line_error(cli("nosuch/dataset", out, **offline), "nosuch/dataset", "cannot be read")
    assert os.listdir(tmp_path) == ["a.jsonl"]


# ---------------------------------------------------------------------------------------------------------
# Bad input: the file, the line, the fix

def test_hugging_face_datasets_are_streamed(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict({"content": TEXTS + [None], "n": list(range(301))})
    dataset.to_parquet(str(tmp_path / "in/train.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    make(tmp_path, tmp_path / "saved", text_field="content")
    assert sorted(all_decoded(tmp_path / "out")) == sorted(TEXTS)
    folder = str(tmp_path / "in")
    assert list(prepare.read_datasets("content", folder, split="train")) == TEXTS + [""]
    for field, words in (("txt", "there are: content, n"), ("n", "not text but int")):
        with pytest.raises(ValueError, match=words):
            list(prepare.read_datasets(field, folder, split="train"))


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "Expecting value"]),
    ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b", "id": 1}\n', ["line 3", "'text'", "txt, id"]),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', ["line 2", "no field"]),
    ("a.jsonl", b'{"text": 5}\n', ["line 1", "not text but int"]),
    ("a.jsonl", b"[" * 200_000, ["line 1", "not valid JSON"]),
    ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:-9], ["ended before"]),
    ("a.jsonl.gz", b'{"text": "a"}\n', ["Not a gzipped file"]),
    ("a.txt", b"PNG\0\0", ["found 0", "1 empty texts or binary"]),
    ("a.txt", b"", ["found 0"]),
    ("a.txt", b"one line, no more", ["found 1"]),
    ("a.parquet", b"PAR1 no parquet PAR1", ["cannot be read"]),
])
def test_bad_files(tmp_path, name, content, words):
    if "parquet" in name:
        pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        make(tmp_path, tmp_path / name)
    message = str(error.value)
    assert str(tmp_path / name) in message and "\n" not in message and all(word in message for word in words)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("flag", ["val_fraction=-0.1", "val_fraction=1.1", "bpe_vocab_size=256",
                                  "max_bytes=0"])
def test_settings_out_of_range(flag):
    with pytest.raises(ConfigError, match=f"^{flag.split('=')[0]}: .* is not "):
        parse(Options, ["pysource", f"--{flag}"])


@pytest.mark.parametrize("val_fraction", [0.0, 1.0])
def test_each_part_has_a_document_at_least(tmp_path, val_fraction):
    meta, _ = make(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS), val_fraction=val_fraction)
    assert meta["documents"] == {"train": 1, "val": 299} if val_fraction else {"train": 299, "val": 1}


def test_bad_places(tmp_path, monkeypatch):
    for missing in ("/no/such", "nothere.jsonl", "./nothere"):
        with pytest.raises(ConfigError, match=f"{missing}: no such file or directory"):
            make(tmp_path, missing)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for source in (tmp_path / "a.parquet", "some/name"):
        with pytest.raises(ModuleNotFoundError, match="datasets"):
            make(tmp_path, source)


def test_command_line(tmp_path):
    result = cli(write_jsonl(tmp_path / "a.jsonl", TEXTS), f"--out_dir={tmp_path / 'out'}")
    assert result.returncode == 0 and "documents" in result.stdout
    again = cli(tmp_path / "a.jsonl", f"--out_dir={tmp_path / 'out'}")
    assert again.returncode == 0 and "nothing to do" in again.stdout
    one_line_error(cli("pysource", "--tokeniser=bpe"), "'tokeniser'", "'tokenizer'")
    one_line_error(cli(), "SOURCE is missing")
    one_line_error(cli(tmp_path / "a.jsonl", "--out_dir=/dev/null/x"), "/dev/null")
