"""The row reader against bad rows."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import fit_laws as F
import laws
import report
import uncertainty
from rows import FAMILIES, RowError, clean, read_rows
from simulated import DATA, TABLE2, THREE, simulate


# Rows

GOOD = {"family": "dense", "N": 1e6, "D": 1e9, "loss": 3.0}


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"family": "dense", "N": 1e6, "loss": 3}', "D is missing"),
        ('{"family": "dense", "N": 1e6, "D": "", "loss": 3}', "D is missing"),
        ('{"family": "dense", "N": 0, "D": 1e9, "loss": 3}', "N: 0.0 is not positive"),
        ('{"family": "dense", "N": 1e6, "D": 1e9, "loss": NaN}', "loss: nan"),
        ('{"family": "dense", "N": 1e6, "D": 1e9, "loss": -2}', "loss: -2.0 is not positive"),
        ('{"family": "dense", "N": "many", "D": 1e9, "loss": 3}', "'many' is not a number"),
        ('{"family": "dense", "N": true, "D": 1e9, "loss": 3}', "True is not a number"),
        (
            '{"family": "Dense", "N": 1e6, "D": 1e9, "loss": 3}',
            "family 'Dense' is none of dense, moe, upcycled",
        ),
        ('{"family": "upcycled", "N": 1e6, "D1": 1e9, "loss": 3}', "D2 is missing"),
        ('{"family": "upcycled", "N": 1e6, "D1": 0, "D2": 1, "loss": 3}', "D1: 0.0"),
        ('{"family": "dense", "N": 1e6, "D": 1e17, "loss": 3}', "D: 1e+17 is not within"),
        ("[1, 2]", "not a JSON object"),
        ("{", "not valid JSON"),
        ('{"family": "dense", "N": 1e6, "D": 1e9, "loss": 3.1}', "but the same run has 3 at"),
        ('{"family": "dense", "N": 1' + "0" * 400 + ', "D": 1e9, "loss": 3}', "not a number"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line_or_dropped_and_counted(tmp_path, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(RowError) as error:
        read_rows([str(path)])
    assert (
        f"{path}:3: " in str(error.value) and complaint in str(error.value) and "\n" not in str(error.value)
    )
    rows, dropped = read_rows([str(path)], skip_bad=True)
    assert len(rows) == 1 and len(dropped) == 1 and complaint in dropped[0]


def test_csv_and_jsonl_give_the_same_rows_and_repeats_count_once(tmp_path):
    rows = simulate(TABLE2)
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    text = "\ufefffamily,N,D,D1,D2,loss,trunk,seed,note\r\n"
    for row in rows:
        tokens = ",".join(repr(float(row[name])) if name in row else "" for name in ("D", "D1", "D2"))
        cells = f'{row["family"]},{row["N"]!r},{tokens},{row["loss"]!r},{row["trunk"]},{row["seed"]}'
        text += cells + ',"a, b"\r\n'
    table.write_text(text)
    lines.write_text("".join(json.dumps(r) + "\n" for r in rows))
    a, b = read_rows([str(table)])[0], read_rows([str(lines), str(lines)])[0]
    assert len(a) == len(b) == len(rows) and all(x["note"] == "a, b" for x in a)
    assert [[x.get(k) for k in ("family", "N", "D", "D1", "D2", "loss")] for x in a] == [
        [x.get(k) for k in ("family", "N", "D", "D1", "D2", "loss")] for x in b
    ]


def test_columns_of_other_families_and_knobs_of_the_method(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "family,N,D,D1,D2,loss,method,drop_ratio\ndense,1e6,1e9,0,nan,3,,\nupcycled,1e6,2e9,1e9,1e9,2.9,drop,0.5\nupcycled,1e6,0,1e9,1e9,2.8,drop,0.25\n"
    )
    rows, _ = read_rows([str(path)])
    assert [set(row) & {"D", "D1", "D2"} for row in rows] == [{"D"}, {"D1", "D2"}, {"D1", "D2"}]
    assert [report.method_label(row) for row in rows[1:]] == ["drop 0.5", "drop 0.25"]


NUMBERS = st.sampled_from([1, 2.0, "3", 1e6, 1e7, 1e-6, 1e16])


@settings(max_examples=150)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "family": st.sampled_from(list(FAMILIES)),
                "N": NUMBERS,
                "D": NUMBERS,
                "D1": NUMBERS,
                "D2": NUMBERS,
                "loss": NUMBERS,
            },
            optional={"trunk": st.integers(0, 3), "N_active": NUMBERS, "N_total": NUMBERS},
        ),
        min_size=1,
        max_size=24,
    )
)
def test_whatever_rows_can_be_read_can_be_planned(rows):
    fits, lacks = F.plan_fits([clean(row) for row in rows])
    assert set(fits) | set(lacks) == set(laws.LAWS)


@settings(max_examples=12)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1e7, 1e8, 1e9), (1e-6, 1.0, 1e16), (1e6, 1.000001e6, 3e6)]),
    st.sampled_from([0.1, 1.0, 6.0]),
)
def test_few_and_odd_rows_that_are_accepted_can_be_fitted(seed, D, spread):
    random = np.random.default_rng(seed)
    rows = [
        clean(
            {
                "family": family,
                "N": 1e6,
                "D": d,
                "D1": d,
                "D2": e,
                "loss": float(np.clip(random.lognormal(0, spread), 1e-6, 1e6)),
            }
        )
        for family in FAMILIES
        for d in D
        for e in D
    ]
    rows = [row for row in rows if random.random() < 0.7]
    for law, (system, mine) in F.plan_fits(rows)[0].items():
        fit = laws.fit(mine, system)
        assert math.isfinite(uncertainty.aicc(fit)) and all(map(math.isfinite, fit.params(law).values()))


@settings(max_examples=150)
@given(
    st.binary(max_size=300)
    | st.lists(
        st.dictionaries(
            st.sampled_from(["family", "N", "D", "D1", "D2", "loss", "trunk", "N_active"]),
            st.sampled_from(["dense", "upcycled", "moe"])
            | st.integers()
            | st.floats()
            | st.text(max_size=8)
            | st.none()
            | st.booleans()
            | st.lists(st.integers(), max_size=2),
        ),
        max_size=4,
    ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    st.sampled_from(["jsonl", "csv"]),
)
def test_reader_never_crashes(tmp_path_factory, content, kind):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes((b"family,N,D,D1,D2,loss\n" if kind == "csv" else b"") + content)
    for skip in (False, True):
        try:
            rows, dropped = read_rows([str(path)], skip)
        except RowError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert rows and all(
                row[k] > 0 and math.isfinite(row[k])
                for row in rows
                for k in (*FAMILIES[row["family"]], "loss")
            )


def test_missing_levels_are_named():
    assert laws.missing(simulate(TABLE2, D=DATA[:2]), {"dense": "dense"}) == ["needs 3 levels of D, has 2"]
    assert laws.missing(simulate(TABLE2, D1=DATA[:1]), {"upcycled": "upcycled"}) == [
        "needs 3 levels of D1, has 1"
    ]
    assert laws.missing(simulate(TABLE2, {"dense": "dense"}), THREE) == [
        "has no moe rows",
        "has no upcycled rows",
    ]
    assert laws.missing(simulate(TABLE2, N=[1e8], D=DATA[:3]), {"dense": "dense"}) == [
        "has 3 rows for 3 parameters, needs 6"
    ]
    fits, lacks = F.plan_fits(simulate(TABLE2, {"dense": "dense", "upcycled": "upcycled"}))
    assert "upcycled.additive" in fits and fits["upcycled"][0] == {"dense": "dense", "upcycled": "upcycled"}
    assert (
        lacks["moe"] == lacks["upcycled.effective_data_shared"] == "has no moe rows"
        and "levels of experts" in F.plan_fits(simulate(TABLE2))[1]["moe.joint"]
    )
