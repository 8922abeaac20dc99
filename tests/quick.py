"""What makes XLA compile fast, and programs run slower: tests compile far more than they run."""

import importlib.metadata

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's older code generator takes a fifth of the newer one's time. Later versions have only the
    # newer, and end the process at a flag that they do not know.
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
