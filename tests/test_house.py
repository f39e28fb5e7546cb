"""The house: which file may import which. Arrows point one way, and there is no circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.py"), *ROOT.glob("tasks/*.py"), *ROOT.glob("lab/*.py")]


def module_name(file):
    """ "lab.stats" for lab/stats.py, "tasks" for tasks/__init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_names(file):
    """Every name that a file imports, inside its functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = {module_name(file) for file in FILES}
IMPORTS = {module_name(file): imported_names(file) & MODULES for file in FILES}


def reached_from(module):
    """All modules that importing this one may load."""
    reached, waiting = set(), [module]
    while waiting:
        for name in IMPORTS[waiting.pop()]:
            if name not in reached:
                reached.add(name)
                waiting.append(name)
    return reached


def test_there_is_no_circle():
    assert [module for module in MODULES if module in reached_from(module)] == []


def test_the_algorithm_the_environment_and_the_model_do_not_know_each_other():
    assert reached_from("sapo") == set() and reached_from("vlm") == set()
    assert all(name.split(".")[0] == "tasks" for name in reached_from("env"))
    assert reached_from("baselines") == {"sapo"}


def test_only_the_training_script_looks_into_the_laboratory():
    above = {module for module in MODULES if module.split(".")[0] != "lab"}
    looking = {
        module for module in above if any(name.split(".")[0] == "lab" for name in IMPORTS[module])
    }
    assert looking == {"train"}  # for its figures


def test_files_of_json_are_written_by_one_function():
    """checkpoint.write_json: whole, and such as every program reads. What others make of JSON is
    hashed, asked of another process, printed or put into a page."""
    makers = {module_name(file) for file in FILES if "json.dump" in file.read_text()}
    others = {"tiny", "tasks.judge", "tasks.reasoning", "lab.bench_gpu", "lab.ratio_noise"}
    assert makers == others | {"checkpoint", "lab.explorer"}


def test_a_reader_of_the_algorithm_needs_torch_alone():
    standard = {"math", "collections", "dataclasses", "numbers", "typing"}
    packages = {name.split(".")[0] for name in imported_names(ROOT / "sapo.py")}
    assert packages == standard | {"torch"}
