"""The error that is shown to a person as one line."""


class UserError(ValueError):
    """A mistake that a person can make and mend.

    The message is one line: the file or argument, what was expected, what was got, and what to do. The shell
    prints it without a traceback and exits with status 2.
    """
