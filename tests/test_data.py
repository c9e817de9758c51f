"""Records, prompts and tokens: equal to the harness's, and every mistake named."""

import copy
import json

import lm_eval.tasks
import numpy as np
import pandas
import pyarrow.parquet
import pytest
from lm_eval.tasks._yaml_loader import load_yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from matryoshka_lora.config import DatasetConfig
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.data.examples import Example, tokenize
from matryoshka_lora.data.packing import pack
from matryoshka_lora.data.records import fingerprint, load_records, split_validation
from matryoshka_lora.models import EMBEDDED

RECORDS = [
    {
        "question": f"Ada has {n} books and buys 2. How many?",
        "answer": f"{n}+2={n + 2}\n#### {n + 2}",
    }
    for n in range(1, 11)
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


def write(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


def gsm8k(**options):
    return DatasetConfig(name="gsm8k", **options)


def test_prompt_text_and_token_boundary_are_the_harness_own(tokenizer):
    from jinja2 import Template
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    path = next(p for p in lm_eval.tasks.__path__) + "/gsm8k/gsm8k.yaml"
    task = load_yaml(path, resolve_func=False)
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(EMBEDDED), tokenizer=tokenizer)
    examples, _ = tokenize(RECORDS, gsm8k(), tokenizer)
    for record, example in zip(RECORDS, examples, strict=True):
        prompt = Template(task["doc_to_text"]).render(record)
        answer = task.get("target_delimiter", " ") + Template(task["doc_to_target"]).render(record)
        context, target = lm._encode_pair(prompt, answer)
        assert list(example.tokens[: example.prompt_length]) == context
        assert list(example.tokens[example.prompt_length :]) == [*target, tokenizer.eos_token_id]


@pytest.mark.parametrize("name", ["gsm8k", "platypus"])
@pytest.mark.parametrize("added", ["<s> $A </s>", "$A </s>", "<s> $A"])
def test_tokens_that_the_tokenizer_appends_are_left_out(tokenizer, caplog, name, added):
    config = DatasetConfig(name=name)
    records = RECORDS if name == "gsm8k" else [{"instruction": "Add.", "output": "5"}]
    plain, _ = tokenize(records, config, tokenizer)
    adding = copy.deepcopy(tokenizer)
    eos, bos = adding.eos_token_id, 5
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=added, special_tokens=[("</s>", eos), ("<s>", bos)]
    )
    examples, counts = tokenize(records, config, adding)
    first = (bos,) if added.startswith("<s>") else ()
    assert [e.tokens for e in examples] == [(*first, *e.tokens) for e in plain]
    assert [e.labels for e in examples] == [e.labels for e in plain]
    assert ("the tokenizer appends </s>" in caplog.text) == added.endswith("</s>")


def test_the_papers_prompt_keeps_the_space(tokenizer):
    examples, _ = tokenize(RECORDS[:1], gsm8k(prompt="paper"), tokenizer)
    text = tokenizer.decode(examples[0].tokens[: examples[0].prompt_length])
    assert text == f"Question: {RECORDS[0]['question']}\nAnswer: "


def test_platypus_prompt(tokenizer):
    record = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    config = DatasetConfig(name="platypus")
    for given, middle in ((record, "### Input:\n2 and 3\n\n"), (record | {"input": ""}, "")):
        examples, _ = tokenize([given], config, tokenizer)
        text = tokenizer.decode(examples[0].tokens)
        assert text == f"### Instruction:\nAdd.\n\n{middle}### Response:\n5</s>"
        assert tokenizer.decode(examples[0].tokens[examples[0].prompt_length :]) == "5</s>"


def test_truncated_and_fully_masked_examples_are_counted(tokenizer):
    whole, _ = tokenize(RECORDS, gsm8k(), tokenizer)
    length = min(len(example.tokens) for example in whole) - 2
    cut, counts = tokenize(RECORDS, gsm8k(max_length=length), tokenizer)
    assert counts == {"records": 10, "used": 10, "truncated": 10, "fully_masked": 0}
    assert all(len(example.tokens) == length for example in cut)
    longer = {"question": RECORDS[0]["question"] * 3, "answer": "1 #### 1"}
    _, counts = tokenize([*RECORDS, longer], gsm8k(max_length=length), tokenizer)
    assert counts == {"records": 11, "used": 10, "truncated": 11, "fully_masked": 1}
    with pytest.raises(ValueError, match="none of 10 examples keeps a label.*raise it"):
        tokenize(RECORDS, gsm8k(max_length=5), tokenizer)


def test_a_prompt_that_fills_the_length_is_kept_where_asked(tokenizer):
    """As in the paper's released code, which cuts prompt and answer and keeps what is left."""
    longer = {"question": RECORDS[0]["question"] * 9, "answer": "1"}
    prompt = f"Question: {longer['question']}\nAnswer: "
    length = len(tokenizer(prompt)["input_ids"]) - 3
    config = gsm8k(max_length=length, prompt="paper", keep_masked=True)
    examples, counts = tokenize([*RECORDS, longer], config, tokenizer)
    assert counts == {"records": 11, "used": 11, "truncated": 1, "fully_masked": 1}
    assert list(examples[-1].tokens) == tokenizer(prompt)["input_ids"][:length]
    assert (examples[-1].prompt_length, examples[-1].labels) == (length, 0)
    batch = pack([examples[-1], Example((1, 2, 3), 1)])
    assert batch.label_rows.tolist() == [length, length + 1] and batch.labels.tolist() == [2, 3]
    # Everything else is as without them, and only they are not enough.
    left, _ = tokenize([*RECORDS, longer], gsm8k(max_length=length, prompt="paper"), tokenizer)
    assert left == examples[:-1]
    with pytest.raises(ValueError, match="none of 1 examples keeps a label"):
        tokenize([longer], config, tokenizer)


def test_packing():
    batch = pack([Example((1, 2, 3, 4), 2), Example((5, 6, 7), 1)])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert batch.lengths == (4, 3)
    assert batch.label_rows.tolist() == [1, 2, 4, 5]
    assert batch.labels.tolist() == [3, 4, 6, 7]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_local_copies_in_every_format(tmp_path, suffix):
    if suffix == "parquet":
        pandas.DataFrame(RECORDS).to_parquet(tmp_path / "train.parquet")
    else:
        lines = "\n".join(map(json.dumps, RECORDS))
        write(tmp_path, f"train.{suffix}", lines if suffix == "jsonl" else json.dumps(RECORDS))
    assert load_records(gsm8k(path=str(tmp_path))) == RECORDS
    assert load_records(gsm8k(path=str(tmp_path), limit=3)) == RECORDS[:3]


def test_separators_inside_strings_and_nulls_are_kept(tmp_path):
    record = {"instruction": "a\u2028b", "input": None, "output": "c\u0085d"}
    write(tmp_path, "train.jsonl", json.dumps(record, ensure_ascii=False))
    config = DatasetConfig(name="platypus", path=str(tmp_path))
    assert load_records(config) == [record]
    pandas.DataFrame([record]).to_parquet(tmp_path / "other.parquet")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "other.parquet").rename(tmp_path / "train.parquet")
    assert load_records(config) == [record]


def test_fingerprint_follows_the_text_that_is_trained_on():
    first = fingerprint(RECORDS, gsm8k())
    assert first == fingerprint([record | {"note": 1} for record in RECORDS], gsm8k())
    assert first != fingerprint(RECORDS[::-1], gsm8k())
    assert first != fingerprint(RECORDS, gsm8k(prompt="paper"))


def test_validation_split_is_fixed_and_disjoint():
    train, held_out = split_validation(RECORDS, 0.2)
    assert (len(train), len(held_out)) == (8, 2)
    assert split_validation(RECORDS, 0.2) == (train, held_out)
    everything = sorted(record["answer"] for record in [*train, *held_out])
    assert everything == sorted(record["answer"] for record in RECORDS)
    assert split_validation(RECORDS, 0.0) == (RECORDS, [])
    with pytest.raises(ValueError, match="validation=0.04 holds out none of 10 records; raise it"):
        split_validation(RECORDS, 0.04)


GOOD = json.dumps(RECORDS[0])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no train\{.jsonl"),
        ({"train.jsonl": ""}, "holds no records"),
        ({"train.jsonl": f"{GOOD}\n{{oops\n"}, "is not JSON at line 2"),
        ({"train.jsonl": f"{GOOD}\n[1]\n"}, "line 2: expected an object"),
        ({"train.jsonl": f'{GOOD}\n{{"question": "x"}}\n'}, "record 2: field 'answer' is missing"),
        (
            {"train.jsonl": '{"question": "x", "answer": 3}'},
            "'answer' is missing, empty or not text: '3'",
        ),
        ({"train.jsonl": GOOD, "train.json": f"[{GOOD}]"}, "train.jsonl and train.json; leave one"),
        ({"train.json": '{"a": 1}'}, "expected a list"),
        ({"train.json": "oops"}, "is not JSON"),
        ({"train.parquet": "oops"}, "cannot be read as a Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, files, message):
    for name, text in files.items():
        write(tmp_path, name, text)
    with pytest.raises(ValueError, match=message):
        load_records(gsm8k(path=str(tmp_path)))


def test_a_name_that_is_no_file_is_not_called_missing(tmp_path):
    path = tmp_path / "train.jsonl"
    for make in (path.mkdir, lambda: path.symlink_to("nowhere"), lambda: path.symlink_to(path)):
        make()
        with pytest.raises(ValueError, match=f"{path} is no file, or a link that leads to none"):
            load_records(gsm8k(path=str(tmp_path)))
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_parquet_file_with_bytes_that_are_no_text_or_a_column_twice_is_named(tmp_path):
    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)
    for names, message in ((["question", "answer"], "utf-8"), (["answer"] * 2, "Multiple matches")):
        table = pyarrow.table([text, text], names=names)
        pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
        with pytest.raises(UserError, match=rf"train\.parquet cannot be read.*{message}"):
            load_records(gsm8k(path=str(tmp_path)))


def test_bad_sources_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not a folder"):
            load_records(gsm8k(path=str(path)))
    with pytest.raises(ValueError, match="unknown; allowed: gsm8k.*did you mean gsm8k"):
        load_records(DatasetConfig(name="gsm8"))
    with pytest.raises(ValueError, match="set dataset.path=FOLDER"):
        load_records(gsm8k())


def test_an_unreachable_hub_says_how_to_use_a_local_copy():
    with pytest.raises(ValueError, match=r"openai/gsm8k .*cannot be read.*dataset.path=FOLDER"):
        load_records(gsm8k(hub="openai/gsm8k", subset="main"))


def test_the_split_does_not_depend_on_numpys_global_state():
    np.random.seed(0)
    first = split_validation(RECORDS, 0.3)
    np.random.seed(1)
    assert split_validation(RECORDS, 0.3) == first
