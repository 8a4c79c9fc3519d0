"""Who may import whom, and what must not be needed to import the packages."""

import ast
import json
import re
import subprocess
import sys

import pytest
from structure_helpers import PACKAGES, ROOT, eager_statements, imported_modules, python_files, tree_of, where

# Everything outside [project.dependencies]: extras, and packages that only some machines can have.
OPTIONAL = (
    "av",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "flash_attn",
    "hypothesis",
    "lmms_eval",
    "matplotlib",
    "openpyxl",
    "pandas",
    "peft",
    "psutil",
    "pyarrow",
    "pytest",
    "scipy",
    "skimage",
    "sklearn",
    "torchvision",
    "triton",
    "wandb",
)


def test_duet_never_imports_llava():
    for path in python_files("duet"):
        for node, module in imported_modules(tree_of(path)):
            assert module.split(".")[0] != "llava", f"{where(path, node)} imports {module}"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("llava."), f"{where(path, node)} names a llava module: {node.value!r}"


def test_packages_never_import_scripts_tests_or_playground():
    for path in python_files(*PACKAGES):
        for node, module in imported_modules(tree_of(path)):
            assert module.split(".")[0] not in {"scripts", "tests", "playground"}, f"{where(path, node)}: {module}"


def test_llava_uses_only_public_names_of_duet():
    for path in python_files("llava"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "duet":
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{where(path, node)} takes private names from {node.module}: {private}"


def test_optional_packages_are_imported_where_they_are_used():
    for path in python_files(*PACKAGES):
        for statement in eager_statements(tree_of(path).body):
            if isinstance(statement, ast.Import | ast.ImportFrom):
                for _, module in imported_modules(statement):
                    assert module.split(".")[0] not in OPTIONAL, (
                        f"{where(path, statement)} imports {module} eagerly; do it in the function that needs it"
                    )


BLOCKED_IMPORT = """
import importlib, json, pkgutil, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None  # makes find_spec say "not there" and import raise ModuleNotFoundError
modules = []
for package_name in sys.argv[2].split(","):
    package = importlib.import_module(package_name)
    modules.append(package_name)
    for info in pkgutil.walk_packages(package.__path__, package_name + "."):
        if not info.name.endswith("__main__") and info.name not in sys.argv[3].split(","):
            importlib.import_module(info.name)
            modules.append(info.name)
print(json.dumps(modules))
"""

# LLaVA's entry points that run when they are imported.
RUNS_ON_IMPORT: tuple[str, ...] = ()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_without_the_optional_packages(package):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT, json.dumps(OPTIONAL), package, ",".join(RUNS_ON_IMPORT)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    imported = json.loads(done.stdout.splitlines()[-1])
    assert package in imported


def test_the_import_blocker_blocks():
    source = BLOCKED_IMPORT.replace("modules = []", "modules = []; import json as _j; import datasets", 1)
    done = subprocess.run(
        [sys.executable, "-c", source, json.dumps(OPTIONAL), "duet", ""],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr


def test_optional_list_covers_the_extras():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    names = {"scikit-image": "skimage", "scikit-learn": "sklearn"}
    tools = {"ninja", "ruff", "pyright", "pytest-xdist"}  # programs, nothing to import
    found = set(re.findall(r'"([A-Za-z0-9-]+)', extras)) - tools
    assert len(found) > 10
    missing = {name for name in found if names.get(name, name.replace("-", "_")) not in OPTIONAL}
    assert not missing, f"optional in pyproject.toml and not in the list: {missing}"
