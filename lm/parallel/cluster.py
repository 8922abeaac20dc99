"""Which processes a run is made of: from the config, the environment, or the cluster it runs on.

`config.hosts` may say nothing at all: then the environment is looked at, in this order, and where
nothing names several processes there is one, and no network is used.

    explicit      coordinator, process_id, num_processes; or LM_COORDINATOR, LM_PROCESS_ID,
                  LM_NUM_PROCESSES, which `launch/local.py` sets
    slurm         what srun sets: one process a task
    tpu           TPU_WORKER_HOSTNAMES (GKE), or the metadata of a TPU VM
    kubernetes    a JobSet of one replicated Indexed job: JOBSET_NAME, REPLICATED_JOB_NAME and
                  JOB_COMPLETION_INDEX, and LM_NUM_PROCESSES, the number of its pods

Addresses and numbers come from JAX's own detection (`jax.distributed.initialize`) where it has one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from absl import logging

from lm.config import Bounds, ConfigError, Count, check

CLUSTERS = ("auto", "none", "explicit", "slurm", "tpu", "kubernetes")
# What the environment of a cluster has, and what to do where it does not.
_SRUN = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_JOBSET = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_COMPLETION_INDEX")
_NEEDED = {
    "slurm": (_SRUN, "start the run with srun"),
    "kubernetes": (
        _JOBSET,
        "let the JobSet's manifest set them, or give coordinator, process_id and num_processes",
    ),
}
_PORT = "8476"  # of process 0 in a JobSet; $JAX_COORDINATOR_PORT is another
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """The processes of a run and how they find each other."""

    cluster: Literal[CLUSTERS] = "auto"  # where to look
    coordinator: str = ""  # host:port at which process 0 listens and the others find it
    process_id: Annotated[int, Bounds(-1)] = -1  # which process this is, from 0
    num_processes: Count = 0  # how many there are
    # seconds of silence after which a process counts as dead
    heartbeat_timeout: Annotated[int, Bounds(2, 10**6)] = 30
    # seconds to wait for all processes to arrive
    initialization_timeout: Annotated[int, Bounds(2, 10**6)] = 300
    # fake devices of this process, on a CPU; 0: what there is
    local_devices: Annotated[int, Bounds(0, 4096)] = 0

    def validate(self, prefix: str = "config.hosts") -> None:
        """Raises ConfigError on the first impossible field."""
        if self.coordinator:
            _check_address(f"{prefix}.coordinator", self.coordinator)


class Cluster(NamedTuple):
    """Several processes.

    Attributes:
      kind: where they were found, one of `CLUSTERS`.
      arguments: of `jax.distributed.initialize`.
    """

    kind: str
    arguments: dict[str, Any]


def gce_metadata(key: str) -> str | None:
    """An attribute of the Google Cloud machine this is, or None where it has none."""
    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def detect(
    config: HostsConfig,
    environment: Mapping[str, str] = os.environ,
    metadata: Callable[[str], str | None] = gce_metadata,
) -> Cluster | None:
    """The cluster this process belongs to, or None where it is alone.

    `metadata` asks a TPU VM about itself; it is called on such machines alone.

    Raises:
      ConfigError: settings that are incomplete, contradict each other, or name a cluster that the
        environment knows nothing of.
    """
    if config.cluster == "none":
        return None
    given = _given(config, environment)
    workers = functools.cache(lambda: _tpu_workers(environment, metadata))
    kind = config.cluster if config.cluster != "auto" else _kind(given, environment, workers)
    if kind == "none":
        return None
    needed, remedy = _NEEDED.get(kind, ((), ""))
    missing = ", ".join(name for name in needed if name not in environment)
    check(
        not missing,
        f"config.hosts.cluster={kind!r}, but the environment has no {missing}: {remedy}",
    )
    if kind == "slurm":
        several, arguments = int(environment["SLURM_NTASKS"]) > 1, _slurm(environment)
    elif kind == "tpu":
        number, method = workers()
        check(
            number > 0,
            "config.hosts.cluster='tpu', but neither TPU_WORKER_HOSTNAMES nor the metadata of a "
            "TPU VM name any workers: set cluster='none' on a single machine",
        )
        several, arguments = number > 1, {"cluster_detection_method": method}
    else:
        arguments = _explicit(_jobset(given, environment) if kind == "kubernetes" else given)
        several = arguments["num_processes"] > 1
    return Cluster(kind, arguments) if several else None


def _kind(given: dict[str, _Given], environment: Mapping[str, str], workers) -> str:
    """The cluster that the environment tells of, one of `CLUSTERS`."""
    if set(given) - {"num_processes"}:
        return "explicit"
    if all(name in environment for name in _SRUN):
        return "slurm"
    if "SLURM_JOB_ID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        logging.warning(
            "SLURM_NTASKS=%s, but srun did not start this process: it works alone",
            environment["SLURM_NTASKS"],
        )
    if workers()[0] > 1:
        return "tpu"
    if all(name in environment for name in _JOBSET):
        return "kubernetes"
    return "explicit" if given else "none"


class _Given(NamedTuple):
    value: Any
    source: str  # what the user wrote it in, for messages


def _given(config: HostsConfig, environment: Mapping[str, str]) -> dict[str, _Given]:
    """What the config says of coordinator, process_id and num_processes, else the environment."""
    unset = HostsConfig()
    found = {}
    for name in ("coordinator", "process_id", "num_processes"):
        value, variable = getattr(config, name), f"LM_{name.upper()}"
        if value != getattr(unset, name):
            found[name] = _Given(value, f"config.hosts.{name}")
        elif environment.get(variable):
            value = environment[variable]
            if name != "coordinator":
                check(value.isdecimal(), f"{variable}={value!r} must be a whole number")
                value = int(value)
            found[name] = _Given(value, variable)
    return found


def _explicit(given: dict[str, _Given]) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize`; of one process alone, only how many there are."""
    total = given.get("num_processes")
    if total is not None:
        check(total.value >= 1, f"{total.source}={total.value} must be at least 1")
        if total.value == 1:
            return {"num_processes": 1}
    missing = [name for name in ("coordinator", "process_id", "num_processes") if name not in given]
    if missing:
        there = " and ".join(f"{each.source}={each.value!r}" for each in given.values())
        lacking = " and ".join(f"config.hosts.{name} (or LM_{name.upper()})" for name in missing)
        there = there or "config.hosts.cluster='explicit'"
        raise ConfigError(f"{there} needs {lacking} as well")
    coordinator, index = given["coordinator"], given["process_id"]
    _check_address(coordinator.source, coordinator.value)
    check(
        0 <= index.value < total.value,
        f"{index.source}={index.value} must be at least 0 and below {total.source}={total.value}",
    )
    return {
        "coordinator_address": coordinator.value,
        "process_id": index.value,
        "num_processes": total.value,
        "cluster_detection_method": "deactivate",
    }


def _jobset(given: dict[str, _Given], environment: Mapping[str, str]) -> dict[str, _Given]:
    check(
        "num_processes" in given,
        f"JOBSET_NAME={environment['JOBSET_NAME']!r} is a JobSet of how many pods? Set "
        "LM_NUM_PROCESSES in its manifest, to 1 for a single one",
    )
    jobset, job, index = (environment[name] for name in _JOBSET)
    port = environment.get("JAX_COORDINATOR_PORT", _PORT)
    return {
        "coordinator": _Given(f"{jobset}-{job}-0-0.{jobset}:{port}", "JOBSET_NAME"),
        "process_id": _Given(int(index), "JOB_COMPLETION_INDEX"),
        **given,
    }


def _check_address(field: str, address: str) -> None:
    host, colon, port = address.rpartition(":")
    good = bool(host and colon) and port.isdecimal() and 0 < int(port) < 65536
    check(good, f"{field}={address!r} must be host:port, for example 10.0.0.1:{_PORT}")


def _slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"cluster_detection_method": "slurm"}
    # Left to itself, JAX gives every task one GPU, the one of its number on the node. That is right
    # where several tasks share a node and its GPUs, and wrong where a task has the node, or SLURM
    # has shown it its own GPUs only. The variable reads like "4(x2),3".
    digits = re.match(r"\d*", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0]
    tasks, seen = int(digits or 1), environment.get("CUDA_VISIBLE_DEVICES")
    if tasks == 1 or (seen is not None and len(seen.split(",")) < tasks):
        arguments["local_device_ids"] = []
    return arguments


def _tpu_workers(
    environment: Mapping[str, str], metadata: Callable[[str], str | None]
) -> tuple[int, str]:
    """How many workers a TPU has, 0 where there is none, and JAX's name for how that is known."""
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if names:
        return len(names.split(",")) * slices, "gketpu"
    # JAX sets this, when it is imported, on every machine without a TPU.
    if "TPU_SKIP_MDS_QUERY" in environment:
        return 0, ""
    workers = metadata("worker-network-endpoints")
    if not workers:
        return 0, ""
    facts = dict(
        line.split(":", 1) for line in (metadata("tpu-env") or "").splitlines() if ":" in line
    )
    slices = int(facts.get("MEGASCALE_NUM_SLICES", "1").strip().strip("'") or 1)
    return len(workers.split(",")) * slices, "gcetpu"
