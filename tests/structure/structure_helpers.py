"""What the structural tests share: the list of shipped files, and syntax trees with their imports."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("duet", "llava")
SKIPPED_PARTS = {"__pycache__", ".git", ".venv", "golden", "wandb", "build", "dist"}


@functools.cache
def shipped_files() -> tuple[Path, ...]:
    """Every file git tracks or would track (ignored files are nobody's promise), golden data left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:  # a source archive without .git
        paths = sorted(path for path in ROOT.rglob("*"))
    return tuple(path for path in paths if path.is_file() and not SKIPPED_PARTS & set(path.relative_to(ROOT).parts))


def python_files(*folders: str) -> list[Path]:
    """Shipped Python files below the given top-level folders (all of them when none is given)."""
    return [
        path
        for path in shipped_files()
        if path.suffix == ".py" and (not folders or path.relative_to(ROOT).parts[0] in folders)
    ]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """Parse a file once."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, node: ast.AST) -> str:
    """`file:line`, relative to the repository."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def imported_modules(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """All absolute module names that any import statement in the tree asks for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node, node.module


def imported_names(tree: ast.AST) -> set[str]:
    """Local names that import statements bind, at any depth."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def eager_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, wherever it is.

    Function bodies are left out, and blocks that depend on TYPE_CHECKING or on a package that is there (find_spec).
    """
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        guards = ("TYPE_CHECKING", "find_spec")
        if isinstance(statement, ast.If) and any(guard in ast.dump(statement.test) for guard in guards):
            continue
        yield statement
        for field in ("body", "orelse", "finalbody"):
            yield from eager_statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from eager_statements(handler.body)


def root_name(node: ast.expr) -> str | None:
    """`a` for the expression `a.b.c[0]`, None when it does not start at a plain name."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None
