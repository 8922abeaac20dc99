"""The house's plan, checked where files import each other: its rooms in order are `ROOMS`."""

import ast
import functools
import pathlib

CLONE = pathlib.Path(__file__).parent.parent
PACKAGE = CLONE / "lm"
LONGEST = 500  # lines of a file; one that is longer holds two ideas

# The rooms, each a folder or a file of `lm`, from the ground up: a file imports only from its own
# room or from those before it. Documents that name an order of rooms refer to this table.
ROOMS = (
    "config",
    "files",
    "command",
    "parallel",
    "tokenizers",
    "data",
    "models",
    "objectives",
    "training",
    "inference",
    "runs",
    "__init__",  # lm.load
    "serving",
    "alignment",
    "evaluation",
    "planning",
    "scaling",
    "interpretability",
    "experiments",
    "jobs",
    "__main__",
)

FILES = {
    ".".join(path.relative_to(CLONE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.glob("**/*.py"))
}


def _imports(module: str) -> dict[str, bool]:
    """What a file imports of `lm` and JAX → whether as soon as it is imported itself."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    later = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide the room they are from"
            several = [f"{node.module}.{alias.name}" for alias in node.names]
            # A name of a package is a file of it, or stands in its __init__.
            names = [name if name in FILES else node.module for name in several]
            if node.module.startswith("jax"):
                names = several
        else:
            continue
        for name in names:
            found[name] = found.get(name, False) or node not in later
    return found


@functools.cache
def _imported() -> dict[str, dict[str, bool]]:
    return {module: _imports(module) for module in FILES}


@functools.cache
def _graph() -> dict[str, set[str]]:
    """Of each file, which others of the package it imports."""
    return {
        module: {name for name in found if name in FILES and name != module}
        for module, found in _imported().items()
    }


def _room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def _circles() -> set[tuple[str, ...]]:
    """Groups of files of which each reaches each other by imports."""
    reached = {}
    for module in _graph():
        found, left = set(), [module]
        while left:
            new = _graph()[left.pop()] - found
            found |= new
            left += new
        reached[module] = found
    return {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in _graph()
        if module in reached[module]
    }


def test_what_a_file_imports_of_the_package_exists():
    missing = {
        (module, name)
        for module, found in _imported().items()
        for name in found
        if name.split(".")[0] == "lm" and name not in FILES
    }
    assert not missing


def test_a_file_imports_from_its_own_room_or_from_those_before_it():
    unknown = {_room(module) for module in FILES} - {*ROOMS}
    assert not unknown, f"say in ROOMS where {unknown} stand"
    upward = {
        module: name
        for module, names in _graph().items()
        for name in names
        if ROOMS.index(_room(name)) > ROOMS.index(_room(module))
    }
    assert not upward


def test_no_two_files_import_each_other():
    # Imports inside functions, and for type checkers alone, count as well.
    assert not _circles()


def test_no_file_holds_two_ideas():
    lines = {m: path.read_text(encoding="utf-8").count("\n") for m, path in FILES.items()}
    assert not {module: number for module, number in lines.items() if number > LONGEST}


def test_importing_the_package_needs_no_private_module_of_jax():
    # Each version of JAX changes them; a file that needs one imports it where it is used.
    private = {
        (module, name)
        for module, names in _imported().items()
        for name, at_once in names.items()
        if name.startswith(("jax._", "jaxlib._")) and at_once
    }
    assert not private
