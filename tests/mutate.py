"""Mutated files of all kinds, and the functions that read them. It is the mode `files` of chaos.py."""
import contextlib
import dataclasses
import gzip
import io
import json
import random
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch

import checkpoint
import configurator
import plan
import seal
import start
import sweep
import train
import upcycle
from data import prepare
from data.stream import check_ids, load_tokens
from model import Transformer
from rows import read_row, read_rows

ROOT = Path(__file__).resolve().parent.parent

ODD = [None, True, -1, 0, 1e308, float("nan"), 10**9, 10**18, 10**30, "", "x", "é" * 99, [], [1], {},
       {"a": 1}, [[]], [[[]]]]
INSERTED = [b"[" * 1000, b"9" * 500, b"\0", b"\xff\xfe", b"-", b'"', b"{", b"\n", b"e99"]


def mutated(data, rng):
    """Other bytes than `data`: cut, changed or doubled, or with another value somewhere in its JSON."""
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if isinstance(value, dict) and rng.random() < 0.7:
        place = value
        while True:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            inner = place[key]
            if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
                break
            place = inner
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(ODD)
        return json.dumps(value).encode()
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        i = rng.randrange(len(data) + 1)
        if rng.random() < 0.3:
            i = min(i, 400)  # headers
        how = rng.randrange(6)
        if how == 0:
            del data[i:]
        elif how == 1:
            del data[i:i + rng.randint(1, 50)]
        elif how == 2:
            data[i:i] = rng.choice(INSERTED)
        elif how == 3:
            data[i:i] = data[max(0, i - 100):i] * rng.choice([1, 2, 50])
        elif i < len(data):
            data[i] = rng.randrange(256)
    return bytes(data)


def make_files(world, made):
    """Good files of all kinds in the folder `made`."""
    shutil.copytree(world.dense, made / "dense")
    moe = checkpoint.load_model(world.folder / "start")
    optimizer = torch.optim.AdamW(moe.parameters())
    ids = torch.arange(32).view(2, 16)
    moe(ids, ids)[0].backward()
    optimizer.step()
    state = checkpoint.read_state(world.folder / "start")
    checkpoint.save(made / "moe", moe, state, optimizer)
    checkpoint.write(made / "shards", checkpoint.contents(moe, optimizer), state, shard_size=20_000)
    shutil.copytree(world.data, made / "data")
    for name in ("rows_without_settings.jsonl", "olmo_ladder_c4.csv"):
        lines = (ROOT / "tests" / "data" / name).read_text().splitlines(keepends=True)
        (made / name).write_text("".join(lines[:20]))
    shutil.copy(ROOT / "laws" / "liew2025.json", made / "laws.json")
    shutil.copy(ROOT / "config" / "study_methods.py", made / "study.py")
    shutil.copy(world.folder / "row.json", made / "row.json")
    configurator.write_config(world.kinds["moe"], made / "train.py")
    texts = "".join(json.dumps({"text": f"text {i} of a few words", "id": i}) + "\n" for i in range(20))
    (made / "texts.jsonl").write_text(texts)
    (made / "packed.jsonl.gz").write_bytes(gzip.compress(texts.encode()))
    (made / "plain.txt.gz").write_bytes(gzip.compress(texts.encode()))
    sealed, _ = read_rows([str(made / "rows_without_settings.jsonl")])
    sealed = [seal.identity(row) | {"predicted": {"dense": [2.0, 2.5, 3.0]}} for row in sealed]
    (made / "sealed.json").write_text(json.dumps({"git": "x", "rows": sealed}))


def about(path, read):
    """Call `read`, with the name of the file before an error that names a key alone."""
    try:
        read()
    except configurator.ConfigError as error:
        raise configurator.ConfigError(f"{path}: {error}") from None


def targets(world):
    """[(a good file, a function that reads it)]."""
    made = world.folder / "strangers"
    made.mkdir()
    make_files(world, made)

    def tokens(path):
        parts = [load_tokens(made / "data", part) for part in ("train", "val")]
        check_ids("data", parts[0][1], *(part[0] for part in parts))

    def begun(path):
        given = {"init_from": str(path.parent), "branch": path.parent.name == "dense", "dataset": world.data,
                 "rows": str(made / "rows.jsonl"), "max_seq_len": 16, "tokens_per_step": 128}
        c = configurator.from_dict(train.Train, given)
        start.resolve(c, load_tokens(world.data, "train")[1], 1)

    def study(path):
        study = configurator.parse(sweep.Study, [str(path), f"--dataset={world.data}"])
        about(path, lambda: sweep.study_jobs(study))

    def training(path):
        c = configurator.parse(train.Train, [str(path), f"--dataset={world.data}", "--init_from=none",
                                             f"--out_dir={made / 'run'}", "--branch=false"])
        with torch.device("meta"):
            about(path, lambda: Transformer(start.resolve(c, load_tokens(world.data, "train")[1], 1)[1]))

    def planned(path):
        for more in (["--N=1e9", "--D1=1e11", "--tokens=5e10"], ["--flops=1e21", "--fresh", "--json"]):
            about(path, lambda: plan.main(configurator.parse(plan.Options, [f"--laws={path}", *more])))

    def judged(path):
        seal.judge(seal.Options(str(made / "rows_without_settings.jsonl"), out=str(path)))

    def text(path):
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # without its progress
                prepare.prepare(prepare.Options(str(path), out_dir=str(made / "out")))
        finally:
            shutil.rmtree(made / "out", ignore_errors=True)

    def upcycled(path):
        moe = dataclasses.replace((source := upcycle.Source(str(path.parent))).config, num_local_experts=4)
        upcycle.pieces_of(source, moe)

    def moments(path):
        model = checkpoint.load_model(path.parent)
        checkpoint.load_moments(path.parent, model, torch.optim.AdamW(model.parameters()))

    def tokenizer(path):
        prepare.load_tokenizer(str(path)).encode(["some text"])
    found = [(made / "study.py", study), (made / "train.py", training), (made / "laws.json", planned),
             (made / "sealed.json", judged), (made / "row.json", lambda path: read_row(str(path))),
             *((made / name, text) for name in ("texts.jsonl", "packed.jsonl.gz", "plain.txt.gz")),
             *((made / "shards" / f"{name}.index.json", moments)
               for name in ("model.safetensors", "optimizer.moments")),
             *((made / "dense" / name, upcycled)
               for name in ("config.json", "model.safetensors", "trainer_state.json")),
             (made / "rows_without_settings.jsonl", lambda path: read_rows([str(path)], skip_bad=True)),
             (made / "olmo_ladder_c4.csv", lambda path: read_rows([str(path)], skip_bad=True))]
    found += [(made / "data" / name, tokens) for name in ("meta.json", "train.npy", "val.npy")]
    for kind in ("dense", "moe"):
        found += [(made / kind / name, lambda path: checkpoint.load_model(path.parent))
                  for name in ("config.json", "model.safetensors")]
        found += [(made / kind / "trainer_state.json", begun), (made / kind / "optimizer.moments", moments)]
    try:
        prepare.train_bpe(["some text of a few words"] * 3, 270).save(str(made / "tokenizer.json"))
        found.append((made / "tokenizer.json", tokenizer))
    except ModuleNotFoundError:
        pass  # the package tokenizers is not there
    return found


def files(world, trials, rng, count):
    """Mutated files: each reader takes one or refuses it in one line, in 5 s and 1 GB."""
    row = world.fresh("dense")
    world.training(row).end(count)
    shutil.copy(f"{row.out_dir}/row.json", world.folder / "row.json")
    listed = targets(world)
    world.check(world.process(lambda: [read(path) for path, read in listed]))  # all are good as they are
    for begin in range(0, trials, 200):
        def action(begin=begin):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
            for i in range(begin, min(trials, begin + 200)):
                path, read = listed[i % len(listed)]
                good = path.read_bytes()
                path.write_bytes(bad := mutated(good, random.Random(f"{rng.random()}/{i}")))
                signal.alarm(60), signal.setitimer(signal.ITIMER_PROF, 5)  # of the clock; of the processor
                try:
                    read(path)
                except configurator.ConfigError as error:
                    named = path.name in str(error) or path.parent.name in str(error)
                    if "\n" in str(error) or not named:
                        print(f"{path.name}: a bad message: {error}", file=sys.stderr)
                except BaseException:
                    print(f"{path.name}: {bad[:300]}", file=sys.stderr)
                    traceback.print_exc()
                signal.alarm(0), signal.setitimer(signal.ITIMER_PROF, 0)
                path.write_bytes(good)
        status, text = world.process(action).end(count, timeout=600)
        if status in (-signal.SIGALRM, -signal.SIGPROF):
            count.say("hangs", text)
        elif status or "a bad message" in text:
            count.say("lost", f"status {status}: {text}")
        count.trials = min(trials, begin + 200)
