"""The engine that answers all points of a sweep together."""
