"""``python -m nin`` is the shell command ``nin``."""

from nin.cli import main

main()
