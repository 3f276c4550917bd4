"""Compiles kernels for every supported GPU architecture; needs no GPU.

The interpreter replaces Triton's language while it is on, so compiling takes a process of
its own without it: `assert_compiles` starts one for all architectures of a kernel.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Shared memory one block may use on each architecture, in bytes (CUDA programming guide).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def assert_compiles(
    module: str,
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    architectures: tuple[int, ...] = ARCHITECTURES,
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> dict[int, dict[str, int]]:
    """Compile one kernel for each of `architectures` and check that it fits their memory.

    Args:
        module: where the kernel is, e.g. "turbodit.kernels.block_map.triton".
        kernel: name of the `triton.jit` or `gluon.jit` function in it.
        signature: Triton type of every argument: "*fp16", "*bf16", "*fp32", "*i8",
            "*fp8e4nv", "*i32", "i32", "i64", "fp32", ...; "i32:16" is an integer that 16 divides,
            as strides mostly are; "tensordesc<bf16[64, 128]>" is what TMA reads, in Gluon with
            its layout. Pointers are taken as aligned. Leave out `constexprs`.
        constexprs: values of the constexpr arguments, by name. None stands for a pointer that
            is not given, "tl.float16" and the like for a dtype.

    Returns:
        For each architecture, what the compiler said: {"shared": bytes of shared memory}.
    """
    job = {
        "module": module,
        "kernel": kernel,
        "signature": dict(signature),
        "constexprs": dict(constexprs),
        "architectures": architectures,
        "options": {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg},
    }
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{kernel} does not compile:\n{run.stdout}{run.stderr}"
    reports = {int(capability): report for capability, report in json.loads(run.stdout).items()}
    for capability, report in reports.items():
        assert report["shared"] <= SHARED_MEMORY[capability], (kernel, capability, report)
    return reports


def compile_all(job: dict[str, Any]) -> dict[int, dict[str, int]]:
    """What `assert_compiles` asks for, in the process that it starts."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    fn = getattr(importlib.import_module(job["module"]), job["kernel"])
    constexprs = {
        name: getattr(tl, value[3:]) if str(value).startswith("tl.") else value
        for name, value in job["constexprs"].items()
    }
    unknown = (set(job["signature"]) | set(constexprs)) - set(fn.arg_names)
    missing = set(fn.arg_names) - set(job["signature"]) - set(constexprs)
    if unknown or missing:
        raise ValueError(f"{fn.__name__}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    signature = {
        name: "constexpr" if name in constexprs else job["signature"][name] for name in fn.arg_names
    }
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(fn.arg_names)
        if signature[name].startswith("*") or signature[name].endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    source = ASTSource(fn, types, constexprs, divisible)
    if fn.is_gluon():
        source = GluonASTSource(fn, types, constexprs, divisible)
    reports = {}
    for capability in job["architectures"]:
        target = GPUTarget("cuda", capability, 32)
        kernel = triton.compile(source, target=target, options=job["options"])
        reports[capability] = {"shared": kernel.metadata.shared}
    return reports


if __name__ == "__main__":
    json.dump(compile_all(json.load(sys.stdin)), sys.stdout)
