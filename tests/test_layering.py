"""The rules of the package's structure: who imports whom, and how long things are."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent / "bsce_jax"
PAPER = {"log_prior", "meta_alpha", "memory", "metrics", "scenario", "nearest_mean"}
PAPER |= {"norms", "neighbours", "neural_gas", "slda", "dde", "losses", "models"}
# What each module or folder may import of the package; itself and `errors` always.
ALLOWED: dict[str, set[str]] = {
    **{name: PAPER for name in PAPER},
    "errors": set(),
    "untrusted": set(),
    "terminal": set(),
    "telemetry": {"terminal"},
    "checkpoints": {"untrusted"},
    "data": {"scenario", "terminal", "untrusted"},
    "compute": PAPER,
    "methods": PAPER | {"compute"},
    "config": PAPER | {"methods"},
    "report": PAPER | {"config", "terminal", "untrusted"},
    "hosts": {"config", "telemetry", "terminal", "untrusted"},
    "run": PAPER
    | {"methods", "compute", "config", "data", "checkpoints", "telemetry", "report"},
    "experiment": {"run", "report", "hosts", "config", "compute", "checkpoints"}
    | {"terminal"},
    "predict": {
        "run",
        "report",
        "config",
        "compute",
        "checkpoints",
        "data",
        "terminal",
    },
    "main": {"experiment", "run", "hosts", "config", "terminal"},
    "reproduce": {"experiment", "run", "report", "hosts", "config", "checkpoints"}
    | {"terminal", "untrusted"},
    "__init__": PAPER | {"predict"},
}
# `compute`, of which methods see the state alone.
SEEN_BY_METHODS = {"compute.state"}
LIBRARIES = {"jax", "numpy", "optax", "flax", "sklearn", "threadpoolctl"}
LIBRARIES |= set(sys.stdlib_module_names)


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
    if package != ROOT.name:
        return ""
    return rest.partition(".")[0] or "__init__"


@pytest.mark.parametrize("name", TREES)
def test_imports_point_one_way(name):
    own = top(name)
    allowed = ALLOWED[own] | {own, "errors"}
    for other in imports(TREES[name]):
        if top(other):
            assert top(other) in allowed, other


def test_every_folder_has_its_rule():
    assert {top(name) for name in TREES} == ALLOWED.keys()


def test_the_paper_s_functions_need_arrays_only():
    for name, tree in TREES.items():
        if top(name) in PAPER:
            for other in imports(tree):
                library = other.partition(".")[0]
                assert top(other) or library in LIBRARIES, f"{name}: {other}"


def test_methods_know_neither_the_run_nor_one_another():
    package = f"{ROOT.name}.methods"
    for name, tree in TREES.items():
        if not name.startswith(package):
            continue
        for other in imports(tree):
            if other.startswith(f"{ROOT.name}.compute"):
                assert other.removeprefix(f"{ROOT.name}.") in SEEN_BY_METHODS, name
            assert not other.startswith(f"{package}."), name


def words(tree: ast.AST) -> set[str]:
    """Names and texts in a syntax tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.alias):
            found.add(node.id if isinstance(node, ast.Name) else node.name)
        elif isinstance(node, ast.Constant):
            found.add(str(node.value))
    return found


def test_nothing_but_its_own_file_names_a_method():
    names = {p.stem for p in (ROOT / "methods").glob("*.py")} - {"__init__"}
    for name in TREES:
        if top(name) in ("compute", "run", "experiment", "data", "checkpoints"):
            assert not names & words(TREES[name]), name


def test_no_module_compares_the_name_of_a_phase():
    """Whatever a phase is called: what it does stands in its configuration."""
    names = {"incremental", "finetune", "bias", "balanced_finetuning"}
    for name in TREES:
        if top(name) in ("compute", "run", "experiment", "predict", "hosts"):
            assert not names & words(TREES[name]), name


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


def test_nothing_private_of_jax_is_imported():
    for name, tree in TREES.items():
        assert not any(other.startswith("jax._") for other in imports(tree)), name


def test_the_door_is_small():
    assert LINES[f"{ROOT.name}.main"] < 80
