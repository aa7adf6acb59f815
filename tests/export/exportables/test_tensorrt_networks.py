"""Models of transformers' road in TensorRT: what differs from layer to layer does there too, or is refused by name."""

from importlib.util import find_spec

import pytest
from random_transformers import save_random

from headfold.export.bundle.pipeline import ExportOptions, export_bundle
from headfold.export.engine.network_runner import network_candidate
from headfold.export.engine.options import BuildOptions
from headfold.export.exportables.opening import open_exportable
from headfold.export.exportables.tried import TRIED
from headfold.export.parity.verify import verify
from headfold.export.progress import Reporter
from headfold.runtime.errors import BuildError

pytestmark = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
QUIET = Reporter(quiet=True)


@pytest.mark.parametrize(
    ("model_type", "attention", "refusal"),
    [
        ("gemma3_text", "native", ""),  # two windows and two bases
        pytest.param("smollm3", "plugin", "", marks=pytest.mark.slow),  # a layer without RoPE
        pytest.param("gemma2", "plugin", "", marks=pytest.mark.slow),  # a soft cap
        ("gemma2", "native", "TensorRT ignores a soft cap"),
        pytest.param("gpt_oss", "plugin", "the model has attention sinks", marks=pytest.mark.slow),
    ],
)
def test_the_network_agrees_or_is_refused_by_name(model_type, attention, refusal, tmp_path) -> None:
    source = open_exportable(save_random(model_type, tmp_path / "model"), "transformers")
    bundle, options = tmp_path / "bundle", BuildOptions(attention=attention)
    export_bundle(source, bundle, ExportOptions(verify=False), QUIET)

    def prove() -> bool:
        return verify(bundle, lambda _: source, 4, QUIET, lambda m: network_candidate(bundle, m, options)).passed

    row = next(row for row in TRIED if row.model_type == model_type)
    assert (attention in row.tensorrt) == (not refusal)
    if not refusal:
        assert prove()
        return
    with pytest.raises(BuildError, match=refusal):
        prove()
