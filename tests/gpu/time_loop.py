"""A loop over one copy of code against the same steps unrolled.

python tests/gpu/time_loop.py build FOLDER cpu|h200     where the compiler is
python tests/gpu/time_loop.py run FOLDER cpu|h200       where the device is; on a GPU both are also captured

Both run STEPS times y = y + state[i], one small kernel each, so that what is seen is the machinery around the kernels.
The unrolled function takes a tensor for every state, as folded layers do. The loop is a Relax function that calls
itself, as Relax has no other: all states in one tensor, the step's number and whether to go on in others.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

STEPS, WIDTH, CALLS = 64, 256, 100


def build(folder: Path, name: str) -> None:
    import tvm
    from tvm import relax

    from tvm_sparse.codegen.cuda import build_cuda_library
    from tvm_sparse.targets import MACHINES

    folder.mkdir(parents=True, exist_ok=True)
    for kind, mod in (("unrolled", unrolled(relax)), ("loop", loop(tvm, relax))):
        path = folder / f"{kind}-{name}.so"
        if name == "cpu":
            with tvm.target.Target("llvm") as target:
                tvm.compile(mod, target=target).export_library(str(path))
        else:
            build_cuda_library(mod, path, [MACHINES[name]])
        print(f"{kind}: {path.stat().st_size} bytes")


def unrolled(relax):
    row = relax.TensorType((1, WIDTH), "float32")
    y, *states = params = [relax.Var(name, row) for name in ("x", *(f"s{i}" for i in range(STEPS)))]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        for state in states:
            y = builder.emit(relax.op.add(y, state))
        builder.emit_func_output(y)
    return builder.get()


def loop(tvm, relax):
    row, every = relax.TensorType((1, WIDTH), "float32"), relax.TensorType((STEPS, WIDTH), "float32")
    number, one = relax.TensorType((), "int64"), relax.TensorType((1,), "int64")
    i, y, states = relax.Var("i", number), relax.Var("y", row), relax.Var("states", every)
    body = tvm.ir.GlobalVar("body")
    relax.expr._update_type(body, relax.FuncType([number, row, every], row))

    def sequence(*steps):
        bound = [relax.VarBinding(var, value) for var, value in steps]
        return relax.SeqExpr([relax.BindingBlock(bound)], steps[-1][0])

    at, state, following = relax.Var("at", one), relax.Var("state", row), relax.Var("following", number)
    added, rest, done = (relax.Var(name, row) for name in ("added", "rest", "done"))
    more, result = relax.Var("more", relax.TensorType((), "bool")), relax.Var("result", row)
    again = sequence(
        (at, relax.op.reshape(i, (1,))), (state, relax.op.take(states, at, axis=0)), (added, relax.op.add(y, state)),
        (following, relax.op.add(i, relax.const(1, "int64"))), (rest, relax.Call(body, [following, added, states])),
    )  # fmt: skip
    whole = sequence(
        (more, relax.op.less(i, relax.const(STEPS, "int64"))),
        (result, relax.If(more, again, sequence((done, y)))),
    )
    x, given, out = relax.Var("x", row), relax.Var("states", every), relax.Var("out", row)
    start = sequence((out, relax.Call(body, [relax.const(0, "int64"), x, given])))
    main = relax.Function([x, given], start, row, True).with_attr("global_symbol", "main")
    mod = tvm.IRModule({body: relax.Function([i, y, states], whole, row, True), "main": main})
    return relax.transform.Normalize()(mod)


def run(folder: Path, name: str) -> None:
    import torch
    import tvm_ffi

    device = "cpu" if name == "cpu" else "cuda"
    if device == "cuda":
        from host import load
    else:
        from tvm_sparse.engine.runtime import load_tvm_ffi

        load_tvm_ffi()

        def load(path: str):
            return lambda function: tvm_ffi.load_module(path)[function]

    for kind in ("unrolled", "loop"):
        path = folder / f"{kind}-{name}.so"
        vm = load(str(path))("vm_load_executable")()
        vm["vm_initialization"](*((1, 0, 2) if name == "cpu" else (2, 0, 2, 1, 0, 2)))
        states = torch.ones(STEPS, 1, WIDTH, device=device)
        x = torch.zeros(1, WIDTH, device=device)
        given = [states.view(STEPS, WIDTH)] if kind == "loop" else list(states)
        arguments = [tvm_ffi.from_dlpack(tensor) for tensor in (x, *given)]

        def call() -> float:
            return vm["main"](*arguments)  # noqa: B023

        assert (torch.from_dlpack(call()) == STEPS).all()
        best = min(_seconds(call, device) for _ in range(20))
        print(f"{kind}: {path.stat().st_size} bytes, {best / STEPS * 1e6:.2f} us a step")
        if device == "cuda":
            print(f"{kind}, captured: {_captured(call)}")


def _seconds(call, device: str) -> float:
    import torch

    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / CALLS


def _captured(call) -> str:
    import torch
    import tvm_ffi

    graph = torch.cuda.CUDAGraph()
    try:
        with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
            call()
    except Exception as refused:
        return f"not possible ({str(refused).splitlines()[0][:160]})"
    graph.replay()
    best = min(_seconds(graph.replay, "cuda") for _ in range(20))
    return f"{best / STEPS * 1e6:.2f} us a step"


if __name__ == "__main__":
    {"build": build, "run": run}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])
