"""The error for what the user can fix: our tools print it as one line, without a traceback."""


class UserError(ValueError):
    """A setting, file or checkpoint is wrong; the message names it and says what would be right."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises its worker's error with the worker's traceback as message: the last line is ours.
        super().__init__(message.rpartition("errors.UserError: ")[2].strip())


def first_line(error: BaseException) -> str:
    """What another library's error says, as part of a message of one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
