import dataclasses
import errno
import json
import os
import subprocess

import pytest
from conftest import ROOT

from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.evaluation.rows import Row, decode_scores, encode_scores, merge_rows
from matryoshka_lora.runs import provenance
from matryoshka_lora.runs import record as records
from matryoshka_lora.runs.provenance import environment, git_state, new_phase
from matryoshka_lora.runs.record import (
    Record,
    find_records,
    read_record,
    write_record,
)


def row(rank=1, rule="prefix", value=0.5, **changes):
    base = Row("gsm8k", 3, None, "strict-match", rank, rule, "exact_match", value, 0.1, 4)
    return dataclasses.replace(base, **changes)


def record(**changes):
    base = Record(
        status="finished",
        name="arithmetic/tiny/lora-r8-none/lr0.001-seed42-00000000",
        config={"seed": 42, "adapter": {"rank": 8, "train_ranks": None}},
        run_hash="00000000",
        model={"name": "tiny", "revision": None},
        data={"fingerprint": "f00", "used": 10, "truncated": 0, "fully_masked": 0},
        training={"steps": 3, "loss": 1.25, "peak_memory_gib": None},
        phases=[
            {
                "phase": "training",
                "git": {"sha": "abc", "dirty": False},
                "versions": {"python": "3.12.0"},
                "device": {"name": "cpu", "count": 1},
            }
        ],
        rows=[
            row(0, "base", 0.25, scores="0010"),
            row(1, scores="0101", trained_rank=True),
            row(1, "trained", same_as="prefix@1"),
            row(1, metric="loss", filter=None, scores=[0.5, 1.25, 3.0, 0.125]),
            row(2, value=None, stderr=None, n=0),
        ],
    )
    return dataclasses.replace(base, **changes)


def test_round_trip_and_layout(tmp_path):
    path = tmp_path / "deep" / "record.json"
    write_record(path, record())
    assert read_record(path) == record()
    text = path.read_text()
    assert json.loads(text)["schema"] == records.SCHEMA
    # One row a line, in the order of the schema, and stable.
    assert sum('"task": "gsm8k"' in line for line in text.splitlines()) == 5
    assert text.index('"status"') < text.index('"config"') < text.index('"rows"')
    write_record(path, read_record(path))
    assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_whole_numbers_stay_whole(tmp_path):
    """A value that was written as 1 is not written as 1.0 the next time."""
    path = tmp_path / "record.json"
    write_record(path, record(rows=[row(value=1, stderr=0, scores=[1, 0.5, 1, 1])]))
    text = path.read_text()
    write_record(path, read_record(path))
    assert path.read_text() == text and '"value": 1, "stderr": 0, ' in text


def test_records_of_an_older_version_are_upgraded_and_lose_nothing(tmp_path):
    paths = find_records(ROOT / "results" / "records", "*.json")
    assert paths
    for path in paths:
        old = json.loads(path.read_text())
        write_record(tmp_path / "record.json", read_record(path))
        assert read_record(tmp_path / "record.json") == read_record(path)
        new = json.loads((tmp_path / "record.json").read_text())
        if old["schema"] == 2:
            assert new == old, path
            continue
        assert (old.pop("schema"), new.pop("schema")) == (1, 2)
        (phase,) = new.pop("phases")
        assert phase == {"phase": "all", **{k: old.pop(k) for k in ("git", "versions", "device")}}
        assert [row.pop("fingerprint") for row in new["rows"]] == [None] * len(old["rows"])
        # The numbers are the same texts, too: a 1 has not become a 1.0.
        assert json.dumps(new) == json.dumps(old), path


def test_a_new_record_without_rows(tmp_path):
    fresh = record(status="training", training=None, phases=[], rows=[])
    write_record(tmp_path / "record.json", fresh)
    assert read_record(tmp_path / "record.json") == fresh


def broken(change):
    document = json.loads((records._layout(documented())).strip())
    change(document)
    return json.dumps(document)


def documented():
    document = {"schema": records.SCHEMA, **records._fields(record())}
    document["rows"] = [records._fields(r) for r in record().rows]
    return document


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("run_hash"), "field 'run_hash' is missing"),
        (lambda d: d.update(extra=1), "unknown field 'extra'"),
        (lambda d: d.update(schema=99), "field 'schema': this version reads 2, got 99"),
        (lambda d: d.pop("schema"), "field 'schema' is missing"),
        (lambda d: d.update(status="done"), "field 'status'.*finished.*got 'done'"),
        (lambda d: d.update(config=[]), "field 'config'"),
        (lambda d: d.update(schema=1), "field 'git' is missing"),
        (lambda d: d.update(phases=[{}]), r"field 'phases\[0\]' lacks 'phase' or 'device'"),
        (lambda d: d.update(rows={}), "field 'rows'"),
        (lambda d: d["rows"].append(3), r"field 'rows\[5\]'"),
        (lambda d: d["rows"][1].pop("stderr"), r"field 'rows\[1\].stderr' is missing"),
        (lambda d: d["rows"][1].update(acc=1), r"unknown field 'rows\[1\].acc'"),
        (
            lambda d: d["rows"][1].update(rank="1"),
            r"'rows\[1\].rank': .* valid integer",
        ),
        (
            lambda d: d["rows"][1].update(rank=True),
            r"'rows\[1\].rank': .* valid integer",
        ),
        (
            lambda d: d["rows"][1].update(rank=-1),
            r"'rows\[1\].rank'.*equal to 0, got -1",
        ),
        (lambda d: d["rows"][1].update(rank=0), r"field 'rows\[1\].rule'"),
        (lambda d: d["rows"][1].update(value="0.5"), r"field 'rows\[1\].value'"),
        (lambda d: d["rows"][1].update(n=-1), r"field 'rows\[1\].n'.*got -1"),
        (lambda d: d["rows"][1].update(shots=-1), r"field 'rows\[1\].shots'.*got -1"),
        (lambda d: d["rows"][1].update(n=1.0), r"field 'rows\[1\].n'.*got 1.0"),
        (lambda d: d["rows"][1].update(value=True), r"field 'rows\[1\].value'.*got True"),
        (lambda d: d["rows"][1].update(trained_rank=1), r"field 'rows\[1\].trained_rank'"),
        (lambda d: d["rows"][1].pop("scores"), r"field 'rows\[1\].scores' is missing"),
        (lambda d: d["rows"][1].update(scores=[1, "a", 0, 0]), r"field 'rows\[1\].scores'"),
        (lambda d: d["rows"][1].update(value=float("nan")), "holds NaN"),
        (lambda d: d.update(schema=True), "field 'schema'.*got True"),
        (lambda d: d.pop("rows"), "field 'rows' is missing"),
        (lambda d: d["rows"][1].update(scores="01x1"), r"field 'rows\[1\].scores'"),
        (lambda d: d["rows"][1].update(scores="010"), "holds 3 documents, but n is 4"),
        (lambda d: d["rows"].append(d["rows"][0]), r"'rows\[5\]' repeats rows\[0\]"),
    ],
)
def test_a_corrupt_record_is_named_and_left_alone(tmp_path, change, words):
    path = tmp_path / "record.json"
    path.write_text(broken(change))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words) as caught:
        read_record(path)
    assert str(path) in str(caught.value) and "left alone" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"schema": 1, "sta', b"\xff\xfe\x00"])
def test_not_a_record_at_all(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="record.json is not a valid run record.*left alone"):
        read_record(path)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"rows": [row(value=float("nan"))]}, r"rows\[0\].value"),
        ({"rows": [row(stderr=float("inf"))]}, r"rows\[0\].stderr"),
        ({"training": {"loss": float("nan")}}, "field 'training'"),
        ({"data": {"name": object()}}, "field 'data'"),
        ({"rows": [row(), row()]}, "repeats"),
        ({"status": "done"}, "status"),
    ],
)
def test_a_bad_record_is_not_written(tmp_path, bad, words):
    path = tmp_path / "record.json"
    write_record(path, record())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        write_record(path, record(**bad))
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_full_disk_leaves_the_old_record(tmp_path, monkeypatch, step):
    path = tmp_path / "record.json"
    write_record(path, record())
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match=r"cannot write .*record.json \(No space left") as caught:
        write_record(path, record(status="failed", error="x"))
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["record.json"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"x")
    assert os.listdir(tmp_path) == []


def test_a_torn_temporary_file_is_never_read(tmp_path):
    """What a kill between write and rename leaves is neither found nor in the way."""
    path = tmp_path / "run" / "record.json"
    write_record(path, record())
    (path.parent / f".record.json.{os.getpid()}.tmp").write_text('{"schema": 1, "sta')
    assert find_records(tmp_path) == [path]
    assert find_records(tmp_path, "*.json") == [path]
    write_record(path, record(status="evaluating"))
    assert read_record(path).status == "evaluating"


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(OSError, match="cannot write"):
        write_record(tmp_path / "run" / "record.json", record())
    assert (tmp_path / "run").read_text() == "not a folder"


def test_find_records(tmp_path):
    assert find_records(tmp_path / "nothing") == []
    for name in ("b/record.json", "a/x/record.json", "a/other.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = [str(p.relative_to(tmp_path)) for p in find_records(tmp_path)]
    assert found == ["a/x/record.json", "b/record.json"]


def test_scores():
    assert encode_scores([0, 1, 1.0, False]) == "0110"
    assert decode_scores("0110") == [0.0, 1.0, 1.0, 0.0]
    assert encode_scores([0, 1.23456789, 1e-9]) == [0.0, 1.23457, 1e-9]
    assert decode_scores([0.5, 2]) == [0.5, 2.0]
    assert encode_scores([]) == "" and decode_scores("") == []
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="document 1"):
            encode_scores([0.0, bad])
    with pytest.raises(ValueError, match="string of 0 and 1"):
        decode_scores("012")


def test_merge_rows():
    old = [row(2), row(1), row(1, "svd", value=0.1), row(0, "base"), row(1, metric="loss")]
    new = [row(1, "svd", value=0.9), row(4), row(1, limit=16)]
    merged = merge_rows(old, new)
    assert {r.key for r in merged} == {r.key for r in old + new}
    assert len(merged) == 7
    assert [r.value for r in merged if r.rule == "svd"] == [0.9]
    assert merged == merge_rows(reversed(old), reversed(new))
    assert merged == merge_rows(merged, [])
    whole = [r for r in merged if r.metric == "exact_match" and r.limit is None]
    assert [(r.rule, r.rank) for r in whole] == [
        ("base", 0), ("prefix", 1), ("prefix", 2), ("prefix", 4), ("svd", 1),
    ]  # fmt: skip


def test_environment_can_be_recorded(tmp_path):
    facts = environment()
    assert facts["versions"]["python"] and facts["versions"]["torch"]
    assert facts["device"]["count"] >= 1 and facts["device"]["cpu_threads"] >= 1
    phase = new_phase("training", 2)
    write_record(tmp_path / "record.json", record(phases=[phase]))
    found = read_record(tmp_path / "record.json")
    assert found.phases == [phase]
    assert found.training_device == facts["device"] | {"processes": 2}


@pytest.fixture
def package_copy(tmp_path, monkeypatch):
    """A folder `matryoshka_lora` that provenance.py takes for its own."""
    monkeypatch.delenv("MATRYOSHKA_GIT_SHA", raising=False)
    # Whatever repository the tests run in must not be found above the temporary folder.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    package = tmp_path / "matryoshka_lora"
    package.mkdir()
    (package / "provenance.py").write_text("# copy\n")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.md").write_text("old\n")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    return tmp_path


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_facts(package_copy, monkeypatch):
    assert git_state() is None  # no repository
    git(package_copy, "init", "-q")
    assert git_state() is None  # not tracked: somebody else's repository
    git(package_copy, "add", ".")
    assert git_state() is None  # no commit yet
    git(package_copy, "commit", "-q", "-m", "one")
    sha = git(package_copy, "rev-parse", "HEAD")
    assert git_state() == {"sha": sha, "dirty": False}
    (package_copy / "results" / "table.md").write_text("new\n")
    assert git_state() == {"sha": sha, "dirty": False}  # results are output, not code
    (package_copy / "matryoshka_lora" / "provenance.py").write_text("# changed\n")
    assert git_state() == {"sha": sha, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state() is None  # no git


def test_git_facts_can_be_given(package_copy, monkeypatch):
    monkeypatch.setenv("MATRYOSHKA_GIT_SHA", "0123abc-dirty")
    assert git_state() == {"sha": "0123abc", "dirty": True}
