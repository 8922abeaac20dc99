"""How a process learns what run it is part of. No network is touched."""

import pytest

from lm.config import ConfigError, view
from lm.parallel.cluster import Cluster, HostsConfig, detect

SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-002]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}
JOBSET = {
    "JOBSET_NAME": "llama",
    "REPLICATED_JOB_NAME": "workers",
    "JOB_COMPLETION_INDEX": "3",
    "LM_NUM_PROCESSES": "4",
}
LM = {"LM_COORDINATOR": "10.0.0.1:1234", "LM_PROCESS_ID": "1", "LM_NUM_PROCESSES": "3"}
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}


def no_network(key):
    raise AssertionError(f"the metadata server was asked for {key}")


def found(environment, metadata=no_network, **fields):
    config = HostsConfig(**fields)
    view(HostsConfig, config, "config.hosts")
    return detect(config, {**NO_TPU, **environment}, metadata)


def test_one_machine_is_alone():
    assert found({}) is None
    assert found({"LM_NUM_PROCESSES": "1"}) is None
    assert found({**SRUN, "SLURM_NTASKS": "1"}) is None
    assert found({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert found({**JOBSET, "LM_NUM_PROCESSES": "1"}) is None
    assert found({"JOB_COMPLETION_INDEX": "0"}) is None
    for several in (SRUN, GKE, JOBSET, LM):
        assert found(several, cluster="none") is None


@pytest.mark.parametrize("way", ["environment", "config", "both"])
def test_explicit_settings_may_stand_anywhere(way):
    fields = {"coordinator": "10.0.0.1:1234", "process_id": 1, "num_processes": 3}
    environment = {}
    if way == "environment":
        environment, fields = LM, {}
    if way == "both":  # the config has the last word
        environment = {**LM, "LM_COORDINATOR": "elsewhere:1", "LM_PROCESS_ID": "2"}
        del fields["num_processes"]
    assert found(environment, **fields) == Cluster(
        "explicit",
        {
            "coordinator_address": "10.0.0.1:1234",
            "process_id": 1,
            "num_processes": 3,
            "cluster_detection_method": "deactivate",
        },
    )


def test_explicit_settings_come_before_any_cluster():
    for other in (SRUN, GKE, JOBSET):
        assert found({**other, **LM}).kind == "explicit"


@pytest.mark.parametrize(
    ("environment", "fields", "message"),
    [
        ({"LM_COORDINATOR": "a:1"}, {}, "LM_COORDINATOR='a:1' needs config.hosts.process_id (or"),
        ({}, {"process_id": 0}, "config.hosts.process_id=0 needs config.hosts.coordinator"),
        ({"LM_NUM_PROCESSES": "2"}, {}, "LM_NUM_PROCESSES=2 needs"),
        ({}, {"cluster": "explicit"}, "cluster='explicit' needs"),
        ({**LM, "LM_PROCESS_ID": "3"}, {}, "LM_PROCESS_ID=3 must be at least 0 and below LM_NUM_P"),
        ({**LM, "LM_PROCESS_ID": "-1"}, {}, "LM_PROCESS_ID='-1' must be a whole number"),
        ({**LM, "LM_NUM_PROCESSES": "0"}, {}, "LM_NUM_PROCESSES=0 must be at least 1"),
        ({**LM, "LM_COORDINATOR": "10.0.0.1"}, {}, "LM_COORDINATOR='10.0.0.1' must be host:port"),
        (LM, {"coordinator": "host:port"}, "config.hosts.coordinator='host:port' must be host:por"),
        (LM, {"coordinator": "host:99999"}, "must be host:port"),
        ({}, {"cluster": "slurm"}, "has no SLURM_JOB_ID, SLURM_STEP_NODELIST"),
        ({}, {"cluster": "kubernetes"}, "has no JOBSET_NAME"),
        ({}, {"cluster": "tpu"}, "neither TPU_WORKER_HOSTNAMES nor the metadata"),
        ({}, {"cluster": "slrum"}, "did you mean 'slurm'"),
        ({}, {"heartbeat_timeout": 0}, "config.hosts.heartbeat_timeout=0 must be at least 2"),
        ({**JOBSET, "LM_NUM_PROCESSES": ""}, {}, "how many pods? Set LM_NUM_PROCESSES"),
        ({**JOBSET, "LM_NUM_PROCESSES": "3"}, {}, "JOB_COMPLETION_INDEX=3 must be at least 0 and"),
    ],
)
def test_what_cannot_be_is_named_in_one_line(environment, fields, message):
    with pytest.raises(ConfigError) as caught:
        found(environment, **fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_slurm_is_left_to_jax_but_for_the_devices():
    # One task a node has all the node's GPUs, where JAX would give it the first.
    assert found(SRUN) == Cluster(
        "slurm", {"cluster_detection_method": "slurm", "local_device_ids": []}
    )
    eight = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    assert found(eight).arguments == {"cluster_detection_method": "slurm"}
    # SLURM has shown each task its own GPU: it is number 0 there, whatever the task's number.
    bound = found({**eight, "CUDA_VISIBLE_DEVICES": "0"})
    assert bound.arguments["local_device_ids"] == []


def test_a_slurm_job_that_forgot_srun_says_so(caplog):
    assert found({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}) is None
    assert "srun did not start this process" in caplog.text


def test_tpu_workers():
    assert found(GKE) == Cluster("tpu", {"cluster_detection_method": "gketpu"})
    two_slices = {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}
    assert found(two_slices).kind == "tpu"
    assert found({**GKE, **JOBSET}).kind == "tpu"  # JAX's processes must be numbered as libtpu's


def test_a_tpu_vm_is_asked_about_itself():
    def metadata(workers, slices=1):
        answers = {
            "worker-network-endpoints": ",".join(f"x:{i}:10.0.0.{i}" for i in range(workers)),
            "tpu-env": f"ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '{slices}'\n",
        }
        return lambda key: answers[key]

    config = HostsConfig()
    assert detect(config, {}, metadata(1)) is None
    assert detect(config, {}, metadata(4)).arguments == {"cluster_detection_method": "gcetpu"}
    assert detect(config, {}, metadata(1, slices=2)).kind == "tpu"
    assert detect(config, {}, lambda key: None) is None


def test_a_jobset_names_process_0_by_its_pod():
    assert found(JOBSET).arguments == {
        "coordinator_address": "llama-workers-0-0.llama:8476",
        "process_id": 3,
        "num_processes": 4,
        "cluster_detection_method": "deactivate",
    }
    elsewhere = found({**JOBSET, "JAX_COORDINATOR_PORT": "99"})
    assert elsewhere.arguments["coordinator_address"].endswith(":99")
    assert elsewhere.kind == "kubernetes"
