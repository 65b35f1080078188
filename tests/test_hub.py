"""Names: local folders, the hub's cache laid out by hand, and the arguments and errors of the one download call."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils._paths import filter_repo_objects

from gemwright.checkpoint import Checkpoint, write
from gemwright.hub import HUB_FILES, resolve

NAME, COMMIT = "google/gemma-2-2b", "a" * 40


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache of huggingface_hub with one repository: a snapshot of links into blobs, a branch, a listing."""
    repository = tmp_path / "hub" / "models--google--gemma-2-2b"
    made = write(tmp_path / "made", [("x", torch.tensor([7.0]))], config={"a": 1})
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", repository / "trees", snapshot):
        folder.mkdir(parents=True)
    for path in made.iterdir():
        path.rename(repository / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    (repository / "refs" / "main").write_text(COMMIT)
    files = {name: {"size": 1, "blob_id": "b"} for name in ("config.json", "model.safetensors", "original/model.pth")}
    (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    return tmp_path / "hub"


def test_a_local_folder_is_itself_and_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(NAME) == Path(NAME)
    assert resolve(tmp_path / NAME) == resolve(str(tmp_path / NAME)) == resolve(f"~/{NAME}") == tmp_path / NAME
    with pytest.raises(ValueError, match="revision: got 'main' for the local folder"):
        resolve(NAME, revision="main")


@pytest.mark.parametrize("name", ["./absent", "../absent", "/absent/folder", "~/absent", "a/b/c", "absent/"])
def test_a_path_that_is_not_there_never_reaches_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve(name)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve(Path("google/absent"))


@pytest.mark.parametrize("name", ["google/gemma 2", "google--x", "a..b", "-x", "x.git", "google/\0", "x" * 97])
def test_a_name_that_is_neither_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no such folder, and not a hub name"):
        resolve(name)


def test_a_file_and_an_empty_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="a file; allowed is a folder or a hub name"):
        resolve(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="empty string"):
        resolve("")


def test_arguments_reach_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*positional: Any, **named: Any) -> str:
        calls.append((positional, named))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    assert resolve(NAME, revision="v1", token="secret", cache_dir="there", offline=True) == tmp_path
    assert calls[0] == (
        (NAME,),
        {
            "revision": "v1",
            "token": "secret",
            "cache_dir": "there",
            "local_files_only": True,
            "allow_patterns": ["model*.safetensors", "*.json", "tokenizer.model", "*.jinja"],
            "ignore_patterns": ["*/*"],
        },
    )
    resolve(NAME)
    named = calls[1][1]
    assert (named["revision"], named["token"], named["cache_dir"], named["local_files_only"]) == (
        None,
        None,
        None,
        False,
    )


def test_patterns_take_a_checkpoint_and_nothing_else() -> None:
    wanted = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    unwanted = [
        "pytorch_model.bin",
        "original/model.safetensors",
        "gemma.gguf",
        "README.md",
        "consolidated.safetensors",
    ]
    filtered = filter_repo_objects(wanted + unwanted, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"])
    assert list(filtered) == wanted


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_offline_finds_the_cached_snapshot(cache: Path, revision: str | None) -> None:
    folder = resolve(NAME, revision=revision, cache_dir=cache, offline=True)
    assert folder == cache / "models--google--gemma-2-2b" / "snapshots" / COMMIT
    assert Checkpoint(folder).tensor("x").tolist() == [7]


@pytest.mark.parametrize(("name", "revision"), [("google/absent", None), (NAME, "v9")])
def test_offline_and_not_in_the_cache(cache: Path, name: str, revision: str | None) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"{name}: no such folder here, and no whole copy.*offline is set"
    ) as got:
        resolve(name, revision=revision, cache_dir=cache, offline=True)
    assert revision is None or "at revision 'v9'" in str(got.value)


def test_offline_and_half_in_the_cache(cache: Path) -> None:
    (cache / "models--google--gemma-2-2b" / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no whole copy"):
        resolve(NAME, cache_dir=cache, offline=True)


def http_error(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status} from the hub", response=response)


def unreachable() -> errors.LocalEntryNotFoundError:
    error = errors.LocalEntryNotFoundError("details of the cache")
    error.__cause__ = ConnectionError("no route")
    return error


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (
            http_error(errors.GatedRepoError, 403),
            PermissionError,
            "gated .* accept its licence at https://.*/gemma-2-2b",
        ),
        (http_error(errors.RepositoryNotFoundError, 401), FileNotFoundError, "no such repository on the hub"),
        (http_error(errors.RevisionNotFoundError, 404), FileNotFoundError, "no revision 'v1'"),
        (http_error(errors.HfHubHTTPError, 401), PermissionError, "the hub refused at revision 'v1': 401"),
        (http_error(errors.HfHubHTTPError, 500), OSError, "the hub refused at revision 'v1': 500"),
        (unreachable(), FileNotFoundError, "cannot be reached: no route"),
    ],
    ids=["gated", "absent", "revision", "bad token", "server", "no network"],
)
def test_errors_of_the_hub_say_what_to_do(
    raised: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=f"{NAME}: .*{message}") as caught:
        resolve(NAME, revision="v1")
    assert type(caught.value) is kind
