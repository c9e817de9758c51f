"""What the rank sweep asks of an engine, and nothing about how an engine answers it."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lm_eval.api.instance import Instance

from matryoshka_lora.core.rules import Diagonal, FactorSet


@dataclass(frozen=True)
class Point:
    """One reading of the adapter: a rank and a rule, and the factors and diagonal they mean."""

    rank: int
    """0 is the base model."""
    rule: str
    """base, or an inference rule such as prefix."""
    factors: FactorSet
    """The factor set, trained or svd; the sweep puts it in place before it calls the engine."""
    p: Diagonal = field(compare=False, repr=False)
    """(R,) for all layers, or layer -> its own (R,); float32, on the CPU."""


@dataclass(frozen=True, eq=False)
class Request:
    """One question to the model, tokenised and truncated as lm-eval's HF backend does it."""

    kind: Literal["generate", "loglikelihood"]
    doc_id: int
    context: tuple[int, ...]
    """Prompt token ids."""
    target: tuple[int, ...]
    """loglikelihood: the continuation's token ids; the context and these fit the model's window."""
    until: tuple[str, ...]
    """generate: stop strings (the tokenizer's end of text included, as the harness adds it)."""
    max_new_tokens: int
    """generate: the most tokens to produce."""
    instance: Instance
    """The harness's own form of the same request."""


@dataclass(frozen=True)
class Output:
    """generate: `text`, cut at the first stop string. loglikelihood: the rest."""

    text: str = ""
    logprob: float = 0.0
    """Sum of log p(target | context) in nats."""
    is_greedy: bool = False
    """Whether every target token is the most likely one."""


Answers = list[tuple[int, Output]]
"""(index of a job, its output)"""
Outputs = Generator[tuple[int, Output], None, None]
"""The same one by one, until it ends or is closed."""


class Engine(Protocol):
    """Answers jobs; all jobs of one call share a factor set, ranks and rules mix freely."""

    lockstep: bool
    """The base is sharded over processes, so all must answer the same jobs by the same forwards."""

    def run(
        self, jobs: Sequence[tuple[Point, Request]], parts: Iterator[range] | None = None
    ) -> Outputs:
        """Yield (index into `jobs`, output) in any order, each index once, as answers come.

        parts: the indices to answer, of which the engine takes the next ones when it has room for
        them, so that what it does not take is left for other processes. None: all.
        """
        ...
