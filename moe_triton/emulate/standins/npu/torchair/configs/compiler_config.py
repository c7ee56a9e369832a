"""Settings of the compiler, which change nothing here."""

from __future__ import annotations

from moe_triton.emulate import missing


class CompilerConfig:
    """Any name can be set and read, at any depth: scripts say how an NPU should compile."""

    def __getattr__(self, name: str) -> CompilerConfig:
        if name.startswith("__"):
            raise AttributeError(name)
        section = CompilerConfig()
        setattr(self, name, section)
        return section


__getattr__ = missing.module_getattr("torchair.configs.compiler_config")
