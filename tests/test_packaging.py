"""kernels/ installs as rlcore.kernels every way, and Hugging Face's package `kernels` stays itself.

Each way gets a copy of the source and an environment of its own, which borrows this one's packages
(but not its rlcore) through a .pth file: nothing is downloaded.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("kernels", "rlcore", "setup.py", "pyproject.toml", "LICENSE")
SITE = Path(sysconfig.get_path("purelib"))
WHERE_KERNELS = "import rlcore.kernels.backend as b; print(b.__file__)"
WHERE_HUGGING_FACE = "import kernels; print(kernels.__file__); print(kernels.get_kernel)"


def run(command: list[object], cwd: Path, **environment: str) -> str:
    """The command's output; the test fails with all it said where it fails."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=inherited | {"TRITON_INTERPRET": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def pip(*words: object, cwd: Path) -> None:
    offline = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run([sys.executable, "-m", "pip", *words, *offline], cwd, PIP_DISABLE_PIP_VERSION_CHECK="1")


def copy_source(directory: Path) -> Path:
    """The files that packaging reads, rlcore/kernels still a symlink."""
    directory.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, directory / name)
    (directory / "README.md").write_text("The metadata wants one, whatever it says.\n")
    return directory


def make_environment(directory: Path) -> Path:
    """A fresh environment's python, with this one's packages in reach and no rlcore installed."""
    run([sys.executable, "-m", "venv", "--without-pip", directory], ROOT)
    packages = next(directory.glob("lib/python*/site-packages"))
    (packages / "borrowed.pth").write_text(f"{SITE}\n")
    return directory / "bin" / "python"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def elsewhere(folder):
    (folder / "elsewhere").mkdir()
    return folder / "elsewhere"


@pytest.fixture(scope="module")
def wheel(folder):
    source = copy_source(folder / "wheel_source")
    pip("wheel", ".", "--wheel-dir", folder / "wheels", cwd=source)
    (path,) = (folder / "wheels").glob("rlcore-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel_python(folder, wheel):
    python = make_environment(folder / "wheel_environment")
    packages = next((folder / "wheel_environment").glob("lib/python*/site-packages"))
    pip("install", wheel, "--target", packages, cwd=folder)
    return python


@pytest.fixture(scope="module")
def editable(folder):
    """(the environment's python, the source it points to)."""
    source = copy_source(folder / "editable_source")
    python = make_environment(folder / "editable_environment")
    pip("--python", python, "install", "-e", ".", cwd=source)
    tests = source / "tests"
    tests.mkdir()
    (tests / "test_sample.py").write_text(
        "import kernels\nimport rlcore.kernels.backend\n\n"
        "def test_both_packages_are_themselves():\n"
        "    assert hasattr(kernels, 'get_kernel')\n"
        "    assert not hasattr(rlcore.kernels, 'get_kernel')\n"
    )
    return python, source


def test_the_wheel_holds_the_kernels_as_files_and_no_package_of_that_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        held = {name for name in names if name.startswith("rlcore/kernels/")}
        files = [path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")]
        assert held == {f"rlcore/{path.as_posix()}" for path in files}
        for name in held:
            content = (ROOT / Path(name).relative_to("rlcore")).read_bytes()
            assert archive.read(name) == content
    assert {"rlcore/py.typed", "rlcore/runs/report/page.html"} <= set(names)
    assert "rlcore/trainers/grpo.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rlcore"}


def test_an_installed_wheel_works_from_elsewhere(wheel_python, elsewhere):
    where = Path(run([wheel_python, "-c", WHERE_KERNELS], elsewhere))
    assert where.is_relative_to(wheel_python.parents[1])
    assert "rlcore" in run([wheel_python, "-m", "rlcore", "--version"], elsewhere)
    assert "kernels/__init__.py" in run([wheel_python, "-c", WHERE_HUGGING_FACE], elsewhere)


def test_an_editable_install_imports_from_the_source(editable, elsewhere):
    python, source = editable
    where = Path(run([python, "-c", WHERE_KERNELS], elsewhere))
    assert where.resolve() == source / "kernels" / "backend.py"
    assert "rlcore" in run([python.parent / "rlcore", "--version"], elsewhere)


def test_an_edit_of_a_kernel_shows_in_an_editable_install(editable, elsewhere):
    python, source = editable
    (source / "kernels" / "new_kernel.py").write_text("ANSWER = 42\n")
    code = "from rlcore.kernels import new_kernel; print(new_kernel.ANSWER)"
    assert run([python, "-c", code], source) == "42"
    assert run([python, "-c", code], elsewhere) == "42"


def test_python_dash_m_pytest_imports_both_packages(editable):
    python, source = editable
    assert "1 passed" in run([python, "-m", "pytest"], source)


def test_the_pytest_script_imports_both_packages(editable):
    python, source = editable
    # the console script, unlike `python -m pytest`, does not put the root on sys.path
    script = "import sys, pytest; sys.path.remove(''); sys.exit(pytest.console_main())"
    assert "1 passed" in run([python, "-c", script], source)


@pytest.mark.parametrize("place", ["source", "elsewhere"])
def test_hugging_face_kernels_stays_itself_from_the_root_and_elsewhere(editable, elsewhere, place):
    python, source = editable
    shown = run([python, "-c", WHERE_HUGGING_FACE], source if place == "source" else elsewhere)
    assert Path(shown.splitlines()[0]) == SITE / "kernels" / "__init__.py"


def test_transformers_finds_hugging_face_kernels_from_the_root(editable):
    python, source = editable
    # the bounds are open: which version it asks for is not the matter here
    code = (
        "from transformers.utils import is_kernels_available as available;"
        "import rlcore.kernels; print(available('0', '999'))"
    )
    assert run([python, "-c", code], source) == "True"


def test_a_checkout_that_is_not_installed_runs_from_its_root(folder):
    source = copy_source(folder / "plain_source")
    python = make_environment(folder / "plain_environment")
    code = "from importlib.util import find_spec as f; print(f('rlcore.kernels.backend').origin)"
    where = Path(run([python, "-c", code], source))
    assert where == source / "rlcore" / "kernels" / "backend.py"
    assert "rlcore" in run([python, "-m", "rlcore", "--version"], source)


def test_the_symlink_is_relative_and_kernels_is_no_package_of_its_own():
    link = ROOT / "rlcore" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


# what comes with a dependency that pins its version
BROUGHT = {"pyarrow": "datasets", "tokenizers": "transformers"}
TRACKERS = {"mlflow"}  # run where the user has one; the others are imported by accelerate
NAMES = {"yaml": "pyyaml"}  # packages whose import is called otherwise


def test_everything_that_the_library_imports_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = project["dependencies"] + [each for extra in extras for each in extra]
    declared = {re.match(r"[\w-]+", each)[0].replace("-", "_").lower() for each in wanted}
    missing = set()
    # the benchmark's peers and the frameworks are imported where their users have them
    for path in (ROOT / "rlcore").rglob("*.py"):
        if path.relative_to(ROOT / "rlcore").parts[0] in ("bench", "integrations"):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            roots = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
            missing |= {BROUGHT.get(root, NAMES.get(root, root)) for root in roots}
    assert sorted(missing - declared - TRACKERS - {"rlcore"}) == []
