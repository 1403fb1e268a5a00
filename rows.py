"""A row is one finished run, a line of a JSONL file: its columns, which run it is, reading and appending."""
import csv
import errno
import json
import math
import os

from configurator import ConfigError, lock, naming, open_to_write, parse_json, read_json, read_text, writing

# The columns that a row of each family must have, beside the loss.
FAMILIES = {"dense": ("N", "D"), "moe": ("N", "D"), "upcycled": ("N", "D1", "D2")}

# The columns that tell two ways of upcycling apart, beside `method`: (usual value, words in a label).
KNOBS = {"noise_std": (None, "{} σ"), "noise_fraction": (1, "on {}"), "drop_ratio": (None, "{}"),
         "granularity": (None, "G = {}"), "merge_shared": ("average", "shared from {}"),
         "router_init": ("normal", "router from {}"), "router_std": (0.02, "router {}"),
         "optimizer": ("reset", "optimizer {}")}

# Every setting that moves the loss: train.py writes them all to the row. A dense row has no ROUTING columns.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")
EXPERTS = ("num_local_experts", "num_experts_per_tok")
ARCHITECTURE = (*SIZES, "tie_word_embeddings", "rope_theta", "initializer_range")
DECAY = ("decay_start", "decay_steps")
TRAINING = (*DECAY, "tokens_per_step", "max_seq_len", "learning_rate", "schedule", "warmup_steps",
            "min_lr_ratio", "weight_decay", "beta1", "beta2", "grad_clip", "dtype", "repeat_data",
            "eval_tokens")
ROUTING = ("router_aux_loss_coef", "router_aux_loss_pooled", "router_z_loss_coef", "router_bias_update_rate")
# sequences_per_pass: sequences of all ranks over which one balance loss is taken; a dense row has none.
# tokens_before_schedule: tokens that the weights had seen when this learning-rate schedule began.
SETTINGS = (*ARCHITECTURE, *TRAINING, *ROUTING, "sequences_per_pass", "tokens_before_schedule")

# The settings that must agree among the rows of one fit: all but those that vary with N and D by design.
CONDITIONS = tuple(key for key in SETTINGS if key not in SIZES + DECAY)

NAMES = ("family", "method", "trunk", "dense_trunk", "data_sha256")  # words, even if they look like numbers
RUN = ("N", "D", "D1", "D2", "seed", *EXPERTS, *NAMES, *KNOBS, *SETTINGS)
LATER = {"router_aux_loss_pooled": False}  # what rows did from before there was a column
ORIGIN = ("config", "git", "torch", "bits_per_byte")  # they are no part of which run a row is


# ---------------------------------------------------------------------------------------------------------
# Which run a row is

def plain(column, value):
    """A column's value, the same from JSON and CSV: "2e3" is 2000.0, "true" is True, "" and nan are None."""
    if column in NAMES:
        return None if value in (None, "") else str(value)
    if isinstance(value, str):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        try:
            value = float(value)
        except ValueError:
            return value or None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, int) else str(value)


def run_key(row, but=()):
    """Which run a row is: a tuple, the values of all columns that tell runs apart, those in `but` left out.

    A missing column is None: a row that does not say its learning rate is not the same run as one that does.
    """
    return tuple(plain(key, row.get(key, LATER.get(key))) for key in RUN if key not in but)


def differences(a, b):
    """[(column, its value in a, its value in b)] of the columns that make two rows different runs."""
    return [(key, a.get(key), b.get(key)) for key, x, y in zip(RUN, run_key(a), run_key(b)) if x != y]


def mixed_conditions(rows):
    """{condition: its values, two or more} where rows of one fit were made under different conditions.

    A column that a row lacks says nothing. An initializer_range of automatic_range(hidden_size) is "auto". A
    learning rate may be tuned to the size: only rows of one N must agree on it. The dense rows of a pilot
    begin a schedule late: only rows of one family must agree on that.
    """
    within = {"learning_rate": "N", "tokens_before_schedule": "family"}
    found = {}
    for row in rows:
        for key in CONDITIONS:
            later = LATER.get(key) if "router_aux_loss_coef" in row else None
            value = plain(key, row.get(key, later))
            if key == "initializer_range" and value and value == automatic_range(row.get("hidden_size")):
                value = "auto"
            if value is not None:
                found.setdefault((key, row.get(within.get(key))), {})[value] = True
    return {key: list(values) for (key, _), values in found.items() if len(values) > 1}


def automatic_range(hidden_size):
    """The standard deviation of fresh weights with which training of no width starts with a plateau."""
    known = isinstance(hidden_size, (int, float)) and hidden_size > 0
    return 0.68 / math.sqrt(hidden_size) if known else None


def unusual_knobs(row):
    """{knob: value} of the knobs that tell a row's method apart from others of its name."""
    values = {key: plain(key, row.get(key)) for key in KNOBS}
    return {key: value for key, value in values.items() if value not in (None, KNOBS[key][0])}


def before_split(row):
    """{column: value} of experts as they were before virtual groups split each of them into parts."""
    def number(column):
        return row[column] if isinstance(row.get(column), (int, float)) else 0

    parts = number("granularity") or 1
    return {"num_local_experts": number("num_local_experts") / parts,
            "num_experts_per_tok": number("num_experts_per_tok") / parts,
            "intermediate_size": number("intermediate_size") * parts}


def method_label(row):
    """A row's way of upcycling in words, as "drop 0.5", "virtual groups G = 2", "copy optimizer copy"."""
    words = [str(row.get("method")).replace("_", " ")]
    for key, value in unusual_knobs(row).items():
        words.append(KNOBS[key][1].format(f"{value:g}" if isinstance(value, (int, float)) else value))
    return " ".join(words)


def loss_text(row):
    """A row's loss in words, as "1.4800 nats a token (2.1352 bits a byte)"."""
    bits = row.get("bits_per_byte")
    return f"{float(row['loss']):.4f} nats a token" + (f" ({float(bits):.4f} bits a byte)" if bits else "")


def bits_per_nat(rows):
    """Bits a byte of a loss of one nat a token, a constant of the data set and its tokenizer. None where no
    row has bits_per_byte, or where two rows disagree."""
    ratios = [row["bits_per_byte"] / row["loss"] for row in rows if "bits_per_byte" in row]
    return ratios[0] if ratios and max(ratios) - min(ratios) < 1e-6 * max(ratios) else None


def loss_columns(loss, ratio):
    """{"loss": in nats a token, "bits_per_byte": the same loss, unless the ratio of bits_per_nat is None}."""
    return {"loss": loss} | ({"bits_per_byte": loss * ratio} if ratio else {})


# ---------------------------------------------------------------------------------------------------------
# Reading and appending

def number(column, value):
    """A number of a size that can be meant, from JSON or CSV. Raises ValueError."""
    found = plain(column, value)
    if type(found) not in (int, float) or not 1e-6 <= found <= 1e16:
        raise ValueError(f"{column}: {value!r:.40} is not a number within 1e-6 .. 1e16")
    return float(found)


def clean(raw):
    """A checked row from a JSON object or CSV line. Raises ValueError saying what is wrong."""
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    if not isinstance(raw.get("family"), str) or raw["family"] not in FAMILIES:
        raise ValueError(f"family {raw.get('family')!r} is none of {', '.join(FAMILIES)}")
    foreign = {"D", "D1", "D2"} - set(FAMILIES[raw["family"]])  # a table gives them a 0 or nan
    row = {key: value for key, value in raw.items()
           if isinstance(key, str) and key not in foreign and value not in (None, "")}
    for key in (*FAMILIES[row["family"]], "loss", *{"bits_per_byte"} & row.keys()):
        if key not in row:
            raise ValueError(f"{key} is missing")
        row[key] = number(key, row[key])
    for key in {"N_active", "N_total", "num_local_experts", "num_experts_per_tok"} & row.keys():
        try:
            row[key] = number(key, row[key])
        except ValueError:  # not every law needs them
            del row[key]
    return row | {key: plain(key, row[key]) for key in (*NAMES, *KNOBS, *SETTINGS) if key in row}


def raw_rows(path):
    """Yields (line number, what a file of rows holds there: JSON text, or the dict of a CSV line)."""
    text = read_text(path)
    if text.count("\n") > 200_000:
        raise ConfigError(f"{path}: has more than 200,000 lines")
    if not path.endswith(".csv"):
        yield from ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        return
    reader = csv.DictReader(text.splitlines(keepends=True))
    try:
        for raw in reader:
            yield reader.line_num, raw
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: {error}") from None


def read_rows(paths, skip_bad=False):
    """([row], [what was dropped and why]) of JSONL files, and CSV files with columns family,N,D,D1,D2,loss.

    Rows that differ in ORIGIN alone count once. A run that was repeated with another loss is there each time.
    Raises ConfigError at the first bad row unless skip_bad.
    """
    rows, dropped = {}, []
    for path in paths:
        for line, raw in raw_rows(path):
            try:
                row = clean(parse_json(raw) if isinstance(raw, str) else raw)
                content = frozenset((key, plain(key, row[key])) for key in row if key not in ORIGIN)
                rows.setdefault(content, row)
            except ValueError as error:
                if not skip_bad:
                    raise ConfigError(f"{path}:{line}: {error} (--skip_bad drops such rows)") from None
                dropped.append(f"{path}:{line}: {error}")
    if not rows:
        raise ConfigError(f"{', '.join(paths)}: no rows ({len(dropped)} bad ones dropped)")
    return list(rows.values()), dropped


def append_row(path, row):
    """Append `row` to a JSONL file, once and whole. A last line that was cut short there is removed first.
    Raises ConfigError."""
    line = (json.dumps(row) + "\n").encode()
    with writing(path, len(line)):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open_to_write(path, "ab+") as f:
            lock(f, path, wait=True)  # other runs append to it too
            f.seek(0)
            *lines, last = f.read().split(b"\n")
            end = f.tell()
            try:
                parse_json(last)
                lines.append(last)
                line = b"\n" + line
            except ValueError:  # empty, or a row of a run that was killed or whose disk was full
                end -= len(last)
                if last:
                    f.truncate(end)
            if line.strip() in lines:
                return
            try:
                if f.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(f.fileno())
            except OSError:
                f.truncate(end)
                raise


def read_row(path):
    """The row in a run's row.json. Raises ConfigError."""
    row = read_json(path)
    with naming(path):
        clean(row)
    return row
