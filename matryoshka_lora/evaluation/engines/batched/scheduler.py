"""What the batched engine computes next: what waits, what shares a prefill, how much fits."""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from transformers import PreTrainedModel

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.evaluation.engines.protocol import Point, Request
from matryoshka_lora.models import decoder_layers

logger = logging.getLogger(__name__)

DEVICE_LIMITS = {"cpu": (1024, 2048), "cuda": (4096, 65536)}
"""Per device: rows decoded together and tokens prefilled together, where nothing else is asked."""
CUDA_PREFILL_NUMBERS = 2**26
"""On CUDA a wide model prefills fewer tokens: tokens x hidden size at most."""
CPU_LOGITS_BYTES = 64 * 2**20
"""The logits of one prefill, in the model's dtype."""
CUDA_LOGITS_SHARE = 1 / 32
"""Likewise on CUDA, as a share of the device's memory."""
CPU_CACHE_BYTES = 512 * 2**20
"""The KV cache on the CPU."""


@dataclass
class Limits:
    """How much an engine computes at once; `Scheduler.halve` lowers it for good."""

    max_rows: int
    """Answers that are decoded together."""
    max_tokens: int
    """Tokens that are prefilled together, unless one group alone has more."""
    logits_bytes: int
    """Logits of one prefill."""

    @classmethod
    def of(cls, model: PreTrainedModel, max_rows: int | None, max_tokens: int | None) -> "Limits":
        """None: as many as suit the device and the model."""
        rows, tokens = DEVICE_LIMITS[model.device.type]
        logits_bytes = CPU_LOGITS_BYTES
        if model.device.type == "cuda":
            width = model.config.get_text_config().hidden_size
            tokens = min(tokens, max(CUDA_PREFILL_NUMBERS // width, 1))
            memory = torch.cuda.get_device_properties(model.device).total_memory
            logits_bytes = int(CUDA_LOGITS_SHARE * memory)
        return cls(max_rows or rows, max_tokens or tokens, logits_bytes)

    def cache_bytes(self, model: PreTrainedModel, sharded: bool) -> int:
        """Memory for the KV cache: what is free, less what a prefill and a decode step need."""
        if model.device.type == "cpu":
            return CPU_CACHE_BYTES
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(model.device)[0]
        config = model.config.get_text_config()
        # Hidden states and the inputs and outputs of attention and MLP, generously.
        numbers = 16 * config.hidden_size + 6 * config.intermediate_size
        needed = self.max_tokens * numbers * model.dtype.itemsize
        if sharded:  # the layer that computes, and the next one as it arrives and as it is used
            layers = [sum(p.numel() for p in x.parameters()) for x in decoder_layers(model)]
            needed += 3 * max(layers) * model.dtype.itemsize
        return int(0.92 * (free - needed - 2 * self.logits_bytes))


@dataclass
class Group:
    """Requests of one point with the same context, which is computed once for all of them."""

    point: int
    """Index of the point in the table of diagonals."""
    context: tuple[int, ...]
    generate: int | None = None
    """Index of the job to generate for."""
    scored: list[int] = field(default_factory=list)
    """Indices of the jobs whose targets follow the context."""


def group_requests(
    jobs: Sequence[tuple[Point, Request]], part: Iterable[int], index: dict[Point, int]
) -> list[Group]:
    """One group per point and context, and one more for every further answer to generate for it.

    part: indices of the jobs to group. index: of each point.
    """
    groups: list[Group] = []
    known: dict[tuple[int, tuple[int, ...]], Group] = {}
    for job in part:
        point, request = jobs[job]
        assert request.context, "a request has at least one token of context"
        key = (index[point], request.context)
        found = known.get(key)
        if found is None or (request.kind == "generate" and found.generate is not None):
            found = Group(*key)
            groups.append(found)
            known.setdefault(key, found)
        if request.kind == "generate":
            found.generate = job
        else:
            assert request.target, "a target has at least one token"
            found.scored.append(job)
    return groups


class Scheduler:
    """The groups that wait, which of them go next, and when to take further ones.

    Groups leave their queue only with `started`, after their prefill was launched, so that none is
    lost where memory runs out.
    """

    def __init__(
        self,
        parts: Iterable[Sequence[Group]],
        requests: Sequence[Request],
        limits: Limits,
        token_logits_bytes: int,
    ) -> None:
        """parts: the groups to compute, see `take`. requests: those of the jobs.

        token_logits_bytes: of the logits of one token.
        """
        self.requests, self.limits = requests, limits
        self._token_logits_bytes = token_logits_bytes
        self._parts = iter(parts)
        self._more = True
        self.scoring: deque[Group] = deque()
        """Groups without an answer to generate; they come first."""
        self.waiting: deque[Group] = deque()

    @property
    def busy(self) -> bool:
        """Whether groups wait, or may be there to take."""
        return bool(self._more or self.scoring or self.waiting)

    def take(self, free: int | None) -> None:
        """Take parts until more waits than one prefill, or the free rows of the cache, can hold.

        free: None where there is no cache yet.
        """
        if free == 0:
            return
        most = self.limits.max_rows if free is None else free
        while self._more and len(self.waiting) <= most and not self._fills_prefill():
            part = next(self._parts, None)
            if part is None:
                self._more = False
                return
            # Point by point, so that points become complete one after the other; within a point
            # the longest first, so that what shares a prefill or a decode step is of similar
            # length.
            ordered = sorted(part, key=lambda g: (g.point, -len(g.context)))
            self.scoring += [g for g in ordered if g.generate is None]
            self.waiting += [g for g in ordered if g.generate is not None]

    def _fills_prefill(self) -> bool:
        """Whether one of the queues holds more than one prefill."""
        queues = (self.scoring, self.waiting)
        return any(len(self._head(queue, len(queue))) < len(queue) for queue in queues)

    def next_scoring(self) -> list[Group]:
        """The groups of `scoring` to prefill now."""
        return self._head(self.scoring, len(self.scoring))

    def next_waiting(self, rows: int, active: int) -> list[Group]:
        """The groups of `waiting` to prefill now, where `active` of the cache's `rows` are decoded.

        None while few rows are free, so that prefills are full.
        """
        free = rows - active
        groups = self._head(self.waiting, free)
        enough = (
            active == 0
            or free >= rows / 4
            or (len(groups) == len(self.waiting) and not self._more)
            or sum(len(g.context) for g in groups) >= self.limits.max_tokens / 2
        )
        return groups if enough else []

    def _head(self, queue: deque[Group], most: int) -> list[Group]:
        """The first groups, `most` at most, that fit one prefill together; the first always."""
        chosen: list[Group] = []
        tokens = logits = 0
        max_logits = self.limits.logits_bytes // self._token_logits_bytes
        for g in islice(queue, most):
            lengths = [len(self.requests[job].target) for job in g.scored]
            tokens += len(g.context) + sum(n - 1 for n in lengths)
            logits += 1 + sum(lengths)
            if chosen and (tokens > self.limits.max_tokens or logits > max_logits):
                break
            chosen.append(g)
        return chosen

    def started(self, queue: deque[Group], groups: Sequence[Group]) -> None:
        """Take these groups from the head of their queue."""
        for _ in groups:
            queue.popleft()

    def cache_shape(
        self, model: PreTrainedModel, token_bytes: int, lockstep: bool
    ) -> tuple[int, int, int]:
        """(rows, tokens of a row, tokens of the longest answer) of a KV cache for all answers.

        As many rows as are asked for and memory allows, each for the longest request. token_bytes:
        what one token takes. lockstep: as many as the process with the least memory can hold.
        """
        asked = [request for request in self.requests if request.kind == "generate"]
        size = max(len(request.context) + request.max_new_tokens - 1 for request in asked)
        row_bytes = size * token_bytes
        fit = max(self.limits.cache_bytes(model, lockstep) // row_bytes, 1)
        if lockstep:
            least = torch.tensor(fit, device=model.device)
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
            fit = int(least)
        rows = min(self.limits.max_rows, len(asked), fit)
        logger.info(
            "decoding up to %d rows of %d tokens at a time (%.2f GiB of keys and values)",
            *(rows, size, rows * row_bytes / 2**30),
        )
        return rows, size, max(request.max_new_tokens for request in asked)

    def halve(self, decoding: Sequence[Group], rows: int | None) -> None:
        """After running out of memory: half as much at a time from now on.

        decoding: groups whose answers were being decoded and start again. rows: of the KV cache, if
        there was one. Raises UserError if nothing can be halved.
        """
        limits = self.limits
        if limits.max_tokens == 1 and (self.scoring or limits.max_rows == 1):
            raise UserError(
                "one request alone does not fit the free memory of the device; use a smaller "
                "model or dtype, fewer shots, or a larger device"
            )
        if not self.scoring:
            self.waiting.extendleft(reversed(decoding))
            limits.max_rows = max((rows or limits.max_rows) // 2, 1)
        limits.max_tokens = max(limits.max_tokens // 2, 1)
        logger.warning(
            "out of memory: going on with at most %d rows and %d tokens at a time",
            limits.max_rows,
            limits.max_tokens,
        )
