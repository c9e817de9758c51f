"""The phases of a run, which `pipeline` calls in turn: start, training, evaluation, report."""
