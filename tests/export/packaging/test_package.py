"""`headfold package`: what KServe gets, held against Kubernetes' and KServe's own schemas, and what is refused."""

import ast
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from schemas import schema

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.cli import main
from headfold.export.exportables.opening import open_exportable
from headfold.export.progress import Reporter

KUBERNETES = "1.33"


@pytest.fixture(scope="module")
def bundle(toy_checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "Toy_1.5"
    export_bundle(open_exportable(toy_checkpoint), path, ExportOptions(verify=False), Reporter(quiet=True))
    return path


def package(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["package", *map(str, arguments)])
    return result.exit_code, result.output


def kserve_type(name: str) -> tuple[dict[str, str], dict[str, str]]:
    """Types and JSON names of one of KServe's models. Read, not imported: its package imports a whole server."""
    for node in ast.walk(ast.parse(schema(f"kserve/models/{name}").read_text())):
        if isinstance(node, ast.ClassDef):
            values = {
                statement.targets[0].id: ast.literal_eval(statement.value)
                for statement in node.body
                if isinstance(statement, ast.Assign)
            }
            return values["openapi_types"], {json: name for name, json in values["attribute_map"].items()}
    raise AssertionError(name)


def check_kserve(content: dict[str, object], kind: str) -> None:
    """Every field is one of KServe's."""
    snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in kind).lstrip("_")
    types, names = kserve_type(f"{snake}.py")
    for key, value in content.items():
        assert key in names, f"{kind} has no {key}"
        of_field = types[names[key]]
        if of_field.startswith("V1beta1"):
            check_kserve(value, of_field)


@pytest.fixture(scope="module")
def made(bundle, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("deploy")
    code, printed = package(bundle, "--for", "kserve", "-o", output, "--threads", 3)
    assert code == 0, printed
    return output / "toy-1-5"  # a name that Kubernetes takes


def test_the_inference_service_is_kserve_s_and_its_pod_kubernetes_s(made) -> None:
    service = yaml.safe_load((made / "inferenceservice.yaml").read_text())
    check_kserve(service, "V1beta1InferenceService")
    (container,) = service["spec"]["predictor"]["containers"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": {"containers": [container]}}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert container["resources"]["requests"]["cpu"] == "3"


def test_the_schemas_refuse_what_is_wrong(made) -> None:
    service = yaml.safe_load((made / "inferenceservice.yaml").read_text())
    service["spec"]["predictor"]["replicas"] = 1
    with pytest.raises(AssertionError, match="V1beta1PredictorSpec has no replicas"):
        check_kserve(service, "V1beta1InferenceService")


def test_the_image_holds_the_bundle_and_serves_it(made, bundle) -> None:
    lines = (made / "Dockerfile").read_text().splitlines()
    assert any(line.startswith("FROM python:") for line in lines)
    assert lines[-1].startswith("CMD ")
    assert ast.literal_eval(lines[-1][4:])[:3] == ["headfold", "serve", "/bundle"]
    assert ast.literal_eval(lines[-1][4:])[-2:] == ["--threads", "3"]
    assert {p.name: p.read_bytes() for p in (made / "bundle").iterdir()} == {
        p.name: p.read_bytes() for p in bundle.iterdir()
    }


def test_what_cannot_be_packaged_is_one_line(bundle, made, tmp_path) -> None:
    for arguments, message in (
        ((bundle, "--for", "kserve", "-o", made.parent), "already exists"),
        ((bundle, "--for", "triton", "-o", tmp_path / "r", "--name", "a b"), "'a b' is no name of a service"),
        ((bundle, "--for", "triton", "-o", tmp_path / "r", "--backend", "tensorrt"), "has no engine"),
        ((bundle, "--for", "triton", "-o", tmp_path / "r", "--attention", "plugin"), "chooses a TensorRT engine"),
        ((tmp_path, "--for", "triton", "-o", tmp_path / "r"), "has no manifest.json"),
        ((bundle, "--for", "triton", "-o", bundle / "model.onnx"), "model.onnx"),
    ):
        code, printed = package(*arguments)
        assert (code, len(printed.strip().splitlines())) == (2, 1), printed
        assert message in printed
    assert not (tmp_path / "r").exists()


def test_a_damaged_bundle_is_not_packaged(bundle, tmp_path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in bundle.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    graph = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(graph[:-1] + bytes([graph[-1] ^ 1]))
    code, printed = package(copy, "--for", "triton", "-o", tmp_path / "r")
    assert code == 2
    assert "SHA-256" in printed
    assert not (tmp_path / "r").exists()
