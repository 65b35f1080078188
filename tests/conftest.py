"""What every test starts from: one thread, so that a small model does not wait for its own pool, and a fixed seed.

And what several files of server and page tests share; the servers' libraries are imported where they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gemwright.ops import cpu

if TYPE_CHECKING:
    from fastapi.testclient import TestClient
    from page_fixtures import Desk
    from playwright.sync_api import Browser, BrowserContext, Page

    from gemwright.lm import LM

if not torch.cuda.is_available():  # Triton asks when a kernel is defined; its interpreter runs them on numpy
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """A trainer keeps its process's memory, which here is that of all tests: 8 GB for nothing."""
    pytest.MonkeyPatch().setattr(cpu, "keep_memory", lambda: False)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    """A tiny chat model; its context is the test file's CONTEXT, where it has one."""
    import serve_fixtures

    context = getattr(request.module, "CONTEXT", serve_fixtures.CONTEXT)
    return serve_fixtures.tiny(tmp_path_factory.mktemp("serve") / "model", max_position_embeddings=context)


@pytest.fixture(scope="module")
def http(lm: LM) -> Iterator[TestClient]:
    """A client of the server over it."""
    import serve_fixtures

    with serve_fixtures.client(serve_fixtures.application(lm)) as made:
        yield made


@pytest.fixture(scope="module")
def api(http: TestClient) -> Any:
    """OpenAI's client of the same server."""
    import openai

    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)


# --- the chat page ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    import page_fixtures

    with page_fixtures.launched() as made:
        yield made


@pytest.fixture(scope="module")
def desk_and_url() -> Iterator[tuple[Desk, str]]:
    import page_fixtures

    desk = page_fixtures.Desk()
    with page_fixtures.served(desk) as url:
        yield desk, url


@pytest.fixture
def desk(desk_and_url: tuple[Desk, str]) -> Desk:
    """The desk that answers the page, with nothing to say yet."""
    desk_and_url[0].reset()
    return desk_and_url[0]


@pytest.fixture
def desk_url(desk_and_url: tuple[Desk, str], desk: Desk) -> str:
    return desk_and_url[1]


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    import page_fixtures

    with page_fixtures.profile(browser) as made:
        yield made


@pytest.fixture
def page(context: BrowserContext, desk_url: str) -> Page:
    """The page over the desk."""
    import page_fixtures

    return page_fixtures.opened(context, desk_url)
