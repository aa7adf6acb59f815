"""A bundle as a model in a repository of NVIDIA Triton Inference Server; `headfold.runtime.triton_server` is what runs there."""

from headfold.export.packaging.package import Package, Serving, render
from headfold.runtime.manifest import Manifest
from headfold.runtime.triton_server.model import BUNDLE, INPUTS, OUTPUTS, PARAMETERS


def triton(name: str, manifest: Manifest, serving: Serving) -> Package:
    """`config.pbtxt`, and the model's first version with the bundle in it."""
    config = render(
        "config.pbtxt.j2",
        name=name,
        inputs=INPUTS,
        outputs=OUTPUTS,
        parameters={key: getattr(serving, key) for key in PARAMETERS},
        gpu=serving.gpu,
    )
    return Package(bundle=f"1/{BUNDLE}", texts={"config.pbtxt": config, "1/model.py": render("model.py.j2")})
