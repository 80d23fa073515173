"""How programs are compiled in tests, where most of them run once."""

import importlib.metadata


def xla_flags():
    """Compile fast instead of well; XLA reads its flags when JAX first computes."""
    flags = ["--xla_backend_optimization_level=0"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # XLA stops at a flag that it does not know. The emitters that later versions no longer have
        # take half as long; splitting a program in parts pays where cores are idle.
        flags += [
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_llvm_disable_expensive_passes=true",
        ]
    return " ".join(flags)
