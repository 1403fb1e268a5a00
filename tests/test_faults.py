"""What may go wrong: signals, full disks, lost ranks, second writers, and files of strangers."""
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import configurator
import files
import sample
import start
import sweep
import train as train_module
import workers
from configurator import ConfigError, read_config, read_json, write_config
from data.prepare import Options as Prepare, load_tokenizer, prepare
from data.stream import load_tokens
from start import Stopped
from test_train import STEP, data, digests, log, moe, quiet, same_state, tiny, torchrun  # noqa: F401  (fixtures)
from train import Train, train
from upcycle import Options, upcycle

ROOT = Path(__file__).resolve().parent.parent


def one_line(error):
    assert "\n" not in str(error.value)


def start_training(c, tmp_path, **options):
    write_config(c, tmp_path / "c.py")
    command = [sys.executable, "train.py", str(tmp_path / "c.py")]

    def heed_signals():  # where the tests themselves run under nohup or in the background of a shell
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT,
                                                  "text": True, "preexec_fn": heed_signals} | options)


def wait_for(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.005)


# ---------------------------------------------------------------------------------------------------------
# Config files and JSON of strangers

@pytest.mark.parametrize("text, words", [
    ("_a = 10**50\n_b = _a**16\n", ["line 2", "cannot compute '_a ** 16'"]),
    ("_a = [1, 1]\n_b = [_a, _a]\n", ["line 2", "'_a' is not"]),
    ("_a = 'ab' * 10**9\n", ["line 1", "arithmetic is on numbers"]),
    ("_a = [1] * 10**9\n", ["line 1", "arithmetic is on numbers"]),
    ("_a = (-8)**0.5\n", ["line 1", "cannot compute"]),
    ("_a = 1" + "0" * 400 + " + 1\n", ["line 1", "cannot compute"]),
    ("_a = 10**90\n" + "_a = _a * _a\n" * 30, ["line 3", "too large"]),
    ("x = 1\n" * 200_000, ["bytes, at most"])])
def test_config_files_stay_small_whatever_they_compute(tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config(str(tmp_path / "c.py"))
    one_line(error)
    assert all(word in str(error.value) for word in words) and len(str(error.value)) < 400


@pytest.mark.parametrize("text, words", [
    ("[" * 10**6, "recursion"), ('{"a":' + "[" * 200 + "]" * 200 + "}", "beyond 100 levels"),
    ('{"a": 1' + "0" * 400 + "}", "too large a number"), ("[]", "no JSON object"), ("\xff", "can.t decode"),
    ('{"a": "' + "x" * 2**25 + '"}', "bytes, at most")])
def test_json_is_read_up_to_its_limits(tmp_path, text, words):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words) as error:
        read_json(str(tmp_path / "a.json"))
    one_line(error)


def test_pipes_and_devices_are_not_opened(tmp_path, tiny):  # noqa: F811
    """To open a pipe that nobody writes to hangs."""
    os.mkfifo(tmp_path / "pipe.json")
    os.mkfifo(tmp_path / "pipe.txt")
    for read in (read_json, read_config, lambda path: prepare(Prepare(path, out_dir=str(tmp_path / "out")))):
        for path in (str(tmp_path / "pipe.json"), "/dev/zero"):
            with pytest.raises(ConfigError, match="no regular file"):
                read(path)
    train(dataclasses.replace(tiny, rows=None), report=quiet)
    last = os.path.join(tiny.out_dir, "checkpoint-20")
    for name in ("optimizer.moments", "model.safetensors", "trainer_state.json", "config.json"):
        os.rename(os.path.join(last, name), tmp_path / name)
        os.mkfifo(os.path.join(last, name))
        with pytest.raises(ConfigError, match=f"{name}.*no regular file"):
            train(dataclasses.replace(tiny, resume=True, max_tokens=21 * STEP), report=quiet)
        os.replace(tmp_path / name, os.path.join(last, name))


def test_a_pipe_in_place_of_a_file_that_is_written_is_refused(tiny, tmp_path):  # noqa: F811
    os.makedirs(tiny.out_dir)
    job = sweep.Job(tiny, None, 1, 1, {}, launcher="false")
    for path, write in ((f"{tiny.out_dir}/.lock", lambda: train(tiny, report=quiet)), (tiny.rows, None),
                        (f"{tiny.out_dir}/log.jsonl", None),
                        (f"{tiny.out_dir}/output.txt", lambda: workers.launch(job, quiet))):
        os.mkfifo(path)
        with pytest.raises(ConfigError, match=f"{path}: .*(no regular file|cannot be written)"):
            (write or (lambda: train(dataclasses.replace(tiny, resume=True), report=quiet)))()
        os.remove(path)


def test_a_deep_line_in_the_log_ends_it(tiny):  # noqa: F811
    train(dataclasses.replace(tiny, save_at_tokens=[10 * STEP], rows=None), report=quiet)
    shutil.rmtree(os.path.join(tiny.out_dir, "checkpoint-20"))
    path = Path(tiny.out_dir, "log.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:9], "[" * 10**5 + "\n", *lines[9:]]))
    train(dataclasses.replace(tiny, resume=True), report=quiet)
    assert [line["step"] for line in log(tiny)] == [*range(1, 10), *range(11, 21)]


def test_an_empty_name_for_the_rows_is_refused(tiny):  # noqa: F811
    with pytest.raises(ConfigError, match="--rows= is empty"):
        train(dataclasses.replace(tiny, rows=""), report=quiet)
    assert not os.path.exists(tiny.out_dir)


def test_a_seed_of_forty_digits_is_refused():
    with pytest.raises(ConfigError, match=r"seed: '10\*\*40' is not of type int"):
        configurator.parse(Train, ["--seed=10**40"])


@pytest.mark.parametrize("sizes, words", [
    ({"num_hidden_layers": 10**7}, "num_hidden_layers: 10000000 is not in 1 .. 4096"),
    ({"hidden_size": 10**6}, "hidden_size: 1000000 is not in"),
    ({"hidden_size": 2**17, "num_attention_heads": 16}, "moments take [0-9,]+ of [0-9,]+ GB"),
    ({"num_local_experts": 10**5}, "num_local_experts = 100000 in each of . layers"),
    ({"num_hidden_layers": 4096, "num_local_experts": 2**16}, "more than 65,536 together")])
def test_sizes_beyond_the_limits_are_refused_by_training_and_studies(tiny, tmp_path, sizes, words):  # noqa: F811
    began = time.process_time()
    with pytest.raises(ConfigError, match=words) as error:
        train(dataclasses.replace(tiny, **sizes), report=quiet)
    sizes = sizes.copy()
    one_line(error)
    if "GB" not in words:  # a study may be planned where it cannot be run
        path = tmp_path / "study.py"
        experts = sizes.pop("num_local_experts", 8)
        path.write_text(f"sizes = [{sizes}]\nD1 = [10_000]\nD2 = [10_000]\nnum_local_experts = {experts}\n"
                        f"train = {{'dataset': {tiny.dataset!r}, 'warmup_steps': 2}}\n")
        with pytest.raises(ConfigError, match=words):
            sweep.study_jobs(configurator.parse(sweep.Study, [str(path)]))
    assert time.process_time() - began < 5


def test_a_study_of_too_many_runs_is_refused(tmp_path):
    path = tmp_path / "study.py"
    path.write_text(f"sizes = [{{}}]\nD1 = {[7] * 10**4}\nD2 = {[7] * 10**4}\n")
    with pytest.raises(ConfigError, match="study.py: has more than 100,000 upcycled"):
        sweep.study_jobs(configurator.parse(sweep.Study, [str(path)]))


# ---------------------------------------------------------------------------------------------------------
# Checkpoints of strangers

@pytest.mark.parametrize("key, value, words", [
    ("num_hidden_layers", 10**7, "num_hidden_layers.*not in"), ("num_hidden_layers", 4000, "4000 layers,"),
    ("hidden_size", 10**9, "hidden_size.*not in"), ("vocab_size", 10**12, "vocab_size.*not in"),
    ("vocab_size", 2**22, "embed_tokens"), ("intermediate_size", 2**20, "mlp"),
    ("head_dim", "8", "head_dim: '8' is not of type int"), ("head_dim", -8, "head_dim"),
    ("head_dim", 8192, "wants|proj"), ("rms_norm_eps", "x", "rms_norm_eps.*float"),
    ("rope_theta", 0, "rope_theta"), ("rope_theta", [1], "rope_theta.*float"),
    ("rope_scaling", [1], "rope_scaling.*dict"), ("rope_scaling", {"rope_type": "llama3"}, "KeyError"),
    ("rope_scaling", {"rope_type": "linear", "factor": "x"}, "TypeError"),
    ("rope_scaling", {"rope_type": "yarn"}, "yarn"), ("rope_parameters", [1], "config.json"),
    ("num_key_value_heads", 1.5, "num_key_value_heads.*int"), ("num_key_value_heads", 0, "key_value_heads"),
    ("tie_word_embeddings", "no", "tie_word_embeddings.*bool"), ("eos_token_id", {"a": 1}, "eos_token_id"),
    ("max_position_embeddings", 2**24, "max_position_embeddings.*wants a table"),
    ("model_type", ["llama"], "model_type"), ("hidden_act", [], "hidden_act")])
def test_a_config_json_beyond_its_limits_is_refused_by_key(tiny, key, value, words):  # noqa: F811
    train(dataclasses.replace(tiny, rows=None, max_tokens=STEP, decay_steps=0), report=quiet)
    directory = Path(tiny.out_dir) / "checkpoint-1"
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))
    began = time.process_time()
    with pytest.raises(ConfigError, match=words) as error:
        checkpoint.load_model(directory)
    one_line(error)
    assert str(directory) in str(error.value) and time.process_time() - began < 5


def test_experts_are_counted_before_they_are_made(tiny, tmp_path):  # noqa: F811
    train(dataclasses.replace(tiny, rows=None, max_tokens=STEP, decay_steps=0), report=quiet)
    source = os.path.join(tiny.out_dir, "checkpoint-1")
    with pytest.raises(ConfigError, match="num_local_experts = 100000 in each of 2 layers"):
        upcycle(Options(source=source, destination=str(tmp_path / "moe"), num_local_experts=10**5))
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("key, value", [
    ("step", "many"), ("step", -1), ("tokens", 10**30), ("sequence", 2.5), ("data_seed", [1]),
    ("history", [1]), ("history", [["a"]]), ("history", [["a", "b"]]), ("lineage", {"family": "x"}),
    ("lineage", {"N": "1"}),
    ("lineage", [1]), ("trunk", 7), ("passing", "yes"), ("max_seq_len", None), ("dataset", {})])
def test_a_training_state_of_other_types_is_refused_by_key(tiny, key, value):  # noqa: F811
    train(dataclasses.replace(tiny, rows=None, max_tokens=STEP, decay_steps=0), report=quiet)
    path = Path(tiny.out_dir) / "checkpoint-1" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=f"trainer_state.json: {'' if key == 'lineage' else key}") as error:
        checkpoint.read_state(path.parent)
    one_line(error)


@pytest.mark.parametrize("key", ["family", "N", "D1"])
def test_a_lineage_without_its_keys_is_refused(tiny, key):  # noqa: F811
    train(dataclasses.replace(tiny, rows=None, max_tokens=STEP, decay_steps=0), report=quiet)
    path = Path(tiny.out_dir) / "checkpoint-1" / "trainer_state.json"
    lineage = {k: v for k, v in {"family": "upcycled", "N": 5, "D1": 7}.items() if k != key}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lineage": lineage}))
    with pytest.raises(ConfigError, match=f"trainer_state.json: lineage: {key} is missing"):
        train(dataclasses.replace(tiny, rows=None, resume=True), report=quiet)


def test_moments_that_are_no_finite_real_numbers_are_refused(tiny):  # noqa: F811
    train(dataclasses.replace(tiny, rows=None, max_tokens=STEP, decay_steps=0), report=quiet)
    path, name = os.path.join(tiny.out_dir, "checkpoint-1", "optimizer.moments"), "exp_avg.model.norm.weight"
    good = load_file(path)
    for key, value in ((name, good[name].to(torch.int32)), (name, good[name] * float("nan")),
                       (name, good[name][1:]), ("more", good[name].clone()),
                       *(("step", torch.tensor(x)) for x in (-1.0, 0.5, float("inf"), 1e30, 1))):
        save_file(good | {key: value}, path)
        with pytest.raises(ConfigError, match=f"checkpoint-1.* {'step' if key == 'step' else key}") as error:
            train(dataclasses.replace(tiny, resume=True, rows=None), report=quiet)
        one_line(error)


def test_weights_that_are_not_finite_write_no_text_and_are_not_trained(tiny, tmp_path):  # noqa: F811
    train(dataclasses.replace(tiny, rows=None, max_tokens=STEP, decay_steps=0), report=quiet)
    path = os.path.join(tiny.out_dir, "checkpoint-1", "model.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="checkpoint-1: its weights are not finite"):
        sample.main(sample.Sample(tiny.out_dir))
    with pytest.raises(ConfigError, match="loss nan.*at step 0"):
        train(dataclasses.replace(tiny, rows=None, init_from=os.path.dirname(path),
                                  out_dir=str(tmp_path / "other")), report=quiet)


# ---------------------------------------------------------------------------------------------------------
# Data and tokenizers of strangers

def test_token_ids_beyond_the_vocabulary_are_found_at_the_start(tiny, tmp_path):  # noqa: F811
    for part in ("train", "val"):
        folder = tmp_path / part
        folder.mkdir()
        for name in ("train.npy", "val.npy", "meta.json"):
            (folder / name).write_bytes((Path(tiny.dataset) / name).read_bytes())
        tokens = np.load(folder / f"{part}.npy")
        tokens[-1] = 257
        np.save(folder / f"{part}.npy", tokens)
        with pytest.raises(ConfigError, match="holds token 257, but vocab_size is 257"):
            train(dataclasses.replace(tiny, dataset=str(folder)), report=quiet)
        assert not os.path.exists(os.path.join(tiny.out_dir, "log.jsonl"))


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("change, words", [(lambda t: t[:0], "too few tokens"), (np.int16, "holds int16"),
                                           (np.float32, "holds float32")])
def test_tokens_of_zero_length_or_another_type_are_found_at_the_start(tiny, tmp_path, part, change, words):  # noqa: F811
    shutil.copytree(tiny.dataset, tmp_path / "odd")
    path, meta = tmp_path / "odd" / f"{part}.npy", read_json(os.path.join(tiny.dataset, "meta.json"))
    changed = change(np.load(path)) if isinstance(change, type(lambda: 0)) else np.load(path).astype(change)
    np.save(path, changed)
    (tmp_path / "odd" / "meta.json").write_text(json.dumps(
        meta | {"tokens": meta["tokens"] | {part: len(changed)}}))
    with pytest.raises(ConfigError, match=words) as error:
        train(dataclasses.replace(tiny, dataset=str(tmp_path / "odd")), report=quiet)
    one_line(error)
    assert not os.path.exists(os.path.join(tiny.out_dir, "log.jsonl"))


def test_a_vocabulary_beyond_the_limit_is_refused(tiny, tmp_path):  # noqa: F811
    meta = read_json(os.path.join(tiny.dataset, "meta.json"))
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"vocab_size": 2**22 + 1}))
    with pytest.raises(ConfigError, match="meta.json: .*vocab_size: 4194305 is not in 1 .. 4194304"):
        load_tokens(tmp_path, "train")


@pytest.mark.parametrize("key", ["vocab_size", "eos_token_id", "tokenizer", "data_sha256", "dtype", "tokens"])
def test_a_meta_json_without_a_key_is_refused(tiny, tmp_path, key):  # noqa: F811
    meta = read_json(os.path.join(tiny.dataset, "meta.json"))
    for changed in ({k: v for k, v in meta.items() if k != key}, meta | {key: [1]}):
        (tmp_path / "meta.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=f"meta.json: .*{key}"):
            load_tokens(tmp_path, "train")


@pytest.mark.parametrize("vocabulary", [{}, {"a": 4 * 10**9, "</s>": 0}, {"a": 0}])
def test_a_tokenizer_without_a_usable_vocabulary_is_refused(tmp_path, vocabulary):
    pytest.importorskip("tokenizers")
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token_id": 5}))
    with pytest.raises(ConfigError, match="tokenizer.json") as error:
        load_tokenizer(str(path))
    one_line(error)


def test_a_text_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    import gzip
    monkeypatch.setattr("data.prepare.MOST_TEXT", 10**6)
    for name in ("a.jsonl.gz", "a.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b" " * 10**7))
        with pytest.raises(ConfigError, match="text of more than 1,000,000 bytes"):
            prepare(Prepare(str(tmp_path / name), out_dir=str(tmp_path / "out")))


def test_a_text_in_a_row_of_data_has_a_limit(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    monkeypatch.setattr("data.prepare.MOST_TEXT", 10**5)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b" * (10**5 + 1)]}), path)
    with pytest.raises(ConfigError, match="a.parquet: .*a text of more than 100,000 characters"):
        prepare(Prepare(str(path), out_dir=str(tmp_path / "out")))


# ---------------------------------------------------------------------------------------------------------
# Second writers, leftovers, removed directories, full disks

def test_two_writers_of_one_directory_never_meet(tmp_path):
    """The second one is refused while the first writes, and takes nothing from it."""
    with files.atomic_directory(tmp_path / "c") as temporary:
        (Path(temporary) / "a").write_text("first")
        with pytest.raises(ConfigError, match="is being written"):
            with files.atomic_directory(tmp_path / "c"):
                pass
    assert (tmp_path / "c" / "a").read_text() == "first" and os.listdir(tmp_path) == ["c"]


def test_a_writer_that_starts_as_another_one_finishes_leaves_nothing(tmp_path, monkeypatch):
    def make(*args, true=os.makedirs, **kwargs):
        true(*args, **kwargs)
        (tmp_path / "c").mkdir()  # by the other one, which found nobody there
    monkeypatch.setattr(files.os, "makedirs", make)
    with pytest.raises(ConfigError, match="is being written"):
        with files.atomic_directory(tmp_path / "c"):
            pass
    assert os.listdir(tmp_path) == ["c"]


def test_a_data_set_has_one_writer_and_its_leftovers_go(tmp_path):
    texts, out, temporary = tmp_path / "texts", tmp_path / "out", tmp_path / ".out.tmp"
    for folder in (texts, temporary):
        folder.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"text {i}")
    (temporary / "train.npy").write_text("left by a kill")
    fd = os.open(temporary, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="out: is being written"):
        prepare(Prepare(str(texts), out_dir=str(out)))
    os.close(fd)
    prepare(Prepare(str(texts), out_dir=str(out)))
    assert sorted(os.listdir(tmp_path)) == ["out", "texts"]
    assert sorted(os.listdir(out)) == ["meta.json", "train.npy", "val.npy"]


def test_a_lock_that_is_held_is_told_from_a_file_system_without_locks(tiny, monkeypatch, capsys):  # noqa: F811
    def no_locks(file, how):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(configurator.fcntl, "flock", no_locks)
    configurator.note.cache_clear()
    train(tiny, report=quiet)
    said = capsys.readouterr().err
    assert said.count("this file system has no locks (Function not implemented)") == 1
    assert len(open(tiny.rows).readlines()) == 1


def test_the_next_start_removes_what_a_kill_left(tiny):  # noqa: F811
    train(dataclasses.replace(tiny, rows=None, max_tokens=4 * STEP, decay_steps=0), report=quiet)
    for name in (".checkpoint-3.tmp", ".checkpoint-9.tmp"):
        os.makedirs(os.path.join(tiny.out_dir, name, "deep"))
    passing = os.path.join(tiny.out_dir, "checkpoint-2")
    os.rename(os.path.join(tiny.out_dir, "checkpoint-4"), passing)
    state = read_json(os.path.join(passing, "trainer_state.json"))
    state |= {"passing": True, "step": 2, "tokens": 2 * STEP, "sequence": 16}
    Path(passing, "trainer_state.json").write_text(json.dumps(state))
    train(dataclasses.replace(tiny, rows=None, max_tokens=4 * STEP, decay_steps=0, resume=True), report=quiet)
    assert sorted(n for n in os.listdir(tiny.out_dir) if "checkpoint" in n) == ["checkpoint-4"]


def test_a_removed_directory_is_an_error(tiny):  # noqa: F811
    c = dataclasses.replace(tiny, save_at_tokens=[10 * STEP])
    with pytest.raises(ConfigError, match="was removed while it was written to"):
        train(c, report=lambda tokens: shutil.rmtree(c.out_dir, ignore_errors=True))
    assert not os.path.exists(c.rows) and not os.path.exists(c.out_dir)


@pytest.mark.parametrize("name", ["log.jsonl", "config.py", "model.safetensors", "optimizer.moments",
                                  "trainer_state.json", "row.json"])
def test_a_full_disk_is_one_line_for_every_file(tiny, name, monkeypatch):  # noqa: F811
    """Writes to one file fail with ENOSPC, as on /dev/full; the next start makes up for it."""
    import builtins
    true_open, full = builtins.open, Path("/dev/full")

    def opened(path, *args, **kwargs):
        mode = args[0] if args else kwargs.get("mode", "r")
        hit = isinstance(path, (str, Path)) and os.path.basename(path).removesuffix(".tmp") == name
        return true_open(full if hit and set(mode) & set("wa+") else path, *args, **kwargs)
    c = dataclasses.replace(tiny, save_at_tokens=[10 * STEP])
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        with pytest.raises(ConfigError, match="the disk is full: [0-9,]+ bytes needed") as error:
            train(c, report=quiet)
    one_line(error)
    row = train(dataclasses.replace(c, resume=True), report=quiet)
    assert [json.loads(line) for line in open(c.rows)] == [row] and len(log(c)) == 20
    assert not [n for n in os.listdir(c.out_dir) if n.endswith(".tmp")]


def test_a_tokenizer_that_finds_no_room_is_one_line(tmp_path, limited_files):
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(200)))
    with limited_files(3000), pytest.raises(ConfigError, match="out: cannot be written: File too large") as e:
        prepare(Prepare(str(tmp_path / "a.txt"), tokenizer="bpe", out_dir=str(tmp_path / "out")))
    one_line(e)
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_logger_that_finds_no_room_is_one_line(tiny, monkeypatch):  # noqa: F811
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer")
    written = []

    def full(*args):
        written.append(args)
        if len(written) > 20:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(writer.RecordWriter, "write", full)
    with pytest.raises(ConfigError, match="the disk is full: 4,096 bytes needed") as error:
        train(dataclasses.replace(tiny, loggers=["tensorboard"], max_tokens=10**6), report=quiet)
    one_line(error)


def test_a_disk_without_room_for_a_directory_says_what_that_needs(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "makedirs", full)
    with pytest.raises(ConfigError, match="run: cannot be written: the disk is full: 4,096 bytes needed"):
        with configurator.locked(str(tmp_path / "run"), ".lock", ""):
            pass


# ---------------------------------------------------------------------------------------------------------
# Steps that are not finite

def test_weights_that_are_not_finite_are_never_named(tiny):  # noqa: F811
    """The update itself overflows: loss and gradient before it were finite."""
    c = dataclasses.replace(tiny, learning_rate=1e39, warmup_steps=0, max_tokens=STEP, decay_steps=0)
    with pytest.raises(ConfigError, match="checkpoint-1: not written: .* is not finite"):
        train(c, report=quiet)
    assert not os.path.exists(c.rows) and checkpoint.checkpoints(c.out_dir) == []
    assert os.listdir(c.out_dir).count(".checkpoint-1.tmp") == 0


@pytest.mark.parametrize("every", [0, 1])
def test_a_validation_loss_that_is_not_finite_is_an_error_and_no_signal(tiny, every):  # noqa: F811
    """The weights are finite, but so large that the next forward pass overflows."""
    c = dataclasses.replace(tiny, learning_rate=1e15, warmup_steps=0, max_tokens=STEP, decay_steps=0,
                            eval_every_steps=every)
    with pytest.raises(ConfigError, match="the validation loss is (nan|inf)") as error:
        train(c, report=quiet)
    assert not os.path.exists(c.rows) and ("step 1" in str(error.value)) == bool(every)


@pytest.mark.parametrize("allowed", [0, 2, 3])
def test_so_many_steps_that_are_not_finite_are_skipped(tiny, monkeypatch, allowed):  # noqa: F811
    """Three steps whose gradient is not finite: they change nothing, and the log counts them."""
    true_norm, true_step, calls, weights = torch.nn.utils.get_total_norm, train_module.train_step, [], []

    def total_norm(grads):
        calls.append(len(calls))
        if len(calls) in (4, 5, 9):
            grads[0][0, 0] = float("inf" if len(calls) == 4 else "nan")
        return true_norm(grads)

    def step(run, *rest):
        weights.append(run.model.embed_tokens.weight.detach().clone())
        return true_step(run, *rest)
    monkeypatch.setattr(train_module.torch.nn.utils, "get_total_norm", total_norm)
    monkeypatch.setattr(train_module, "train_step", step)
    c = dataclasses.replace(tiny, skip_nonfinite=allowed)
    if allowed < 3:
        with pytest.raises(ConfigError, match="at step .*not finite up to embed_tokens.weight.*Last good"):
            train(c, report=quiet)
        assert len(calls) == (4 if allowed == 0 else 9)
    else:
        train(c, report=quiet)
        assert [line.get("skipped") for line in log(c)] == [*[None] * 3, 1, 2, *[None] * 3, 3, *[None] * 11]
        assert all(torch.equal(weights[i], weights[i + 1]) for i in (3, 4, 8))
        assert not torch.equal(weights[5], weights[6])


# ---------------------------------------------------------------------------------------------------------
# Signals and streams

@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_what_a_terminal_and_a_batch_system_send_saves_the_step(tiny, tmp_path, number):  # noqa: F811
    c = dataclasses.replace(tiny, max_tokens=10**9, compile=False)
    process = start_training(c, tmp_path)
    wait_for(process, lambda: os.path.exists(os.path.join(c.out_dir, "log.jsonl")) and len(log(c)) > 3)
    process.send_signal(number)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "--resume goes on" in text
    assert checkpoint.checkpoints(c.out_dir)[-1][0] == log(c)[-1]["step"]


@pytest.mark.parametrize("where", ["the last validation", "a validation", "the pass before the first step",
                                   "the first step"])
def test_a_signal_interrupts_validation_and_compilation(tiny, monkeypatch, where):  # noqa: F811
    """Each stage would go on for ever; what was trained before is saved."""
    def endless(*args, stop=(), **kwargs):
        while not stop:
            time.sleep(0.001)
            if not sent:
                sent.append(os.kill(os.getpid(), signal.SIGUSR1))
        return true_validate(*args, stop=stop, **kwargs)
    sent, true_validate = [], train_module.validate
    c = tiny
    if where == "the first step":
        monkeypatch.setattr(train_module, "train_step", endless)
    else:
        monkeypatch.setattr(train_module, "validate", lambda run, stop=(), **kwargs: (
            true_validate if where == "a validation" and stop == () else endless)(run, stop=stop, **kwargs))
        c = dataclasses.replace(tiny, eval_every_steps=0 if "last" in where else 7)
    with pytest.raises(Stopped) as stopped:
        train(c, report=quiet)
    assert stopped.value.args == (signal.SIGUSR1,)
    steps = [step for step, _ in checkpoint.checkpoints(c.out_dir)]
    assert steps == {"the last validation": [20], "a validation": [7]}.get(where, [])
    monkeypatch.undo()
    row = train(dataclasses.replace(c, resume=True), report=quiet)
    assert [json.loads(line) for line in open(c.rows)] == [row] and len(log(c)) == 20


def test_a_signal_that_comes_again_ends_the_process_at_once(monkeypatch):
    now, killed = [0.0], []
    monkeypatch.setattr(start.time, "monotonic", lambda: now[0])
    with start.caught_signals() as signals:
        signals.at_once = False
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a batch system and torchrun send one each
        now[0] = 3.0
        with monkeypatch.context() as patch:
            true_kill = os.kill
            patch.setattr(start.os, "kill", lambda *args: killed.append(args))
            true_kill(os.getpid(), signal.SIGINT)  # of another kind: the save goes on
            assert killed == [] and signals.caught == [signal.SIGTERM] * 2 + [signal.SIGINT]
            true_kill(os.getpid(), signal.SIGTERM)
        assert killed == [(os.getpid(), signal.SIGTERM)]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL != signal.getsignal(signal.SIGINT)


def test_a_signal_in_the_middle_of_a_library_is_no_error_of_that_library():
    """C code that calls Python can turn the exception of a signal handler into one of its own."""
    with pytest.raises(Stopped) as stopped, start.caught_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape")
    assert stopped.value.args == (signal.SIGTERM,)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with start.caught_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.caught == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", ["gone", "never there"])
def test_a_closed_terminal_stops_no_training(tiny, tmp_path, closed):  # noqa: F811
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if closed == "never there":
        options["preexec_fn"] = lambda: [os.close(1), os.close(2)]
    process = start_training(dataclasses.replace(tiny, max_tokens=40 * STEP), tmp_path, **options)
    process.stdout.close(), process.stderr.close()
    assert process.wait(timeout=60) == 0 and len(log(tiny)) == 40


def test_a_full_disk_under_stderr_stops_no_training(tiny, tmp_path):  # noqa: F811
    with open("/dev/full", "w") as full:
        process = start_training(dataclasses.replace(tiny, max_tokens=40 * STEP), tmp_path, stderr=full)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and len(log(tiny)) == 40 and "validation loss" in text


@pytest.mark.parametrize("script", "train sweep upcycle sample fit_laws plan seal bench bench_train "
                                   "bench_scale data/prepare".split())
def test_ctrl_c_during_the_imports_prints_no_traceback(tmp_path, script):
    """SIGINT comes while torch or numpy is being imported."""
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
                                             "import time\ntime.sleep(60)\n")
    process = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT,
                             capture_output=True, text=True, timeout=60,
                             env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.returncode == -signal.SIGINT and "Traceback" not in process.stderr


# ---------------------------------------------------------------------------------------------------------
# Ranks and workers

def run_ranks(c, tmp_path, extra=()):
    write_config(c, tmp_path / "c.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
               "--standalone", "train.py", str(tmp_path / "c.py"), *extra]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_an_error_that_all_ranks_meet_is_said_once(tiny, tmp_path):  # noqa: F811
    for c, extra in ((tiny, ["--no_such=1"]), (dataclasses.replace(tiny, num_attention_heads=3), []),
                     (dataclasses.replace(tiny, learning_rate=1e30, warmup_steps=0), [])):
        result = run_ranks(dataclasses.replace(c, resume=True), tmp_path, extra)
        assert result.returncode != 0
        assert result.stderr.count("train.py: ") == 1, result.stderr
        assert 'train.py", line' not in result.stderr  # torchrun prints a traceback of its own
    assert "rank " in result.stderr


@pytest.mark.parametrize("error, said", [("OSError(5, 'Input/output error')", "Input/output error"),
                                         ("ZeroDivisionError('a fault')", "ZeroDivisionError: a fault")])
def test_an_error_of_one_rank_is_said_once_with_the_rank(tiny, tmp_path, error, said):  # noqa: F811
    write_config(tiny, tmp_path / "c.py")
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
                      "def build(run):\n"
                      f"    if os.environ['RANK'] == '1':\n        raise {error}\n    true(run)\n"
                      "true, train.build = train.build, build\ntrain.run(train.main, train.Train)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
               "--standalone", str(script), str(tmp_path / "c.py")]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
    assert text.count(said) == 1 and text.count("train.py: rank 1") == 1, text
    assert "rank 0" not in text and ("ZeroDivisionError" in error or "Input/output" in text)


def torchrun_that_lost_rank_1(c, tmp_path, *extra, by=signal.SIGKILL):
    """(torchrun with two ranks, the process of rank 1), which got a signal when checkpoint-5 was there."""
    write_config(c, tmp_path / "c.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", *extra,
               "--standalone", "train.py", str(tmp_path / "c.py")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: os.path.exists(os.path.join(c.out_dir, "checkpoint-5")))
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    victim = int(next(p for p in ranks if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes()))
    os.kill(victim, by)
    return process, victim


def test_torchrun_starts_dead_ranks_anew_and_says_that_the_run_is_finished(tiny, tmp_path):  # noqa: F811
    c = dataclasses.replace(tiny, max_tokens=80 * STEP, save_at_tokens=[5 * STEP], parallel="fsdp",
                            resume=True)
    process, _ = torchrun_that_lost_rank_1(c, tmp_path, "--max_restarts=1")
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in text, text
    assert [line["step"] for line in log(c)] == list(range(1, 81))
    before = digests(c.out_dir), Path(c.rows).read_text()
    again = run_ranks(c, tmp_path)
    assert again.returncode == 0 and again.stdout.count("row.json: finished already") == 1, again.stderr
    assert (digests(c.out_dir), Path(c.rows).read_text()) == before


def test_a_rank_that_has_gone_is_said_once_and_the_run_resumes(tiny, tmp_path):  # noqa: F811
    c = dataclasses.replace(tiny, max_tokens=10**9, compile=False, save_at_tokens=[5 * STEP])
    process, _ = torchrun_that_lost_rank_1(c, tmp_path)
    began = time.monotonic()
    _, text = process.communicate(timeout=60)
    assert time.monotonic() - began < 15
    assert process.returncode != 0 and text.count("train.py: rank 0: another rank has gone") == 1, text
    row = train(dataclasses.replace(c, resume=True, max_tokens=20 * STEP), report=quiet)
    assert row["D"] == 20 * STEP


def test_a_rank_that_sleeps_beyond_the_timeout_is_said_once(tiny, tmp_path):  # noqa: F811
    c = dataclasses.replace(tiny, max_tokens=10**9, compile=False, save_at_tokens=[5 * STEP],
                            timeout_seconds=10)
    process, sleeper = torchrun_that_lost_rank_1(c, tmp_path, by=signal.SIGSTOP)
    began, said = time.monotonic(), []
    for line in process.stderr:
        said.append(line)
        if "another rank has gone" in line:
            break
    assert 5 < time.monotonic() - began < 25
    os.kill(sleeper, signal.SIGCONT)
    said += process.stderr.readlines()
    assert process.wait(timeout=60) != 0 and "".join(said).count("train.py: ") == 1, said


def test_a_worker_that_dies_while_it_starts_costs_one_run(monkeypatch):
    """The first worker ends before it takes its job; the second one makes the others."""
    class Bar:
        update = set_postfix_str = staticmethod(lambda *args, **kwargs: None)
    monkeypatch.setattr(workers, "worker", ends_or_answers)
    jobs = [sweep.Job(dataclasses.replace(Train(), out_dir=name), None, 1, 1, {}) for name in "abc"]
    failed = workers.run_jobs(list(jobs), 1, [], Bar)
    assert failed == ["a: its process died"]


def ends_or_answers(connection, number):
    try:
        while True:
            job = connection.recv()
            if job.settings.out_dir == "a":
                os._exit(1)
            connection.send(("done", None))
    except EOFError:
        pass


@pytest.mark.skipif(not shutil.which("cc"), reason="the faults are made by a library in C")
def test_faults_on_purpose_lose_nothing():
    result = subprocess.run([sys.executable, "tests/chaos.py", "short"], cwd=ROOT, capture_output=True,
                            text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("0 lost, 0 tracebacks, 0 hangs, 0 leftovers") == 7
