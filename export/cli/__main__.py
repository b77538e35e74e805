"""``python -m sparsepass.export.cli``: the command line, for launchers that take a module's name."""

from sparsepass.export.cli.app import main

main()
