import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tandem.data.shards.catalog import Catalog, expand_shards, gather_catalog, open_catalog, write_catalog
from tandem.data.shards.indexing import build_index
from tests.data.range_server import serving
from tests.support import ROOT, write_tar

GROUPS = [[("b", "ant"), ("b", None), ("a", "ant")], [("a", None)], [("c", "bee"), ("b", "ant"), ("b", "ant")]]


@pytest.fixture
def shards(tmp_path, make_shard):
    """Three shards of samples with these domains and entities."""
    made = []
    for n, samples in enumerate(GROUPS):
        members = [
            (f"{i}.json", make_shard.json("a", "b", domain=domain, entity=entity))
            for i, (domain, entity) in enumerate(samples)
        ]
        made.append(make_shard(members, f"s-{n:04}.tar")[0])
    return made


def assert_same(one: Catalog, other: Catalog) -> None:
    for name in ("tokenizer_sha256", "domains", "digest", "n_shards", "n_samples", "n_entities"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("samples_K", "shard_bytes_K", "group_start_K1", "entity_samples_E"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name in ("domain", "entity", "samples", "base"):
        assert np.array_equal(getattr(one, f"group_{name}_X"), getattr(other, f"group_{name}_X")), name


def test_rows_count_domains_and_entities_over_the_shards(shards, tokenizer):
    catalog = open_catalog(shards, tokenizer.sha256)
    assert catalog.samples_K.tolist() == [3, 1, 3] and catalog.n_samples == 7
    assert catalog.shard_bytes_K.tolist() == [os.path.getsize(shard) for shard in shards]
    assert catalog.domains == ("a", "b", "c") and catalog.n_entities == 2
    assert catalog.group_start_K1.tolist() == [0, 3, 4, 6]
    assert catalog.group_domain_X.tolist() == [1, 1, 0, 0, 2, 1]
    assert catalog.group_entity_X.tolist() == [0, -1, 0, -1, 1, 0]
    assert catalog.group_samples_X.tolist() == [1, 1, 1, 1, 1, 2]
    assert catalog.group_base_X.tolist() == [0, 0, 1, 0, 0, 2]
    assert catalog.entity_samples_E.tolist() == [4, 1]
    types = [getattr(catalog, f"group_{name}_X").dtype for name in ("domain", "entity", "samples", "base")]
    assert types == [np.int32, np.int32, np.int64, np.int64] and catalog.group_start_K1.dtype == np.int64
    for k, shard in enumerate(shards):
        assert catalog.shard(k) == shard
        index, first = catalog.index(k), catalog.group_start_K1[k]
        assert [(group.domain, group.entity) for group in index.groups] == list(dict.fromkeys(GROUPS[k]))
        counts = np.bincount(index.samples["group"])
        assert catalog.group_samples_X[first : catalog.group_start_K1[k + 1]].tolist() == counts.tolist()


def test_a_stored_catalog_is_the_same_and_moves_with_its_shards(shards, tokenizer, tmp_path):
    catalog = open_catalog(shards, tokenizer.sha256)
    write_catalog(tmp_path / "all.catalog", catalog)
    stored = open_catalog([f"{tmp_path}/all.catalog"], tokenizer.sha256)
    assert_same(stored, catalog)
    assert [stored.shard(k) for k in range(3)] == shards
    assert stored.index(2).digest == catalog.index(2).digest
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    there = open_catalog([f"{moved}/all.catalog"], tokenizer.sha256)
    assert there.shard(0) == f"{moved}/s-0000.tar" and there.index(0).path == f"{moved}/s-0000.tar.index"
    # shards outside the catalog's folder are named in full, from wherever the command runs
    (tmp_path / "elsewhere").mkdir()
    write_catalog(tmp_path / "elsewhere" / "all.catalog", catalog)
    assert open_catalog([f"{tmp_path}/elsewhere/all.catalog"], tokenizer.sha256).shard(1) == shards[1]
    write_catalog(tmp_path / "again.catalog", stored)
    assert (tmp_path / "again.catalog").read_bytes() == (tmp_path / "all.catalog").read_bytes()


def test_the_digest_is_that_of_the_samples_and_not_of_their_place(shards, tokenizer, tmp_path, make_shard):
    digest = open_catalog(shards, tokenizer.sha256).digest
    assert 0 <= digest < 1 << 63
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-digest")
    there = [str(moved / Path(shard).name) for shard in shards]
    assert open_catalog(there, tokenizer.sha256).digest == digest
    assert open_catalog(there[::-1], tokenizer.sha256).digest != digest
    assert open_catalog(there[:2], tokenizer.sha256).digest != digest
    # the same size and counts, but another split into tokens and places
    make_shard([(f"{i}.json", make_shard.json("ab", "", domain=d, entity=e)) for i, (d, e) in enumerate(GROUPS[0])])
    size = os.path.getsize(there[0])
    write_tar(there[0], [(f"{i}.json", make_shard.json("a", "bc", domain="a")) for i in range(3)])
    build_index(there[0], tokenizer)
    assert os.path.getsize(there[0]) == size
    assert open_catalog(there, tokenizer.sha256).digest != digest


def test_a_catalog_that_does_not_fit_is_refused(shards, tokenizer, tmp_path, make_shard):
    path = tmp_path / "all.catalog"
    catalog = open_catalog(shards, tokenizer.sha256)
    write_catalog(path, catalog)
    good = path.read_bytes()
    with pytest.raises(ValueError, match="made with another tokenizer"):
        open_catalog([str(path)], "0" * 64)
    with pytest.raises(ValueError, match="made with another tokenizer"):
        open_catalog(shards, "0" * 64)
    with pytest.raises(ValueError, match="stands among 2 names; a source has one catalog, or shards"):
        open_catalog([str(path), shards[0]], tokenizer.sha256)
    with pytest.raises(ValueError, match="catalog nowhere.catalog does not exist"):
        open_catalog(["nowhere.catalog"], tokenizer.sha256)
    for content, sentence in {
        b"": "is not a catalog",
        good[:-64]: "is damaged",
        good + bytes(64): "is damaged",
        good.replace(b'"version": 2', b'"version": 7'): "has version 7",
        good.replace(b'"domains": ["a"', b'"domains": ["x"'): "has a damaged header",
        good[:60]: "has a damaged header",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"all.catalog {sentence}.*; write it again with python launch/index_sha"):
            open_catalog([str(path)], tokenizer.sha256)


def test_any_flipped_byte_of_a_catalog_is_noticed_before_its_shards_are_used(shards, tokenizer, tmp_path):
    path = tmp_path / "all.catalog"
    catalog = open_catalog(shards, tokenizer.sha256)
    write_catalog(path, catalog)
    good = path.read_bytes()
    noticed, flips = 0, np.random.default_rng(0).choice(len(good), 400, replace=False).tolist()
    for at in flips:
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            damaged = open_catalog([str(path)], tokenizer.sha256)
            for k in range(3):
                damaged.index(k)
        except ValueError:
            noticed += 1
        else:
            assert_same(damaged, catalog)  # padding
            assert good[at] == 0
    assert noticed > 250


def test_a_changed_index_and_an_index_older_than_its_shard_are_refused(shards, tokenizer, tmp_path, make_shard):
    write_catalog(tmp_path / "all.catalog", open_catalog(shards, tokenizer.sha256))
    stored = open_catalog([f"{tmp_path}/all.catalog"], tokenizer.sha256)
    make_shard([("a.json", make_shard.json("new", "text"))], "s-0001.tar")
    with pytest.raises(ValueError, match=r"s-0001.tar.index changed since it entered the catalog; write it again"):
        stored.index(1)
    later = os.stat(shards[0] + ".index").st_mtime_ns + 10**9
    os.utime(shards[0], ns=(later, later))
    with pytest.raises(ValueError, match="older than the shard"):
        stored.index(0)
    with pytest.raises(ValueError, match="older than the shard"):
        open_catalog(shards, tokenizer.sha256)
    assert stored.index(2).n_samples == 3
    os.remove(shards[2])
    with pytest.raises(ValueError, match="s-0002.tar does not exist"):
        stored.index(2)


def test_remote_shards_by_a_catalog(shards, tokenizer, tmp_path):
    indexes = tmp_path / "indexes"
    indexes.mkdir()
    with serving(tmp_path) as server:
        addresses = [f"{server.url}/{Path(shard).name}" for shard in shards]
        paths = [str(indexes / f"{n}.index") for n in range(3)]
        for address, path in zip(addresses, paths, strict=True):
            build_index(address, tokenizer, path)
        catalog = gather_catalog(addresses, tokenizer.sha256, paths)
        write_catalog(tmp_path / "remote.catalog", catalog)
        before = len(server.requests)
        stored = open_catalog([f"{tmp_path}/remote.catalog"], tokenizer.sha256)
        assert [stored.shard(k) for k in range(3)] == addresses and stored.index_path(1) == paths[1]
        assert stored.index(1).n_samples == 1 and len(server.requests) == before
    assert stored.digest == open_catalog(shards, tokenizer.sha256).digest  # those of local copies


def test_an_address_in_a_catalog_is_checked_like_any_other(shards, tokenizer, tmp_path):
    catalog = open_catalog(shards, tokenizer.sha256)
    raw = f"pipe:touch {tmp_path}/ran".encode()
    arrays = catalog._arrays | {"name": np.frombuffer(raw, np.uint8), "name_start": np.array([0, len(raw)])}
    forged = Catalog(
        {"tokenizer_sha256": tokenizer.sha256, "formats": ["turns"], "domains": ["a"], "digest": 1}, arrays
    )
    for act in (forged.shard, forged.index):
        with pytest.raises(ValueError, match="no path and no address"):
            act(0)
    assert not (tmp_path / "ran").exists()


SHARDS, SAMPLES, ROWS, ENTITIES = 100_000, 10_000, 4, 1000

OPEN = """
import pathlib, re, sys, time
import numpy, psutil
from tandem.data.shards.catalog import open_catalog
before = psutil.Process().memory_info().rss
begin = time.perf_counter()
catalog = open_catalog([sys.argv[1]], "0" * 64)
seconds = time.perf_counter() - begin
assert catalog.n_samples == 10**9 and catalog.n_shards == 100_000
names = [catalog.shard(k) for k in range(0, 100_000, 97)]
assert names[-1].endswith("part-099910.tar"), names[-1]
rows = slice(*catalog.group_start_K1[77_777:77_779])
assert catalog.group_samples_X[rows].tolist() == [2500] * 4
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
print(seconds, (psutil.Process().memory_info().rss - before) >> 20, peak_kib >> 10)
"""


def test_a_catalog_of_a_billion_samples_opens_at_once_in_little_memory(tmp_path):
    groups = SHARDS * ROWS
    entity_X = np.arange(groups) % ENTITIES
    names = "".join(f"/data/part-{k:06}.tar" for k in range(SHARDS)).encode()
    arrays = {
        "samples": np.full(SHARDS, SAMPLES),
        "shard_bytes": np.full(SHARDS, 1 << 30),
        "index_digest": np.arange(SHARDS).astype(np.uint64),
        "group_start": np.arange(SHARDS + 1) * ROWS,
        "name_start": np.arange(SHARDS + 1) * (len(names) // SHARDS),
        "index_start": np.zeros(SHARDS + 1, np.int64),
        "name": np.frombuffer(names, np.uint8),
        "index": np.zeros(0, np.uint8),
        "group_domain": np.arange(groups) % ROWS,
        "group_entity": entity_X,
        "group_samples": np.full(groups, SAMPLES // ROWS),
        "group_base": np.arange(groups) // ENTITIES * (SAMPLES // ROWS),
        "entity_samples": np.bincount(entity_X, minlength=ENTITIES) * (SAMPLES // ROWS),
    }
    header = {"tokenizer_sha256": "0" * 64, "formats": ["turns"], "domains": list("abcd"), "digest": 5}
    write_catalog(tmp_path / "billion.catalog", Catalog(header, arrays))
    command = [sys.executable, "-c", OPEN, f"{tmp_path}/billion.catalog"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, grown_mib, peak_mib = map(float, done.stdout.split())
    print(f"opened in {seconds:.3f} s, {grown_mib:.0f} MiB more, {peak_mib:.0f} MiB at most")
    assert seconds < 0.5
    assert grown_mib < 64 and peak_mib < 256


def test_shard_patterns(tmp_path):
    for n in range(3):
        (tmp_path / f"a-{n:04d}.tar").touch()
    names = [str(tmp_path / f"a-{n:04d}.tar") for n in range(3)]
    assert expand_shards([f"{tmp_path}/a-{{0000..0002}}.tar"]) == names
    assert expand_shards([f"{tmp_path}/a-*.tar"]) == names
    for bad, sentence in {
        f"{tmp_path}/a-{{0000..0003}}.tar": "a-0003.tar .* does not exist",
        f"{tmp_path}/b-*.tar": "matches no file",
        "pipe:cat a.tar": "no path and no address",
        "s3://bucket/a.tar": "is a URL; remote shards are named by a catalog",
        f"{tmp_path}/a-{{0000.tar": "unbalanced braces|does not exist",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            expand_shards([bad])
    with pytest.raises(ValueError, match="named twice"):
        expand_shards([names[0], names[0]])
    assert expand_shards(["s3://b/a-{0..2}.tar"], urls=True) == [f"s3://b/a-{n}.tar" for n in range(3)]
    with pytest.raises(ValueError, match="no path and no address"):
        expand_shards(["pipe:cat a.tar"], urls=True)
