"""Train on MLX; importing any part of this package first settles how MLX is to multiply."""

import os

from macft.backends.mlx.blas import preload

# What is computed in float32 here needs it: merges, DoRA's norms, runs with bf16=false. On an M5 and on CUDA, MLX
# would round these products to the 10 bits of TF32. It looks at the variable at its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
preload()
