"""The sweep against the harness's own evaluation, its resume, its independence of order."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import tiny_lm
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from matryoshka_lora.core.adapter import adapter_layers, at_rank
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import AdapterView
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.evaluation.definitions import OWN_TASKS
from matryoshka_lora.evaluation.engines.hf import HFEngine, harness_lm
from matryoshka_lora.evaluation.engines.protocol import Output, Point, Request
from matryoshka_lora.evaluation.readings import Plan, plan_points
from matryoshka_lora.evaluation.rows import Row, decode_scores
from matryoshka_lora.evaluation.samples import Samples, samples_path
from matryoshka_lora.evaluation.sweep import run_sweep
from matryoshka_lora.evaluation.tasks import EvalTask, load_tasks

SHIPPED = Path(lm_eval.tasks.__file__).parent
RULES = ("prefix", "trained", "svd")
READINGS = ((0, "base"), (2, "prefix"), (1, "svd"))


class FakeEngine:
    """Answers that depend on point and request alone, in an order of its own."""

    lockstep = False

    def __init__(
        self, shuffle: int | None = None, fail_after: int | None = None, seconds: float = 0.0
    ) -> None:
        self.shuffle, self.fail_after, self.seconds = shuffle, fail_after, seconds
        self.answered: list[tuple[int, str, str, int, int]] = []

    def run(
        self, jobs: Sequence[tuple[Point, Request]], parts: Iterator[range] | None = None
    ) -> Iterator[tuple[int, Output]]:
        assert len({point.factors for point, _ in jobs}) <= 1
        for part in [range(len(jobs))] if parts is None else parts:
            order = list(part)
            if self.shuffle is not None:
                random.Random(self.shuffle).shuffle(order)
            yield from self._answer(jobs, order)

    def _answer(
        self, jobs: Sequence[tuple[Point, Request]], order: Sequence[int]
    ) -> Iterator[tuple[int, Output]]:
        for index in order:
            time.sleep(self.seconds)
            if self.fail_after is not None and len(self.answered) == self.fail_after:
                raise RuntimeError("killed")
            point, request = jobs[index]
            what = (
                point.rank,
                point.rule,
                request.kind,
                request.doc_id,
                request.instance.idx,
                request.instance.task_name,
            )
            self.answered.append(what)
            rng = random.Random(repr(what))
            if request.kind == "generate":
                gold = request.instance.doc["answer"]
                yield index, Output(text=rng.choice([gold, "#### -1", "", "é 7 of\u2028these"]))
            else:
                yield index, Output(logprob=-rng.uniform(1, 30), is_greedy=rng.random() < 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def plan() -> Plan:
    return plan_points(tiny_lm.view(), tiny_lm.TRAIN_RANKS, RULES, tiny_lm.TRAIN_RANKS)


def sweep(data: Path, folder: Path, engine, plan: Plan, limit: int | None = None, **options):
    """Two tasks on the tiny model."""
    tasks = load_tasks([("gsm8k", 3), ("arc_challenge", 2)], data_path=data, limit=limit)
    model = tiny_lm.adapt(tiny_lm.model(2048))
    return run_sweep(model, tiny_lm.tokenizer(), tasks, plan, engine, folder, **options)


def lines(folder: Path) -> dict[str, list[str]]:
    """Each file's lines, sorted."""
    return {p.name: sorted(p.read_text().split("\n")) for p in sorted(folder.iterdir())}


# What is evaluated


def test_plan_evaluates_equal_functions_once() -> None:
    plan = plan_points(tiny_lm.view(), [1, 3, 4], RULES, tiny_lm.TRAIN_RANKS)
    evaluated = [(p.rank, p.rule) for p in plan.points]
    assert evaluated == [(0, "base")] + [
        (rank, rule) for rank in (1, 3, 4) for rule in RULES if (rank, rule) != (4, "svd")
    ]
    assert plan.same_as((4, "svd")) == "trained@4"
    assert plan.same_as((4, "trained")) is None
    assert [plan.trained_rank(r) for r in ((0, "base"), (3, "svd"))] == [None, None]
    assert [plan.trained_rank((r, "prefix")) for r in (1, 3, 4)] == [True, False, True]
    assert plan.points[0].p.tolist() == [0.0] * 4
    assert [p.factors for p in plan.points[:4]] == ["trained", "trained", "trained", "svd"]


def test_plan_of_a_method_that_trains_prefixes() -> None:
    spec = AdapterSpec(4, "none", (1.0,) * 4, trains_prefixes=True)
    plan = plan_points(AdapterView(spec), [2, 4], ["trained", "svd"], [1, 2, 4])
    # The stand-in is evaluated although it was not asked for; rows are of what was asked.
    assert [(p.rank, p.rule) for p in plan.points] == [
        *((0, "base"), (2, "prefix"), (2, "svd"), (4, "prefix")),
    ]
    assert list(plan.readings) == [
        *((0, "base"), (2, "trained"), (2, "svd"), (4, "trained"), (4, "svd")),
    ]
    assert plan.same_as((4, "svd")) == plan.same_as((4, "trained")) == "prefix@4"


@pytest.mark.parametrize(
    ("ranks", "rules", "match"),
    [
        ([], ["svd"], "needs ranks and rules"),
        ([1], [], "needs ranks and rules"),
        ([1, 2, 1], ["svd"], "ranks.*repeated"),
        ([1], ["svd", "svd"], "rules.*repeated"),
        ([0, 1], ["prefix"], "rank 0 is the base model"),
        ([8], ["prefix"], "above the adapter's rank 4"),
        ([-1], ["prefix"], "not a positive integer"),
        ([1], ["merge"], "rule 'merge' is unknown"),
    ],
)
def test_bad_plans(ranks: list[int], rules: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plan_points(tiny_lm.view(), ranks, rules, tiny_lm.TRAIN_RANKS)


# Truth: the harness's own evaluation


def merge(rank: int, rule: str):
    """The tiny model with the adapter at one point merged into its weights."""
    adapted, merged = tiny_lm.adapt(tiny_lm.model()), tiny_lm.model()
    with at_rank(adapted, rank, rule), torch.no_grad():
        for name, layer in adapter_layers(adapted).items():
            update = layer.lora_B.double() @ torch.diag(layer.p.double()) @ layer.lora_A.double()
            weight = merged.get_submodule(name).weight
            weight.copy_((weight.double() + update).float())
    return merged


def local_yaml(folder: Path, name: str, shipped: Path, data: Path) -> None:
    """The shipped task on local files, in the harness's own way."""
    files = {split: str(data / f"{split}.jsonl") for split in ("train", "test")}
    config = {"include": str(shipped), "task": name, "dataset_path": "json", "dataset_name": None}
    config["dataset_kwargs"] = {"data_files": files}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(json.dumps(config))


def assert_equal_to_harness(
    rows: list[Row], folder: Path, task, reading: tuple[int, str], results: dict, samples: list
) -> None:
    """All metrics, standard errors, texts, likelihoods and scores of a task at one point."""
    own = [r for r in rows if r.task == task.name and (r.rank, r.rule) == reading]
    assert len(own) > 1
    for row in own:
        if row.metric != "loss":
            suffix = row.filter or "none"
            assert row.value == results[f"{row.metric},{suffix}"]
            assert row.stderr == results[f"{row.metric}_stderr,{suffix}"]
            theirs = [s[row.metric] for s in samples if s["filter"] == suffix]
            assert decode_scores(row.scores) == theirs
    kept = [json.loads(x) for x in samples_path(folder, task).read_text().splitlines()]
    kept = {s["doc_id"]: s for s in kept if (s["rank"], s["rule"]) == reading}
    for sample in samples:
        line = kept[sample["doc_id"]]
        if isinstance(sample["resps"][0][0], str):
            assert line["outputs"][0] == sample["resps"][0][0]
            assert line["answers"][sample["filter"]] == sample["filtered_resps"][0]
        else:
            answers = [response[0] for response in sample["resps"]]
            own_values = np.array([float(v) for v, _ in line["outputs"]])
            np.testing.assert_allclose(own_values, [float(v) for v, _ in answers], rtol=1e-5)
            assert [g for _, g in line["outputs"]] == [str(g) == "True" for _, g in answers]


@pytest.fixture(scope="module")
def hf_sweep(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Three points by the reference engine: (tasks, rows, folder of the samples)."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "data").mkdir()
    (folder / "data" / "arithmetic_word_problems").symlink_to(data / "gsm8k")
    (folder / "data" / "arc_challenge").symlink_to(data / "arc_challenge")
    specs = [("arithmetic_word_problems", 0), ("arc_challenge", 3)]
    tasks = load_tasks(specs, data_path=folder / "data", limit=4)
    plan = plan_points(tiny_lm.view(), [1, 2], ["prefix", "svd"], tiny_lm.TRAIN_RANKS)
    readings = {key: plan.readings[key] for key in READINGS}
    plan = replace(plan, points=tuple(readings.values()), readings=readings)
    model, tokenizer = tiny_lm.adapt(tiny_lm.model()).train(), tiny_lm.tokenizer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = HFEngine(model, tokenizer, batch_size=3)
    rows = run_sweep(model, tokenizer, tasks, plan, engine, folder / "samples")
    assert model.training and tokenizer.pad_token is None
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    return tasks, rows, folder / "samples"


@pytest.mark.parametrize("reading", READINGS)
def test_equals_simple_evaluate(
    reading: tuple[int, str], hf_sweep, data: Path, tmp_path: Path
) -> None:
    tasks, rows, folder = hf_sweep
    arithmetic = (OWN_TASKS / "arithmetic.yaml", data / "gsm8k")
    local_yaml(tmp_path, "arithmetic_word_problems", *arithmetic)
    arc = (SHIPPED / "arc" / "arc_challenge.yaml", data / "arc_challenge")
    local_yaml(tmp_path, "arc_challenge", *arc)
    rank, rule = reading
    model = merge(rank, rule) if rank else tiny_lm.model()
    lm = HFLM(pretrained=model, tokenizer=tiny_lm.tokenizer(), batch_size=3)
    for task in tasks:
        result = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task.name],
            num_fewshot=task.shots,
            limit=4,
            task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
        )
        results, samples = result["results"][task.name], result["samples"][task.name]
        assert_equal_to_harness(rows, folder, task, reading, results, samples)
    loss = next(r for r in rows if r.metric == "loss" and (r.rank, r.rule) == reading)
    assert loss.value == pytest.approx(gold_loss(model, tasks[0]), rel=1e-5)


def gold_loss(model, task) -> float:
    """Brute force over the documents' texts: every target token after the harness's context."""
    tokenizer, nats, count = tiny_lm.tokenizer(), 0.0, 0
    for doc in [task.document_requests(d)[0].instance.doc for d in range(task.documents)]:
        context = tokenizer.encode(f"Question: {doc['question']}\nAnswer:")
        whole = tokenizer.encode(f"Question: {doc['question']}\nAnswer: {doc['answer']}")
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        targets = range(len(context), len(whole))
        nats -= sum(float(logits[i - 1, whole[i]]) for i in targets)
        count += len(targets)
    return nats / count


@pytest.mark.slow
@pytest.mark.parametrize("reading", [(0, "base"), (2, "trained")])
def test_equals_the_harness_command_line(
    reading: tuple[int, str], data: Path, tmp_path: Path
) -> None:
    """`lm_eval --model hf` on a folder: the base model, and the adapter merged into it."""
    rank, rule = reading
    tasks = load_tasks([("gsm8k", 3), ("arc_challenge", 3)], data_path=data, limit=4)
    plan = plan_points(tiny_lm.view(), [rank or 1], [rule if rank else "prefix"], [1, 2, 4])
    model, tokenizer = tiny_lm.adapt(tiny_lm.model()), tiny_lm.tokenizer()
    rows = run_sweep(model, tokenizer, tasks, plan, HFEngine(model, tokenizer, 3), tmp_path / "s")

    merged = merge(rank, rule) if rank else tiny_lm.model()
    merged.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    local_yaml(tmp_path / "yaml", "gsm8k", SHIPPED / "gsm8k" / "gsm8k.yaml", data / "gsm8k")
    local_yaml(
        *(tmp_path / "yaml", "arc_challenge", SHIPPED / "arc" / "arc_challenge.yaml"),
        data / "arc_challenge",
    )
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"]
    command += ["--tasks", "gsm8k,arc_challenge", "--include_path", str(tmp_path / "yaml")]
    command += ["--num_fewshot", "3", "--limit", "4", "--batch_size", "3", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | offline)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    for task in tasks:
        (path,) = (tmp_path / "out").rglob(f"samples_{task.name}_*.jsonl")
        samples = sorted(map(json.loads, path.open()), key=lambda sample: sample["doc_id"])
        assert len(samples) == 4 * len({sample["filter"] for sample in samples})
        assert_equal_to_harness(rows, tmp_path / "s", task, reading, results[task.name], samples)


# Files, resume, order


def test_rows_and_lines(data: Path, tmp_path: Path, plan: Plan) -> None:
    engine, told = FakeEngine(), []
    rows = sweep(
        data, tmp_path, engine, plan, on_point=lambda task, point, of, new: told.append((point, of))
    )
    documents = 7
    assert len({row.key for row in rows}) == len(rows) == 2 * 3 * len(plan.readings)
    assert next(r for r in rows if r.task == "gsm8k").key[3:-1] == (
        *("strict-match", 0, "base", "exact_match"),
    )
    for row in rows:
        assert row.n == documents
        assert np.mean(decode_scores(row.scores)) == pytest.approx(row.value, rel=1e-5)
    same = [r for r in rows if r.same_as]
    assert {(r.rank, r.rule, r.same_as) for r in same} == {(4, "svd", "trained@4")}
    twin = {r.key: r for r in rows}
    for row in same:
        other = twin[(*row.key[:4], 4, "trained", *row.key[6:])]
        assert (other.value, other.stderr, other.scores) == (row.value, row.stderr, row.scores)
    # Each point of each task is told once, with its rows; the first is the main metric.
    assert Counter(point for point, _ in told) == dict.fromkeys(plan.points, 2)
    assert sorted(r.key[4:] for _, of in told for r in of) == sorted(r.key[4:] for r in rows)
    assert {of[0].metric for _, of in told} == {"exact_match", "acc"}
    line = json.loads((tmp_path / "gsm8k-3.jsonl").read_text().split("\n")[0])
    assert list(line) == [
        *("rank", "rule", "doc_id", "hash", "outputs", "answers", "scores"),
        *("loss_sum", "target_tokens"),
    ]
    assert len((tmp_path / "gsm8k-3.jsonl").read_bytes().split(b"\n")) - 1 == documents * len(
        plan.points
    )


def test_order_and_mixing_do_not_matter(data: Path, tmp_path: Path, plan: Plan) -> None:
    rows = sweep(data, tmp_path / "a", FakeEngine(), plan)
    assert sweep(data, tmp_path / "b", FakeEngine(shuffle=1), plan) == rows
    backwards = plan_points(tiny_lm.view(), [4, 2, 1], RULES[::-1], tiny_lm.TRAIN_RANKS)
    other = sweep(data, tmp_path / "c", FakeEngine(shuffle=2), backwards)
    assert {row.key: row for row in other} == {row.key: row for row in rows}
    assert lines(tmp_path / "a") == lines(tmp_path / "b") == lines(tmp_path / "c")


@pytest.mark.parametrize("killed", [0, 1, 40, 150, 260])
def test_resume_asks_nothing_twice(killed: int, data: Path, tmp_path: Path, plan: Plan) -> None:
    whole = FakeEngine(shuffle=7)
    rows = sweep(data, tmp_path / "whole", whole, plan)
    first = FakeEngine(shuffle=7, fail_after=killed)
    with pytest.raises(RuntimeError, match="killed"):
        sweep(data, tmp_path / "cut", first, plan)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "cut").glob("*")}
    second = FakeEngine(shuffle=8)
    assert sweep(data, tmp_path / "cut", second, plan) == rows
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    for name, content in kept.items():  # only ever appended to
        assert (tmp_path / "cut" / name).read_bytes().startswith(content)
    # Only documents that were not complete are asked again.
    again = Counter(first.answered + second.answered)
    complete = {
        (s["rank"], s["rule"], s["doc_id"], name.rpartition("-")[0])
        for name, content in kept.items()
        for s in map(json.loads, content.decode().split("\n")[:-1])
    }
    assert not [a for a in again if again[a] > 1 and (a[0], a[1], a[3], a[5]) in complete]
    third = FakeEngine()
    assert sweep(data, tmp_path / "cut", third, plan) == rows
    assert third.answered == []


def test_torn_last_line_is_cut_off(data: Path, tmp_path: Path, plan: Plan) -> None:
    rows = sweep(data, tmp_path, FakeEngine(), plan)
    path = tmp_path / "arc_challenge-2.jsonl"
    whole = path.read_bytes()
    last = len(whole) - whole[:-1].rindex(b"\n") - 1
    for left in (whole[:-1], whole[: -last // 2], whole[:-last] + b"\0" * 9 + b"\n"):
        path.write_bytes(left)
        engine = FakeEngine()
        assert sweep(data, tmp_path, engine, plan) == rows
        assert path.read_bytes() == whole
        assert len({(a[0], a[1], a[3]) for a in engine.answered}) == 1


def test_damaged_file_is_named_and_left_alone(data: Path, tmp_path: Path, plan: Plan) -> None:
    sweep(data, tmp_path, FakeEngine(), plan, limit=2)
    path = tmp_path / "gsm8k-3.jsonl"
    for broken in (b"{", b'{"rank": 1}', b"[]"):
        damaged = path.read_bytes().split(b"\n")
        damaged[1] = broken
        path.write_bytes(b"\n".join(damaged))
        with pytest.raises(ValueError, match=r"gsm8k-3\.jsonl is damaged at line 2"):
            sweep(data, tmp_path, FakeEngine(), plan, limit=2)
        assert path.read_bytes() == b"\n".join(damaged)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scores": {}}, "it has no scores"),
        ({"scores": {"none": {}}}, "scores of filter 'none' are {}"),
        ({"scores": {"none": {"acc": float("nan")}}}, "acc is nan, not a number"),
        ({"scores": {"none": {"acc": float("inf")}}}, "acc is inf, not a number"),
        ({"scores": {"none": {"acc": None}}}, "acc is None, not a number"),
        ({"scores": {"none": {"acc": "1"}}}, "acc is '1', not a number"),
        ({"loss_sum": float("nan")}, "loss_sum is nan, not a number"),
        ({"loss_sum": None}, "loss_sum is None, but its target_tokens are 3"),
        ({"target_tokens": 0}, "target_tokens are 0"),
        ({"target_tokens": 1.5}, "target_tokens are 1.5"),
        ({"target_tokens": None}, "target_tokens are None"),
        ({"outputs": [None]}, "outputs are"),
        ({"doc_id": -1}, "'doc_id' is '-1'"),
        ({"rank": "2"}, "'rank' is '2'"),
        ({"hash": None}, "'hash': expected str"),
    ],
)
def test_a_line_that_would_change_n_or_a_mean_is_refused(
    changes: dict, match: str, data: Path, tmp_path: Path
) -> None:
    """Wherever it is: a last line is dropped only where it is not JSON."""
    (task,) = load_tasks([("arc_challenge", 0)], data_path=data, limit=3)
    model, tokenizer = tiny_lm.adapt(tiny_lm.model()), tiny_lm.tokenizer()
    plan = plan_points(tiny_lm.view(), [1], ["prefix"], [1])
    run_sweep(model, tokenizer, [task], plan, FakeEngine(), tmp_path)
    path = samples_path(tmp_path, task)
    whole = [json.loads(x) | {"target_tokens": 3} for x in path.read_text().splitlines()]
    for number in (2, len(whole)):
        damaged = [x | (changes if n == number else {}) for n, x in enumerate(whole, 1)]
        path.write_text("".join(json.dumps(x) + "\n" for x in damaged))
        content = path.read_bytes()
        with pytest.raises(
            UserError, match=rf"arc_challenge-0\.jsonl is damaged at line {number} "
        ) as e:
            run_sweep(model, tokenizer, [task], plan, FakeEngine(fail_after=0), tmp_path)
        assert match in str(e.value)
        assert path.read_bytes() == content


def test_scores_in_memory_are_those_that_are_read_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = load_tasks([("gsm8k", 0)], data_path=data, limit=2)
    task.requests(harness_lm(tiny_lm.model(2048), tiny_lm.tokenizer()))
    values = {
        "acc": np.float32(1 / 3),
        "f1": (np.int64(1), [2.0, (np.bool_(True), "é\u2028", None)]),
        "by_kind": {1: np.array([0.1, float("inf")]), None: {"a": Path("x")}, 2.5: 1e-300},
    }
    monkeypatch.setattr(task._task, "process_results", lambda doc, results: values)
    point = plan_points(tiny_lm.view(), [1], ["prefix"], [1]).points[1]
    store = Samples(tmp_path, task, "a")
    with store.appending() as append:
        for doc_id in range(2):
            outputs = [Output(text="7 \n"), Output(logprob=-1 / 3)]
            append(point, doc_id, outputs, task.score(doc_id, outputs))
    read = Samples(tmp_path, task, "a")
    assert read.missing(point) == store.missing(point) == set()
    assert read.scores(point) == store.scores(point)
    assert repr(read.scores(point)) == repr(store.scores(point))
    assert Samples(tmp_path, task, "b").missing(point) == {0, 1}


def test_a_score_that_could_not_be_read_again_is_not_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = load_tasks([("arc_challenge", 0)], data_path=data, limit=1)
    task.requests(harness_lm(tiny_lm.model(2048), tiny_lm.tokenizer()))
    point = plan_points(tiny_lm.view(), [1], ["prefix"], [1]).points[1]
    store = Samples(tmp_path, task, "")
    outputs = [Output(logprob=-1.0) for _ in task.document_requests(0)]
    for made, match in (({"acc": np.nan}, "acc is nan"), ({}, "it has no scores")):
        monkeypatch.setattr(task._task, "process_results", lambda doc, results, made=made: made)
        with store.appending() as append, pytest.raises(UserError, match=f"document 0.*{match}"):
            append(point, 0, outputs, task.score(0, outputs))
    assert store.path.read_bytes() == b"" and store.missing(point) == {0}


def test_rows_of_a_group_come_when_its_last_task_is_complete(data: Path, tmp_path: Path) -> None:
    rng, folder = random.Random(0), tmp_path / "data"
    index = TaskManager(include_path=SHIPPED / "mmlu", include_defaults=False).task_index
    names = sorted(index["mmlu_humanities_tasks"].tags)
    for member in names:
        documents = [
            {"question": f"{member} {n}?", "choices": list("wxyz"), "answer": rng.randrange(4)}
            for n in range(2)
        ]
        tiny_lm.write_jsonl(folder / member.removeprefix("mmlu_") / "test.jsonl", documents)
    model, tokenizer = tiny_lm.adapt(tiny_lm.model(2048)), tiny_lm.tokenizer()
    plan = plan_points(tiny_lm.view(), [1, 4], ["prefix", "svd"], tiny_lm.TRAIN_RANKS)

    def once(engine: FakeEngine) -> tuple[list[Row], list[tuple[str, Point, list[Row]]]]:
        told = []
        tasks = load_tasks([("mmlu_humanities", 0)], data_path=folder)
        rows = run_sweep(
            *(model, tokenizer, tasks, plan, engine, tmp_path / "samples"),
            on_point=lambda source, point, of, new: told.append((source.name, point, of)),
        )
        return rows, told

    with pytest.raises(RuntimeError, match="killed"):
        once(FakeEngine(shuffle=1, fail_after=300))
    rows, told = once(FakeEngine(shuffle=2))
    assert Counter((name, point) for name, point, _ in told) == {
        (name, point): 1 for name in ("mmlu_humanities", *names) for point in plan.points
    }
    for point in plan.points:  # the group's last, right behind its last task
        assert [name for name, p, _ in told if p == point][-1] == "mmlu_humanities"
    # What is told is what is returned, each row once; the group's stand before its tasks'.
    assert Counter(map(repr, rows)) == Counter(repr(row) for _, _, of in told for row in of)
    assert list(dict.fromkeys(row.task for row in rows)) == ["mmlu_humanities", *names]
    again, _ = once(FakeEngine(fail_after=0))
    assert again == rows


def test_rows_are_read_without_anything_heavy() -> None:
    code = "import sys, matryoshka_lora.evaluation.rows; print(*sys.modules)"
    package = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": package},
    )
    assert not {"torch", "lm_eval", "transformers", "accelerate"} & set(done.stdout.split())


def test_documents_that_lack_a_metric_are_counted(data: Path, tmp_path: Path, caplog) -> None:
    """As in the harness the rows are over those that have it; n says so, and a line does."""
    (task,) = load_tasks([("arc_challenge", 0)], data_path=data, limit=3)
    model, tokenizer = tiny_lm.adapt(tiny_lm.model()), tiny_lm.tokenizer()
    plan = plan_points(tiny_lm.view(), [1], ["prefix"], [1])
    run_sweep(model, tokenizer, [task], plan, FakeEngine(), tmp_path)
    assert "documents have no" not in caplog.text
    path = samples_path(tmp_path, task)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    del found[0]["scores"]["none"]["acc_norm"]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in found))
    rows = run_sweep(model, tokenizer, [task], plan, FakeEngine(), tmp_path)
    assert {row.n for row in rows if row.metric == "acc"} == {3}
    assert sorted(row.n for row in rows if row.metric == "acc_norm") == [2, 3]
    assert caplog.text.count("documents have no") == 1
    assert "task arc_challenge: 1 of 3 documents have no acc_norm, and its rows" in caplog.text


def test_changed_data_limit_or_adapter_is_noticed(data: Path, tmp_path: Path, plan: Plan) -> None:
    folder = tmp_path / "samples"
    sweep(data, folder, FakeEngine(), plan, limit=3, identity="a")
    engine = FakeEngine()
    rows = sweep(data, folder, engine, plan, limit=5, identity="a")
    assert {a[3] for a in engine.answered} == {3, 4}  # the first three are there
    assert {(row.limit, row.n) for row in rows} == {(5, 5)}
    engine = FakeEngine()
    shorter = sweep(data, folder, engine, plan, limit=3, identity="a")
    assert engine.answered == [] and {row.n for row in shorter} == {3}

    changed = tiny_lm.write_data(tmp_path / "data")
    path = changed / "gsm8k" / "test.jsonl"
    questions = [json.loads(x) for x in path.open()]
    questions[1]["answer"] += "0"
    tiny_lm.write_jsonl(path, questions)
    engine = FakeEngine()
    sweep(changed, folder, engine, plan, limit=3, identity="a")
    assert {(a[3], a[5]) for a in engine.answered} == {(1, "gsm8k")}
    engine = FakeEngine()
    sweep(changed, folder, engine, plan, limit=3, identity="b")
    assert {(a[3], a[5]) for a in engine.answered} == {
        (doc, name) for doc in range(3) for name in ("gsm8k", "arc_challenge")
    }


def test_random_states_are_left_alone(data: Path, tmp_path: Path, plan: Plan) -> None:
    class Reseeding(FakeEngine):
        def run(self, jobs, parts=None):
            random.seed(0), np.random.seed(0), torch.manual_seed(0)
            return super().run(jobs, parts)

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    sweep(data, tmp_path, Reseeding(), plan, limit=1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == before


def test_values_that_are_no_numbers_are_null(data: Path, tmp_path: Path) -> None:
    class Broken(FakeEngine):
        def run(self, jobs, parts=None):
            for index, output in super().run(jobs, parts):
                yield index, Output(text=output.text, logprob=float("nan"))

    plan = plan_points(tiny_lm.view(), [1], ["prefix"], [1])
    rows = sweep(data, tmp_path, Broken(), plan, limit=2)
    for row in rows:
        if row.metric == "loss":
            assert (row.value, row.stderr, row.scores) == (None, None, None)
        else:
            assert row.value is not None
    assert sweep(data, tmp_path, FakeEngine(fail_after=0), plan, limit=2) == rows


def test_engine_is_closed_before_the_factors_go_back(data: Path, tmp_path: Path) -> None:
    """An engine may hold parts of the model, and an interrupt may come at any time."""
    (task,) = load_tasks([("arc_challenge", 0)], data_path=data, limit=2)
    model = tiny_lm.adapt(tiny_lm.model())
    layer = next(iter(adapter_layers(model).values()))
    trained, seen = layer.lora_A.data_ptr(), []

    class Holding(FakeEngine):
        def run(self, jobs, parts=None):
            try:
                yield from super().run(jobs, parts)
            finally:
                seen.append(layer.lora_A.data_ptr() == trained)

    def interrupt(task, point, rows, computed):
        if point.factors == "svd":
            raise KeyboardInterrupt

    plan = plan_points(tiny_lm.view(), [1, 2], ["svd"], [1, 2])
    with pytest.raises(KeyboardInterrupt):
        run_sweep(
            *(model, tiny_lm.tokenizer(), [task], plan, Holding(), tmp_path), on_point=interrupt
        )
    assert seen == [True, False]
    assert layer.lora_A.data_ptr() == trained


# Several processes

WORKER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
import test_sweep, tiny_lm
from matryoshka_lora.evaluation import sharing
data, out = Path(sys.argv[2]), Path(sys.argv[3])
sharing.SEND_SECONDS = 0.03
processes = Accelerator(cpu=True)
assert processes.num_processes == 2
plan = test_sweep.plan_points(tiny_lm.view(), (1, 4), test_sweep.RULES, tiny_lm.TRAIN_RANKS)
for name, lockstep in (("sharded", False), ("lockstep", True)):
    for attempt in ("first", "again"):
        slow = processes.process_index == 1 and not lockstep
        engine = test_sweep.FakeEngine(processes.process_index, seconds=0.02 * slow)
        engine.lockstep = lockstep
        rows = test_sweep.sweep(data, out / name, engine, plan, processes=processes)
        result = {"rows": [vars(row) for row in rows], "answered": engine.answered}
        path = out / f"{name}-{attempt}-{processes.process_index}.json"
        path.write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes_give_the_same_rows(data: Path, tmp_path: Path) -> None:
    plan = plan_points(tiny_lm.view(), (1, 4), RULES, tiny_lm.TRAIN_RANKS)
    alone = FakeEngine()
    rows = [vars(row) for row in sweep(data, tmp_path / "alone", alone, plan)]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script), str(Path(__file__).parent), str(data)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    package = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([package, environment.get("PYTHONPATH", "")])
    subprocess.run([*command, str(tmp_path)], check=True, env=environment)

    def result(name: str, process: int) -> dict:
        return json.loads((tmp_path / f"{name}-{process}.json").read_text())

    for name in ("sharded", "lockstep"):
        assert result(f"{name}-first", 0)["rows"] == rows
        assert result(f"{name}-first", 1)["rows"] == []
        assert lines(tmp_path / name) == lines(tmp_path / "alone")
        assert result(f"{name}-again", 0) == {"rows": rows, "answered": []}
        assert result(f"{name}-again", 1) == {"rows": [], "answered": []}
    fast, slow = (result("sharded-first", process)["answered"] for process in (0, 1))
    assert len(fast) + len(slow) == len(alone.answered)
    assert 0 < len(slow) < len(fast) / 2  # who is slow takes less
    # All that is asked of a document at a point goes to one process.
    assert not {(a[0], a[1], a[3], a[5]) for a in map(tuple, fast)} & {
        (a[0], a[1], a[3], a[5]) for a in map(tuple, slow)
    }
    for process in (0, 1):
        answered = result("lockstep-first", process)["answered"]
        assert len(answered) == len(alone.answered)


def test_answers_are_scored_in_the_main_thread(
    data: Path, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graders of the harness set alarms, which other threads cannot."""
    threads = []
    original = EvalTask.score

    def score(self, *args):
        threads.append(threading.current_thread())
        return original(self, *args)

    monkeypatch.setattr(EvalTask, "score", score)
    sweep(data, tmp_path, FakeEngine(), plan, limit=2)
    assert threads and set(threads) == {threading.main_thread()}
