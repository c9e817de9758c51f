"""A run is what it was made of: another base, tokenizer or test set is another measurement."""

import json
import logging
import os
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file
from test_model_checks import BART
from test_pipeline import records, small_config
from tiny_lm import word_problems, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

from matryoshka_lora import identity, pipeline
from matryoshka_lora.config import ModelConfig, read_config
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.identity import file_sha256, model_identity
from matryoshka_lora.inputs import prepare
from matryoshka_lora.models import EMBEDDED, load_tokenizer
from matryoshka_lora.pipeline import evaluate_run, run
from matryoshka_lora.reporting import run_tables
from matryoshka_lora.runs.earlier import find_run
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.lock import locked
from matryoshka_lora.runs.progress import replacing
from matryoshka_lora.runs.record import read_record, write_record


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "plot_tables", lambda tables, path: [path.with_suffix(".png")])


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(EMBEDDED, tmp_path / "base")


def identity_of(folder):
    return model_identity(ModelConfig(name="me/mine", path=str(folder)))


def test_every_byte_of_the_weights_counts(base):
    before = identity_of(base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][-1, -1] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    after = identity_of(base)
    assert {key for key in before if before[key] != after[key]} == {"weights"}


def test_the_tokenizer_counts(base):
    before = identity_of(base)
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<pad>"}))
    after = identity_of(base)
    assert {key for key in before if before[key] != after[key]} == {"tokenizer"}


def test_the_generation_config_counts_in_the_evaluation_alone(base):
    config = ModelConfig(name="me/mine", path=str(base))
    before = identity_of(base), identity.generation_digest(config)
    path = base / "generation_config.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | {"repetition_penalty": 1.5}))
    assert identity_of(base) == before[0] and identity.generation_digest(config) != before[1]


def test_a_digest_is_kept_while_the_file_stays_as_it_is(base, monkeypatch):
    path = base / "model.safetensors"
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    first = file_sha256(path)
    with monkeypatch.context() as context:
        context.setattr(identity.hashlib, "file_digest", None)  # nothing is read again
        assert file_sha256(path) == first
    state = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # size, time and inode are the same
    assert file_sha256(path) != first


def test_a_model_of_the_hub_is_its_commit_and_the_names_of_its_blobs(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    local = identity_of(EMBEDDED)
    commit, sha = "c" * 40, file_sha256(EMBEDDED / "model.safetensors")
    repository = tmp_path / "hub" / "models--me--mine"
    for path in EMBEDDED.iterdir():
        blob = repository / "blobs" / (sha if path.suffix == ".safetensors" else path.name)
        link = repository / "snapshots" / commit / path.name
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(identity.hashlib, "file_digest", None)  # the weights are not read
    found = model_identity(ModelConfig(name="me/mine"))
    assert found == local | {"revision": commit, "config_sha256": None}


def with_data(tmp_path, name, documents, seed, **changes):
    folder = tmp_path / name
    write_jsonl(folder / "test.jsonl", word_problems(documents, seed))
    changes = {"eval__ranks": [2], "eval__rules": ["prefix"], "trainer__max_steps": 1} | changes
    config = small_config(tmp_path / "out", eval__limit=None, **changes)
    config.eval.data_path = str(folder)
    return config


def test_other_documents_are_evaluated_anew_and_never_share_a_table(tmp_path, caplog):
    first = run(with_data(tmp_path, "x", 3, 1))
    caplog.set_level(logging.INFO)
    second = run(with_data(tmp_path, "y", 4, 2))
    assert "this run is finished" not in caplog.text
    assert {row.n for row in first.rows} == {3} and {row.n for row in second.rows} == {3, 4}
    assert set(map(repr, first.rows)) < set(map(repr, second.rows))  # nothing is lost
    for table in run_tables(second):
        assert len(table.documents) == 1 and "test set" in table.metric.label
    assert "test set" not in run_tables(first)[0].metric.label
    (folder,) = (path.parent for path in records(tmp_path / "out"))
    again = evaluate_run(folder, with_data(tmp_path, "x", 3, 1))
    assert again.rows == second.rows and again.phases == second.phases  # nothing ran
    training, *evaluations = second.phases
    assert training["phase"] == "training" and training["first_step"] == 0
    assert [[sorted(p) for p in phase["rows"].values()] for phase in evaluations] == [
        [["base@0", "prefix@2"]],
        [["base@0", "prefix@2"]],
    ]
    run(with_data(tmp_path, "y", 4, 2))
    assert "this run is finished" in caplog.text


def test_an_evaluation_that_failed_is_completed_by_evaluate(tmp_path, monkeypatch, caplog):
    config = with_data(tmp_path, "x", 3, 1, dataset__validation=0.1)

    def fail(*args, **options):
        raise OSError("device fell off")

    with monkeypatch.context() as context, pytest.raises(OSError, match="device fell off"):
        context.setattr(pipeline, "run_sweep", fail)
        run(config)
    ((path, failed),) = records(tmp_path / "out").items()
    assert failed.status == "failed" and failed.evaluation["finished"] == []
    # The held-out loss is there, but nothing has told so: train.py sees to it.
    found = evaluate_run(path.parent, config)
    assert found.status == "failed"
    assert caplog.text.count("the loss on held-out records is not computed here") == 1
    assert not any(name.startswith("validation") for name in found.evaluation["finished"])
    # Without held-out records evaluate.py completes the run.
    plain = with_data(tmp_path, "x", 3, 1)
    record = run(plain)
    path = tmp_path / "out" / "runs" / record.name / "record.json"
    write_record(path, replace(record, status="failed", error="x", rows=[], evaluation=None))
    other = with_data(tmp_path, "y", 4, 2)
    assert evaluate_run(path.parent, other).status == "failed"  # its own documents are missing
    found = evaluate_run(path.parent, plain)
    assert (found.status, found.error) == ("finished", None) and set(map(repr, record.rows)) < set(
        map(repr, found.rows)
    )
    assert caplog.text.count("the loss on held-out records is not computed here") == 1


def test_what_cannot_be_evaluated_is_refused_before_anything_is_asked(tmp_path, monkeypatch):
    """A base that runs alone but not packed was trained; evaluate.py is to mix its ranks."""
    tokenizer = load_tokenizer(ModelConfig())
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "init_std": 0.3}
    decoder = AutoConfig.for_model("bart", **BART | shape, forced_eos_token_id=None)
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(decoder).save_pretrained(base)
    tokenizer.save_pretrained(base)
    options = {"trainer__packed": False, "eval__engine": "hf", "model__path": str(base)}
    config = with_data(tmp_path, "x", 1, 1, adapter__targets=["q_proj"], **options)
    record = run(config)
    folder = tmp_path / "out" / "runs" / record.name
    config.eval.engine, config.eval.ranks = "batched", [1, 2]
    monkeypatch.setattr(pipeline, "evaluate", None)
    with pytest.raises(UserError, match=r"set trainer\.packed=false eval\.engine=hf"):
        evaluate_run(folder, config)
    assert read_record(folder / "record.json") == record


def test_one_process_a_run(tmp_path):
    config = with_data(tmp_path, "x", 3, 1)
    record = run(config)
    folder = RunFolder(tmp_path / "out" / "runs" / record.name)
    more = with_data(tmp_path, "x", 3, 1, eval__ranks=[1, 2])
    with locked(folder, main=True):
        for attempt in (lambda: run(more), lambda: evaluate_run(folder.path, more)):
            with pytest.raises(UserError, match=rf"already running \(process {os.getpid()} on "):
                attempt()
        assert run(config).rows == record.rows  # a finished run is shown
    assert {row.rank for row in run(more).rows} == {0, 1, 2}


def test_force_removes_a_run_only_when_the_new_one_has_begun(tmp_path, monkeypatch):
    config = with_data(tmp_path, "x", 3, 1)
    record = run(config)
    folder = RunFolder(tmp_path / "out" / "runs" / record.name)
    before = folder.record.read_bytes()
    config.force = True

    def no_key(*args):
        raise UserError("no API key")

    with monkeypatch.context() as context, pytest.raises(UserError, match="no API key"):
        context.setattr(pipeline, "make_tracker", no_key)
        run(config)
    assert folder.record.read_bytes() == before and not folder.replaced.exists()
    # A kill leaves the old run aside; the next start puts it back.
    os.rename(folder.path, folder.replaced)
    folder.path.mkdir()
    with replacing(folder, False):
        assert folder.record.read_bytes() == before
    run(config)
    assert folder.record.read_bytes() != before and not folder.replaced.exists()


def test_a_finished_run_is_shown_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    config = small_config(tmp_path, trainer__max_steps=1, eval__limit=2, eval__ranks=[2])
    record = run(config)
    capsys.readouterr()

    def read_only(*args, **options):
        raise OSError(30, "Read-only file system")

    for name in ("replace", "mkdir", "rename"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(pipeline, "write_tables", read_only)
    assert run(config) == record
    assert "arithmetic_word_problems" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_is_found_or_explained(tmp_path):
    config = with_data(tmp_path, "x", 3, 1)
    record = run(config)
    folder = tmp_path / "out" / "runs" / record.name
    named = folder.rename(folder.with_name(folder.name[:-8] + "01234567"))
    own = (record.model, record.data["fingerprint"])
    config = read_config(record.config, "record")
    assert find_run(config, *own) == (named, None)
    assert find_run(config, own[0], "other").doubtful is None
    old = {k: v for k, v in record.model.items() if k not in ("weights", "tokenizer")}
    write_record(named / "record.json", replace(record, model=old | {"weights_sha256": "0"}))
    place = find_run(config, *own)
    assert place.folder == folder and "does not hold the base's weights and tokenizer" in (
        place.doubtful or ""
    )
    assert read_record(named / "record.json").model == old | {"weights_sha256": "0"}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"trainer__clip_norm": 0.5}, "trainer.clip_norm=0.5"),
        ({"dataset__limit": 12}, "another base model or data"),
    ],
)
def test_the_record_of_another_run_in_a_runs_folder_is_refused(tmp_path, changes, what):
    changed = small_config(tmp_path, trainer__max_steps=1, eval__tasks=[], **changes)
    config = small_config(tmp_path, trainer__max_steps=1, eval__tasks=[])
    paths = []
    for made in (changed, config):
        folder = prepare(made).folder
        run(made)
        paths.append(folder / "record.json")
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(UserError, match=f"is of another run than its folder, with {what}; restore"):
        run(config)
    config.force = True
    assert run(config).run_hash == prepare(config).run_hash


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").write_text("")
    for tasks in ([], ["arithmetic_word_problems:0"]):
        with pytest.raises(UserError, match="output_dir: .*cannot be written.*another folder"):
            run(small_config(tmp_path / "file", eval__tasks=tasks))
