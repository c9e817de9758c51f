"""The answers that are being decoded, on the device and on the host."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from matryoshka_lora.evaluation.engines.batched.diagonal_table import DiagonalTable
from matryoshka_lora.evaluation.engines.batched.kv_cache import KVCache
from matryoshka_lora.evaluation.engines.batched.scheduler import Group
from matryoshka_lora.evaluation.engines.batched.stops import StopStrings
from matryoshka_lora.evaluation.engines.protocol import Answers, Output
from matryoshka_lora.ops.device import to_device, to_host
from matryoshka_lora.ops.graphs import Graphs


class DecodeState:
    """One answer a row of the KV cache, in rows 0 .. used-1; those in `complete` are done.

    On the device, per row: the token that goes in next, its position, the row's last position
    (where it stays while the host does not know yet that the answer is complete), its diagonal (1
    or layers, rows, R). On the host: the row's group, the lengths of its context and of its answer
    (as read, as launched, at most), its stop strings, its point, and the tokens of its answer.

    The host reads tokens after further work was launched, and meanwhile answers move to other rows
    and rows get other answers. So it knows answers by an id that stays: `row_of` has the row of
    each, -1 once it is complete.
    """

    def __init__(
        self,
        cache: KVCache,
        table: DiagonalTable,
        tokens: int,
        stops: StopStrings,
        eos: np.ndarray,
        graphs: Graphs | None,
    ) -> None:
        """tokens: of an answer, with those that are decoded past its end. eos: token ids, any of
        which ends an answer. graphs: of decode steps on this state, if they are captured."""
        self.cache, self.graphs = cache, graphs
        self._table, self._stops, self._eos = table, stops, eos
        n, device = cache.rows, table.device
        self.used = 0
        self.complete: list[int] = []
        self.rows = torch.arange(n, device=device)
        """The numbers of the rows, on the device."""
        self.token = torch.zeros(n, dtype=torch.long, device=device)
        self.position, self.last = torch.zeros(2, n, dtype=torch.int32, device=device)
        self.p = table.zeros(n)
        self.group: list[Group | None] = [None] * n
        self.context, self.count, self.launched, self.limit = np.zeros((4, n), dtype=np.int64)
        self.stop_set, self.point, self.id = np.zeros((3, n), dtype=np.int64)
        self.row_of = np.zeros(0, dtype=np.int64)
        self.history = np.zeros((n, tokens), dtype=np.int64)

    @property
    def active(self) -> int:
        """Answers that are not complete."""
        return self.used - len(self.complete)

    @property
    def free_rows(self) -> int:
        """Of the KV cache, for further answers."""
        return self.cache.rows - self.active

    def groups(self) -> list[Group]:
        """Of the answers that are not complete."""
        complete = set(self.complete)
        return [g for i, g in enumerate(self.group[: self.used]) if g and i not in complete]

    def free(self, n: int) -> list[int]:
        """The n rows that get the next answers."""
        return [*self.complete, *range(self.used, self.cache.rows)][:n]

    def add(
        self, groups: Sequence[Group], limits: Sequence[int], stop_sets: np.ndarray, tokens: Tensor
    ) -> np.ndarray:
        """Start answers in the rows `free(len(groups))`, which hold their contexts; their ids.

        limits: tokens of each answer at most. stop_sets: see `StopStrings.index`. tokens: the first
        of each answer.
        """
        rows = self.free(len(groups))
        self.context[rows] = [len(g.context) for g in groups]
        self.count[rows], self.launched[rows], self.limit[rows] = 0, 1, limits
        self.stop_set[rows] = stop_sets
        self.point[rows] = [g.point for g in groups]
        at, points = self._index(rows), self._index(self.point[rows])
        self.token[at] = tokens
        last = self.context[rows] + self.limit[rows] - 2
        # An answer of one token stays within its row, too, until the host has read that token.
        self.position[at] = self._index(np.minimum(self.context[rows], last)).int()
        self.last[at] = self._index(last).int()
        self.p[:, at] = self._table.choose(points)
        # Last, so that rows count as used only where memory did not run out on the way.
        for row, g in zip(rows, groups, strict=True):
            self.group[row] = g
        self.complete = self.complete[len(groups) :]
        self.used = max(self.used, *(row + 1 for row in rows))
        self.id[rows] = ids = len(self.row_of) + np.arange(len(rows))
        self.row_of = np.append(self.row_of, rows)
        return ids

    def compact(self) -> None:
        """Move the last answers to the rows of complete ones, so that the first rows are decoded.

        No row is complete then.
        """
        complete, keep = set(self.complete), self.active
        to = sorted(row for row in complete if row < keep)
        source = [row for row in range(keep, self.used) if row not in complete]
        self.used, self.complete = keep, []
        if to:
            self._move(to, source)
        # A decode step may include rows behind the used ones: these then have one token each.
        self.position[keep:] = 0
        self.last[keep:] = 0

    def _move(self, to: list[int], source: list[int]) -> None:
        lengths = (self.context, self.count, self.launched, self.limit)
        for array in (*lengths, self.stop_set, self.point, self.id, self.history):
            array[to] = array[source]
        self.row_of[self.id[to]] = to
        for new, old in zip(to, source, strict=True):
            self.group[new] = self.group[old]
        target, origin = self._index(to), self._index(source)
        for buffer in (self.token, self.position, self.last):
            buffer[target] = buffer[origin]
        self.p[:, target] = self.p[:, origin]
        self.cache.move(origin, target, int((self.context[to] + self.launched[to]).max()))

    def _index(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        return to_device(torch.as_tensor(numbers, dtype=torch.long), self._table.device)

    def append(self, ids: np.ndarray, tokens: Tensor) -> Callable[[], Answers]:
        """Launches the copy of new tokens (len(ids), steps) to the host.

        The result reads them, adds them to these answers, unless they are complete, and returns
        those that are complete now.
        """
        copies = to_host({"tokens": tokens})
        return lambda: self._read(ids, copies()["tokens"].numpy())

    def _read(self, ids: np.ndarray, tokens: np.ndarray) -> Answers:
        rows = self.row_of[ids]
        rows, tokens = rows[rows >= 0], tokens[rows >= 0]
        if not len(rows):
            return []
        steps = tokens.shape[1]
        before, limit, stop_sets = self.count[rows], self.limit[rows], self.stop_set[rows]
        self.history[rows[:, None], before[:, None] + np.arange(steps)] = tokens
        is_eos = np.isin(tokens, self._eos)
        ends = is_eos.any(1)
        # Up to the end of text, and with it: it may be a stop string, too, but ends the answer
        # where that would.
        text_end = np.minimum(before + np.where(ends, is_eos.argmax(1), steps), limit)
        end = np.minimum(text_end + ends, limit)
        done = ends | (end == limit)
        histories = self.history[rows, : int(end.max())]
        for i in self._stops.candidates(stop_sets, histories, before, text_end):
            found = self._stops.find(stop_sets[i], histories[i], before[i], text_end[i])
            if found is not None:
                end[i], done[i] = found, True
        self.count[rows] = end
        answers = []
        for row, stops, answer in zip(rows[done], stop_sets[done], histories[done], strict=True):
            group = self.group[row]
            assert group is not None and group.generate is not None
            text = self._stops.text(stops, answer[: self.count[row]])
            answers.append((group.generate, Output(text=text)))
        self.row_of[self.id[rows[done]]] = -1
        self.complete += rows[done].tolist()
        return answers
