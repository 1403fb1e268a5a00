"""Settings: dataclass defaults <- config file <- --key=value. Typed, strict, never executed.

A script starts with `run(main, Options)`. Each field of the dataclass Options is a setting with a meaning:

    source: str = setting(REQUIRED, "text file to read", positional=True)
    seed: int = setting(0, "random seed")

The setting `config`, where there is one, names a file that assigns literals, and arithmetic (+ - * / **) on
numbers and on names of numbers assigned above; `key = name` takes over any value. A name that starts with _
is no setting but serves the lines below it.

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
import stat
import subprocess
import sys
import textwrap
import types
import typing

from tqdm import tqdm

REQUIRED = object()
HERE = os.path.dirname(os.path.abspath(__file__))  # the folder of all scripts


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


def one_line(error):
    """What an error of a library says, in one line."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


@contextlib.contextmanager
def naming(where):
    """In it, an OSError or ValueError becomes a ConfigError of one line that begins with `where`, a file."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {getattr(error, 'strerror', None) or one_line(error)}") from None


def check_file(path, most=math.inf):
    """Raises ConfigError unless `path` is a regular file of `most` bytes at most. To open a pipe can hang."""
    with naming(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("cannot be read: it is no regular file")
        if status.st_size > most:
            raise ValueError(f"has {status.st_size:,} bytes, at most {most:,} are read")


def read_text(path, most=MAX_BYTES):
    """The text of a UTF-8 file of `most` bytes at most. Raises ConfigError naming the file."""
    check_file(path, most)
    with naming(path), open(path, encoding="utf-8-sig") as f:
        return f.read()


def parse_json(text):
    """The value of a JSON text. Raises ValueError, also where it is nested too deep or a number too large."""
    try:
        value = json.loads(text)
        check_json(value)
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {one_line(error)}") from None


def check_json(value, levels=MAX_LEVELS):
    """Raises ValueError where lists and dicts are nested in more `levels`, or an int is beyond all floats."""
    if levels < 0:
        raise ValueError(f"nested too deep, beyond {MAX_LEVELS} levels")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{str(value):.9}... is too large a number")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_json(part, levels - 1)


def read_json(path, most=MAX_BYTES):
    """A JSON file's object. Raises ConfigError naming the file."""
    text = read_text(path, most)
    with naming(path):
        value = parse_json(text)
        if not isinstance(value, dict):
            raise ValueError("holds no JSON object")
    return value


@contextlib.contextmanager
def writing(path, needed=4096):
    """In it, an OSError becomes a ConfigError of one line. needed: the bytes to write, or a block."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk is full: {needed:,} bytes needed"
        raise ConfigError(f"{path}: cannot be written: {reason}") from None


def write_text_atomically(path, text):
    """Write `text`, or bytes, to the file `path`, in a folder that is made where it is not there. A kill at
    any moment leaves the old file or the new one, complete. Raises ConfigError."""
    temporary, content = f"{path}.tmp", text.encode() if isinstance(text, str) else text
    with writing(path, len(content)):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


def open_to_write(path, mode):
    """Open a file, without a buffer, to write or append to. Raises ConfigError, also for a special file."""
    with writing(path):
        if os.path.exists(path):
            check_file(path)
        return open(path, mode, buffering=0)


def lock(file, held, wait=False):
    """Lock an open file until it is closed. Raises ConfigError(held) where another process has it locked,
    unless it is to `wait`. Without locks on the file system the user has to see to it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise ConfigError(held) from None
    except OSError as error:
        note(f"this file system has no locks ({error.strerror}): nothing keeps a second process away")


@contextlib.contextmanager
def locked(folder, name, held, wait=False):
    """Makes a folder, and locks its file `name` in the context. Raises ConfigError as lock and writing do."""
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    with open_to_write(os.path.join(folder, name), "wb") as file:
        lock(file, held, wait)
        yield


@functools.cache
def note(text):
    """Print a note to the user, once."""
    print(f"note: {text}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------
# Values: literals and arithmetic, evaluated over the syntax tree

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Pow: math.pow, ast.USub: operator.neg}
WORDS = {"true": True, "false": False, "none": None}
UNIONS = (types.UnionType, typing.Union)
MOST = {int: 2**53, float: sys.float_info.max}  # up to 2**53 floats are exact
MAX_CONFIG = 100_000  # bytes of a config file
TOO_DEEP = (MemoryError, RecursionError)  # Python raises these for source that it cannot parse


def evaluate(node, names):
    """The value of a syntax tree of literals, arithmetic and names {name: number}. Raises ConfigError.

    Arithmetic is that of floats, so its results do not grow without bound. Whole results are ints.
    """
    match node:
        case ast.Constant(value):
            return value
        case ast.List(items) | ast.Tuple(items):
            return [evaluate(item, names) for item in items]
        case ast.Dict(keys, values) if all(isinstance(key, ast.Constant) for key in keys):
            return {key.value: evaluate(value, names) for key, value in zip(keys, values)}
        case ast.Name(name) if isinstance(names.get(name, ()), int | float | None):
            return names[name]
        case ast.BinOp(op=op) | ast.UnaryOp(op=op) if type(op) in OPERATORS:
            operands = [evaluate(child, names) for child in ast.iter_child_nodes(node) if child is not op]
            if not all(isinstance(operand, (int, float)) for operand in operands):
                raise ConfigError(f"arithmetic is on numbers, not '{ast.unparse(node):.100}'")
            try:
                result = OPERATORS[type(op)](*map(float, operands))
                if not math.isfinite(result):
                    raise OverflowError("the result is too large")
            except (ArithmeticError, ValueError) as error:
                raise ConfigError(f"cannot compute '{ast.unparse(node):.100}': {error}") from None
            return int(result) if result.is_integer() else result
    raise ConfigError(f"'{ast.unparse(node):.100}' is not a literal or arithmetic on numbers")


def read_config(path):
    """The {key: value} that a config file assigns. Raises ConfigError naming the file and the line."""
    text, values, line = read_text(path, MAX_CONFIG), {}, 1
    try:
        for node in ast.parse(text, filename=path).body:
            line = node.lineno
            match node:
                case ast.Expr(ast.Constant(str())):
                    pass  # a docstring
                case ast.Assign([ast.Name(key)], ast.Name(name)) if name in values:
                    values[key] = values[name]  # only as a whole: lists of lists of names would grow
                case ast.Assign([ast.Name(key)], value):
                    values[key] = evaluate(value, values)
                case _:
                    source = text.split("\n")[line - 1].strip()
                    raise ConfigError(f"only 'key = value' lines are allowed, not '{source:.100}'")
    except (ConfigError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path}: line {getattr(error, 'lineno', line)}: {one_line(error)}") from None
    except TOO_DEEP:
        raise ConfigError(f"{path}: line {line}: nested too deep") from None
    return {key: value for key, value in values.items() if not key.startswith("_")}


def as_type(name, value, kind):
    """`value` as type `kind`; 1e6 is a fine int. Raises ConfigError naming key, value and type."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        for option in options:
            with contextlib.suppress(ConfigError):
                return as_type(name, value, option)
    elif origin is typing.Literal:
        if value not in options:
            raise ConfigError(f"{name}: {value!r:.100} is none of {', '.join(map(repr, options))}")
        return value
    elif origin is list and isinstance(value, list):
        return [as_type(f"{name}[{i}]", item, options[0]) for i, item in enumerate(value)]
    elif kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) > MOST[kind]:
            raise ConfigError(f"{name}: {value!r:.100} is too large a number")
        if not math.isnan(value) and value == kind(value):
            return kind(value)
    elif type(value) is kind:
        return value
    raise ConfigError(f"{name}: {value!r:.100} is not of type {type_name(kind)}")


def convert(name, value, kind, least=None, most=None):
    """`value` as type `kind`, its numbers within least .. most. Raises ConfigError."""
    value = as_type(name, value, kind)
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and (least is not None and number < least
                                                     or most is not None and number > most):
            allowed = f"at least {least}" if most is None else f"in {least} .. {most}"
            raise ConfigError(f"{name}: {number!r} is not {allowed}")
    return value


def type_name(kind):
    """A type in the words of --help."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "|".join(map(str, parts))
    if origin in UNIONS:
        return "|".join(map(type_name, parts))
    if origin is list:
        return f"list of {type_name(*parts)}"
    return "none" if kind is types.NoneType else kind.__name__


def from_text(name, text, kind):
    """A command-line value: a literal if that fits the type, and else the text itself. Raises ConfigError."""
    if typing.get_origin(kind) is list and not text.lstrip().startswith("["):  # --sizes=3,4
        item_kind, = typing.get_args(kind)
        items = text.split(",") if text else []
        return [from_text(f"{name}[{i}]", item.strip(), item_kind) for i, item in enumerate(items)]
    with contextlib.suppress(SyntaxError, ValueError, ConfigError, *TOO_DEEP):
        return as_type(name, evaluate(ast.parse(text.strip(), mode="eval").body, WORDS), kind)
    return as_type(name, text, kind)


# ---------------------------------------------------------------------------------------------------------
# The command line

def refuse_unknown(key, kinds):
    """Raise a ConfigError that names the nearest key, unless `key` is among `kinds`."""
    if key not in kinds:
        nearest, = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
        raise ConfigError(f"unknown key '{key}'; did you mean '{nearest}'? (--help lists all)")


def checked(cls, values, where=""):
    """`values` as the types of `cls`. Raises ConfigError for an unknown key, or a wrong type or range."""
    kinds, ranges = typing.get_type_hints(cls), {f.name: f.metadata for f in dataclasses.fields(cls)}
    result = {}
    try:
        for key, value in values.items():
            refuse_unknown(key, kinds)
            result[key] = convert(key, value, kinds[key], ranges[key]["least"], ranges[key]["most"])
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
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
    kinds, values = typing.get_type_hints(cls), {}
    words = [word for word in argv if not word.startswith("--")]
    for f in dataclasses.fields(cls):
        if f.metadata["positional"] and words:
            if typing.get_origin(kinds[f.name]) is list:  # a list takes all words that are left
                item_kind, = typing.get_args(kinds[f.name])
                values[f.name], words = [from_text(f.name, word, item_kind) for word in words], []
            else:
                values[f.name] = from_text(f.name, words.pop(0), kinds[f.name])
    if words:
        raise ConfigError(f"do not know what to do with '{words[0]}' (settings are given as --key=value)")
    for flag in (word for word in argv if word.startswith("--")):  # a flag overrides a word
        key, equals, text = flag[2:].partition("=")
        refuse_unknown(key, kinds)
        if not equals and kinds[key] is not bool:
            raise ConfigError(f"--{key} needs a value: --{key}=...")
        values[key] = from_text(key, text if equals else "true", kinds[key])
    if path := values.get("config"):
        values = checked(cls, read_config(path), f"{path}: ") | values
    return from_dict(cls, values)


def help_text(cls, script):
    """The text that --help prints: the usage, the docstring of `cls`, and each setting with its meaning."""
    kinds = typing.get_type_hints(cls)
    usage, lines = [f"usage: python {script}"], []
    for f in dataclasses.fields(cls):
        default = getattr(cls(), f.name)
        if f.metadata["positional"]:
            usage.append(shown_name(f) + "..." * (typing.get_origin(kinds[f.name]) is list))
        needed = "required" if default is REQUIRED else f"default {default!r}"
        lines.append(f"  {shown_name(f)}  {type_name(kinds[f.name])}, {needed}")
        lines += textwrap.wrap(f.metadata["meaning"], 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([" ".join([*usage, "[--key=value ...]"]), "", cls.__doc__.strip(), "", *lines])


def run(main, cls):
    """Call `main` with the settings of the command line. A ConfigError, or an optional package that is not
    installed, is one line on stderr and status 2."""
    script, *argv = sys.argv
    with lasting_streams():
        try:
            if "--help" in argv or "-h" in argv:
                print(help_text(cls, script))
            else:
                main(parse(cls, argv))
        except (ConfigError, ModuleNotFoundError) as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a machine have one command line
                fix = "" if isinstance(error, ConfigError) else f"; run: pip install {error.name}"
                print(f"{os.path.basename(script)}: {error}{fix}", file=sys.stderr)
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
    """A standard stream. Nothing fails when its reader goes away, or when stderr is on a full disk."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: it was closed before the start
        self.may_lose = stream is sys.stderr

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a closed terminal
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            elif not self.may_lose:
                raise ConfigError(f"{self.stream.name}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def lasting_streams():
    """In it, stdout and stderr are Streams."""
    with contextlib.redirect_stdout(Stream(sys.stdout)), contextlib.redirect_stderr(Stream(sys.stderr)):
        yield


def code_version():
    """The commit of the code, with + if the code was modified since; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
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
