"""Train on MLX; importing any part of this package first loads the BLAS that MLX is to use."""

from macft.backends.mlx.blas import preload

preload()
