"""Let a finished run answer: one prompt at several ranks side by side, or a chat.

    python scripts/generate.py run=FOLDER ranks=0,1,8,32 prompt="Question: 2+2?\\nAnswer:"
    python scripts/generate.py run=FOLDER interactive=true

Rank 0 is the base model. All ranks answer in one batch, each row with its own diagonal, greedily.
In a chat `/rank 8`, `/rule svd` and `/base` switch what answers, `/new` forgets what was said and
`/quit` ends it.
"""

import dataclasses
import itertools
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from matryoshka_lora.cli import option, run_script
from matryoshka_lora.core.adapter import adapter_layers, adapter_view, diagonal, use_factors
from matryoshka_lora.core.diagonals import powers_of_two
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.rules import RULES, FactorSet, Reading, read
from matryoshka_lora.loading import LoadedRun, device_of, load_run
from matryoshka_lora.reporting.choosing import rule_for

GAP, NARROWEST = 3, 24
"""Characters between two columns, and of the narrowest column."""

Message = dict[str, str]


@dataclasses.dataclass
class Options:
    """The command line."""

    run: str = option(MISSING, "folder of the run")
    ranks: list[int] | None = option(
        None, "ranks that answer, 0 the base model; null: powers of 2, in a chat the largest"
    )
    rule: str | None = option(
        None,
        f"the rule to read the adapter by: {', '.join(RULES)}; null: the one that the record shows "
        "best, of several ranks at the lowest",
    )
    prompt: str | None = option(None, "what is asked; \\n stands for a line break")
    interactive: bool = option(False, "chat instead")
    max_new_tokens: int = option(200, "tokens that an answer may have")
    chat_template: bool | None = option(
        None, "whether a prompt is put into the tokenizer's chat template; null: if it has one"
    )
    device: str | None = option(None, "null: a GPU if there is one")
    model_path: str | None = option(None, "local folder of the base model; null: the run's own")

    def __post_init__(self) -> None:
        """Raises UserError for options that do not fit together."""
        if self.interactive == (self.prompt is not None):
            raise UserError("give either prompt=... or interactive=true")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be a positive number")
        if self.ranks is not None and not self.ranks:
            raise UserError("ranks is empty; give at least one, such as ranks=1,8")
        if self.interactive and self.ranks is not None and len(self.ranks) > 1:
            raise UserError(f"a chat is with one rank, not with ranks={self.ranks}; /rank switches")


class Talker:
    """A run's model that answers at ranks and by a rule, which may change between answers."""

    def __init__(self, run: LoadedRun, ranks: Sequence[int], rule: str | None) -> None:
        """Raises UserError as `switch` does."""
        self.run, self.model, self.tokenizer = run, run.model, run.tokenizer
        self._factors = ExitStack()
        self._in_place: FactorSet = "trained"
        self.switch(ranks, rule)

    def switch(self, ranks: Sequence[int], asked: str | None) -> None:
        """From now on answer at these ranks, by this rule; an error leaves all as it was.

        asked: None is the rule that the record shows best at the lowest of the ranks; a warning
        says at which others it is significantly worse. Raises UserError for a rank outside 0..R,
        and a rule that is unknown or refused.
        """
        view = adapter_view(self.model)
        lowest, *others = sorted({rank for rank in ranks if rank}) or [self.run.spec.rank]
        rule = rule_for(self.run.record, self.run.spec, lowest, asked)
        for rank in others:
            rule_for(self.run.record, self.run.spec, rank, rule)
        self.readings = [read(view, rank, rule) for rank in ranks]
        self.ranks, self.rule, self.asked = list(ranks), rule, asked
        # Of the base nothing is read, in whichever factors.
        sets = {r.factors for r, rank in zip(self.readings, ranks, strict=True) if rank}
        assert len(sets) <= 1, "a rule reads one set of factors"
        for factors in sets - {self._in_place}:
            self._factors.close()
            self._factors.enter_context(use_factors(self.model, factors))
            self._in_place = factors

    @property
    def names(self) -> list[str]:
        """What answers, by row: rank, rule, parameters."""
        return [
            f"rank {rank} {self.rule}, {self._parameters(reading):,} parameters"
            if rank
            else "base model"
            for rank, reading in zip(self.ranks, self.readings, strict=True)
        ]

    def _parameters(self, reading: Reading) -> int:
        return sum(
            (layer.in_features + layer.out_features) * int((_of_layer(reading, name) != 0).sum())
            for name, layer in adapter_layers(self.model).items()
        )

    def answer(
        self, tokens: Sequence[int], limit: int, show: Callable[[list[str]], None]
    ) -> tuple[list[str], float]:
        """The greedy answers to a prompt, by row, and tokens a second over all rows.

        show: is called with the texts so far after each token.
        """
        rows = _Rows(self.model, self.tokenizer, len(self.ranks), show)
        prompt = torch.tensor([tokens] * len(self.ranks), device=self.model.device)
        p = {
            name: torch.stack([_of_layer(reading, name) for reading in self.readings])[:, None]
            for name in adapter_layers(self.model)
        }
        began = time.monotonic()
        with diagonal(self.model, p), torch.no_grad():
            self.model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=limit,
                do_sample=False,
                num_beams=1,
                pad_token_id=rows.pad,
                streamer=rows,
            )
        seconds = time.monotonic() - began
        return rows.texts, sum(map(len, rows.tokens)) / seconds


class _Rows(BaseStreamer):
    """Takes the tokens of each step of `generate`, one a row; a row ends with its end token."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        show: Callable[[list[str]], None],
    ) -> None:
        assert model.generation_config is not None
        ends = model.generation_config.eos_token_id
        self._ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
        padding = tokenizer.pad_token_id
        self.pad: int = padding if padding is not None else min(self._ends, default=0)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self._ended = [False] * count
        self._tokenizer, self._show, self._prompt = tokenizer, show, True

    @property
    def texts(self) -> list[str]:
        """By row."""
        return [str(self._tokenizer.decode(row, skip_special_tokens=True)) for row in self.tokens]

    def put(self, value: Tensor) -> None:
        if self._prompt:  # the first thing that is put
            self._prompt = False
            return
        for row, token in enumerate(value.tolist()):
            if not self._ended[row]:
                self.tokens[row].append(token)
                self._ended[row] = token in self._ends
        # The next token may make another character of what is not a whole one yet.
        self._show([text.rstrip("\ufffd") for text in self.texts])

    def end(self) -> None:
        pass


def _of_layer(reading: Reading, name: str) -> Tensor:
    return reading.p if isinstance(reading.p, Tensor) else reading.p[name]


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: bool | None
) -> list[int]:
    """The tokens of a conversation that the model is to go on with.

    Without a template that is the last message alone. Raises UserError where there is no template,
    though one is asked for.
    """
    has = tokenizer.chat_template is not None
    if template and not has:
        raise UserError("chat_template=true, but the tokenizer of this model has none")
    if has and template is not False:
        found: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )
        return list(found["input_ids"])
    tokens: list[int] = list(tokenizer(messages[-1]["content"])["input_ids"])
    if not tokens:
        raise UserError("the prompt has no token; give what is to be asked")
    return tokens


def columns(names: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
    """Lines of a page of `width` characters with a column for each text, below its name."""
    side_by_side = min(len(texts), max(1, (width + GAP) // (NARROWEST + GAP)))
    each = max(1, (width + GAP) // side_by_side - GAP)
    lines: list[str] = []
    for first in range(0, len(texts), side_by_side):
        shown = slice(first, first + side_by_side)
        cells = []
        for name, text in zip(names[shown], texts[shown], strict=True):
            head = textwrap.wrap(name, each)
            cells.append([*head, "-" * each, *_wrapped(text, each)])
        for row in itertools.zip_longest(*cells, fillvalue=""):
            lines.append((" " * GAP).join(cell.ljust(each) for cell in row).rstrip())
        lines.append("")
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    parts = [textwrap.wrap(line, width) or [""] for line in text.strip("\n").splitlines()]
    return list(itertools.chain.from_iterable(parts))


def compare(talker: Talker, tokens: Sequence[int], limit: int) -> None:
    """Print the answers of all rows side by side, in a terminal while they grow."""
    live, drawn = sys.stdout.isatty(), 0

    def draw(texts: list[str], whole: bool = False) -> None:
        nonlocal drawn
        page = shutil.get_terminal_size()
        lines = columns(talker.names, texts, page.columns - 1)
        if not whole:
            lines = lines[-(page.lines - 1) :]  # what has left the screen cannot be redrawn
        back = f"\x1b[{drawn}F\x1b[J" if drawn else ""
        print(back + "\n".join(lines), flush=True)
        drawn = len(lines)

    texts, rate = talker.answer(tokens, limit, draw if live else lambda texts: None)
    draw(texts, whole=True)
    print(f"{rate:.0f} tokens/s")


def chat(talker: Talker, limit: int, template: bool | None) -> None:
    """Answer what is typed until `/quit` or the end of the input."""
    said: list[Message] = []
    speed = ""
    while True:
        print(f"[{talker.names[0]}{speed}]")
        try:
            line = input("> ").strip()
        except EOFError:
            return
        command, _, value = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/new":
                said.clear()
            elif command == "/base":
                talker.switch([0], talker.asked)
            elif command == "/rank":
                if not value.strip().isdecimal():
                    raise UserError("/rank takes a rank, such as /rank 8")
                talker.switch([int(value)], talker.asked)
            elif command == "/rule":
                talker.switch(talker.ranks, value.strip())
            elif command.startswith("/"):
                raise UserError(f"{command} is unknown; there are /rank /rule /base /new /quit")
            elif line:
                asked = {"role": "user", "content": line.replace("\\n", "\n")}
                tokens = encode(talker.tokenizer, [*said, asked], template)
                shown = ""

                def show(texts: list[str]) -> None:
                    nonlocal shown
                    print(texts[0][len(shown) :], end="", flush=True)
                    shown = texts[0]

                (text,), rate = talker.answer(tokens, limit, show)
                print(text[len(shown) :])
                said += [asked, {"role": "assistant", "content": text}]
                speed = f", {rate:.0f} tokens/s"
        except UserError as error:
            print(error)


def main(options: Options) -> None:
    """Raises UserError for what `load_run` refuses, and ranks and rules that cannot be read."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_run(options.run, device=device_of(device), model_path=options.model_path)
    full = loaded.spec.rank
    ranks = options.ranks or ([full] if options.interactive else powers_of_two(full))
    talker = Talker(loaded, ranks, options.rule)
    if options.interactive:
        chat(talker, options.max_new_tokens, options.chat_template)
        return
    assert options.prompt is not None
    asked = {"role": "user", "content": options.prompt.replace("\\n", "\n")}
    tokens = encode(loaded.tokenizer, [asked], options.chat_template)
    compare(talker, tokens, options.max_new_tokens)


if __name__ == "__main__":
    run_script(main, __doc__, Options)
