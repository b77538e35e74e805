"""What to rewrite and why: one file per pass, one per criterion."""
