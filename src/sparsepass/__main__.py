"""``python -m sparsepass``: the command line, where the scripts of an installation are not on the path."""

from sparsepass.export.cli import main

if __name__ == "__main__":
    main()
