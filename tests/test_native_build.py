"""The compiled code is made once for each kind of CPU, on Windows by Zig."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from setuptools import Distribution, Extension
from setuptools.errors import CompileError

from fastnst.native_build import CPUS, IS_X86, BuildForEachCPU


@pytest.fixture
def build(tmp_path):
    given = Extension("fastnst._native", sources=["native.c"], extra_compile_args=["-O3"], optional=True)
    build = BuildForEachCPU(Distribution({"ext_modules": [given]}))
    build.build_lib, build.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    build.ensure_finalized()
    return build


def test_each_kind_of_cpu_has_its_own(build):
    flags = {extension.name: extension.extra_compile_args for extension in build.extensions}
    assert flags == {f"fastnst.{name}": ["-O3", *own] for name, own in CPUS.items() if IS_X86 or not own}
    assert all(extension.sources == ["native.c"] and extension.optional for extension in build.extensions)
    again = BuildForEachCPU(build.distribution)  # setuptools makes the command more than once
    again.ensure_finalized()
    assert len(again.extensions) == len(flags)


def test_on_windows_zig_compiles(build, monkeypatch):
    def zig(command, check):
        assert command[:4] == [sys.executable, "-m", "ziglang", "cc"] and {"-shared", "-O3", "native.c"} < set(command) and check
        Path(command[-1]).write_text("compiled")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "run", zig)
    build.build_extension(build.extensions[0])
    assert Path(build.get_ext_fullpath("fastnst._native")).read_text() == "compiled"


@pytest.mark.parametrize("error", [FileNotFoundError("no zig"), subprocess.CalledProcessError(1, "zig")])
def test_what_cannot_be_compiled_there_is_an_error_that_setuptools_passes_over(build, monkeypatch, error):
    def zig(command, check):
        raise error

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "run", zig)
    with pytest.raises(CompileError, match="fastnst._native: "):
        build.build_extension(build.extensions[0])
    assert not Path(build.get_ext_fullpath("fastnst._native")).exists()


def test_a_source_distribution_can_be_built_and_tested(tmp_path):
    subprocess.run([sys.executable, "-c", "from setuptools import setup; setup()", "-q", "egg_info", "--egg-base", tmp_path], cwd=REPOSITORY, check=True)
    held = set((tmp_path / "fastnst.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines())
    patterns = ("fastnst/*.py", "fastnst/*.[ch]", "fastnst/*.safetensors", "scripts/*.py", "scripts/*.sh", "configs/*.yaml", "checkpoints/*/model.safetensors", "tests/*.py")
    for pattern in patterns:
        needed = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob(pattern)}
        assert needed and needed <= held
