"""Tracking offline, by reading back what W&B wrote to disk, and the dashboard by its spec."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from matryoshka_lora.cli import parse_options
from matryoshka_lora.config import Config
from matryoshka_lora.reporting.aurac import aurac
from matryoshka_lora.runs.record import Record, Row
from matryoshka_lora.tracking import Tracker, aurac_summary, make_tracker

ROOT = Path(__file__).parent.parent
HASH = "0a1b2c3d"
CURVE = "gsm8k-3shot/exact_match-strict-match"
VALUES = {1: 0.1, 2: 0.2, 4: 0.4, 8: 0.4}


def offline_config(method: str = "dylora") -> Config:
    config = Config()
    config.model.name = "meta-llama/Llama-3.2-1B-Instruct"
    config.dataset.name = "gsm8k"
    config.method.name, config.adapter.rank = method, 8
    config.tracking.name, config.tracking.mode = "wandb", "offline"
    return config


def train_row(step: int) -> dict[str, Any]:
    """A row as `train.jsonl` has it, for R=8 and S={1,2,4,8}."""
    return {
        "step": step,
        "loss": 2.0 - step / 10,
        "grad_norm": 0.5,
        "block_grad_norms": [0.4, 0.3, 0.2, 0.1],
        "lr": 1e-3,
        "label_tokens": 100,
        "tokens": 300,
        "ranks": [8, 8, 16, 0],
        "seconds": 1.0 + step,
        "tokens_per_second": 300.0,
    }


def sweep_row(rank: int, value: float | None, rule: str = "prefix") -> Row:
    return Row("gsm8k", 3, None, "strict-match", rank, rule, "exact_match", value, 0.01, 10)


def sweep_rows() -> list[Row]:
    return [sweep_row(0, 0.05, "base"), *(sweep_row(r, value) for r, value in VALUES.items())]


def record_of(rows: list[Row]) -> Record:
    return Record("finished", "name", {}, HASH, {}, {}, rows=rows)


class RunFile:
    """A `.wandb` file: W&B's protocol buffers in the log format of LevelDB.

    A header of 7 bytes; then blocks of 32 KiB that hold chunks, each a checksum (4 bytes), its
    length (2), its type (1: whole, 2: first, 3: middle, 4: last) and its data.
    (https://github.com/google/leveldb/blob/main/doc/log_format.md)
    """

    def __init__(self, path: Path) -> None:
        from wandb.proto import wandb_internal_pb2

        data, position, message = path.read_bytes(), 7, b""
        assert data[:4] in (b"", b":W&B")
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: dict[str, str] = {}
        self.run, self.exit_code = None, None
        while position + 7 <= len(data):
            room = 32768 - position % 32768
            if room < 7:
                position += room
                continue
            length = int.from_bytes(data[position + 4 : position + 6], "little")
            if position + 7 + length > len(data):  # not written out yet
                break
            message += data[position + 7 : position + 7 + length]
            last = data[position + 6] in (1, 4)
            position += 7 + length
            if last:
                record = wandb_internal_pb2.Record()
                record.ParseFromString(message)
                self._add(record)
                message = b""

    def _add(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.run = record.run
        elif kind == "metric":
            self.metrics[record.metric.glob_name] = record.metric.step_metric
        elif kind == "history":
            self.history.append({_key(i): json.loads(i.value_json) for i in record.history.item})
        elif kind == "summary":
            self.summary.update({_key(i): json.loads(i.value_json) for i in record.summary.update})
        elif kind == "exit":
            self.exit_code = record.exit.exit_code

    def curve(self, x: str, y: str) -> dict[float, float]:
        """x -> y over the rows that have both; a repeated x is an error."""
        points = [(row[x], row[y]) for row in self.history if x in row and y in row]
        assert len(dict(points)) == len(points)
        return dict(points)


def _key(item: Any) -> str:
    return ".".join(item.nested_key) or item.key


def run_files(folder: Path, count: int) -> list[RunFile]:
    """The files of `count` starts, in their order.

    W&B's service writes a file out a moment after `finish` has returned, its exit record last.
    """
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        files = [RunFile(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]
        if len(files) == count and all(file.exit_code is not None for file in files):
            return files
        time.sleep(0.05)
    raise AssertionError(f"no {count} complete files below {folder}")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was tracked from its first step to its plot."""
    folder = tmp_path_factory.mktemp("run")
    figure = folder / "figure.png"
    _write_png(figure)
    tracker = make_tracker(offline_config(), HASH, folder, True)
    for step in range(3):
        tracker.step(train_row(step))
    tracker.rows(sweep_rows()[:3])
    tracker.finish(record_of(sweep_rows()), figure)
    tracker.close(0)
    return folder


@pytest.fixture(scope="module")
def written(tracked: Path) -> RunFile:
    return run_files(tracked, 1)[0]


def _write_png(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(1, 1))
    figure.savefig(path)
    plt.close(figure)


def test_names_of_the_run(written: RunFile) -> None:
    run = written.run
    group = "Llama-3.2-1B-Instruct-gsm8k-dylora-r8-none"
    assert run.run_id == HASH
    assert (run.run_group, run.job_type) == (group, "lr0.001")
    assert run.display_name == f"{group}-lr0.001-seed42"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["method"]["name"] == "dylora"
    assert config["adapter"]["rank"] == 8
    assert written.exit_code == 0


def test_training_curves(written: RunFile) -> None:
    assert written.metrics["train/*"] == "train/step"
    steps = {step: train_row(step) for step in range(3)}
    for key in ("loss", "lr", "grad_norm", "tokens_per_second"):
        expected = {step: row[key] for step, row in steps.items()}
        assert written.curve("train/step", f"train/{key}") == expected
    assert written.curve("train/step", "train/grad_norm_rows/3-4") == dict.fromkeys(steps, 0.2)
    assert written.curve("train/step", "train/samples_at_rank/4") == dict.fromkeys(steps, 16)
    assert [row["_step"] for row in written.history[:3]] == [0, 1, 2]


def test_rank_accuracy_curve_base_and_aurac(written: RunFile) -> None:
    assert written.metrics["eval/*"] == "eval/rank"
    # Rows shown while the sweep ran are not repeated at its end.
    assert written.curve("eval/rank", f"eval/{CURVE}/prefix") == VALUES
    assert written.summary[f"base/{CURVE}"] == 0.05
    for prefix, axis in (("aurac", "log2"), ("aurac_linear", "linear")):
        expected = aurac(list(VALUES), list(VALUES.values()), axis)
        assert written.summary[f"{prefix}/{CURVE}/prefix"] == pytest.approx(expected)


def test_table_and_image(tracked: Path, written: RunFile) -> None:
    (table,) = tracked.glob("wandb/offline-run-*/files/media/table/*.table.json")
    content = json.loads(table.read_text())
    rows = [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]
    assert [(row["rank"], row["value"]) for row in rows] == [(0, 0.05), *VALUES.items()]
    assert "scores" not in content["columns"]
    (image,) = tracked.glob("wandb/offline-run-*/files/media/images/*.png")
    assert image.read_bytes() == (tracked / "figure.png").read_bytes()
    assert any("rank_accuracy.path" in row for row in written.history)


def test_second_start_is_a_folder_of_the_same_run(tmp_path: Path) -> None:
    """Offline each start leaves a folder; all carry the id by which `wandb sync` joins them."""
    for start, steps in enumerate((range(0, 3), range(2, 4))):
        tracker = make_tracker(offline_config("lora"), HASH, tmp_path, True)
        for step in steps:
            tracker.step(train_row(step) | {"ranks": [32]})
        tracker.close(exit_code=1 - start)
    files = run_files(tmp_path, 2)
    assert [file.run.run_id for file in files] == [HASH, HASH]
    assert [file.exit_code for file in files] == [1, 0]
    assert list(files[0].curve("train/step", "train/loss")) == [0, 1, 2]
    assert [row["_step"] for row in files[1].history] == [2, 3]
    assert files[1].curve("train/step", "train/samples_at_rank/8") == {2: 32, 3: 32}


def test_other_processes_and_no_tracking_do_nothing(tmp_path: Path) -> None:
    for tracker in (
        make_tracker(Config(), HASH, tmp_path, True),
        make_tracker(offline_config(), HASH, tmp_path, False),
    ):
        assert type(tracker) is Tracker
        tracker.step(train_row(0))
        tracker.rows(sweep_rows())
        tracker.finish(record_of(sweep_rows()), None)
        tracker.close(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["tracking", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_wandb_is_not_imported_without_tracking(tmp_path: Path, module: str) -> None:
    code = (
        f"import sys; from pathlib import Path; import matryoshka_lora.{module}; "
        "from matryoshka_lora.config import Config; "
        "from matryoshka_lora.tracking import make_tracker; "
        f"make_tracker(Config(), '{HASH}', Path({str(tmp_path)!r}), True).close(0); "
        "sys.exit('wandb' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("a file in the folder's place")
    with pytest.raises(ValueError, match=r"tracking=wandb: .*wandb cannot be written"):
        make_tracker(offline_config(), HASH, tmp_path, True)


def test_refusal_of_wandb_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"No API key configured.*wandb login.*mode=offline"):
        make_tracker(offline_config(), HASH, tmp_path, True)


def test_resume_is_asked_for_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    asked: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def note(**options: Any) -> None:
        asked.update(options)
        raise Stop

    monkeypatch.setattr(wandb, "init", note)
    config = offline_config()
    config.tracking.mode = "online"
    with pytest.raises(Stop):
        make_tracker(config, HASH, tmp_path, True)
    assert (asked["id"], asked["resume"], asked["mode"]) == (HASH, "allow", "online")
    assert asked["dir"] == tmp_path


def test_aurac_leaves_out_curves_with_holes(caplog: pytest.LogCaptureFixture) -> None:
    rows = [*sweep_rows(), sweep_row(1, None, "svd"), sweep_row(2, 0.5, "svd")]
    summary = aurac_summary(rows)
    assert sorted(summary) == [f"aurac/{CURVE}/prefix", f"aurac_linear/{CURVE}/prefix"]
    assert "svd" in caplog.text


def dashboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "wandb_dashboard", ROOT / "scripts" / "wandb_dashboard.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def show(arguments: list[str]) -> None:
    script = dashboard()
    script.main(parse_options(script.Options, arguments))


def test_dashboard_shows_what_tracking_logs(
    written: RunFile, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")
    show(["entity=team", "tasks=[gsm8k:3]", "rules=[prefix]", "dry_run=true"])
    spec = json.loads(capsys.readouterr().out)
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Accuracy over rank", "AURAC", "Training"]
    logged = {key for row in written.history for key in row} | set(written.summary)
    for section in sections:
        for panel in section["panels"]:
            config = panel["config"]
            assert {*config["metrics"], config.get("xAxis", "eval/rank")} <= logged
            # Seeds share a group: their mean, with a band of one standard deviation.
            assert (config["groupBy"], config["groupAgg"]) == ("group", "mean")
            assert (config["groupArea"], config["aggregate"]) == ("stddev", True)
    accuracy, area, loss = (section["panels"][0] for section in sections)
    assert accuracy["viewType"] == "Run History Line Plot" and accuracy["config"]["xLogScale"]
    assert area["viewType"] == "Bar Chart"
    assert loss["config"]["metrics"] == ["train/loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "entity not given"),
        (["entity=team", "tasks=[gsm8k]"], "not name:shots"),
        (["entity=team", "rules=[prefx]"], "did you mean prefix"),
    ],
)
def test_dashboard_errors(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        show([*arguments, "dry_run=true"])
