"""Puts configs/ and launch/, which stay at the top of a checkout, into the package; all else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {"megaopus.configs": "configs", "megaopus.launch": "launch"}

setup(
    packages=[*find_packages(include=["megaopus", "megaopus.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "megaopus": ["py.typed"],
        "megaopus.configs": ["**/*.yaml"],
        "megaopus.launch": ["*.sh", "*.sbatch", "*.yaml"],
    },
)
