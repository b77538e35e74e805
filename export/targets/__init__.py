"""How a program leaves: one room for each target."""
