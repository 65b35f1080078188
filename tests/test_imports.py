"""The direction of imports, and the house rules that a parser can hold: read from the source, nothing is guessed.

A module imports only from modules that stand earlier in ORDER, inside functions too. Inside a folder (ops, quant, ...)
the rule is no cycle among imports at module level: a table of backends may import its backends when one is chosen.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gemwright"

ORDER = [
    "config", "ops", "cache", "sampling", "swap", "tokenizer_backends", "tokenizer", "prompt", "weights", "hub",
    "checkpoint", "model", "adapter", "lora", "quant", "gguf_tokenizer", "gguf", "llama", "lowering", "ballast",
    "adopt", "delta", "parallel", "bundled", "loader", "generate", "engine", "tools", "lm", "bulk", "synthesize",
    "doctor_probes", "doctor", "data", "eval", "merge", "train", "serve", "cli", "__main__",
]  # fmt: skip
"""Modules and folders of the package, each importing only from those before it; some are yet to come."""

RESERVED = {
    "torch.distributed": {"parallel.py", "train/distributed.py"},
    "triton": {"ops/attention_decode.py", "ops/attention_kernels.py", "ops/decode_kernels.py", "ops/loss_kernels.py"},
    "transformers": {"train/teacher.py"},
    "peft": set(),
    "trl": set(),
    "mergekit": set(),
    "llama_cpp": set(),
}
"""Libraries and the only files of the package that may import them."""

EXTRAS = {"PyYAML": "yaml", "opentelemetry_sdk": "opentelemetry"}
"""Optional libraries that are imported under another name than they are installed by."""

TOOLS = {"test", "bench", "mini"}
"""Extras that the package itself does not import."""

UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}

FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(source, name) for name, source in FILES.items()}


def unit(module: str) -> str:
    """The entry of ORDER that a file or a dotted module belongs to: ops/norm.py and gemwright.ops.norm are `ops`."""
    return re.split(r"[./]", module.removeprefix("gemwright."))[0]


def dotted(name: str) -> str:
    """ops/norm.py -> gemwright.ops.norm, ops/__init__.py -> gemwright.ops"""
    return ".".join(["gemwright", *name.removesuffix(".py").split("/")]).removesuffix(".__init__")


MODULES = {dotted(name): name for name in FILES}


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted modules that an import statement names; `from a import b` is a.b where that is a module, else a.

    Of other packages both a and a.b are named, since b may be a module.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        base = node.module or ""
        for alias in node.names:
            full = f"{base}.{alias.name}"
            if full == "gemwright.__version__":  # a constant of the package, not a name that imports a module
                continue
            if base.split(".")[0] == "gemwright":
                yield full if full in MODULES else base
            else:
                yield from (base, full)


def imports(name: str, *, lazy: bool = True) -> Iterator[tuple[str, int]]:
    """(module, line) of the imports in a file; without `lazy` those at module level alone."""
    for node in ast.walk(TREES[name]) if lazy else TREES[name].body:
        yield from ((module, node.lineno) for module in imported(node) if isinstance(node, ast.stmt))


def test_every_module_imports_only_from_earlier_ones() -> None:
    rank = {entry: place for place, entry in enumerate(ORDER)}
    wrong = []
    for name in FILES.keys() - {
        "__init__.py"
    }:  # the package's own file names its public parts, which are imported on use
        here = unit(name.removesuffix(".py"))
        if here not in rank:
            wrong.append(f"{name}: not in ORDER")
            continue
        for module, line in imports(name):
            if module.split(".")[0] != "gemwright" or unit(module) == here:
                continue
            if module == "gemwright":  # a public name: only the front may ask the package for one
                if here not in ("cli", "__main__"):
                    wrong.append(f"{name}:{line} imports from the package's public face")
            elif rank.get(unit(module), len(ORDER)) >= rank[here]:
                wrong.append(f"{name}:{line} imports {module}, which stands later")
    assert not wrong, "\n".join(wrong)


def test_no_circular_imports() -> None:
    graph = {
        dotted(name): {module for module, _ in imports(name, lazy=False) if module in MODULES} - {dotted(name)}
        for name in FILES
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_every_module_can_be_imported() -> None:
    absent = set() if find_spec("triton") else RESERVED["triton"]  # it comes with the CUDA builds of torch alone
    for module in MODULES.keys() - {"gemwright.__main__"} - set(map(dotted, absent)):  # importing __main__ would run it
        importlib.import_module(module)


def test_reserved_libraries_stay_in_their_files() -> None:
    wrong = []
    for name, tree in TREES.items():
        named = list(imports(name))
        named += [(ast.unparse(node), node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for library, allowed in RESERVED.items():
            for module, line in named:
                if (module + ".").startswith(library + ".") and name not in allowed:
                    wrong.append(f"{name}:{line} uses {library}")
    assert not wrong, "\n".join(wrong)


def test_every_library_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name not in TOOLS for line in lines]
    lines = [re.split(r"[<>=!~\[ ]", line)[0].replace("-", "_") for line in [*project["dependencies"], *extras]]
    declared = {EXTRAS.get(line, line.lower()) for line in lines}
    wrong = {
        f"{name}:{line} imports {module}"
        for name in FILES
        for module, line in imports(name)
        if module.split(".")[0] not in {"gemwright", *sys.stdlib_module_names, *RESERVED, *declared}
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_every_module_has_a_docstring() -> None:
    bare = [name for name, tree in TREES.items() if len(ast.get_docstring(tree) or "") < 20]
    assert not bare, f"no docstring: {bare}"


def test_files_and_functions_stay_short() -> None:
    long = [f"{name}: {count} lines" for name, source in FILES.items() if (count := len(source.splitlines())) > 500]
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    assert not long, "\n".join(long)


def test_nothing_lenient_and_nothing_that_runs_data() -> None:
    wrong = []
    for name, tree in TREES.items():
        wrong += [f"{name}:{line} imports {m}" for m, line in imports(name) if m.split(".")[0] in UNSAFE]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                wrong.append(f"{name}:{node.lineno} torch.load")
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
                wrong.append(f"{name}:{node.lineno} {node.func.id}()")
            if isinstance(node.func, ast.Attribute) and node.func.attr == "load_state_dict":
                values = [ast.unparse(k.value) for k in node.keywords if k.arg == "strict"]
                values += [ast.unparse(argument) for argument in node.args[1:2]]
                if values not in ([], ["True"]):
                    wrong.append(f"{name}:{node.lineno} load_state_dict(strict={values[0]})")
    wrong += [f"{name}:{line} torch.load" for name in FILES for m, line in imports(name) if m == "torch.load"]
    assert not wrong, "\n".join(wrong)


def test_importing_has_no_effects_and_nothing_is_global() -> None:
    """At module level there are only definitions: no call stands alone, no loop; and no function rebinds a global."""
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign)
    wrong = []
    for name, tree in TREES.items():
        for node in tree.body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
            if not (isinstance(node, (*definitions, ast.AnnAssign)) or text or guard):
                wrong.append(f"{name}:{node.lineno} runs at import: {ast.unparse(node).splitlines()[0]}")
        wrong += [f"{name}:{node.lineno} global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    assert not wrong, "\n".join(wrong)
