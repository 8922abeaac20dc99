"""Eight fake devices, set before JAX starts, so that sharding is tested on every machine."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests compile far more than they run.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
