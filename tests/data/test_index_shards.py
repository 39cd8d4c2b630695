import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tandem.data.shards.catalog import open_catalog
from tandem.data.shards.index import load_index
from tandem.launch.index_shards import main
from tests.data.range_server import serving
from tests.support import ROOT, write_tar


@pytest.fixture
def shards(tmp_path, make_shard):
    """Two shards, each with one good and one bad sample, without indexes."""
    made = []
    for n in range(2):
        members = [("a.json", make_shard.json("a" * n, "b")), ("b.json", b"{")]
        made.append(write_tar(tmp_path / f"t-{n:04}.tar", members))
    return made


def test_shards_are_indexed_in_parallel_and_reported(shards, tokenizer, tmp_path):
    pattern = str(tmp_path / "t-{0000..0001}.tar")
    command = [sys.executable, "launch/index_shards.py", pattern, "--tokenizer", tokenizer.path, "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "skipped 1: bad json (first: sample b" in done.stdout
    assert done.stdout.endswith("2 shards, 2 samples, 2 skipped\n")
    parallel = [Path(shard + ".index").read_bytes() for shard in shards]
    assert main([*shards, "--tokenizer", tokenizer.path, "--workers", "1", "--force"]) == 0
    assert [Path(shard + ".index").read_bytes() for shard in shards] == parallel
    assert not list(tmp_path.glob("*.tmp"))


def test_only_what_changed_is_indexed_again(shards, tokenizer, capsys, make_shard):
    command = [*shards, "--tokenizer", tokenizer.path, "--workers", "1"]
    assert main(command) == 0
    first = [os.stat(shard + ".index").st_mtime_ns for shard in shards]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("2 shards, 2 samples, 2 skipped (2 shards were indexed before)\n")
    assert [os.stat(shard + ".index").st_mtime_ns for shard in shards] == first
    make_shard([("a.json", make_shard.json("changed", "b"))], "t-0001.tar")
    os.remove(shards[1] + ".index")
    Path(shards[0] + ".index").write_bytes(b"half")
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("2 shards, 2 samples, 1 skipped\n")
    before = os.stat(shards[0] + ".index").st_ino
    assert main([*command, "--force"]) == 0
    assert os.stat(shards[0] + ".index").st_ino != before and "before" not in capsys.readouterr().out


def test_an_index_folder_and_a_catalog(shards, tokenizer, tmp_path, capsys):
    folder, catalog = tmp_path / "deep" / "indexes", str(tmp_path / "all.catalog")
    assert main([*shards, "--tokenizer", tokenizer.path, "--index-dir", str(folder), "--catalog", catalog]) == 0
    assert "all.catalog: the catalog of 2 shards" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["t-0000.tar.index", "t-0001.tar.index"]
    assert not os.path.exists(shards[0] + ".index")
    stored = open_catalog([catalog], tokenizer.sha256)
    assert [stored.shard(k) for k in range(2)] == shards and stored.index(1).path == str(folder / "t-0001.tar.index")


def test_remote_shards(shards, tokenizer, tmp_path, capsys):
    folder, catalog = str(tmp_path / "indexes"), str(tmp_path / "all.catalog")
    with serving(tmp_path) as server:
        command = [f"{server.url}/t-{{0000..0001}}.tar", "--tokenizer", tokenizer.path, "--workers", "1"]
        with pytest.raises(SystemExit):
            main(command)
        assert "is remote: --index-dir and --catalog" in capsys.readouterr().err
        command += ["--index-dir", folder, "--catalog", catalog]
        assert main(command) == 0 and "2 shards, 2 samples, 2 skipped" in capsys.readouterr().out
        fetched = sum(sent for _, _, sent in server.requests)
        assert main(command) == 0 and "2 shards were indexed before" in capsys.readouterr().out
        assert sum(sent for _, _, sent in server.requests) == fetched
    assert open_catalog([catalog], tokenizer.sha256).index(0).n_samples == 1


def test_a_shard_that_cannot_be_indexed_does_not_stop_the_others(shards, tokenizer, tmp_path, capsys, make_shard):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"x" * 2000)
    good = make_shard.json("a", "b")
    write_tar(Path(shards[1]), [("z.json", good), ("a.json", good), ("b.json", good)])
    with tarfile.open(shards[1]) as tar:
        cut = tar.getmember("b.json").offset
    os.truncate(shards[1], cut)
    catalog = str(tmp_path / "all.catalog")
    with pytest.raises(SystemExit) as exit:
        main([str(bad), *shards, "--tokenizer", tokenizer.path, "--workers", "1", "--catalog", catalog])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and not os.path.exists(catalog)
    assert captured.err.startswith("error: 1 of 3 shards could not be indexed, the first: ")
    assert f"not indexed: {bad} is not an uncompressed tar" in captured.out
    assert f"truncated: the file ends at byte {cut}" in captured.out
    assert load_index(shards[0], tokenizer.sha256).n_samples == 1
    assert main([*shards, "--tokenizer", tokenizer.path, "--workers", "1", "--catalog", catalog]) == 0
    assert f"truncated: the file ends at byte {cut}" in capsys.readouterr().out  # told again, though nothing was done


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["missing.tar"], "error: shard missing.tar"),
        (["pipe:touch {tmp}/ran", "--index-dir", "{tmp}", "--catalog", "{tmp}/x.catalog"], "no path and no address"),
        (["{shard}", "--workers", "0"], "--workers is 0"),
        (["{shard}", "--catalog", "{tmp}/x.index"], "must end in .catalog"),
        (["{shard}", "{tmp}/twin/t-0000.tar", "--index-dir", "{tmp}/i"], "would hold one index for both"),
        (["{shard}", "--tokenizer", "{tmp}/none.json"], "none.json cannot be read"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(shards, tokenizer, tmp_path, capsys, arguments, sentence):
    (tmp_path / "twin").mkdir()
    write_tar(tmp_path / "twin" / "t-0000.tar", [])
    places = {"tmp": tmp_path, "shard": shards[0]}
    with pytest.raises(SystemExit) as exit:
        main(["--tokenizer", tokenizer.path, *(argument.format(**places) for argument in arguments)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("*.index"))


def test_an_interrupted_run_leaves_whole_indexes_and_goes_on(tokenizer, tmp_path, make_shard):
    members = [(f"{i}.json", make_shard.json("a", "b")) for i in range(1500)]
    shards = [write_tar(tmp_path / f"{n:02}.tar", members) for n in range(16)]  # more than are done before the signal
    command = [sys.executable, "launch/index_shards.py", *shards, "--tokenizer", tokenizer.path, "--workers", "2"]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job inherits it ignored
    )
    first = running.stdout.readline()  # one shard is done
    os.killpg(running.pid, signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert b"1500 samples" in first and running.returncode == 130 and error.endswith(b"run it again to go on\n")
    assert b"waiting for the shards at hand" in error and b"Traceback" not in error
    whole = list(tmp_path.glob("*.index"))
    assert len(whole) >= 1 and not list(tmp_path.glob("*.tmp"))
    for path in whole:
        assert load_index(str(path).removesuffix(".index"), tokenizer.sha256).n_samples == 1500
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"({len(whole)} shards were indexed before)" in done.stdout
