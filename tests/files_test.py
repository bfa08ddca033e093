import errno
import os
from pathlib import Path
from unittest import mock

import pytest

from pconv_jax import RunError, UserError, _files
from pconv_jax._files import FileContentError


def test_a_file_is_replaced_and_the_folders_above_it_are_made(tmp_path):
    path = tmp_path / "folder" / f"{'a' * 246}.txt"  # Of 250 bytes.
    for data in (b"old", b"new"):
        _files.write_bytes(path, data)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    _files.write_bytes(path, b"old")
    with pytest.raises(OSError, match="disk full"), _files.atomic_path(path) as partial:
        partial.write_bytes(b"half of it")
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    with pytest.raises(RunError, match=f"cannot write {tmp_path}: .*[Dd]irectory"):
        _files.write_bytes(tmp_path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_cannot_work_is_one_sentence_with_the_path(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"not a folder")
    path = tmp_path / "file" / "a.txt"
    with pytest.raises(RunError, match=f"cannot write {path}: .* is not a folder"):
        _files.write_bytes(path, b"new")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=full))
    path = tmp_path / "a.txt"
    with pytest.raises(RunError, match=f"cannot write {path}: No space left on device"):
        _files.write_bytes(path, b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_file_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def record(descriptor):
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    _files.write_bytes(tmp_path / "a.txt", b"new")
    partial, folder = synced
    assert partial.endswith(".partial")
    assert folder == str(tmp_path)
    synced.clear()
    _files.write_bytes(tmp_path / "b" / "c" / "a.txt", b"new")
    assert synced[:2] == [str(tmp_path / "b"), str(tmp_path)]
    assert synced[-1] == str(tmp_path / "b" / "c")


def test_all_files_of_an_ordinary_tree_are_visible(tmp_path):
    names = {"a.txt", "b/c", "b/d.png/e", "f"}
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = list(_files.iter_files(str(tmp_path)))
    assert sorted(found) == sorted(tmp_path / name for name in names)
    assert not list(_files.iter_files(tmp_path / "missing"))


def test_a_link_stays_and_a_file_keeps_its_permissions(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.txt", tmp_path / "link"
    for state in ("dangling", "leading to a file"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        _files.write_bytes(link, state.encode())
        assert link.is_symlink() and target.read_bytes() == state.encode()
        target.chmod(0o640)
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.listdir(target.parent) == ["a.txt"]


def test_a_leading_tilde_of_a_text_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _files.as_path("~/a") == tmp_path / "a"
    for path in ("a/~", "~nobody-of-this-name/a", "./~/a"):
        assert _files.as_path(path) == Path(path)
    assert _files.as_path(Path("~/a")) == Path("~/a")


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file, but a pipe"):
        _files.read_regular(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file, but a pipe"):
        _files.read_regular(tmp_path / "link")


def test_what_a_kill_has_left_is_removed(tmp_path):
    killed = [f".{n * 8}.partial" for n in ("0123", "cdef")]
    names = ["a.txt", ".notes.partial", killed[0], f"b/{killed[1]}", "b/c.partial"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    _files.remove_partials(tmp_path)
    assert [n for n in names if not (tmp_path / n).exists()] == [killed[0]]
    _files.remove_partials(tmp_path, below=True)
    left = {str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()}
    assert left == {"a.txt", ".notes.partial", "b/c.partial"}


def test_pipes_and_links_that_go_round_are_not_replaced(tmp_path):
    pipe, link, first = (tmp_path / name for name in ("pipe", "link", "first"))
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    first.symlink_to(tmp_path / "second")
    (tmp_path / "second").symlink_to(first)
    for path, reason in [(pipe, "a pipe"), (link, "a pipe"), (first, "symbolic links")]:
        with pytest.raises(RunError, match=f"cannot write {path}: .*{reason}"):
            _files.write_bytes(path, b"new")
    assert pipe.is_fifo() and link.is_symlink() and first.is_symlink()
    assert len(list(tmp_path.iterdir())) == 4


def test_errors_of_a_library_become_one_kind_and_say_what_is_wrong():
    for error, reason in [
        (KeyError("a"), "'a'"),
        (ValueError("it is cut."), "it is cut"),
        (ValueError(), "ValueError"),
        (MemoryError(), "there is not enough memory"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ]:
        with pytest.raises(FileContentError, match=f"^{reason}$") as raised:
            with _files.content_errors(LookupError, ValueError, MemoryError, OSError):
                raise error
        assert raised.value.__cause__ is error
    with pytest.raises(TypeError, match="a bug"):
        with _files.content_errors(ValueError):
            raise TypeError("a bug")


@pytest.mark.parametrize(
    ("system", "variables", "folder"),
    [
        ("linux", {}, "~/.cache"),
        ("linux", {"XDG_CACHE_HOME": "/fast/cache"}, "/fast/cache"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache"),
        ("darwin", {"XDG_CACHE_HOME": "/fast/cache"}, "~/Library/Caches"),
        ("win32", {}, "~/AppData/Local"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
    ],
)
def test_where_each_system_has_caches(system, variables, folder):
    assert _files._cache_home(system, variables) == Path(folder).expanduser()


def test_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PCONV_CACHE", "")
    monkeypatch.setattr(_files, "_cache_home", lambda *_: tmp_path)
    assert _files.cache_folder() == tmp_path / "pconv_jax"
    monkeypatch.setattr(_files, "_cache_home", mock.Mock(side_effect=RuntimeError))
    with pytest.raises(UserError, match="PCONV_CACHE must name a folder"):
        _files.cache_folder()
    monkeypatch.setenv("PCONV_CACHE", str(tmp_path / "cache"))
    assert _files.cache_folder() == tmp_path / "cache"
