"""What is tried is listed in one place: the command prints it and README has it, so neither says more than the other."""

import json
from pathlib import Path

from click.testing import CliRunner
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from headfold.export.checkpoints.families import FAMILIES
from headfold.export.cli import main
from headfold.export.exportables.tried import TRIED

README = Path(__file__).parents[3] / "README.md"


def families(*options: str) -> str:
    result = CliRunner().invoke(main, ["families", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_readme_has_the_table_that_the_command_prints() -> None:
    assert families("--markdown") in README.read_text(), "put what `headfold families --markdown` prints into README"


def test_each_type_is_listed_once_with_its_road() -> None:
    rows = {row["model_type"]: row for row in json.loads(families("--json"))}
    assert len(rows) == len(TRIED)
    assert {name for name, row in rows.items() if row["road"] == "headfold"} == set(FAMILIES)
    assert rows["llama"]["real_weights"] == "SmolLM2-135M-Instruct"
    assert set(rows) <= set(CONFIG_MAPPING_NAMES)  # of transformers
    assert all(name in families() for name in rows)
