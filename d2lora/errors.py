"""What the user did or met that we can name: shown as one line, never as a traceback."""


class UserError(Exception):
    """A mistake in the input, or a world that is not as the input says: message = key, value, what is allowed."""

    def __str__(self) -> str:
        """One line whatever was typed: what a terminal can't show is escaped."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())
