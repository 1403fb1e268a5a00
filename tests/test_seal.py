"""Sealed predictions: of the withheld rows and no others, by each law, and judged by hand."""
import contextlib
import json
import math

import pytest

import fit_laws
from configurator import ConfigError, parse
from laws import predict
from report import method_differences, methods_table
from rows import read_rows
from seal import Options, main
from sweep import planned_rows
from test_sweep import ROOT, mini, study  # noqa: F401  (mini is a fixture)
from test_train import data  # noqa: F401  (data is a fixture)

LAWS = ROOT / "laws" / "pysource_quick.json"


def seal(*arguments):
    main(parse(Options, list(map(str, arguments))))


def test_each_law_predicts_the_withheld_rows_and_is_judged_by_what_was_run(mini, tmp_path, capsys):  # noqa: F811
    with pytest.raises(ConfigError, match="withholds no rows"):
        seal(mini, f"--laws={LAWS}")
    mini.write_text(mini.read_text() + "num_local_experts = 8\nwithheld = [{'D2': 5120}, {'D': 5120}]\n")
    sealed, out = tmp_path / "results" / "sealed.json", tmp_path / "rows.jsonl"
    seal(mini, f"--laws={LAWS}", f"--out={sealed}")
    content, laws = json.loads(sealed.read_text()), json.loads(LAWS.read_text())["laws"]
    held = [row for row in planned_rows(study(mini, "--train_withheld"))
            if 5120 in (row.get("D2"), row.get("D"))]
    assert [(r["family"], r["N"], r.get("D1")) for r in content["rows"]] == [
        (r["family"], r["N"], r.get("D1")) for r in held] and len(held) == 2 * (1 + 1 + 3)
    for row in content["rows"]:
        rivals = {law for law in laws if law.startswith("upcycled")}
        assert set(row["predicted"]) == rivals
        for law, (low, middle, high) in row["predicted"].items():
            entry = laws[law] if row["family"] == "upcycled" else laws[law]["beside"].get(row["family"])
            if entry and (row["family"] == "upcycled" or "A" in entry["params"]):
                counts = {key: row[key] for key in ("N", "D", "D1", "D2") if key in row}
                name = law if row["family"] == "upcycled" else row["family"]
                assert low < middle < high
                assert low < predict(name, entry["params"], **counts) < high
    # Rows whose losses are the predictions of one law times a known factor are judged to have that error.
    law, factor = "upcycled.handicap", 1.02
    rows = [row | {"loss": row["predicted"][law][1] * factor} for row in held_with(content["rows"], held)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    capsys.readouterr()
    seal(out, f"--out={sealed}")
    said = capsys.readouterr().out
    error = 100 * math.log(factor)
    assert f"{len(rows) - 1} of {len(rows)} sealed rows were run" in said
    line = next(line for line in said.splitlines() if line.split()[1:4] == ["upcycled", "|", "handicap"])
    inside = sum(row["predicted"][law][0] <= row["loss"] <= row["predicted"][law][2]
                 for row in rows if row["family"] == "upcycled")
    assert [cell.strip() for cell in line.split("|")[3:-1]] == [
        "6", f"{error:.2f}", f"{-error:+.2f}", str(inside)]


@pytest.mark.parametrize("content", [{"git": "x"}, {"rows": [7]}, {"git": "x", "rows": 7}, {"rows": [
    {"family": "dense", "N": 1e6, "D": 1e9, "predicted": {"dense": [1, 2]}}]}])
def test_what_was_never_sealed_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "sealed.json").write_text(json.dumps(content))
    (tmp_path / "rows.jsonl").write_text('{"family": "dense", "N": 1e6, "D": 1e9, "loss": 3.0}\n')
    with pytest.raises(ConfigError, match="sealed.json: holds no sealed predictions") as error:
        seal(tmp_path / "rows.jsonl", f"--out={tmp_path / 'sealed.json'}")
    assert "\n" not in str(error.value)


def test_predictions_that_cannot_be_written_are_one_line(mini):  # noqa: F811
    mini.write_text(mini.read_text() + "num_local_experts = 8\nwithheld = [{'D2': 5120}]\n")
    with pytest.raises(ConfigError, match="/proc/none/sealed.json: cannot be written"):
        seal(mini, f"--laws={LAWS}", "--out=/proc/none/sealed.json")


def held_with(sealed, planned):
    return [row | {"predicted": told["predicted"]} for told, row in zip(sealed, planned)]


def test_dense_and_moe_rows_alone_predict_all_upcycled_rows(mini, tmp_path):  # noqa: F811
    mini.write_text(mini.read_text() + "num_local_experts = 8\n"
                                       "methods = [{'method': 'copy'}, {'method': 'drop'}]\n")
    rows, sealed = tmp_path / "scratch.jsonl", tmp_path / "sealed.json"
    lines = (ROOT / "results" / "study_quick.jsonl").read_text().splitlines()
    rows.write_text("\n".join(line for line in lines if json.loads(line)["family"] != "upcycled"))
    fit_laws.main(parse(fit_laws.Options, [str(rows), f"--out={tmp_path}", "--draws=50"]))
    seal(mini, "--withheld=[{'family': 'upcycled'}]", f"--laws={tmp_path / 'laws.json'}", f"--out={sealed}")
    predicted = {}
    law = "upcycled.loss_matching_0"
    params = json.loads((tmp_path / "laws.json").read_text())["laws"][law]["params"]
    for row in json.loads(sealed.read_text())["rows"]:
        (low, middle, high), = row["predicted"].values()
        assert low < predict(law, params, **{key: row[key] for key in ("N", "D1", "D2")}) < high
        predicted.setdefault(row["method"], []).append(middle)
    assert len(predicted["copy"]) == len(predicted["drop"]) > 5
    assert predicted["drop"] == pytest.approx(predicted["copy"], rel=0.01)  # but for the draws of noise


def test_laws_of_one_method_predict_its_rows_and_laws_of_none_are_refused(mini, tmp_path):  # noqa: F811
    mini.write_text(mini.read_text() + "num_local_experts = 8\nwithheld = [{'family': 'upcycled'}]\n"
                                       "methods = [{'method': 'drop'}]\n")
    rows = [json.loads(line) for line in (ROOT / "results" / "study_quick.jsonl").read_text().splitlines()]
    rows = [row | ({"method": "drop", "drop_ratio": 0.5} if "D1" in row else {}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for only, said in (("upcycled.handicap", None), ("dense,moe", "has no law of the rows")):
        flags = [str(tmp_path / "rows.jsonl"), f"--out={tmp_path}", "--draws=20", f"--laws={only}"]
        fit_laws.main(parse(fit_laws.Options, flags))
        with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
            seal(mini, f"--laws={tmp_path / 'laws.json'}", f"--out={tmp_path / 'sealed.json'}")
    sealed = json.loads((tmp_path / "sealed.json").read_text())["rows"]
    assert sealed and all(set(row["predicted"]) == {"upcycled.handicap"} for row in sealed)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("sealed*.json")), ids=lambda path: path.stem)
def test_the_page_of_the_study_has_what_seal_prints(path, capsys):
    study = "study_headers" if path.stem == "sealed_headers" else "study"
    seal(ROOT / "results" / f"{study}.jsonl", f"--out={path}")
    page = (ROOT / "results" / "README.md").read_text()
    assert f"`{path.name}`\n```\n{capsys.readouterr().out.strip()}\n```" in page


def test_the_page_of_the_study_has_the_losses_of_the_splits_at_equal_flops():
    page = (ROOT / "results" / "README.md").read_text()
    rows = read_rows([str(ROOT / "results" / name) for name in ("study.jsonl", "study_split.jsonl")])[0]
    per_token = {row["family"]: row["flops"] / row["D"] for row in rows if row["N"] == 55536 and "D" in row}
    for D1, D2 in ((0, 2**23), (2**19, 8015872), (2**22, 5408768)):
        found = {row["seed"]: row for row in rows
                 if row["N"] == 55536 and row["family"] != "dense" and row.get("D1", 0) == D1
                 and row.get("D2", row.get("D")) == D2 and row.get("method", "drop") == "drop"}
        assert f" | {found[0]['loss']:.4f} | {found[1]['loss']:.4f} |" in page
        budget = D1 * per_token["dense"] + found[0]["flops"]
        assert budget == pytest.approx(2**23 * per_token["moe"], rel=1e-3)


def test_the_page_of_the_study_has_the_table_of_methods():
    files = [str(ROOT / "results" / name) for name in ("study.jsonl", "study_more.jsonl")]
    rows = [row for row in read_rows(files)[0] if row["N"] == 23712]
    few = {key: {d2: pairs for d2, pairs in cells.items() if d2 < 1e7}
           for key, cells in method_differences(rows).items() if key[2] < 1e7}
    assert "\n".join(methods_table(few)) in (ROOT / "results" / "README.md").read_text()
