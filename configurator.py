"""Settings: dataclass defaults <- config file <- --key=value. Typed, strict, never executed.

A script starts with `run(main, Options)`. Each field of the dataclass Options is a setting with a meaning:

    source: str = setting(REQUIRED, "text file to read", positional=True)
    seed: int = setting(0, "random seed")

The setting `config`, where there is one, names a file that assigns literals, and arithmetic on numbers and
on names assigned above. A name that starts with _ is no setting but serves the lines below it.

Every script also reads, writes and locks files by the functions below.
"""
import ast
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import json
import math
import operator
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import types
import typing

from tqdm import tqdm

REQUIRED = object()


class ConfigError(Exception):
    """One line for the user: which setting or file is wrong, in what, and how to mend it."""


def setting(default, meaning, positional=False, least=None, most=None):
    """A dataclass field with its meaning and the range of its numbers. The user must give a REQUIRED one."""
    metadata = {"meaning": meaning, "positional": positional, "least": least, "most": most}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------
# Reading and writing files. A file may come from a stranger, so each reader states how much it takes.

MAX_BYTES = 2**25  # of a JSON or text file that is read at once
MAX_LEVELS = 100   # of nesting: Python's recursion limit depends on the caller and on loaded libraries
MAX_DIGITS = 100   # of a whole number


def check_file(path, most=math.inf):
    """Raises ConfigError unless `path` is a regular file of `most` bytes at most. To open a pipe can hang."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: cannot be read: it is no regular file")
    if status.st_size > most:
        raise ConfigError(f"{path}: has {status.st_size:,} bytes, at most {most:,} are read")


def read_text(path, most=MAX_BYTES, errors="strict", newline=None):
    """The text of a UTF-8 file of `most` bytes at most. Raises ConfigError naming the file."""
    check_file(path, most)
    try:
        with open(path, encoding="utf-8-sig", errors=errors, newline=newline) as f:
            return f.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid UTF-8: {error}") from None


def parse_json(text):
    """The value of a JSON text. Raises ValueError for what is nested too deep or has too long numbers too."""
    def whole(digits):
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a number has {len(digits)} digits, at most {MAX_DIGITS} are read")
        return int(digits)
    try:
        value = json.loads(text, parse_int=whole)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not shallow(value, MAX_LEVELS):
        raise ValueError(f"nested too deep: more than {MAX_LEVELS} levels")
    return value


def shallow(value, levels):
    """Whether lists and dicts in `value` are nested in so many levels at most."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(shallow(part, levels - 1) for part in parts)


def read_json(path):
    """A JSON file's object. Raises ConfigError naming the file."""
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds no JSON object")
    return value


def one_line(error):
    """What an error of a library says, in one line."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


@contextlib.contextmanager
def writing(path, needed=None):
    """In it, an OSError becomes a ConfigError of one line. needed: the bytes that are to be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = os.path.dirname(os.path.abspath(path))
            while not os.path.isdir(existing):
                existing = os.path.dirname(existing)
            wanted = "" if needed is None else f"{needed:,} bytes needed, "
            reason = f"the disk is full: {wanted}{shutil.disk_usage(existing).free:,} free"
        raise ConfigError(f"{path}: cannot be written: {reason}") from None


def write_text_atomically(path, text):
    """Write `text` to the file `path`. A kill at any moment leaves the old file or the new one, complete.
    Raises ConfigError."""
    temporary = f"{path}.tmp"
    with writing(path, len(text)):
        try:
            with open(temporary, "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


def lock(file, held, wait=False):
    """Lock an open file until it is closed. Raises ConfigError(held) where another process has it locked,
    unless it is to `wait`. Without locks on the file system the user has to see to it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise ConfigError(held) from None
    except OSError as error:
        note(f"this file system has no locks ({error.strerror}): nothing keeps a second process away")


@functools.cache
def note(text):
    """Print a note to the user, once."""
    print(f"note: {text}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------
# Values: literals and arithmetic, evaluated over the syntax tree

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
             ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
MAX_BITS = 1000       # of a whole number; floats end there too
MAX_CONFIG = 100_000  # bytes of a config file, and characters and numbers in its values together
TOO_DEEP = (MemoryError, RecursionError)  # Python raises these for source that it cannot parse


def evaluate(node, names, level=0):
    """The value of a syntax tree of literals, arithmetic and assigned names. Raises ConfigError."""
    def value(child):
        return evaluate(child, names, level + 1)
    if level > MAX_LEVELS:
        raise ConfigError(f"nested too deep: more than {MAX_LEVELS} levels")
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [value(item) for item in node.elts]
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    try:
        if isinstance(node, ast.Dict) and None not in node.keys:
            return {value(k): value(v) for k, v in zip(node.keys, node.values)}
        if isinstance(node, (ast.UnaryOp, ast.BinOp)) and type(node.op) in OPERATORS:
            operands = [value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
            if not all(isinstance(operand, (int, float)) for operand in operands):
                raise TypeError("arithmetic is on numbers")
            if isinstance(node.op, ast.Pow) and bits(operands[0]) * operands[1] > MAX_BITS:
                raise ConfigError(f"the number is too large in '{ast.unparse(node):.100}'")
            return OPERATORS[type(node.op)](*operands)
    except (TypeError, ArithmeticError, ValueError) as error:
        raise ConfigError(f"cannot compute '{ast.unparse(node):.100}': {error}") from None
    raise ConfigError(f"'{ast.unparse(node):.100}' is not a literal or arithmetic on literals")


def bits(number):
    """The bits of a whole number; a float has 1, since it does not grow."""
    return number.bit_length() if isinstance(number, int) else 1


def size(value, most):
    """Characters and numbers in a value, counted until there are more than `most`. A number that is too large
    counts as more."""
    count, todo = 0, [value]
    while todo and count <= most:
        value = todo.pop()
        count += len(value) if isinstance(value, (str, bytes)) else most + 1 if bits(value) > MAX_BITS else 1
        todo += value if isinstance(value, list) else ()
        todo += (*value, *value.values()) if isinstance(value, dict) else ()
    return count


def read_config(path):
    """The {key: value} that a config file assigns. Raises ConfigError naming the file and the line."""
    text, left = read_text(path, MAX_CONFIG), MAX_CONFIG
    try:
        tree = ast.parse(text, filename=path)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: line {getattr(error, 'lineno', '?')}: not valid: {error}") from None
    except TOO_DEEP:
        raise ConfigError(f"{path}: not valid: nested too deep") from None
    values = {}
    for node in tree.body:
        where = f"{path}: line {node.lineno}"
        match node:
            case ast.Expr(ast.Constant(str())):
                pass  # a docstring
            case ast.Assign([ast.Name(key)]):
                try:
                    values[key] = evaluate(node.value, values)
                except (ConfigError, *TOO_DEEP) as error:
                    raise ConfigError(f"{where}: {str(error) or 'nested too deep'}") from None
                left -= size(values[key], left)
                if left < 0:
                    raise ConfigError(f"{where}: the values of the file are too large together")
            case _:
                line = text.split("\n")[node.lineno - 1].strip()
                raise ConfigError(f"{where}: only 'key = value' lines are allowed, not '{line:.100}'")
    return {key: value for key, value in values.items() if not key.startswith("_")}


def convert(name, value, kind):
    """`value` as type `kind`; 1e6 is a fine int. Raises ConfigError naming key, value and type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        for option in typing.get_args(kind):
            try:
                return convert(name, value, option)
            except ConfigError:
                pass
    elif typing.get_origin(kind) is typing.Literal:
        for option in typing.get_args(kind):
            if value == option and isinstance(value, bool) == isinstance(option, bool):
                return option
        raise ConfigError(f"{name}: {value!r:.100} is none of {', '.join(map(repr, typing.get_args(kind)))}")
    elif typing.get_origin(kind) is list:
        if isinstance(value, list):
            return [convert(f"{name}[{i}]", v, typing.get_args(kind)[0]) for i, v in enumerate(value)]
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is int and isinstance(value, float) and value.is_integer():
        return convert(name, int(value), int)
    elif kind is float and isinstance(value, (int, float)):
        if abs(value) <= sys.float_info.max:  # neither nan nor infinity
            return float(value)
    elif kind is int and isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{name}: {value!r:.100} is too large a number")
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise ConfigError(f"{name}: {value!r:.100} is not of type {type_name(kind)}")


def type_name(kind):
    """A type in the words of --help."""
    if typing.get_origin(kind) in (typing.Literal, types.UnionType, typing.Union):
        return "|".join(part if isinstance(part, str) else type_name(part) for part in typing.get_args(kind))
    return "none" if kind is types.NoneType else kind.__name__ if isinstance(kind, type) else str(kind)


def from_text(name, text, kind):
    """A command-line value: a literal if that fits the type, and else the text itself. Raises ConfigError."""
    if typing.get_origin(kind) is list and not text.lstrip().startswith(("[", "(")):  # --sizes=3,4
        item_kind, = typing.get_args(kind)
        items = text.split(",") if text else []
        return [from_text(f"{name}[{i}]", item.strip(), item_kind) for i, item in enumerate(items)]
    value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if value is text:
        with contextlib.suppress(SyntaxError, ValueError, ConfigError, *TOO_DEEP):
            value = evaluate(ast.parse(text.strip(), mode="eval").body, {})
    try:
        return convert(name, value, kind)
    except ConfigError:
        if kind is int and isinstance(value, int):  # it is too large
            raise
        return convert(name, text, kind)


# ---------------------------------------------------------------------------------------------------------
# The command line

def refuse_unknown(key, kinds, where=""):
    """Raise a ConfigError that names the nearest key, unless `key` is among `kinds`."""
    if key not in kinds:
        nearest, = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
        raise ConfigError(f"{where}unknown key '{key}'; did you mean '{nearest}'? (--help lists all)")


def checked(cls, values, where=""):
    """`values` as the types of `cls`. Raises ConfigError for an unknown key, or a wrong type or range."""
    kinds = typing.get_type_hints(cls)
    for key in values:
        refuse_unknown(key, kinds, where)
    try:
        result = {key: convert(key, value, kinds[key]) for key, value in values.items()}
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
    for f in dataclasses.fields(cls):
        least, most, value = f.metadata["least"], f.metadata["most"], result.get(f.name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and (least is not None and number < least
                                                         or most is not None and number > most):
                allowed = f"at least {least}" if most is None else f"in {least} .. {most}"
                raise ConfigError(f"{where}{f.name}: {number!r} is not {allowed}")
    return result


def shown_name(f):
    """A dataclass field as the user types it."""
    return f.name.upper() if f.metadata["positional"] else f"--{f.name}"


def from_dict(cls, values, where=""):
    """A `cls` from {key: value}. Raises ConfigError if a value is wrong or a REQUIRED one is missing."""
    config = cls(**checked(cls, values, where))
    config.given = frozenset(values)  # the keys that were set, whether to their default or not
    for f in dataclasses.fields(cls):
        if getattr(config, f.name) is REQUIRED:
            raise ConfigError(f"{where}{shown_name(f)} is missing: {f.metadata['meaning']} (see --help)")
    return config


def parse(cls, argv):
    """A `cls` from the words of a command line. Flags override the config file. Raises ConfigError."""
    kinds = typing.get_type_hints(cls)
    words, values, left = [], {}, list(argv)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        refuse_unknown(key, kinds)
        if not equals and kinds[key] is bool:  # --key
            text = "True"
        elif not equals:  # --key value
            if not left or left[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key}=...")
            text = left.pop(0)
        values[key] = from_text(key, text, kinds[key])
    for f in dataclasses.fields(cls):
        if f.metadata["positional"] and words:
            if typing.get_origin(kinds[f.name]) is list:  # a list takes all words that are left
                item_kind, = typing.get_args(kinds[f.name])
                value, words = [from_text(f.name, word, item_kind) for word in words], []
            else:
                value = from_text(f.name, words.pop(0), kinds[f.name])
            values.setdefault(f.name, value)  # a flag overrides a word
    if words:
        raise ConfigError(f"do not know what to do with '{words[0]}' (settings are given as --key=value)")
    if path := values.get("config"):
        values = checked(cls, read_config(path), f"{path}: ") | values
    return from_dict(cls, values)


def help_text(cls, script):
    """The text that --help prints: the usage, the docstring of `cls`, and each setting with its meaning."""
    kinds = typing.get_type_hints(cls)
    usage, lines = [f"usage: python {script}"], []
    for f in dataclasses.fields(cls):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        if f.metadata["positional"]:
            usage.append(shown_name(f) + "..." * (typing.get_origin(kinds[f.name]) is list))
        needed = "required" if default is REQUIRED else f"default {default!r}"
        lines.append(f"  {shown_name(f)}  {type_name(kinds[f.name])}, {needed}")
        lines += textwrap.wrap(f.metadata["meaning"], 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([" ".join([*usage, "[--key=value ...]"]), "", cls.__doc__.strip(), "", *lines])


def run(main, cls):
    """Call `main` with the settings of the command line. A ConfigError is one line on stderr and status 2."""
    script, *argv = sys.argv
    with lasting_streams():
        try:
            if "--help" in argv or "-h" in argv:
                print(help_text(cls, script))
            else:
                main(parse(cls, argv))
        except ConfigError as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a machine have one command line
                print(f"{os.path.basename(script)}: {error}", file=sys.stderr)
            raise SystemExit(2)
        except KeyboardInterrupt:
            raise SystemExit(130)


# ---------------------------------------------------------------------------------------------------------
# Standard streams

def quiet_interrupt(kind, error, trace):
    """Ctrl-C while a script is being imported prints no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = quiet_interrupt


class Stream:
    """A standard stream. When its reader goes away, the rest of the text is lost and nothing fails."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before the start

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a closed terminal
                raise ConfigError(f"{self.stream.name}: cannot be written: {error.strerror}") from None
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def lasting_streams():
    """In it, stdout and stderr are Streams."""
    with contextlib.redirect_stdout(Stream(sys.stdout)), contextlib.redirect_stderr(Stream(sys.stderr)):
        yield


def code_version():
    """The commit of the code, with + if the code was modified since; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class PlainLines:
    """A stream for tqdm that prints each refresh as a line."""

    def write(self, text):
        if text.strip():
            print(text.strip("\r\n"), file=sys.stderr, flush=True)


def progress(total, label, unit, **options):
    """A tqdm bar with the time left, on stderr. Where stderr is no terminal, a line every 15 seconds."""
    look = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        look = {"file": PlainLines(), "mininterval": 15, "maxinterval": 15, "ncols": 110, "ascii": True}
    return tqdm(total=total, desc=label, unit=unit, unit_scale=True, **look, **options)


def write_config(config, path):
    """Write the settings as a config file that `read_config` reads back."""
    values = dataclasses.asdict(config).items()
    write_text_atomically(path, "".join(f"{key} = {value!r}\n" for key, value in values if key != "config"))
