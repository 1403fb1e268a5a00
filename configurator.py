"""Settings: dataclass defaults <- config file <- --key=value. Typed, strict, never executed.

Every script's command line goes through `configure`. A setting is a dataclass field with a meaning:

    @dataclass
    class Options:
        '''One line for --help.'''
        source: str = setting(REQUIRED, "what to read", positional=True)
        seed: int = setting(0, "random seed")

A config file (named by the setting `config`, where the dataclass has one) holds plain assignments
of literals and of arithmetic on them and on names assigned above. It is parsed, not run. A name that starts with _ is a
helper for the lines below it, not a setting.
"""
import ast
import copy
import dataclasses
import difflib
import math
import operator
import os
import shutil
import subprocess
import sys
import textwrap
import types
import typing
from dataclasses import field

from tqdm import tqdm

REQUIRED = object()


class ConfigError(Exception):
    """What is wrong with a setting or a file and how to mend it, in one line for the user."""


def setting(default, meaning, positional=False, least=None, most=None):
    """A dataclass field with its meaning and the range of its numbers; REQUIRED as default makes `configure` insist on a value."""
    make = {"default_factory": lambda: copy.copy(default)} if isinstance(default, (list, dict)) else {"default": default}
    return field(**make, metadata={"meaning": meaning, "positional": positional, "least": least, "most": most})


# ---------------------------------------------------------------------------------------------------------
# Values: literals and arithmetic, evaluated over the syntax tree

BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
          ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
TOO_DEEP = (MemoryError, RecursionError)  # what Python raises for deeply nested source
UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}


def evaluate(node, names):
    """Value of a syntax tree of literals, arithmetic and already assigned names. Raises ConfigError for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [evaluate(item, names) for item in node.elts]
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    try:
        if isinstance(node, ast.Dict) and None not in node.keys:
            return {evaluate(k, names): evaluate(v, names) for k, v in zip(node.keys, node.values)}
        if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
            return UNARY[type(node.op)](evaluate(node.operand, names))
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            left, right = evaluate(node.left, names), evaluate(node.right, names)
            if isinstance(node.op, ast.Pow) and abs(right) > 64:  # 9**9**9 would hang
                raise ConfigError(f"exponent too large in '{ast.unparse(node)}'")
            return BINARY[type(node.op)](left, right)
    except (TypeError, ArithmeticError, ValueError) as error:
        raise ConfigError(f"cannot compute '{ast.unparse(node)}': {error}") from None
    raise ConfigError(f"'{ast.unparse(node)}' is not a literal or arithmetic on literals")


def read_config(path):
    """{key: value} of a config file. Raises ConfigError naming the file and line."""
    try:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read(), filename=path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read config file: {error.strerror}") from None
    except (SyntaxError, ValueError, *TOO_DEEP) as error:
        raise ConfigError(f"{path}: line {getattr(error, 'lineno', '?')}: not valid: {error or 'nested too deep'}") from None
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # the docstring at its head
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ConfigError(f"{path}: line {node.lineno}: only 'key = value' lines are allowed, "
                              f"not '{ast.unparse(node).splitlines()[0]}'")
        try:
            values[node.targets[0].id] = evaluate(node.value, values)
        except (ConfigError, *TOO_DEEP) as error:
            raise ConfigError(f"{path}: line {node.lineno}: {error}") from None
    return {key: value for key, value in values.items() if not key.startswith("_")}


def convert(name, value, kind):
    """`value` as type `kind`; 1e6 is a fine int. Raises ConfigError naming key, value and type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        for option in (o for o in options if o is not type(None)):
            try:
                return convert(name, value, option)
            except ConfigError:
                pass
    elif typing.get_origin(kind) is typing.Literal:
        for option in typing.get_args(kind):
            if value == option and isinstance(value, bool) == isinstance(option, bool):
                return option
        raise ConfigError(f"{name}: {value!r} is none of {', '.join(map(repr, typing.get_args(kind)))}")
    elif typing.get_origin(kind) is list:
        if isinstance(value, list):
            return [convert(f"{name}[{i}]", v, typing.get_args(kind)[0]) for i, v in enumerate(value)]
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif kind is float and isinstance(value, (int, float)):
        if math.isfinite(value):
            return float(value)
    elif isinstance(kind, type) and isinstance(value, kind):
        return value
    raise ConfigError(f"{name}: {value!r} is not of type {type_name(kind)}")


def type_name(kind):
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("NoneType", "None")


def from_text(name, text, kind):
    """A command-line value: read as a literal where that fits the type, else as the text itself."""
    if typing.get_origin(kind) is list and not text.lstrip().startswith(("[", "(")):  # --sizes=3,4 and --names=a,b
        item_kind, = typing.get_args(kind)
        return [from_text(f"{name}[{i}]", item.strip(), item_kind) for i, item in enumerate(text.split(",") if text else [])]
    words = {"true": True, "false": False, "none": None}
    try:
        value = words[text.lower()] if text.lower() in words else evaluate(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, ValueError, ConfigError, *TOO_DEEP):
        value = text
    try:
        return convert(name, value, kind)
    except ConfigError:
        return convert(name, text, kind) if value is not text else convert(name, value, kind)


# ---------------------------------------------------------------------------------------------------------
# The command line

def checked(cls, values, where=""):
    """`values` with every key known to `cls` and every value of its type. Raises ConfigError that starts with `where`."""
    kinds = typing.get_type_hints(cls)
    for key in values:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
            raise ConfigError(f"{where}unknown key '{key}'; did you mean '{near[0]}'? (--help lists all)")
    try:
        result = {key: convert(key, value, kinds[key]) for key, value in values.items()}
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
    for f in dataclasses.fields(cls):
        least, most = f.metadata["least"], f.metadata["most"]
        for number in result[f.name] if isinstance(result.get(f.name), list) else [result.get(f.name)]:
            if isinstance(number, (int, float)) and (least is not None and number < least or most is not None and number > most):
                raise ConfigError(f"{where}{f.name}: {number!r} is not " + (f"at least {least}" if most is None else f"in {least} .. {most}"))
    return result


def from_dict(cls, values, where=""):
    """A `cls` from {key: value}; every REQUIRED field must be there. Raises ConfigError."""
    config = cls(**checked(cls, values, where))
    config.given = frozenset(values)  # the keys that were set, whether to their default or not
    for f in dataclasses.fields(cls):
        if getattr(config, f.name) is REQUIRED:
            name = f.name.upper() if f.metadata["positional"] else f"--{f.name}"
            raise ConfigError(f"{where}{name} is missing: {f.metadata['meaning']} (--help lists all)")
    return config


def parse(cls, argv):
    """A `cls` from command-line words; the file named by its setting `config` comes under the flags. Raises ConfigError."""
    kinds = typing.get_type_hints(cls)
    words, values, flags, left = [], {}, {}, list(argv)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        checked(cls, {key: None} if key not in kinds else {})  # names the nearest key
        if not equals:
            if kinds[key] is not bool and (not left or left[0].startswith("--")):
                raise ConfigError(f"--{key} needs a value: --{key}=...")
            text = "True" if kinds[key] is bool else left.pop(0)  # --key value
        flags[key] = from_text(key, text, kinds[key])
    for f in dataclasses.fields(cls):
        if f.metadata["positional"] and words:
            if typing.get_origin(kinds[f.name]) is list:  # takes all that is left
                values[f.name], words = [from_text(f.name, word, typing.get_args(kinds[f.name])[0]) for word in words], []
            else:
                values[f.name] = from_text(f.name, words.pop(0), kinds[f.name])
    if words:
        raise ConfigError(f"do not know what to do with '{words[0]}' (settings are given as --key=value)")
    values |= flags
    if path := values.get("config"):
        values = checked(cls, read_config(path), f"{path}: ") | values
    return from_dict(cls, values)


def help_text(cls, script):
    kinds = typing.get_type_hints(cls)
    usage, lines = [f"usage: python {script}"], []
    width = max(40, shutil.get_terminal_size((110, 24)).columns - 2)
    for f in dataclasses.fields(cls):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        name = f.name.upper() if f.metadata["positional"] else f"--{f.name}"
        if f.metadata["positional"]:
            usage.append(name + "..." * (typing.get_origin(kinds[f.name]) is list))
        lines.append(f"  {name}  {type_name(kinds[f.name])}, " + ("required" if default is REQUIRED else f"default {default!r}"))
        lines += textwrap.wrap(f.metadata["meaning"], width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([" ".join(usage + ["[--key=value ...]"]), "", cls.__doc__.strip(), "", *lines])


def configure(cls, argv=None):
    """The script's settings as a `cls`; on --help prints it and exits, on a bad setting prints one line and exits with 2."""
    argv = sys.argv[1:] if argv is None else argv
    script = sys.argv[0].rsplit("/", 1)[-1]
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, sys.argv[0]))
        raise SystemExit(0)
    try:
        return parse(cls, argv)
    except ConfigError as error:
        print(f"{script}: {error}", file=sys.stderr)
        raise SystemExit(2)


def run(main, cls):
    """A script's whole life: settings from the command line, `main(settings)`, and a ConfigError said in one line."""
    config = configure(cls)
    try:
        main(config)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # one of many processes speaks
            print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        raise SystemExit(130)


def code_version():
    """Commit of the code, with + when it is modified; None outside a repository."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=os.path.dirname(os.path.abspath(__file__)),
                              capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Lines:
    """A stream for tqdm where there is no terminal: each refresh is a plain line."""

    def write(self, text):
        if text.strip():
            print(text.strip("\r\n"), file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress(total, label, unit, **options):
    """A tqdm bar with ETA on stderr; where that is no terminal, a plain line every 15 seconds."""
    shape = {"dynamic_ncols": True} if sys.stderr.isatty() else {"file": Lines(), "mininterval": 15, "maxinterval": 15, "ncols": 110, "ascii": True}
    return tqdm(total=total, desc=label, unit=unit, unit_scale=True, **shape, **options)


def write_config(config, path):
    """The resolved settings as a config file that `read_config` reads back."""
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(f"{key} = {value!r}\n" for key, value in dataclasses.asdict(config).items() if key != "config")
