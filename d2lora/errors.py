"""What the user did or met that we can name: shown as one line, never as a traceback."""


class UserError(Exception):
    """A mistake in the input, or a world that is not as the input says: message = key, value, what is allowed."""
