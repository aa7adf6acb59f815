"""A bundle as an image that runs `headfold serve`, and as an InferenceService of KServe made of it."""

from headfold.export.packaging.package import Package, Serving, render
from headfold.runtime.manifest import Manifest

_MIB = 1 << 20
_BESIDE = 2048  # MiB: Python, activations, the cache of a few answers and what it keeps of earlier ones


def kserve(name: str, manifest: Manifest, serving: Serving) -> Package:
    """The build context of an image, and the manifest that runs it."""
    weights = -(
        -sum(entry.size for entry in manifest.files.values()) // _MIB
    )  # twice: ONNX Runtime reorders them as it loads
    names = {"name": name, "serving": serving, "memory": 2 * weights + _BESIDE}
    return Package(
        bundle="bundle",
        texts={
            "Dockerfile": render("Dockerfile.j2", **names),
            "inferenceservice.yaml": render("inferenceservice.yaml.j2", **names),
        },
    )
