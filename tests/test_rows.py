"""rows.py: which run a row is, labels of methods, and reading rows good and bad."""
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from configurator import ConfigError
from rows import (CONDITIONS, DECAY, FAMILIES, KNOBS, LATER, RUN, SETTINGS, SIZES, append_row, bits_per_nat,
                  differences, loss_columns, loss_text, method_label, mixed_conditions, read_row, read_rows,
                  run_key)
from simulated import TABLE2, simulate

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"family": "dense", "N": 1e6, "D": 1e9, "loss": 3.0}
FULL = {  # a row of an upcycled run, as train.py writes it
    "family": "upcycled", "N": 40160, "N_active": 68576, "N_total": 234464, "D1": 524288, "D2": 262144,
    "loss": 2.5,
    "loss_se": 0.01, "bits_per_byte": 3.2, "num_local_experts": 8, "num_experts_per_tok": 2,
    "method": "merge", "noise_std": 0.1,
    "noise_fraction": 0.5, "drop_ratio": 0.5, "granularity": 2, "merge_shared": "average", "router_std": 0.02,
    "router_init": "clusters", "optimizer": "reset", "seed": 0, "flops": 10**12, "trunk": "moe-trunk",
    "dense_trunk": "dense-trunk",
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 10000.0, "initializer_range": 0.02,
    "decay_start": 100, "decay_steps": 28, "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 3e-3,
    "schedule": "wsd", "warmup_steps": 20, "min_lr_ratio": 0.0, "weight_decay": 0.1, "beta1": 0.9,
    "beta2": 0.95, "grad_clip": 1.0, "dtype": "float32", "repeat_data": False, "eval_tokens": 131072,
    "router_aux_loss_coef": 0.01, "router_aux_loss_pooled": False, "router_z_loss_coef": 0.001,
    "router_bias_update_rate": 0.0, "sequences_per_pass": 16,
    "tokens_before_schedule": 0, "config": "out/a/config.py", "data_sha256": "17a3" * 16, "git": "1234567",
    "torch": "2.13.0"}


def another(value):
    """A value of the same type that is not `value`."""
    return {bool: lambda: not value, str: lambda: value + "2"}.get(type(value), lambda: value * 2 + 1)()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------------------------------------------
# Which run a row is

@pytest.mark.parametrize("key", [*SETTINGS, *KNOBS, "seed", "trunk", "dense_trunk", "data_sha256", "D1",
                                 "D2", "method", "num_local_experts", "num_experts_per_tok"])
def test_two_runs_that_differ_in_one_setting_never_pass_for_one_another(tmp_path, key):
    other = FULL | {key: another(FULL[key])}
    missing = {k: v for k, v in FULL.items() if k != key}
    assert len({run_key(FULL), run_key(other), run_key(missing)}) == 3 - (key in LATER)
    assert (run_key(FULL) == run_key(missing)) == (key in LATER)
    assert differences(FULL, other) == [(key, FULL[key], other[key])]
    assert run_key(FULL, (key,)) == run_key(other, (key,))
    assert run_key(FULL, ("loss",)) != run_key(other, ("loss",))
    rows, dropped = read_rows([write(tmp_path / "rows.jsonl", [FULL, other])])
    assert not dropped and len(set(map(run_key, rows))) == 2 and len(differences(*rows)) == 1
    said = mixed_conditions(rows)
    assert list(said) == [key] * (key in CONDITIONS) and (not said or len(said[key]) == 2)


@pytest.mark.parametrize("key", ["config", "git", "torch", "loss", "loss_se", "flops", "N_active",
                                 "bits_per_byte"])
def test_other_columns_make_no_other_run(key):
    assert run_key(FULL) == run_key(FULL | {key: another(FULL[key])}) and key not in RUN


def test_a_row_counts_once_whether_it_says_bits_a_byte_or_not(tmp_path):
    older = {key: value for key, value in FULL.items() if key != "bits_per_byte"}
    rows = [FULL, older, FULL | {"bits_per_byte": None}]
    assert len(read_rows([write(tmp_path / "rows.jsonl", rows)])[0]) == 1
    assert loss_text(FULL) == "2.5000 nats a token (3.2000 bits a byte)"
    assert loss_text(older) == loss_text(loss_columns(2.5, None)) == "2.5000 nats a token"
    other_run = older | {"seed": 5, "loss": 2.0}
    ratio = bits_per_nat([older, FULL, other_run | {"bits_per_byte": 2.56}])
    assert ratio == pytest.approx(1.28) and loss_text(loss_columns(2.5, ratio)) == loss_text(FULL)
    assert bits_per_nat([older]) is bits_per_nat([FULL, other_run | {"bits_per_byte": 2.57}]) is None


@pytest.mark.parametrize("bits", ["many", -1.0, [], True])
def test_bits_a_byte_that_are_no_number_are_refused(tmp_path, bits):
    with pytest.raises(ConfigError, match="rows.jsonl:1: bits_per_byte: "):
        read_rows([write(tmp_path / "rows.jsonl", [FULL | {"bits_per_byte": bits}])])


def test_conditions_are_all_settings_but_those_that_vary_with_size_and_length():
    assert set(SETTINGS) - set(CONDITIONS) == {*SIZES, *DECAY} and "seed" not in CONDITIONS
    dense = [{k: v for k, v in FULL.items() if not k.startswith("router")}
             | {"hidden_size": h, "initializer_range": r}
             for h, r in ((32, 0.68 / math.sqrt(32)), (64, 0.085), (100, 0.068))]
    # all automatic
    assert mixed_conditions([FULL | {"initializer_range": 0.68 / math.sqrt(32)}, *dense]) == {}
    assert mixed_conditions([FULL, *dense]) == {"initializer_range": [0.02, "auto"]}


def test_a_learning_rate_may_follow_the_size_but_must_not_differ_within_one():
    tuned = [FULL, FULL | {"N": 2 * FULL["N"], "learning_rate": FULL["learning_rate"] / 2}]
    assert mixed_conditions(tuned) == {}
    pilot = {"family": "dense", "N": FULL["N"], "D": 3e6, "loss": 2.0, "tokens_before_schedule": 2e6}
    assert mixed_conditions([FULL, pilot]) == {}
    assert mixed_conditions([FULL, pilot, pilot | {"tokens_before_schedule": 0}]) == {
        "tokens_before_schedule": [2e6, 0]}
    older = {key: value for key, value in FULL.items() if key != "router_aux_loss_pooled"}
    assert mixed_conditions([older, FULL | {"router_aux_loss_pooled": True}]) == {
        "router_aux_loss_pooled": [False, True]}
    again = tuned[1] | {"learning_rate": 0.5}
    assert mixed_conditions([*tuned, again]) == {"learning_rate": [FULL["learning_rate"] / 2, 0.5]}


def test_a_csv_and_a_jsonl_row_of_one_run_are_the_same(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",".join(FULL) + "\n" + ",".join(map(str, FULL.values())) + "\n")
    (a,), (b,) = read_rows([str(path)])[0], read_rows([write(tmp_path / "rows.jsonl", [FULL])])[0]
    assert run_key(a) == run_key(b) == run_key(FULL) and method_label(a) == method_label(b)
    assert len(read_rows([str(path), str(tmp_path / "rows.jsonl")])[0]) == 1
    names = FULL | {"trunk": "7e5", "data_sha256": "1" * 64}  # words that could be read as numbers
    assert run_key(names) != run_key(names | {"trunk": "700000"})
    assert run_key(names | {"trunk": 7}) == run_key(names | {"trunk": "7"})


@pytest.mark.parametrize("path", [ROOT / "tests" / "data" / "rows_without_settings.jsonl",
                                  *(ROOT / "results").glob("*.jsonl")], ids=lambda path: path.stem)
def test_rows_of_the_repository_read_older_ones_included(path):
    rows, dropped = read_rows([str(path)])
    assert len(rows) == len(path.read_text().splitlines()) == len(set(map(run_key, rows))) and not dropped
    bits = [row["bits_per_byte"] / row["loss"] for row in rows if "bits_per_byte" in row]
    # Bytes of validation text are a token each, and so is the end of each document.
    documents, n_bytes = (120, 391552) if path.stem == "study_headers" else (60, 1214522)
    assert bits == pytest.approx([(1 + documents / n_bytes) / math.log(2)] * len(bits), rel=1e-12)
    assert len(bits) in (0, len(rows)) and (bits or path.stem == "rows_without_settings")


# ---------------------------------------------------------------------------------------------------------
# Labels

@pytest.mark.parametrize("row, label", [
    ({"method": "copy"}, "copy"), ({"method": "copy", "router_std": 0.02, "optimizer": "reset"}, "copy"),
    ({"method": "drop", "drop_ratio": 0.5}, "drop 0.5"),
    ({"method": "drop_per_matrix", "drop_ratio": "1.0"}, "drop per matrix 1"),
    ({"method": "virtual_groups", "granularity": 2}, "virtual groups G = 2"),
    ({"method": "noise", "noise_std": 0.1, "noise_fraction": 1.0}, "noise 0.1 σ"),
    ({"method": "noise", "noise_std": 0.1, "noise_fraction": 0.5}, "noise 0.1 σ on 0.5"),
    ({"method": "copy", "optimizer": "copy"}, "copy optimizer copy"),
    ({"method": "copy", "router_std": 0.1}, "copy router 0.1"),
    ({"method": "copy", "router_init": "normal"}, "copy"),
    ({"method": "copy", "router_init": "clusters", "router_std": 0.2},
     "copy router from clusters router 0.2"),
    ({"method": "merge", "merge_shared": "average"}, "merge"),
    ({"method": "merge", "merge_shared": "first"}, "merge shared from first")])
def test_labels_tell_all_knobs_apart(row, label):
    assert method_label(row) == label


# ---------------------------------------------------------------------------------------------------------
# Reading and appending

@pytest.mark.parametrize("line, complaint", [
    ('{"family": "dense", "N": 1e6, "loss": 3}', "D is missing"),
    ('{"family": "dense", "N": 1e6, "D": "", "loss": 3}', "D is missing"),
    ('{"family": "dense", "N": 0, "D": 1e9, "loss": 3}', "N: 0 is not a number within 1e-6 .. 1e16"),
    ('{"family": "dense", "N": 1e6, "D": 1e9, "loss": NaN}', "loss: nan is not"),
    ('{"family": "dense", "N": 1e6, "D": 1e9, "loss": -2}', "loss: -2 is not"),
    ('{"family": "dense", "N": "many", "D": 1e9, "loss": 3}', "'many' is not a number"),
    ('{"family": "dense", "N": true, "D": 1e9, "loss": 3}', "True is not a number"),
    ('{"family": "Dense", "N": 1e6, "D": 1e9, "loss": 3}', "family 'Dense' is none of dense, moe, upcycled"),
    ('{"family": "upcycled", "N": 1e6, "D1": 1e9, "loss": 3}', "D2 is missing"),
    ('{"family": "upcycled", "N": 1e6, "D1": 0, "D2": 1, "loss": 3}', "D1: 0 is not"),
    ('{"family": "dense", "N": 1e6, "D": 1e17, "loss": 3}', "D: 1e+17 is not"),
    ("[1, 2]", "not a JSON object"), ("{", "not valid JSON"),
    ('{"family": "dense", "N": 1' + "0" * 400 + ', "D": 1e9, "loss": 3}', "too large a number")])
def test_bad_rows_are_refused_with_file_and_line_or_dropped_and_counted(tmp_path, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(ConfigError) as error:
        read_rows([str(path)])
    assert f"{path}:3: " in str(error.value)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
    rows, dropped = read_rows([str(path)], skip_bad=True)
    assert len(rows) == 1 and len(dropped) == 1 and complaint in dropped[0]


def test_odd_values_of_optional_columns_stop_nothing(tmp_path):
    odd = {"hidden_size": "wide", "initializer_range": float("inf"), "granularity": 10**99, "seed": [1],
           "trunk": {"a": 1},
           "N_total": "many", "learning_rate": float("nan")}
    rows, dropped = read_rows([write(tmp_path / "rows.jsonl", [GOOD, GOOD | odd])])
    assert len(rows) == 2 == len(set(map(run_key, rows))) and not dropped
    assert mixed_conditions(rows) == {} and method_label(rows[1]) and "N_total" not in rows[1]


def test_identical_lines_count_once_and_repeated_runs_each_time(tmp_path):
    """A rerun elsewhere that gives the same loss is no new row; another loss of the same run is."""
    elsewhere, rerun = FULL | {"config": "b/config.py", "git": "7654321"}, FULL | {"loss": 2.6}
    path = write(tmp_path / "rows.jsonl", [FULL, GOOD, FULL, elsewhere, rerun])
    rows, dropped = read_rows([path, path])
    assert [row["loss"] for row in rows] == [2.5, 3.0, 2.6] and not dropped
    assert run_key(rows[0]) == run_key(rows[2])


def test_columns_of_other_families_are_left_out(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("family,N,D,D1,D2,loss,method,drop_ratio,note\ndense,1e6,1e9,0,nan,3,,,\"a, b\"\n"
                    "upcycled,1e6,2e9,1e9,1e9,2.9,drop,0.5,\nupcycled,1e6,0,1e9,1e9,2.8,drop,0.25,\n")
    rows, _ = read_rows([str(path)])
    assert [set(row) & {"D", "D1", "D2"} for row in rows] == [{"D"}, {"D1", "D2"}, {"D1", "D2"}]
    assert [method_label(row) for row in rows[1:]] == ["drop 0.5", "drop 0.25"] and rows[0]["note"] == "a, b"


@pytest.mark.parametrize("torn, kept", [("", 0), ('{"family": "den', 0), (json.dumps(GOOD)[:-1], 0),
                                        ("\0\0", 0), (json.dumps(GOOD | {"loss": 4}), 1)])
def test_a_row_is_appended_once_and_a_torn_line_is_healed(tmp_path, torn, kept):
    """A line that was cut short is the row of a run that appends it again. A whole one only lacks its end."""
    path = tmp_path / "rows.jsonl"
    for _ in range(2):
        append_row(str(path), GOOD)
    assert path.read_text() == json.dumps(GOOD) + "\n"
    with open(path, "a") as f:
        f.write(torn)
    for row in (FULL, FULL, GOOD):
        append_row(str(path), row)
    lines = [GOOD, *[GOOD | {"loss": 4}] * kept, FULL]
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in lines)


def test_a_row_on_a_full_disk_is_one_line_and_leaves_the_file_whole(tmp_path, limited_files):
    path = str(tmp_path / "rows.jsonl")
    append_row(path, GOOD)
    with limited_files(len(json.dumps(GOOD)) + 10), pytest.raises(ConfigError, match="cannot be written"):
        append_row(path, FULL)
    assert open(path).read() == json.dumps(GOOD) + "\n"
    append_row(path, FULL)
    assert len(read_rows([path])[0]) == 2


@pytest.mark.parametrize("content", [{}, {"family": "dense"}, GOOD | {"loss": float("nan")},
                                     GOOD | {"N": "x"}])
def test_a_row_of_a_finished_run_is_checked(tmp_path, content):
    path = tmp_path / "row.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="row.json: "):
        read_row(str(path))


def test_csv_and_jsonl_give_the_same_rows_and_repeats_count_once(tmp_path):
    rows = simulate(TABLE2)
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    text = "\ufefffamily,N,D,D1,D2,loss,trunk,seed,note\r\n"
    for row in rows:
        tokens = ",".join(repr(float(row[name])) if name in row else "" for name in ("D", "D1", "D2"))
        cells = f'{row["family"]},{row["N"]!r},{tokens},{row["loss"]!r},{row["trunk"]},{row["seed"]}'
        text += cells + ',"a, b"\r\n'
    table.write_text(text)
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_csv, from_lines = read_rows([str(table)])[0], read_rows([str(lines), str(lines)])[0]
    assert len(from_csv) == len(from_lines) == len(rows) and all(row["note"] == "a, b" for row in from_csv)
    for one, other in zip(from_csv, from_lines):
        assert all(one.get(name) == other.get(name) for name in ("family", "N", "D", "D1", "D2", "loss"))


ODD = (st.sampled_from(["dense", "upcycled", "moe"]) | st.integers() | st.floats() | st.text(max_size=8)
       | st.none() | st.booleans() | st.lists(st.integers(), max_size=2))
COLUMNS = st.sampled_from(["family", "N", "D", "D1", "D2", "loss", "trunk", "N_active"])
LINES = st.lists(st.dictionaries(COLUMNS, ODD), max_size=4)
TEXT = LINES.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())


@settings(max_examples=150)
@given(st.binary(max_size=300) | TEXT, st.sampled_from(["jsonl", "csv"]))
def test_reader_never_crashes(tmp_path_factory, content, kind):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes((b"family,N,D,D1,D2,loss\n" if kind == "csv" else b"") + content)
    for skip in (False, True):
        try:
            rows, _ = read_rows([str(path)], skip)
        except ConfigError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert rows
            for row in rows:
                assert all(row[k] > 0 and math.isfinite(row[k]) for k in (*FAMILIES[row["family"]], "loss"))
