"""configurator.py: precedence, types, and every way to get a setting wrong."""
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import (REQUIRED, ConfigError, checked, from_dict, help_text, parse, read_config, run,
                          setting, write_config, write_text_atomically)


@dataclass
class Settings:
    """Does a thing."""
    config: str | None = setting(None, "a file of settings", positional=True)
    max_tokens: int = setting(1000, "how many tokens to train on")
    learning_rate: float = setting(3e-3, "peak")
    compile: bool = setting(False, "torch.compile")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "of the forward pass")
    decay_start: int | None = setting(None, "step")
    sizes: list[int] = setting([1, 2], "widths")
    names: list[str] = setting([], "labels")
    modes: list[Literal["eager", "compiled"]] = setting(["eager"], "how models run")
    widths: dict = setting({}, "anything by name")
    out_dir: str = setting("out", "where to write")


@dataclass
class Words:
    """Takes words."""
    source: str = setting(REQUIRED, "what to read", positional=True)
    count: int = setting(1, "how many", positional=True)
    rest: list[str] = setting([], "all others", positional=True)
    out: str = setting(REQUIRED, "where to write")


def written(tmp_path, text):
    path = tmp_path / "c.py"
    path.write_text(text)
    return str(path)


def fails(action, *words):
    with pytest.raises(ConfigError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------------------------------------------------
# Values that are right

def test_defaults_then_file_then_flags(tmp_path):
    path = written(tmp_path, "max_tokens = 7\nout_dir = 'x'\n")
    assert parse(Settings, []) == Settings()
    assert parse(Settings, [path]) == Settings(config=path, max_tokens=7, out_dir="x")
    for argv in ([path, "--max_tokens=8"], ["--max_tokens=8", path], [f"--config={path}", "--max_tokens=8"]):
        assert parse(Settings, argv) == Settings(config=path, max_tokens=8, out_dir="x")
    assert parse(Settings, ["--max_tokens=8", "--max_tokens=9"]).max_tokens == 9


@pytest.mark.parametrize("flag, key, value", [
    ("--max_tokens=5", "max_tokens", 5), ("--max_tokens=1e6", "max_tokens", 1_000_000),
    ("--max_tokens=2**20", "max_tokens", 2**20),
    ("--max_tokens=1_000", "max_tokens", 1000), ("--max_tokens=-3", "max_tokens", -3),
    ("--learning_rate=1", "learning_rate", 1.0), ("--learning_rate=3e-4", "learning_rate", 3e-4),
    ("--learning_rate=1/3", "learning_rate", 1 / 3),
    ("--compile", "compile", True), ("--compile=True", "compile", True),
    ("--compile=false", "compile", False),
    ("--dtype=bfloat16", "dtype", "bfloat16"), ("--dtype='bfloat16'", "dtype", "bfloat16"),
    ("--decay_start=10", "decay_start", 10), ("--decay_start=None", "decay_start", None),
    ("--decay_start=none", "decay_start", None),
    ("--sizes=3", "sizes", [3]), ("--sizes=3,4e2", "sizes", [3, 400]),
    ("--sizes=[3, 4]", "sizes", [3, 4]), ("--sizes=[]", "sizes", []),
    ("--names=a", "names", ["a"]), ("--names=a,b-1", "names", ["a", "b-1"]),
    ("--names=['a', 'b']", "names", ["a", "b"]),
    ("--names=1,2", "names", ["1", "2"]), ("--names=7", "names", ["7"]),
    ("--out_dir=7", "out_dir", "7"), ("--out_dir=1e-3", "out_dir", "1e-3"),
    ("--out_dir=None", "out_dir", "None"), ("--out_dir=a=b", "out_dir", "a=b"), ("--out_dir=", "out_dir", ""),
    ("--out_dir=a b;c$(d)", "out_dir", "a b;c$(d)"),
])
def test_flags_become_values_of_their_type(flag, key, value):
    got = getattr(parse(Settings, [flag]), key)
    assert got == value and type(got) is type(value)


def test_config_file_arithmetic(tmp_path):
    path = written(tmp_path, '"""Launch: python x.py"""\n'
                   "max_tokens = 20 * 2**10  # comment\nlearning_rate = 3e-3 / 2 - 1e-4\n"
                   "_third = max_tokens / 3\ndecay_start = _third * 3\n"
                   "sizes = (1, -2 + 5, max_tokens)\nnames = ['a', 'b']\n_same = names\n"
                   "names = _same\nwidths = {'s': [2**5, 3], 'n': {7: None}}\n")
    assert read_config(path) == {
        "max_tokens": 20480, "learning_rate": 3e-3 / 2 - 1e-4, "decay_start": 20480,
        "sizes": [1, 3, 20480], "names": ["a", "b"], "widths": {"s": [32, 3], "n": {7: None}}}
    assert repr(parse(Settings, [path]).sizes) == "[1, 3, 20480]"


def test_defaults_are_not_shared():
    Settings().widths["a"], Settings().sizes[0] = 1, 9
    assert Settings() == Settings(widths={}, sizes=[1, 2])


def test_positional_words():
    assert parse(Words, ["a", "2", "b", "3", "--out=o"]) == Words("a", 2, ["b", "3"], "o")
    assert parse(Words, ["7", "--out=o"]) == Words("7", 1, [], "o")


TEXT = st.text(st.characters(codec="utf-8"))
INTEGERS = st.integers(-2**53, 2**53)


@given(st.builds(Settings, config=st.none(), max_tokens=INTEGERS,
                 learning_rate=st.floats(allow_nan=False, allow_infinity=False), compile=st.booleans(),
                 dtype=st.sampled_from(["float32", "bfloat16"]),
                 decay_start=st.none() | INTEGERS, sizes=st.lists(INTEGERS),
                 names=st.lists(TEXT), widths=st.dictionaries(TEXT, st.lists(INTEGERS)), out_dir=TEXT))
def test_written_config_reads_back(tmp_path_factory, settings):
    path = tmp_path_factory.getbasetemp() / "written.py"
    write_config(settings, path)
    assert from_dict(Settings, read_config(str(path))) == settings
    assert not Path(f"{path}.tmp").exists()


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path, limited_files):
    path = tmp_path / "config.py"
    write_config(Settings(max_tokens=7), path)
    with limited_files(1000):
        fails(lambda: write_config(Settings(out_dir="x" * 99999), path), str(path), "cannot be written")
    assert from_dict(Settings, read_config(path)) == Settings(max_tokens=7)
    assert [p.name for p in tmp_path.iterdir()] == ["config.py"]


@pytest.mark.parametrize("text", ["", "no newline", "é 漢 😀\n" * 1000])
def test_text_is_written_as_it_is(tmp_path, text):
    for path in (tmp_path / "a.txt", str(tmp_path / "b.txt")):
        Path(path).write_text("old and longer" * 1000)
        write_text_atomically(path, text)
        assert Path(path).read_bytes() == text.encode()


@given(st.text())
def test_text_on_the_command_line_is_a_value_or_a_clear_error(text):
    for f in dataclasses.fields(Settings):
        if f.name != "config":
            try:
                parse(Settings, [f"--{f.name}={text}"])
            except ConfigError as error:
                assert f.name in str(error)


@given(st.text())
def test_any_config_file_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        read_config(str(path))
    except ConfigError as error:
        assert str(path) in str(error)


# ---------------------------------------------------------------------------------------------------------
# Every error

@pytest.mark.parametrize("argv, words", [
    (["--max_token=5"], ["'max_token'", "'max_tokens'", "--help"]),
    (["--lr=5"], ["unknown key 'lr'", "did you mean"]),
    (["--=5"], ["unknown key ''"]),
    (["--max_tokens"], ["--max_tokens needs a value"]),
    (["--max_tokens=2**54"], ["max_tokens", "2**54", "int"]),
    (["--max_tokens="], ["max_tokens", "''", "int"]),
    (["--max_tokens=many"], ["max_tokens", "'many'", "int"]),
    (["--max_tokens=1.5"], ["max_tokens", "1.5", "int"]),
    (["--max_tokens=True"], ["max_tokens", "True", "int"]),
    (["--max_tokens=1e999"], ["max_tokens", "1e999", "int"]),
    (["--max_tokens=1/0"], ["max_tokens", "1/0", "int"]),
    (["--max_tokens=9**9**9"], ["max_tokens", "9**9**9", "int"]),
    (["--max_tokens=__import__('os').getpid()"], ["max_tokens", "__import__", "int"]),
    (["--max_tokens=" + "(" * 5000], ["max_tokens", "int"]),
    (["--max_tokens=" + "-" * 50_000 + "1"], ["max_tokens", "int"]),
    (["--max_tokens=" + "+".join("1" * 50_000)], ["max_tokens", "int"]),
    (["--learning_rate=nan"], ["learning_rate", "nan", "float"]),
    (["--learning_rate=1e999"], ["learning_rate", "1e999", "float"]),
    (["--learning_rate=true"], ["learning_rate", "float"]),
    (["--compile=1"], ["compile", "1", "bool"]),
    (["--compile=yes"], ["compile", "yes", "bool"]),
    (["--dtype=float16"], ["dtype", "'float16'", "'float32'", "'bfloat16'"]),
    (["--decay_start=x"], ["decay_start", "'x'", "int|none"]),
    (["--sizes=1,x"], ["sizes", "x", "int"]),
    (["--sizes=[1,2.5]"], ["sizes", "2.5", "int"]),
    (["stray.py", "word"], ["'word'", "--key=value"]),
    (["-x", "y"], ["'y'", "--key=value"]),
    (["/no/such.py"], ["/no/such.py", "No such file"]),
    (["/"], ["/:", "no regular file"]),
])
def test_bad_command_lines(argv, words):
    fails(lambda: parse(Settings, argv), *words)


def test_missing_words():
    fails(lambda: parse(Words, ["--out=o"]), "SOURCE is missing", "what to read")
    fails(lambda: parse(Words, ["a"]), "--out is missing", "where to write")
    fails(lambda: parse(Words, ["a", "two", "--out=o"]), "count", "'two'", "int")


@pytest.mark.parametrize("text, words", [
    ("max_tokens = 1\nmax_token = 2\n", ["'max_token'", "'max_tokens'"]),
    ("max_tokens = 'many'\n", ["max_tokens", "'many'", "int"]),
    ("dtype = 'fp8'\n", ["dtype", "'fp8'", "'bfloat16'"]),
    ("sizes = [1, 'b']\n", ["sizes[1]", "'b'", "int"]),
    ("widths = [1]\n", ["widths", "[1]", "dict"]),
    ("max_tokens = 2**54\n", ["max_tokens", "18014398509481984 is too large"]),
    ("max_tokens = _unset\n", ["line 1", "'_unset'"]),
    ("_a = [1]\nsizes = [_a]\n", ["line 2", "'_a'"]),
    ("max_tokens = " + " + ".join("1" * 1500), ["line 1", "nested too deep"]),
    ("sizes = 3\n", ["sizes", "3", "list of int"]),
    ("compile = 1\n", ["compile", "1", "bool"]),
    ("out_dir = 3\n", ["out_dir", "3", "str"]),
    ("out_dir = b'x'\n", ["out_dir", "str"]),
    ("\n\nimport os\n", ["line 3", "import os"]),
    ("max_tokens = len('abc')\n", ["line 1", "len('abc')"]),
    ("max_tokens = ().__class__\n", ["line 1"]),
    ("out_dir = f'{1}'\n", ["line 1"]),
    ("max_tokens = learning_rate\n", ["line 1", "'learning_rate'"]),
    ("max_tokens += 1\n", ["line 1", "key = value"]),
    ("max_tokens: int = 1\n", ["line 1", "key = value"]),
    ("max_tokens = sizes = 1\n", ["line 1", "key = value"]),
    ("if True:\n    max_tokens = 1\n", ["line 1", "key = value"]),
    ("max_tokens = 1\n1 + 1\n", ["line 2", "key = value"]),
    ("max_tokens = 1 / 0\n", ["line 1", "1 / 0", "division by zero"]),
    ("max_tokens = 9**9**9\n", ["line 1", "cannot compute '9 ** 9 ** 9'"]),
    ("max_tokens = 1 + 'a'\n", ["line 1", "1 + 'a'"]),
    ("max_tokens = {[1]: 2}\n", ["line 1"]),
    ("max_tokens = {**{}}\n", ["line 1"]),
    ("max_tokens = 1 if 1 else 2\n", ["line 1"]),
    ("max_tokens = [x for x in [1]]\n", ["line 1"]),
    ("max_tokens = 1\nmax_tokens = (\n", ["line 2"]),
    ("max_tokens = '\0'\n", ["null bytes"]),
    ("max_tokens = " + "-" * 50_000 + "1", ["nested too deep"]),
    ("out_dir.x(\n1)\n", ["line 1", "key = value", "not 'out_dir.x('"]),
    ("max_tokens(" + " + ".join("1" * 1500) + ")\n", ["key = value"]),
])
def test_bad_config_files(tmp_path, text, words):
    path = written(tmp_path, text)
    fails(lambda: parse(Settings, [path]), path, *words)


def test_config_file_that_is_no_text(tmp_path):
    (tmp_path / "c.py").write_bytes(b"out_dir = '\xff\xfe'\n")
    fails(lambda: read_config(str(tmp_path / "c.py")), str(tmp_path / "c.py"), "decode byte")


def test_nothing_is_executed(tmp_path):
    code = f"open({str(tmp_path / 'mark')!r}, 'w').write('x')"
    fails(lambda: parse(Settings, [written(tmp_path, f"out_dir = {code}\n")]), "line 1")
    assert parse(Settings, [f"--out_dir={code}"]).out_dir == code
    assert not (tmp_path / "mark").exists()


def test_unknown_keys_and_wrong_types_from_a_dict_say_where():
    fails(lambda: checked(Settings, {"sizzes": []}, "config.json: "), "config.json: ", "'sizes'")
    fails(lambda: from_dict(Words, {"source": "a"}, "x.json: "), "x.json: --out is missing")


# ---------------------------------------------------------------------------------------------------------
# Scripts

def run_with(words, monkeypatch, main=print, cls=Settings):
    monkeypatch.setattr(sys, "argv", ["some/script.py", *words])
    run(main, cls)


def test_help_lists_every_key_with_default_and_meaning(capsys, monkeypatch):
    run_with(["--no_such_key=1", "--help"], monkeypatch, main=lambda settings: pytest.fail("main was called"))
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.splitlines()]
    assert "Does a thing." in text and "float32|bfloat16" in text
    assert "--modes  list of eager|compiled, default" in text and "--decay_start  int|none," in text
    for f in dataclasses.fields(Settings):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        name = "CONFIG" if f.name == "config" else f"--{f.name}"
        assert any(line.startswith(f"{name} ") and line.endswith(f"default {default!r}") for line in lines)
        assert f.metadata["meaning"] in text
    assert "usage: python a/x.py SOURCE COUNT REST... [--key=value ...]" in help_text(Words, "a/x.py")
    assert "SOURCE  str, required" in help_text(Words, "x.py")


def test_errors_of_a_script_are_one_line_on_stderr_and_status_2(capsys, monkeypatch):
    seen = []
    run_with(["--max_tokens=3"], monkeypatch, seen.append)
    assert seen == [Settings(max_tokens=3)]

    def no_data(settings):
        raise ConfigError("no data")

    def no_package(settings):
        import no_such_package  # noqa: F401
    unknown = "unknown key 'max_token'; did you mean 'max_tokens'? (--help lists all)"
    for argv, main, message in (
            (["--max_token=5"], print, unknown), ([], no_data, "no data"),
            ([], no_package, "No module named 'no_such_package'; run: pip install no_such_package")):
        with pytest.raises(SystemExit) as stop:
            run_with(argv, monkeypatch, main)
        assert stop.value.code == 2 and tuple(capsys.readouterr()) == ("", f"script.py: {message}\n")
