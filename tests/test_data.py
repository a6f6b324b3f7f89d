"""Corpora: what is in them, that their sha256 is theirs, and what is said when one cannot be had."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from rnnq import data
from rnnq.errors import DataError

TEXT = b"the cat sat on the mat\r\n\xff\x00" * 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, no mirror, no proxy, nothing loaded under the name enwik8."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RNNQ_CACHE", str(folder))
    monkeypatch.delenv("RNNQ_ENWIK8_URL", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delitem(data._loaded, "enwik8", raising=False)
    return folder


# ------------------------------------------------------------------------------------------------- files


def test_a_file_is_read_as_it_is_with_the_sha256_of_its_bytes(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT)

    corpus = data.load(str(path))

    assert corpus.name == str(path)
    assert corpus.bytes.dtype == np.uint8
    assert corpus.bytes.tobytes() == TEXT
    assert corpus.sha256 == hashlib.sha256(TEXT).hexdigest()


def test_nobody_can_change_the_bytes_of_a_corpus(tmp_path):
    (tmp_path / "mine.txt").write_bytes(TEXT)
    corpus = data.load(str(tmp_path / "mine.txt"))

    with pytest.raises(ValueError, match="read-only"):
        corpus.bytes[0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        corpus.bytes.flags.writeable = True


def test_a_rewritten_file_does_not_change_a_corpus_that_is_in_use(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT)
    corpus = data.load(str(path))

    path.write_bytes(b"x" * len(TEXT))

    assert hashlib.sha256(corpus.bytes).hexdigest() == corpus.sha256 == hashlib.sha256(TEXT).hexdigest()


def test_a_file_is_read_once_and_again_when_it_has_changed(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT)
    first = data.load(str(path))
    assert data.load(str(path)) is first

    path.write_bytes(b"other text")
    second = data.load(str(path))

    assert second.bytes.tobytes() == b"other text"
    assert second.sha256 == hashlib.sha256(b"other text").hexdigest()
    assert second != first


def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"one")
    data.load(str(path))
    before = path.stat()

    other = tmp_path / "other.txt"
    other.write_bytes(b"two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and cp -p leave it
    other.replace(path)

    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert data.load(str(path)).bytes.tobytes() == b"two"


def test_a_relative_path_is_below_the_working_directory(tmp_path, monkeypatch):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.txt").write_text(folder)

    monkeypatch.chdir(tmp_path / "here")
    assert data.load("mine.txt").bytes.tobytes() == b"here"
    monkeypatch.chdir(tmp_path / "there")
    assert data.load("mine.txt").bytes.tobytes() == b"there"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.txt").write_bytes(TEXT)

    corpus = data.load("~/mine.txt")

    assert corpus.name == "~/mine.txt"
    assert corpus.bytes.size == len(TEXT)


def test_a_file_named_like_a_corpus_is_reached_with_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdlib").write_text("mine")

    assert data.load("./stdlib").bytes.tobytes() == b"mine"
    assert data.load("stdlib").bytes.size > 5_000_000


def test_a_missing_file_is_named_with_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(DataError) as caught:
        data.load("texts/mine.txt")

    assert caught.value.message == f"corpus 'texts/mine.txt': there is no file {tmp_path / 'texts' / 'mine.txt'}"
    assert caught.value.hint == "a corpus is stdlib, enwik8, or the path of a file that holds text"
    assert (caught.value.exit_code, caught.value.cause) == (2, "data")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("stdlb", "stdlib"),
        ("STDLIB", "stdlib"),
        ("enwiki8", "enwik8"),
        ("enwik9", "enwik8"),
        ("texts/enwik8", "enwik8"),
    ],
)
def test_a_misspelt_corpus_is_recognised(name, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(DataError) as caught:
        data.load(name)

    assert caught.value.hint.startswith(f"did you mean {meant}?")


def test_a_directory_an_empty_file_and_a_device_are_refused_by_name(tmp_path):
    (tmp_path / "empty.txt").touch()

    for path, what in [(tmp_path, "is a directory"), (tmp_path / "empty.txt", "is empty"), (os.devnull, "not a plain")]:
        with pytest.raises(DataError, match=what) as caught:
            data.load(str(path))
        assert str(path) in caught.value.message
        assert caught.value.hint == data.FILE_HINT


@pytest.mark.skipif(sys.platform == "win32", reason="needs a link that names itself")
def test_what_the_system_will_not_open_is_reported_in_its_words(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("text")

    for name in (str(tmp_path / "loop"), str(tmp_path / "file" / "below"), "a\0b", "~nobody-of-that-name/mine.txt"):
        with pytest.raises(DataError, match=r"cannot be (read|made a full path): (\w+|\[Errno \d+\]) "):
            data.load(name)


def test_a_file_that_is_closed_to_us_is_reported(tmp_path):
    (tmp_path / "mine.txt").write_bytes(TEXT)
    (tmp_path / "mine.txt").chmod(0)
    ours = os.geteuid()

    if ours == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(DataError, match="Permission denied"):
            data.load(str(tmp_path / "mine.txt"))
    finally:
        os.seteuid(ours)


def test_a_corpus_needs_its_own_size_of_memory_once(tmp_path):
    size = 20_000_000
    (tmp_path / "large.txt").write_bytes(bytes(size))
    data.load("stdlib")  # numpy and hashlib are loaded before the measurement

    tracemalloc.start()
    try:
        corpus = data.load(str(tmp_path / "large.txt"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert corpus.bytes.size == size
    assert peak < 1.1 * size


# ---------------------------------------------------------------------------------- the standard library


def test_the_standard_library_is_large_and_holds_no_tests():
    corpus = data.load("stdlib")
    text = corpus.bytes.tobytes()

    assert corpus.name == "stdlib"
    assert corpus.bytes.dtype == np.uint8
    assert corpus.bytes.ndim == 1
    assert corpus.bytes.size > 5_000_000
    assert corpus.sha256 == hashlib.sha256(text).hexdigest()
    library = Path(sysconfig.get_path("stdlib"))
    assert (library / "argparse.py").read_bytes() in text
    assert (library / "json" / "decoder.py").read_bytes() in text
    assert (library / "unittest" / "case.py").read_bytes() in text
    assert b"\nclass CoroutineTest(" not in text  # of test/test_coroutines.py


def test_the_standard_library_is_the_same_in_another_process_and_another_folder(tmp_path):
    script = "from rnnq import data; print(data.load('stdlib').sha256)"
    other = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert other.stdout.strip() == data.load("stdlib").sha256
    assert data.load("stdlib") is data.load("stdlib")
    assert data._stdlib() == data.load("stdlib")


def test_the_standard_library_is_its_sources_in_the_order_of_their_paths(tmp_path):
    kept = ["a/b.py", "a/config.py", "a.py", "b/__init__.py", "turtledemo/clock.py", "wide.py"]
    left_out = [
        *["test/x.py", "a/tests/x.py", "b/idle_test/x.py", "lib2to3/x.py", "idlelib/x.py", "site-packages/x.py"],
        *["dist-packages/x/y.py", "__pycache__/x.py", "config-3.11-x86_64/x.py", "_sysconfigdata__linux.py", "a/x.txt"],
    ]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"{name}\xff\r\n".encode("latin-1"))

    corpus = data._stdlib(tmp_path)

    assert corpus.bytes.tobytes() == b"".join(f"{name}\xff\r\n".encode("latin-1") for name in sorted(kept))


def test_a_python_without_its_source_is_told_so(tmp_path):
    with pytest.raises(DataError) as caught:
        data._stdlib(tmp_path / "python311.zip")

    assert str(tmp_path / "python311.zip") in caught.value.message
    assert "holds no .py files" in caught.value.message
    assert "corpus=path/to/file" in caught.value.hint


# --------------------------------------------------------------------------------------------- downloads


class Server(ThreadingHTTPServer):
    """Serves `files` on a port of this machine and counts what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.promised = 0  # bytes that the header announces and that never come
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + self.server.promised))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def zipped(content: bytes, name: str = "small") -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return held.getvalue()


def offer(server: Server, content: bytes = TEXT) -> data._Download:
    """Put a zip on the server; what a download of it is."""
    archive = zipped(content)
    server.files["/small.zip"] = archive
    digests = [hashlib.sha256(part).hexdigest() for part in (archive, content)]
    return data._Download(f"{server.url}/small.zip", digests[0], "small", digests[1])


def closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_download_is_verified_unpacked_and_kept(server, cache, capfd):
    download = offer(server)

    corpus = data._downloaded("small", download)

    assert corpus.bytes.tobytes() == TEXT
    assert corpus.sha256 == download.file_sha256
    assert (cache / "small").read_bytes() == TEXT
    assert names(cache) == ["small", "small.zip"]
    assert capfd.readouterr() == ("", "")  # no log lines, and no bar where there is no terminal

    data._downloaded("small", download)
    assert server.asked == ["/small.zip"]


def test_a_download_needs_its_own_size_of_memory_once(server):
    download = offer(server, bytes(20_000_000))
    with pytest.raises(DataError):  # pooch, requests and numpy are loaded before the measurement
        data._downloaded("none", data._Download(f"{server.url}/none.zip", "0" * 64, "none", "0" * 64))

    tracemalloc.start()
    try:
        corpus = data._downloaded("small", download)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert corpus.bytes.size == 20_000_000
    assert peak < 1.2 * 20_000_000


def test_a_zip_that_is_already_there_is_unpacked_without_a_network(server, cache):
    download = offer(server)
    cache.mkdir()
    (cache / "small.zip").write_bytes(server.files["/small.zip"])

    assert data._downloaded("small", download).bytes.tobytes() == TEXT
    assert server.asked == []


def test_several_processes_may_download_at_once(server, cache):
    download = offer(server, bytes(20_000_000))  # long enough to unpack for them to meet
    script = f"from rnnq.data import _Download, _downloaded; print(_downloaded('small', {download!r}).sha256)"

    started = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]

    assert [process.communicate()[0].strip() for process in started] == [download.file_sha256] * 3
    assert names(cache) == ["small", "small.zip"]


def test_a_zip_with_a_wrong_checksum_is_refused_and_not_kept(server, cache, monkeypatch):
    server.files["/enwik8.zip"] = zipped(b"something else", "enwik8")
    monkeypatch.setenv("RNNQ_ENWIK8_URL", f"{server.url}/enwik8.zip")

    with pytest.raises(DataError) as caught:
        data.load("enwik8")

    assert f"could not be downloaded from {server.url}/enwik8.zip: " in caught.value.message
    assert data._ENWIK8.zip_sha256 in caught.value.message
    assert hashlib.sha256(server.files["/enwik8.zip"]).hexdigest() in caught.value.message
    assert names(cache) == []


def test_a_mirror_without_the_file_is_named_with_its_answer(server, cache, monkeypatch):
    monkeypatch.setenv("RNNQ_ENWIK8_URL", f"{server.url}/gone/enwik8.zip")

    with pytest.raises(DataError, match=r"404 .*Not Found.* /?.*gone/enwik8\.zip"):
        data.load("enwik8")
    assert names(cache) == []


def test_without_a_network_the_error_says_what_was_tried_and_what_would_do(cache, monkeypatch):
    url = f"http://127.0.0.1:{closed_port()}/enwik8.zip"
    monkeypatch.setenv("RNNQ_ENWIK8_URL", url)

    with pytest.raises(DataError) as caught:
        data.load("enwik8")

    assert caught.value.message.startswith(f"corpus 'enwik8': there is no file {cache / 'enwik8'}, and it could not be")
    assert f" from {url}: " in caught.value.message
    assert "refused" in caught.value.message
    assert " object at 0x" not in caught.value.message
    assert (
        f"put the unpacked file at {cache / 'enwik8'} (its sha256 is {data._ENWIK8.file_sha256})" in caught.value.hint
    )
    assert "RNNQ_ENWIK8_URL" in caught.value.hint
    assert "corpus=path/to/file" in caught.value.hint


def test_a_mirror_that_is_no_web_address_is_refused(monkeypatch):
    monkeypatch.setenv("RNNQ_ENWIK8_URL", "mirror/enwik8.zip")

    with pytest.raises(DataError, match=r"from mirror/enwik8\.zip: "):
        data.load("enwik8")


def test_a_server_that_says_nothing_is_given_up(cache, monkeypatch):
    monkeypatch.setattr(data, "READ_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RNNQ_ENWIK8_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/enwik8.zip")

        with pytest.raises(DataError, match="timed out"):
            data.load("enwik8")
    assert names(cache) == []


def test_a_download_that_breaks_off_leaves_nothing_behind(server, cache):
    download = offer(server)
    server.promised = 1000

    with pytest.raises(DataError, match="could not be downloaded"):
        data._downloaded("small", download)
    assert names(cache) == []


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, server, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RNNQ_CACHE", str(tmp_path / "file" / "cache"))

    with pytest.raises(DataError) as caught:
        data._downloaded("small", offer(server))
    assert str(tmp_path / "file" / "cache" / "small") in caught.value.message


def test_a_failed_download_is_not_tried_for_every_config(server, cache, monkeypatch):
    download = offer(server)
    archive = server.files.pop("/small.zip")

    for _ in range(3):
        with pytest.raises(DataError, match="404"):
            data._downloaded("small", download)
    assert server.asked == ["/small.zip"]

    cache.mkdir(exist_ok=True)
    (cache / "small").write_bytes(TEXT)  # put there by hand: no need to wait
    assert data._downloaded("small", download).bytes.tobytes() == TEXT

    (cache / "small").unlink()
    server.files["/small.zip"] = archive
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + data.RETRY_S)
    assert data._downloaded("small", download).bytes.tobytes() == TEXT


def test_a_file_put_into_the_cache_by_hand_is_accepted_when_it_is_the_right_one(server, cache):
    download = offer(server)
    cache.mkdir()
    (cache / "small").write_bytes(TEXT)

    assert data._downloaded("small", download).bytes.tobytes() == TEXT
    assert server.asked == []


def test_a_wrong_file_in_the_cache_is_refused_and_stays(cache):
    cache.mkdir()
    (cache / "enwik8").write_bytes(TEXT)

    with pytest.raises(DataError) as caught:
        data.load("enwik8")

    assert f"{cache / 'enwik8'} holds other text: 26,000 bytes with sha256" in caught.value.message
    assert hashlib.sha256(TEXT).hexdigest() in caught.value.message
    assert data._ENWIK8.file_sha256 in caught.value.message
    assert f"corpus={cache / 'enwik8'}" in caught.value.hint
    assert (cache / "enwik8").read_bytes() == TEXT


def test_the_cache_folder_is_the_chosen_one_or_the_systems(tmp_path, monkeypatch):
    assert data.cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("RNNQ_CACHE", "~/texts")
    assert data.cache_folder() == tmp_path / "texts"
    monkeypatch.setenv("RNNQ_CACHE", "")
    assert data.cache_folder().is_absolute()
    assert "rnnq" in data.cache_folder().parts


def read_terminal(terminal: int, shown: list[bytes]) -> None:
    """Read all that is shown: a terminal that nobody reads stops its writer after a few kB."""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(terminal, 65536):
            shown.append(part)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_how_far_the_download_is(server, monkeypatch):
    import pty

    ours, theirs = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=read_terminal, args=(ours, shown))
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        data._downloaded("small", offer(server, os.urandom(300_000)))
    reader.join()
    os.close(ours)

    assert b"small.zip" in b"".join(shown)
    assert b"kB" in b"".join(shown)


def test_the_module_is_imported_without_what_it_only_sometimes_needs(tmp_path):
    script = (
        "import sys, rnnq.data; print([n for n in ('numpy', 'pooch', 'rich', 'requests', 'torch') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.network
def test_enwik8_is_downloaded_from_its_home(cache):
    corpus = data.load("enwik8")

    assert corpus.bytes.size == 100_000_000
    assert corpus.sha256 == data._ENWIK8.file_sha256
    assert corpus.bytes[:10].tobytes() == b"<mediawiki"
    assert names(cache) == ["enwik8", "enwik8.zip"]
