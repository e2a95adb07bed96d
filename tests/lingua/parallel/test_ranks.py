"""Ranks and environment of a process, its SLURM requeue, and Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest

from lingua.parallel.ranks import (
    EnvironmentArgs,
    clean_env,
    get_global_rank,
    get_is_master,
    get_is_slurm_job,
    get_local_rank,
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
    monkeypatch.setenv("SLURM_PROCID", "1")
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
