"""The floor plan, held over the syntax tree: who may import whom, one meaning a name, sizes, and where configs stop.

Every list of exceptions is what is found, no more: it can only shrink, and is to end empty.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "consistentee"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("foundation",),  # the files beside the rooms
    ("functional", "data", "backbones"),
    ("heads",),
    ("inference", "inference.encoder", "inference.decoder"),
    ("models",),
    ("training", "pipelines"),
    ("serving",),
    ("evaluation",),
    ("cli",),
)
"""From the ground up. Rooms import what is below them; rooms of one floor do not import each other."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MAY_SHARE = {("inference.encoder", "inference"), ("inference.decoder", "inference")}
ANYTHING = ("", "__main__")  # the package itself and `python -m`: what others import goes through neither

MOST_LINES = 450
TOP_FLOOR = 15
CONFIG_ROOMS = re.compile(r"(cli|training\.(run|train|policy_phase|methods|tasks))(\..+)?|config")

# --- Exceptions -----------------------------------------------------------------------------------

WRONG_WAY: set[tuple[str, str]] = set()
"""(importer, imported)"""

IN_CIRCLES: set[tuple[str, str]] = set()
"""(importer, imported), the one import of each circle that is to go"""

TWO_MEANINGS: set[str] = set()
LONG_FILES: set[str] = set()

CROWDED = 0
"""Entries on the top floor above `TOP_FLOOR`."""

CONFIG_TAKERS: set[str] = set()
"""module:function or module:Class"""


# --- What is there --------------------------------------------------------------------------------


def read_modules(folder: Path) -> dict[str, ast.Module]:
    """Syntax trees by the module's name inside the package, "" for the package itself."""
    trees: dict[str, ast.Module] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        trees[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


MODULES = read_modules(PACKAGE)


def room_of(module: str) -> str:
    """The room that a module is in."""
    first, *rest = module.split(".")
    if f"{first}.{rest[0] if rest else ''}" in FLOOR:
        return f"{first}.{rest[0]}"
    return first if first in FLOOR else "foundation"


def imports(tree: ast.Module, modules: Mapping[str, ast.Module]) -> Iterator[str]:
    """Modules of the package that a module imports anywhere: in functions, for types, and by name, too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                found = [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(source), names=aliases):
                whole = [f"{source}.{alias.name}" for alias in aliases]
                found = [name if _inside(name) in modules else source for name in whole]
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                found = [name]
            case _:
                continue
        yield from (_inside(name) for name in found if name.split(".")[0] == "consistentee")


def _inside(name: str) -> str:
    return name.removeprefix("consistentee").removeprefix(".")


def import_graph(modules: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Which modules each one imports, without those that may import anything."""
    return {
        name: {other for other in imports(tree, modules) if other not in ANYTHING}
        for name, tree in modules.items()
        if name not in ANYTHING
    }


def wrong_ways(graph: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """Imports that do not go down: up, or into another room of the same floor."""
    found: set[tuple[str, str]] = set()
    for importer, others in graph.items():
        for imported in others:
            rooms = (room_of(importer), room_of(imported))
            goes_down = FLOOR[rooms[1]] < FLOOR[rooms[0]]
            if not (goes_down or rooms[0] == rooms[1] or rooms in MAY_SHARE):
                found.add((importer, imported))
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring; none if there is no such ring."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def public_names(statements: list[ast.stmt]) -> Iterator[str]:
    """Names that statements of a module define without an underscore in front."""
    for statement in statements:
        match statement:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found = [name]
            case ast.Assign(value=ast.Call(func=ast.Name(id="TypeVar"))):
                found = []
            case ast.Assign(targets=targets):
                parts = [part for target in targets for part in getattr(target, "elts", [target])]
                found = [part.id for part in parts if isinstance(part, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                found = [name]
            case ast.If(body=body, orelse=rest):
                found = [*public_names(body), *public_names(rest)]
            case _:
                continue
        yield from (name for name in found if not name.startswith("_"))


def two_meanings(modules: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Names that several modules define, with those modules."""
    homes: dict[str, set[str]] = defaultdict(set)
    for module, tree in modules.items():
        for name in public_names(tree.body) if module else ():
            homes[name].add(module)
    return {name: sorted(places) for name, places in homes.items() if len(places) > 1}


def config_takers(modules: Mapping[str, ast.Module]) -> set[str]:
    """Functions and classes outside their rooms that take a training config, "module:name"."""
    names = public_names(modules["config"].body)
    configs = re.compile(rf"\b({'|'.join(name for name in names if name.endswith('Config'))})\b")
    return {
        f"{module}:{name}"
        for module, tree in modules.items()
        if not CONFIG_ROOMS.fullmatch(module)
        for name, annotation in _annotations(tree.body)
        if configs.search(re.sub(r"\btype\[\w+\]", "", ast.unparse(annotation)))  # a class is no object
    }


def _annotations(statements: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.expr]]:
    """Annotations of the parameters of functions and of the fields of classes, with whose they are."""
    for statement in statements:
        match statement:
            case ast.FunctionDef(name=name, args=arguments, body=body):
                for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
                    if argument.annotation is not None:
                        yield prefix + name, argument.annotation
                yield from _annotations(body, f"{prefix}{name}.")
            case ast.ClassDef(name=name, body=body):
                fields = [part.annotation for part in body if isinstance(part, ast.AnnAssign)]
                yield from ((prefix + name, annotation) for annotation in fields)
                yield from _annotations(body, f"{prefix}{name}.")
            case _:
                continue


# --- The rules ------------------------------------------------------------------------------------


def test_imports_go_one_way() -> None:
    assert wrong_ways(import_graph(MODULES)) == WRONG_WAY


def test_no_modules_import_each_other() -> None:
    graph = import_graph(MODULES)
    for importer, imported in IN_CIRCLES:
        graph[importer].remove(imported)
    assert circle(graph) == []
    for importer, imported in IN_CIRCLES:
        assert circle({**graph, importer: graph[importer] | {imported}}), (
            f"{importer} -> {imported}: no circle"
        )


def test_a_name_has_one_meaning() -> None:
    found = two_meanings(MODULES)
    assert set(found) == TWO_MEANINGS, {name: found[name] for name in set(found) - TWO_MEANINGS}


def test_files_are_short() -> None:
    lines = {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8").count("\n")
        for path in PACKAGE.rglob("*.py")
    }
    assert {name for name, count in lines.items() if count > MOST_LINES} == LONG_FILES


def test_the_top_floor_is_small() -> None:
    entries = sorted({name.split(".")[0] for name in MODULES} - set(ANYTHING))
    assert len(entries) <= TOP_FLOOR + CROWDED, entries
    assert not CROWDED or len(entries) == TOP_FLOOR + CROWDED, entries


def test_configs_stay_above() -> None:
    assert config_takers(MODULES) == CONFIG_TAKERS


def test_files_of_tests_have_names_of_their_own() -> None:
    """Pytest imports them by name alone, and refuses the second of two in one run."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if "node_modules" not in path.parts]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_module_for_anything() -> None:
    assert [name for name in MODULES if name.split(".")[-1] in ("utils", "base")] == []


# --- That the rules see what breaks them ----------------------------------------------------------


def modules_of(**sources: str) -> dict[str, ast.Module]:
    return {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}


@pytest.mark.parametrize(
    "importer, source, imported",
    [
        ("heads__a", "from consistentee.models.b import x", "models.b"),
        ("heads__a", "from consistentee.models import b", "models.b"),
        ("heads__a", "def f():\n    import consistentee.models.b", "models.b"),
        ("heads__a", "import importlib\nimportlib.import_module('consistentee.models.b')", "models.b"),
        ("errors", "if TYPE_CHECKING:\n    from consistentee.functional.c import x", "functional.c"),
        ("data__a", "from consistentee.functional.c import x", "functional.c"),
        ("inference__encoder__a", "from consistentee.inference.decoder.d import x", "inference.decoder.d"),
        ("inference__a", "from consistentee.inference.decoder.d import x", "inference.decoder.d"),
    ],
)
def test_imports_that_go_wrong_ways_are_seen(importer: str, source: str, imported: str) -> None:
    others = {"models__b": "", "functional__c": "", "inference__decoder__d": ""}
    graph = import_graph(modules_of(**others, **{importer: source}))
    assert wrong_ways(graph) == {(importer.replace("__", "."), imported)}


def test_imports_that_go_down_are_not() -> None:
    inside = "from consistentee.inference.b import x\nfrom consistentee import errors, __version__"
    graph = import_graph(modules_of(errors="", inference__b="", inference__encoder__a=inside))
    assert graph["inference.encoder.a"] == {"inference.b", "errors"}
    assert wrong_ways(graph) == set()


def test_circles_are_seen() -> None:
    sources = {name: f"from consistentee.data.{other} import x" for name, other in ("ab", "bc", "ca")}
    modules = modules_of(**{f"data__{name}": source for name, source in sources.items()})
    assert set(circle(import_graph(modules))) == {"data.a", "data.b", "data.c"}


def test_second_meanings_are_seen() -> None:
    modules = modules_of(data__a="X: int = 1\ndef f(): ...\n_g = 1", heads__b="class f: ...\nX, _g = 1, 2")
    assert two_meanings(modules) == {"X": ["data.a", "heads.b"], "f": ["data.a", "heads.b"]}


def test_configs_that_come_down_are_seen() -> None:
    modules = modules_of(
        config="class TrainingConfig: ...",
        training__run="def start(config: TrainingConfig): ...",
        training__steps="class Steps:\n    def __init__(self, *, config: TrainingConfig | None): ...",
        training__policy="def fit(config: type[TrainingConfig]): ...\nclass Fit:\n    config: TrainingConfig",
    )
    assert config_takers(modules) == {"training.steps:Steps.__init__", "training.policy:Fit"}
