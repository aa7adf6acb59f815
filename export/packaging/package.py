"""A directory with a copy of a bundle and the texts that make somebody's server run it; published whole or not at all."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from headfold.export.publishing import check_free, one_line, publish
from headfold.plugins.attention.schema import Attention
from headfold.runtime.errors import BundleError, InputError
from headfold.runtime.manifest import MANIFEST, Manifest, check_files, read_manifest

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # of RFC 1123, which Kubernetes asks for; Triton takes more


@dataclass(frozen=True)
class Serving:
    """How the bundle is run there: see `headfold.runtime.load`; None as there."""

    backend: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    provider: Literal["cpu", "cuda"] = "cpu"
    attention: Attention | None = None
    threads: int | None = None

    @property
    def arguments(self) -> list[str]:
        """The same for `headfold serve`."""
        given = (field for field in fields(self) if getattr(self, field.name) != field.default)
        return [part for field in given for part in (f"--{field.name}", str(getattr(self, field.name)))]

    @property
    def gpu(self) -> bool:
        """Whether it needs one."""
        return self.backend == "tensorrt" or self.provider == "cuda"


@dataclass(frozen=True)
class Package:
    """Texts by their path, and where the bundle goes; relative to the package, with slashes."""

    bundle: str
    texts: dict[str, str]


Maker = Callable[[str, Manifest, Serving], Package]  # given the name of the model there


def render(template: str, **names: Any) -> str:
    """One of the templates beside this file."""
    environment = Environment(
        loader=PackageLoader(__name__),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    return environment.get_template(template).render(**names, version=version("headfold"))


def package(bundle: Path, output: Path, maker: Maker, name: str | None, serving: Serving) -> Path:
    """Write `output`/`name`, a package of the bundle; `output` is made if it is not there.

    Args:
        bundle: checked with all its hashes; the files that its manifest lists are copied, engines with them.
        output: a directory, which may hold other packages.
        maker: whose server it is for.
        name: of the model there; the bundle's by default.
        serving: how it is run.

    Raises:
        BundleError: the bundle is damaged, has no engine and `serving` wants one, or the package is there already.
        InputError: the name is none, or nothing can be written there.
    """
    name = bundle.resolve().name.lower().replace("_", "-").replace(".", "-") if name is None else name
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} is no name of a service",
            where="--name",
            fix="Take small letters, digits and dashes inside, 63 at most.",
        )
    manifest = read_manifest(bundle)
    if serving.backend == "tensorrt" and not manifest.engines:
        raise BundleError("has no engine", where=bundle, fix="Build one: `headfold build BUNDLE`.")
    check_files(bundle, manifest)
    made, target = maker(name, manifest, serving), output / name
    with one_line(InputError, target, "Free some space, or choose another place with -o."):
        output.mkdir(parents=True, exist_ok=True)
        check_free(target, InputError)
        with publish(target) as stage:
            for path, text in made.texts.items():
                (stage / path).parent.mkdir(parents=True, exist_ok=True)
                (stage / path).write_text(text)
            for file in (MANIFEST, *manifest.files):
                place = stage / made.bundle / file
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle / file, place)  # of a link, as in a hub's cache, what it points to
    return target
