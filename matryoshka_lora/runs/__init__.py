"""A run on disk: its folder, its record, what it was made of."""
