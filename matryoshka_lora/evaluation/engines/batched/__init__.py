"""The engine that answers all points of a sweep together; start at `engine.py`."""
