"""The error for mistakes of the user, and how to tell that memory ran out."""


class UserError(ValueError):
    """A mistake that the user can correct.

    The message is one line: the file or argument, what was expected, what was got, and what to do. The command line
    prints it without a traceback and exits with status 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; PyTorch has a class for it on a GPU, and only a message on the CPU."""
    # by its name, as torch.OutOfMemoryError itself would need PyTorch
    by_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_class or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )
