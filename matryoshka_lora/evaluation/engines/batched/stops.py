"""Stop strings, as lm-eval's HF backend ends and cuts answers by them."""

import numpy as np
from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Where lm-eval's HF backend ends an answer for a stop string, and what it keeps of it.

    It ends an answer with the first token after which a stop string shows in the text of the last
    few tokens (as many as the string has, and two), and cuts the text of the whole answer, special
    tokens skipped, at each stop string in turn. Texts are made only where the tokens hold every
    character of some stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._rules: dict[tuple[str, ...], int] = {}
        self._lookback: list[dict[str, int]] = []
        self._bits: dict[str, np.uint64] = {}
        self._needed: list[list[np.uint64]] = []
        # Per token id, which of the known characters its text has; the last entry for unknown ids.
        self._table = np.zeros(len(tokenizer) + 1, dtype=np.uint64)
        self._texts: list[str] = []

    def rule(self, until: tuple[str, ...]) -> int:
        """The number of these stop strings."""
        if until not in self._rules:
            self._rules[until] = len(self._rules)
            encode = self.tokenizer.encode
            self._lookback.append(
                {stop: len(encode(stop, add_special_tokens=False)) + 2 for stop in until}
            )
            self._needed.append(
                [np.bitwise_or.reduce([self._bit(c) for c in {*stop, ""}]) for stop in until]
            )
        return self._rules[until]

    def _bit(self, character: str) -> np.uint64:
        """Its bit; 0, which asks for nothing, for what may not show in the text of one token."""
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
            self._table[:-1][has] |= bit
        return self._bits[character]

    def candidates(
        self, rules: np.ndarray, histories: np.ndarray, before: np.ndarray, end: np.ndarray
    ) -> list[int]:
        """Rows whose tokens before .. end-1 may complete a stop string.

        histories: (rows, width) token ids, the others (rows,).
        """
        found: list[int] = []
        for rule in np.unique(rules):
            rows = np.flatnonzero(rules == rule)
            if not self._lookback[rule]:
                continue
            start = np.maximum(before[rows] - max(self._lookback[rule].values()) + 1, 0)
            width = int((end[rows] - start).max())
            at = np.minimum(start[:, None] + np.arange(width), end[rows, None] - 1)
            ids = np.minimum(histories[rows[:, None], at], len(self._table) - 1)
            seen = np.bitwise_or.reduce(self._table[ids], axis=1)
            hit = np.logical_or.reduce([seen & n == n for n in self._needed[rule]])
            found += rows[hit].tolist()
        return found

    def find(self, rule: int, history: np.ndarray, before: int, end: int) -> int | None:
        """How many tokens the answer has if a stop string ends it at before+1 .. end tokens."""
        stops = self._lookback[rule]
        window = self._decode(history[max(before + 1 - max(stops.values()), 0) : end])
        if not any(stop in window for stop in stops):
            return None
        for n in range(before + 1, end + 1):
            tails = {back: history[max(n - back, 0) : n] for back in stops.values()}
            texts = {back: self._decode(tail) for back, tail in tails.items()}
            if any(stop in texts[back] for stop, back in stops.items()):
                return n
        return None

    def text(self, rule: int, history: np.ndarray) -> str:
        """A whole answer as text, cut at its stop strings."""
        text = self._decode(history, skip_special_tokens=True)
        for stop in self._lookback[rule]:
            if stop:
                text = text.split(stop)[0]
        return text

    def _decode(self, history: np.ndarray, skip_special_tokens: bool = False) -> str:
        text = self.tokenizer.decode(history.tolist(), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text
