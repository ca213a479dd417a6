"""Give the rest of the program the HTTP library that huggingface-hub brings; import it inside functions: it is slow."""

from __future__ import annotations

try:
    import httpx2 as httpx
except ImportError:  # huggingface-hub before 2
    import httpx

__all__ = ["httpx"]
