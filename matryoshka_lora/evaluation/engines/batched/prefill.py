"""The prefill: contexts and targets of several groups, packed into one sequence."""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from matryoshka_lora.evaluation.engines.batched.scheduler import Group
from matryoshka_lora.evaluation.engines.protocol import Answers, Output, Request
from matryoshka_lora.ops.device import to_device, to_host

LOGPROB_CHUNK = 1024
"""Tokens whose logits are turned to float32 at a time."""


class Prefill:
    """One packed sequence: the context of each group, followed by the targets that share it.

    A context and its only target, if any, are one document. With several targets each is a document
    of its own whose keys are the context's and its own; the first token of each is predicted by the
    context's last. A target's last token is predicted but not read, so it is left out.
    """

    def __init__(
        self, groups: Sequence[Group], requests: Sequence[Request], device: torch.device
    ) -> None:
        """requests: those of the jobs."""
        self._contexts: list[range] = []
        """The tokens of each group's context."""
        ids: list[tuple[int, ...]] = []
        targets: list[tuple[int, ...]] = []
        keys: list[range] = []
        positions: list[range] = []
        kept: list[range] = []
        predictors: list[range] = []
        lengths_q, lengths_k, sizes = [], [], []
        context_ends: list[int] = []
        end = kept_end = 0
        shared = False
        for g in groups:
            start, context = end, len(g.context)
            self._contexts.append(range(start, start + context))
            own_targets = [requests[job].target for job in g.scored]
            document = context + len(own_targets[0]) - 1 if len(own_targets) == 1 else context
            ids.append(g.context)
            end += context
            context_end = kept_end
            context_ends.append(context_end)
            kept.append(range(end - 1, end))
            kept_end += 1
            keys.append(range(start, start + document))
            positions.append(range(document))
            lengths_q.append(document)
            lengths_k.append(document)
            for target in own_targets:
                read = range(end, end + len(target) - 1)
                ids.append(target[:-1])
                end = read.stop
                predictors += [
                    range(context_end, context_end + 1),
                    range(kept_end, kept_end + len(read)),
                ]
                kept.append(read)
                kept_end += len(read)
                targets.append(target)
                if len(own_targets) > 1 and read:
                    shared = True
                    keys += [range(start, start + context), read]
                    positions.append(range(context, context + len(read)))
                    lengths_q.append(len(read))
                    lengths_k.append(context + len(read))
            sizes.append(end - start)
        self._scored = [(job, len(requests[job].target)) for g in groups for job in g.scored]
        """Jobs and the lengths of their targets, in the order of `targets`."""
        self.ids = joined(ids, device)[None]
        self.points = to_device(
            torch.repeat_interleave(torch.tensor([g.point for g in groups]), torch.tensor(sizes)),
            device,
        )
        """Index of the point, of each token."""
        self.inputs: dict[str, Any] = {
            "position_ids": all_of(positions, device)[None],
            "cu_seq_lens_q": document_bounds(lengths_q, device),
            "cu_seq_lens_k": document_bounds(lengths_k, device),
            "max_length_q": max(lengths_q),
            "max_length_k": max(lengths_k),
        }
        if shared:
            self.inputs["kv_index"] = all_of(keys, device)
        self.kept = all_of(kept, device)
        """Tokens that predict something, whose logits are computed."""
        self.context_ends = to_device(torch.tensor(context_ends), device)
        """Per group, which of the kept tokens predicts what follows the context."""
        self.predictors = all_of(predictors, device)
        """Per target token, which of the kept tokens predicts it."""
        self.targets = joined(targets, device)

    def contexts(self, rows: Sequence[int]) -> tuple[Tensor | None, Tensor, Tensor]:
        """The contexts' tokens (None: all tokens), and the row and position where each is cached.

        rows: of the KV cache, one for each group.
        """
        lengths = [len(context) for context in self._contexts]
        device = self.ids.device
        everything = sum(lengths) == self.ids.shape[1]
        return (
            None if everything else all_of(self._contexts, device),
            to_device(torch.tensor(rows).repeat_interleave(torch.tensor(lengths)), device),
            all_of([range(length) for length in lengths], device),
        )

    def score(self, logits: Tensor) -> Callable[[], Answers]:
        """Launches the scoring of all targets; the result reads the answers.

        logits: (kept tokens, vocabulary).
        """
        if not self._scored:
            return list
        logprobs, greedy = target_logprobs(logits, self.predictors, self.targets)
        copies = to_host({"logprobs": logprobs, "greedy": greedy})

        def read() -> Answers:
            logprobs, greedy = (x.numpy() for x in copies().values())
            answers, start = [], 0
            for job, length in self._scored:
                own = slice(start, start + length)
                total, is_greedy = float(logprobs[own].sum()), bool(greedy[own].all())
                answers.append((job, Output(logprob=total, is_greedy=is_greedy)))
                start += length
            return answers

        return read


def all_of(ranges: Sequence[range], device: torch.device) -> Tensor:
    """(n,): the numbers of all ranges, one range after the other."""
    starts = np.array([x.start for x in ranges], dtype=np.int64)
    sizes = np.array([len(x) for x in ranges], dtype=np.int64)
    before = np.cumsum(sizes) - sizes
    numbers = np.arange(sizes.sum()) + np.repeat(starts - before, sizes)
    return to_device(torch.from_numpy(numbers), device)


def joined(parts: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """(n,): the token ids of all parts."""
    numbers = np.fromiter(chain.from_iterable(parts), np.int64, sum(map(len, parts)))
    return to_device(torch.from_numpy(numbers), device)


def document_bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(len(lengths) + 1,) int32: where each document starts and ends."""
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def target_logprobs(logits: Tensor, predictors: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each target token, predicted by `logits[predictors]`: log p, and whether it is greedy.

    Softmax in float32, as the reference engine asks of the harness.
    """
    values, greedy = [], []
    chunks = zip(predictors.split(LOGPROB_CHUNK), targets.split(LOGPROB_CHUNK), strict=True)
    for chunk, target in chunks:
        logprobs = F.log_softmax(logits[chunk], dim=-1, dtype=torch.float32)
        values.append(logprobs.gather(1, target[:, None])[:, 0])
        greedy.append(logprobs.argmax(-1) == target)
    return torch.cat(values), torch.cat(greedy)
