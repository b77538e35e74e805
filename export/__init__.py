"""How a program leaves: one file per target, pattern checker, evaluation, report, command line."""
