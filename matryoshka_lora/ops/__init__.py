"""What the device does: attention, kernels, CUDA graphs, transfers."""
