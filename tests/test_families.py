"""Families by name: built in, installed by a package, or in a definition file; and what is said about broken ones."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rnnq
from rnnq import definitions, families
from rnnq.errors import InputError
from rnnq.families.base import Family, Generator
from rnnq.families.dynamics.config import DynamicsConfig
from rnnq.families.dynamics.model import Dynamics

Install = Callable[[str, str], None]


class ToyConfig(rnnq.Config):
    steps: int = 3


@rnnq.family(ToyConfig)
def counted(config: ToyConfig) -> Iterator[dict[str, float]]:
    """Counts."""
    yield {"loss": 1.0}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A package as pip would leave it: install("toy = rnnq_toy:Toy", code of rnnq_toy.py)."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(entry: str, code: str) -> None:
        info = tmp_path / "rnnq_toy-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rnnq-toy\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[rnnq.families]\n{entry}\n")
        (tmp_path / "rnnq_toy.py").write_text(textwrap.dedent(code))

    yield write
    sys.modules.pop("rnnq_toy", None)


TOY = """
    import rnnq

    class ToyConfig(rnnq.Config):
        steps: int = 3

    class Toy(rnnq.Family):
        Config = ToyConfig
        name = "toy"

    @rnnq.family(ToyConfig)
    def counted(config):
        yield {"loss": 1.0}

    class Bare:
        pass

    class NoConfig(rnnq.Family):
        name = "bare"
"""


# ------------------------------------------------------------------------------------------------------- built in


def test_a_built_in_family_is_found_by_its_name() -> None:
    assert families.find_config("dynamics") is DynamicsConfig
    assert isinstance(families.find("dynamics"), Dynamics)


@pytest.mark.parametrize("name", families.BUILTIN)
def test_a_built_in_family_has_the_config_and_the_name_of_the_table(name: str) -> None:
    found = families.find(name)

    assert found.Config is families.find_config(name)
    assert families.name_of(found) == found.name == name


def test_each_run_gets_a_family_of_its_own() -> None:
    """What a family remembers, such as the bytes that it reads, is of one run."""
    assert families.find("dynamics") is not families.find("dynamics")


@pytest.mark.parametrize("find", [families.find, families.find_config])
def test_a_name_that_nobody_has_gets_the_nearest(find: Callable[[str], object]) -> None:
    with pytest.raises(InputError, match="there is no family 'dynamic'") as caught:
        find("dynamic")
    assert caught.value.hint == "did you mean dynamics?"

    with pytest.raises(InputError) as caught:
        find("zzz")
    assert caught.value.hint == "it has dynamics, fsm, fsm_probe, groups, scaling"


@pytest.mark.parametrize("name", families.BUILTIN)
def test_the_config_of_a_built_in_family_is_found_without_torch(name: str) -> None:
    """That it is made and fingerprinted, too."""
    code = f"""
        import sys
        from rnnq import config, families
        model = families.find_config({name!r})
        values = {{"seed": 1}} | ({{"steps": 9}} if "steps" in model.model_fields else {{}})
        config.fingerprint({name!r}, config.parse(model, values))
        print([m for m in ("torch", "pandas", "matplotlib", "sqlalchemy") if m in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------ installed by a package


def test_an_installed_family_is_found_by_its_entry_point(install: Install) -> None:
    install("toy = rnnq_toy:Toy", TOY)

    found = families.find("toy")
    assert isinstance(found, Family)
    assert found.name == "toy"
    assert families.find_config("toy") is found.Config


def test_an_installed_generator_is_a_family_too(install: Install) -> None:
    install("counts = rnnq_toy:counted", TOY)

    assert isinstance(families.find("counts"), Generator)
    assert families.find_config("counts").__name__ == "ToyConfig"


def test_an_installed_family_is_among_the_nearest_names(install: Install) -> None:
    install("toyfamily = rnnq_toy:Toy", TOY)

    with pytest.raises(InputError) as caught:
        families.find("toyfamly")
    assert caught.value.hint == "did you mean toyfamily?"


def test_a_built_in_family_cannot_be_replaced_by_a_package(install: Install) -> None:
    install("dynamics = rnnq_toy:Toy", TOY)

    assert families.find_config("dynamics") is DynamicsConfig
    assert isinstance(families.find("dynamics"), Dynamics)


@pytest.mark.parametrize(
    ("entry", "code", "why"),
    [
        ("toy = rnnq_toy:Toy", "import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package"),
        ("toy = rnnq_toy:Toy", "1 / 0", "ZeroDivisionError: division by zero"),
        ("toy = rnnq_toy:Toy", "def", "SyntaxError"),
        ("toy = rnnq_toy:Misspelt", TOY, "AttributeError: module 'rnnq_toy' has no attribute 'Misspelt'"),
    ],
    ids=["missing import", "raises", "no python", "misspelt"],
)
@pytest.mark.parametrize("find", [families.find, families.find_config])
def test_a_package_that_cannot_be_loaded_is_named_with_the_reason(
    install: Install, find: Callable[[str], object], entry: str, code: str, why: str
) -> None:
    install(entry, code)

    with pytest.raises(InputError) as caught:
        find("toy")
    assert "the family 'toy' of rnnq-toy" in caught.value.message
    assert why in caught.value.message
    assert caught.value.hint == "mend or reinstall rnnq-toy"


@pytest.mark.parametrize("entry", ["toy = rnnq_toy:Bare", "toy = rnnq_toy:NoConfig", "toy = rnnq_toy:ToyConfig"])
def test_an_installed_object_without_a_config_is_no_family(install: Install, entry: str) -> None:
    install(entry, TOY)

    with pytest.raises(InputError, match="is no family: its Config is None"):
        families.find_config("toy")


# ------------------------------------------------------------------------------------------- in a definition file

DEFINITION = """
    import rnnq

    class ParityConfig(rnnq.Config):
        steps: int = 3

    @rnnq.family(ParityConfig)
    def parity(config):
        yield {"loss": 1.0}

    class Named(rnnq.Family):
        Config = ParityConfig
        name = "another name"

    class Nameless(rnnq.Family):
        Config = ParityConfig

    a = rnnq.stage("a", parity, rnnq.grid(steps=[1]))
    b = rnnq.stage("b", Named, rnnq.grid(steps=[1]))
    c = rnnq.stage("c", Nameless, rnnq.grid(steps=[1]))
    d = rnnq.stage("d", "dynamics", rnnq.grid(steps=[1]))
"""


@pytest.fixture
def definition(tmp_path: Path) -> definitions.Definition:
    path = tmp_path / "study.py"
    path.write_text(textwrap.dedent(DEFINITION))
    return definitions.load(path)


@pytest.mark.parametrize(("name", "kind"), [("parity", Generator), ("another name", Family), ("Nameless", Family)])
def test_a_family_of_a_definition_file_is_found_by_the_name_that_it_is_stored_under(
    definition: definitions.Definition, name: str, kind: type
) -> None:
    found = families.find(name, definition)

    assert isinstance(found, kind)
    assert families.config_of(found).__name__ == "ParityConfig"
    assert name in [families.name_of(stage.family) for stage in definition.stages if not isinstance(stage.family, str)]


def test_a_family_that_is_no_longer_in_its_file_is_said(definition: definitions.Definition) -> None:
    with pytest.raises(InputError, match="has no family parety"):
        families.find("parety", definition)
    with pytest.raises(InputError, match="has no family dynamics"):
        families.find("dynamics", definition)  # the file only names it


# ----------------------------------------------------------------------------------------------------- broken ones


@pytest.mark.parametrize(
    "found", [3, "dynamics", print, ToyConfig, object(), None], ids=lambda found: type(found).__name__
)
def test_what_is_no_family_is_refused_with_what_to_write(found: object) -> None:
    with pytest.raises(InputError, match="is no family") as caught:
        families.config_of(found)
    assert "@rnnq.family" in str(caught.value.hint)
    with pytest.raises(InputError, match="is no family") as caught:
        families.as_family(found)
    assert "rnnq.Family" in str(caught.value.hint)


def test_a_class_that_is_no_family_is_not_even_called() -> None:
    class Trap:
        def __init__(self) -> None:
            raise AssertionError("called")

    with pytest.raises(InputError, match="is no family"):
        families.as_family(Trap)


def test_a_config_that_is_no_config_is_refused() -> None:
    class Odd(rnnq.Family):
        Config = dict  # type: ignore[assignment]

    with pytest.raises(InputError, match="its Config is <class 'dict'>"):
        families.config_of(Odd)


@pytest.mark.parametrize("config", [dict, 3, None, "ToyConfig", ToyConfig(), counted])
def test_the_decorator_takes_only_a_config_class(config: object) -> None:
    with pytest.raises(InputError, match=r"@rnnq\.family takes a subclass of rnnq\.Config") as caught:
        rnnq.family(config)  # type: ignore[arg-type]
    assert caught.value.hint == "write @rnnq.family(MyConfig)"


def test_a_decorated_function_keeps_its_name_its_words_and_its_numbers() -> None:
    assert families.name_of(counted) == "counted"
    assert counted.__doc__ == "Counts."
    assert list(counted(ToyConfig())) == [{"loss": 1.0}]
    assert families.config_of(counted) is ToyConfig
    assert families.as_family(counted) is counted
