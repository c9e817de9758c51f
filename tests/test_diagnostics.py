"""Gradient norms and singular values of a run, as JSON and as figures."""

import dataclasses
import functools
import json

import diagnostics
import pytest
import torch
from test_training import make_config, train

from matryoshka_lora.core.storage import read_adapter, save_adapter
from matryoshka_lora.loading import read_run
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.record import Record, write_record


def make_run(folder, method):
    """A run's folder as training leaves it."""
    config = make_config(method, max_steps=7)
    model, _, summary = train(folder, config)
    save_adapter(RunFolder(folder).adapter, model, {"run_hash": "01234567"})
    record = Record(
        status="evaluating",
        name=f"data/model/{method}/01234567",
        config=dataclasses.asdict(config),
        run_hash="01234567",
        model={"name": "tiny", "revision": None},
        data={},
        training=summary,
    )
    write_record(RunFolder(folder).record, record)
    return str(folder)


def test_a_run_becomes_json_and_the_json_figures(tmp_path, monkeypatch):
    png = functools.partial(diagnostics.save_figure, suffixes=(".png",))
    monkeypatch.setattr(diagnostics, "save_figure", png)
    folders = [make_run(tmp_path / method, method) for method in ("lora", "nested_matryoshka")]
    output = tmp_path / "diagnostics"
    diagnostics.main(diagnostics.Options(folders, output=str(output)))
    first, second = (json.loads(p.read_text()) for p in sorted(output.glob("*.json")))
    assert first["run_hash"] == "01234567" and first["method"] == "lora"
    assert second["blocks"] == [1, 2, 4, 8] and second["steps"] == [1, 2, 3, 4, 5, 6, 7]
    assert second["git"].keys() == {"training", "diagnostics"}
    trained = read_run(folders[1])
    entries = [json.loads(line) for line in trained.folder.train_log.read_text().splitlines()]
    assert second["gradient_norms"] == [
        pytest.approx(entry["block_grad_norms"], rel=1e-4) for entry in entries
    ]
    file = read_adapter(trained.folder.adapter)
    singular, component = [], []
    for own in file.layers.values():
        A, B, p = own["lora_A"].double(), own["lora_B"].double(), torch.tensor(file.spec.p_full)
        s = torch.linalg.svdvals(B @ torch.diag(p.double()) @ A)[:8]
        singular.append(s / s[0])
        component.append(A.norm(dim=1) * B.norm(dim=0) * p / s[0])
    assert second["singular_values"] == pytest.approx(
        torch.stack(singular).mean(0).tolist(), rel=1e-4
    )
    assert second["component_norms"] == pytest.approx(
        torch.stack(component).mean(0).tolist(), rel=1e-4
    )
    figures = {path: path.read_bytes() for path in output.glob("*.png")}
    assert {p.name for p in figures} == {"gradients.png", "spectrum.png"}
    for path in figures:
        path.unlink()
    diagnostics.main(diagnostics.Options(output=str(output)))  # from the JSON files alone
    assert {path: path.read_bytes() for path in figures} == figures


def test_what_is_no_run_and_no_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no JSON files; give runs=FOLDER"):
        diagnostics.main(diagnostics.Options(output=str(tmp_path)))
    with pytest.raises(ValueError, match=r"holds no record.json"):
        diagnostics.main(diagnostics.Options([str(tmp_path)], output=str(tmp_path)))
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"other.json is not of this script"):
        diagnostics.main(diagnostics.Options(output=str(tmp_path)))


def test_the_runs_of_a_table_are_those_of_its_first_seed_that_are_here(tmp_path, capsys):
    records = tmp_path / "records" / "table"
    for name, seed in (("here", 42), ("away", 42), ("other", 7)):
        config = dataclasses.asdict(make_config("lora")) | {"seed": seed}
        record = Record(
            "finished", f"d/{name}", config, "0" * 8, {"name": "tiny", "revision": None}, {}
        )
        write_record(records / f"{name}.json", record)
    folder = RunFolder(tmp_path / "runs/d/here")
    folder.path.mkdir(parents=True)
    folder.adapter.touch()
    assert diagnostics.runs_of_table(str(records)) == [str(folder.path)]
    assert "1 of 2 runs of seed 42 are here" in capsys.readouterr().out
