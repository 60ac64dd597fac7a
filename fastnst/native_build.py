"""Compiling `native.c` and what belongs to it, at installation: for any CPU, and for those kinds of x86 that have more; `native_library` takes the best that runs.

Only setuptools reads this module, by its path (``tool.setuptools.cmdclass`` in pyproject.toml): it imports nothing of the package.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CPUS = {
    "_native": [],
    "_native_avx2": ["-mavx2", "-mfma"],
    "_native_avx512": ["-mavx512f", "-mavx2", "-mfma"],
    "_native_bfloat16": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mavx2", "-mfma"],
}
IS_X86 = platform.machine() in ("x86_64", "AMD64")


class BuildForEachCPU(build_ext):
    """Compiles the one extension of pyproject.toml as often as there are ``CPUS``; on Windows by Zig, which comes from the package index, as its usual compiler knows no vectors."""

    def finalize_options(self) -> None:
        if len(self.distribution.ext_modules) == 1:
            (given,) = self.distribution.ext_modules
            kept = {"sources": given.sources, "depends": given.depends, "optional": given.optional}
            package = given.name.rpartition(".")[0]
            self.distribution.ext_modules = [
                Extension(f"{package}.{name}", extra_compile_args=[*given.extra_compile_args, *flags], **kept) for name, flags in CPUS.items() if IS_X86 or not flags
            ]
        super().finalize_options()
        self.parallel = self.parallel or sys.platform == "win32"  # elsewhere all of them have object files of the same names

    def build_extension(self, ext: Extension) -> None:
        if sys.platform != "win32":
            return super().build_extension(ext)
        library, built = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp) / f"{ext.name}.dll"  # other files come with the latter
        target = f"{'x86_64' if IS_X86 else 'aarch64'}-windows-gnu"
        for folder in (library.parent, built.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run([sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", *ext.extra_compile_args, *ext.sources, "-o", str(built)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{ext.name}: {error}") from error
        shutil.copyfile(built, library)
