"""README is executed: its commands and examples run, its tree is the tree, its table lists the verbs, its links exist.

A block that needs the network carries the comment `<!-- not run: reason -->`, one whose lines need each other `<!-- run
together -->`. The models that the others name are found
as folders of the same name in the current one, made here at debug size, so nothing is fetched.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import folder_fixtures
import pytest

from gemwright.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^(<!-- (?:not run: [^\n]+|run together) -->\n)?```(\w*)\n(.*?)^```$", README, re.M | re.S)


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language that are to be run."""
    return [text for skipped, name, text in BLOCKS if name == language and not skipped]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's model names are checkpoints of debug size."""
    here = tmp_path_factory.mktemp("readme")
    for name in set(re.findall(r"google/gemma-[\w-]+", README)):
        folder_fixtures.gemma2(here / name)
    return here


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", [line for text in blocks("sh") for line in text.splitlines()])
def test_commands_run(command: str, folder: Path) -> None:
    assert run(["bash", "-euo", "pipefail", "-c", command], folder).strip()


@pytest.mark.parametrize("script", [text for mark, _, text in BLOCKS if "run together" in mark])
def test_scripts_run(script: str, folder: Path) -> None:
    assert run(["bash", "-euo", "pipefail", "-c", script], folder).strip()


@pytest.mark.parametrize("example", blocks("python"))
def test_python_examples_run(example: str, folder: Path) -> None:
    assert run([sys.executable, "-c", example.replace('device="cuda"', 'device="cpu"')], folder).strip()


def test_the_tree_is_the_tree() -> None:
    """Every file and folder of the package, no other; what stands beside the package exists."""
    (tree,) = (text for _, name, text in BLOCKS if name == "" and text.startswith("gemwright/"))
    told, parents = set(), [""]
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth + 1 :] = [parents[depth] + name]
        told.add(parents[depth] + name)
    paths = [path for path in (ROOT / "gemwright").rglob("*") if "__pycache__" not in path.parts]
    there = {path.relative_to(ROOT).as_posix() + "/" * path.is_dir() for path in paths}
    package = {name for name in told if name.startswith("gemwright/")} - {"gemwright/"}
    assert sorted(package - there) == [], "told but not there"
    assert sorted(there - package) == [], "there but not told"
    assert [name for name in told if not (ROOT / name).exists()] == []


def test_the_table_lists_the_verbs() -> None:
    assert dict(re.findall(r"^\| `gemwright ([\w-]+)` \| (.*) \|$", README, re.M)) == VERBS


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
