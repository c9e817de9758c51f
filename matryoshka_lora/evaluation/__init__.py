"""The rank sweep: lm-eval builds the requests and scores the outputs, an engine answers them."""
