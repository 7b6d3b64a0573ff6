"""Who may know whom. Read from the source, so a forbidden import is found wherever it hides, also inside a function."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = {
    "storage": set(),
    "workers": {"storage"},
    "training": {"workers", "storage"},
    "cluster": {"storage"},
    "deployments": {"cluster", "training", "workers", "storage"},
    "cli": {"deployments", "cluster", "training", "workers", "storage"},
    "benchmarks": {"cli", "deployments", "cluster", "training", "workers", "storage"},
}
"""Package → the packages of ours it may import besides itself."""

RAY_SHELLS = {
    "cluster.actor",  # the actor that holds the table
    "training.ray_train",  # one job as a Ray Train run
    "training.ray_worker",  # what each of its workers does
    "training.ray_jobs",  # jobs through Ray's job server
    "training.job",  # the entry point of such a job
}
"""The only modules of `storage`, `workers`, `training` and `cluster` that may import Ray: they wire, nothing else."""

NO_TORCH = [
    "cluster.*",
    "*.config",
    "storage.errors",
    "storage.figures",
    "storage.identity",
    "storage.manifest",
    "storage.object_store",
]
NO_TORCH += [
    "storage.stores",
    "storage.local_store",
    "storage.s3_store",
    "storage.registry",
    "storage.summary",
    "storage.history",
    "storage.adapter_records",
    "storage.index",
    "storage.index_reader",
    "storage.collection",
    "storage.verification",
    "storage.base_checkpoint",
    "deployments.scaling_policy",  # runs in Serve's controller
]
"""Modules that must run where torch is not installed, together with all they import."""

HTTP = {"fastapi", "starlette", "uvicorn", "httpx"}
CONFIG_MAY_IMPORT = {"pydantic", *sys.stdlib_module_names}


@dataclass(frozen=True)
class Import:
    """One import statement: the dotted name it asks for, and whether importing the module runs it."""

    name: str
    line: int
    runs_at_import: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


class Source:
    """Every module of our packages under `root`, parsed once."""

    def __init__(self, root: Path) -> None:
        self.trees = {
            _module_name(path.relative_to(root)): ast.parse(path.read_text(), str(path))
            for package in PACKAGES
            for path in sorted((root / package).rglob("*.py"))
        }
        self.imports = {name: tuple(_imports(tree, True)) for name, tree in self.trees.items()}

    def loaded_by(self, module: str) -> set[str]:
        """All that importing `module` imports, through our own modules to any depth."""
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            waiting += [found.name for found in self.imports.get(name, ()) if found.runs_at_import]
            waiting += [name.rpartition(".")[0]] if "." in name else []
        return seen


def violations(source: Source) -> list[str]:
    """One line for every broken rule of 'who may know whom'."""
    found: list[str] = []
    for module, imports in source.imports.items():
        package = module.partition(".")[0]
        for item in imports:
            where = f"{module}:{item.line} imports {item.name}"
            if item.top in PACKAGES and item.top not in PACKAGES[package] | {package}:
                found.append(f"{where}: {package} may not know {item.top}")
            if item.top == "ray" and package in ("storage", "workers", "training", "cluster"):
                found += [] if module in RAY_SHELLS else [f"{where}: not a Ray shell"]
            if item.top in HTTP and package in ("storage", "workers", "cluster"):
                found.append(f"{where}: {package} speaks no HTTP")
            if item.top == "rich" and package != "cli":
                found.append(f"{where}: only cli prints")
            if module.endswith(".config") and item.top not in CONFIG_MAY_IMPORT:
                found.append(f"{where}: settings stand on pydantic alone")
        if any(fnmatch(module, pattern) for pattern in NO_TORCH):
            torch = {name for name in source.loaded_by(module) if name.partition(".")[0] == "torch"}
            found += [f"{module} loads torch, directly or through what it imports"] if torch else []
        if package not in ("cli", "benchmarks"):
            found += [
                f"{module}:{line} prints: only cli may" for line in _prints(source.trees[module])
            ]
    return found


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(node: ast.AST, runs: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, runs)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative imports hide who is meant"
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno, runs)
        else:
            lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from _imports(child, runs and not lazy)


def _prints(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write"):
            yield node.lineno


def test_no_module_breaks_a_rule() -> None:
    source = Source(ROOT)
    assert len(source.trees) > 50
    assert violations(source) == []


def test_every_listed_module_exists() -> None:
    modules = set(Source(ROOT).trees)
    listed = RAY_SHELLS | {name for name in NO_TORCH if "*" not in name}
    assert listed <= modules, f"the rules name modules that are gone: {sorted(listed - modules)}"


@pytest.mark.parametrize(
    ("file", "text", "rule"),
    [
        ("storage/a.py", "import workers.engine", "storage may not know workers"),
        (
            "cluster/a.py",
            "def f():\n    from deployments import app",
            "cluster may not know deployments",
        ),
        ("deployments/a.py", "from cli.home import flora_home", "deployments may not know cli"),
        ("workers/a.py", "import ray", "not a Ray shell"),
        ("training/a.py", "def f():\n    import ray.train", "not a Ray shell"),
        ("cluster/a.py", "from torch import Tensor", "loads torch"),
        ("cluster/b.py", "from storage.adapter_rows import AdapterRows", "loads torch"),
        ("storage/registry.py", "from storage import adapter_rows", "loads torch"),
        ("workers/a.py", "import fastapi", "speaks no HTTP"),
        ("workers/config.py", "import yaml", "settings stand on pydantic alone"),
        ("training/a.py", "print('loss')", "only cli may"),
        ("deployments/a.py", "from rich.console import Console", "only cli prints"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, file: str, text: str, rule: str) -> None:
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "adapter_rows.py").write_text("import torch\n")
    assert violations(Source(tmp_path)) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert any(rule in line for line in violations(Source(tmp_path)))


def test_what_only_types_or_functions_need_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "a.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    )
    assert violations(Source(tmp_path)) == []
