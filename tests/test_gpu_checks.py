"""The checks of a GPU need no test tools, expect what the card can hold, and name the engine of each row."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from support.commands import CHECKOUT

# what `make gpu-test PYTHON=...` may lack, beside the engine that is not checked
TEST_TOOLS = ("_pytest", "pytest", "hypothesis", "trl", "datasets", "mlx", "mlx_lm", "xllamacpp", "ggml", "gguf")
CHECKS = sorted((CHECKOUT / "benchmarks" / "gpu").glob("*.py"))
SUPPORT = sorted({name for path in CHECKS for name in re.findall(r"from (support\.\w+) import", path.read_text())})

WITHOUT = f"""
import importlib, sys
from importlib.machinery import PathFinder
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {TEST_TOOLS} else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""


def child(code: str) -> str:
    """What a Python prints that has no test tools, started where make starts the checks."""
    command = [sys.executable, "-c", WITHOUT + code]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_checks_import_nothing_that_tests_need():
    assert SUPPORT == ["support.engines", "support.loud_models", "support.tiny_models"]
    names = [f"benchmarks.gpu.{path.stem}" for path in CHECKS if path.stem not in ("__init__", "__main__")] + SUPPORT
    assert child(f"for name in {names}: importlib.import_module(name)\nprint('all')") == "all\n"


STEP = """
from benchmarks.gpu import models, torch_common
from support.tiny_models import write_model
from macft.objectives.losses import Sft
folder = write_model(torch_common.FOLDER / "tiny", "llama")
with torch_common.on_cpu():
    model = torch_common.load(folder, precision="float32")
[result] = torch_common.steps(model, Sft(), [models.whole_rows(2, 16)])
print(result.loss)
"""


def test_a_step_of_a_check_runs_without_test_tools():
    # uniform guesses among 199 tokens cost ln 199 = 5.29; the tiny model's are wider
    # of what is printed the last: deepspeed, where it is installed, speaks first
    assert 5 < float(child(STEP).splitlines()[-1]) < 8


ON_CARDS = """
import torch
from benchmarks.gpu import torch_common
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: capability
torch.cuda.get_arch_list = lambda: ["sm_75", "sm_90"]
torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation or capability >= (8, 0)
torch.cuda.mem_get_info = lambda *_: (free, 80 * 10**9)
for capability, free in (((7, 5), 15e9), ((9, 0), 8e9), ((9, 0), 79e9)):
    torch_common.sixteen.cache_clear()
    print(torch_common.native(), torch_common.sixteen(), *torch_common.fitting())
"""


def test_a_card_is_checked_in_its_own_type_with_the_models_that_it_holds():
    # a T4, one with 8 GB free, an H100; 3.09 billion numbers in 16 bits and 2 GB beside them are 8.2 GB
    assert child(ON_CARDS).splitlines()[-3:] == [
        "float16 torch.float16 0.5B 3B",
        "bfloat16 torch.bfloat16 0.5B",
        "bfloat16 torch.bfloat16 0.5B 3B",
    ]


PASSES = """
from benchmarks.gpu.models import tokens_of_a_pass, whole_rows
print(*(tokens_of_a_pass(whole_rows(8, 1024), most) for most in (None, 10_000, 4_200, 1)))
"""


def test_the_peak_of_a_step_is_expected_of_its_largest_pass():
    # 8 rows, 8, 4, and never less than a row
    whole, fits, four, one = map(int, child(PASSES).split())
    assert whole == fits == 8 * 1025 and one == 1025
    assert four == 4 * 1025


TABLE = """
import json
from benchmarks.gpu import table
rows = [table.Row("peak", "1 GB", "2 GB", table.FAILED, 3.4, engine="mlx"), table.skipped("speed", "too small")]
print(json.dumps(table.markdown(rows)))
"""


def test_the_table_names_the_engine_of_each_row():
    assert json.loads(child(TABLE)).splitlines() == [
        "| engine | check | expected | found |  | s |",
        "| --- | --- | --- | --- | --- | --- |",
        "| mlx | peak | 1 GB | 2 GB | FAILED | 3 |",
        "|  | speed |  | too small | skipped | 0 |",
    ]
