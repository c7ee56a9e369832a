"""Which profile is in effect."""

from __future__ import annotations

import logging

import pytest

import moe_triton
from moe_triton import profile
from moe_triton.errors import UnavailableError
from moe_triton.profile import choice


@pytest.fixture
def no_choice(monkeypatch):
    monkeypatch.delenv("MOE_TRITON_PROFILE", raising=False)
    yield
    moe_triton.set_profile(None)


@pytest.mark.usefixtures("no_choice")
def test_the_default_the_environment_and_the_process(monkeypatch):
    assert moe_triton.get_profile() == "portable"
    monkeypatch.setenv("MOE_TRITON_PROFILE", "a2")
    assert moe_triton.get_profile() == "a2"
    moe_triton.set_profile("950")
    assert moe_triton.get_profile() == profile.active_profile().name == "950"
    moe_triton.set_profile(None)
    assert moe_triton.get_profile() == profile.active_profile().name == "a2"


@pytest.mark.usefixtures("no_choice")
def test_each_choice_is_logged_once_with_its_reason(monkeypatch, caplog):
    choice._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "moe_triton"):
        for _ in range(3):
            moe_triton.get_profile()
        monkeypatch.setenv("MOE_TRITON_PROFILE", "a2")
        moe_triton.get_profile()
        moe_triton.set_profile("950")
        moe_triton.get_profile()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "profile portable, because it is the default"),
        ("INFO", "profile a2, because MOE_TRITON_PROFILE is set"),
        ("INFO", "profile 950, because set_profile() chose it"),
    ]


@pytest.mark.usefixtures("no_choice")
def test_an_unknown_profile_lists_the_known(monkeypatch):
    known = r"one of \['portable', 'a2', 'a3', '950'\], got 'a9'"
    with pytest.raises(UnavailableError, match=known):
        moe_triton.set_profile("a9")
    assert moe_triton.get_profile() == "portable"
    monkeypatch.setenv("MOE_TRITON_PROFILE", "a9")
    with pytest.raises(UnavailableError, match=known):
        profile.active_profile()
