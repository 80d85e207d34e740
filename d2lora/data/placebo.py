"""Rows whose answers were exchanged: the warm-up of the control arm `placebo`."""

from collections.abc import Sequence

from d2lora.data.conversations import Message, conversation
from d2lora.data.files import Row
from d2lora.data.sources import shuffled


def exchanged(rows: Sequence[Row], column: str, seed: str) -> list[Row]:
    """Return rows with the assistant's turns of another row each, in a cycle through all of them: none keeps its own.

    `column` holds the conversations. Of a row with more turns than the other has, the other's are repeated.
    """
    order = shuffled(len(rows), seed)
    other = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    parsed = [conversation(row[column]) for row in rows]
    answers = [[m for m in c.messages if m["role"] == "assistant"] for c in parsed]
    return [
        {**row, column: _answered(parsed[i].messages, parsed[i].learned, answers[other[i]])}
        for i, row in enumerate(rows)
    ]


def _answered(messages: list[Message], learned: list[int], answers: list[Message]) -> list[Message]:
    """Return messages with the assistant's turns replaced, in order; the loss stays on the turns that it was on."""
    exchanged_messages, count = [], 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            message = answers[count % len(answers)] | {"weight": int(index in learned)}
            count += 1
        exchanged_messages.append(message)
    return exchanged_messages
