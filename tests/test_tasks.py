"""Tasks against the harness itself: prompts, tokens, scores, aggregates; and every bad input."""

import json
import random
from pathlib import Path

import lm_eval
import lm_eval.tasks
import numpy as np
import pytest
import tiny_lm
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from matryoshka_lora.evaluation.engines.hf import harness_lm
from matryoshka_lora.evaluation.engines.protocol import Output
from matryoshka_lora.evaluation.rows import loss_aggregate
from matryoshka_lora.evaluation.tasks import EvalTask, load_tasks

SHIPPED = Path(lm_eval.tasks.__file__).parent
SHARED = Path(__file__).parents[2] / "shared" / "data"
YAML = {
    "gsm8k": ("gsm8k/gsm8k.yaml", ("train", "test")),
    "arc_challenge": ("arc/arc_challenge.yaml", ("train", "test")),
    "hellaswag": ("hellaswag/hellaswag.yaml", ("train", "validation")),
    "winogrande": ("winogrande/default.yaml", ("train", "validation")),
}
SUBJECTS = ("formal_logic", "philosophy", "prehistory")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a subfolder a task, in the hub's schemas."""
    folder = tiny_lm.write_data(tmp_path_factory.mktemp("data"))
    rng = random.Random(5)
    for split, count in (("train", 9), ("validation", 6)):
        rows = [
            {
                "ind": n,
                "activity_label": "Cooking",
                "ctx_a": f"{rng.choice(tiny_lm.NAMES)} opens the [header] pot.",
                "ctx_b": "then she",
                "endings": [f"eats {k} {rng.choice(tiny_lm.THINGS)}." for k in range(4)],
                "label": str(rng.randrange(4)),
            }
            for n in range(count)
        ]
        tiny_lm.write_jsonl(folder / "hellaswag" / f"{split}.jsonl", rows)
        rows = [
            {
                "sentence": f"Ada met Eve at {n} because _ had the {rng.choice(tiny_lm.THINGS)}.",
                "option1": "Ada",
                "option2": "Eve",
                "answer": rng.choice("12"),
            }
            for n in range(count)
        ]
        tiny_lm.write_jsonl(folder / "winogrande" / f"{split}.jsonl", rows)
    for size, subject in enumerate(SUBJECTS, 3):
        for split, count in (("dev", 5), ("test", size)):
            rows = [
                {
                    "question": f"{subject} {rng.randrange(99)}?",
                    "choices": [rng.choice(tiny_lm.THINGS) for _ in range(4)],
                    "answer": rng.randrange(4),
                }
                for _ in range(count)
            ]
            tiny_lm.write_jsonl(folder / "mmlu" / subject / f"{split}.jsonl", rows)
    return folder


def harness_config(name: str, data: Path, shots: int | None = None) -> dict:
    """The shipped task on local files, in the way that the harness's documentation gives."""
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {s: str(data / name / f"{s}.jsonl") for s in YAML[name][1]}
        },
        **({} if shots is None else {"num_fewshot": shots}),
    }


def harness_manager(folder: Path, data: Path) -> TaskManager:
    for name, (path, _) in YAML.items():
        config = {"include": str(SHIPPED / path), "task": name, **harness_config(name, data)}
        (folder / f"{name}.yaml").write_text(json.dumps(config))
    return TaskManager(include_path=folder, include_defaults=False)


class Recorder(HFLM):
    """What the harness's HF backend really feeds to the model."""

    def _model_call(self, inps, attn_mask=None, labels=None):
        self.fed.append(tuple(inps[0].tolist()))
        return torch.zeros(*inps.shape, 400)

    def _model_generate(self, context, max_length, stop, **options):
        self.fed.append((tuple(context[0].tolist()), tuple(stop), max_length - context.shape[1]))
        return context


class Replay(LM):
    """Answers that the harness's `evaluate` gets: the same ones that go into `score`."""

    def __init__(self, answers: dict[str, list]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answers[r.task_name][r.doc_id][0].text for r in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        outputs = [self.answers[r.task_name][r.doc_id][r.idx] for r in requests]
        return [(output.logprob, output.is_greedy) for output in outputs]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def made_up_outputs(task: EvalTask, seed: int = 3) -> list[list[Output]]:
    """Right, wrong and unparsable answers, and random log-likelihoods."""
    rng = random.Random(seed)
    made = []
    for doc_id in range(task.documents):
        outputs = []
        for request in task.document_requests(doc_id):
            if request.kind == "generate":
                gold = request.instance.doc["answer"]
                text = rng.choice([gold, gold[:-1] + "7", "", "it is $1,234.", gold.split("#")[0]])
                outputs.append(Output(text=text))
            else:
                outputs.append(Output(logprob=-rng.uniform(1, 30), is_greedy=rng.random() < 0.5))
        made.append(outputs)
    return made


@pytest.mark.parametrize("window", [2048, 300])
@pytest.mark.parametrize("name", list(YAML))
def test_prompts_and_tokens_are_those_that_the_harness_feeds(
    name: str, window: int, data: Path, tmp_path: Path
) -> None:
    model, tokenizer = tiny_lm.model(window), tiny_lm.tokenizer()
    (task,) = load_tasks([(name, 3)], data_path=data)
    requests = task.requests(harness_lm(model, tokenizer))

    theirs = harness_manager(tmp_path, data).load([name])["tasks"][name]
    theirs.set_config("num_fewshot", 3)
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests()
    own = [r.instance for r in requests]
    asked = [instance.args for instance in own]
    if name == "gsm8k":
        losses = [i for i in own if i.request_type == "loglikelihood"]
        assert [i.args[0] for i in losses] == [i.args[0] for i in theirs.instances]
        assert [i.args[1] for i in losses] == [" " + i.doc["answer"] for i in theirs.instances]
        asked = [i.args for i in own if i.request_type == "generate_until"]
    assert asked == [i.args for i in theirs.instances]

    lm = Recorder(pretrained=model, tokenizer=tiny_lm.tokenizer(), batch_size=1)
    for request in requests:
        lm.fed = []
        if request.kind == "generate":
            lm.generate_until([request.instance], disable_tqdm=True)
            assert lm.fed == [(request.context, request.until, request.max_new_tokens)]
        else:
            lm.loglikelihood([request.instance], disable_tqdm=True)
            assert lm.fed == [request.context + request.target[:-1]]
    cut = {r.doc_id for r in requests if len(r.context) + len(r.target) >= 300}
    if window == 2048:
        assert task.truncated == 0
    elif name == "gsm8k":  # 300 tokens less 256 for the answer
        assert task.truncated == task.documents
        assert {len(r.context) for r in requests if r.kind == "generate"} == {44}
    else:
        assert task.truncated == len(cut)


def test_prompts_are_the_same_each_time_and_for_any_limit(data: Path) -> None:
    lm = harness_lm(tiny_lm.model(), tiny_lm.tokenizer())
    tasks = load_tasks([("gsm8k", 3), ("gsm8k", 0), ("gsm8k", 2)], data_path=data)
    (short,) = load_tasks([("gsm8k", 3)], data_path=data, limit=4)
    contexts = [[r.context for r in task.requests(lm)] for task in tasks]
    again = harness_lm(tiny_lm.model(), tiny_lm.tokenizer())
    assert [[r.context for r in task.requests(again)] for task in tasks] == contexts
    assert [r.context for r in short.requests(lm)] == contexts[0][:8]
    assert short.documents == 4
    assert tasks[0].documents == 7
    assert [short.document_fingerprint(d) for d in range(4)] == [
        tasks[0].document_fingerprint(d) for d in range(4)
    ]
    assert tasks[0].document_fingerprint(0) != tasks[2].document_fingerprint(0)


@pytest.mark.parametrize("name", list(YAML))
def test_scores_and_aggregates_equal_evaluate(name: str, data: Path, tmp_path: Path) -> None:
    (task,) = load_tasks([(name, 3)], data_path=data, limit=6)
    task.requests(harness_lm(tiny_lm.model(2048), tiny_lm.tokenizer()))
    outputs = made_up_outputs(task)
    result = lm_eval.simple_evaluate(
        model=Replay({name: outputs}),
        tasks=[name],
        num_fewshot=3,
        limit=6,
        task_manager=harness_manager(tmp_path, data),
    )
    scores = [task.score(doc_id, out) for doc_id, out in enumerate(outputs)]
    expected = {
        (s["doc_id"], None if s["filter"] == "none" else s["filter"], metric): s[metric]
        for s in result["samples"][name]
        for metric in s["metrics"]
    }
    own = {
        (d, *key): value for d, score in enumerate(scores) for key, value in score.values.items()
    }
    assert own == expected
    for key in scores[0].values:
        aggregate = task.aggregate(key, [score.values[key] for score in scores])
        suffix = key[0] or "none"
        assert aggregate.value == result["results"][name][f"{key[1]},{suffix}"]
        assert aggregate.stderr == result["results"][name][f"{key[1]}_stderr,{suffix}"]
        assert aggregate.n == 6
    if name == "gsm8k":
        for sample in result["samples"][name]:
            answer = scores[sample["doc_id"]].answers[sample["filter"]]
            assert [answer] == sample["filtered_resps"]
        assert {v for s in scores for v in s.values.values()} == {0.0, 1.0}
    assert str(task.version) == str(result["versions"][name])


def test_loss_is_that_of_the_gold_choice(data: Path) -> None:
    tasks = load_tasks([(n, 0) for n in ("arc_challenge", "winogrande", "gsm8k")], data_path=data)
    for task in tasks:
        task.requests(harness_lm(tiny_lm.model(2048), tiny_lm.tokenizer()))
        outputs = made_up_outputs(task)
        for doc_id, out in enumerate(outputs):
            doc = task.document_requests(doc_id)[0].instance.doc
            gold = {
                "arc_challenge": lambda d: d["choices"]["label"].index(d["answerKey"]),
                "winogrande": lambda d: int(d["answer"]) - 1,
                "gsm8k": lambda d: 1,
            }[task.name](doc)
            tokens = len(task.document_requests(doc_id)[gold].target)
            assert task.score(doc_id, out).loss == (-out[gold].logprob, tokens)


def test_group_rows_equal_the_harness(data: Path, tmp_path: Path) -> None:
    """A group over local files against the same group in the harness's own terms."""
    tasks = load_tasks([(f"mmlu_{s}", 2) for s in SUBJECTS], data_path=data / "mmlu")
    assert [t.documents for t in tasks] == [3, 4, 5]
    with pytest.raises(ValueError, match="mmlu_abstract_algebra"):
        load_tasks([("mmlu", 5)], data_path=data)  # the other 54 subjects have no files

    index = TaskManager(include_path=SHIPPED / "mmlu", include_defaults=False).task_index
    humanities = sorted(index["mmlu_humanities_tasks"].tags)
    rng = random.Random(0)
    folder = tmp_path / "data"
    for size, member in enumerate(humanities, 2):
        for split, count in (("dev", 5), ("test", size % 4 + 2)):
            rows = [
                {"question": f"{member} {n}?", "choices": list("wxyz"), "answer": rng.randrange(4)}
                for n in range(count)
            ]
            tiny_lm.write_jsonl(
                folder / "mmlu" / member.removeprefix("mmlu_") / f"{split}.jsonl", rows
            )
    tasks = load_tasks([("mmlu_humanities", 2)], data_path=folder)
    assert [task.name for task in tasks] == humanities
    answers, members = {}, {}
    for task in tasks:
        task.requests(harness_lm(tiny_lm.model(2048), tiny_lm.tokenizer()))
        answers[task.name] = made_up_outputs(task, seed=len(answers))
        scores = [task.score(d, out) for d, out in enumerate(answers[task.name])]
        members[task.name] = {
            key: task.aggregate(key, [s.values[key] for s in scores]) for key in scores[0].values
        }
    (group,) = tasks[0].groups
    own = group.aggregate(members)[(None, "acc")]

    local = [
        {
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {
                    s: str(folder / "mmlu" / name.removeprefix("mmlu_") / f"{s}.jsonl")
                    for s in ("dev", "test")
                }
            },
        }
        for name in humanities
    ]
    config = {"group": "all", "task": local, "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "all.yaml").write_text(json.dumps(config))
    paths = [SHIPPED / "mmlu", tmp_path / "harness"]
    result = lm_eval.simple_evaluate(
        model=Replay(answers),
        tasks=["all"],
        num_fewshot=2,
        task_manager=TaskManager(include_path=paths, include_defaults=False),
    )
    assert own.value == result["results"]["all"]["acc,none"]
    assert own.stderr == result["results"]["all"]["acc_stderr,none"]
    assert own.n == sum(task.documents for task in tasks) == result["results"]["all"]["sample_len"]
    assert group.name == "mmlu_humanities"
    assert group.weights_documents("acc")


def test_loss_aggregate_by_hand() -> None:
    losses = [(6.0, 3), (2.0, 2), (10.0, 5)]
    aggregate, scores = loss_aggregate(losses)
    assert aggregate.value == pytest.approx(1.8)
    assert np.mean(scores) == pytest.approx(1.8)
    assert aggregate.stderr == pytest.approx(np.std(scores, ddof=1) / np.sqrt(3))
    residuals = [6 - 1.8 * 3, 2 - 1.8 * 2, 10 - 1.8 * 5]
    assert aggregate.stderr == pytest.approx(np.sqrt(3 / 2 * np.square(residuals).sum()) / 10)
    assert loss_aggregate([(4.0, 2)])[0].stderr is None


def test_json_and_parquet_read_as_jsonl(data: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lm = harness_lm(tiny_lm.model(), tiny_lm.tokenizer())
    (reference,) = load_tasks([("arc_challenge", 2)], data_path=data)
    expected = [r.instance.args for r in reference.requests(lm)]
    rows = {
        split: [json.loads(x) for x in (data / f"arc_challenge/{split}.jsonl").open()]
        for split in ("train", "test")
    }
    (tmp_path / "train.json").write_text(json.dumps(rows["train"]))
    table = pyarrow.Table.from_pylist(rows["test"])
    pyarrow.parquet.write_table(table, tmp_path / "test.parquet")
    (task,) = load_tasks([("arc_challenge", 2)], data_path=tmp_path)
    assert [r.instance.args for r in task.requests(lm)] == expected


def test_own_task(data: Path) -> None:
    (task,) = load_tasks([("arithmetic_word_problems", 0)], data_path=data / "gsm8k")
    requests = task.requests(harness_lm(tiny_lm.model(), tiny_lm.tokenizer()))
    assert requests[0].max_new_tokens == 64
    assert requests[0].instance.args[0].endswith("\nAnswer:")


def test_random_states_are_left_alone(data: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    (task,) = load_tasks([("gsm8k", 3)], data_path=data)
    task.requests(harness_lm(tiny_lm.model(), tiny_lm.tokenizer()))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_model_and_tokenizer_are_left_as_they_were() -> None:
    model, tokenizer = tiny_lm.model().train(), tiny_lm.tokenizer()
    embedding = model.lm_head.weight
    model.model.norm.eval()
    lm = harness_lm(model, tokenizer)
    assert tokenizer.pad_token is None
    assert lm.tokenizer.pad_token is not None
    assert model.training and model.model.layers[0].training
    assert not model.model.norm.training
    assert model.lm_head.weight is embedding is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (("arc-challenge", 0), "unknown.*nearest.*arc_challenge"),
        (("gsm9k", 0), "unknown.*nearest.*gsm8k"),
        (("arithmetic_word_problem", 0), "nearest.*arithmetic_word_problems"),
        (("gsm8k", -1), "shots must be 0 or more"),
        (("gsm8k", 13), r"13 shots are more than.*12 examples"),
        (("hellaswag", 10), r"10 shots are more than.*8 examples"),
        (("gsm8k_cot_self_consistency", 0), "not supported"),
        (("arc_challenge_chat", 3), "fixes its number of shots at 0"),
        (("wikitext", 0), "likelihood of whole documents"),
    ],
)
def test_bad_tasks(spec: tuple[str, int], match: str, data: Path) -> None:
    with pytest.raises(ValueError, match=match):
        load_tasks([spec], data_path=data)


def test_bad_lists_and_limits(data: Path) -> None:
    with pytest.raises(ValueError, match="no evaluation task"):
        load_tasks([], data_path=data)
    with pytest.raises(ValueError, match=r"more than once.*gsm8k"):
        load_tasks([("gsm8k", 3), ("gsm8k", 3)], data_path=data)
    for limit in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="limit"):
            load_tasks([("gsm8k", 0)], data_path=data, limit=limit)


def test_bad_folders(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_tasks([("gsm8k", 0)], data_path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        load_tasks([("gsm8k", 0)], data_path=data / "gsm8k" / "test.jsonl")
    with pytest.raises(ValueError, match="holds nothing for task gsm8k"):
        load_tasks([("gsm8k", 0)], data_path=tmp_path)
    with pytest.raises(ValueError, match="name a folder"):
        load_tasks([("arithmetic_word_problems", 0)])
    tiny_lm.write_jsonl(tmp_path / "test.jsonl", tiny_lm.word_problems(2, 0))
    with pytest.raises(ValueError, match="has no train"):
        load_tasks([("gsm8k", 3)], data_path=tmp_path)
    (task,) = load_tasks([("gsm8k", 0)], data_path=tmp_path)  # no examples are drawn
    assert task.documents == 2
    with pytest.raises(ValueError, match="different data sets"):
        load_tasks([("gsm8k", 0), ("arithmetic_word_problems", 0)], data_path=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("gsm8k", "", "is empty"),
        ("gsm8k", '{"question": "a", "answer": "b"}\n{"question": \n', "not JSON at line 2"),
        ("gsm8k", '{"question": "a", "answer": "b"}\n\n[1]\n', "line 3: expected an object"),
        (
            "gsm8k",
            '{"question": "a", "answer": "b"}\n{"question": "a"}\n',
            "line 2: field 'answer'",
        ),
        ("gsm8k", '{"prompt": "a", "answer": "b"}\n', "line 1: field 'question' is missing"),
        ("arc_challenge", '{"question": "a", "answerKey": "A"}\n', "field 'choices'"),
        ("arc_challenge", '{"question": "a", "choices": [], "answerKey": "A"}\n', "cannot use"),
        ("mmlu_anatomy", '{"question": "a", "choices": ["a","b","c","d"]}\n', "field 'answer'"),
    ],
)
def test_bad_files(name: str, content: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=match):
        load_tasks([(name, 0)], data_path=tmp_path)


def test_bad_rows_of_a_task_that_functions_define(tmp_path: Path) -> None:
    tiny_lm.write_jsonl(tmp_path / "validation.jsonl", [{"ctx_a": "a", "endings": ["b"]}])
    with pytest.raises(ValueError, match=r"cannot use the data.*lacks a field.*ctx_b"):
        load_tasks([("hellaswag", 0)], data_path=tmp_path)


def test_document_that_cannot_be_a_prompt_and_window_too_small(data: Path, tmp_path: Path) -> None:
    rows = tiny_lm.choice_questions(3, 0)
    rows[1]["answerKey"] = "Z"
    tiny_lm.write_jsonl(tmp_path / "test.jsonl", rows)
    (task,) = load_tasks([("arc_challenge", 0)], data_path=tmp_path)
    with pytest.raises(ValueError, match="cannot be made into a prompt"):
        task.requests(harness_lm(tiny_lm.model(), tiny_lm.tokenizer()))
    (task,) = load_tasks([("gsm8k", 0)], data_path=data)
    with pytest.raises(ValueError, match="256 new tokens; allowed are 1 to 255"):
        task.requests(harness_lm(tiny_lm.model(window=256), tiny_lm.tokenizer()))
    (task,) = load_tasks([("gsm8k", 0)], data_path=data)
    task._task.config.generation_kwargs["max_gen_toks"] = 0
    with pytest.raises(ValueError, match="0 new tokens; allowed are 1 to 511"):
        task.requests(harness_lm(tiny_lm.model(window=512), tiny_lm.tokenizer()))


def test_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(ValueError, match=r"openai/gsm8k.*no network.*eval\.data_path"):
        load_tasks([("gsm8k", 0)])


@pytest.mark.skipif(not (SHARED / "gsm8k").is_dir(), reason="no local copies of the benchmarks")
def test_real_benchmarks() -> None:
    specs = [("gsm8k", 8), ("arc_challenge", 25)]
    tasks = load_tasks(specs, data_path=SHARED)
    assert [task.documents for task in tasks] == [1319, 1172]
    assert load_tasks(specs[:1], data_path=SHARED / "gsm8k", limit=5)[0].documents == 5
