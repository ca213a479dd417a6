"""The PyTorch backend: CUDA, then Apple's MPS, then the CPU."""
