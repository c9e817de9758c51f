"""From records to a loss: records -> text -> tokens -> packed rows -> the loss of a batch.

`records` reads, splits and fingerprints records, `prompts` makes them text, `examples` makes the
text tokens and labels, `packing` puts examples into one row, and `loss` is the loss of a batch of
them. `files` reads local files; `arithmetic` generates the embedded dataset.
"""
