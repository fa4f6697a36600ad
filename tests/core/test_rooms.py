"""The rooms of the package: which may import which, and what each hands on."""

import ast
import importlib
from pathlib import Path

import pytest

import optax_rmsprop

PACKAGE = Path(optax_rmsprop.__file__).parent
# A room imports only rooms that stand below it.
ROOMS = [
    "torch_layers",
    "carry",
    "identify",
    "dialects",
    "diagnostics",
    "batch_size",
    "wrappers",
    "optimizer",
    "transforms",
    "_chain",
    "_numerics",
    "_errors",
]
# Within carry likewise.
IN_CARRY = [
    "_flax",
    "_port_of",
    "_optax",
    "_keras",
    "_torch",
    "_back",
    "_run",
    "_groups",
    "_port",
    "_slots",
    "keras_layers",
    "torch_layers",
]
FILES = [file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py")]
FOLDERS = [str(file.parent) for file in FILES if file.match("*/__init__.py")]


def room_of(file):
    return file.parts[0].removesuffix(".py")


def imported(source):
    """The parts of the package that a file's imports name, also within functions."""
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            package, *rest = module.split(".")
            if package == PACKAGE.name:
                yield rest or ["__init__"]


def upward(room, source):
    below = ROOMS[ROOMS.index(room) :]
    return [other for other, *_ in imported(source) if other not in below]


def upward_in_carry(room, source):
    below = IN_CARRY[IN_CARRY.index(room) :]
    inner = (rest[:1] for room, *rest in imported(source) if room == "carry")
    return [other for other in inner if not {*other} & {*below}]


def test_every_file_is_in_a_room():
    assert {room_of(file) for file in FILES} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_downwards(file):
    if file != Path("__init__.py"):
        assert upward(room_of(file), (PACKAGE / file).read_text()) == []


CARRY = [file for file in FILES if room_of(file) == "carry"]


@pytest.mark.parametrize("file", CARRY, ids=str)
def test_imports_within_carry_point_downwards(file):
    room = room_of(file.relative_to("carry"))
    if room != "__init__":
        assert upward_in_carry(room, (PACKAGE / file).read_text()) == []


def test_an_arrow_upwards_is_found():
    assert upward("wrappers", "from optax_rmsprop.carry import from_torch")
    assert upward("dialects", "def f():\n  from optax_rmsprop import carry")
    assert upward("_errors", "import optax_rmsprop._numerics")
    assert upward("transforms", "from optax_rmsprop import rmsprop")
    assert upward_in_carry("_run", "from optax_rmsprop.carry._torch import from_torch")
    assert upward_in_carry("_keras", "from optax_rmsprop.carry import from_torch")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_hands_on_names_and_says_why_it_exists(folder):
    room = importlib.import_module(f"optax_rmsprop.{folder.replace('/', '.')}")
    assert len(room.__doc__.splitlines()) >= 5
    tree = ast.parse((PACKAGE / folder / "__init__.py").read_text())
    kinds = {type(node) for node in tree.body}
    assert kinds == {ast.Expr, ast.ImportFrom, ast.Assign}
    assert all(hasattr(room, name) for name in room.__all__)


def test_the_names_of_before_are_those_of_the_rooms():
    for name in optax_rmsprop.__all__:
        assert getattr(optax_rmsprop, name) is not None
    assert optax_rmsprop.TorchRun is optax_rmsprop.carry.Run
    old = importlib.import_module("optax_rmsprop.torch_layers")
    assert old is optax_rmsprop.torch_layers is optax_rmsprop.carry.torch_layers
    for name, module in optax_rmsprop._LAZY.items():
        if name != "TorchRun":
            room = importlib.import_module(f"optax_rmsprop.{module}")
            assert getattr(optax_rmsprop, name) is getattr(room, name)
