"""Nothing changes a class or a module that it does not own; only attach and the families write on foreign instances."""

import ast
import functools
from pathlib import Path

import pytest
from structure_helpers import PACKAGES, ROOT, imported_names, python_files, root_name, tree_of, where

MAY_WRITE_ON_INSTANCES = ("duet/attach.py", "duet/families/")
# Switches that a library offers as plain assignment, and that belong to the process by design.
SETTINGS = ("torch.backends.", "torch.set_")


def assigned_targets(node: ast.AST) -> list[ast.expr]:
    """The expressions that a statement writes to or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    else:
        return []
    return [
        part for target in targets for part in (target.elts if isinstance(target, ast.Tuple | ast.List) else [target])
    ]


def is_setter(node: ast.AST) -> bool:
    """Is this a call of setattr or delattr?"""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"setattr", "delattr"}


def names_in(annotation: ast.expr | None) -> set[str]:
    """Plain names in an annotation."""
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else set()


@functools.cache
def own_classes() -> frozenset[str]:
    """Names of the classes that duet defines."""
    trees = [tree_of(path) for path in python_files("duet")]
    return frozenset(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def class_writes(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """Writes on imported names, on `type(x)`, `x.__class__`, `x.__dict__` of imported names, and on `sys.modules`."""
    imported = imported_names(tree)
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = []
    for node in ast.walk(tree):
        owners = [target for target in assigned_targets(node) if isinstance(target, ast.Attribute | ast.Subscript)]
        if is_setter(node):
            owners = [ast.Attribute(node.args[0], "", ast.Store())]
        for target in owners:
            text = ast.unparse(target)
            if text.startswith(SETTINGS) or text.startswith("os.environ["):
                continue
            inner = target.value if isinstance(target, ast.Attribute | ast.Subscript) else target
            on_type = isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == "type"
            on_class = "__class__" in ast.unparse(inner) or (
                isinstance(target, ast.Attribute) and root_name(target) in classes
            )
            if root_name(target) in imported or on_type or on_class:
                found.append((node, text))
    return found


def instance_writes(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """Attribute writes on objects that came in as an argument (not `self`), by assignment or by setattr.

    An argument whose annotation names one of the package's own classes is not foreign.
    """
    found = []
    own = own_classes()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        given = {a.arg for a in every if not names_in(a.annotation) & own} - {"self", "cls"}
        for node in ast.walk(function):
            targets = [target for target in assigned_targets(node) if isinstance(target, ast.Attribute)]
            if is_setter(node):
                targets = [ast.Attribute(node.args[0], "", ast.Store())]
            found += [(node, ast.unparse(target)) for target in targets if root_name(target) in given]
    return found


def test_no_class_or_module_is_patched():
    for path in python_files(*PACKAGES):
        for node, text in class_writes(tree_of(path)):
            raise AssertionError(f"{where(path, node)} writes on something it does not own: {text}")


def test_only_attach_and_families_write_on_foreign_instances():
    for path in python_files("duet"):
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(MAY_WRITE_ON_INSTANCES):
            continue
        for node, text in instance_writes(tree_of(path)):
            raise AssertionError(f"{where(path, node)} writes on an object it was given: {text}")


@pytest.mark.parametrize(
    "source",
    [
        "from transformers import LlamaModel\nLlamaModel.forward = print",
        "import transformers\ntransformers.models.llama.X = 1",
        "from transformers import LlamaModel\nsetattr(LlamaModel, 'forward', print)",
        "def f(model):\n    type(model).forward = print",
        "def f(model):\n    model.__class__.forward = int",
        "import sys\nsys.modules['llava'] = None",
        "from a import B\ndel B.method",
        "import torch.nn.functional as F\nF.softmax, x = 1, 2",
    ],
)
def test_the_patch_check_sees(source):
    assert class_writes(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "def f(m):\n    m.forward = 1",
        "def f(m, n):\n    setattr(m.layer, n, 1)",
        "def f(m: Any):\n    m.__class__ = int",
    ],
)
def test_the_instance_check_sees(source):
    assert instance_writes(ast.parse(source))


def test_allowed_places_exist():
    assert Path(ROOT, "duet/attach.py").is_file()
    assert Path(ROOT, "duet/families").is_dir()
