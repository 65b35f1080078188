"""Hub: the folder behind a name, local or on the Hugging Face hub.

Only the files that a checkpoint consists of are downloaded, into the cache that every tool of huggingface_hub shares.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

HUB_FILES: Final = ("model*.safetensors", "*.json", "tokenizer.model", "*.jinja")


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
) -> Path:
    """Folder of a checkpoint: a local folder as it is, else a name on the Hugging Face hub, downloaded or from cache.

    A local folder wins over a hub name. `revision` is a branch, tag or commit; `token` a hub token, or True for
    the stored one; `offline` looks in the cache only. Raises FileNotFoundError where neither a folder, a repository nor
    (offline) a cached copy is there, PermissionError where the hub wants a licence or a token, ValueError for a name
    that can be neither.
    """
    if name == "":
        raise ValueError("name: got an empty string, allowed is a folder or a hub name")
    local = Path(os.path.expanduser(name))
    if local.is_dir():
        if revision is not None:
            raise ValueError(f"revision: got {revision!r} for the local folder {local}; allowed with a hub name")
        return local
    if local.exists():
        raise ValueError(f"{local}: a file; allowed is a folder or a hub name")
    if isinstance(name, Path) or re.match(r"[.~/\\]", name) or name.count("/") > 1 or name.endswith("/"):
        raise FileNotFoundError(f"{name}: no such folder (and no hub name, which is OWNER/NAME)")
    return _download(name, revision=revision, token=token, cache_dir=cache_dir, offline=offline)


def _download(
    name: str, *, revision: str | None, token: str | bool | None, cache_dir: str | Path | None, offline: bool
) -> Path:
    from huggingface_hub import errors, snapshot_download

    version = "" if revision is None else f" at revision {revision!r}"
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=list(HUB_FILES),
            ignore_patterns=["*/*"],
        )
    except errors.HFValidationError as error:
        raise ValueError(f"{name!r}: no such folder, and not a hub name: {error}") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{name}: a gated repository: accept its licence at https://huggingface.co/{name}, then pass token= or run "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name}: the hub has this repository, but no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such folder here, and no such repository on the hub (a private one needs token=)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "offline is set" if offline else f"the hub cannot be reached: {error.__cause__ or error}"
        raise FileNotFoundError(
            f"{name}: no such folder here, and no whole copy{version} in the hub's cache; {reason}"
        ) from error
    except errors.HfHubHTTPError as error:
        kind = PermissionError if error.response.status_code in (401, 403) else OSError
        raise kind(f"{name}: the hub refused{version}: {error}") from error
    return Path(folder)
