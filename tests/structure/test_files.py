"""Size, language hygiene and shipped data."""

import ast
import json
import re

import pytest
from structure_helpers import PACKAGES, ROOT, python_files, shipped_files, tree_of, where

MAX_LINES = 500
CODE = {".py", ".sh"}
TEXT = CODE | {".md", ".toml", ".json", ".yml", ".yaml", ".txt", ".cfg", ""}

# Written in pieces so that this file does not match itself.
MACHINE_PATHS = re.compile(r"(?<![\w.$}/~])/(?:" + "|".join(["work", "opt", "home", "root", "mnt", "Users"]) + r")/")
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|HA" r"CK|X" r"XX)\b")


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [p for p in shipped_files() if p.suffix in CODE], ids=relative)
def test_files_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines; split it (limit {MAX_LINES})"


def text_files():
    return [path for path in shipped_files() if path.suffix in TEXT and path.stat().st_size < 2_000_000]


def test_no_machine_paths():
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            assert not MACHINE_PATHS.search(line), (
                f"{relative(path)}:{number} names a path of one machine: {line.strip()[:120]}"
            )


def test_nothing_is_left_unfinished():
    for path in text_files():
        if path.suffix in CODE | {".md", ".toml"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not UNFINISHED.search(line), f"{relative(path)}:{number}: {line.strip()[:120]}"


def has_main_guard(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)


def prints(tree: ast.Module) -> list[ast.Call]:
    """Calls of print outside functions whose purpose is to print."""
    allowed = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "rank0_print"
        for inner in ast.walk(function)
    }
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and id(node) not in allowed
    ]


def test_only_command_line_programs_print():
    for path in python_files(*PACKAGES):
        tree = tree_of(path)
        if has_main_guard(tree) or path.name == "__main__.py":
            continue
        for node in prints(tree):
            raise AssertionError(f"{where(path, node)} prints; use logging or rank0_print")


def test_no_error_is_swallowed():
    for path in python_files():
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            names = ast.unparse(node.type) if node.type else ""
            assert node.type, f"{where(path, node)}: bare except"
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (silent and names in {"Exception", "BaseException"}), f"{where(path, node)}: swallows {names}"


def test_no_stub_functions():
    for path in python_files(*PACKAGES):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
                decorated = {ast.unparse(d).split(".")[-1] for d in node.decorator_list}
                hook = (
                    in_class(tree_of(path), node) and node.returns is not None and ast.unparse(node.returns) == "None"
                )
                declared = hook or in_protocol(tree_of(path), node) or decorated & {"abstractmethod", "overload"}
                if not body and not declared:
                    raise AssertionError(f"{where(path, node)}: {node.name} has no body")


def in_protocol(tree: ast.Module, function: ast.AST) -> bool:
    """Does this method only say what others have to offer?"""
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and function in node.body)
    return any(ast.unparse(base) == "Protocol" for node in classes for base in node.bases)


def in_class(tree: ast.Module, function: ast.AST) -> bool:
    """Is this a method? One that returns None may be a hook that does nothing unless a subclass says so."""
    return any(isinstance(node, ast.ClassDef) and function in node.body for node in ast.walk(tree))


@pytest.mark.parametrize("path", [p for p in shipped_files() if p.suffix in {".json", ".jsonl"}], ids=relative)
def test_every_json_parses(path):
    text = path.read_text(encoding="utf-8")
    for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
        json.loads(part)


def test_modules_say_what_they_are():
    for path in python_files(*PACKAGES):
        tree = tree_of(path)
        assert not tree.body or ast.get_docstring(tree), f"{relative(path)} has no module docstring"


def test_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability" in text


def test_weights_stay_small():
    weights = [path for path in shipped_files() if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in weights) <= 16 * 2**20
    assert not [path for path in shipped_files() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
