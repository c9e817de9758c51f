"""Training: `loop.fit` trains the adapters of a model.

`plan` says which samples a step takes and how they are split into forwards; `forwards` runs them
forward and backward; `gradients` sums, measures and clips gradients; `step_log` writes
`train.jsonl`; `checkpoints` saves and resumes.
"""
