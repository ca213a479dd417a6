"""macft: fine-tune language models with LoRA on MLX and PyTorch from one YAML file."""

__version__ = "0.1.0"
