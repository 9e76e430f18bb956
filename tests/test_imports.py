"""The rooms of the code: imports go one way."""

import ast
import sys
from pathlib import Path

import pytest

import grpo_trl


PACKAGE = Path(grpo_trl.__file__).parent
LAYERS = (
    ("objective", "seeds", "errors", "plan", "geometry", "notices"),
    ("policy", "rewards", "rollout", "metrics"),
    (
        "balance",
        "data",
        "models",
        "launch",
        "sharding",
        "scoring",
        "signals",
        "guards",
        "watchdog",
        "state",
        "config",
        "report",
    ),
    ("evaluation", "windows", "resumable", "assembly", "trainer"),
    ("__init__",),
)
LAYER = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
MODULES = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}


def imports_of(module: tuple[str, ...]) -> set[str]:
    """Dotted names of all that a module imports, anywhere in it, with `from x import y` as x.y."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else ["grpo_trl", *module[: len(module) - node.level]]
            base += node.module.split(".") if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def inner_imports_of(module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The modules of this package that a module imports, as in `MODULES`; a package stands for its `__init__`."""
    found = set()
    for name in imports_of(module):
        top, *parts = name.split(".")
        if top == "grpo_trl":
            candidates = [(*parts,), (*parts[:-1],), (*parts, "__init__"), (*parts[:-1], "__init__")]
            found.add(next(c for c in candidates if c in MODULES))
    return found


def room_of(module: tuple[str, ...]) -> str:
    return module[0]


def test_every_module_has_a_room():
    assert {room_of(module) for module in MODULES} == set(LAYER)


@pytest.mark.parametrize("module", MODULES, ids=".".join)
def test_a_module_imports_from_its_own_layer_or_from_lower_ones(module):
    higher = {m for m in inner_imports_of(module) if LAYER[room_of(m)] > LAYER[room_of(module)]}
    assert not higher


def cycle_in(graph: dict) -> list:
    """Nodes that import each other in a circle, or an empty list."""
    left = {node: set(others) - {node} for node, others in graph.items()}
    while free := [node for node, others in left.items() if not others & left.keys()]:
        for node in free:
            del left[node]
    return sorted(left)


def test_a_cycle_is_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": {"c"}}) == []


def test_no_modules_import_each_other_in_a_circle():
    assert cycle_in({module: inner_imports_of(module) for module in MODULES}) == []


def test_no_rooms_import_each_other_in_a_circle():
    rooms: dict[str, set[str]] = {room: set() for room in LAYER}
    for module in MODULES:
        rooms[room_of(module)] |= {room_of(m) for m in inner_imports_of(module)}
    assert cycle_in(rooms) == []


def outer_imports_of(room: str) -> set[str]:
    names = {name for module in MODULES if room_of(module) == room for name in imports_of(module)}
    return {name for name in names if not name.startswith("grpo_trl")}


def test_the_objective_imports_torch_only():
    packages = {name.split(".")[0] for name in outer_imports_of("objective")}
    assert packages - set(sys.stdlib_module_names) == {"torch"}
    assert {room_of(m) for module in MODULES if room_of(module) == "objective" for m in inner_imports_of(module)} == {
        "objective"
    }


@pytest.mark.parametrize("room", ["objective", "policy"])
def test_what_is_pure_knows_no_logger_and_no_rank(room):
    packages = {name.split(".")[0] for name in outer_imports_of(room)}
    assert not packages & {"logging", "os", "accelerate"}
    assert not {name for name in outer_imports_of(room) if name.startswith("torch.distributed")}


def test_only_the_trainer_and_its_base_know_the_trainer_of_transformers():
    names = {"Trainer", "TrainerCallback", "TrainerControl", "TrainerState"}
    knowing = {
        module
        for module in MODULES
        if {n.split(".")[-1] for n in imports_of(module) if n.startswith("transformers")} & names
    }
    assert knowing == {("trainer",), ("resumable",)}


def test_only_the_trainer_imports_the_trainer_and_its_config():
    users = {m: {room_of(i) for i in inner_imports_of(m)} & {"config", "trainer"} for m in MODULES}
    assert {m: used for m, used in users.items() if used} == {
        ("__init__",): {"config", "trainer"},
        ("trainer",): {"config"},
        ("resumable",): {"config"},
        ("assembly",): {"config"},
    }
