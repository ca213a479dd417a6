"""A run that a launcher starts several times is refused before it writes into one folder."""

from __future__ import annotations

import json

import pytest
from support.toy_backend import toy_settings

from macft.errors import UsageError
from macft.process_group import ONE_PROCESS, find_group
from macft.training.run import train


@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("WORLD_SIZE", "torchrun, accelerate launch or deepspeed"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("PMI_SIZE", "mpirun"),
        ("SLURM_STEP_NUM_TASKS", "srun"),
        ("MLX_WORLD_SIZE", "mlx.launch"),
    ],
)
def test_several_processes_are_refused_by_the_variable_that_says_so(name, launcher, monkeypatch):
    monkeypatch.setenv(name, "4")
    with pytest.raises(UsageError) as refusal:
        find_group()
    assert str(refusal.value) == (
        f"{name} says that {launcher} started 4 processes, and macft trains in one (WORLD_SIZE 1), on one GPU; start "
        "it once, without a launcher: macft train CONFIG.yaml"
    )
    monkeypatch.setenv(name, "1")
    assert find_group() == ONE_PROCESS


def test_the_hosts_of_mlx_launch_are_counted(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts.json"
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    assert find_group() == ONE_PROCESS  # no such file
    hosts.write_text(json.dumps([["10.0.0.1:5000"], ["10.0.0.2:5000"]]))
    with pytest.raises(UsageError, match=r"^MLX_HOSTFILE says that mlx.launch started 2 processes, .*WORLD_SIZE"):
        find_group()


def test_one_task_of_a_larger_slurm_job_is_one_process(monkeypatch):
    # a batch script starts once, whatever its job may start with srun
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("WORLD_SIZE", "all")
    assert find_group() == ONE_PROCESS


def test_a_run_under_torchrun_stops_before_it_writes_anything(model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE says that torchrun"):
        train(toy_settings(model, data, tmp_path / "run", "torch"))
    assert not (tmp_path / "run").exists()
