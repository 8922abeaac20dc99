"""Eight fake devices, set before JAX starts, so that sharding is tested on every machine."""

import gc
import os

import quick

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nobody reads where in the source an operation comes from, and to find out takes time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", quick.FLAGS]
)


# Files with a test of a minute or more.
LONG = ("test_readme.py", "test_align_script.py", "test_notebooks.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items):
    """The longest tests begin first: one that began last would keep the other workers waiting."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish():
    """What has been imported stays: the collector need not look at it again, nor so often."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
