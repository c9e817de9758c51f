"""The batched engine: all points of a sweep answered together, every row with its own diagonal.

Contexts are prefilled as one packed row after another, without padding and with logits only where
they are read; a context that several requests of a point share is computed once. Answers are then
decoded greedily, all rows together, one token a step; rows that end make room for waiting ones. The
host looks at the tokens every few steps only, and while the device works on the next: what a row
produced past its end is cut off there.

The answers are those of lm-eval's HF backend at batch size 1 (its larger batches end a row later,
which matters only where a stop string crosses another or is a special token).
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, islice, product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.core.adapter import adapter_layers
from matryoshka_lora.core.diagonals import powers_of_two
from matryoshka_lora.core.layer import AdapterLinear
from matryoshka_lora.evaluation.engines.batched.fused import fused
from matryoshka_lora.evaluation.engines.batched.stops import StopStrings
from matryoshka_lora.evaluation.engines.hf import evaluation_mode
from matryoshka_lora.evaluation.engines.protocol import Output, Outputs, Point, Request
from matryoshka_lora.ops.attention import FLASH_DTYPES, packed, packed_attention, packed_inputs
from matryoshka_lora.ops.device import to_device, to_host
from matryoshka_lora.ops.graphs import Graphs
from matryoshka_lora.ops.kernels import AVAILABLE

logger = logging.getLogger(__name__)

Answers = list[tuple[int, Output]]

STEPS_PER_LOOK = {"cpu": 1, "cuda": 4}
"""Decoding steps between two looks of the host. A finished row idles for half of them on average,
and for all of them with every look behind. A CPU has nothing to wait for."""
LOOKS_BEHIND = {"cpu": 0, "cuda": 1}
"""Prefills or rounds of steps that are asked for before the host looks at an earlier one."""
CPU_SLOTS_BYTES = 512 * 2**20
"""Keys and values held on the CPU at most."""
LIMITS = {"cpu": (1024, 2048), "cuda": (4096, 65536)}
"""Per device: rows decoded together and tokens prefilled together, where nothing else is asked."""
CUDA_PREFILL_NUMBERS = 2**26
"""On CUDA a wide model prefills fewer tokens: tokens x hidden size at most."""
CPU_LOGITS_BYTES = 64 * 2**20
"""The logits of one prefill, in the model's dtype."""
CUDA_LOGITS_SHARE = 1 / 32
"""Likewise on CUDA, as a share of the device's memory."""
LOGPROB_ROWS = 1024
"""Rows of logits that are turned to float32 at a time."""
LEAST_RANK = 8
"""Rows of the factors that are computed with at least; tensor cores want multiples of it."""
ATTENTION_TOLERANCE = 0.02
"""Relative difference allowed between two attentions in half precision; bf16 rounds by 0.004."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "penalty_alpha": (None, 0.0),
    "stop_strings": (None,),
    "max_time": (None,),
}
"""Settings of a generation config that change greedy answers, and the values that do not."""


class BatchedEngine:
    """Answers the jobs of any mix of points together; see `Engine`.

    max_rows: answers decoded at once; max_tokens: tokens prefilled at once. By default both follow
    from the device and its free memory. Where memory runs out all the same, both are halved for
    good, the rows in flight start again, and the log says so.

    cuda_graphs: replay decoding steps as CUDA graphs, on a GPU: a step then takes what the device
    needs, not what the host needs to ask for it.

    lockstep: the base is sharded over processes that all answer the same jobs, so all must run the
    same forwards: they decode as many rows as the one with the least memory can, and running out of
    memory is an error.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int | None = None,
        max_tokens: int | None = None,
        cuda_graphs: bool = False,
        lockstep: bool = False,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        refuse(model)
        rows, tokens = LIMITS[model.device.type]
        self.logits_bytes = CPU_LOGITS_BYTES
        if model.device.type == "cuda":
            width = model.config.get_text_config().hidden_size
            tokens = min(tokens, max(CUDA_PREFILL_NUMBERS // width, 1))
            memory = torch.cuda.get_device_properties(model.device).total_memory
            self.logits_bytes = int(CUDA_LOGITS_SHARE * memory)
        self.model = model
        self.max_rows = max_rows or rows
        self.max_tokens = max_tokens or tokens
        # Sharded weights are gathered anew in each forward, so they are in no fixed place.
        self.cuda_graphs = cuda_graphs and model.device.type == "cuda" and not lockstep
        self.lockstep = lockstep
        self.stops = StopStrings(tokenizer)

    def run(self, jobs: Sequence[tuple[Point, Request]]) -> Outputs:
        """See `Engine.run`. The model is the engine's until the iterator ends or is closed."""
        if not jobs:
            return
        assert len({point.factors for point, _ in jobs}) == 1, "one factor set a call"
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(packed_attention(self.model))
            layers = stack.enter_context(compute_factors(self.model))
            # Only while it works: what the caller does between two answers is not the engine's.
            here: AbstractContextManager[Any] = nullcontext()
            if self.model.device.type == "cuda":
                here = torch.cuda.device(self.model.device)
            with here:
                if not self.lockstep:  # sharded weights are gathered inside the modules
                    stack.enter_context(fused(self.model))
                batch = Batch(self, layers, jobs)
            while batch.busy:
                answers = None
                try:
                    with here:
                        answers = batch.advance()
                except torch.OutOfMemoryError as error:
                    logger.debug("out of memory", exc_info=error)
                # Outside the handler, where the failed call's tensors are gone.
                if answers is None:
                    yield from batch.look()
                    if self.lockstep:
                        raise ValueError(
                            "out of memory, which sharded processes cannot recover from one by "
                            "one; use eval.engine=hf with a small eval.batch_size, or fewer shots"
                        )
                    batch.halve()
                else:
                    yield from answers


def refuse(model: PreTrainedModel) -> None:
    """Raises ValueError for what greedy decoding here would not do as transformers does it."""
    if model.device.type not in LIMITS:
        raise ValueError(
            f"the batched engine runs on {' and '.join(LIMITS)}, the model is on "
            f"{model.device}; use eval.engine=hf"
        )
    for name, neutral in NEUTRAL.items():
        value = getattr(model.generation_config, name, None)
        if value not in neutral:
            raise ValueError(
                f"the model's generation config sets {name}={value!r}, which changes greedy "
                "answers and which the batched engine does not do; use eval.engine=hf"
            )


@contextmanager
def compute_factors(model: PreTrainedModel) -> Iterator[list[AdapterLinear]]:
    """The adapter layers, factors in the dtype of the computation so that no forward casts them.

    They are rounded where the layer would round them. Factors and diagonals are restored.
    """
    layers = list(adapter_layers(model).values())
    before = [(layer.lora_A.data, layer.lora_B.data, layer.p) for layer in layers]
    try:
        for layer in layers:
            layer.lora_A.data = layer.lora_A.data.to(model.dtype)
            layer.lora_B.data = layer.lora_B.data.to(model.dtype)
        yield layers
    finally:
        for layer, (A, B, p) in zip(layers, before, strict=True):
            layer.lora_A.data, layer.lora_B.data, layer.p = A, B, p


@dataclass
class Group:
    """Requests of one point with the same context, which is computed once for all of them."""

    point: int
    """Row of the table of diagonals."""
    context: tuple[int, ...]
    generate: int | None = None
    """Index of the job to generate for."""
    endings: list[int] = field(default_factory=list)
    """Indices of the jobs whose targets follow the context."""


@dataclass(frozen=True)
class KeyShape:
    """What one layer keeps of a token: (kv_heads, d) of key and value."""

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one token."""
        numbers = self.key[0] * self.key[1] + self.value[0] * self.value[1]
        return numbers * self.dtype.itemsize


class Probe(Cache):
    """Learns from one forward what each layer keeps of a token."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: list[KeyShape] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model."""
        assert layer_idx == len(self.shapes), "layers that share keys are not supported"
        key, value = ((x.shape[1], x.shape[3]) for x in (key_states, value_states))
        self.shapes.append(KeyShape(key, value, key_states.dtype))
        return key_states, value_states


class Slots(Cache):
    """Keys and values of all rows, per layer (rows, kv_heads, size, d): row i owns one stretch.

    `write_to` says where the next forward's keys go, `source` which tokens of the packed row they
    are of (None: all). While `decoding` that many rows, attention sees their slots, otherwise only
    the forward's own keys.
    """

    source: Tensor | None

    def __init__(
        self, layers: Sequence[KeyShape], rows: int, size: int, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        self.rows, self.size, self.decoding = rows, size, 0
        # Zeros, not empty: a masked key has weight 0, but 0 * nan would be nan.
        self.keys, self.values = (
            [
                torch.zeros(rows, heads, size, width, dtype=x.dtype, device=device)
                for (heads, width), x in pairs
            ]
            for pairs in ([(x.key, x) for x in layers], [(x.value, x) for x in layers])
        )
        heads = {x.shape[1] for x in (*self.keys, *self.values)}
        self._heads = {n: torch.arange(n, device=device) for n in heads}
        self._places: dict[int, Tensor] = {}

    def write_to(self, rows: Tensor, positions: Tensor) -> None:
        """Keys of token i of the next forward go to this row, to this place in it; both (T,)."""
        self._places = {
            n: ((rows[:, None] * n + heads) * self.size + positions[:, None]).flatten()
            for n, heads in self._heads.items()
        }

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model: (1, kv_heads, T, d) in; what attention is to see out."""
        key = self._write(key_states, self.keys[layer_idx])
        value = self._write(value_states, self.values[layer_idx])
        return (key, value) if self.decoding else (key_states, value_states)

    def _write(self, states: Tensor, slots: Tensor) -> Tensor:
        tokens = states[0].transpose(0, 1)
        if self.source is not None:
            tokens = tokens[self.source]
        slots.flatten(0, 2).index_copy_(0, self._places[slots.shape[1]], tokens.flatten(0, 1))
        return slots[: self.decoding]

    def move(self, source: Tensor, destination: Tensor, used: int) -> None:
        """Copy the first `used` tokens of the rows `source` to the rows `destination`."""
        for slots in (*self.keys, *self.values):
            rows = slots[:, :, :used]
            rows[destination] = rows[source]


class Rows:
    """The answers being decoded: rows 0 .. used-1, but for those in `holes`, which are complete.

    On the device, per row: the token that goes in next, its position, the row's last position
    (where it stays when it is done before the host has noticed), its diagonal (1, rows, R). On the
    host: the row's group, the lengths of its context and of its answer (as seen, as asked for, at
    most), the numbers of its stop strings and of its point, and the tokens of its answer.

    Rows move and are filled again while the host has yet to look at some of their tokens, so it
    knows answers by a number that stays: `row_of` has the row of each, -1 once it is complete.
    """

    def __init__(self, slots: Slots, longest: int, table: Tensor) -> None:
        """longest: tokens of an answer; table: (points, R), the diagonals."""
        self.slots, self.table, device = slots, table, table.device
        self.graphs: Graphs | None = None
        n = slots.rows
        self.used = 0
        self.holes: list[int] = []
        self.rows = torch.arange(n, device=device)
        self.token = torch.zeros(n, dtype=torch.long, device=device)
        self.position, self.last = torch.zeros(2, n, dtype=torch.int32, device=device)
        self.p = table.new_zeros(1, n, table.shape[1])
        self.group: list[Group | None] = [None] * n
        self.context, self.count, self.asked, self.limit = np.zeros((4, n), dtype=np.int64)
        self.rule, self.point, self.number = np.zeros((3, n), dtype=np.int64)
        self.row_of = np.zeros(0, dtype=np.int64)
        self.history = np.zeros((n, longest + STEPS_PER_LOOK[device.type]), dtype=np.int64)

    @property
    def active(self) -> int:
        return self.used - len(self.holes)

    def groups(self) -> list[Group]:
        """Of the rows that are not complete."""
        holes = set(self.holes)
        return [g for i, g in enumerate(self.group[: self.used]) if g and i not in holes]

    def free(self, n: int) -> list[int]:
        """The n rows that would be filled next."""
        return [*self.holes, *range(self.used, self.slots.rows)][:n]

    def fill(
        self, groups: Sequence[Group], limits: Sequence[int], rules: np.ndarray, tokens: Tensor
    ) -> np.ndarray:
        """Start rows whose contexts stand in the slots; the numbers of their answers.

        tokens: the first of each answer.
        """
        rows = self.free(len(groups))
        self.context[rows] = [len(g.context) for g in groups]
        self.count[rows], self.asked[rows], self.limit[rows], self.rule[rows] = 0, 1, limits, rules
        self.point[rows] = [g.point for g in groups]
        at, points = self._index(rows), self._index(self.point[rows])
        self.token[at] = tokens
        last = self.context[rows] + self.limit[rows] - 2
        # A row that its first token completes stays in place until the host has noticed, too.
        self.position[at] = self._index(np.minimum(self.context[rows], last)).int()
        self.last[at] = self._index(last).int()
        self.p[0, at] = self.table[points]
        # Last, so that rows count as filled only where memory did not run out on the way.
        for row, g in zip(rows, groups, strict=True):
            self.group[row] = g
        self.holes = self.holes[len(groups) :]
        self.used = max(self.used, *(row + 1 for row in rows))
        self.number[rows] = numbers = len(self.row_of) + np.arange(len(rows))
        self.row_of = np.append(self.row_of, rows)
        return numbers

    def compact(self) -> None:
        """Move the last rows into the holes, so that the rows to decode are the first ones."""
        holes, keep = set(self.holes), self.active
        to = sorted(row for row in holes if row < keep)
        source = [row for row in range(keep, self.used) if row not in holes]
        self.used, self.holes = keep, []
        if to:
            self._move(to, source)
        # A step may take rows behind the used ones along: these then have one token each.
        self.position[keep:] = 0
        self.last[keep:] = 0

    def _move(self, to: list[int], source: list[int]) -> None:
        lengths = (self.context, self.count, self.asked, self.limit)
        for array in (*lengths, self.rule, self.point, self.number, self.history):
            array[to] = array[source]
        self.row_of[self.number[to]] = to
        for new, old in zip(to, source, strict=True):
            self.group[new] = self.group[old]
        target, origin = self._index(to), self._index(source)
        for buffer in (self.token, self.position, self.last, self.p[0]):
            buffer[target] = buffer[origin]
        self.slots.move(origin, target, int((self.context[to] + self.asked[to]).max()))

    def _index(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        return to_device(torch.as_tensor(numbers, dtype=torch.long), self.table.device)


class Batch:
    """The state of one `run`: what waits, and what is being decoded."""

    def __init__(
        self,
        engine: BatchedEngine,
        layers: Sequence[AdapterLinear],
        jobs: Sequence[tuple[Point, Request]],
    ) -> None:
        self.engine, self.layers, self.model = engine, layers, engine.model
        self.device = engine.model.device
        self.requests = [request for _, request in jobs]
        points = list(dict.fromkeys(point for point, _ in jobs))
        table = torch.stack([point.p for point in points])
        self.table = table.to(self.device, self.model.dtype)
        self.ranks = live_ranks(table)
        self.factors = [(layer.lora_A.data, layer.lora_B.data) for layer in layers]
        groups = group(jobs, {point: row for row, point in enumerate(points)})
        # Point by point, so that points become complete one after the other; within a point the
        # longest first, so that what shares a prefill or a step is of similar length.
        groups.sort(key=lambda g: (g.point, -len(g.context)))
        self.scoring = deque(g for g in groups if g.generate is None)
        self.waiting = deque(g for g in groups if g.generate is not None)
        self.rows: Rows | None = None
        self.unseen: deque[Callable[[], Answers]] = deque()
        """What looks at the prefills and rounds that were asked of the device, in their order."""
        self.rules = np.array([engine.stops.rule(request.until) for request in self.requests])
        eos = self.model.generation_config.eos_token_id
        self.eos = np.array([] if eos is None else eos).reshape(-1)
        # Whether to use the plain functions of attention in prefills, in decoding.
        self.plain = [False, False]
        self.shapes = self._probe()
        if self.device.type == "cuda":
            self.plain = [
                not attention_agrees(self.model, self.shapes, self.device, decoding)
                for decoding in (False, True)
            ]

    @property
    def busy(self) -> bool:
        active = self.rows is not None and self.rows.active
        return bool(self.scoring or self.waiting or self.unseen or active)

    @torch.no_grad()
    def advance(self) -> Answers:
        """Ask for a prefill or a round of decoding; the answers that an earlier one completed."""
        asked = self._ask()
        if asked is not None:
            self.unseen.append(asked)
        if asked is None or len(self.unseen) > LOOKS_BEHIND[self.device.type]:
            return self.unseen.popleft()()
        return []

    def look(self) -> Answers:
        """At all that was asked for."""
        answers: Answers = []
        while self.unseen:
            answers += self.unseen.popleft()()
        return answers

    def _ask(self) -> Callable[[], Answers] | None:
        """None: there is nothing to do before the host has looked at what was done."""
        if self.scoring:
            groups = self._take(self.scoring, len(self.scoring))
            look, _ = self._prefill(groups, None)
            for _ in groups:
                self.scoring.popleft()
            return look
        if self.rows is None:
            if not self.waiting:
                return None
            self.rows = self._allocate()
        if groups := self._refill(self.rows):
            return self._admit(groups, self.rows)
        self.rows.compact()
        return self._round(self.rows)

    def halve(self) -> None:
        """After running out of memory: half as much at a time; rows in flight start again."""
        engine = self.engine
        if not self.scoring:
            if engine.max_rows == engine.max_tokens == 1:
                raise ValueError(
                    "one request alone does not fit the free memory of the device; use a smaller "
                    "model or dtype, fewer shots, or a larger device"
                )
            if self.rows is not None:
                self.waiting.extendleft(reversed(self.rows.groups()))
                engine.max_rows = self.rows.slots.rows
            self.rows = None
            engine.max_rows = max(engine.max_rows // 2, 1)
        elif engine.max_tokens == 1:
            raise ValueError(
                "one request alone does not fit the free memory of the device; use a smaller "
                "model or dtype, fewer shots, or a larger device"
            )
        engine.max_tokens = max(engine.max_tokens // 2, 1)
        logger.warning(
            "out of memory: going on with at most %d rows and %d tokens at a time",
            engine.max_rows,
            engine.max_tokens,
        )

    def _take(self, queue: deque[Group], rows: int) -> list[Group]:
        """The groups at the head of `queue` that fit `rows` and one prefill; the first always."""
        taken: list[Group] = []
        tokens = kept = 0
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        most = self.engine.logits_bytes // (vocabulary * self.model.dtype.itemsize)
        for g in islice(queue, rows):
            lengths = [len(self.requests[job].target) for job in g.endings]
            tokens += len(g.context) + sum(n - 1 for n in lengths)
            kept += 1 + sum(lengths)
            if taken and (tokens > self.engine.max_tokens or kept > most):
                break
            taken.append(g)
        return taken

    def _refill(self, rows: Rows) -> list[Group]:
        """The groups to prefill now: none while there is little room, so that prefills are full."""
        free = rows.slots.rows - rows.active
        groups = self._take(self.waiting, free)
        enough = (
            rows.active == 0
            or free >= rows.slots.rows / 4
            or len(groups) == len(self.waiting)
            or sum(len(g.context) for g in groups) >= self.engine.max_tokens / 2
        )
        return groups if enough else []

    def _admit(self, groups: list[Group], rows: Rows) -> Callable[[], Answers]:
        """Prefill into free rows; answers endings, and what is complete with its first token."""
        look, tokens = self._prefill(groups, rows)
        jobs = [g.generate for g in groups if g.generate is not None]
        limits = [self.requests[job].max_new_tokens for job in jobs]
        # Should they have to start again, their endings are answered.
        numbers = rows.fill(
            [replace(g, endings=[]) for g in groups], limits, self.rules[jobs], tokens
        )
        for _ in groups:
            self.waiting.popleft()
        absorb = self._absorb_later(rows, numbers, tokens[:, None])
        return lambda: look() + absorb()

    def _prefill(
        self, groups: list[Group], rows: Rows | None
    ) -> tuple[Callable[[], Answers], Tensor]:
        """Forward one packed row; a look at its endings and the first token of each group.

        rows: where the groups' contexts are kept; None keeps nothing.
        """
        prefill = Prefill(groups, self.requests, self.device)
        slots = None
        if rows is not None:
            slots, places = rows.slots, rows.free(len(groups))
            slots.source, *to = prefill.contexts(places)
            slots.write_to(*to)
            slots.decoding = 0
        rank = self._cut([g.point for g in groups])
        self._set_diagonal(self.table[prefill.points][None, :, :rank])
        logits = self._forward(prefill.ids, prefill.inputs, slots, prefill.kept)
        tokens = most_likely(logits[prefill.firsts])
        if not prefill.jobs:
            return list, tokens
        logprobs, greedy = target_logprobs(logits, prefill.scored, prefill.targets)
        copies = to_host({"logprobs": logprobs, "greedy": greedy})

        def look() -> Answers:
            logprobs, greedy = (x.numpy() for x in copies().values())
            answers, start = [], 0
            for job in prefill.jobs:
                own = slice(start, start + len(self.requests[job].target))
                total, likeliest = float(logprobs[own].sum()), bool(greedy[own].all())
                answers.append((job, Output(logprob=total, is_greedy=likeliest)))
                start = int(own.stop)
            return answers

        return look, tokens

    def _round(self, rows: Rows) -> Callable[[], Answers] | None:
        """Some tokens for every row, unless all that they can have are asked for."""
        n = rows.used
        lacking = int((rows.limit[:n] - rows.asked[:n]).max(initial=0))
        if lacking <= 0:
            return None
        steps = min(STEPS_PER_LOOK[self.device.type], lacking)
        longest = int((rows.context[:n] + rows.asked[:n]).max())
        taken = n if rows.graphs is None else min(round_up(n), rows.slots.rows)
        rows.slots.decoding, rows.slots.source = taken, None
        rank = self._cut(rows.point[:n])
        self._set_diagonal(rows.p[:, :taken, :rank])
        new = []
        for i in range(steps):
            if rows.graphs is None:
                token = self._step(rows, taken, min(longest + i, rows.slots.size))
            else:
                step = partial(self._step, rows, taken, rows.slots.size)
                token = rows.graphs("step", (taken, rank), step).clone()
            new.append(token[:n])
        rows.asked[:n] += steps
        return self._absorb_later(rows, rows.number[:n].copy(), torch.stack(new, 1))

    def _step(self, rows: Rows, n: int, longest: int) -> Tensor:
        """One token for the first n rows, whose slots hold at most `longest` tokens with this one.

        Works in place on buffers that stay where they are and waits for nothing, so that it can be
        captured.
        """
        token, position = rows.token[:n], rows.position[:n]
        rows.slots.write_to(rows.rows[:n], position)
        inputs = {
            "position_ids": position[None].long(),
            "max_length_k": longest,
            "kv_lengths": position + 1,
        }
        new = most_likely(self._forward(token[None], inputs, rows.slots, 0))
        token.copy_(new)
        position.copy_(torch.minimum(position + 1, rows.last[:n]))
        return new

    def _absorb_later(
        self, rows: Rows, numbers: np.ndarray, tokens: Tensor
    ) -> Callable[[], Answers]:
        """A look at new tokens (len(numbers), steps) of these answers."""
        copies = to_host({"tokens": tokens})
        return lambda: self._absorb(rows, numbers, copies()["tokens"].numpy())

    def _absorb(self, rows: Rows, numbers: np.ndarray, tokens: np.ndarray) -> Answers:
        """Note new tokens of the answers that are not complete; those that are then."""
        which = rows.row_of[numbers]
        which, tokens = which[which >= 0], tokens[which >= 0]
        if not len(which):
            return []
        steps = tokens.shape[1]
        before, limit, rules = rows.count[which], rows.limit[which], rows.rule[which]
        rows.history[which[:, None], before[:, None] + np.arange(steps)] = tokens
        is_eos = np.isin(tokens, self.eos)
        end = np.minimum(before + np.where(is_eos.any(1), is_eos.argmax(1) + 1, steps), limit)
        done = is_eos.any(1) | (end == limit)
        histories = rows.history[which, : int(end.max())]
        for i in self.engine.stops.candidates(rules, histories, before, end):
            found = self.engine.stops.find(rules[i], histories[i], before[i], end[i])
            if found is not None:
                end[i], done[i] = found, True
        rows.count[which] = end
        answers = []
        for row, rule, tokens in zip(which[done], rules[done], histories[done], strict=True):
            complete = rows.group[row]
            assert complete is not None and complete.generate is not None
            text = self.engine.stops.text(rule, tokens[: rows.count[row]])
            answers.append((complete.generate, Output(text=text)))
        rows.row_of[rows.number[which[done]]] = -1
        rows.holes += which[done].tolist()
        return answers

    def _allocate(self) -> Rows:
        """As many rows as are asked for and memory allows, each for the longest request."""
        asked = [self.requests[g.generate] for g in self.waiting if g.generate is not None]
        size = max(len(request.context) + request.max_new_tokens - 1 for request in asked)
        a_row = size * sum(shape.bytes for shape in self.shapes)
        fit = max(self._free_bytes() // a_row, 1)
        if self.engine.lockstep:
            least = torch.tensor(fit, device=self.device)
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
            fit = int(least)
        rows = min(self.engine.max_rows, len(asked), fit)
        logger.info(
            "decoding up to %d rows of %d tokens at a time (%.2f GiB of keys and values)",
            *(rows, size, rows * a_row / 2**30),
        )
        slots = Slots(self.shapes, rows, size, self.device)
        made = Rows(slots, max(request.max_new_tokens for request in asked), self.table)
        if self.engine.cuda_graphs:
            made.graphs = Graphs()
        return made

    def _free_bytes(self) -> int:
        """Memory for keys and values: what is free, less what a prefill and a step need."""
        if self.device.type == "cpu":
            return CPU_SLOTS_BYTES
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        config = self.model.config.get_text_config()
        # Hidden states and the inputs and outputs of attention and MLP, generously.
        numbers = 16 * config.hidden_size + 6 * config.intermediate_size
        needed = self.engine.max_tokens * numbers * self.model.dtype.itemsize
        return int(0.92 * (free - needed - 2 * self.engine.logits_bytes))

    @torch.no_grad()
    def _probe(self) -> list[KeyShape]:
        probe = Probe()
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self._set_diagonal(self.table[:1, None])
        self._forward(ids, packed_inputs([1], self.device), probe, 0)
        return probe.shapes

    def _cut(self, points: Sequence[int] | np.ndarray) -> int:
        """Leave out the rows of the factors that all these points multiply by 0; how many stay."""
        rank = int(self.ranks[points].max())
        if len(self.layers[0].lora_A) == rank:
            return rank
        for layer, (A, B) in zip(self.layers, self.factors, strict=True):
            # Views: a captured step finds them where they were.
            layer.lora_A.data, layer.lora_B.data = A[:rank], B[:, :rank]
        return rank

    def _set_diagonal(self, p: Tensor) -> None:
        for layer in self.layers:
            layer.p = p

    def _forward(
        self, ids: Tensor, inputs: dict[str, Any], cache: Cache | None, kept: Tensor | int
    ) -> Tensor:
        """ids: (1, T) -> the model's own logits (kept, vocabulary); kept 0 means all."""
        return self.model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=kept,
            reference=self.plain["kv_lengths" in inputs],
            **inputs,
        ).logits[0]


class Prefill:
    """One packed row: contexts, each followed by the endings that it is shared by.

    A context and its only ending, if any, are one document. With several endings each is a document
    of its own whose keys are the context's and its own; the first token of each is predicted by the
    context's last. An ending's last token is predicted but not read, so it is left out.
    """

    def __init__(
        self, groups: Sequence[Group], requests: Sequence[Request], device: torch.device
    ) -> None:
        ids: list[tuple[int, ...]] = []
        keys: list[range] = []
        lengths_q, lengths_k, offsets, starts, points = [], [], [], [], []
        kept: list[int] = []
        scored: list[int] = []
        targets: list[int] = []
        firsts: list[int] = []
        end = 0
        shared = False
        for g in groups:
            start, context, first = end, len(g.context), len(kept)
            starts.append(start)
            firsts.append(first)
            endings = [requests[job].target for job in g.endings]
            document = context + len(endings[0]) - 1 if len(endings) == 1 else context
            ids.append(g.context)
            end += context
            kept.append(end - 1)
            keys.append(range(start, start + document))
            lengths_q.append(document)
            lengths_k.append(document)
            offsets.append(0)
            for target in endings:
                own = range(end, end + len(target) - 1)
                ids.append(target[:-1])
                end = own.stop
                scored += [first, *range(len(kept), len(kept) + len(own))]
                kept += own
                targets += target
                if len(endings) > 1 and own:
                    shared = True
                    keys += [range(start, start + context), own]
                    lengths_q.append(len(own))
                    lengths_k.append(context + len(own))
                    offsets.append(context)
            points.append(end - start)
        self.jobs = [job for g in groups for job in g.endings]
        """Jobs in the order of their `targets`."""
        self._contexts = [(start, len(g.context)) for start, g in zip(starts, groups, strict=True)]
        self.ids = torch.from_numpy(np.concatenate([np.array(x, dtype=np.int64) for x in ids]))
        self.ids = to_device(self.ids[None], device)
        self.points = to_device(
            torch.repeat_interleave(torch.tensor([g.point for g in groups]), torch.tensor(points)),
            device,
        )
        """Row of the table of diagonals, of each token."""
        positions = np.concatenate(
            [np.arange(o, o + n) for o, n in zip(offsets, lengths_q, strict=True)]
        )
        self.inputs: dict[str, Any] = {
            "position_ids": to_device(torch.from_numpy(positions)[None], device),
            "cu_seq_lens_q": bounds(lengths_q, device),
            "cu_seq_lens_k": bounds(lengths_k, device),
            "max_length_q": max(lengths_q),
            "max_length_k": max(lengths_k),
        }
        if shared:
            index = np.concatenate([np.arange(r.start, r.stop) for r in keys])
            self.inputs["kv_index"] = to_device(torch.from_numpy(index), device)
        self.kept = to_device(torch.tensor(kept), device)
        """Tokens of the row that predict something."""
        self.firsts = to_device(torch.tensor(firsts), device)
        """Per group, which of the kept tokens predicts what follows the context."""
        self.scored = to_device(torch.tensor(scored), device)
        """Per target token, which of the kept tokens predicts it."""
        self.targets = to_device(torch.tensor(targets), device)

    def contexts(self, rows: Sequence[int]) -> tuple[Tensor | None, Tensor, Tensor]:
        """The contexts' tokens (None: all), and of each the row and the place in it."""
        starts, lengths = np.array(self._contexts).T
        places = np.concatenate([np.arange(length) for length in lengths])
        spread = (places + np.repeat(starts, lengths), np.repeat(rows, lengths), places)
        source, row, place = (torch.from_numpy(x) for x in spread)
        device = self.ids.device
        everything = len(source) == self.ids.shape[1]
        return (
            None if everything else to_device(source, device),
            to_device(row, device),
            to_device(place, device),
        )


def round_up(rows: int) -> int:
    """To one of two numbers an octave, at least 16: how many rows a captured step has."""
    unit = max(1 << max(rows.bit_length() - 2, 0), 16)
    return -(-rows // unit) * unit


def live_ranks(table: Tensor) -> np.ndarray:
    """(points, R) -> (points,): how many entries of each diagonal to compute with; others are 0.

    Powers of two from LEAST_RANK on, but R at most: few numbers, as each has graphs of its own.
    """
    places = torch.arange(1, table.shape[1] + 1)
    last = (places * (table != 0).to(places)).amax(1)
    largest = table.shape[1]
    allowed = np.array([r for r in powers_of_two(largest) if r >= min(LEAST_RANK, largest)])
    return allowed[np.searchsorted(allowed, last.numpy())]


def bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(len(lengths) + 1,) int32: where each document starts and ends."""
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def group(jobs: Sequence[tuple[Point, Request]], index: dict[Point, int]) -> list[Group]:
    """One group per point and context, and one more for every further answer to generate for it."""
    groups: list[Group] = []
    known: dict[tuple[int, tuple[int, ...]], Group] = {}
    for job, (point, request) in enumerate(jobs):
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
            found.endings.append(job)
    return groups


def most_likely(logits: Tensor) -> Tensor:
    """(..., vocabulary) -> (...): the greedy choice; as in transformers, in float32 at most."""
    return (logits.float() if logits.dtype == torch.float64 else logits).argmax(-1)


def target_logprobs(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each target token, predicted by `logits[rows]`: log p, and whether it is the likeliest.

    Softmax in float32, as the reference engine asks of the harness.
    """
    values, greedy = [], []
    for chunk, target in zip(rows.split(LOGPROB_ROWS), targets.split(LOGPROB_ROWS), strict=True):
        logprobs = F.log_softmax(logits[chunk], dim=-1, dtype=torch.float32)
        values.append(logprobs.gather(1, target[:, None])[:, 0])
        greedy.append(logprobs.argmax(-1) == target)
    return torch.cat(values), torch.cat(greedy)


@torch.no_grad()
def attention_agrees(
    model: PreTrainedModel, shapes: Sequence[KeyShape], device: torch.device, decoding: bool
) -> bool:
    """Whether the fast attention of prefills, or of decoding, gives what the plain functions give.

    Tried on random data of these shapes as it is used: endings that share a context, few and many
    rows of slots. torch's interface differs between versions, and a wrong answer would be silent.
    """
    if decoding and not AVAILABLE and any(shape.dtype in FLASH_DTYPES for shape in shapes):
        logger.warning("Triton is not installed, so decoding is slower")
        return False
    config = model.config.get_text_config()
    generator = torch.Generator(device).manual_seed(0)
    cases: list[tuple[int, tuple[int, int], dict[str, Any]]] = []
    if decoding:
        size = 640
        for rows in (3, 200):
            lengths = torch.randint(1, size + 1, (rows,), generator=generator, device=device)
            case = {"max_length_k": size, "kv_lengths": lengths.int()}
            cases.append((rows, (rows, size), case))
    else:
        lengths_q, lengths_k = [300, 5, 1, 70], [300, 305, 301, 70]
        case = {
            "cu_seq_lens_q": bounds(lengths_q, device),
            "cu_seq_lens_k": bounds(lengths_k, device),
            "max_length_q": max(lengths_q),
            "max_length_k": max(lengths_k),
        }
        cases.append((sum(lengths_q), (1, sum(lengths_k)), case))
    windows = {None, getattr(config, "sliding_window", None)}
    for shape, (tokens, (rows, size), case), window in product(set(shapes), cases, windows):
        if shape.dtype not in FLASH_DTYPES:
            continue
        query, key, value = (
            torch.randn(*sizes, dtype=shape.dtype, generator=generator, device=device)
            for sizes in (
                (1, config.num_attention_heads, tokens, shape.key[1]),
                (rows, shape.key[0], size, shape.key[1]),
                (rows, shape.value[0], size, shape.value[1]),
            )
        )
        options = case | {"sliding_window": window}
        try:
            found, expected = (
                packed(model, query, key, value, None, reference=plain, **options)[0].float()
                for plain in (False, True)
            )
        except Exception as reason:  # a compiler has errors of its own
            logger.warning("fast attention does not run here, using a slower one: %s", reason)
            return False
        error = float((found - expected).norm() / expected.norm())
        if not error < ATTENTION_TOLERANCE:
            logger.warning("fast attention is off by %.3g here, using a slower one", error)
            return False
    return True
