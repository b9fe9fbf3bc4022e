"""From a lowered module to one CPU library that holds every kernel once for each instruction set.

The Relax functions become bytecode as always. The kernels are compiled once for each instruction set, their symbols
suffixed by its name, and a small C object gives each plain name back as a jump to the best version the machine can
run: chosen at the first call, or forced by the environment variable TVM_SPARSE_ISA.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax import vm_build

from tvm_sparse.errors import Refusal
from tvm_sparse.schedules.cpu.isa import ISAS
from tvm_sparse.schedules.spec import CPU_ISAS, KernelSpec
from tvm_sparse.schedules.table import SPEC_ATTR, instantiate, read_decisions

# The storage rewrite drops the annotations of `on_stack`.
_CONFIG = {"tirx.disable_storage_rewrite": True}
_STACK_BYTES = 16 << 10


def cpu_target(isa: str) -> tvm.target.Target:
    """The LLVM target of one of CPU_ISAS, or "aarch64"."""
    known = ISAS[isa]
    facts: dict = {"kind": "llvm", "mtriple": known.triple, "mcpu": known.mcpu}
    if known.features:
        facts["mattr"] = list(known.features)
    return tvm.target.Target(facts)


def build_cpu_library(
    mod: tvm.IRModule,
    out_path: str | Path,
    isas: Sequence[str] = CPU_ISAS,
    instruments: Sequence[tvm.ir.instrument.PassInstrument] = (),
) -> None:
    """Compiles an IRModule (Relax functions and PrimFuncs) into one shared library for all `isas`.

    A matmul kernel that carries its KernelSpec is written anew for each instruction set; every other PrimFunc is
    compiled as it stands. `isas` go from the best to the one every machine has; the library takes the first that fits.

    Raises Refusal where no C compiler is found to link with.
    """
    target = cpu_target(isas[-1])
    with target, tvm.transform.PassContext(opt_level=3, config=_CONFIG, instruments=list(instruments)):
        mod = relax.get_pipeline("default")(mod)
        constants = dict(mod.attrs["const_name_to_constant"]) if "const_name_to_constant" in (mod.attrs or {}) else {}
        external = list(mod.attrs["external_mods"]) if "external_mods" in (mod.attrs or {}) else []
        builder = relax.ExecBuilder()
        leftover = vm_build._vmcodegen(builder, mod)
        kernels = {gvar.name_hint: f for gvar, f in leftover.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
        libraries = [compile_kernels(kernels, isa, suffix=_suffix(isa)) for isa in isas]
        executable = vm_build._vmlink(builder, target, ext_libs=[*external, *libraries], params=constants)
    with tempfile.TemporaryDirectory() as folder:
        jumps = compile_c(dispatcher([_symbol(name, f) for name, f in kernels.items()], isas), Path(folder) / "jumps.o")
        executable.export_library(str(out_path), addons=[str(jumps)])


def compile_kernels(kernels: dict[str, tvm.tirx.PrimFunc], isa: str, suffix: str = "") -> tvm.runtime.Module:
    """Compiles PrimFuncs for one instruction set, under their names plus `suffix`."""
    functions = {}
    for name, function in kernels.items():
        symbol = _symbol(name, function) + suffix
        functions[symbol] = on_stack(for_isa(function, isa)).with_attr("global_symbol", symbol)
    with tvm.transform.PassContext(opt_level=3, config=_CONFIG):
        return tvm.tirx.build(tvm.IRModule(functions), target=cpu_target(isa))


def for_isa(function: tvm.tirx.PrimFunc, isa: str) -> tvm.tirx.PrimFunc:
    """The kernel's version for an instruction set, tuned where there is a record; anything else as it stands."""
    if SPEC_ATTR not in (function.attrs or {}):
        return function
    spec = replace(KernelSpec.from_json(function.attrs[SPEC_ATTR]), arch=isa)
    return instantiate(spec, read_decisions(function).get(isa))


def on_stack(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """Keeps small local buffers on the stack, where LLVM makes registers of them; TVM takes them from the heap.

    A buffer is small where its static size is at most 16 KiB; a call-back of the runtime's allocator for each row is
    what this saves, and the accumulators' way through memory.
    """

    def keep(alloc: tvm.tirx.AllocBuffer) -> tvm.tirx.AllocBuffer:
        buffer = alloc.buffer
        static = all(isinstance(dim, tvm.tirx.IntImm) for dim in buffer.shape)
        if buffer.scope() != "local" or not static:
            return alloc
        dtype = tvm.DataType(str(buffer.dtype))
        if prod(int(dim) for dim in buffer.shape) * dtype.bits * dtype.lanes > 8 * _STACK_BYTES:
            return alloc
        return tvm.tirx.AllocBuffer(buffer, {"disable_lower_builtin": tvm.tirx.IntImm("bool", 1)})

    return function.with_body(tvm_ffi.structural_map(function.body, (tvm.tirx.AllocBuffer, keep)))


def _suffix(isa: str) -> str:
    return "__" + isa.replace("-", "_")


def _symbol(name: str, function: tvm.tirx.PrimFunc) -> str:
    return str(function.attrs["global_symbol"]) if "global_symbol" in (function.attrs or {}) else name


_SUPPORTED = {
    "avx512": 'cpu("x86-64-v4") && cpu("avx512vbmi2") && cpu("avx512bf16")',
    "avx2": 'cpu("x86-64-v3")',
    "x86-64": "1",
}


def dispatcher(symbols: Sequence[str], isas: Sequence[str]) -> str:
    """C source: `__tvm_ffi_<symbol>` for each kernel, with TVM FFI's calling convention (tvm/ffi/c_api.h).

    `__tvm_ffi_tvm_sparse_isa` returns the index, in `isas`, of the version in use.
    """
    names = ", ".join(f'"{isa}"' for isa in isas)
    tests = "\n".join(f"    case {i}: return {_SUPPORTED[isa]};" for i, isa in enumerate(isas))
    lines = [
        f"""\
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define cpu(feature) __builtin_cpu_supports(feature)
typedef struct {{ int32_t type_index; uint32_t padding; int64_t value; }} Any;
typedef int Kernel(void*, const Any*, int32_t, Any*);
static const char* const names[] = {{{names}}};
static int isa;

static int supported(int i) {{
  switch (i) {{
{tests}
  }}
  return 0;
}}

static int best(const char* name) {{
  for (int i = 0; i < {len(isas)}; ++i) {{
    if ((!name || !strcmp(name, names[i])) && supported(i)) return i;
  }}
  return -1;
}}

__attribute__((constructor)) static void choose(void) {{
  const char* forced = getenv("TVM_SPARSE_ISA");
  __builtin_cpu_init();
  isa = best(forced && *forced ? forced : NULL);
  if (isa >= 0) return;
  isa = best(NULL);
  fprintf(stderr, "tvm_sparse: TVM_SPARSE_ISA=%s: not in this library or not for this machine; taking %s\\n",
          forced, names[isa]);
}}

int __tvm_ffi_tvm_sparse_isa(void* self, const Any* args, int32_t count, Any* result) {{
  result->type_index = 1;  /* kTVMFFIInt */
  result->padding = 0;
  result->value = isa;
  return 0;
}}
"""
    ]
    for symbol in symbols:
        versions = [f"__tvm_ffi_{symbol}{_suffix(isa)}" for isa in isas]
        lines.append(f"extern Kernel {', '.join(versions)};")
        lines.append(f"int __tvm_ffi_{symbol}(void* self, const Any* args, int32_t count, Any* result) {{")
        lines.append(f"  static Kernel* const of[] = {{{', '.join(versions)}}};")
        lines.append("  return of[isa](self, args, count, result);\n}")
    return "\n".join(lines) + "\n"


def compile_c(source: str, out: Path) -> Path:
    """Compiles C to an object file with the machine's compiler ($CC, else cc)."""
    compiler = os.environ.get("CC", "cc")
    path = out.with_suffix(".c")
    path.write_text(source)
    try:
        command = [compiler, "-O2", "-fPIC", "-c", str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as missing:
        raise Refusal(f"no C compiler ({compiler}): install one, or name it in CC") from missing
    if done.returncode:
        raise RuntimeError(f"{compiler} failed on the dispatcher:\n{done.stderr}")
    return out
