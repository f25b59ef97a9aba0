from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from nabla.contexts import ContextBook, resolve
from nabla.errors import BadConfig, NoServer
from nabla.remembered import Folders, project_name

pytestmark = pytest.mark.unit


@pytest.fixture
def book(tmp_path: Path) -> ContextBook:
    return ContextBook(tmp_path / "config.json")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with its environment; answers the environment's prefix."""
    (tmp_path / "checkout" / ".nabla").mkdir(parents=True)
    (tmp_path / "checkout" / ".nabla" / "context.json").write_text('{"url": "http://installed:1", "token": "i"}')
    return tmp_path / "checkout" / ".venv"


def test_the_order_is_option_environment_job_installation_current(book: ContextBook, checkout: Path) -> None:
    book.save("other", "http://other:1", "o")
    book.save("saved", "http://saved:1/", "s")
    env = {"NABLA_URL": "http://env:1", "NABLA_API_URL": "http://job:1/api/v1", "NABLA_TOKEN": "t"}

    def url(name: str | None, env: dict[str, str], prefix: Path | str) -> str:
        return resolve(name, env, str(prefix), book.path).url

    assert url("other", env, checkout) == "http://other:1"
    assert url(None, env, checkout) == "http://env:1"
    del env["NABLA_URL"]
    assert url(None, env, checkout) == "http://job:1"
    assert url(None, {}, checkout) == "http://installed:1"
    assert url(None, {}, "/usr") == "http://saved:1"


def test_two_installations_side_by_side_do_not_meet(tmp_path: Path, checkout: Path, book: ContextBook) -> None:
    twin = tmp_path / "twin"
    (twin / ".nabla").mkdir(parents=True)
    (twin / ".nabla" / "context.json").write_text('{"url": "http://twin:2", "token": "2"}')
    assert resolve(None, {}, str(twin / ".venv"), book.path).url == "http://twin:2"
    assert resolve(None, {}, str(checkout), book.path).url == "http://installed:1"
    home = {"NABLA_HOME": str(twin / ".nabla")}
    assert resolve(None, home, str(checkout), book.path).url == "http://twin:2"


def test_without_any_the_error_says_what_to_do(book: ContextBook) -> None:
    with pytest.raises(NoServer) as caught:
        resolve(None, {}, "/usr", book.path)
    assert "nabla up" in caught.value.remedy
    assert "nabla login" in caught.value.remedy


def test_an_url_without_a_token_is_not_silently_passed_over(book: ContextBook) -> None:
    book.save("saved", "http://saved:1", "s")
    with pytest.raises(NoServer, match="NABLA_TOKEN is not"):
        resolve(None, {"NABLA_URL": "http://env:1"}, "/usr", book.path)


def test_an_unknown_context_is_named_beside_the_known_ones(book: ContextBook) -> None:
    book.save("saved", "http://saved:1", "s")
    with pytest.raises(NoServer, match="'x'; known: saved"):
        resolve("x", {}, "/usr", book.path)


def test_contexts_are_used_and_deleted(book: ContextBook) -> None:
    book.save("a", "http://a:1", "1")
    book.save("b", "http://b:1", "2")
    assert book.current_name() == "b"
    book.use("a")
    book.delete("b")
    assert (book.current_name(), list(book.all())) == ("a", ["a"])
    book.delete("a")
    assert book.current() is None


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps rights in another way")
def test_only_its_owner_may_read_the_file(book: ContextBook) -> None:
    book.save("a", "http://a:1", "1")
    assert stat.S_IMODE(book.path.stat().st_mode) == 0o600
    assert [path.name for path in book.path.parent.iterdir()] == ["config.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"contexts": {"a": 1}}'])
def test_a_damaged_file_is_named(book: ContextBook, text: str) -> None:
    book.path.write_text(text)
    with pytest.raises(BadConfig, match=r"config\.json"):
        resolve(None, {}, "/usr", book.path)


def test_a_damaged_installation_file_is_named(checkout: Path, book: ContextBook) -> None:
    (checkout.parent / ".nabla" / "context.json").write_text(json.dumps({"url": 1}))
    with pytest.raises(BadConfig, match="nabla"):
        resolve(None, {}, str(checkout), book.path)


def test_tokens_do_not_show(book: ContextBook) -> None:
    book.save("a", "http://a:1", "s3cret")
    assert "s3cret" not in repr(book.all())


def test_a_folder_remembers_its_project_by_server(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "folders.json")
    folders.remember("http://a", Path("/work/x"), "pj1")
    folders.remember("http://b", Path("/work/x"), "pj2")
    folders.remember("http://a", Path("/work/y"), "pj3")
    assert [folders.project(url, Path("/work/x")) for url in ("http://a", "http://b", "http://c")] == ["pj1", "pj2", ""]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("digits", "digits"), ("My Project (2)", "my-project-2"), ("été", "t"), ("...", "default"), ("a" * 99, "a" * 60)],
)
def test_a_folder_gives_its_name_to_the_project(folder: str, name: str) -> None:
    assert project_name(Path("/x") / folder) == name
