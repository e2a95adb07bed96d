"""Ranks and environment of a process, its SLURM requeue, and Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest

from lingua.errors import UserError
from lingua.parallel.ranks import (
    EnvironmentArgs,
    clean_env,
    get_device,
    get_global_rank,
    get_is_master,
    get_is_slurm_job,
    get_local_rank,
    get_master_addr,
    get_world_size,
    setup_env,
)
from lingua.parallel.signals import defer_interrupt, requeue_slurm_job
from tests.lingua.dist_utils import RANK_NAMES


def test_variables_of_the_user_are_kept(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "TRACE")
    monkeypatch.delenv("NCCL_IB_TIMEOUT", raising=False)
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    setup_env(EnvironmentArgs(MKL_NUM_THREADS=None))
    assert os.environ["NCCL_DEBUG"] == "TRACE" and os.environ["NCCL_IB_TIMEOUT"] == "22"
    assert "MKL_NUM_THREADS" not in os.environ


def ranks():
    return get_global_rank(), get_local_rank(), get_world_size()


def test_ranks_of_torchrun_srun_and_a_single_process(monkeypatch):
    for name in RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    assert ranks() == (0, 0, 1) and get_is_master()
    slurm = {"JOB_ID": "7", "PROCID": "5", "LOCALID": "1", "NTASKS": "8"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert ranks() == (5, 1, 8) and get_is_slurm_job() and not get_is_master()
    for name, value in {"RANK": "3", "LOCAL_RANK": "2", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert ranks() == (3, 2, 4) and not get_is_slurm_job()


SRUN = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def set_launch(monkeypatch, variables):
    for name in (*RANK_NAMES, "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "variables, want",
    [
        ({"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}, (0, 0, 1)),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "7"}, (7, 0, 8)),
        ({"SLURM_NNODES": "1"}, (0, 0, 1)),  # sbatch without --ntasks
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}, (0, 0, 8)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (0, 0, 2)),  # srun's variables count
    ],
)
def test_number_of_tasks_without_slurm_ntasks(monkeypatch, variables, want):
    base = SRUN | ({"SLURM_NTASKS": "2"} if "RANK" in variables else {})
    set_launch(monkeypatch, base | variables)
    assert ranks() == want


def manual(**variables):
    return {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **variables}


@pytest.mark.parametrize(
    "variables, named",
    [
        ({"LOCAL_RANK": "0"}, "unset LOCAL_RANK.*RANK and WORLD_SIZE"),
        ({"LOCAL_RANK": ""}, "unset LOCAL_RANK.*RANK and WORLD_SIZE"),
        ({"LOCAL_RANK": "0", "RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        (manual(RANK="2"), "RANK=2 .*WORLD_SIZE=2"),
        (manual(RANK="-1"), "RANK=-1"),
        (manual(RANK="one"), "RANK=one"),
        (manual(WORLD_SIZE="0"), "WORLD_SIZE=0"),
        (manual(LOCAL_RANK="-1"), "LOCAL_RANK=-1"),
        (SRUN, "SLURM_NTASKS"),
        (SRUN | {"SLURM_NTASKS": "2", "SLURM_PROCID": "2"}, "SLURM_PROCID=2 .*SLURM_NTASKS=2"),
        (SRUN | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS=two"),
        (SRUN | {"SLURM_NTASKS": "2", "SLURM_LOCALID": ""}, "SLURM_LOCALID="),
        (SRUN | {"SLURM_NNODES": "1", "SLURM_PROCID": "1"}, "SLURM_PROCID=1 .*SLURM_NNODES=1"),
    ],
)
def test_ranks_that_cannot_exist_are_named(monkeypatch, variables, named):
    set_launch(monkeypatch, variables)
    with pytest.raises(UserError, match=named):
        ranks()


def test_a_missing_scontrol_asks_for_master_addr(monkeypatch, tmp_path):
    set_launch(monkeypatch, SRUN | {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[01-02]"})
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for text in (None, "exit 1", "exit 0"):
        if text is not None:
            (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / "scontrol").chmod(0o755)
        with pytest.raises(UserError, match=r"MASTER_ADDR.*n\[01-02\]"):
            get_master_addr()
    monkeypatch.setenv("MASTER_ADDR", "n01")
    assert get_master_addr() == "n01"


@pytest.mark.parametrize("launch", [manual(LOCAL_RANK="4"), SRUN | {"SLURM_LOCALID": "4"}])
def test_a_rank_without_a_gpu_is_named(monkeypatch, launch):
    set_launch(monkeypatch, launch | {"SLURM_NTASKS": "8"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match="(LOCAL_RANK|SLURM_LOCALID)=4 .*4 or fewer"):
        get_device()


def test_clean_env_hides_the_variables_of_the_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with pytest.raises(KeyError), clean_env():
        assert not {"SLURM_JOB_ID", "RANK", "WANDB_RUN_ID"} & os.environ.keys()
        assert os.environ["WANDB_API_KEY"] == "secret"
        raise KeyError
    assert os.environ["SLURM_JOB_ID"] == "7" and os.environ["RANK"] == "3"


def test_only_rank_0_requeues_and_only_inside_slurm(monkeypatch, tmp_path):
    for name in RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    assert not requeue_slurm_job()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not requeue_slurm_job(), "a missing scontrol is logged"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    assert requeue_slurm_job()
    for name, value in {"PROCID": "1", "LOCALID": "1", "NTASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert not requeue_slurm_job()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


# ---- Ctrl-C


def test_second_ctrl_c_interrupts_a_nested_block():
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_interrupt("the whole"):
        signal.raise_signal(signal.SIGINT)
        with defer_interrupt("a part"):
            reached.append("part")
            signal.raise_signal(signal.SIGINT)
            reached.append("rest of the part")
    assert reached == ["part"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_a_nested_block_interrupts_after_the_outer_one():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with defer_interrupt("the whole"):
            with defer_interrupt("a part"):
                signal.raise_signal(signal.SIGINT)
            reached.append("rest")
        reached.append("more")
    assert reached == ["rest"]
