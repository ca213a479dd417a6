"""Train on PyTorch: on CUDA, else on Apple's MPS, else on the CPU."""
