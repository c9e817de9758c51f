"""Hydra launcher `hydra/launcher=gpu_queue`: one fresh process a job on the GPUs of this host."""
