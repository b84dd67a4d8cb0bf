"""``python -m nin`` is the shell command ``nin``."""

from nin.cli.app import main

main()
