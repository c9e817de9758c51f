"""Hydra launcher `hydra/launcher=gpu_queue`: jobs one after the other on the GPUs of this host."""
