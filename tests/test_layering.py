"""The rules of the package's structure: who imports whom, and how long things are."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent / "bsce_jax"
CORE = {"losses", "models", "memory", "scenario", "log_prior", "meta_alpha"}
CORE |= {"metrics", "nearest_mean", "norms", "errors"}
RUN = ("experiment", "session", "training", "programs", "context", "plan", "terms")
LIBRARIES = {"jax", "numpy", "optax", "flax", *sys.stdlib_module_names}
COMPILED = ("state", "steps", "updates", "optim", "parallel")
ABOVE = {"config", "experiment", "report", "checkpoint", "main"}


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


TREES = {name_of(p): ast.parse(p.read_text()) for p in sorted(ROOT.rglob("*.py"))}
LINES = {name_of(p): len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}


def imports(node: ast.AST, inside_functions: bool = True) -> set[str]:
    """Modules imported by a syntax tree, as full names; not those for types only."""
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                found.add(full if full in TREES else child.module)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        elif inside_functions or not isinstance(child, ast.FunctionDef):
            found |= imports(child, inside_functions)
    return found


def top(name: str) -> str:
    """The module or folder of the package that a full name belongs to, or ""."""
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == ROOT.name else ""


def test_the_core_imports_arrays_and_itself_only():
    for name, tree in TREES.items():
        if top(name) in CORE:
            for other in imports(tree):
                library = other.partition(".")[0]
                assert top(other) in CORE or library in LIBRARIES, f"{name}: {other}"


def test_compiled_functions_know_no_configuration_and_no_files():
    for name in COMPILED:
        others = {top(other) for other in imports(TREES[f"{ROOT.name}.{name}"])}
        assert not others & ABOVE, name


def test_methods_know_neither_the_run_nor_one_another():
    allowed = CORE | {"methods"}
    for name, tree in TREES.items():
        if top(name) == "methods":
            others = {other for other in imports(tree) if top(other)}
            assert {top(other) for other in others} <= allowed, name
            assert not any(
                other.startswith(f"{ROOT.name}.methods.") for other in others
            )


def test_the_training_of_a_run_names_no_method():
    names = {p.stem for p in (ROOT / "methods").glob("*.py")} - {"__init__"}
    for name in (*COMPILED, *RUN, "step_result"):
        words = set()
        for node in ast.walk(TREES[f"{ROOT.name}.{name}"]):
            if isinstance(node, ast.Name | ast.alias):
                words.add(node.id if isinstance(node, ast.Name) else node.name)
            elif isinstance(node, ast.Constant):
                words.add(str(node.value))
        assert not names & words, name


def test_only_the_runner_of_many_runs_imports_main():
    for name, tree in TREES.items():
        if top(name) == "reproduce":
            continue
        assert f"{ROOT.name}.main" not in imports(tree), name


def test_no_circular_imports():
    graph = {
        name: {other for other in imports(tree, False) if other in TREES} - {name}
        for name, tree in TREES.items()
    }
    while graph:
        free = [name for name, others in graph.items() if not others & graph.keys()]
        assert free, f"circular: {graph}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("name", TREES)
def test_files_are_short_and_so_are_functions(name):
    assert LINES[name] < 400
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name
