"""Packaging that pyproject.toml cannot express: the folder kernels/ installs as rlcore.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["rlcore*"]),
        "rlcore.kernels",
        *(f"rlcore.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"rlcore.kernels": "kernels"},
)
