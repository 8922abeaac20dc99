"""Google Kubernetes Engine: the manifest, and what kubectl is given."""

import json
import pathlib

import pytest
from scripts import CONFIG, LAUNCH, REPOSITORY, commands, script

from lm.parallel.cluster import HostsConfig, detect

yaml = pytest.importorskip("yaml", reason="needs PyYAML, which reads the manifest")

SLICE = ("--name=lm-1", "--image=a/b:1", "--accelerator=tpu-v5p-slice", "--topology=4x4x8")


def manifest(*arguments):
    return yaml.safe_load(script("gke.sh", *SLICE, *arguments))


def test_the_manifest_runs_one_pod_a_host_and_all_or_none(stubs):
    job = manifest("--bucket=b-1", "render", CONFIG, '--config.prompt=a "b" \\ ${c}')
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["metadata"]["name"] == "lm-1"
    assert job["spec"]["network"]["enableDNSHostnames"] is True
    (replicated,) = job["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    spec = replicated["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 4 * 4 * 8 // 4
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
    }
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == [
        "python",
        "main.py",
        f"--config={CONFIG}",
        '--config.prompt=a "b" \\ ${c}',
        "--workdir=/mnt/lm/runs/lm-1",
    ]
    assert "$" not in json.dumps({**job, "spec": {**job["spec"], "replicatedJobs": []}})


def test_the_manifest_restarts_a_lost_run_but_not_a_mistake(stubs):
    job = manifest("--bucket=b-1", "--max-restarts=7", "render", CONFIG)
    policy = job["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "lm", "operator": "In", "values": [2]}
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_the_pods_of_a_manifest_find_each_other(stubs):
    job = manifest("--bucket=b-1", "render", CONFIG)
    replicated = job["spec"]["replicatedJobs"][0]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    fields = {
        "metadata.annotations['jobset.sigs.k8s.io/jobset-name']": job["metadata"]["name"],
        "metadata.annotations['jobset.sigs.k8s.io/replicatedjob-name']": replicated["name"],
    }
    environment = {"JOB_COMPLETION_INDEX": "5", "TPU_SKIP_MDS_QUERY": "1"}
    for variable in container["env"]:
        source = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        environment[variable["name"]] = fields[source] if source else variable["value"]
    cluster = detect(HostsConfig(), environment, lambda key: None)
    assert cluster.kind == "kubernetes"
    assert cluster.arguments["coordinator_address"] == "lm-1-slice-0-0.lm-1:8476"
    assert (cluster.arguments["process_id"], cluster.arguments["num_processes"]) == (5, 32)
    assert 8476 in [port["containerPort"] for port in container["ports"]]


def test_all_pods_share_a_bucket_or_a_claim(stubs):
    def volume(*arguments):
        job = manifest(*arguments, "render", CONFIG)
        template = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
        (container,) = template["spec"]["containers"]
        assert {"name": "shared", "mountPath": "/mnt/lm"} in container["volumeMounts"]
        found = {each["name"]: each for each in template["spec"]["volumes"]}["shared"]
        return found, template["metadata"]["annotations"]["gke-gcsfuse/volumes"]

    shared, mounted = volume("--bucket=b-1")
    assert shared["csi"]["volumeAttributes"]["bucketName"] == "b-1" and mounted == "true"
    shared, mounted = volume("--claim=disk")
    assert shared["persistentVolumeClaim"] == {"claimName": "disk"} and mounted == "false"


def test_kubectl_gets_what_the_dry_run_prints(stubs):
    selector = "--selector=jobset.sigs.k8s.io/jobset-name=lm-1"
    space = "--namespace=default"
    options = [*SLICE, "--bucket=b-1", "--spot"]
    file = f"{stubs.folder}/lm-1.yaml"
    follow = ["--follow", "--prefix", "--max-log-requests=10000", selector, "--container=lm"]
    get = ["kubectl", "get"]
    build = ["docker", "build", f"--file={LAUNCH}/Dockerfile", "--tag=a/b:1", str(REPOSITORY)]
    for command, expected in (
        (["image"], [build, ["docker", "push", "a/b:1"]]),
        (["apply", CONFIG], [["kubectl", "apply", space, f"--filename={file}"]]),
        (["logs"], [["kubectl", "logs", space, *follow]]),
        (
            ["status"],
            [[*get, "jobset", "lm-1", space], [*get, "pods", space, selector, "--output=wide"]],
        ),
        (["delete"], [["kubectl", "delete", "jobset", "lm-1", space]]),
    ):
        stubs.answer([])
        script("gke.sh", *options, *command)
        assert stubs.calls() == expected
        assert commands(script("gke.sh", "--dry-run", *options, *command)) == expected
        assert stubs.calls() == expected
    spot = yaml.safe_load(pathlib.Path(file).read_text())["spec"]["replicatedJobs"][0]
    nodes = spot["template"]["spec"]["template"]["spec"]["nodeSelector"]
    assert nodes["cloud.google.com/gke-spot"] == "true"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([*SLICE, "render", CONFIG], "--bucket='' or --claim='' must name storage"),
        ([*SLICE, "--bucket=b-1", "--claim=c", "render", CONFIG], "--claim='c' exclude each other"),
        (
            [*SLICE, "--bucket=gs://b", "render", CONFIG],
            "--bucket='gs://b' must be a bucket",
        ),
        (
            [*SLICE, "--topology=4", "--bucket=b-1", "render", CONFIG],
            "--topology='4' must be",
        ),
        (
            [*SLICE, "--topology=1x3", "--bucket=b-1", "render", CONFIG],
            "--topology='1x3' has 3 chips, not a multiple of --chips='4' in a host",
        ),
        ([*SLICE, "--chips=16", "--bucket=b-1", "render", CONFIG], "--chips='16' must be 1 to 8"),
        (["--bucket=b-1", "render", CONFIG], "--name='' must be at most 40"),
        ([*SLICE, "--bucket=b-1", "apply"], "apply needs a config"),
        ([*SLICE, "--bucket=b-1", "apply", "x.py"], "apply: config 'x.py' is not a file"),
        ([*SLICE, "--bucket=b-1", "apply", CONFIG, "x"], "apply: 'x' is not a flag"),
        (
            [*SLICE, "--bucket=b-1", "apply", CONFIG, "--workdir=runs/x"],
            "--workdir='runs/x' must be in /mnt/lm",
        ),
        ([*SLICE, "--buckets=b", "apply"], "'--buckets=b' is not one of --name="),
        ([*SLICE, "destroy"], "command 'destroy' is not one of image render apply"),
        ([*SLICE, "logs", "3"], "logs takes no arguments, not '3'"),
    ],
)
def test_mistakes_in_gke_are_one_line(stubs, arguments, message):
    error = script("gke.sh", *arguments, code=2)
    assert message in error and error.count("\n") == 1
    assert not stubs.calls()
