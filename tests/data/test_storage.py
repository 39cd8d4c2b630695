import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tandem.data.shards import storage
from tandem.data.shards.storage import RangeFiles, Section, base_name, check_path, is_url, open_range, shown
from tests.data.range_server import serving

ROOT = Path(__file__).resolve().parents[2]
BYTES = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(BYTES)
    return tmp_path


@pytest.mark.parametrize("remote", [False, True])
def test_ranges_are_exactly_the_bytes_asked_for(folder, remote):
    with serving(folder) as server, open_range(f"{server.url if remote else folder}/a.bin") as file:
        assert file.size == len(BYTES)
        for offset, size in ((0, 0), (0, 1), (5, 77), (99_999, 1), (0, 100_000), (100_000, 0)):
            assert file.read(offset, size) == BYTES[offset : offset + size]
        for offset, size in ((-1, 5), (5, -1), (99_999, 2), (0, 1 << 60)):
            with pytest.raises(OSError, match="a.bin has 100000 bytes; asked for bytes"):
                file.read(offset, size)
        with ThreadPoolExecutor(8) as pool:
            places = np.random.default_rng(1).integers(0, 90_000, 200).tolist()
            found = list(pool.map(lambda offset: file.read(offset, 1000), places))
        assert found == [BYTES[offset : offset + 1000] for offset in places]
    if remote:
        sizes = [sent for method, _, sent in server.requests if method == "GET"]
        assert sorted(sizes)[-3:] == [1000, 1000, 100_000]  # nothing was fetched beyond what was asked for


def test_a_file_that_shrinks_while_open_is_an_error(folder):
    with open_range(folder / "a.bin") as file:
        os.truncate(folder / "a.bin", 50)
        with pytest.raises(OSError, match=r"a.bin ends at byte 50; it had 100000 bytes when opened"):
            file.read(0, 100)


def test_what_is_no_path_and_no_known_address_is_refused(tmp_path):
    marker = tmp_path / "ran"
    refused = [f"pipe:touch {marker}", "file:///etc/passwd", "ftp://host/a", "data:,x", "reference://x", "s3:bucket/a"]
    for path in refused:
        with pytest.raises(ValueError, match="no path and no address"):
            open_range(path)
    with pytest.raises(ValueError, match="chains file systems"):
        open_range("https://host/a.zip::file:///etc/passwd")
    assert not marker.exists()
    check_path("/data/a::b.tar"), check_path("a-0000.tar"), check_path("S3://bucket/a.tar")
    assert is_url("s3://b/a") and not is_url("/a/b:c") and not is_url("./a:b")
    with pytest.raises(OSError):
        open_range(tmp_path / "missing")


def test_secrets_of_an_address_are_not_shown(folder):
    address = "https://user:word@host:99/b/a.tar?sig=secret"
    assert shown(address) == "https://host:99/b/a.tar" and base_name(address) == "a.tar"
    with serving(folder) as server, pytest.raises(OSError, match="missing.tar cannot be read") as caught:
        open_range(f"{server.url}/missing.tar?sig=secret")
    assert "secret" not in str(caught.value)


def test_a_passing_failure_is_tried_again_and_a_lasting_one_told(folder, monkeypatch):
    monkeypatch.setattr(storage, "_PAUSE_S", 0.001)
    with serving(folder) as server:
        with open_range(f"{server.url}/a.bin") as file:
            server.failures = storage.ATTEMPTS - 1
            assert file.read(10, 20) == BYTES[10:30]
            server.failures = 10**9
            with pytest.raises(OSError, match="a.bin cannot be read after 4 attempts: .*503"):
                file.read(10, 20)
        server.failures = 0
        (folder / "a.bin").unlink()
        with pytest.raises(OSError, match="a.bin cannot be read: FileNotFoundError"):
            file.read(0, 10)


def test_a_server_without_ranges_is_refused(folder):
    with serving(folder, ranges=False) as server, pytest.raises(OSError, match="serves no ranges"):
        open_range(f"{server.url}/a.bin")
    assert sum(sent for _, _, sent in server.requests) == 0


def test_any_file_system_of_fsspec_will_do(monkeypatch):
    """One whose cat_file takes a version before the range, as that of s3fs does, and whose info has other names."""

    class Versioned(MemoryFileSystem):
        protocol = "gs"
        store: ClassVar[dict] = {}

        def cat_file(self, path, version_id=None, start=None, end=None):
            assert version_id is None
            return super().cat_file(path, start, end)

        def info(self, path, **options):
            return super().info(path, **options) | {"LastModified": 7}

    fsspec.register_implementation("gs", Versioned, clobber=True)  # for this process; nothing else reads from gs
    Versioned().pipe_file("gs://bucket/a.bin", BYTES)
    with open_range("gs://bucket/a.bin") as file:
        assert (file.size, file.stamp) == (len(BYTES), "7") and file.read(7, 99) == BYTES[7:106]
    with pytest.raises(OSError, match="gs://bucket/b.bin cannot be read: FileNotFoundError"):
        open_range("gs://bucket/b.bin")
    monkeypatch.setattr(storage, "_PAUSE_S", 0.001)
    monkeypatch.setattr(Versioned, "cat_file", lambda self, path, start, end: BYTES)
    with open_range("gs://bucket/a.bin") as file, pytest.raises(OSError, match="sent 100000 bytes where 99 were"):
        file.read(7, 99)


def test_open_files_are_bounded_and_shared_by_threads(tmp_path):
    for n in range(20):
        (tmp_path / str(n)).write_bytes(bytes([n]) * 100)
    files = RangeFiles(most=4)
    before = len(os.listdir("/proc/self/fd"))

    def read(n: int) -> bool:
        return files.read(str(tmp_path / str(n % 20)), n % 50, 50) == bytes([n % 20]) * 50

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, np.random.default_rng(0).integers(0, 10**6, 2000).tolist()))
    assert len(files) == 4 and len(os.listdir("/proc/self/fd")) <= before + 4
    kept = files.open(str(tmp_path / "7"))
    files.close()
    assert kept.read(0, 1) == b"\7"  # whoever holds a file goes on
    kept.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_failed_is_opened_again(folder):
    files, path = RangeFiles(), str(folder / "a.bin")
    assert files.read(path, 0, 10) == BYTES[:10]
    os.truncate(path, 0)
    with pytest.raises(OSError):
        files.read(path, 0, 10)
    Path(path).write_bytes(BYTES)
    assert files.read(path, 0, 10) == BYTES[:10]


def test_a_section_is_a_file_of_its_own(folder):
    with open_range(folder / "a.bin") as file:
        section = Section(file, 1000, 500)
        assert section.read(10) == BYTES[1000:1010] and section.bytes_read == 10
        section.seek(-5, io.SEEK_END)
        assert section.read() == BYTES[1495:1500] and section.read(10) == b"" and section.tell() == 500
        assert section.seek(-10) == 0 and section.seek(9999) == 9999 and section.read(1) == b""
        assert io.BufferedReader(Section(file, 0, file.size)).read() == BYTES


def test_local_reading_loads_no_network_library():
    code = "import sys, data.shards.catalog; from tandem.data.shards.storage import open_range; "
    code += "open_range('pyproject.toml').read(0, 9); "
    code += "assert not {'fsspec', 'aiohttp', 'av'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
