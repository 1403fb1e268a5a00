"""The code stays readable in one sitting: its lines, functions, files, imports and paths."""
import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def n_lines(path):
    return len(path.read_text().splitlines())


def found(faults):
    """Fail with one fault a line, if there are any."""
    assert not faults, "\n" + "\n".join(faults)


def test_lines_are_short_and_all_names_are_defined_and_used():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "E501,F",
               "--line-length", "110", "--output-format", "concise", "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_functions_have_60_lines_at_most():
    functions = [(path, node, node.end_lineno - node.lineno + 1)
                 for path in PRODUCT for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert len(functions) > 100
    found([f"{name_of(path)}:{node.lineno}: {node.name} has {n} lines"
           for path, node, n in functions if n > 60])


def test_files_have_500_lines_at_most_and_the_product_grows_no_more():
    found([f"{name_of(path)}: {n_lines(path)} lines" for path in PRODUCT if n_lines(path) > 500])
    total = sum(map(n_lines, PRODUCT))
    assert total < 8850, ", ".join(f"{name_of(path)} {n_lines(path)}" for path in PRODUCT) + f": {total}"


def imported(path):
    """The names of the modules that a file imports anywhere, and of what it imports from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_form_no_circle():
    modules = {name_of(path).removesuffix(".py").replace("/", "."): path for path in PRODUCT}
    graph = {name: set(imported(path)) & set(modules) for name, path in modules.items()}
    assert "configurator" in graph["data.prepare"] and "data.stream" in graph["train"]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("imports form a circle: " + " <- ".join(error.args[1]))


def test_training_loads_neither_the_upcycler_nor_a_tokenizer():
    code = ("import sys, train\n"
            "print({'upcycle', 'data.prepare', 'tokenizers', 'tiktoken'} & set(sys.modules))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stdout + result.stderr


def test_no_file_holds_the_absolute_path_of_a_machine():
    command = ["git", "ls-files", "-coz", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git repository, so the files of the repository are not known")
    faults = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        lines = (ROOT / name).read_bytes().split(b"\n") if (ROOT / name).is_file() else []
        faults += [f"{name}:{number}: an absolute path" for number, line in enumerate(lines, 1)
                   if re.search(rb"(?<![\w.*-])/(work|home|root)/", line)]
    assert "configurator.py" in listed.stdout.decode()
    found(faults)
