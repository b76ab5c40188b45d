"""GPUs that were asked for are there, or nothing starts; CUDA is stood for by what it says where it does not work."""

import pytest
import torch
from pydantic import ValidationError

from firm import dist
from firm.config.launch import LocalLaunch
from firm.gpus import ASKED, check_gpus
from firm.records import UserError

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by ..."


def cuda(monkeypatch: pytest.MonkeyPatch, seen: int, fault: str = "") -> None:
    def init() -> None:
        if fault:
            raise RuntimeError(fault)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_a_driver_that_is_too_old_is_said_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 0, TOO_OLD)
    with pytest.raises(UserError, match=r"driver is one for CUDA 12\.2, too old for torch of CUDA 13\.0"):
        check_gpus(1)


@pytest.mark.parametrize("fault", ["No CUDA GPUs are available", "system not yet initialized"])
def test_why_no_gpu_can_be_used_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    cuda(monkeypatch, 0, f"{fault}\nand more")
    with pytest.raises(UserError) as caught:
        check_gpus(8)
    assert fault in caught.value.what and "and more" not in str(caught.value) and "8 GPUs" in caught.value.where


def test_fewer_than_were_asked_for_are_refused_and_more_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 4)
    for enough in (0, 1, 4):
        check_gpus(enough)
    with pytest.raises(UserError, match="only 4 GPUs can be seen"):
        check_gpus(8)


def test_a_process_is_told_what_its_launcher_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 4)
    monkeypatch.setenv(ASKED, "4")
    assert dist.start().device.type == "cuda"
    monkeypatch.setenv(ASKED, "8")
    with pytest.raises(UserError, match="only 4"):
        dist.start()


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="only 1 GPU can be seen") as caught:
        dist.start()
    assert "2 GPUs asked for" in caught.value.where


def test_more_processes_than_gpus_are_refused_in_the_configuration() -> None:
    with pytest.raises(ValidationError, match="fewer than num_workers"):
        LocalLaunch(num_workers=2, gpus=1)
