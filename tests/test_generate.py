"""scripts/generate.py answers as the model does that is read at a rank."""

import importlib.util
import io

import pytest
import tiny_lm
import torch
from conftest import ROOT
from test_export import make_run

from matryoshka_lora.cli import exit_with_one_line, parse_options
from matryoshka_lora.core.adapter import adapter_layers, at_rank
from matryoshka_lora.loading import load_run

spec = importlib.util.spec_from_file_location("generate_script", ROOT / "scripts" / "generate.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

PROMPT = "Ada has 3 apples and finds 4 more. How many apples?"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
LIMIT = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, of a method whose rules all differ."""
    base = tmp_path_factory.mktemp("base")
    tiny_lm.model().save_pretrained(base)
    tiny_lm.tokenizer().save_pretrained(base)
    return make_run(tmp_path_factory.mktemp("run"), base, "matryoshka", "none")


def generate(*arguments):
    script.main(parse_options(script.Options, [*arguments, f"max_new_tokens={LIMIT}"]))


def expected(run, text, rank, rule):
    """What `generate` makes of a text at a rank, greedily."""
    loaded = load_run(run)
    tokens = loaded.tokenizer(text, return_tensors="pt").input_ids
    with at_rank(loaded.model, rank, rule), torch.no_grad():
        made = loaded.model.generate(tokens, max_new_tokens=LIMIT, do_sample=False, pad_token_id=0)
    return loaded.tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("rule", ["prefix", "trained", "svd", "global"])
def test_each_row_is_the_model_at_its_rank(run, rule):
    loaded, ranks, seen = load_run(run), [0, 1, 3, 6], []
    talker = script.Talker(loaded, ranks, rule)
    tokens = script.encode(loaded.tokenizer, [{"role": "user", "content": PROMPT}], None)
    texts, rate = talker.answer(tokens, LIMIT, seen.append)
    assert texts == [expected(run, PROMPT, rank, rule) for rank in ranks]
    assert len(set(texts)) == len(ranks) and rate > 0
    # Streamed: a token more each time, up to the whole.
    assert 1 < len(seen) <= LIMIT and len(seen[0][0]) < len(texts[0])
    assert all(whole.startswith(part) for whole, part in zip(texts, seen[-1], strict=True))
    sizes = sum(x.in_features + x.out_features for x in adapter_layers(loaded.model).values())
    assert talker.names[0] == "base model"
    if rule != "global":
        assert talker.names[2] == f"rank 3 {rule}, {3 * sizes:,} parameters"


def test_an_answer_ends_at_its_end_token_while_others_go_on(run):
    loaded = load_run(run)
    tokens = loaded.tokenizer(PROMPT).input_ids
    rows = script._Rows(loaded.model, loaded.tokenizer, 2, lambda texts: None)
    rows.put(torch.tensor([tokens, tokens]))
    for step in ([5, 6], [0, 7], [9, 8]):
        rows.put(torch.tensor(step))
    assert rows.tokens == [[5, 0], [6, 7, 8]]
    assert rows.texts == [loaded.tokenizer.decode(row) for row in ([5], [6, 7, 8])]


def test_the_answers_stand_side_by_side(run, capsys):
    generate(f"run={run}", "ranks=1,6", "rule=trained", f"prompt={PROMPT}")
    shown = capsys.readouterr().out
    (head,) = [line for line in shown.splitlines() if "rank 1 trained" in line]
    assert "rank 6 trained" in head and "\x1b" not in shown and "tokens/s" in shown
    names, texts = ["a", "b", "c"], ["one two " * 9, "x\n\ny", ""]
    lines = script.columns(names, texts, 60)
    assert lines[0].split() == ["a", "b"] and max(map(len, lines)) <= 60
    assert lines[2].split() == [*["one", "two"] * 3, "one", "x"]
    assert "c" in lines


def test_a_chat_switches_rank_rule_and_base_live(run, monkeypatch, capsys):
    typed = [
        PROMPT,
        "/rule svd",
        "/rank 1",
        PROMPT,
        "/rule prefix",
        PROMPT,
        "/base",
        PROMPT,
        "/rank 99",
    ]
    typed += [
        "/rank x",
        "/rank ²",
        "/rule pre",
        "/what",
        "/rank 6",
        "/new",
        "",
        PROMPT,
        "/quit",
        "never",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(typed)))
    generate(f"run={run}", "interactive=true")
    shown = capsys.readouterr().out
    place = 0
    for rank, rule in ((6, "trained"), (1, "svd"), (1, "prefix"), (0, "prefix"), (6, "prefix")):
        name = f"[rank {rank} {rule}, " if rank else "[base model"
        place = shown.index(name, place)
        answer = expected(run, PROMPT, rank, rule)
        place = shown.index(answer, place) + len(answer)
    assert "parameters, " in shown and "tokens/s]" in shown
    for message in ("rank 99 is above", "/rank takes", "'pre' is unknown", "/what is unknown"):
        assert message in shown


def test_a_rule_that_is_worse_at_other_ranks_is_told(run, monkeypatch):
    loaded, asked = load_run(run), []

    def best(record, spec, rank, rule=None):
        asked.append((rank, rule))
        return rule or "svd"

    monkeypatch.setattr(script, "rule_for", best)
    talker = script.Talker(loaded, [3, 0, 1, 6, 3], None)
    assert talker.rule == "svd" and asked == [(1, None), (3, "svd"), (6, "svd")]


def test_a_chat_template_is_used_where_there_is_one():
    tokenizer = tiny_lm.tokenizer()
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    said.append({"role": "user", "content": "c"})
    assert tokenizer.decode(script.encode(tokenizer, said, None)) == "c"
    tokenizer.chat_template = TEMPLATE
    shown = "<user>a\n<assistant>b\n<user>c\n"
    assert tokenizer.decode(script.encode(tokenizer, said, None)) == shown
    assert tokenizer.decode(script.encode(tokenizer, said, False)) == "c"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt=a", "interactive=true"], "give either prompt=... or interactive=true"),
        ([], "give either prompt"),
        (["prompt="], "prompt= lacks a value"),
        (["prompt=a", "ranks=7"], "rank 7 is above the adapter's rank 6"),
        (["prompt=a", "rule=svt"], "did you mean svd"),
        (["prompt=a", "device=cuda:99"], "device=cuda:99 cannot be used"),
        (["prompt=a", "chat_template=true"], "the tokenizer of this model has none"),
        (["interactive=true", "ranks=1,2"], "/rank switches"),
    ],
)
def test_mistakes_give_one_line(run, arguments, message, capsys):
    with pytest.raises(SystemExit), exit_with_one_line():
        generate(f"run={run}", *arguments)
    assert message in capsys.readouterr().err
