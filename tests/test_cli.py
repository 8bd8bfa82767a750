"""``python -m apollo_kernels info`` says what runs and why."""

import json
import os
import subprocess
import sys

import pytest

from apollo_kernels import info, native
from apollo_kernels.__main__ import main


def test_info_names_the_back_end_and_why_others_do_not_run(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for piece in ("apollo_kernels  0.1.0", "torch", "native module", "cpu: back end torch"):
        assert piece in text
    assert "not cuda: needs a CUDA device" in text and "not triton:" in text


def test_info_json_is_machine_readable():
    command = [sys.executable, "-P", "-m", "apollo_kernels", "info", "--json"]
    if sys.version_info < (3, 11):
        command.remove("-P")
    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert out["devices"]["cpu"]["runs"] == "torch"
    assert out["native_module"]["present"] is True


def test_a_reader_that_stops_reading_causes_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "apollo_kernels", "info"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd="/")
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


def test_info_tells_why_the_native_module_is_missing(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    collected = info.collect()
    assert collected["native_module"]["present"] is False
    assert "not built" in info.as_text(collected)


def test_info_survives_a_wrong_environment(monkeypatch):
    monkeypatch.setenv("APOLLO_KERNELS_BACKEND", "cuda")
    text = info.as_text(info.collect())
    assert "cpu: back end NONE" in text and "APOLLO_KERNELS_BACKEND='cuda' cannot run" in text


@pytest.mark.parametrize("arguments", [[], ["unknown"]])
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err
