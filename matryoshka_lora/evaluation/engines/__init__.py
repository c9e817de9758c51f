"""What answers the sweep's requests."""
