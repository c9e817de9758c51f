"""Make the embedded model.

    python scripts/pretrain_tiny.py output=matryoshka_lora/assets/tiny

Everything comes from the seed: a synthetic corpus of number facts, running totals, short stories,
made-up sentence frames and word lists, the tokenizer trained on it, and the Llama trained on it
(about a quarter of an hour on two CPU cores, a minute on a GPU; corpus and tokenizer are the same
everywhere, weights differ in rounding between devices). The corpus holds none of the templates of
`matryoshka_lora.data.arithmetic`, nor its `Question:`/`Answer:` layout, so the model knows numbers
but not the task that it is later fine-tuned on.
"""

import bisect
import dataclasses
import itertools
import logging
import math
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from omegaconf import MISSING
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from matryoshka_lora.cli import option, run_script

logger = logging.getLogger("matryoshka_lora.scripts.pretrain_tiny")

EOS, PAD = "</s>", "<pad>"
NAMES = (
    "Mia Ben Lucy Omar Ella Jack Nina Paul Rosa Sam Tara Leo Anna Tom Kate Dan Zoe Max Ivy Adam "
    "Lily Noah Emma Luke Maya Carl Ruby Finn Sara Hugo Jane Eric Nora Alan Beth Ravi Lena Mark "
    "Amy John "
).split()
OBJECTS = (
    "apples pens marbles stickers books cards shells stamps cookies balloons pencils beads "
    "buttons toys eggs oranges flowers candies rocks blocks plums nuts leaves cups ribbons keys "
    "crayons peaches pears cakes muffins tickets photos fish bricks lemons carrots hats socks "
    "mugs seeds coins boxes bags "
).split()
CONTAINERS = [
    "boxes",
    "bags",
    "baskets",
    "jars",
    "trays",
    "shelves",
    "packs",
    "rows",
    "tables",
    "plates",
    "bowls",
    "crates",
]
PLACES = [
    "garden",
    "shop",
    "kitchen",
    "school",
    "park",
    "farm",
    "room",
    "street",
    "library",
    "market",
    "house",
    "team",
]
# (present, past) of the verbs that raise or lower a count.
GAINS = [
    tuple(pair.split("/"))
    for pair in [
        "buys/bought",
        "finds/found",
        "gets/got",
        "picks/picked",
        "makes/made",
        "bakes/baked",
        "wins/won",
        "collects/collected",
        "adds/added",
        "receives/received",
        "gathers/gathered",
        "earns/earned",
        "catches/caught",
        "brings/brought",
        "saves/saved",
        "takes/took",
    ]
]
LOSSES = [
    tuple(pair.split("/"))
    for pair in [
        "loses/lost",
        "eats/ate",
        "sells/sold",
        "drops/dropped",
        "breaks/broke",
        "uses/used",
        "spends/spent",
        "gives/gave",
        "removes/removed",
        "throws/threw",
        "burns/burned",
        "sends/sent",
        "lends/lent",
        "donates/donated",
        "returns/returned",
        "mails/mailed",
    ]
]
# Plain words, so that ordinary English costs one token a word and no embedding stays untrained.
WORDS = (
    "a about across after again all also altogether an and another any are as ask at away back "
    "be been before begin behind below between big bird birds blue board boat both bottle "
    "bought box boy boys break broken bus by call came can car cars cat cats change child "
    "children class clean come cost costs count cut day days did different dinner do does dog "
    "dogs done door dollar dollars down during each earlier empty end enough even evening every "
    "extra family far farmer fast few fewer fill first five floor for four fresh friend friends "
    "from full game games garden gave girl girls give given gives go goes good got grade green "
    "group groups grow guests had half hand has have he hen hens her here him his hold holds "
    "home hour hours how if in inside into is it its job just keep keeps kept kids know large "
    "last late later laid lay lays leave leaves left less letters lines long lot lunch made "
    "make makes many meals men miles minutes money month more morning most mother move much "
    "must need needs new next night no not note now number of off old on once one only open or "
    "other others out over own page pages paid paint parked party passengers pay people per "
    "piece pieces place plan plant planted plants play points practice problem put read reads "
    "ready red remain remaining rest rides road same sat save score scored seats second set "
    "seven sheep she shelf shirt sister brother six small so sold some songs spend spent stand "
    "start started starts still stop store students sum table take taken takes teacher team "
    "than that the their them then there they third this three time times to today together "
    "total train trees trip trips twice two under until up us use used walk walks want wants "
    "was water way week weeks were what when which while white who will win with without woman "
    "women work worked writes year years yellow yesterday you young zero How Each After Then "
    "There They He She If On In At One Two Three Every The His Her For Today Later Monday "
    "Tuesday Friday Sunday Question Answer "
).split()

Draw = random.Random
T = TypeVar("T")


def number(rng: Draw) -> int:
    """A positive count below 100, small ones more often."""
    return rng.randrange(1, (13, 31, 61, 100)[rng.randrange(4)])


def fact(rng: Draw, left: int | None = None) -> tuple[int, str, int, int]:
    """(left, operator, right, result) with 0 <= result <= 200; `left` continues a chain."""
    a = number(rng) if left is None else left
    roll = rng.random()
    if roll < 0.2 and a <= 30:
        b = rng.randrange(2, 13) if a <= 12 else rng.randrange(2, 7)
        return a, "*", b, a * b
    if roll < 0.6 and a > 1:
        b = min(number(rng), rng.randrange(1, a + 1))
        return a, "-", b, a - b
    b = number(rng)
    if a + b > 200:
        return a, "-", b, a - b
    if rng.random() < 0.5 and left is None:
        a, b = b, a
    return a, "+", b, a + b


def equation(rng: Draw, left: int | None = None) -> tuple[str, int]:
    """`a op b = c` and c."""
    a, operator, b, c = fact(rng, left)
    return f"{a} {operator} {b} = {c}", c


def fact_line(rng: Draw) -> str:
    if rng.random() < 0.7:
        return equation(rng)[0]
    a, operator, b, c = fact(rng)
    if operator == "+":
        forms = ("{a} and {b} make {c}", "{b} more than {a} is {c}", "add {b} to {a}: {c}")
    elif operator == "-":
        forms = (
            "{a} take away {b} leaves {c}",
            "{b} fewer than {a} is {c}",
            "from {b} to {a}: {c}",
        )
    else:
        forms = ("{b} groups of {a} are {c}", "{a} times {b} is {c}", "{b} rows of {a}: {c}")
    if rng.random() < 0.15:
        small = rng.randrange(1, 60)
        forms = ("double {a} is {c}", "half of {c} is {a}", "twice {a} is {c}")
        a, c = small, 2 * small
    return forms[rng.randrange(len(forms))].format(a=a, b=b, c=c)


def chain_line(rng: Draw) -> str:
    """A running total: every equation goes on with the last result."""
    total, parts = None, []
    for _ in range(rng.randrange(2, 5)):
        text, total = equation(rng, total)
        parts.append(text)
    return (", ", "; ", " so ", " then ")[rng.randrange(4)].join(parts)


def pick(rng: Draw, options: Sequence[T]) -> T:
    return options[rng.randrange(len(options))]


def event(rng: Draw, total: int) -> tuple[str, str, int, int]:
    """(verb, operator, amount, new total) of something that happens to a count."""
    if total > 2 and (rng.random() < 0.5 or total > 150):
        amount = rng.randrange(1, min(total, 40))
        return pick(rng, pick(rng, LOSSES)), "-", amount, total - amount
    amount = number(rng) % 50 + 1
    return pick(rng, pick(rng, GAINS)), "+", amount, total + amount


def story_line(rng: Draw) -> str:
    """One count through one to three events, the sum told with every event."""
    name, thing = pick(rng, NAMES), pick(rng, OBJECTS)
    start = total = number(rng)
    style, parts = rng.randrange(4), []
    for _ in range(rng.randrange(1, 4)):
        verb, operator, amount, after = event(rng, total)
        told = f"{total} {operator} {amount} = {after}"
        parts.append(
            (
                f"then {verb} {amount}, which makes {told}",
                f"next {name} {verb} {amount} {thing}: {told}",
                f"{verb} {amount}, now {after}",
                f"with {amount} {verb} it is {told} {thing}",
            )[style]
        )
        total = after
    opening = (
        f"at first {name} keeps {start} {thing}, ",
        f"{name} and the {thing}, {start} to begin with; ",
        f"{name}'s {thing}: start {start}, ",
        f"day one, {start} {thing} in {name}'s {pick(rng, PLACES)}; ",
    )[style]
    return opening + ("; " if style == 1 else ", ").join(parts)


def log_line(rng: Draw) -> str:
    """The events first, the working after them."""
    name, thing = pick(rng, NAMES), pick(rng, OBJECTS)
    total = number(rng)
    told, working = [f"{name} log, {thing} {total}"], []
    for _ in range(rng.randrange(1, 4)):
        verb, operator, amount, after = event(rng, total)
        told.append(f"{verb} {amount}")
        working.append(f"{total} {operator} {amount} = {after}")
        total = after
    return " / ".join(told) + " -> " + ", ".join(working) + f", end {total}"


def groups_line(rng: Draw) -> str:
    thing, holder = pick(rng, OBJECTS), pick(rng, CONTAINERS)
    k, each, other = rng.randrange(2, 13), rng.randrange(2, 13), rng.randrange(1, 31)
    product = k * each
    text = pick(
        rng,
        (
            f"{k} {holder}, each with {each} {thing}: {k} * {each} = {product}",
            f"{each} {thing} in every one of {k} {holder} is {k} * {each} = {product} {thing}",
            f"price of a few {thing}: {k} at {each} dollars each come to {k} * {each} = {product}",
            f"{pick(rng, NAMES)} does {each} a day, so in {k} days {k} * {each} = {product}",
        ),
    )
    if rng.random() < 0.5:
        if other < product and rng.random() < 0.5:
            text += f"; less {other}: {product} - {other} = {product - other}"
        else:
            text += f"; plus {other} more: {product} + {other} = {product + other}"
    return text


def compare_line(rng: Draw) -> str:
    one, two, thing = pick(rng, NAMES), pick(rng, NAMES), pick(rng, OBJECTS)
    a, b = number(rng), number(rng)
    high, low = max(a, b), min(a, b)
    return pick(
        rng,
        (
            f"{one} {a} {thing} against {two} {b}: together {a} + {b} = {a + b}",
            f"{thing}, {one} {high} and {two} {low}: the gap is {high} - {low} = {high - low}",
            f"{two} is ahead of {one} by {b}, {one} at {a}, so {two} at {a} + {b} = {a + b}",
            f"{two} is behind {one} by {low}, {one} at {high}, so {two} at "
            f"{high} - {low} = {high - low}",
            f"{high} {thing}, {low} of them red, so the others are {high} - {low} = {high - low}",
            f"twice the {thing} of {one}, who has {low}, is {low} * 2 = {2 * low}",
            f"out of {high} {thing} only {low} stay, so {high} - {low} = {high - low} went",
        ),
    )


def riddle_line(rng: Draw) -> str:
    """Asked and solved at once, in a layout of its own."""
    thing, verb_index = pick(rng, OBJECTS), rng.randrange(2)
    a, b, c = number(rng), number(rng), rng.randrange(1, 13)
    total = a + b
    if verb_index:
        return f"[{a} {thing} and {b} {thing} and {c} {thing}] sum <{total + c}>"
    return f"[{total} {thing}, {a} of them {pick(rng, LOSSES)[1]}] what stays <{b}>"


def word_line(rng: Draw) -> str:
    return " ".join(pick(rng, WORDS) for _ in range(rng.randrange(6, 15)))


# What is said of a number that is the right operand of each operator.
CUES: dict[str, tuple[str, ...]] = {
    "+": (*(form for verb in GAINS for form in verb), "more", "and", "also", "another", "plus"),
    "-": (*(form for verb in LOSSES for form in verb), "fewer", "less", "away", "but", "without"),
    "*": ("each", "every", "times", "per", "rows", "groups"),
}
STARTS = ("keeps", "starts", "owns", "holds", "there", "of", "first", "from", "with")


def draw_program(rng: Draw) -> tuple[int, list[tuple[str, str, str]]]:
    """(numbers, steps): a step is (left, operator, right) over numbers n0.. and results r0.."""
    count, steps = 2, [("n0", pick(rng, "++--*"), "n1")]
    for index in range(1, rng.randrange(1, 4)):
        last, operator, roll = f"r{index - 1}", pick(rng, "+-"), rng.random()
        if roll < 0.12:
            steps.append((f"n{rng.randrange(count)}", "+", last))
        elif roll < 0.24 and index == 1:
            steps.append((f"n{count}", pick(rng, "+-*"), f"n{count + 1}"))
            steps.append(("r0", operator, "r1"))
            return count + 2, steps
        elif roll < 0.36:
            steps.append((f"n{count}", operator, last))
            count += 1
        else:
            steps.append((last, operator, f"n{count}"))
            count += 1
    return count, steps


def run_program(
    steps: list[tuple[str, str, str]], known: dict[str, int]
) -> list[tuple[str, int]] | None:
    """(`a op b = c`, c) of each step, or None where a result leaves 0..200."""
    known, done = dict(known), []
    for index, (left, operator, right) in enumerate(steps):
        a, b = known[left], known[right]
        c = {"+": a + b, "-": a - b, "*": a * b}[operator]
        if not 0 <= c <= 200:
            return None
        known[f"r{index}"] = c
        done.append((f"{a} {operator} {b} = {c}", c))
    return done


def new_pattern(rng: Draw) -> Callable[[Draw], str]:
    """A made-up sentence frame and its working: filler words, and cues that fit the operators.

    All lines of a document share the frame. What it asks for has to be read off the cues and the
    lines before, and the numbers have to be found in the text.
    """
    count, steps = draw_program(rng)
    operator_of = {right: operator for _, operator, right in steps}
    factors = {name for left, operator, right in steps if operator == "*" for name in (left, right)}
    order = [f"n{index}" for index in range(count)]
    if rng.random() < 0.25:
        rng.shuffle(order)
    text = ""
    for name in order:
        cues = CUES[operator_of[name]] if name in operator_of else STARTS
        words = [pick(rng, WORDS) for _ in range(rng.randrange(0, 5))]
        if rng.random() < 0.35:
            words.insert(rng.randrange(len(words) + 1), "{" + pick(rng, ("who", "other")) + "}")
        if rng.random() < 0.8:
            words.append(pick(rng, cues))
        after = ["{thing}"] if rng.random() < 0.6 else []
        after += [pick(rng, WORDS) for _ in range(rng.randrange(0, 3))]
        text += (
            " ".join([*words, "{" + name + "}", *after]) + pick(rng, (".", ",", " and", "")) + " "
        )
    if rng.random() < 0.5:
        text += (
            "how many {thing} " + " ".join(pick(rng, WORDS) for _ in range(rng.randrange(5))) + "?"
        )
    text = text.strip() + pick(rng, (" -> ", " => ", " so ", " working ", "\nthus ", "\n"))
    joint = pick(rng, (", ", "; ", " then ", "\n"))
    closing = pick(
        rng, (", end {result}", "; total {result}", " <{result}>", "\nresult {result}", "")
    )

    def line(rng: Draw) -> str:
        done = None
        while done is None:
            numbers = {
                name: rng.randrange(2, 13) if name in factors else number(rng) for name in order
            }
            done = run_program(steps, numbers)
        filled = text.format(
            who=pick(rng, NAMES), other=pick(rng, NAMES), thing=pick(rng, OBJECTS), **numbers
        )
        return filled + joint.join(told for told, _ in done) + closing.format(result=done[-1][1])

    return line


# (title, maker of the line function, share of the documents, fewest and most lines)
KINDS: tuple[tuple[str, Callable[[Draw], Callable[[Draw], str]], float, int, int], ...] = (
    ("Sums", lambda rng: fact_line, 0.16, 8, 24),
    ("Totals", lambda rng: chain_line, 0.08, 4, 10),
    ("Stories", lambda rng: story_line, 0.10, 2, 6),
    ("Logs", lambda rng: log_line, 0.10, 2, 6),
    ("Groups", lambda rng: groups_line, 0.06, 3, 8),
    ("Pairs", lambda rng: compare_line, 0.06, 3, 8),
    ("Riddles", lambda rng: riddle_line, 0.02, 4, 10),
    ("Words", lambda rng: word_line, 0.02, 2, 6),
    ("Patterns", new_pattern, 0.40, 3, 7),
)


def document(rng: Draw) -> str:
    """A titled list of lines of one kind."""
    bounds = list(itertools.accumulate(kind[2] for kind in KINDS))
    title, maker, _, fewest, most = KINDS[bisect.bisect(bounds, rng.random() * bounds[-1])]
    mark, line = "#" * rng.randrange(1, 5), maker(rng)
    lines = [line(rng) for _ in range(rng.randrange(fewest, most + 1))]
    return f"{mark} {title}\n" + "\n".join(lines) + "\n"


def corpus(seed: int, stream: str = "train") -> Iterator[str]:
    """Endless documents; a stream is independent of every other name's."""
    rng = random.Random(f"pretrain-tiny {stream} {seed}")
    while True:
        yield document(rng)


def train_tokenizer(seed: int, vocab_size: int, documents: int = 4000) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every digit is a token (with the space before it, if there is one)."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\d| ?[^\s\p{L}\d]+|\s+(?!\S)|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    source = corpus(seed, "tokenizer")
    texts = [next(source) for _ in range(documents)]
    vocabulary = WORDS + NAMES + OBJECTS + CONTAINERS + PLACES
    texts += [" " + " ".join(vocabulary)] * 400
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def rows(
    tokenizer: PreTrainedTokenizerFast, seed: int, stream: str, batch: int, length: int
) -> Iterator[torch.Tensor]:
    """Endless (batch, length) int64 blocks of documents joined by the end token, cut anywhere."""
    source, buffer = corpus(seed, stream), np.empty(0, dtype=np.int64)
    while True:
        while len(buffer) < batch * length:
            texts = [next(source) for _ in range(256)]
            encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
            joined = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
            buffer = np.concatenate([buffer, np.asarray(joined, dtype=np.int64)])
        yield torch.from_numpy(buffer[: batch * length].reshape(batch, length))
        buffer = buffer[batch * length :]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def next_token_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


CARD = """---
license: apache-2.0
language: en
tags: [llama, arithmetic, tiny]
---
# Tiny arithmetic Llama

A {parameters:,}-parameter Llama (4 layers, hidden size 192, 6 heads over 2 key-value heads, tied
embeddings, float32) with a byte-level BPE tokenizer of {vocabulary:,} entries that splits numbers
into digits. It is the embedded default base model of this repository: small enough to fine-tune
and evaluate on two CPU cores, trained enough that fine-tuning is real.

- **Data**: synthetic, from a seed, made by `scripts/pretrain_tiny.py`: number facts, running
  totals, short stories that track a count, groups and prices, comparisons, made-up sentence
  frames (random words around numbers) with their working, word lists. It has none of the templates
  of the arithmetic word problem dataset, nor its layout.
- **Training**: {steps:,} steps of {batch} x {length} tokens, {tokens:,} tokens in all, none seen
  twice; AdamW (0.9, 0.95), weight decay 0.1, peak learning rate {lr}, 100 steps of warm-up, cosine
  decay, gradient clipping at 1, seed {seed}.
- **Hardware**: {hardware}; {seconds:,.0f} seconds ({speed:,.0f} tokens/s).
- **Final loss**: {train_loss:.4f} nats a token over the last 100 steps, {valid_loss:.4f} on
  {valid_tokens:,} tokens of an independent stream. Most of it is the numbers that the corpus draws
  at random, which no model can foresee.
- **Use**: the base model of the quickstart and the tests. It continues lists of sums and knows
  nothing about the world.
- **Licence**: Apache-2.0.
- **Remake**: `{command}`
"""


@dataclasses.dataclass
class Options:
    """The command line."""

    output: str = option(MISSING, "folder to write")
    seed: int = option(0, "of corpus, tokenizer and weights")
    steps: int = option(2200, "optimizer steps")
    batch: int = option(16, "rows of tokens a step")
    length: int = option(256, "tokens a row")
    lr: float = option(3e-3, "peak learning rate")
    vocab_size: int = option(1408, "entries of the tokenizer")
    threads: int = option(2, "of torch")
    device: str = option("cpu", "where the model is trained")
    hardware: str = option("2 CPU cores", "what that is, named in the model card")


def main(options: Options) -> None:
    """Train tokenizer and model and write both with a model card."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    tokenizer = train_tokenizer(options.seed, options.vocab_size)
    model = build_model(tokenizer).to(options.device)  # type: ignore[arg-type]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.95),
    )
    logger.info("%d parameters, %d tokens", model.num_parameters(), len(tokenizer))

    started, losses = time.perf_counter(), []
    batches = rows(tokenizer, options.seed, "train", options.batch, options.length)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        loss = next_token_loss(model, next(batches).to(options.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            speed = (step + 1) * options.batch * options.length / (time.perf_counter() - started)
            logger.info("step %d loss %.4f, %.0f tokens/s", step + 1, np.mean(losses[-50:]), speed)
    seconds = time.perf_counter() - started

    valid = rows(tokenizer, options.seed, "validation", options.batch, options.length)
    valid_steps = 20
    with torch.no_grad():
        valid_loss = np.mean(
            [
                next_token_loss(model, next(valid).to(options.device)).item()
                for _ in range(valid_steps)
            ]
        )
    output = Path(options.output)
    model.to("cpu").save_pretrained(output)
    tokenizer.save_pretrained(output)
    tokens = options.steps * options.batch * options.length
    card = CARD.format(
        parameters=model.num_parameters(),
        vocabulary=len(tokenizer),
        steps=options.steps,
        batch=options.batch,
        length=options.length,
        tokens=tokens,
        lr=options.lr,
        seed=options.seed,
        hardware=options.hardware,
        seconds=seconds,
        speed=tokens / seconds,
        train_loss=np.mean(losses[-100:]),
        valid_loss=valid_loss,
        valid_tokens=valid_steps * options.batch * options.length,
        command=f"python {shlex.join(sys.argv)}",
    )
    (output / "README.md").write_text(card, encoding="utf-8")
    logger.info("wrote %s", output)


if __name__ == "__main__":
    run_script(main, __doc__, Options)
