"""One-shot pruning criteria, one file each, all behind one function signature."""
