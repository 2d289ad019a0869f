"""The error that is the user's to mend: our tools print it as one line, without a traceback."""


class UserError(ValueError):
    """A setting, file or checkpoint that cannot work; the message names it and says what would be right."""
