"""Every command ends a user's mistake with one line and an exit status, by the one helper (`duet.errors`)."""

import ast

import pytest
from structure_helpers import ROOT, python_files, tree_of

from duet import errors

COMMANDS = [
    path
    for path in python_files("duet", "llava", "playground", "scripts", "predict.py")
    if "__main__" in path.read_text("utf-8")
]


def end_of(tree):
    """What runs under `if __name__ == "__main__"`, or None."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test).startswith("__name__ =="):
            return node.body[-1]
    return None


def is_guarded(tree):
    """Whether `main` (or what it hands over to) is decorated, made by the helper, or imported from another command."""
    decorated = {
        node.name: any(ast.unparse(one).startswith("main_guard") for one in node.decorator_list)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            called = {call.func.id for call in ast.walk(node)
                      if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}  # fmt: skip
            return decorated["main"] or any(decorated.get(name, False) for name in called)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "main":
            return ast.unparse(node.value).startswith("main_guard(")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "main" for alias in node.names):
            return str(node.module).split(".")[0] in ("duet", "llava", "playground")
    return False


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_command_guards_its_main(path):
    tree = tree_of(path)
    end = end_of(tree)
    if end is None:
        return
    said = ast.unparse(end)
    assert said.startswith(("raise SystemExit(main(", "sys.exit(main(")), f"ends with {said!r}: its status is lost"
    assert is_guarded(tree), "decorate main with duet.errors.main_guard"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--batch 0 must be at least 1"), "error: --batch 0 must be at least 1\n"),
        (FileNotFoundError(2, "No such file", "a.json"), "error: [Errno 2] No such file: 'a.json'\n"),
        (NotImplementedError("no MPT"), "error: no MPT\n"),
        (ModuleNotFoundError("No module named 'x'"), "error: No module named 'x'\n"),
        (FloatingPointError("the loss is nan"), "error: the loss is nan\n"),
        (errors.UserError("two\nlines"), "error: two\nlines\n"),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_a_mistake_is_a_line_and_a_status(capsys, monkeypatch, error, line):
    @errors.main_guard
    def main():
        raise error

    monkeypatch.delenv(errors.TRACEBACK, raising=False)
    assert main() == 1
    assert capsys.readouterr().err == line
    monkeypatch.setenv(errors.TRACEBACK, "1")
    assert main() == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith(line), (
        "the traceback where it is asked for, and the line last"
    )


def test_statuses_are_named_by_kind():
    @errors.main_guard(statuses={FileNotFoundError: 2, OSError: 3})
    def main(error):
        raise error

    assert [main(FileNotFoundError()), main(PermissionError()), main(ValueError())] == [2, 3, 1]


@pytest.mark.parametrize("kind", [TypeError, AssertionError, KeyError, ZeroDivisionError, RuntimeError])
def test_what_is_no_mistake_of_the_user_keeps_its_traceback(kind):
    @errors.main_guard
    def main():
        raise kind("ours")

    with pytest.raises(kind):
        main()


def test_a_status_is_handed_on_and_none_is_zero():
    assert [errors.main_guard(lambda: None)(), errors.main_guard(lambda: 2)()] == [0, 2]
    with pytest.raises(SystemExit) as left:
        errors.main_guard(lambda: (_ for _ in ()).throw(SystemExit(143)))()
    assert left.value.code == 143, "an exit that was asked for stays what it is"


def test_an_interrupted_command_says_so(capsys):
    def main():
        raise KeyboardInterrupt

    assert errors.main_guard(main)() == errors.INTERRUPTED
    assert capsys.readouterr().err.startswith("interrupted")
