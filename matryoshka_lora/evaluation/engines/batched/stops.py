"""Stop strings, as lm-eval's HF backend ends and cuts answers by them."""

import numpy as np
from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Where lm-eval's HF backend ends an answer for a stop string, and what it keeps of it.

    It ends an answer with the first token after which a stop string is in the text of the last few
    tokens (two more than the string has), and cuts the text of the whole answer, special tokens
    skipped, at each stop string in turn. Here tokens are decoded to text only where they hold every
    character of some stop string.

    Stop strings are registered as sets, those of one request, and known by the set's index.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._sets: dict[tuple[str, ...], int] = {}
        # Per set: each stop string, and in how many tokens the harness looks for it.
        self._lookback: list[dict[str, int]] = []
        # Characters have a bit each. Per set, the bits of each stop string:
        self._needed: list[list[np.uint64]] = []
        self._bits: dict[str, np.uint64] = {}
        # Per token id, the bits of the characters in its text; the last entry is for unknown ids.
        self._token_bits = np.zeros(len(tokenizer) + 1, dtype=np.uint64)
        self._texts: list[str] = []

    def index(self, until: tuple[str, ...]) -> int:
        """The index of this set of stop strings, which is registered if it is new."""
        if until not in self._sets:
            self._sets[until] = len(self._sets)
            encode = self.tokenizer.encode
            self._lookback.append(
                {stop: len(encode(stop, add_special_tokens=False)) + 2 for stop in until}
            )
            self._needed.append(
                [np.bitwise_or.reduce([self._bit(c) for c in {*stop, ""}]) for stop in until]
            )
        return self._sets[until]

    def _bit(self, character: str) -> np.uint64:
        """Its bit; 0, which every text has, for characters that a single token may not show."""
        if not (character.isascii() and (character.isprintable() or character == "\n")):
            return np.uint64(0)
        if character in ("", " ") or (character not in self._bits and len(self._bits) == 64):
            return np.uint64(0)
        if character not in self._bits:
            if not self._texts:
                ids = [[i] for i in range(len(self.tokenizer))]
                self._texts = self.tokenizer.batch_decode(ids)
            bit = self._bits[character] = np.uint64(1 << len(self._bits))
            has = np.fromiter((character in text for text in self._texts), dtype=bool)
            self._token_bits[:-1][has] |= bit
        return self._bits[character]

    def candidates(
        self, stop_sets: np.ndarray, histories: np.ndarray, before: np.ndarray, end: np.ndarray
    ) -> list[int]:
        """Indices of the answers whose tokens before .. end-1 may complete a stop string.

        histories: (answers, width) token ids; the others (answers,).
        """
        found: list[int] = []
        for stop_set in np.unique(stop_sets):
            answers = np.flatnonzero(stop_sets == stop_set)
            if not self._lookback[stop_set]:
                continue
            start = np.maximum(before[answers] - max(self._lookback[stop_set].values()) + 1, 0)
            width = int((end[answers] - start).max())
            at = np.minimum(start[:, None] + np.arange(width), end[answers, None] - 1)
            ids = np.minimum(histories[answers[:, None], at], len(self._token_bits) - 1)
            seen = np.bitwise_or.reduce(self._token_bits[ids], axis=1)
            hit = np.logical_or.reduce([seen & n == n for n in self._needed[stop_set]])
            found += answers[hit].tolist()
        return found

    def find(self, stop_set: int, history: np.ndarray, before: int, end: int) -> int | None:
        """How many tokens the answer has if a stop string ends it at before+1 .. end tokens."""
        stops = self._lookback[stop_set]
        window = self._decode(history[max(before + 1 - max(stops.values()), 0) : end])
        if not any(stop in window for stop in stops):
            return None
        for n in range(before + 1, end + 1):
            tails = {back: history[max(n - back, 0) : n] for back in stops.values()}
            texts = {back: self._decode(tail) for back, tail in tails.items()}
            if any(stop in texts[back] for stop, back in stops.items()):
                return n
        return None

    def text(self, stop_set: int, history: np.ndarray) -> str:
        """A whole answer as text, cut at its stop strings."""
        text = self._decode(history, skip_special_tokens=True)
        for stop in self._lookback[stop_set]:
            if stop:
                text = text.split(stop)[0]
        return text

    def _decode(self, history: np.ndarray, skip_special_tokens: bool = False) -> str:
        text = self.tokenizer.decode(history.tolist(), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text
