"""The rooms of the code: imports go one way."""

import ast
import sys
from pathlib import Path

import grpo_trl


PACKAGE = Path(grpo_trl.__file__).parent
ROOMS = (
    ("errors", "seeds", "logging", "free_memory", "objective"),
    ("model_utils", "rewards", "metrics", "report"),
    ("attention", "cpu_kernels", "gpu_kernels"),
    ("types",),
    ("data", "plan", "logprobs", "rollout", "models", "reference"),
    ("distributed",),
    ("reliability", "config"),
    ("trainer",),
    ("__init__", "cli", "__main__"),
)
"""Each room imports from the rows above it, and from those beside it that do not import it."""
ROW = {room: row for row, rooms in enumerate(ROOMS) for room in rooms}
MODULES = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}


def imports_of(module: tuple[str, ...]) -> set[str]:
    """Dotted names of everything that a module imports, anywhere in it, with `from x import y` as x.y."""
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


def cycle_in(graph: dict) -> list:
    """Nodes that import each other in a circle, or an empty list."""
    left = {node: set(others) - {node} for node, others in graph.items()}
    while free := [node for node, others in left.items() if not others & left.keys()]:
        for node in free:
            del left[node]
    return sorted(left)


def outer_imports_of(room: str) -> set[str]:
    names = {name for module in MODULES if module[0] == room for name in imports_of(module)}
    return {name for name in names if not name.startswith("grpo_trl")}


def test_every_module_has_a_room():
    assert {module[0] for module in MODULES} == set(ROW)


def test_imports_go_one_way():
    upward = {
        (".".join(module), ".".join(other))
        for module in MODULES
        for other in inner_imports_of(module)
        if ROW[other[0]] > ROW[module[0]]
    }
    assert not upward


def test_a_cycle_is_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": {"c"}}) == []


def test_no_modules_import_each_other_in_a_circle():
    assert cycle_in({module: inner_imports_of(module) for module in MODULES}) == []


def test_no_rooms_import_each_other_in_a_circle():
    rooms: dict[str, set[str]] = {room: set() for room in ROW}
    for module in MODULES:
        rooms[module[0]] |= {other[0] for other in inner_imports_of(module)}
    assert cycle_in(rooms) == []


def test_the_objective_imports_torch_only():
    packages = {name.split(".")[0] for name in outer_imports_of("objective")}
    assert packages - set(sys.stdlib_module_names) == {"torch"}
    inner = {other[0] for module in MODULES if module[0] == "objective" for other in inner_imports_of(module)}
    assert inner == {"objective"}


def test_what_is_pure_knows_no_logger_no_rank_and_no_configuration():
    for room in ("objective", "attention", "types"):
        names = outer_imports_of(room)
        assert not {name.split(".")[0] for name in names} & {"logging", "os", "accelerate"}
        assert not {name for name in names if name.startswith("torch.distributed")}
        inner = {other[0] for module in MODULES if module[0] == room for other in inner_imports_of(module)}
        assert not inner & {"config", "logging", "distributed"}


def test_only_the_trainer_knows_the_trainer_of_transformers():
    names = {"Trainer", "TrainerCallback", "TrainerControl", "TrainerState"}
    knowing = {
        module[0]
        for module in MODULES
        if {n.split(".")[-1] for n in imports_of(module) if n.startswith("transformers")} & names
    }
    assert knowing == {"trainer"}


def test_only_the_trainer_reads_the_configuration():
    users = {m[0] for m in MODULES if {other[0] for other in inner_imports_of(m)} & {"config", "trainer"}}
    assert users <= {"__init__", "trainer", "config", "cli"}
