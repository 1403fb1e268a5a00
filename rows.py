"""Rows: one finished run each, a line of a JSONL file. Their columns, reading them with checks, appending one."""
import csv
import fcntl
import json
import math
import os

from configurator import ConfigError

FAMILIES = {"dense": ("N", "D"), "moe": ("N", "D"), "upcycled": ("N", "D1", "D2")}  # what a row must have
KNOBS = ("noise_std", "noise_fraction", "drop_ratio", "granularity")  # columns that tell ways of upcycling apart


class RowError(ConfigError, ValueError):
    """A row that cannot be used, with its file and line."""


def number(value):
    """A positive number of a size that can be meant, from JSON or CSV. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number")
    try:
        value = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{str(value)[:40]!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{value} is not positive and finite")
    if not 1e-6 <= value <= 1e16:
        raise ValueError(f"{value:g} is not within 1e-6 .. 1e16")
    return value


def clean(raw):
    """A checked row from a JSON object or CSV line. Raises ValueError saying what is wrong."""
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    if not isinstance(raw.get("family"), str) or raw["family"] not in FAMILIES:
        raise ValueError(f"family {raw.get('family')!r} is none of {', '.join(FAMILIES)}")
    foreign = {"D", "D1", "D2"} - set(FAMILIES[raw["family"]])  # a table gives them a 0 or nan
    row = {key: value for key, value in raw.items() if isinstance(key, str) and key not in foreign and value not in (None, "")}
    for key in (*FAMILIES[row["family"]], "loss"):
        if key not in row:
            raise ValueError(f"{key} is missing")
        try:
            row[key] = number(row[key])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    for key in ("N_active", "N_total", "num_local_experts", "num_experts_per_tok"):  # for the laws that use them
        try:
            row[key] = number(row[key])
        except (KeyError, ValueError):
            row.pop(key, None)
    for key in KNOBS:
        try:
            row[key] = float(row[key])
        except (KeyError, TypeError, ValueError, OverflowError):
            row.pop(key, None)
    return row


def read_rows(paths, skip_bad=False):
    """([row], [what was dropped and why]) from JSONL files, or CSV files (*.csv) with a header: family,N,D,D1,D2,loss and more.

    A row seen twice counts once. Raises RowError at the first bad row unless skip_bad.
    """
    rows, dropped, seen = [], [], {}
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig", errors="replace", newline="" if path.endswith(".csv") else None) as f:
                text = f.read()
        except OSError as error:
            raise RowError(f"{path}: {error.strerror}") from None
        if path.endswith(".csv"):
            reader = csv.DictReader(text.splitlines(keepends=True))
            lines = ((reader.line_num, raw) for raw in reader)
        else:
            lines = ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        while True:
            try:
                line, raw = next(lines)
            except StopIteration:
                break
            except csv.Error as error:  # the rest of the file is lost with it
                line, raw = reader.line_num, error
                lines = iter(())
            try:
                if isinstance(raw, Exception):
                    raise ValueError(str(raw))
                try:
                    row = clean(json.loads(raw) if isinstance(raw, str) else raw)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"not valid JSON ({error})") from None
                key = tuple(str(row.get(k)) for k in ("family", "N", "D", "D1", "D2", "seed", "method", *KNOBS, "trunk", "data_sha256",
                                                      "num_local_experts", "num_experts_per_tok"))
                if key not in seen:
                    seen[key] = row["loss"], f"{path}:{line}"
                    rows.append(row)
                elif seen[key][0] != row["loss"]:
                    raise ValueError(f"loss {row['loss']:g}, but the same run has {seen[key][0]:g} at {seen[key][1]}")
            except ValueError as error:
                message = f"{path}:{line}: {error}"
                if not skip_bad:
                    raise RowError(f"{message} (--skip_bad drops such rows)") from None
                dropped.append(message)
    if not rows:
        raise RowError(f"{', '.join(paths)}: no rows" + f" ({len(dropped)} bad ones dropped)" * bool(dropped))
    return rows, dropped


def append_row(path, row):
    """Append `row` to a JSONL file, once."""
    line = json.dumps(row) + "\n"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # other runs append to it too
        f.seek(0)
        if line not in f:
            f.write(line)
