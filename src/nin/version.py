"""The installed distribution: its name on PyPI, which is not the import's, its version, and how to get an extra."""

import importlib.metadata

# The name `nin` on PyPI belongs to another project ("network infos").
DISTRIBUTION = "network-in-network"


def installed_version() -> str:
    """Return the version of the installed package."""
    return importlib.metadata.version(DISTRIBUTION)


def install_command(extra: str) -> str:
    """Return the command that installs an extra of `pyproject.toml`, for error messages.

    Example:
        >>> from nin.version import install_command
        >>> install_command("onnx")
        "pip install 'network-in-network[onnx]'"
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"
