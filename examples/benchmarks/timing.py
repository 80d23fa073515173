"""What the benchmarks share: compile apart, time in turns, and outlive a deadlock."""

import multiprocessing
import time

import jax


def compile_program(program, *arguments):
    """Compile a program; return it with compile seconds and peak bytes."""
    lowered = jax.jit(program).lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else float("nan")
    return compiled, seconds, peak


def survives(function, arguments, limit):
    """Run a function once in a process of its own, so that a deadlock ends only that."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(limit)
    alive = process.is_alive()
    if alive:
        process.kill()
    return not alive and process.exitcode == 0


def interleave(programs, arguments, repeats):
    """Return the seconds of every run of every compiled program, one after the other in turns."""
    times = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times[name].append(time.perf_counter() - start)
    return times
