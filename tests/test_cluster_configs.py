"""Configurations of clusters, as far as they can be proven without one.

AWS and GCP: Ray's own schema, after its own defaults; EC2 nodes also against botocore's model of
RunInstances. SLURM: run with stand-ins for srun, scontrol, ray and python. Every command: parsed by
the program it calls. KubeRay's schema was found in no package registry, so the RayJob is held
against SHAPE, written by hand: the fields of KubeRay 1.6.2 and of Kubernetes that we use.
"""

import ast
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import click
import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from pipeline.cli import main as cli
from pipeline.cli import options
from pipeline.runtime import config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "cluster_configs"
IN_IMAGE = "/home/ray/ratecluster/"  # where the image has the clone

QUANTITIES = {"cpu": str, "memory": str, "nvidia.com/gpu": str}
CONTAINER = {
    "name": str,
    "image": str,
    "envFrom": [{"secretRef": {"name": str, "optional": bool}}],
    "securityContext": {"allowPrivilegeEscalation": bool, "runAsNonRoot": bool},
    "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
EXPRESSIONS = [{"key": str, "operator": str}]
NODE_AFFINITY = {
    "requiredDuringSchedulingIgnoredDuringExecution": {
        "nodeSelectorTerms": [{"matchExpressions": EXPRESSIONS}]
    }
}
POD = {
    "serviceAccountName": str,
    "affinity": {"nodeAffinity": NODE_AFFINITY},
    "nodeSelector": {str: str},
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
    "containers": [CONTAINER],
    "volumes": [{"name": str, "emptyDir": {"medium": str, "sizeLimit": str}}],
}
TEMPLATE = {"metadata": {"annotations": {str: str}}, "spec": POD}
GROUP = {
    "groupName": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "rayStartParams": {str: str},
    "template": TEMPLATE,
}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str, "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"idleTimeoutSeconds": int, "upscalingMode": str},
    "headGroupSpec": {"rayStartParams": {str: str}, "template": TEMPLATE},
    "workerGroupSpecs": [GROUP],
}
SHAPE = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": CLUSTER,
    },
}


def misfits(value, shape, place="") -> list[str]:
    """Where `value` has a key that `shape` has not, or another type."""
    if isinstance(shape, type):
        return [] if type(value) is shape else [f"{place}: {value!r} is no {shape.__name__}"]
    if type(value) is not type(shape):
        return [f"{place}: {value!r} is no {type(shape).__name__}"]
    if isinstance(shape, list):
        return [m for i, item in enumerate(value) for m in misfits(item, shape[0], f"{place}[{i}]")]
    found = []
    for key, item in value.items():
        known = shape.get(key, shape.get(str))
        found += misfits(item, known, f"{place}.{key}") if known else [f"{place}.{key}: unknown"]
    return found


def load(name: str) -> dict:
    return yaml.safe_load((CONFIGS / name).read_text())


def command_lines(name: str) -> list[list[str]]:
    """The commands of a file's comments or indented lines, in words."""
    text = (CONFIGS / name).read_text()
    text = re.sub(r"^#( (once|up|run|look|down) )?", "     ", text, flags=re.M)
    text = re.sub(r"\\\n *", " ", text)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [
        shlex.split(line, comments=True) for line in lines if line.startswith(("ray ", "ratec"))
    ]


def check_run(words: list[str]) -> dict:
    """The arguments of `run` or `jobs.all`, parsed by the command line; its settings, by config."""
    words = [word.replace(IN_IMAGE, str(ROOT) + "/") for word in words]
    run = typer.main.get_command(cli.app).commands["run"]
    found = run.make_context("run", words).params
    path = ROOT / found["config_file"]
    assert path.parent == ROOT / "jobs" / "configs"
    return {**found, "settings": config.load(options.KINDS, str(path), found["sets"] or ())}


def check_ray(words: list[str]) -> None:
    """The arguments of `ray …`, parsed by Ray; what it is to run, by ours."""
    command: click.Command = scripts.cli
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, list(words))
    if command.name == "submit":
        assert list(context.params["entrypoint"][:3]) == ["python", "-m", "jobs.all"]
        check_run(list(context.params["entrypoint"][3:]))
    context.close()


def test_every_config_of_a_job_loads():
    for path in (ROOT / "jobs" / "configs").glob("*.toml"):
        config.load(options.KINDS, str(path))


# -- KubeRay


def test_the_rayjob_has_only_known_fields():
    job = load("kuberay_rayjob.yaml")
    assert misfits(job, SHAPE) == []
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["maxReplica"] = 3
    assert misfits(job, SHAPE) == [".spec.rayClusterSpec.workerGroupSpecs[1].maxReplica: unknown"]


def test_the_rayjob_runs_as_told():
    spec = load("kuberay_rayjob.yaml")["spec"]
    cluster = spec["rayClusterSpec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.all"]
    settings = check_run(words[3:])["settings"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups["gpu"]["maxReplicas"] == settings["embed"].actors
    assert all(1 <= g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in groups.values())
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"]["mode"] == "token"
    assert spec["backoffLimit"] > 0
    assert cluster["enableInTreeAutoscaling"]


def test_spot_and_gpus_are_where_they_belong():
    cluster = load("kuberay_rayjob.yaml")["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    gpu, cpu = (group["template"]["spec"] for group in cluster["workerGroupSpecs"])
    (spot,) = gpu["nodeSelector"]
    for worker in (gpu, cpu):
        assert worker["nodeSelector"] == {spot: "true"}
        assert spot in [toleration["key"] for toleration in worker["tolerations"]]
    (rule,) = head["affinity"]["nodeAffinity"].popitem()[1]["nodeSelectorTerms"]
    assert rule["matchExpressions"] == [{"key": spot, "operator": "DoesNotExist"}]
    assert "tolerations" not in head
    for pod, gpus in ((head, None), (gpu, "1"), (cpu, None)):
        (container,) = pod["containers"]
        assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["image"] == head["containers"][0]["image"]
        assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
        assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"


# -- Ray's cluster launcher


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_accepts(name):
    prepared = prepare_config(load(name))
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert min(types[kind]["min_workers"] for kind in ("gpu", "cpu")) == 1
    assert prepared["max_workers"] == types["gpu"]["max_workers"] + types["cpu"]["max_workers"]
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config({**load(name), "max_worker": 3}))


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_its_commands_parse_and_ask_for_the_token(name):
    cluster = load(name)
    lists = [commands for key, commands in cluster.items() if key.endswith("_commands")]
    assert len(lists) == 4
    for command in (command for commands in lists for command in commands):
        subprocess.run(["bash", "-n", "-c", command], check=True)
    for role in ("head", "worker"):
        start = cluster[f"{role}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=" in start
        check_ray(shlex.split(start[start.index("ray start") :])[1:])
    assert "/home/ubuntu/.ray/auth_token" in cluster["file_mounts"]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_job_of_its_header_runs(name):
    (line,) = (words for words in command_lines(name) if words[1] == "exec")
    words = shlex.split(line[-1].partition("&& ")[2])
    assert words[:4] == ["ray", "job", "submit", "--working-dir"]
    check_ray(words[1:])
    settings = check_run(words[words.index("jobs.all") + 1 :])["settings"]
    assert load(name)["available_node_types"]["gpu"]["max_workers"] == settings["embed"].actors


def test_ec2_knows_the_nodes():
    session = pytest.importorskip("botocore.session").get_session()
    from botocore.validate import ParamValidator

    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, kind in load("aws.yaml")["available_node_types"].items():
        asked = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(asked, shape).generate_report()
        spot = asked.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == (name != "head")


def test_gce_spot_is_for_workers():
    for name, kind in load("gcp.yaml")["available_node_types"].items():
        model = kind["node_config"].get("scheduling", {}).get("provisioningModel")
        assert (model == "SPOT") == (name != "head")


# -- SLURM

STAND_INS = {
    "scontrol": """say "scontrol $*"; [ "$1" = requeue ] || printf 'n1\\nn2\\nn3\\n'""",
    "srun": """say "srun $*"
        case "$*" in *hostname*) echo "$ADDRESSES"; exit;; esac
        while [ "$1" != ray ]; do shift; done; exec "$@" """,
    "ray": """[ "$1" = status ] && exec grep -q '^ray start .*--head' "$LOG"
        say "token $RAY_AUTH_MODE $RAY_AUTH_TOKEN $(stat -c '%a %s' "$RAY_AUTH_TOKEN_PATH")"
        say "ray $*"
        exec sleep 60""",
    "python": """if [ "$1" = - ]; then
            for _ in $(seq 300); do grep -q '^ray start .*--address' "$LOG" && break; sleep .1; done
        fi
        say "python $*"; [ "$1" = - ] && exit
        [ "$END" = signal ] || exit "$END"
        kill -USR1 "$PPID"; exec sleep 60""",
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the script in an allocation of three nodes: its exit code, its calls, its errors."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in STAND_INS.items():
        path = programs / name
        path.write_text(f'#!/bin/bash\nsay() {{ echo "$1" >> "$LOG"; }}\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(end: str, addresses: str = "fe80::1 10.0.0.1 10.1.0.1", **more: str):
        log = tmp_path / "calls"
        log.write_text("")
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "LOG": str(log),
            "END": end,
            "ADDRESSES": addresses,
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_CPUS_PER_TASK": "8",
            "SHARDS": "s3://in/{0..9}.tar",
            "ROOT": "s3://out/run",
            **more,
        }
        done = subprocess.run(
            ["bash", CONFIGS / "slurm.sbatch"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not list(tmp_path.glob(".ratecluster-*")), "the token stays behind"
        return done.returncode, log.read_text().splitlines(), done.stderr

    return run


@pytest.mark.parametrize("end", ["0", "1", "2"])
def test_slurm_starts_ray_runs_the_job_and_ends_with_its_code(slurm, end):
    code, calls, _ = slurm(end)
    assert code == int(end)
    order = [call for call in calls if not call.startswith("token")]
    assert order[0] == "scontrol show hostnames n[1-3]"
    head, workers = (call for call in order if call.startswith("srun") and "ray start" in call)
    assert "--nodes=1 --nodelist=n1 " in head
    assert "--nodes=2 --exclude=n1 " in workers
    assert all("--overlap" in call for call in (head, workers))
    wait, job = (i for i, call in enumerate(order) if call.startswith("python"))
    starts = [i for i, call in enumerate(order) if call.startswith("ray start")]
    assert starts[0] < starts[1] < wait < job == len(order) - 1
    assert "--head --node-ip-address=10.0.0.1 --port=6379" in order[starts[0]]
    assert "--address=10.0.0.1:6379" in order[starts[1]]
    for start in starts:
        check_ray(shlex.split(order[start])[1:])
    assert order[wait] == "python - 10.0.0.1:6379 3"
    words = shlex.split(order[job])
    assert words[:3] == ["python", "-m", "jobs.all"]
    asked = check_run(words[3:])
    assert (asked["address"], asked["root"]) == ("10.0.0.1:6379", "s3://out/run")


def test_slurm_gives_ray_a_private_token(slurm):
    _, calls, _ = slurm("0", RAY_AUTH_TOKEN="of somebody else")
    assert [call for call in calls if call.startswith("token")] == ["token token  600 64"] * 2


def test_slurm_queues_again_before_the_limit(slurm):
    code, calls, message = slurm("signal")
    assert calls[-1] == "scontrol requeue 77"
    assert code
    assert "queued again" in message


def test_slurm_refuses_an_address_that_others_cannot_reach(slurm):
    code, calls, message = slurm("0", addresses="127.0.1.1")
    assert code == 2
    assert "set HEAD_IP" in message
    assert not any("ray start" in call for call in calls)


def test_slurm_says_when_ray_does_not_start(slurm, tmp_path):
    ray = tmp_path / "bin" / "ray"
    ray.write_text("#!/bin/bash\nexit 1\n")
    code, calls, message = slurm("0")
    assert code == 1
    assert "did not start on n1" in message
    assert not any("jobs.all" in call for call in calls)


def test_slurm_can_be_requeued_and_is_told_in_time():
    text = (CONFIGS / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH (\S+)", text, re.M)
    assert {"--requeue", "--signal=B:USR1@300", "--ntasks-per-node=1"} <= set(options)
    (script,) = re.findall(r"<< 'END'\n(.*?)\nEND\n", text, re.S)
    ast.parse(script)


# -- two machines


def test_two_machines_has_commands_that_exist():
    lines = command_lines("two_machines.md")
    ours = [words for words in lines if words[0] == "ratecluster"]
    assert [words[1] for words in ours] == ["run"]
    check_run(ours[0][2:])
    names = [words[1] for words in lines if words[0] == "ray"]
    assert names == ["get-auth-token", "start", "start", "status", "job", "stop"]
    for words in lines:
        if words[0] == "ray":
            check_ray(words[1:])


def test_two_machines_opens_the_ports_that_it_starts_on():
    text = (CONFIGS / "two_machines.md").read_text()
    ports = re.search(r"\*\*Ports\.\*\*.*\n.*", text).group()
    for words in command_lines("two_machines.md"):
        if words[1] == "start":
            used = [word.partition("=")[2] for word in words if "-port=" in word]
            assert used
            assert all(port in ports for port in used)
