"""What is trained and how it is read: diagonals, layer, adapter, rules. Needs torch alone."""
