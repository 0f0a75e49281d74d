"""The code blocks and commands of README.md and docs/ run, and print the output shown there."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxlora
from fxlora import cli
from fxlora.delivery.formats import FORMATS
from fxlora.lora.ops import OPS
from fxlora.lora.variants import VARIANTS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = ("peft", "torchao", "torchvision", "transformers")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the language and the text of each fenced block of a page."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def sessions(page: Path) -> list[tuple[str, str | None]]:
    """Return each Python block that is to run, with the output shown right after it."""
    found: list[tuple[str, str | None]] = []
    text = page.read_text("utf-8")
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        found.append((match[1], match[2]))
    return found


def shown(expected: str) -> re.Pattern[str]:
    """Return a pattern for an output: a line `…` is any lines, a `…` in a line any text."""
    lines: list[str] = []
    for line in expected.rstrip("\n").split("\n"):
        if line.strip() == "…":
            lines.append(r"(?:[^\n]*\n)*?")
        else:
            lines.append(re.escape(line).replace("…", "[^\n]*") + r"[ ]*\n")
    return re.compile("".join(lines))


RUN = [
    pytest.param(
        page,
        marks=[
            *([pytest.mark.autocast] if "autocast(" in str(sessions(page)) else []),
            *([pytest.mark.slow] if page.name == "README.md" else []),  # runs below, on less
        ],
        id=str(page.relative_to(ROOT)),
    )
    for page in PAGES
    if sessions(page)
]


@pytest.mark.usefixtures("_tables")
@pytest.mark.parametrize("page", RUN)
def test_a_page_is_a_session(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in OPTIONAL:
        if package in page.read_text("utf-8"):
            pytest.importorskip(package, reason=f"{package} is optional")
    run_page(page, sessions(page), tmp_path, monkeypatch)


def tagged(page: Path) -> dict[str, tuple[str, str | None]]:
    """Return the Python block, with its output, of each format of which a page has a recipe."""
    pattern = r"^```python (\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    found = re.findall(pattern, page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return {name: (code, text or None) for name, code, text in found}


DELIVERY = ROOT / "docs" / "delivery.md"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "onnx" else pytest.mark.slow)
        for name in tagged(DELIVERY)
    ],
)
def test_a_recipe_of_a_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in FORMATS[name].packages:
        pytest.importorskip(package, reason=f"{package} is optional")
    run_page(DELIVERY, [sessions(DELIVERY)[0], tagged(DELIVERY)[name]], tmp_path, monkeypatch)


def test_every_format_has_a_recipe() -> None:
    assert {"pt2", *tagged(DELIVERY)} == set(FORMATS)


@pytest.mark.usefixtures("_tables")
def test_the_readme_on_fewer_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ResNet of its last stage alone, and a Swin of 2 blocks in place of 12."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is optional")
    pytest.importorskip("peft", reason="peft is optional")

    def resnet18(num_classes: int) -> torch.nn.Module:
        block = models.resnet.BasicBlock
        model = models.ResNet(block, [1, 1, 1, 1], num_classes)
        model.layer1 = model.layer2 = model.layer3 = torch.nn.Identity()
        model.inplanes = 64
        model.layer4 = model._make_layer(block, 512, 2, stride=2)
        return model

    def swin_t() -> torch.nn.Module:
        return models.SwinTransformer([4, 4], 12, [2], [2], [3, 3])

    monkeypatch.setattr(models, "resnet18", resnet18)
    monkeypatch.setattr(models, "swin_t", swin_t)
    page, said = ROOT / "README.md", {"0 of 12\n": "0 of 2\n", "12 of 12\n": "2 of 2\n"}
    found = [(code, said.get(text or "", text)) for code, text in sessions(page)]
    run_page(page, found, tmp_path, monkeypatch)


def run_page(
    page: Path,
    found: list[tuple[str, str | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run the blocks of a page in one namespace, and compare what they print with the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: True)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for code, expected in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            exec(compile(code, str(page), "exec"), namespace)
        if expected is not None:
            text = printed.getvalue().rstrip("\n") + "\n"
            text = "".join(line.rstrip() + "\n" for line in text.split("\n")[:-1])
            assert shown(expected).fullmatch(text), f"{page.name} shows\n{expected}\nnot\n{text}"


@pytest.fixture
def _tables() -> Iterator[None]:
    """Forget the ops and variants that a page registers."""
    tables: list[dict[Any, Any]] = [OPS, VARIANTS]
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def commands(page: Path) -> list[list[str]]:
    """Return the fxlora commands of a page that name a model of torchvision."""
    lines = "\n".join(text for language, text in blocks(page) if language == "sh")
    lines = lines.replace("\\\n", " ")
    return [
        shlex.split(line, comments=True)[1:]
        for line in lines.split("\n")
        if line.startswith("fxlora ") and "torchvision:" in line
    ]


def shallow(resnet: Callable[..., Any], block: Any, layers: list[int], **how: Any) -> Any:
    """Return a ResNet with one block of the first size: the others are alike."""
    model = resnet(block, [1] * len(layers), **how)
    model.layer2 = model.layer3 = model.layer4 = torch.nn.Identity()
    model.fc = torch.nn.Linear(64, 1000)
    return model


@pytest.mark.parametrize(
    ("page", "small"),
    [
        ("README.md", True),
        pytest.param("README.md", False, marks=pytest.mark.slow),
        pytest.param("docs/command_line.md", False, marks=pytest.mark.slow),
    ],
)
def test_commands(
    page: str,
    small: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchvision", reason="torchvision is optional")
    from torchvision.models import resnet

    monkeypatch.chdir(tmp_path)
    if small:
        monkeypatch.setattr(resnet, "ResNet", functools.partial(shallow, resnet.ResNet))
    found = commands(ROOT / page)
    assert {words[0] for words in found} >= {"plan", "adapt", "fold", "verify", "export"}
    for words in found:
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "model.pt2").is_file()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)`", page.read_text("utf-8")):
            assert re.search(rf"^{target}\b.*:", makefile, re.MULTILINE), (page, target)


def test_every_public_name_is_in_the_api_pages() -> None:
    """With the first sentences of its docstring for GitHub, and a directive for Sphinx."""
    text = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    for name in fxlora.__all__:
        summary = (inspect.getdoc(getattr(fxlora, name)) or "").partition("\n\n")[0]
        assert f"| `fxlora.{name}` | {' '.join(summary.split())} |\n" in text
    comments = "".join(re.findall(r"^<!-- autodoc\n(.*?)^-->$", text, re.DOTALL | re.MULTILINE))
    directives = re.findall(r"^\.\. auto\w+:: fxlora\.(\w+)$", comments, re.MULTILINE)
    assert sorted(directives) == sorted(fxlora.__all__)
