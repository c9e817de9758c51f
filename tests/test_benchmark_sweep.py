"""The benchmark of the sweep: both systems answer alike, its arithmetic and record are right."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_common import fill_factors
from conftest import ROOT, TARGETS

from matryoshka_lora.cli import exit_with_one_line, parse_options
from matryoshka_lora.config import Config, ModelConfig
from matryoshka_lora.core.adapter import adapter_view, add_adapters
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.evaluation.engines.batched.engine import BatchedEngine
from matryoshka_lora.evaluation.engines.hf import HFEngine
from matryoshka_lora.evaluation.engines.protocol import Output, Point, Request
from matryoshka_lora.evaluation.readings import plan_points
from matryoshka_lora.models import load_model
from matryoshka_lora.pipeline import run
from matryoshka_lora.runs.provenance import environment

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[1] / "scripts" / "benchmark_sweep.py"
    spec = importlib.util.spec_from_file_location("benchmark_sweep", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_sweep"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.TRAIN_PROBLEMS = 20
    module.matmul_rate = lambda device, dtype: 1e9
    return module


def main(benchmark, arguments):
    return benchmark.main(parse_options(benchmark.Options, arguments))


def test_both_systems_end_each_answer_at_its_cap(benchmark, monkeypatch):
    model = load_model(ModelConfig(random_weights=True), CPU).double()
    add_adapters(model, AdapterSpec(4, "none", (1.0,) * 4, True), TARGETS, dtype=torch.float64)
    fill_factors(model)
    tokenizer = benchmark.word_tokenizer(model.config.vocab_size)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    task, requests = benchmark.random_gsm8k(model, tokenizer, shots=1, documents=4)
    caps = {request.context: request.max_new_tokens for request in requests}
    assert len(set(caps.values())) > 2
    batches = []
    generate = model.generate

    def counted(**options):
        batches.append(len(options["input_ids"]))
        return generate(**options)

    monkeypatch.setattr(model, "generate", counted)
    points = plan_points(adapter_view(model), [1, 4], ["prefix"], [1, 2, 4]).points[1:]
    jobs = [(point, request) for point in points for request in requests]
    with benchmark.capped(model, caps):
        _, hf = benchmark.answer(HFEngine(model, tokenizer, 3), task, jobs, CPU)
    scored = []
    monkeypatch.setattr(task, "score", lambda doc, outputs: scored.append((doc, *outputs)))
    _, batched = benchmark.answer(BatchedEngine(model, tokenizer), task, jobs, CPU)

    assert hf == batched and len(hf) == 8
    assert batches == [3, 1] * 2  # the harness's own batches, whatever the caps
    for (_, request), output in hf.items():
        assert (request.doc_id, output, Output()) in scored  # the loss is not asked for
        said = tokenizer(output.text).input_ids
        assert 0.9 * request.max_new_tokens <= len(said) <= request.max_new_tokens
    assert model.generate is counted


def test_prompts_have_the_lengths_of_their_problems(benchmark, tmp_path):
    tokenizer = benchmark.word_tokenizer(50)
    caps = benchmark.write_problems(tmp_path, 5, 50)
    lengths = benchmark.gsm8k_lengths(5, seed=2).tolist()
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    for row, (question, answer), cap in zip(rows, lengths, caps, strict=True):
        text = f"Question: {row['question']}\nAnswer:"
        assert len(tokenizer(text).input_ids) == question
        assert len(tokenizer(row["answer"]).input_ids) == answer == cap


def request(context: int) -> Request:
    return Request("generate", 0, (1,) * context, (), (), 1, instance=None)  # type: ignore[arg-type]


def test_the_sample_is_whole_batches_from_long_to_short(benchmark):
    requests = [request(n) for n in range(1, 11)]
    found = benchmark.some_batches(requests, 2, 4)  # 2 of the 5 batches: those in the middle
    assert [len(r.context) for r in found] == [8, 7, 4, 3]
    assert len(benchmark.some_batches(requests, 4, 1)) == 4
    assert len(benchmark.some_batches(requests, 4, 100)) == 8
    assert len(benchmark.some_batches(requests, 32, 64)) == 10


def test_the_sample_is_extrapolated_to_all_answers(benchmark):
    # 2 s for 8 answers are 0.25 s an answer, 3 s for 12 of them.
    found = benchmark.figures(1.5, 12, prompts=[3, 5], n=36)
    assert found | benchmark.hf_figures(1.5, 12, 2.0, 8) == {
        "prompt_tokens": {"mean": 4.0, "max": 5},
        "answer_tokens": 3.0,
        "seconds": 1.5,
        "answers_per_second": 8.0,
        "tokens_per_second": 24.0,
        "hf_seconds": 2.0,
        "hf_seconds_for_all": 3.0,
        "extrapolated": True,
        "ratio": 2.0,
    }
    assert not benchmark.hf_figures(1.0, 8, 2.0, 8)["extrapolated"]


def test_shapes_and_runs_share_one_record(benchmark, tmp_path, capsys):
    output = [f"output={tmp_path / 'benchmarks'}", "baseline_documents=2"]
    shape = ["shape=tiny", "shots=0", "rank=4", "ranks=[1,4]", "documents=3", "batch_size=2"]
    assert main(benchmark, [*shape, *output]) == 0
    few = ["documents=2" if option == "documents=3" else option for option in shape]
    assert main(benchmark, [*few, *output, "baseline=false"]) == 0
    config = Config(output_dir=str(tmp_path))
    config.trainer.max_steps, config.dataset.limit, config.adapter.rank = 2, 64, 2
    config.eval.rules = ["prefix", "svd"]
    run(config)
    (folder,) = (path.parent for path in tmp_path.glob("runs/**/record.json"))
    of_run = [f"run={folder}", "tasks=[arithmetic_word_problems:0]", "limit=3"]
    assert main(benchmark, [*of_run, *output, "batch_sizes=[1,2,64]", "baseline_points=2"]) == 0

    entries = json.loads((tmp_path / "benchmarks" / "sweep.json").read_text())["entries"]
    device = environment()["device"]["name"]
    assert all(key.endswith(f" on {device}") for key in entries)
    entries = {key.removesuffix(f" on {device}"): entry for key, entry in entries.items()}
    alone = entries.pop("tiny-r4-0shot-2")
    assert alone["processes"] == 1 and alone["seconds"] > 0 and "ratio" not in alone
    run_key, shape_key = sorted(entries, key=lambda key: key.startswith("tiny"))
    assert shape_key == "tiny-r4-0shot-3" and run_key.endswith("arithmetic_word_problems-0shot-3")
    found = entries[shape_key]
    assert found["points"] == "2 of the 3 ranks" and found["extrapolated"]
    assert found["hf_seconds_for_all"] == pytest.approx(found["hf_seconds"] * (2 * 3) / 2)
    found = entries[run_key]
    # The base, and two ranks under two rules.
    assert found["points"] == "5" and found["hf_sample"] == "2 documents at 2 points"
    assert found["hf_seconds_for_all"] == pytest.approx(found["hf_seconds"] * 5 * 3 / (2 * 2))
    assert sorted(found["hf_seconds_by_batch_size"]) == ["1", "2"]  # no batch holds 64
    for alike in (found["agreement"], found["hf_with_itself"]):
        assert (alike["answers"], alike["same_scores"], alike["same_texts"]) == (4, 1.0, 1.0)
        assert 0 <= alike["logprob_difference"] < 1e-3
    table = (tmp_path / "benchmarks" / "sweep.md").read_text()
    assert run_key in table and "2 of the 3 ranks" in table and "(extrapolated)" in table
    assert "nan" not in table
    assert capsys.readouterr().out.endswith(table.partition("\n\n")[2])
    assert str(tmp_path) not in json.dumps(entries)


@pytest.mark.slow
def test_several_processes_give_the_same_answers(benchmark, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = "baseline=false shape=tiny shots=0 rank=4 documents=6".split()
    for count, sharded in ((1, "false"), (2, "false"), (2, "true")):
        subprocess.run(
            [
                *(*launch, f"--nproc_per_node={count}", benchmark.__file__),
                *(*options, f"sharded={sharded}", f"output={tmp_path}"),
            ],
            env=os.environ
            | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            check=True,
        )
    entries = json.loads((tmp_path / "sweep.json").read_text())["entries"]
    assert len({entry["answers_sha"] for entry in entries.values()}) == 1
    assert sorted(entry["processes"] for entry in entries.values()) == [1, 2, 2]


def test_agreement_is_counted(benchmark):
    point = Point(1, "prefix", "trained", torch.ones(1))
    documents = [
        [Request("generate", d, (1,), target, (), 1, None) for target in ((), (5,))]
        for d in range(4)
    ]
    task = SimpleNamespace(
        document_requests=lambda doc: documents[doc],
        score=lambda doc, outputs: SimpleNamespace(values={("none", "em"): outputs[0].text == "7"}),
        aggregate=lambda metric, values: SimpleNamespace(value=sum(values) / len(values)),
    )

    def side(texts, logprob):
        return {
            (point, request): Output(logprob=logprob) if request.target else Output(text=text)
            for text, requests in zip(texts, documents, strict=True)
            for request in requests
        }

    found = benchmark.agreement(task, side("7772", -2.0), side("7713", -1.5))
    assert found == {
        "answers": 4,
        "metric": "em",
        "value": 0.75,
        "hf_value": 0.5,
        "same_scores": 0.75,
        "same_texts": 0.5,
        "logprob_difference": 0.5,
    }


def test_batch_sizes_that_do_not_fit_are_left_out(benchmark, monkeypatch):
    def sample(model, tokenizer, task, points, requests, size, warm_up):
        if size > 4:
            raise torch.OutOfMemoryError("too large")
        asked.append((size, warm_up))
        return size, {}

    asked = []
    requests = [SimpleNamespace(kind="loglikelihood")] * 16
    task = SimpleNamespace(document_requests=lambda doc: requests)
    monkeypatch.setattr(benchmark, "hf_sample", sample)
    found = benchmark.hf_backend(None, None, task, [], 1, [8, 4, 2, 32])
    assert found == {4: (4, {}), 2: (2, {})} and asked == [(4, True), (2, False)]
    with pytest.raises(ValueError, match="do not fit the device; give smaller ones"):
        benchmark.hf_backend(None, None, task, [], 1, [8])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["shape=llama8b"],
            "shape=llama8b is unknown; allowed: llama3_70b, llama3_8b, llama3_1b, ",
        ),
        (["shpae=tiny"], "(did you mean shape or sharded?)"),
        (["documents=many"], "'many'"),
        (["documents=0"], "documents=0 must be 1 or more"),
        (["batch_sizes=[]"], "batch_sizes=[] must be numbers of 1 or more"),
        (["shape=tiny", "run=results"], "measure one at a time"),
        (["run=nowhere"], "run=nowhere holds no record.json"),
        (["shape=tiny", "rank=4", "ranks=[8]"], "8"),
        (["shape=tiny", "rank=4", "shots=-1"], "shots must be 0 or more, got -1"),
    ],
)
def test_mistakes_give_one_line(benchmark, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exited, exit_with_one_line():
        main(benchmark, [*arguments, f"output={tmp_path}"])
    assert exited.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
