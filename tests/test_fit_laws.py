"""The command fit_laws.py: what it writes, and what it says of bad input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import fit_laws as F
import engine
import laws
import uncertainty
from configurator import parse
from rows import read_rows
from simulated import HEAD_START, ROOT, SHARED, TABLE2, THREE, simulate


# The command


def test_command_writes_laws_report_and_figures(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = simulate(
        HEAD_START,
        SHARED,
        N=[4e4, 1e5, 3e5],
        D=np.geomspace(2e5, 8e6, 4),
        D1=np.geomspace(5e5, 8e6, 3),
        D2=np.geomspace(2e5, 8e6, 4),
        noise=0.004,
    )
    path.write_text(
        "".join(
            json.dumps(row | {"N_active": 1.5 * row["N"], "N_total": 5 * row["N"]}) + "\n" for row in rows
        )
    )
    F.main(F.Options(rows=[str(path)], out=str(tmp_path / "a"), draws=20))
    printed = capsys.readouterr().out
    assert (
        "skipped moe.joint" in printed
        and "effective data, shared" in printed
        and "alpha3 of the interaction law" in printed
    )
    written = json.loads((tmp_path / "a" / "laws.json").read_text())
    read, _ = read_rows([str(path)])  # the same command gives the same draws
    again = engine.fit(read, THREE)
    assert written["laws"]["moe"]["draws"]["alpha"] == pytest.approx(
        again.params("moe", uncertainty.bootstrap(again, 20))["alpha"], rel=1e-6
    )
    assert (
        written["version"] == 1
        and written["active_ratio"] == 1.5
        and written["ranges"]["upcycled"]["D1"] == pytest.approx([5e5, 8e6])
    )
    assert set(written["laws"]) == {"dense", "moe", *laws.RIVALS}
    assert len(written["at_each_N"]) == 3 and all(
        set(its) == set(laws.RIVALS) and its["upcycled"]["n"] == 12 for its in written["at_each_N"].values()
    )
    for law in laws.RIVALS:  # each with the laws of its own fit
        beside = written["laws"][law]["beside"]
        assert set(beside) == ({"dense"} if law.endswith("_shared") else {"dense", "moe"})
        assert all(len(values) == 20 for entry in beside.values() for values in entry["draws"].values())
    assert (
        written["laws"]["upcycled"]["beside"]["moe"]["params"]
        == written["laws"]["moe"]["params"]
        != written["laws"]["upcycled.additive"]["beside"]["moe"]["params"]
    )
    for law, entry in written["laws"].items():
        assert (
            list(entry["params"]) == list(entry["ci95"]) == list(entry["draws"]) == laws.parameter_names(law)
        )
        assert all(len(values) == 20 for values in entry["draws"].values())
        assert entry["n"] == sum(entry["fitted_with"].get(row["family"]) == law for row in rows)
    figures = {
        "loss_against_tokens",
        "exponent_against_D1",
        "residuals",
        "alpha3_along_E",
    }
    text = (tmp_path / "a" / "report.md").read_text()
    assert "parametric bootstrap" in text and "p <= 0.095" in text
    for name in figures:
        assert (
            (tmp_path / "a" / f"{name}.png").stat().st_size > 5000
            and (tmp_path / "a" / f"{name}.pdf").stat().st_size > 5000
            and f"]({name}.png)" in text
        )


def test_command_says_what_is_wrong_in_one_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("family,N,D,loss\ndense,1e6,1e9,3\ndense,1e6,2e9,2.9\n")
    for words, said in (
        (["--laws=dense"], "--laws: dense needs 3 levels of D, has 2"),
        (["--laws=dens"], "no law 'dens'"),
        (["--draws=3"], "draws: 3 is not at least 20"),
        ([], "no law can be fitted"),
        ([str(tmp_path / "none.csv")], "No such file"),
        (["--delta=0"], "--delta=0 is not positive"),
        (["--seed=-1"], "seed: -1"),
        (["--share=E,alpha9"], "'alpha9' is none of A, alpha, B, beta, E"),
    ):
        with pytest.raises(F.ConfigError, match=said):
            F.main(parse(F.Options, [str(path), f"--out={tmp_path / 'out'}", *words]))
    full = tmp_path / "full.jsonl"
    full.write_text("".join(json.dumps(row) + "\n" for row in simulate(TABLE2, {"dense": "dense"})))
    with pytest.raises(F.ConfigError, match="cannot be a directory"):
        F.main(parse(F.Options, [str(full), f"--out={path}"]))
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "fit_laws.py"), str(path), "--laws=dense"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "has 2" in done.stderr
        and done.stderr.count("\n") == 1
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_a_run_that_ends_before_the_report_is_whole_leaves_no_laws_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = simulate(TABLE2, {"dense": "dense"}, noise=0.004)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "out" / "residuals.png").mkdir(parents=True)  # the figure cannot be written
    with pytest.raises(F.ConfigError, match="the report cannot be written"):
        F.main(F.Options(rows=[str(path)], out=str(tmp_path / "out"), draws=20))
    assert not (tmp_path / "out" / "laws.json").exists()
    (tmp_path / "out" / "residuals.png").rmdir()
    F.main(F.Options(rows=[str(path)], out=str(tmp_path / "out"), draws=20))
    assert json.loads((tmp_path / "out" / "laws.json").read_text())["laws"]["dense"]["n"] == 20
    assert not (tmp_path / "out" / "laws.json.tmp").exists()
