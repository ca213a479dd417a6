"""The MLX backend. Importing any part of it first loads the BLAS that MLX shall use."""

from macft.backends.mlx.blas import preload

preload()
