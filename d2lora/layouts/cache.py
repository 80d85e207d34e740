"""Keep keys and values of texts that are being continued, in tensors that have room for the tokens to come."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class Layer(DynamicLayer):
    """A layer of transformers' cache whose keys and values are not copied for every token.

    They are (texts, heads, room, width), zeros where no token is. With `whole` all of it is read, and the mask says
    what is seen: on a CPU, attention over parts of a tensor takes twice as long as over all of it.
    `first` is the number of the first text in the next pass: prompts may be computed some texts at a time, without the
    tokens of `padding` that they all begin with.
    """

    def __init__(self, texts: int, room: int, whole: bool) -> None:
        super().__init__()
        self.texts, self.room, self.whole = texts, room, whole
        self.tokens = self.first = self.padding = 0
        self.parts: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the tokens of a pass, (some texts, heads, tokens, width), and return keys and values of its texts."""
        new = key_states, value_states
        if not self.parts:
            self.parts = [part.new_zeros(self.texts, part.shape[1], self.room, part.shape[3]) for part in new]
        begin = self.tokens + self.padding
        some, end = slice(self.first, self.first + len(key_states)), begin + key_states.shape[2]
        for part, states in zip(self.parts, new, strict=True):
            part[some, :, begin:end] = states
        if self.tokens:
            self.tokens = end
            return self._read()
        if some.stop == self.texts:  # the last prompts
            self.tokens = end
            self._read()
        keys, values = (part[some, :, self.padding : end] for part in self.parts)
        return keys, values

    def _read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of all texts."""
        self.keys, self.values = self.parts if self.whole else (part[:, :, : self.tokens] for part in self.parts)
        self.is_initialized = True
        return self.keys, self.values

    def grow(self, room: int) -> None:
        """Make room for so many tokens."""
        larger = [part.new_empty(*part.shape[:2], room, part.shape[3]) for part in self.parts]
        for part, states in zip(larger, self.parts, strict=True):
            part[:, :, : self.room], part[:, :, self.room :] = states, 0
        self.parts, self.room = larger, room

    def keep(self, moved: torch.Tensor, holes: torch.Tensor, count: int) -> None:
        """Write the texts `moved` over the `holes`, and keep the first `count`."""
        for part in self.parts:
            part[holes, :, : self.tokens] = part[moved, :, : self.tokens]
        self.parts, self.texts = [part[:count] for part in self.parts], count
        self._read()
