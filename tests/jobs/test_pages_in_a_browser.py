"""The report page in a real browser: it asks for nothing, fits a phone, and can be read with the keyboard alone."""

from collections.abc import Iterator
from pathlib import Path

import html5lib
import pytest
from browser import Page, browser_page
from rich.console import Console
from small_runs import finish_stage, report_training
from trained_runs import trained_run

from jobs.progress import ProgressReport
from jobs.report import write_report

TAB = ("Tab", 9)
ENTER = ("Enter", 13)
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with curves and scores; without pictures, which need held-out clips."""
    folder = tmp_path_factory.mktemp("run")
    run, _ = trained_run(folder)
    report_training(run, 1, {10: 5.0, 20: 4.75, 40: 4.25})
    finish_stage(run, 1, 40)
    file = folder / "report.html"
    assert write_report(run, file, ProgressReport(Console(quiet=True)), has_pictures=False) == 0
    return file


@pytest.fixture
def page(report_file: Path, tmp_path: Path) -> Iterator[Page]:
    with browser_page(tmp_path) as page:
        page.open(report_file)
        yield page


def test_the_page_is_valid_html(report_file: Path) -> None:
    parser = html5lib.HTMLParser(strict=False, namespaceHTMLElements=False)
    parser.parse(report_file.read_text())
    assert parser.errors == []


def test_the_page_opens_from_disk_and_asks_for_nothing_else(page: Page, report_file: Path) -> None:
    asked = [url for url in page.requests() if not url.startswith("data:")]
    assert asked == [report_file.resolve().as_uri()]
    assert page.complaints() == []
    assert page.value("document.title").endswith("a run of SViTT-Ego")
    assert page.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_the_tab_key_reaches_skip_link_sections_and_wide_tables_and_shows_where_it_is(page: Page) -> None:
    seen = []
    for _ in range(40):
        page.press(*TAB)
        seen.append(page.value("document.activeElement.outerHTML.slice(0, 40)"))
        if page.value("document.activeElement === document.body"):
            break
        outline = page.value("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"nothing shows that {seen[-1]} has the focus"
    assert seen[0].startswith('<a class="skip"')
    links = page.value("document.querySelectorAll('a').length")
    regions = page.value("document.querySelectorAll('[tabindex=\"0\"]').length")
    assert regions >= 2
    assert len({*seen}) >= links + 1


def test_enter_on_a_section_link_goes_there(page: Page) -> None:
    page.press(*TAB)
    page.press(*TAB)
    page.press(*ENTER)
    assert page.value("location.hash") == "#curriculum"
    assert page.value("Math.abs(document.querySelector('#curriculum').getBoundingClientRect().top)") < 400


def test_on_a_phone_nothing_but_tables_scrolls_sideways(page: Page) -> None:
    page.call("Emulation.setDeviceMetricsOverride", **PHONE)
    assert page.value("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.value("parseFloat(getComputedStyle(document.body).fontSize)") >= 14


def test_dark_readers_get_light_letters_on_a_dark_ground(page: Page) -> None:
    def brightness(of: str, scheme: str) -> float:
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colour = page.value(f"getComputedStyle(document.body).{of}")
        red, green, blue = (float(part) for part in colour.strip("rgba()").split(",")[:3])
        return (0.299 * red + 0.587 * green + 0.114 * blue) / 255

    for scheme, is_dark in (("light", False), ("dark", True)):
        ground, letters = brightness("backgroundColor", scheme), brightness("color", scheme)
        assert (ground < letters) is is_dark
        assert abs(ground - letters) > 0.6


def test_on_paper_it_is_black_on_white_without_the_navigation(page: Page) -> None:
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.call("Emulation.setEmulatedMedia", media="print", features=dark)
    assert page.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    printed = page.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
    assert len(printed["data"]) > 10_000
