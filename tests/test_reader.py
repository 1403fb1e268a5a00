"""Rows files in and out of the reader: CSV and JSONL alike, and no content that crashes it."""
import json
import math

from hypothesis import given, settings, strategies as st

from configurator import ConfigError
from rows import FAMILIES, read_rows
from simulated import TABLE2, simulate


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
