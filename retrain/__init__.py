"""How a rewritten program is trained."""
