"""Define the error for everything that the user can fix: it is shown as one line, never as a traceback."""


class UserError(Exception):
    """A mistake in the input, or files and services that are not as the input says.

    The message: key, value, what is allowed.
    """

    def __str__(self) -> str:
        """Return the message as one line: characters that a terminal can't show are escaped."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())
