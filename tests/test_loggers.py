"""TensorBoard and Weights & Biases get the lines of log.jsonl, as their own readers see them."""
import dataclasses
import glob
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest

import loggers
from configurator import ConfigError
from test_train import STEP, data, log, moe, quiet, tiny  # noqa: F401  (fixtures)
from train import train


def numbers(c):
    """{(name, step): number} of log.jsonl, read here by hand: lists of numbers have an entry a layer."""
    found = {}
    for line in log(c):
        for key, value in line.items():
            if key == "effective_experts":
                found |= {(f"{key}/{i}", line["step"]): v for i, v in enumerate(value)}
            elif key != "router_load" and value is not None:
                found[key, line["step"]] = value
    return found


def test_tensorboard_shows_the_log_also_of_a_resumed_run(tiny):  # noqa: F811
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    c = moe(tiny, loggers=["tensorboard"], max_tokens=8 * STEP, eval_every_steps=4, rows=None,
            save_at_tokens=[6 * STEP], decay_steps=0)
    train(c, report=quiet)
    shutil.rmtree(os.path.join(c.out_dir, "checkpoint-8"))
    train(dataclasses.replace(c, resume=True, max_tokens=12 * STEP), report=quiet)  # steps 7 and 8 come again
    events = reader.EventAccumulator(os.path.join(c.out_dir, "tensorboard"), {reader.SCALARS: 0}).Reload()
    shown = {(name, event.step): event.value for name in events.Tags()["scalars"]
             for event in events.Scalars(name)}
    expected = numbers(c)
    assert shown.keys() == expected.keys() and ("val_bits_per_byte", 12) in shown
    assert {step for _, step in shown} == set(range(1, 13))
    assert all(shown[key] == pytest.approx(value, rel=1e-6) for key, value in expected.items())  # fp32
    assert sum(len(events.Scalars(name)) for name in events.Tags()["scalars"]) == len(expected)


def leveldb_records(content):
    """The records of a file in LevelDB's log format: blocks of 32 KiB of pieces with a header of 7 bytes,
    which has a checksum, a length and a kind. Weights & Biases puts 7 bytes of its own first."""
    place, record = 7, b""
    while place + 7 <= len(content):
        length, kind = struct.unpack("<HB", content[place + 4:place + 7])
        record += content[place + 7:place + 7 + length]
        if kind in (1, 4):  # a whole record, or its last piece
            yield record
            record = b""
        place += 7 + length
        left = -place % 2**15
        place += left if left < 7 else 0


def test_weights_and_biases_gets_the_log_offline(tiny, monkeypatch):  # noqa: F811
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    c = moe(tiny, loggers=["wandb"], max_tokens=8 * STEP, eval_every_steps=4)
    train(c, report=quiet)
    path, = glob.glob(os.path.join(c.out_dir, "wandb", "offline-run-*", "*.wandb"))
    shown = {}
    for content in leveldb_records(open(path, "rb").read()):
        history = wandb_internal_pb2.Record.FromString(content).history
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        shown |= {(key, items["step"]): value for key, value in items.items() if key[0] != "_"}
    assert shown == numbers(c)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_any_step(tiny, name, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, name, None)  # import of it fails, as where it is not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ConfigError, match=f"--loggers={name}: .*{name}") as error:
        train(dataclasses.replace(tiny, loggers=[name]), report=quiet)
    assert "\n" not in str(error.value) and log(tiny) == []


def test_no_logger_is_imported_unless_asked_for(tiny):  # noqa: F811
    settings = dataclasses.asdict(dataclasses.replace(tiny, max_tokens=STEP))
    code = (f"import sys, train\ntrain.train(train.Train(**{settings!r}), report=print)\n"
            "assert not {'tensorboard', 'wandb', 'torch.utils.tensorboard'} & set(sys.modules)")
    result = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(loggers.__file__),
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
