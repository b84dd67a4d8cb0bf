"""The error for mistakes of the user."""


class UserError(ValueError):
    """A mistake that the user can correct.

    The message is one line: the file or argument, what was expected, what was got, and what to do. The command line
    prints it without a traceback and exits with status 2.
    """
