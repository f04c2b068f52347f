"""The two lists of packages agree, and name what the README promises."""

from pathlib import Path

import yaml


def test_environment_and_requirements_agree():
    requirements = set(Path("requirements.txt").read_text().split())
    environment = yaml.safe_load(Path("environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert set(pip) == requirements
    assert {line.split("==")[0] for line in requirements} == {"torch", "numpy", "matplotlib", "pyyaml", "tqdm"}
    assert all("==" in line for line in requirements)
