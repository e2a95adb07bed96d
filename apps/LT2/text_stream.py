"""Tokens that come one by one become text: whole characters only, ending before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from lingua.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # how decoders show bytes that do not make a character (yet)


class TextStream:
    """The text of one growing sequence, in `text`.

    A character whose last bytes are missing waits for them. `stopped` turns true when a stop string
    has come up, wherever tokens begin and end in it; the text then ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._until = until
        self._tokens: list[int] = []
        # Decoding all tokens at each step would cost the length squared, so only a window of the
        # last ones is decoded. It begins one step early, at a token whose text is out already:
        # some tokenizers treat the first token of a text in a way of its own.
        self._window = 0
        self._settled = 0  # tokens before this one ended in a whole character
        self._n_out = 0  # characters of the window's text that are in `text`
        self._n_taken = 0  # characters of `text` that `take` gave out

    def push(self, token: int) -> None:
        assert not self.stopped, "this sequence has ended"
        self._tokens.append(token)
        window = self._decode_window()
        whole = window.rstrip(UNFINISHED)
        self._grow(whole[self._n_out :])
        if whole == window:
            self._window, self._settled = self._settled, len(self._tokens)
            self._n_out = len(self._decode_window())
        else:
            self._n_out = max(self._n_out, len(whole))

    def finish(self) -> None:
        """No token will come any more: bytes that wait for the rest of their character are shown
        as the tokenizer shows them."""
        if not self.stopped:
            self._grow(self._decode_window()[self._n_out :])
        self._until = ()

    def take(self) -> str:
        """What is new since the last call, but for a tail that may turn out to be a stop string."""
        end = len(self.text) if self.stopped else len(self.text) - self._n_held()
        new = self.text[self._n_taken : end]
        self._n_taken += len(new)
        return new

    def _decode_window(self) -> str:
        return self._tokenizer.decode(self._tokens[self._window :])

    def _grow(self, new: str) -> None:
        before = len(self.text)
        self.text += new
        # A match that ends in the old text would have been found when that was new.
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._until]
        found = [start for start in found if start >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _n_held(self) -> int:
        """Length of the longest end of the text with which some stop string begins."""
        return max(
            (n for s in self._until for n in range(1, len(s)) if self.text.endswith(s[:n])),
            default=0,
        )
